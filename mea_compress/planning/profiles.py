"""What compressing one side of one layer costs, by width: the measured curve that a budget is planned from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mea_compress.errors import RequestError
from mea_compress.report.showing import Shown
from mea_compress.report.tables import profile_report

FORMAT = "mea-compress profile 1"


@dataclass(frozen=True)
class ProfilePoint:
    """What was measured when one side of one layer was compressed and nothing else.

    Attributes:
        layer: Its number.
        side: ``key``, ``value``, or ``both`` where the two read one latent.
        components: Component heads that the side kept; of both sides together for ``both``.
        kl: KL(original ‖ compressed) in nats per token, less the noise of rounding.
        cross_entropy: How much the cross-entropy grew, in nats per token.
    """

    layer: int
    side: str
    components: float
    kl: float
    cross_entropy: float


@dataclass(frozen=True, repr=False)
class Profile(Shown):
    """The cost of compressing one layer at a time.

    Attributes:
        source: Name of the checkpoint.
        key_composition: Method of keys.
        value_composition: Method of values.
        fit: ``weights``, ``activations`` or ``aligned``.
        layers: Number of layers of the model.
        heads: Key/value heads that the source caches a layer.
        head_dim: Channels of a head.
        tokens: Predictions that costs are averaged over.
        cross_entropy: Of the original on them, in nats per token.
        floor: KL that any change of the weights makes, however small: the noise of the arithmetic, which is taken off
            the points; 0 where products are in float32.
        points: What was measured.
    """

    source: str
    key_composition: str
    value_composition: str
    fit: str
    layers: int
    heads: int
    head_dim: int
    tokens: int
    cross_entropy: float
    floor: float
    points: tuple[ProfilePoint, ...]

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that were compressed, ``key`` and ``value`` or ``both``."""
        return tuple(dict.fromkeys(point.side for point in self.points))

    def curve(self, layer: int, side: str) -> tuple[list[float], list[float]]:
        """Return component heads, ascending, and the KL at each, monotone: never more where more is kept.

        Fewer tokens than the truth needs make neighbours cross; isotonic regression moves them least.
        """
        from sklearn.isotonic import IsotonicRegression

        points = sorted(
            (point.components, point.kl) for point in self.points if (point.layer, point.side) == (layer, side)
        )
        kept, costs = [list(column) for column in zip(*points, strict=True)] if points else ([], [])
        if len(kept) > 1:
            costs = IsotonicRegression(increasing=False).fit_transform(kept, costs).tolist()
        return kept, costs

    def shape(self) -> str:
        """Say whether the middle layers lose least, as in arXiv 2601.19611."""
        costs: dict[int, float] = {}
        for side in self.sides:
            for layer in {point.layer for point in self.points}:
                kept, curve = self.curve(layer, side)
                half = min(range(len(kept)), key=lambda index: abs(kept[index] - kept[-1] / 2))
                costs[layer] = costs.get(layer, 0.0) + max(curve[half], 0.0)
        layers = sorted(costs)
        third = len(layers) // 3
        if not third:
            return "There are too few layers to say which lose least."
        parts = {"first": layers[:third], "middle": layers[third:-third], "last": layers[-third:]}
        means = {name: sum(costs[layer] for layer in part) / len(part) for name, part in parts.items()}
        shown = ", ".join(f"{name} {mean:.2g}" for name, mean in means.items())
        least = min(means, key=lambda name: means[name])
        verdict = "as in the paper" if least == "middle" else f"the {least} ones lose least, unlike in the paper"
        return f"KL a layer at about half the width, by thirds of the depth: {shown}; " + (
            f"the middle layers lose least, {verdict}." if least == "middle" else f"{verdict}."
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain data, as `profile --json` and ``compression.json`` have it."""
        return {"format": FORMAT} | asdict(self) | {"points": [asdict(point) for point in self.points]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Profile:
        """Return the profile of plain data.

        Raises:
            ValueError: It is no profile.
        """
        if data.get("format") != FORMAT:
            raise ValueError(f"its format is {data.get('format')!r} and not {FORMAT!r}")
        try:
            values = {name: value for name, value in data.items() if name != "format"}
            return Profile(**values | {"points": tuple(ProfilePoint(**point) for point in values["points"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"it lacks or has too much: {error}") from None

    def report(self) -> str:
        """Return what people read."""
        return "\n\n".join([profile_report(self.to_json()), self.shape()])


def read_profile(file: Path) -> Profile:
    """Read a profile's JSON file.

    Raises:
        RequestError: It cannot be read, or is no profile.
    """
    try:
        return Profile.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as error:
        raise RequestError(
            f"{file} cannot be read as a profile ({error}); give the file that `mea-compress profile --json` wrote"
        ) from None


__all__ = ["Profile", "ProfilePoint", "read_profile"]
