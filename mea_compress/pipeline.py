"""All that a recipe asks for, in order: compress, then heal and evaluate where it has such sections."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mea_compress.checkpoint.hub import is_hub_id, local_directory
from mea_compress.checkpoint.untrusted import allowed_folders, read_json
from mea_compress.errors import RequestError
from mea_compress.processes import is_first_process
from mea_compress.recipe import Recipe, given_settings, make_recipe
from mea_compress.report.showing import Shown
from mea_compress.report.tables import share
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
        evaluation: What was measured, or None; of several processes the first measures.
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
        out: Where the result goes, instead of the recipe's; where neither says so, beside the source and called after
            it and the recipe.
        resume: Take up an interrupted run of the same request.
        progress: Show progress bars on stderr.
        **settings: Fields of `Recipe` that win over it, one of a section as ``**{"heal.steps": 100}``.

    Raises:
        RequestError: The recipe does not say where from, names a text that is not there, or asks for what cannot be
            done; or what is resumed was healed in another way than it asks for.

    Example:
        >>> result = run("paper-full", source="SRC", out="PAPER", progress=False)
        >>> result.compression.plan.bytes_after
        256
    """
    wanted = make_recipe(recipe, settings | {"source": source, "out": out})
    name = _name(recipe)
    if wanted.source is None:
        raise RequestError(f"{name} does not say where from: add source to it, or give `source`")
    target = wanted.out or _default_out(wanted.source, recipe)
    _check_texts(wanted, name)
    directory = local_directory(wanted.source)
    _check_sections(wanted, name, directory)
    from mea_compress.compression import compress

    compression = compress(directory, target, recipe=wanted, resume=resume, progress=progress)
    healing = evaluation = None
    shared: dict[str, Any] = {"bos": wanted.bos, "device": wanted.device, "progress": progress}
    if wanted.healing_settings and resume and (target / "healing.json").is_file():
        _check_healed_alike(wanted, name, target)
        from mea_compress.healing import take_finished

        if is_first_process():  # what a stop behind it has left
            take_finished(target)
    elif wanted.healing_settings:
        from mea_compress.healing import heal

        options = {"seed": wanted.seed} | shared | given_settings(wanted.healing_settings)
        healing = heal(target, teacher=directory, resume=resume, **options)
    if wanted.evaluate and is_first_process():
        from mea_compress.measure.evaluation import evaluate

        options = shared | given_settings(wanted.evaluate)
        evaluation = evaluate(target, reference=directory, **options)
    return PipelineResult(compression, healing, evaluation)


