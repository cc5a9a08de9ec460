"""Compressed checkpoints as models of vLLM: its scheduler, its pages and its sampling, components in its cache.

The model is vLLM's own transformers backend, whose attention blocks are replaced by `ServedAttention`. Each of them
declares a cache of its own (`ComponentCache`): one head as wide as what the layer keeps of a token, keys and values of
different widths, every layer another one where the plan says so. The engine divides its memory by exactly these bytes.

New tokens are read by the code of attention_mea.py, whatever the composition: a step of decoding attends to the
components of a sequence as they lie in its pages, a prompt to the heads rebuilt from them. This needs a CPU and one
process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM
from vllm.model_executor.models.transformers.utils import init_on_device_without_buffers
from vllm.platforms import current_platform
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, KVCacheSpec, SlidingWindowSpec

from mea_compress.modeling.attention_mea import MeaAttention, rotate_heads


@dataclass
class Sequence:
    """New tokens of one request.

    Attributes:
        new: Their rows in the batch.
        length: Tokens of the request, the new ones among them.
        blocks: The pages that hold it; a slice where they lie behind one another, so that nothing is copied.
    """

    new: slice
    length: int
    blocks: slice | torch.Tensor


@dataclass
class ComponentMetadata(AttentionMetadata):
    """What one step runs: where new tokens go in the pages (a slot for each), and whom they belong to."""

    slots: torch.Tensor
    sequences: list[Sequence]


class ComponentMetadataBuilder(AttentionMetadataBuilder[ComponentMetadata]):
    """Makes the metadata of a step from what all backends are told."""

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> ComponentMetadata:
        """Return the metadata of one step."""
        step, size = common_attn_metadata, self.kv_cache_spec.block_size
        starts, lengths = step.query_start_loc_cpu.tolist(), step.seq_lens.tolist()
        sequences = []
        for index in range(step.num_reqs):
            new = slice(starts[index], starts[index + 1])
            if new.start == new.stop:
                continue
            table = step.block_table_tensor[index, : -(-lengths[index] // size)].long()
            first = int(table[0])
            consecutive = bool((table == torch.arange(first, first + len(table))).all())
            blocks = slice(first, first + len(table)) if consecutive else table
            sequences.append(Sequence(new, lengths[index], blocks))
        return ComponentMetadata(step.slot_mapping[: step.num_actual_tokens].long(), sequences)


class ComponentBackend(AttentionBackend):
    """Pages of components: any width, keys and values of different ones, one head."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        """Return the name under which vLLM files backends that it does not have."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[ComponentReader]:
        """Return what reads the pages."""
        return ComponentReader

    @staticmethod
    def get_builder_cls() -> type[ComponentMetadataBuilder]:
        """Return what describes a step."""
        return ComponentMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return the order of the cache in memory, in which the pages of a layer lie behind one another."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Return whether windows are heeded."""
        return True


