"""What measuring gives: the figures of one checkpoint, of its reference, and of several checkpoints side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mea_compress.checkpoint.files import refusals
from mea_compress.report.measurements import evaluation_report, evaluations_report, model_columns
from mea_compress.report.plots import draw_retrieval
from mea_compress.report.showing import Shown

if TYPE_CHECKING:
    from mea_compress.measure.agreement import Agreement
    from mea_compress.measure.retrieval import RetrievalScore
    from mea_compress.measure.speed import Timing
    from mea_compress.measure.tasks import TaskScore

_ON_REQUEST = ("speed", "tasks", "retrieval", "agreement")


@dataclass(frozen=True)
class ReferenceEvaluation:
    """The original's figures.

    Attributes:
        cross_entropy: Nats per token, None without text.
        perplexity: Its exponential.
        kv_bytes_per_token: Bytes by which one sequence's cache grows with a token, from the tensors it holds.
        tasks: Its scores of the tasks asked for, None where none were.
        retrieval: Its scores of retrieval, None where it was not asked for.
    """

    cross_entropy: float | None
    perplexity: float | None
    kv_bytes_per_token: float
    tasks: tuple[TaskScore, ...] | None = None
    retrieval: tuple[RetrievalScore, ...] | None = None


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """What `evaluate` measures of one checkpoint.

    Attributes:
        tokens: Predictions compared; None without text, as are all losses.
        cross_entropy: Nats per token.
        perplexity: Its exponential.
        kl: KL(reference ‖ checkpoint) in nats per token, None without a reference.
        top1_agreement: Share of positions where both find the same token likeliest, None without a reference.
        kv_bytes_per_token: Bytes by which one sequence's cache grows with a token, from the tensors it holds.
        reference: The same of the reference.
        decode_tokens_per_second: Greedy, one sequence.
        prefix_ids: Ids in front of every sequence, None without text.
        speed: Times, caches and memory at the contexts and batches asked for, None where none were.
        tasks: Scores of the tasks asked for, None where none were.
        retrieval: Scores by task, length and depth, None where retrieval was not asked for.
        agreement: How long greedy decoding stays with the reference, None where it was not asked for.
    """

    tokens: int | None
    cross_entropy: float | None
    perplexity: float | None
    kl: float | None
    top1_agreement: float | None
    kv_bytes_per_token: float
    reference: ReferenceEvaluation | None
    decode_tokens_per_second: float
    prefix_ids: tuple[int, ...] | None = None
    speed: tuple[Timing, ...] | None = None
    tasks: tuple[TaskScore, ...] | None = None
    retrieval: tuple[RetrievalScore, ...] | None = None
    agreement: Agreement | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data; what was not measured is None, what is measured on request stands where asked for."""
        data = _asked_for(asdict(self))
        if data["reference"] is not None:
            data["reference"] = _asked_for(data["reference"])
        return data

    def report(self) -> str:
        """Return what people read."""
        return evaluation_report(self.to_json())

    def draw_retrieval(self, file: Path | str) -> None:
        """Draw heat maps of retrieval, the reference's beside the checkpoint's; see `report.plots`.

        Raises:
            RequestError: Retrieval was not measured, matplotlib is not installed, or the file cannot be written.
        """
        with refusals(Path(file)):
            draw_retrieval(model_columns({"checkpoint": self.to_json()}), file)


@dataclass(frozen=True, repr=False)
class Evaluations(Shown):
    """What `evaluate` measures of several checkpoints on the same tokens.

    Attributes:
        checkpoints: Evaluations by the path as it was given, in that order; all have the same reference.
    """

    checkpoints: Mapping[str, Evaluation]

    def to_json(self) -> dict[str, Any]:
        """Return plain data: ``checkpoints``, each as if it had been measured alone."""
        return {"checkpoints": {name: evaluation.to_json() for name, evaluation in self.checkpoints.items()}}

    def report(self) -> str:
        """Return what people read: a column for each checkpoint."""
        return evaluations_report(self.to_json()["checkpoints"])

    def draw_retrieval(self, file: Path | str) -> None:
        """Draw heat maps of retrieval, a column for each checkpoint; see `report.plots`.

        Raises:
            RequestError: Retrieval was not measured, matplotlib is not installed, or the file cannot be written.
        """
        with refusals(Path(file)):
            draw_retrieval(model_columns(self.to_json()["checkpoints"]), file)


def _asked_for(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in _ON_REQUEST or value is not None}


__all__ = ["Evaluation", "Evaluations", "ReferenceEvaluation"]
