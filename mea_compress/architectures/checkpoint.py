"""Any opened checkpoint: its headers, its family and its configuration, checked against each other."""

import copy
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from math import isfinite, prod
from pathlib import Path
from typing import Any

from mea_compress.architectures.common_config import ModelShape, read_common_config
from mea_compress.architectures.families import MEA_PREFIX, Family, LayerGeometry, Shapes, find_family
from mea_compress.checkpoint import CheckpointReader, TensorInfo
from mea_compress.checkpoint.fp8 import Fp8Reader, fp8_layout
from mea_compress.checkpoint.hub import repository_of
from mea_compress.errors import RequestError
from mea_compress.modeling.section_mea import cached_width, every_head, side_form

_MOST_LAYERS = 10_000
# Settings of how a model is stored and loaded.
_NOT_OF_THE_MODEL = ("auto_map", "architectures", "quantization_config")
ADAPTER_CONFIG = "adapter_config.json"
# What puts a name in front of every tensor when it is saved instead of the model in it.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "base_model.": "an adapter of peft (merge_and_unload)",
    "module.": "DataParallel or DeepSpeed",
}
FLOATS = ("F64", "F32", "F16", "BF16")
SIDES = ("query", "key", "value")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose tensors are all there, with the shapes that its configuration asks for.

    Attributes:
        reader: Its tensors, headers only.
        family: The names of its parts.
        config: The configuration of the MEA form of the family, or transformers' object with the same attributes;
            ``config.mea`` says what each layer caches (compositions ``none`` where the checkpoint is not an MEA model).
        native: Whether the checkpoint is an MEA model already.
        raw_config: config.json as it stands.
        whole_config: Configuration object of all that is in the checkpoint where its language model is a part of it,
            whose configuration `config` is then.
        stored_under: Path of the list of decoder layers in the model, and in the names of the stored tensors.
    """

    reader: CheckpointReader
    family: Family
    config: ModelShape
    native: bool
    raw_config: dict[str, Any]
    whole_config: Any = None
    stored_under: tuple[str, str] = ("", "")

    @property
    def name(self) -> str:
        """Return what the model is called: its hub id, as config.json says, or the name of its directory."""
        directory = self.reader.directory
        return str(repository_of(directory) or self.raw_config.get("_name_or_path") or directory.resolve().name)

    @cached_property
    def model_config(self) -> Any:
        """Return the configuration object of the MEA form of the family, for modules and models."""
        if self.at_cache:
            return self.whole_config or self.config
        where = str(self.reader.directory / "config.json")
        return model_configuration(self.raw_config, self.family, self.native, where)

    @property
    def quantised(self) -> bool:
        """Return whether weights are stored in fp8, with scales."""
        return isinstance(self.reader, Fp8Reader)

    @property
    def at_cache(self) -> bool:
        """Return whether keys and values are composed at the cache of attention blocks that stay as they are."""
        return self.family.at_cache

    def geometry(self, layer: int) -> LayerGeometry | None:
        """Return the keys and values of a layer, None where it caches none per head."""
        entry = self.config.mea["layers"][layer]
        if not self.at_cache:
            block = self.family.attention(layer).removesuffix(".")
            head_dim = _head_dim(self.config)
            return LayerGeometry(block, self.config.num_key_value_heads, head_dim, head_dim, _rotary_dim(self.config))
        return None if entry is None else LayerGeometry(**{name: entry[name] for name in GEOMETRY})

    @cached_property
    def first_geometry(self) -> LayerGeometry:
        """Return the keys and values of the first layer that caches any per head."""
        layers = (self.geometry(layer) for layer in range(self.config.num_hidden_layers))
        return next(geometry for geometry in layers if geometry is not None)

    def attention(self, layer: int) -> str:
        """Return the prefix of the tensors of a layer's attention, by their names in the model."""
        geometry = self.geometry(layer)
        assert geometry is not None
        return f"{geometry.block}."

    def model_name(self, name: str) -> str:
        """Return what a stored tensor of the decoder layers is called in the model."""
        path, stored = self.stored_under
        return path + name.removeprefix(stored) if path and name.startswith(f"{stored}.") else name

    def stored_name(self, name: str) -> str:
        """Return the name under which a tensor of the decoder layers is stored, or begins, given that in the model."""
        path, stored = self.stored_under
        return stored + name.removeprefix(path) if path and name.startswith(f"{path}.") else name

    def attention_tensor(self, layer: int, name: str) -> str:
        """Return what a tensor of a layer's attention is called here, given its name below it.

        Some checkpoints leave out what stands before the layers in the names of the model's own tensors.
        """
        full = self.stored_name(self.attention(layer) + name)
        _, _, bare = full.partition(".")
        return bare if self.reader.has(bare) and not self.reader.has(full) else full

    @property
    def heads(self) -> int:
        """Return the key/value heads, of the first layer where they differ."""
        return self.first_geometry.heads

    @property
    def is_alike(self) -> bool:
        """Return whether all layers that cache keys and values have as many heads, keys and values alike wide."""
        layers = (self.geometry(layer) for layer in range(self.config.num_hidden_layers))
        sizes = {(one.heads, one.head_dim, one.value_dim, one.rotary_dim > 0) for one in layers if one is not None}
        return len(sizes) == 1 and all(head_dim == value_dim for _, head_dim, value_dim, _ in sizes)

    @property
    def head_dim(self) -> int:
        """Return the channels of a head, of the first layer where they differ."""
        return self.first_geometry.head_dim

    @property
    def rotary_dim(self) -> int:
        """Return the channels of a head that RoPE rotates, of the first layer where they differ."""
        return self.first_geometry.rotary_dim

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(info.nbytes for info in self.reader.tensors.values())

    @property
    def dtype(self) -> str:
        """Return the safetensors name of the dtype of the attention weights."""
        if self.at_cache:
            return _common_dtype(self.reader, self.attention_tensors())
        name = "k_proj" if self.family.fused is None or self.native else self.family.fused
        return self.reader.dtype_of(f"{self.family.attention(0)}{name}.weight")

    def attention_tensors(self) -> list[str]:
        """Return the names of all tensors of attention blocks, without those that compose heads; of all if unknown."""
        layers = range(self.config.num_hidden_layers)
        prefixes = tuple(
            self.stored_name(self.attention(layer)) for layer in layers if self.geometry(layer) is not None
        )
        names = self.reader.model_names
        own = [name for name in names if name.startswith(prefixes) and "_composition." not in name]
        return own or names


