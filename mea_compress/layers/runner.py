"""Run a model one decoder layer at a time: weights from the lazy reader, activations kept or spilled to disk."""

import copy
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mea_compress.architectures import Checkpoint
from mea_compress.checkpoint import as_tensor
from mea_compress.checkpoint.files import FULL, refusal
from mea_compress.checkpoint.system import allocate
from mea_compress.layers.read import read_projection
from mea_compress.layers.store import StoredLayer
from mea_compress.planning.sizes import SPILL_BYTES


class Activations:
    """Hidden states of all sequences, (N, T, D), in memory or, when they are many, in a temporary file."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.shape = shape
        size = shape[0] * shape[1] * shape[2]
        self._file = None
        if size * dtype.itemsize > SPILL_BYTES:
            self._file = tempfile.NamedTemporaryFile(prefix="mea-compress-")  # noqa: SIM115 (lives as long as this)
            self._file.truncate(size * dtype.itemsize)
            if (number := allocate(self._file.fileno(), size * dtype.itemsize)) in FULL:  # not a bus error, later
                raise refusal(OSError(number, os.strerror(number)), Path(self._file.name), size * dtype.itemsize)
            self._data = torch.from_file(self._file.name, shared=True, size=size, dtype=dtype).view(shape)
        else:
            self._data = torch.empty(shape, dtype=dtype)

    def __getitem__(self, index: slice | torch.Tensor) -> torch.Tensor:
        return self._data[index]

    def __setitem__(self, index: slice, value: torch.Tensor) -> None:
        self._data[index] = value.to(self._data.dtype)

    def copy(self) -> "Activations":
        """Another set of the same numbers."""
        other = Activations(self.shape, self._data.dtype)
        other._data.copy_(self._data)
        return other


@dataclass
class CapturedAttention:
    """Inputs and outputs of one attention block in one batch, from forward hooks.

    Attributes:
        inputs: (B, T, D), the normed input of the attention block.
        mixed: (B, T, Hq * d), what o_proj reads.
        outputs: (B, T, D), what the block adds to the residual stream.
        position_embeddings: cos and sin, each (B or 1, T, rotary_dim).
    """

    inputs: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    mixed: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    outputs: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    position_embeddings: tuple[torch.Tensor, torch.Tensor] = field(default_factory=tuple)  # type: ignore[assignment]


class _AttentionDone(Exception):
    """What comes behind the attention is not wanted."""


class _Given(nn.Module):
    """Stands in an attention block's place and sends what is known already."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        return self.output, None


