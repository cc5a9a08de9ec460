"""What is decided about a checkpoint before any weight is read: for every layer, and for the whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mea_compress.architectures import Checkpoint
from mea_compress.modeling.section_mea import Form, every_head, side_form, side_section
from mea_compress.planning.profiles import Profile
from mea_compress.recipe import Recipe
from mea_compress.report.showing import Shown
from mea_compress.report.tables import plan_report, stock_outlook

CONTEXTS = (8_192, 32_768, 131_072)
"""Tokens at which the whole cache is shown."""


@dataclass(frozen=True)
class SideSpec:
    """How the keys or the values of a layer are cached.

    Attributes:
        composition: Name of the composition, as in the ``mea`` section.
        components: Component heads; part of one where the form allows it.
        form: How the side is stored, cached and read.
    """

    composition: str
    components: float
    form: Form


@dataclass(frozen=True)
class LayerSpec:
    """How a layer caches its keys and values."""

    key: SideSpec
    value: SideSpec

    @staticmethod
    def of(section: Mapping[str, Any] | None) -> LayerSpec:
        """Return the spec of a layer's entry in the ``mea`` section; None where it caches nothing per head."""
        if section is None:
            section = every_head(0)
        key, value = (
            SideSpec(section[f"{side}_composition"], section[f"{side}_components"], side_form(section, side))
            for side in ("key", "value")
        )
        return LayerSpec(key, value)

    def section(self) -> dict[str, Any]:
        """Return the part of an entry in the ``mea`` section that a spec says."""
        return side_section("key", self.key.composition, self.key.components, self.key.form) | side_section(
            "value", self.value.composition, self.value.components, self.value.form
        )

    def side(self, name: str) -> SideSpec:
        """Return the spec of one side, ``key`` or ``value``."""
        return self.key if name == "key" else self.value


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer.

    Attributes:
        layer: Its number.
        before: How the source caches it.
        spec: How it is cached afterwards.
        bytes_before: Cache bytes per token in the source.
        bytes_after: Cache bytes per token afterwards.
        parameters_before: Numbers in the tensors that make its keys and values, in the source.
        parameters_after: Numbers in those tensors afterwards.
        needs_queries: Whether its fit reads q_proj and o_proj; if not, only k_proj and v_proj change.
        window: Tokens that it caches at most, or None.
    """

    layer: int
    before: LayerSpec
    spec: LayerSpec
    bytes_before: int
    bytes_after: int
    parameters_before: int
    parameters_after: int
    needs_queries: bool
    window: int | None = None

    @property
    def compressed(self) -> bool:
        """Whether anything happens to the layer."""
        return self.spec != self.before

    def to_json(self) -> dict[str, Any]:
        """Return the entry of ``layers`` in `plan --json`."""
        return {
            "layer": self.layer,
            "key_components": self.spec.key.components,
            "value_components": self.spec.value.components,
            "key_composition": self.spec.key.composition,
            "value_composition": self.spec.value.composition,
            "kv_bytes_per_token": {"before": self.bytes_before, "after": self.bytes_after},
        }


@dataclass(frozen=True)
class Decisions:
    """What follows from checkpoint and recipe together, decided once.

    Attributes:
        needs_calibration: Whether the fit uses calibration data.
        sequences: Calibration sequences.
        sequence_length: Tokens of each.
        refinement_steps: Optimiser steps of a layer's refinement, 0 for none.
        measures_budget: Whether widths are chosen by a profile, measured before the fit.
        shares_rotary_allocation: Whether rotary pairs get the same components in all layers, chosen for all together.
        searches_kv_split: Whether the key/value split of a layer's budget is searched.
        stored_dtype: Safetensors name of the dtype that composed layers are stored in.
        has_static_shapes: Whether the plan alone says which tensors a fit makes and of which shapes.
        verifies_whole_model: Whether the result is loaded and run whole before it appears.
        choice: Why these compositions, where the recipe left it open; empty where it named them.
        rotary_components: The components of each rotary pair, where all layers share them and they have been chosen.
        healing_steps: Optimiser steps of the distillation behind the fit at most, 0 for none.
        healing_asked_for: Whether the recipe names these steps, so that they are taken or refused.
    """

    needs_calibration: bool
    sequences: int
    sequence_length: int
    refinement_steps: int
    measures_budget: bool
    shares_rotary_allocation: bool
    searches_kv_split: bool
    stored_dtype: str
    has_static_shapes: bool
    verifies_whole_model: bool
    choice: str
    rotary_components: tuple[int, ...] | None = None
    healing_steps: int = 0
    healing_asked_for: bool = False


@dataclass(frozen=True)
class Costs:
    """Sizes of the whole.

    Attributes:
        parameters_before: Of the whole model.
        parameters_after: Of the whole model.
        output_bytes: Size of the emitted weights on disk.
        disk_bytes: Most that is on disk while the work goes on.
        memory_bytes: Memory to expect above what importing the libraries takes.
        heal_bytes: Memory of weights and optimiser in `heal` afterwards, by itself; see `heal_weight_bytes`.
        stock_export: What a stock export costs and saves, or the ``reason`` why there is none.
    """

    parameters_before: int
    parameters_after: int
    output_bytes: int
    disk_bytes: int
    memory_bytes: int
    stock_export: dict[str, Any] = field(default_factory=dict)
    heal_bytes: int = 0


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """Everything that is decided: what is compressed, how, and what it takes. Whatever comes after asks the plan alone.

    Attributes:
        source: The opened checkpoint.
        recipe: What was asked for.
        layers: In order.
        decisions: What follows from both.
        costs: Sizes of the whole.
        profile: What each width of each layer costs, where widths were chosen by it.
        predicted_kl: What the chosen widths cost by it, in nats per token.
    """

    source: Checkpoint
    recipe: Recipe
    layers: tuple[LayerPlan, ...]
    decisions: Decisions
    costs: Costs
    profile: Profile | None = None
    predicted_kl: float | None = None

    @property
    def bytes_before(self) -> int:
        """Cache bytes per token of the source."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Cache bytes per token of what is emitted."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_json(self, batch: int = 1) -> dict[str, Any]:
        """Return `plan --json`; `batch` sequences are counted where whole caches are shown."""
        return {
            "kv_bytes_per_token": {"before": self.bytes_before, "after": self.bytes_after},
            "parameters": {"before": self.costs.parameters_before, "after": self.costs.parameters_after},
            "layers": [layer.to_json() for layer in self.layers],
            "cache": cache_sizes(((one.bytes_before, one.bytes_after, one.window) for one in self.layers), batch),
            "output_bytes": self.costs.output_bytes,
            "memory_bytes": self.costs.memory_bytes,
            "heal_memory_bytes": self.costs.heal_bytes,
            "composed_at": composed_at(self.source),
            "stock_export": self.costs.stock_export,
            **({} if self.predicted_kl is None else {"predicted_kl": self.predicted_kl}),
        }

    def report(self, batch: int = 1) -> str:
        """Return the plan as people read it."""
        data = self.to_json(batch)
        choice = [f"Composition: {self.decisions.choice}"] if self.decisions.choice else []
        return "\n\n".join([plan_report(data), *choice, stock_outlook(data["stock_export"])])


def composed_at(source: Checkpoint) -> str:
    """Return where keys and values are composed: in the projections (k_proj makes components), or at the cache."""
    return "cache" if source.at_cache else "projections"


def cache_sizes(layers: Iterable[tuple[int, int, int | None]], batch: int) -> list[dict[str, int]]:
    """Return the bytes of the whole cache at every one of `CONTEXTS`.

    Args:
        layers: Bytes per token before and after, and the sliding window in tokens where there is one.
        batch: Number of sequences.
    """
    layers = list(layers)
    sizes = []
    for tokens in CONTEXTS:
        seen = [(before, after, min(tokens, window or tokens)) for before, after, window in layers]
        before, after = (batch * sum(layer[side] * layer[2] for layer in seen) for side in (0, 1))
        sizes.append({"tokens": tokens, "batch": batch, "before": before, "after": after})
    return sizes