GEOMETRY = tuple(field.name for field in fields(LayerGeometry))
"""What an entry of the ``mea`` section says of a layer that is composed at its cache."""


def _common_dtype(reader: CheckpointReader, names: list[str]) -> str:
    """Return the floating-point dtype that most numbers of some tensors have.

    Raises:
        RequestError: None has one.
    """
    counts: dict[str, int] = {}
    for name in names:
        dtype = reader.dtype_of(name)
        if dtype in FLOATS:
            counts[dtype] = counts.get(dtype, 0) + prod(reader.info(name).shape)
    if not counts:
        raise RequestError(
            f"{reader.directory}: no attention weight is one of {', '.join(FLOATS)}; save the model unquantised first"
        )
    return max(counts, key=lambda dtype: counts[dtype])


def _head_dim(config: ModelShape) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rotary_dim(config: ModelShape) -> int:
    return int(_head_dim(config) * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0))


def open_checkpoint(directory: Path) -> Checkpoint:
    """Open a checkpoint and check, from headers alone, that every tensor is there with the right shape.

    Raises:
        RequestError: Something is missing or does not fit; the message names the file or tensor.
    """
    if os.path.lexists(directory / ADAPTER_CONFIG):
        raise RequestError(
            f"{directory / ADAPTER_CONFIG}: an adapter of peft lies here, which transformers would put on the weights; "
            "merge it (merge_and_unload, then save_pretrained into a new directory), or remove its files to do without"
        )
    reader = CheckpointReader(directory)
    raw = reader.config()
    reader.check_generation_config()
    where = str(directory / "config.json")
    family = find_family(raw, where)
    layout = fp8_layout(raw)
    if layout is not None:
        reader = Fp8Reader(directory, layout)
    native = str(raw["model_type"]).startswith(MEA_PREFIX)
    if family.at_cache:
        return _open_at_cache(reader, family, raw, where, native)
    _check_task(reader, raw, where)
    source = Checkpoint(reader, family, _configuration(raw, family, native, where), native, raw)
    _check_tensors(source)
    return source