@dataclass(frozen=True, repr=False)
class Validation(Shown):
    """What `validate` says of recipes.

    Attributes:
        recipes: A sentence for each, by its name.
        faults: The names of those that cannot be carried out.
    """

    recipes: dict[str, str]
    faults: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return `validate --json`."""
        return {
            "recipes": [
                {"recipe": name, "valid": name not in self.faults, "sentence": sentence}
                for name, sentence in self.recipes.items()
            ]
        }

    def report(self) -> str:
        """Return a line for each recipe."""
        return "\n".join(self.recipes.values())


def validate(
    recipe: Recipe | Path | str | Sequence[Recipe | Path | str], *, source: Path | str | None = None, **settings: Any
) -> Validation:
    """Say of recipes whether `run` would refuse them. Of a source only headers are read, and nothing is written.

    The keys and their values, the recipes that they extend, the texts that they name, what they ask of healing and
    measuring (tasks are loaded with their data), and whether the checkpoint allows what they ask for, where they or
    `source` name one.

    Args:
        recipe: A `Recipe`, a built-in recipe's name or a YAML file, or several of them.
        source: The checkpoint to compress, instead of the recipe's.
        **settings: Fields of `Recipe` that win over it.

    Example:
        >>> print(validate(["paper-full", "paper-hafl"], source="SRC"))
        paper-full is valid: 50 % of the cache of SRC
        there is no recipe file or built-in recipe 'paper-hafl': did you mean paper-half?
    """
    sentences, faults = {}, []
    for one in [recipe] if isinstance(recipe, Recipe | Path | str) else recipe:
        name = _name(one)
        try:
            sentences[name] = f"{name} is valid{_what_it_keeps(one, settings | {'source': source})}"
        except RequestError as error:
            sentences[name] = str(error)
            faults.append(name)
    return Validation(sentences, tuple(faults))


def _what_it_keeps(recipe: Recipe | Path | str, settings: dict[str, Any]) -> str:
    """Return how much of the cache a recipe keeps, or nothing where it names no checkpoint.

    Raises:
        RequestError: `run` would refuse it.
    """
    wanted = make_recipe(recipe, settings)
    _check_texts(wanted, _name(recipe))
    _check_sections(wanted, _name(recipe), None if wanted.source is None else local_directory(wanted.source))
    if wanted.source is None:
        return ""
    from mea_compress.planning.plans import make_plan

    plan = make_plan(wanted.source, wanted)
    return f": {share({'before': plan.bytes_before, 'after': plan.bytes_after})} of the cache of {wanted.source}"


def _name(recipe: Recipe | Path | str) -> str:
    return "the recipe" if isinstance(recipe, Recipe) else str(recipe)


def _default_out(source: Path, recipe: Recipe | Path | str) -> Path:
    """Return a directory beside the source: models/NAME-best-50 for models/NAME and best-50 or best-50.yaml.

    What is on the hub becomes NAME-best-50 in the current directory.
    """
    if is_hub_id(source):
        source = Path(Path(str(source).partition("@")[0]).name)
    beside = Path(os.path.abspath(source))  # the name of . and of DIR/.. too, and not where a link leads
    purpose = "compressed" if isinstance(recipe, Recipe) else Path(recipe).stem
    return beside.with_name(f"{beside.name}-{purpose}")


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


def _check_sections(recipe: Recipe, name: str, source: Path | None) -> None:
    """Raise `RequestError` for what healing or measuring would refuse, before the hours of work that come before them.

    Args:
        recipe: What is asked for.
        name: What messages call it.
        source: Directory of the original, None where that is not known.
    """
    healing, measuring = recipe.healing_settings, recipe.evaluate
    if healing is None and measuring is None:
        return
    context = vocabulary = None
    if source is not None:
        from mea_compress.architectures import open_checkpoint

        config = open_checkpoint(source).config
        context = getattr(config, "max_position_embeddings", None) or None
        vocabulary = getattr(config, "vocab_size", None)
    section = "heal"
    try:
        if healing is not None:
            from mea_compress.healing import check_settings as check_healing
            from mea_compress.loading import check_context

            check_healing(vocabulary=vocabulary, **given_settings(healing))
            check_context(context, healing.sequence_length or 0)
        if measuring is not None:
            from mea_compress.measure.evaluation import check_settings as check_measuring

            section = "evaluate"
            check_measuring(context=context, **given_settings(measuring))
    except RequestError as error:
        raise RequestError(f"in {section} of {name}, {error}") from error


def _check_healed_alike(recipe: Recipe, name: str, target: Path) -> None:
    """Raise `RequestError` where healing.json says that a checkpoint was healed otherwise than a recipe asks for."""
    from mea_compress.healing import SAMPLED_TEXT, check_settings

    assert recipe.healing_settings is not None
    given = given_settings(recipe.healing_settings)
    asked = {
        "steps": given["steps"],
        "train": ",".join(check_settings(**given)),
        "seed": given.get("seed", recipe.seed),
        "learning_rate": given.get("learning_rate"),
        "answers_only": given.get("answers_only", False),
        "text": read_documents(given["text"]).title if "text" in given else SAMPLED_TEXT,
    }
    done = read_json(target / "healing.json", allowed_folders(target))
    differ = ", ".join(setting for setting, value in asked.items() if done.get(setting, value) != value)
    if differ:
        raise RequestError(
            f"{target} was healed already, with another {differ} than {name} asks for: give another `out`, or heal it "
            "further with mea-compress heal"
        )
