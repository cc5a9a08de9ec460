"""What the heads of a layer have in common: spectra, and similarities before and after alignment (METHOD §2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from mea_compress.architectures import Checkpoint
from mea_compress.architectures.families import LayerGeometry
from mea_compress.checkpoint import torch_dtype
from mea_compress.compositions.moments import head_gram, key_cross, moment, value_cross, value_root
from mea_compress.fit.calibration import StatisticsAccumulator
from mea_compress.fit.observation import CacheAccumulator, cached_heads
from mea_compress.heads.alignment import (
    align_phases,
    align_rotations,
    change_value_basis,
    fold_head_norm,
    rotated_gram,
)
from mea_compress.heads.composed import Array, join_heads
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.heads.types import AttentionHeads
from mea_compress.layers.blocks import BlockRunner, ObservedAttention, embed_tokens, recorded
from mea_compress.layers.read import read_heads
from mea_compress.layers.runner import Activations, LayerRunner, batches, embed, fast_products

_FIT = "aligned"
# Points of a spectrum that are kept, at most; more than a page shows.
_POINTS = 96
_TOKENS_PER_STEP = 8192


def survey_heads(
    source: Checkpoint, tokens: torch.Tensor, device: torch.device, progress: bool = True
) -> Iterator[dict[str, Any]]:
    """Look at the heads of every layer that has any while text runs through the model, one layer in memory.

    Args:
        source: The checkpoint.
        tokens: (N, T), int64.
        device: To compute on.
        progress: Show a bar on stderr.

    Yields:
        For each layer ``layer``, ``key`` and ``value``; each side has ``spectrum``, the singular values of what its
        heads send on the text, descending, as shares of the largest and at most 96 of them with ``ranks`` (counted from
        1, of ``channels``); and where there are several heads ``order``, ``before`` and ``after``: their numbers as
        clustering orders them, and in this order the sizes of their cosines, (H, H), as they are and as alignment makes
        them. ``after`` is None where attention leaves no freedom to align (QK-norm keys), and of families that are
        composed at their cache, whose heads are looked at as they are cached.

    Raises:
        RequestError: The family is composed at its cache, and what its layers get cannot be followed.
    """
    products = fast_products(torch_dtype(source.dtype), device)
    hidden = (embed_tokens if source.at_cache else embed)(source, tokens)
    size = max(1, _TOKENS_PER_STEP // tokens.shape[1])
    layers = range(source.config.num_hidden_layers)
    for layer in tqdm(layers, desc="looking at heads", unit="layer", disable=not progress):
        if source.at_cache:
            block = BlockRunner(source, layer, device=device, products=products)
            described = _look_at_cache(block, source.geometry(layer), hidden, size)
            if described is not None:
                yield {"layer": layer, **described}
            continue
        runner = LayerRunner(source, layer, device=device, products=products)
        accumulator = StatisticsAccumulator(runner.attention, products)
        for part in batches(len(tokens), size):
            behind, captured = runner.run(hidden[part])
            accumulator.add(captured)
            hidden[part] = behind
        yield {"layer": layer, **describe_heads(read_heads(source, layer), accumulator.finish())}


def _look_at_cache(
    runner: BlockRunner, geometry: LayerGeometry | None, hidden: Activations, size: int
) -> dict[str, Any] | None:
    """Send text through a layer, `size` sequences at once, and describe the heads that it caches; None without any."""
    accumulator = None if geometry is None else CacheAccumulator(geometry, runner, aligned=False)
    for part in batches(hidden.shape[0], size):
        cached = ObservedAttention()
        with nullcontext() if accumulator is None else recorded(runner.attention, cached):
            behind, _ = runner.run(hidden[part])
        if accumulator is not None:
            accumulator.add(cached)
        hidden[part] = behind
    if geometry is None or accumulator is None:
        return None
    statistics = accumulator.finish()
    key, value = (cached_heads(geometry, side, statistics) for side in ("key", "value"))
    return {
        "key": _described(key.key, statistics.key.moment, None),
        "value": _described(value.value, statistics.value.moment, None),
    }


def describe_heads(heads: AttentionHeads, statistics: LayerStatistics) -> dict[str, Any]:
    """Describe the keys and values of one layer; see `survey_heads`."""
    folded = fold_head_norm(heads)
    sides = {
        "key": (heads.key, None if heads.key_norm is not None else _aligned_keys(heads, statistics)),
        "value": (folded.value, _aligned_values(folded, statistics)),
    }
    described = {}
    for side, (rows, after) in sides.items():
        covariance = moment(statistics, _FIT, side)
        assert covariance is not None
        described[side] = _described(rows, covariance, after)
    return described


def _described(rows: Array, covariance: Array, after: Array | None) -> dict[str, Any]:
    """Describe heads (H, d, D + 1) whose inner products alignment makes those of `after`, (H, H)."""
    return {**_spectrum(rows, covariance), **_similarities(head_gram(rows, covariance), after)}


def _aligned_keys(heads: AttentionHeads, statistics: LayerStatistics) -> Array:
    """Return the inner products of key heads whose rotary pairs were rotated to be alike, (H, H)."""
    cross = key_cross(heads, statistics, _FIT)
    phases = align_phases(cross, _kept(heads)).T
    return (cross * phases[:, :, None] * phases[:, None, :].conj()).real.sum(0)


def _aligned_values(heads: AttentionHeads, statistics: LayerStatistics) -> Array:
    """Return the inner products of value heads in the basis in which they are most alike, (H, H)."""
    if heads.head_norm is None:
        heads = change_value_basis(heads, value_root(heads, _FIT)[0])
    cross = value_cross(heads.value, moment(statistics, _FIT, "value"))
    return rotated_gram(cross, align_rotations(cross, _kept(heads)))


def _kept(heads: AttentionHeads) -> int:
    """Return the components that heads are aligned for: half of them."""
    return max(1, len(heads.key) // 2)


def _spectrum(heads: Array, covariance: Array) -> dict[str, Any]:
    rows = join_heads(heads)
    energies = np.linalg.eigvalsh(rows @ covariance @ rows.T)[::-1]
    values = np.sqrt(np.maximum(energies, 0) / max(energies[0], 1e-300))
    ranks = np.unique(np.linspace(0, len(values) - 1, min(len(values), _POINTS)).round().astype(int))
    spectrum = [float(f"{value:.3g}") for value in values[ranks]]
    return {"channels": len(values), "ranks": (ranks + 1).tolist(), "spectrum": spectrum}


def _similarities(before: Array, after: Array | None) -> dict[str, Any]:
    if len(before) < 2:
        return {}
    similar = {"before": _cosines(before), "after": None if after is None else _cosines(after)}
    order = cluster_order(_cosines(before if after is None else after))
    shown = {
        moment: None if matrix is None else [[round(float(cell), 3) for cell in row] for row in matrix[order][:, order]]
        for moment, matrix in similar.items()
    }
    return {"order": order, **shown}


def _cosines(gram: Array) -> Array:
    size = np.sqrt(np.maximum(gram.diagonal(), 1e-300))
    return np.minimum(np.abs(gram) / size[:, None] / size, 1.0)


def cluster_order(similarity: Array) -> list[int]:
    """Return heads in the order in which average linkage joins them, so that those that are alike lie side by side.

    Args:
        similarity: Sizes of cosines, (H, H), between 0 and 1.
    """
    from sklearn.cluster import AgglomerativeClustering

    tree = AgglomerativeClustering(n_clusters=None, distance_threshold=0.0, metric="precomputed", linkage="average")
    joined = tree.fit(1.0 - similarity).children_  # (H - 1, 2): two earlier nodes each, the first H are heads
    members = [[head] for head in range(len(similarity))]
    for left, right in joined:
        members.append(members[left] + members[right])
    return members[-1]


__all__ = ["cluster_order", "describe_heads", "survey_heads"]