def _open_at_cache(
    reader: CheckpointReader, family: Family, raw: dict[str, Any], where: str, native: bool
) -> Checkpoint:
    """Open a checkpoint whose attention blocks stay as they are, running them without weights to see what they cache.

    Raises:
        RequestError: As `open_checkpoint`.
    """
    from mea_compress.architectures.geometry import find_geometry, missing_tensors, stored_layers
    from mea_compress.modeling import family_classes

    names = raw.get("architectures")
    classes = family_classes(family.model_type)
    stock = [kind.__name__.removeprefix("Mea") for kind in classes[1:] if kind is not None]
    if isinstance(names, list) and names and not {str(name).removeprefix("Mea") for name in names} & set(stock):
        what = "which is no causal language model and would become one"
        if any(str(name).endswith("ForCausalLM") for name in names):
            what = f"and a {family.model_type} checkpoint is read as the whole that its language model is a part of"
        raise RequestError(
            f"{where}: architectures says {', '.join(map(str, names))}, {what}; give the checkpoint of a {stock[-1]}"
        )
    _check_origin(reader)
    settings = {key: _decoded(value) for key, value in raw.items() if key not in _NOT_OF_THE_MODEL}
    try:
        if not native:
            stock_config = classes[0].__mro__[1].from_dict(copy.deepcopy(settings))
            if getattr(stock_config.get_text_config(), "kv_lora_rank", None):  # whether config.json names it or not
                raise RequestError(
                    f"{where}: this {family.model_type} checkpoint cannot be compressed, its attention already caches "
                    "a latent (MLA)"
                )
            if getattr(stock_config.get_text_config(), "use_bidirectional_attention", None) is True:
                raise RequestError(
                    f"{where}: this {family.model_type} checkpoint cannot be compressed, its prompts attend in both "
                    "directions (use_bidirectional_attention), so that decoding with a cache cannot be checked"
                )
            found = find_geometry(stock_config)
            settings.pop("model_type")
            settings["mea"] = {"layers": [_uncomposed(geometry) for geometry in found]}
        whole = classes[0].from_dict(settings)
        config, shapes = whole.get_text_config(), {name: info.shape for name, info in reader.tensors.items()}
        source = Checkpoint(reader, family, config, native, raw, None if config is whole else whole)
        if config is not whole:
            source = replace(source, stored_under=stored_layers(whole, shapes))
        missing = missing_tensors(whole, {source.model_name(name): shape for name, shape in shapes.items()})
    except RequestError:
        raise
    except Exception as error:  # of transformers' configurations and models, any
        reason = " ".join(str(error).split())
        raise RequestError(f"{where} is not a usable configuration: {reason}") from error
    if missing is not None:
        raise RequestError(
            f"{reader.directory}: {missing}; complete the download or give the config.json of the weights"
        )
    if not native and all(isinstance(geometry, str) for geometry in found):
        raise RequestError(
            f"{where}: this {family.model_type} checkpoint cannot be compressed, no layer of it caches keys and values "
            "per head"
        )
    return source


def _decoded(value: Any) -> Any:
    """Return a copy of a setting, with infinite numbers as such: transformers writes them in a form of its own."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    return float(value["__float__"]) if value.keys() == {"__float__"} else {key: _decoded(value[key]) for key in value}


def _uncomposed(geometry: LayerGeometry | str) -> dict[str, Any] | None:
    """Return a layer's entry in the ``mea`` section before anything is composed."""
    return None if isinstance(geometry, str) else asdict(geometry) | every_head(geometry.heads)


def _check_task(reader: CheckpointReader, raw: dict[str, Any], where: str) -> None:
    """Raise unless this is a causal language model, saved as itself and not as part of something else."""
    names = raw.get("architectures")
    classes = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    flat = {name.rpartition("embed_tokens.")[0] for name in reader.tensors if name.endswith("embed_tokens.weight")}
    if classes and not any(name.endswith("ForCausalLM") for name in classes):
        raise RequestError(
            f"{where}: architectures says {', '.join(classes)}, which is no causal language model and would become "
            "one; give the checkpoint of a ...ForCausalLM"
        )
    _check_origin(reader)
    if flat and "model." not in flat:
        raise RequestError(
            f"{reader.directory}: the tensors are named {min(flat)}embed_tokens.weight and so on, without the model. "
            "in front that a causal language model has; load it with AutoModelForCausalLM and save it by "
            "save_pretrained into a new directory"
        )


def _check_origin(reader: CheckpointReader) -> None:
    """Raise where the names of the tensors say that this is a classifier, or was saved from within a wrapper."""
    if reader.has("score.weight"):
        raise RequestError(
            f"{reader.directory}: score.weight is the head of a classifier, which would be left without its task; "
            "give the checkpoint of a causal language model"
        )
    for name in sorted(reader.tensors):
        wrapper = next((tool for start, tool in _WRAPPERS.items() if name.startswith(start)), None)
        if wrapper:
            raise RequestError(
                f"{reader.directory}: the tensors are named {name} and so on, as they are saved from within {wrapper}; "
                "save the model inside by its save_pretrained"
            )