class LayerRunner:
    """One decoder layer of a checkpoint as a model of its own, so that masks and rotary tables are transformers'.

    Args:
        source: The checkpoint.
        layer: Number of the layer.
        stored: What to put in the place of its keys and values (and queries and output where they changed).
        dtype: Of the weights, and of what is computed.
        device: To compute on.
        products: What matrix products are computed in; the stream between layers keeps `dtype`.

    Attributes:
        model: The base model with this layer alone and no final norm.
        attention: Its attention module.
    """

    def __init__(
        self,
        source: Checkpoint,
        layer: int,
        stored: StoredLayer | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        products: torch.dtype = torch.float32,
    ) -> None:
        from mea_compress.modeling import modeling_mea

        config = copy.deepcopy(source.model_config)
        config.num_hidden_layers = 1
        config.vocab_size = 1
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[layer]]
        if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
            sparse = (layer + 1) % config.decoder_sparse_step == 0 and layer not in (config.mlp_only_layers or [])
            config.decoder_sparse_step, config.mlp_only_layers = 1, [] if sparse else [0]
        spec = config.mea["layers"][layer] if stored is None else stored.section
        config.mea = {**config.mea, "layers": [spec]}
        config._attn_implementation = "sdpa"
        config.dtype = dtype
        state = _layer_state(source, layer, dtype)
        if stored is not None:
            state = {name: tensor for name, tensor in state.items() if "_composition." not in name}
            for name, array in stored.tensors.items():
                state[f"layers.0.self_attn.{name}"] = as_tensor(array).to(dtype)
        state["embed_tokens.weight"] = torch.zeros(1, config.hidden_size, dtype=dtype)
        state["norm.weight"] = torch.ones(config.hidden_size, dtype=dtype)
        base = getattr(modeling_mea, f"Mea{source.family.prefix}Model")
        with without_bars():
            self.model: Any = base.from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval().to(device)
        self.model.norm = nn.Identity()
        self.model.requires_grad_(False)
        self.attention: Any = self.model.layers[0].self_attn
        self.device, self.products = torch.device(device), products
        if products != dtype:  # autocast would convert what is never trained at every call
            for name, module in self.model.layers[0].named_modules():
                if isinstance(module, nn.Linear) and not name.startswith("self_attn."):
                    module.to(products)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for (B, T, D), with gradients where they are enabled."""
        embeds = hidden.to(self.device, self.model.dtype)
        with torch.autocast(self.device.type, self.products, enabled=self.products != self.model.dtype):
            return self.model(inputs_embeds=embeds, use_cache=False).last_hidden_state

    @torch.no_grad()
    def run(self, hidden: torch.Tensor) -> tuple[torch.Tensor, CapturedAttention]:
        """Run the layer on (B, T, D); return the next hidden states and what its attention got and sent."""
        captured = CapturedAttention()
        with self._capturing(captured):
            following = self.forward(hidden)
        return following, captured

    @torch.no_grad()
    def attend(self, hidden: torch.Tensor) -> CapturedAttention:
        """Run the layer on (B, T, D) as far as its attention."""
        captured = CapturedAttention()
        with self._capturing(captured, stop=True), suppress(_AttentionDone):
            self.forward(hidden)
        return captured

    def send(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the attention block sends for (B, T, D), with gradients where they are enabled."""
        captured = CapturedAttention()
        with self._capturing(captured, stop=True), suppress(_AttentionDone):
            self.forward(hidden)
        return captured.outputs

    @torch.no_grad()
    def finish(self, hidden: torch.Tensor, attention_output: torch.Tensor) -> torch.Tensor:
        """Run the layer on (B, T, D) with an attention output that is known; return the next hidden states."""
        layer = self.model.layers[0]
        layer.self_attn = _Given(attention_output.to(self.device))
        try:
            return self.forward(hidden)
        finally:
            layer.self_attn = self.attention

    @torch.no_grad()
    def output_of(self, mixed: torch.Tensor) -> torch.Tensor:
        """Return what the attention block sends where its o_proj reads (B, T, Hq * d)."""
        with torch.autocast(self.device.type, self.products, enabled=self.products != self.model.dtype):
            return self.attention.o_proj(mixed.to(self.device))

    @contextmanager
    def _capturing(self, captured: CapturedAttention, stop: bool = False) -> Iterator[None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured.inputs = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            captured.position_embeddings = kwargs["position_embeddings"]

        def mixed(_: nn.Module, args: tuple[Any, ...]) -> None:
            captured.mixed = args[0]

        def after(_: nn.Module, __: Any, output: tuple[torch.Tensor, Any]) -> None:
            captured.outputs = output[0]
            if stop:
                raise _AttentionDone

        hooks = [
            self.attention.register_forward_pre_hook(before, with_kwargs=True),
            self.attention.o_proj.register_forward_pre_hook(mixed),
            self.attention.register_forward_hook(after),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class HeadRunner:
    """The final norm and the language-model head of a checkpoint, with whatever its family does to logits.

    Args:
        source: The checkpoint.
        device: To compute on.
        products: What matrix products are computed in.
    """

    def __init__(
        self, source: Checkpoint, device: torch.device | str = "cpu", products: torch.dtype = torch.float32
    ) -> None:
        from mea_compress.modeling import modeling_mea

        config = copy.deepcopy(source.model_config)
        config.num_hidden_layers = 0
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
        if getattr(config, "layer_types", None):
            config.layer_types = []
        config.mea = {**config.mea, "layers": []}
        config.dtype = torch.float32
        # As the loader has it: a head that is stored is used, whatever config.json says of ties.
        name = "lm_head.weight" if source.reader.has("lm_head.weight") else "model.embed_tokens.weight"
        config.tie_word_embeddings = True  # one matrix in memory; embeddings are given
        state = {
            "model.embed_tokens.weight": source.reader.read(name).float(),
            "model.norm.weight": source.reader.read("model.norm.weight").float(),
        }
        if source.reader.has("lm_head.bias"):
            state["lm_head.bias"] = source.reader.read("lm_head.bias").float()
        causal = getattr(modeling_mea, f"Mea{source.family.prefix}ForCausalLM")
        with without_bars():
            model = causal.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
        self.model: Any = model.eval().to(device).requires_grad_(False)
        self.device, self.products = torch.device(device), products
        if products != torch.float32:
            self.model.lm_head.to(products)

    @torch.no_grad()
    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the next-token log-probabilities (T, V), float32, of what the last layer sends, (T, D)."""
        embeds = hidden.to(self.device, torch.float32)[None]
        with torch.autocast(self.device.type, self.products, enabled=self.products != torch.float32):
            logits = self.model(inputs_embeds=embeds, use_cache=False).logits
        return logits[0].float().log_softmax(-1)


@contextmanager
def without_bars() -> Iterator[None]:
    """Load models without transformers' bar; a layer takes no time, and hundreds of them are loaded."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def fast_products(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return what matrix products are computed in: bfloat16 if the model is stored so and the hardware is made for it.

    Args:
        dtype: Of the checkpoint.
        device: To compute on.
    """
    if dtype != torch.bfloat16:
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # new in torch 2.13
    fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") if device.type == "cpu" else False
    return torch.bfloat16 if fast else torch.float32


def reading_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of a model that is run and not trained: what its products are computed in, at least.

    Where 16-bit products are only imitated, converting every weight in every product takes twice the time.

    Args:
        dtype: Of the checkpoint; float64 stays.
        device: To compute on.
    """
    return dtype if dtype == torch.float64 else fast_products(dtype, device)


def embed(source: Checkpoint, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> Activations:
    """Return the token embeddings of all sequences, (N, T) -> (N, T, D); only the rows that occur are read."""
    name = "model.embed_tokens.weight"
    unique, inverse = tokens.unique(return_inverse=True)
    rows = torch.stack([source.reader.read_rows(name, int(row), int(row) + 1)[0].to(dtype) for row in unique])
    hidden = Activations((*tokens.shape, rows.shape[-1]), dtype)
    for index in range(len(tokens)):
        hidden[index : index + 1] = rows[inverse[index]][None]
    return hidden


def batches(count: int, size: int, first: int = 0) -> Iterator[slice]:
    """Yield slices of at most `size` that cover `first` to `count`."""
    for start in range(first, count, size):
        yield slice(start, min(start + size, count))


def _layer_state(source: Checkpoint, layer: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the layer's tensors under the names of layer 0; a fused projection is split."""
    prefix, attention = source.family.layer.format(layer=layer), source.family.attention(layer)
    state = {}
    fused = source.family.fused if not source.native else None
    for name in source.reader.model_names:
        if name.startswith(prefix) and not (fused and name.startswith(f"{attention}{fused}.")):
            state["layers.0." + name.removeprefix(prefix)] = source.reader.read(name).to(dtype)
    if fused:
        for side in ("query", "key", "value"):
            rows = read_projection(source, layer, side)[:, :-1]
            state[f"layers.0.self_attn.{side[0]}_proj.weight"] = as_tensor(rows).to(dtype)
    return state


__all__ = [
    "Activations",
    "HeadRunner",
    "LayerRunner",
    "CapturedAttention",
    "batches",
    "embed",
    "fast_products",
    "without_bars",
]
