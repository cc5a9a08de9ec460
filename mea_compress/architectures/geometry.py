"""What the attention blocks of a model hand to its cache, seen by running them: no family is described.

The model is built from its configuration without weights: projections are stand-ins that give every token the same
numbers, and a layer ends where it calls the cache. What the cache is handed says how many heads there are and how wide
they are; how it changes with the position says which channels RoPE rotates together.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache as remember
from typing import Any

import torch
from torch import nn

from mea_compress.architectures.families import LayerGeometry
from mea_compress.modeling import stock_class
from mea_compress.modeling.encoded_mea import cache_parameter
from mea_compress.modeling.section_mea import rotary_pairs

# Positions that are looked at, and the largest of them at most.
_TOKENS, _REACH = 24, 4096
# Changes of keys with the position that are RoPE's, and of the size of a rotary pair that are rounding, relative.
_MOVES, _ROUNDING = 1e-6, 1e-4
_SMALL_VOCABULARY = 8
_NOT_SEEN = "it keeps another state than keys and values per head"
_NOT_RUN = "it is not run on text alone"
# Numbers that a part of a layer may have to be run as it is.
_LARGE = 1 << 22


def find_geometry(config: Any) -> list[LayerGeometry | str]:
    """Return for every decoder layer what it caches, or why it caches no keys and values per head.

    Args:
        config: The configuration object of a causal language model of transformers.

    Raises:
        ValueError: The model cannot be built or run from its configuration, or has no layers to be found.
    """
    from transformers.cache_utils import DynamicCache

    class Recording(DynamicCache):
        def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> Any:
            raise _Cached(key_states, value_states)

    shrunk = shrink_vocabulary(copy.deepcopy(config))
    model, language = skeleton(shrunk, _keep_small), config.get_text_config()
    path, layers = decoder_layers(model)
    length = min(getattr(language, "max_position_embeddings", None) or _REACH, _REACH)
    positions = torch.arange(_TOKENS) * max(1, (length - 1) // _TOKENS)
    ids = torch.full((1, _TOKENS), _SMALL_VOCABULARY - 1)
    found: dict[int, LayerGeometry | str] = {}
    forwards = [layer.forward for layer in layers]
    for index, layer in enumerate(layers):
        layer.forward = _recording(f"{path}.{index}", layer, forwards[index], found, index)
    with torch.no_grad():
        run_decoder(model, input_ids=ids, position_ids=positions[None], cache=Recording(config=shrunk))
    kinds = getattr(language, "layer_types", None) or [None] * len(layers)
    for index, kind in enumerate(kinds):
        if found.get(index) == _NOT_SEEN and kind in ("full_attention", "sliding_attention", "chunked_attention"):
            raise ValueError(f"what layer {index} ({kind}) caches could not be seen")
    return [found.get(index, _NOT_RUN) for index in range(len(layers))]


def missing_tensors(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return what is wrong with the tensors of a checkpoint, or None where they are those of the model.

    Where transformers renames, fuses or transposes tensors as it loads them, those of other names or orders are left to
    it; encoders and decoders are ours.

    Args:
        config: The configuration object of the emitted form of a family.
        shapes: The tensors of the checkpoint.
    """
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from mea_compress.modeling.modeling_mea import family_model

    model_class: Any = family_model(stock_class(type(config).__mro__[1]))
    with torch.device("meta"):
        model = model_class(config)
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    names = {name for part in parts for name in (part.config.model_type, type(part).__name__)}
    converts = any(get_checkpoint_conversion_mapping(name) is not None for name in names)
    tied = set(model.all_tied_weights_keys) if getattr(config, "tie_word_embeddings", False) else set()
    prefix = f"{model.base_model_prefix}."
    for name, tensor in model.state_dict().items():
        bare = name.removeprefix(prefix)
        found = shapes.get(name, shapes.get(bare))
        if found is None and name not in tied and ("_composition." in name or not converts):
            return f"tensor {name} is missing"
        turned = converts and "_composition." not in name and sorted(found or ()) == sorted(tensor.shape)
        if found is not None and tuple(found) != tuple(tensor.shape) and not turned:
            return f"tensor {name} has shape {list(found)} where config.json asks for {list(tensor.shape)}"
    return None