def _configuration(raw: dict[str, Any], family: Family, native: bool, where: str) -> ModelShape:
    """Return what config.json says: a common one is read without transformers, any other by its class."""
    sizes = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    for key in (*sizes, "num_key_value_heads", "head_dim"):
        value = raw.get(key)
        if value is None and key not in sizes:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 20:
            raise RequestError(f"{where}: {key} must be a positive whole number, not {value!r}")
    query_heads = raw["num_attention_heads"]
    if raw["num_hidden_layers"] > _MOST_LAYERS:
        raise RequestError(f"{where}: num_hidden_layers {raw['num_hidden_layers']} is more than any model has")
    if raw.get("head_dim") is None and raw["hidden_size"] % query_heads:
        raise RequestError(f"{where}: hidden_size {raw['hidden_size']} does not divide into {query_heads} heads")
    heads = raw.get("num_key_value_heads") or query_heads
    if query_heads % heads:
        raise RequestError(f"{where}: {query_heads} query heads cannot share {heads} key/value heads evenly")
    return read_common_config(_fields(raw, family, native), family) or model_configuration(raw, family, native, where)


def _fields(raw: dict[str, Any], family: Family, native: bool) -> dict[str, Any]:
    """Return the settings of the MEA form; a stock checkpoint gets a section that says ``none`` for every layer."""
    fields = {key: value for key, value in raw.items() if key not in ("model_type", *_NOT_OF_THE_MODEL)}
    if not native:
        heads = raw.get("num_key_value_heads") or raw["num_attention_heads"]
        layers = [every_head(heads) for _ in range(raw["num_hidden_layers"])]
        fields["mea"] = {"layers": layers, "qk_norm": family.qk_norm}
    return fields


def model_configuration(raw: dict[str, Any], family: Family, native: bool, where: str) -> Any:
    """Return the configuration object of the MEA form, as transformers makes and checks it.

    Raises:
        RequestError: It is not usable.
    """
    from mea_compress.modeling import configuration_mea

    try:
        kind = getattr(configuration_mea, f"Mea{family.prefix}Config")
        config = kind.from_dict(copy.deepcopy(_fields(raw, family, native)))
        rotary = _rotary_dim(config)
        if not 2 <= rotary <= _head_dim(config) or rotary % 2 or _head_dim(config) % 2:
            raise ValueError(f"RoPE cannot rotate {rotary} of {_head_dim(config)} channels of a head")
        _check_settings(config, rotary)
        return config
    except Exception as error:  # transformers' strict configurations raise classes of their own
        reason = " ".join(str(error).split())
        raise RequestError(f"{where} is not a usable configuration: {reason}") from error


def _check_settings(config: Any, rotary_dim: int) -> None:
    """Raise for what would stop a model of this configuration from being built, long after the work has begun."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act {config.hidden_act!r} is not known")
    if config.max_position_embeddings < 1:
        raise ValueError(f"max_position_embeddings {config.max_position_embeddings} leaves no room for a token")
    base = (config.rope_parameters or {}).get("rope_theta", 1.0)
    if not (isinstance(base, int | float) and isfinite(base) and base > 0):
        raise ValueError(f"rope_theta {base!r} is not a positive number")
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind == "default":
        return
    if kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(f"rope_type {kind!r} is not known")
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    if frequencies.shape != (rotary_dim // 2,) or not bool(frequencies.isfinite().all()):
        raise ValueError(f"rope_parameters do not give {rotary_dim // 2} frequencies")


def _check_tensors(source: Checkpoint) -> None:
    """Raise unless every tensor of the model is there with its shape, attention's in a dtype to compute in."""
    reader, where = source.reader, source.reader.directory
    for layer in range(source.config.num_hidden_layers):
        for name, shape in attention_shapes(source, layer).items():
            info = _check_tensor(reader, name, shape)
            if reader.dtype_of(name) not in FLOATS:
                raise RequestError(
                    f"{info.file}: tensor {name} is {info.dtype}; attention weights must be one of {', '.join(FLOATS)}"
                )
        for name, shape in _remaining_shapes(source, layer).items():
            _check_tensor(reader, name, shape)
    config = source.config
    hidden, embedding = config.hidden_size, (config.vocab_size, config.hidden_size)
    _check_tensor(reader, "model.norm.weight", (hidden,))
    _check_tensor(reader, "model.embed_tokens.weight", embedding)
    if not config.tie_word_embeddings or reader.has("lm_head.weight"):
        _check_tensor(reader, "lm_head.weight", embedding)
    before, _, after = source.family.layer.partition("{layer}")
    for name in reader.tensors:
        number = name.removeprefix(before).partition(after)[0]
        if name.startswith(before) and number.isdecimal() and int(number) >= config.num_hidden_layers:
            raise RequestError(
                f"{where}: config.json says {config.num_hidden_layers} layers but the weights have {name}; "
                "give the config.json that belongs to them"
            )


