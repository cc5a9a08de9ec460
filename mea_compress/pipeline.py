"""All that a recipe asks for, in order: compress, then heal and evaluate where it has such sections."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mea_compress.errors import RequestError
from mea_compress.recipe import Recipe, given_settings, make_recipe
from mea_compress.report.showing import Shown
from mea_compress.text.reading import STDIN, read_documents

if TYPE_CHECKING:
    from mea_compress.compression import CompressionResult
    from mea_compress.healing import HealingResult
    from mea_compress.measure.results import Evaluation


@dataclass(frozen=True, repr=False)
class PipelineResult(Shown):
    """What `run` did.

    Attributes:
        compression: What was compressed.
        healing: What healing did, or None where the recipe has no such section or it was done before.
        evaluation: What was measured, or None.
    """

    compression: CompressionResult
    healing: HealingResult | None = None
    evaluation: Evaluation | None = None

    def to_json(self) -> dict[str, Any]:
        """Return `run --json`."""
        data = self.compression.to_json()
        if self.healing is not None:
            data["healing"] = self.healing.to_json()
        if self.evaluation is not None:
            data["evaluation"] = self.evaluation.to_json()
        return data

    def report(self) -> str:
        """Return what people read."""
        parts = [self.compression.report()]
        if self.healing is not None:
            parts.append(self.healing.report())
        if self.evaluation is not None:
            parts.append(self.evaluation.report())
        return "\n\n".join(parts)


def run(
    recipe: Recipe | Path | str,
    *,
    source: Path | str | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> PipelineResult:
    """Do all that a recipe asks for.

    Args:
        recipe: A `Recipe`, a built-in recipe's name or a YAML file.
        source: The checkpoint to compress, instead of the recipe's.
        out: Where the result goes, instead of the recipe's.
        resume: Take up an interrupted run of the same request.
        progress: Show progress bars on stderr.
        **settings: Fields of `Recipe` that win over it.

    Raises:
        RequestError: The recipe does not say where from and where to, names a text that is not there, or asks for what
            cannot be done.

    Example:
        >>> result = run("paper-full", source="SRC", out="PAPER", progress=False)
        >>> result.compression.plan.bytes_after
        256
    """
    wanted = make_recipe(recipe, settings | {"source": source, "out": out})
    name = "the recipe" if isinstance(recipe, Recipe) else str(recipe)
    if wanted.source is None or wanted.out is None:
        raise RequestError(
            f"{name} does not say where from and where to: add source and out, or give --source and --out"
        )
    _check_texts(wanted, name)
    from mea_compress.compression import compress

    compression = compress(wanted.source, wanted.out, recipe=wanted, resume=resume, progress=progress)
    healing = evaluation = None
    shared: dict[str, Any] = {"bos": wanted.bos, "device": wanted.device, "progress": progress}
    if wanted.healing_settings and not (resume and (wanted.out / "healing.json").is_file()):
        from mea_compress.healing import heal

        options = {"seed": wanted.seed} | shared | given_settings(wanted.healing_settings)
        healing = heal(wanted.out, teacher=wanted.source, **options)
    if wanted.evaluate:
        from mea_compress.measure.evaluation import evaluate

        options = shared | given_settings(wanted.evaluate)
        evaluation = evaluate(wanted.out, reference=wanted.source, **options)
    return PipelineResult(compression, healing, evaluation)


def _check_texts(recipe: Recipe, name: str) -> None:
    """Raise `RequestError` for texts that are not there, before hours of work that come before they are read."""
    sections = (recipe, recipe.healing_settings, recipe.evaluate)
    texts = [section.text for section in sections if section is not None and section.text]
    if sum(STDIN in text for text in texts) > 1:
        raise RequestError(f"{name} reads standard input (-) more than once: give it to one text only")
    for text in texts:
        try:
            read_documents(text)
        except RequestError as error:
            raise RequestError(f"in {name}, {error}") from error