def stored_layers(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str]:
    """Return the path of a model's decoder layers, and what stands in its place in the names of stored tensors.

    Published checkpoints of models for more than text have names of their own, which transformers changes as it loads
    them. What it makes of a name is seen by loading.

    Args:
        config: The configuration object of the emitted form of a family.
        shapes: The stored tensors.

    Raises:
        ValueError: They are stored fused, or split, so that no name can be told.
    """
    block = next(entry["block"] for entry in config.mea["layers"] if entry)
    parts = block.split(".")
    place = next(place for place, part in enumerate(parts) if part.isdecimal())
    path, below = ".".join(parts[:place]), ".".join(parts[place:])
    stock = shrink_vocabulary(stock_configuration(config))

    def keep_block(model: Any) -> None:
        kept = set(model.get_submodule(block).modules())
        for tied in (model.get_input_embeddings(), model.get_output_embeddings()):
            kept |= set() if tied is None else set(tied.modules())
        empty([module for module in model.modules() if module not in kept])

    names = [name for name in skeleton(stock, keep_block).state_dict() if name.startswith(f"{block}.")]
    for name in names:
        tail = f".{parts[place - 1]}.{below}{name.removeprefix(block)}"
        candidates = [stored for stored in shapes if f".{stored}".endswith(tail)]
        marks = {stored: torch.full(shapes[stored], float(mark)) for mark, stored in enumerate(candidates, 2)}
        if name in shapes:
            return path, path
        if not candidates:
            continue
        loaded = skeleton(stock, keep_block, marks).get_parameter(name)
        for stored, mark in marks.items():
            if mark.shape == loaded.shape and torch.equal(mark, loaded):
                return path, stored.removesuffix(f".{below}{name.removeprefix(block)}")
    raise ValueError(f"no tensor of {block} is stored in a form of its own")


def stock_configuration(config: Any) -> Any:
    """Return the configuration object of a family itself, without a ``mea`` section.

    Args:
        config: That of its emitted form.
    """
    kind: Any = type(config)
    own = ("model_type", "mea", "auto_map", "architectures")
    settings = {name: value for name, value in copy.deepcopy(config.to_dict()).items() if name not in own}
    return kind.__mro__[1].from_dict(settings)


def shrink_vocabulary(config: Any) -> Any:
    """Cut the vocabulary of a configuration down, in place: embeddings are not looked at."""
    language = config.get_text_config()
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if getattr(language, name, None):
            setattr(language, name, _SMALL_VOCABULARY)
    language.pad_token_id = None
    return config


def empty(modules: Iterable[nn.Module]) -> None:
    """Take all weights out of modules themselves, not out of those within; what else they know of themselves stays."""
    module: Any
    for module in modules:
        module._is_hf_initialized = True  # nothing is there to be initialised
        for name in list(module._parameters):
            module._parameters[name] = None
        for name in list(module._buffers):
            module._buffers[name] = None


def skeleton(
    config: Any,
    prune: Callable[[Any], None],
    state: dict[str, torch.Tensor] | None = None,
    stored: Callable[[str], bool] = lambda name: False,
) -> Any:
    """Build a model in float32 of which only a part has its own weights; towers for images and sound have none.

    Args:
        config: Its configuration.
        prune: Called with the model when it is built, before any memory is taken; takes parts out.
        state: Weights that are stored, by their names in the checkpoint.
        stored: Whether a weight of the model, by its name there, comes from `state`; others are as in a new model.

    Raises:
        ValueError: Weights are missing.
    """
    stock: Any = stock_class(type(config))

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        empty(beside_language(self))
        prune(self)

    fields = {"__init__": build, "__module__": stock.__module__}
    kind: Any = type(stock.__name__, (stock,), fields)
    config._experts_implementation = "eager"
    with _quiet_transformers():  # it would tell of every weight that is left out
        model, loading = kind.from_pretrained(
            None, config=config, state_dict=state or {}, dtype=torch.float32, output_loading_info=True
        )
    missing = [name for name in loading["missing_keys"] if stored(name)]
    if missing:
        raise ValueError(f"weights are missing: {', '.join(sorted(missing)[:3])}")
    return model.eval().requires_grad_(False)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    shows, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows:
            logging.enable_progress_bar()


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Return the path of a model's decoder layers, and the layers.

    Raises:
        ValueError: There is no list of as many modules as the configuration says.
    """
    depth = model.config.get_text_config().num_hidden_layers
    within = model.get_decoder() if is_composite(model) else model
    for module in within.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return next(name for name, found in model.named_modules() if found is module), module
    raise ValueError(f"{type(model).__name__} has no list of {depth} decoder layers")


def is_composite(model: Any) -> bool:
    """Return whether a language model is a part of a model."""
    return model.config.get_text_config() is not model.config


def beside_language(model: Any) -> list[nn.Module]:
    """Return the modules of a model that its language model does without."""
    if not is_composite(model):
        return []
    owner, _, _ = decoder_layers(model)[0].rpartition(".")
    needed = set(model.get_submodule(owner).modules())
    head = model.get_output_embeddings()
    needed |= set() if head is None else set(head.modules())
    return [module for module in model.modules() if module not in needed]


def run_decoder(model: Any, cache: Any = None, **inputs: Any) -> Any:
    """Run a causal language model as far as its decoder goes; of what is more than that, the language model alone.

    Args:
        model: The model.
        cache: To be filled, or None.
        **inputs: Other arguments; ``position_ids`` are left out where the model does not know them.
    """
    decoder = getattr(model, model.base_model_prefix, model)
    if is_composite(model):
        decoder = model.get_submodule(decoder_layers(model)[0].rpartition(".")[0])
    kind: Any = type(decoder)
    if "position_ids" not in inspect.signature(kind.forward).parameters:
        inputs.pop("position_ids", None)
    if cache is not None:
        inputs[cache_parameter(kind)] = cache
    return decoder(**inputs, use_cache=cache is not None)


class _Cached(Exception):
    """Ends a layer where it calls the cache."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values