def _check_tensor(reader: CheckpointReader, name: str, shape: tuple[int, ...]) -> TensorInfo:
    if not reader.has(name):
        raise RequestError(
            f"{reader.directory}: tensor {name} is missing; complete the download or give the config.json that belongs "
            "to these weights"
        )
    info = reader.info(name)
    if info.shape != shape:
        raise RequestError(
            f"{info.file}: tensor {name} has shape {list(info.shape)} where config.json asks for {list(shape)}; "
            "give the config.json that belongs to these weights"
        )
    return info


def kept_in_float32(source: Checkpoint, dtype: str) -> re.Pattern[str] | None:
    """Return what the names of tensors look like that transformers keeps in float32 where a model is loaded in a dtype.

    Args:
        source: The checkpoint.
        dtype: As torch calls it. More is kept in float32 beside float16 than beside bfloat16, which has its range.
    """
    if not source.at_cache:  # none of the families that are written out has any
        return None
    from mea_compress.modeling import family_classes

    names: set[str] = set()
    for kind in family_classes(source.family.model_type)[1:]:
        names.update(getattr(kind, "_keep_in_fp32_modules_strict", None) or ())
        if dtype == "float16":
            names.update(getattr(kind, "_keep_in_fp32_modules", None) or ())
    return re.compile("|".join(rf"(^|\.){name}($|\.)" for name in sorted(names))) if names else None


def attention_shapes(source: Checkpoint, layer: int) -> Shapes:
    """Return the tensors of a layer's attention and their shapes, by full name."""
    config, family = source.config, source.family
    spec, bias = config.mea["layers"][layer], config.mea["bias"]
    hidden, width = config.hidden_size, config.num_attention_heads * source.head_dim
    heads, head_dim = config.num_key_value_heads, source.head_dim
    key_width, value_width = (cached_width(spec[f"{side}_components"], head_dim) for side in ("key", "value"))
    shapes: Shapes = {"o_proj.weight": (hidden, width)}
    if family.fused and not source.native:
        shapes[f"{family.fused}.weight"] = (width + key_width + value_width, hidden)
    else:
        rows = {"q_proj": (width, "query"), "k_proj": (key_width, "key"), "v_proj": (value_width, "value")}
        for name, (count, side) in rows.items():
            shapes[f"{name}.weight"] = (count, hidden)
            if bias[side]:
                shapes[f"{name}.bias"] = (count,)
    if bias["output"]:
        shapes["o_proj.bias"] = (hidden,)
    if config.mea["qk_norm"]:
        shapes["q_norm.weight"] = shapes["k_norm.weight"] = (head_dim,)
    if config.mea["head_norm"]:
        shapes["head_norm.weight"] = (head_dim,)
    for side in ("key", "value"):
        width = {"key": key_width, "value": value_width}[side]
        shape = side_form(spec, side).shape(width, key_width + value_width, heads, head_dim)
        if shape is not None:
            shapes[f"{side}_composition.weight"] = shape
    return {family.attention(layer) + name: shape for name, shape in shapes.items()}


def projection_info(source: Checkpoint, layer: int, side: str) -> TensorInfo:
    """Return where the weight of q_proj, k_proj or v_proj lies: a range of rows where the checkpoint fuses them.

    Args:
        source: The checkpoint.
        layer: Number of the layer.
        side: ``query``, ``key`` or ``value``.
    """
    prefix = source.family.attention(layer)
    if not source.family.fused or source.native:
        return source.reader.info(f"{prefix}{side[0]}_proj.weight")
    info = source.reader.info(f"{prefix}{source.family.fused}.weight")
    heads, groups = source.config.num_attention_heads, source.config.num_key_value_heads
    start, rows = {"query": (0, heads), "key": (heads, groups), "value": (heads + groups, groups)}[side]
    start, rows, row_bytes = start * source.head_dim, rows * source.head_dim, info.nbytes // info.shape[0]
    return replace(info, shape=(rows, info.shape[1]), offset=info.offset + start * row_bytes, nbytes=rows * row_bytes)


def _remaining_shapes(source: Checkpoint, layer: int) -> Shapes:
    config, prefix = source.config, source.family.layer.format(layer=layer)
    norms: Shapes = {f"{name}_layernorm.weight": (config.hidden_size,) for name in ("input", "post_attention")}
    return {prefix + name: shape for name, shape in (norms | source.family.mlp(config, layer)).items()}