class ComponentReader(AttentionImpl[ComponentMetadata]):
    """Writes new components into the pages of a layer and reads all of each sequence for it."""

    def __init__(self, attention: ServedAttention) -> None:
        self.num_heads, self.head_size, self.scale = attention.query_heads, attention.head_dim, attention.scaling
        self.kv_cache_dtype = "auto"
        self.attention = attention

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: ComponentMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from new tokens to all that their sequences hold.

        Args:
            layer: The layer's cache.
            query: (N, Hq, d), rotated.
            key: (N, key width), as `MeaAttention.project` returns them.
            value: (N, value width).
            kv_cache: (blocks, 1, block size, key width + value width).
            attn_metadata: Of the step; None while the engine warms up.
            output: (N, Hq, d), written to.
            output_scale: Not there, since outputs are not quantised.
            output_block_scale: The same.
        """
        if attn_metadata is None:
            return output.zero_()
        new = len(attn_metadata.slots)
        pages = kv_cache[:, 0]
        size = pages.shape[1]
        blocks, places = attn_metadata.slots // size, attn_metadata.slots % size
        pages[blocks, places] = torch.cat((key[:new], value[:new]), dim=-1).to(pages.dtype)
        for sequence in attn_metadata.sequences:
            cached = pages[sequence.blocks].flatten(0, 1)[: sequence.length]
            output[sequence.new] = self.attention.read(query[sequence.new], cached)
        return output


class ComponentCache(nn.Module, AttentionLayerBase):
    """The cache of one layer, as the engine sees it.

    Args:
        attention: The block that it belongs to.
        vllm_config: Of the engine.
        name: Of the layer.
    """

    def __init__(self, attention: ServedAttention, vllm_config: VllmConfig, name: str) -> None:
        super().__init__()
        self.layer_name = name
        self.widths = attention.stored_widths
        self.window = attention.sliding_window
        self.dtype = kv_cache_dtype_str_to_dtype("auto", vllm_config.model_config)
        self.kv_cache_dtype = "auto"
        self.impl = ComponentReader(attention)
        self.kv_cache = torch.tensor([])
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Return the backend that reads it."""
        return ComponentBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """Return what a token takes in this layer."""
        keys, values = self.widths
        sizes = {"num_kv_heads": 1, "head_size": keys, "head_size_v": values, "dtype": self.dtype}
        block_size = vllm_config.cache_config.block_size
        if self.window is None:
            return FullAttentionSpec(block_size=block_size, **sizes)
        return SlidingWindowSpec(block_size=block_size, sliding_window=self.window, **sizes)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Attention of new tokens: (N, Hq, d), (N, key width), (N, value width) -> (N, Hq, d)."""
        output = torch.empty_like(queries)
        torch.ops.vllm.unified_attention_with_output(queries, keys, values, output, self.layer_name)
        return output


class ServedAttention(MeaAttention):
    """Explicit attention whose cache is the engine's.

    The tokens of all requests come as one row, and what came before them lies in pages.
    """

    attn: ComponentCache

    @property
    def stored_widths(self) -> tuple[int, int]:
        """Numbers that a token's keys and values take; where it stands need not be kept, since pages are in order."""
        norms = self.heads if self.caches_norm_scalars else 0
        return self.key_width + norms, self.value_width

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend from new tokens (1, N, D) to what the engine holds of their sequences."""
        cos, sin = position_embeddings
        queries = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))  # (1, N, Hq, d)
        if self.qk_norm:
            queries = self.q_norm(queries)
        cos, sin = cos.to(queries.dtype), sin.to(queries.dtype)
        queries = rotate_heads(queries, cos, sin)[0]
        keys, values = (side[0].transpose(0, 1).flatten(1) for side in self.project(hidden_states, cos, sin))
        output = self.attn(queries, keys, values)
        if self.has_head_norm:
            output = self.head_norm(output)
        return self.o_proj(output.flatten(1))[None], None

    def read(self, queries: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
        """Attention of a sequence's new tokens (Q, Hq, d) to its components (T, key and value width): (Q, Hq, d)."""
        new, length = len(queries), len(cached)
        window = self.sliding_window or length
        start = max(0, length - new - window + 1)
        keys, values = (
            self._as_cached(side).to(queries.dtype) for side in cached[None, start:].split(self.stored_widths, dim=-1)
        )
        rotation = self._rotation(start, length, keys)
        queries = queries.transpose(0, 1)[None]
        mask = None
        if new > 1 or length - start > window:
            last = torch.arange(length - new, length)[:, None]
            seen = torch.arange(start, length)
            mask = ((seen <= last) & (seen > last - window))[None, None]
        if self.may_absorb(new, queries.device.type):
            return self.attend_to_components(queries, keys, values, rotation, mask)[0]
        keys, values = self.expand(keys, values, rotation)
        output = nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=self.scaling, enable_gqa=True
        )
        return output[0].transpose(0, 1)

    def _as_cached(self, side: torch.Tensor) -> torch.Tensor:
        """Keys or values (1, T, width) in the shape in which `project` returns them."""
        if self.caches_heads:
            return side.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return side[:, None]

    def _rotation(self, start: int, length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin of the tokens from `start` to `length`, for keys that are rotated when they are read."""
        if self.key_form.commutes_with_rope:
            return like, like  # nothing reads them
        rotary: Any = self.rotary
        positions = torch.arange(start, length, dtype=torch.float32)
        angles = (positions[:, None] * rotary.inv_freq.to(positions)).repeat(1, 2)[None]
        scaling = rotary.attention_scaling
        return (angles.cos() * scaling).to(like.dtype), (angles.sin() * scaling).to(like.dtype)


class _Served:
    """A model of vLLM's transformers backend with `ServedAttention`.

    Raises:
        ValueError: The engine is set up in a way in which the cache cannot be read; the message names the flag.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        _check(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]

    def recursive_replace(self: Any) -> None:
        """Replace modules by vLLM's, except in attention, which is put in afterwards: its parts are no stock ones."""
        for layer in self.model.layers:
            layer.self_attn = nn.Identity()
        super().recursive_replace()  # type: ignore[misc]
        for index, layer in enumerate(self.model.layers):
            with init_on_device_without_buffers("meta"):
                layer.self_attn = ServedAttention(self.config, index)
            object.__setattr__(layer.self_attn, "rotary", self.model.rotary_emb)

    def _create_attention_instances(self: Any, prefix: str = "") -> None:
        """Give every layer its cache."""
        for index, layer in enumerate(self.model.layers):
            layer.self_attn.attn = ComponentCache(layer.self_attn, self.vllm_config, f"model.layers.{index}.self_attn")


def _check(vllm_config: VllmConfig) -> None:
    """Raise where the engine is set up for what is not read here."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    config = vllm_config.model_config.hf_config
    if not current_platform.is_cpu():
        raise ValueError(
            f"a compressed checkpoint is read on CPUs alone and this is {current_platform.device_name}: export it "
            "(mea-compress export) and serve that"
        )
    if parallel.world_size > 1 or parallel.decode_context_parallel_size > 1:
        raise ValueError(
            "the components of a compressed checkpoint are not shared out among devices: leave --tensor-parallel-size, "
            "--pipeline-parallel-size and --decode-context-parallel-size at 1, or export it and serve that"
        )
    if cache.cache_dtype not in ("auto", "bfloat16", "float16"):
        raise ValueError(
            f"components are not kept in {cache.cache_dtype}: leave --kv-cache-dtype at auto, or export the checkpoint "
            "and serve that"
        )
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind == "dynamic" or (kind == "longrope" and rope["short_factor"] != rope["long_factor"]):
        raise ValueError(
            f"the rotary frequencies of this checkpoint change with the length of a sequence (rope_type {kind}), and "
            "sequences of a batch have different ones: run it in transformers"
        )


class ServedForCausalLM(_Served, TransformersForCausalLM):
    """A compressed checkpoint of a family without experts."""


class ServedMoeForCausalLM(_Served, TransformersMoEForCausalLM):
    """A compressed checkpoint of a family with experts."""
