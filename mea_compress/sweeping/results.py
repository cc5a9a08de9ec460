"""What a sweep gives: the original, every point with what it costs and keeps, and what the layers look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mea_compress.report.showing import Shown
from mea_compress.report.sweeps import sweep_report


@dataclass(frozen=True)
class SweepPoint:
    """One way to compress, and what came of it; where it cannot be done, `reason` says why and the rest is None.

    Attributes:
        name: What tells it from the others.
        method: As it was asked for.
        key_composition: Method of keys.
        value_composition: Method of values.
        share: Of the cache to keep, as asked for.
        budget: How layers share it, as asked for; None where that was left to `compress`.
        commands: What makes the checkpoint again, and what measures it.
        reason: Why there is no such checkpoint, or None.
        kv_bytes_per_token: Measured.
        parameters: Of the whole model.
        cross_entropy: Nats per token.
        perplexity: Its exponential.
        kl: KL(original ‖ compressed) in nats per token.
        top1_agreement: Share of positions where both find the same token likeliest.
        predicted_kl: What the measured profile of its budget promised, where there is one.
        decode_tokens_per_second: Greedy, one sequence.
        seconds: What compressing took here.
        widths: Component heads of keys and of values, by layer.
        retrieval: Scores by task, length and depth, where asked for.
        pareto: Whether no other point has both a smaller cache and a smaller KL.
    """

    name: str
    method: str
    key_composition: str | None
    value_composition: str | None
    share: float
    budget: str | None
    commands: tuple[str, ...]
    reason: str | None = None
    kv_bytes_per_token: float | None = None
    parameters: int | None = None
    cross_entropy: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    predicted_kl: float | None = None
    decode_tokens_per_second: float | None = None
    seconds: float | None = None
    widths: Sequence[tuple[float, float]] | None = None
    retrieval: Sequence[Mapping[str, Any]] | None = None
    pareto: bool = False


@dataclass(frozen=True, repr=False)
class Sweep(Shown):
    """What `sweep` found.

    Attributes:
        out: Directory of the page, the figures and the picture.
        source: The checkpoint's name.
        command: What was asked for, as a command.
        text: What was measured on.
        tokens: Predictions compared.
        reference: The original's cross-entropy, perplexity, cache and retrieval.
        points: In the order of the grid.
        profiles: What compressing one layer at a time costs, of each method for which that was measured.
        heads: Spectra and similarities of every layer's heads; see `mea_compress.sweeping.heads`.
        versions: Of what computed it.
    """

    out: Path
    source: str
    command: str
    text: tuple[str, ...]
    tokens: int
    reference: Mapping[str, Any]
    points: tuple[SweepPoint, ...]
    profiles: tuple[Mapping[str, Any], ...]
    heads: tuple[Mapping[str, Any], ...]
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return what ``sweep.json`` holds."""
        data = {key: value for key, value in vars(self).items() if key != "out"}
        data["points"] = [asdict(point) for point in self.points]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}

    def report(self) -> str:
        """Return what people read."""
        return f"{sweep_report(self.to_json())}\n\nWritten to {self.out}: open {self.out / 'index.html'}"


def mark_front(points: Sequence[SweepPoint]) -> tuple[SweepPoint, ...]:
    """Return points with those marked that none beats: each other has a larger cache or a larger KL."""
    measured = [(point.kv_bytes_per_token, point.kl) for point in points]

    def beaten(point: SweepPoint) -> bool:
        size, loss = point.kv_bytes_per_token, point.kl
        return (
            size is None
            or loss is None
            or any(
                other_size is not None
                and other_loss is not None
                and other_size <= size
                and other_loss <= loss
                and (other_size, other_loss) != (size, loss)
                for other_size, other_loss in measured
            )
        )

    return tuple(replace(point, pareto=not beaten(point)) for point in points)


__all__ = ["Sweep", "SweepPoint", "mark_front"]