class _Absent(nn.Module):
    """Stands for a part whose weights are left out."""

    weight = torch.empty(0)
    _is_hf_initialized = True

    def forward(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("no keys and values come before it")


class _Constant(nn.Module):
    """Stands for a projection: the same random numbers for every token."""

    weight = torch.empty(0)
    bias = None
    _is_hf_initialized = True

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.out_features, self.seed = width, seed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, anything) -> (…, width)."""
        row = torch.randn(self.out_features, generator=torch.Generator().manual_seed(self.seed))
        return row.to(x).expand(*x.shape[:-1], -1)


def _keep_small(model: Any) -> None:
    """Replace everything in a model's layers that has large weights."""
    from transformers.pytorch_utils import Conv1D

    _, layers = decoder_layers(model)
    for layer in layers:
        for number, (name, module) in enumerate(list(layer.named_modules())):
            if not name:
                continue
            parent, _, own = name.rpartition(".")
            if isinstance(module, nn.Linear | Conv1D):
                width = module.out_features if isinstance(module, nn.Linear) else module.nf
                setattr(layer.get_submodule(parent), own, _Constant(width, number))
            elif sum(parameter.numel() for parameter in module.parameters(recurse=False)) > _LARGE:
                setattr(layer.get_submodule(parent), own, _Absent())


def _recording(path: str, layer: Any, forward: Any, found: dict[int, LayerGeometry | str], index: int) -> Any:
    """Return a layer's forward that notes what it caches and passes its input on."""

    def record(*args: Any, **kwargs: Any) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        with _executing(layer) as stack:
            try:
                forward(*args, **kwargs)
                found[index] = "it has no cache of its own"
            except _Cached as cached:
                name = next(name for name, module in layer.named_modules() if module is stack[-1])
                found[index] = _geometry(f"{path}.{name}", cached.keys, cached.values)
            except Exception:  # other kinds of layers need the weights that are left out
                found[index] = _NOT_SEEN
        return passed_on(layer, hidden)

    return record


def passed_on(layer: nn.Module, hidden: torch.Tensor) -> Any:
    """Return hidden states as a model takes them from its layers, some of which send tuples."""
    kind: Any = type(layer)
    return (hidden,) if _sends_tuple(kind) else hidden


@remember
def _sends_tuple(kind: Any) -> bool:
    """Return whether the forward of a class of decoder layers ends in a tuple, as its source says."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    names = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    return any(
        isinstance(value, ast.Tuple) or (isinstance(value, ast.Name) and value.id in names) for value in returned
    )


@contextmanager
def _executing(layer: nn.Module) -> Iterator[list[nn.Module]]:
    """Keep the modules of a layer whose forward is running, the innermost last; one that raises stays."""
    stack: list[nn.Module] = []
    hooks = [module.register_forward_pre_hook(lambda module, _: stack.append(module)) for module in layer.modules()]
    hooks += [module.register_forward_hook(lambda *_: (stack.pop(), None)[1]) for module in layer.modules()]
    try:
        yield stack
    finally:
        for hook in hooks:
            hook.remove()


def _geometry(block: str, keys: torch.Tensor, values: torch.Tensor) -> LayerGeometry | str:
    """Return the geometry of keys (1, H, T, d) and values that come from the same input at different positions."""
    if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3]:
        return f"its keys and values are not heads: {list(keys.shape)} and {list(values.shape)}"
    heads, head_dim = keys.shape[1], keys.shape[3]
    return LayerGeometry(block, heads, head_dim, values.shape[3], *_rotary(keys[0].double(), head_dim))


def _rotary(keys: torch.Tensor, head_dim: int) -> tuple[int, bool]:
    """Return the rotated channels of keys (H, T, d), and whether neighbours rotate together."""
    size = keys.abs().amax((0, 1)).clamp(min=1e-30)
    moves = (keys - keys[:, :1]).abs().amax((0, 1)) / size > _MOVES  # (d,)
    if not moves.any():
        return 0, False
    reach = int(moves.nonzero().max()) + 1
    candidates = {}
    for rotary_dim in dict.fromkeys((reach + reach % 2, head_dim)):
        for interleaved in (False, True):
            first, second = rotary_pairs(head_dim, rotary_dim, interleaved)
            energy = keys[..., first].square() + keys[..., second].square()  # (H, T, P)
            changes = (energy - energy[:, :1]).abs().amax((0, 1)) / energy.amax((0, 1)).clamp(min=1e-30)
            candidates[rotary_dim, interleaved] = max(float(changes.max()), _ROUNDING)
    # A norm behind RoPE weighs the channels of a pair unequally: the layout that fits best is the right one still.
    return min(candidates, key=lambda layout: candidates[layout])


__all__ = [
    "beside_language",
    "decoder_layers",
    "find_geometry",
    "is_composite",
    "run_decoder",
    "skeleton",
    "stock_configuration",
    "stored_layers",
]
