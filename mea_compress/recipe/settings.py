"""What the user asks for: one validated description of a compression, from YAML, flags or Python.

The fields of `Recipe` are declared once; the command line builds its options from them. `recipe.loading` reads recipes.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mea_compress.compositions.base import BUILT_IN, check_choice
from mea_compress.errors import RequestError
from mea_compress.modeling.section_mea import FORM_OF

MethodChoice = str | dict[str, str | int | float | bool]
"""A method's name, or a mapping of `method` to its name and of its options to their values."""
Fit = Literal["weights", "activations", "aligned"]
DType = Literal["float64", "float32", "float16", "bfloat16"]
S = TypeVar("S", bound=BaseModel)
LaxPath = Annotated[Path, Field(strict=False)]
Bos = Literal["auto", "always", "never"]

EXTENDS = "extends"
"""The key by which a file of a recipe names another that it changes; no setting, since the file alone has it."""
FORMER_NAMES = {"rotary_budget": "rotary_allocation"}
"""What settings were called in earlier versions, whose recipes lie in the checkpoints that they wrote."""

_LAYER_ITEM = re.compile(r"^(\d+)(?:(-)(\d*))?$")
_DEVICE = r"^(auto|cpu|mps|cuda(:\d+)?)$"
_COUNTS = r"^[1-9]\d*(,[1-9]\d*)*$"
_BUDGETS = ("measured", "uniform", "half", "deep", "full")
_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?$", re.IGNORECASE)


def _built_in(side: str) -> str:
    """Names of the methods that come with the package and fit a side, as a help text lists them."""
    return ", ".join(name for name in BUILT_IN if side in FORM_OF[name].sides)


class _Settings(BaseModel):
    """Strict, immutable, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


def _group(name: str, metavar: str | None = None) -> dict[str, Any]:
    """How the command line shows a field: the heading of its help section and the placeholder of its value."""
    return {"group": name} | ({"metavar": metavar} if metavar else {})


def _numbers_as_text(value: object) -> object:
    """Text of what YAML makes of natural spellings, such as `layers: 3`, `layers: [0, 2]` or `contexts: 8192`."""
    items = value if isinstance(value, list) else [value]
    if items and all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        return ",".join(str(item) for item in items)
    return value


def _texts(value: object) -> object:
    """Names of texts, of which YAML, flags and calls in Python give one or several."""
    if isinstance(value, str | Path):
        return (str(value),)
    if isinstance(value, list | tuple) and value and all(isinstance(item, str | Path) for item in value):
        return tuple(str(item) for item in value)
    return value


def _one_or_several(value: tuple[str, ...]) -> str | list[str]:
    return value[0] if len(value) == 1 else list(value)


Texts = Annotated[tuple[str, ...], BeforeValidator(_texts), PlainSerializer(_one_or_several)]
"""Names of texts; see `mea_compress.text.reading`. A single one is written as it is given."""
_TEXT_HELP = "a text file, .jsonl, .parquet, directory, - or dataset:NAME; may be given again"
_BOS_HELP = (
    "What stands in front of every sequence: what the tokenizer puts there itself (auto), or its bos_token where that "
    "is nothing (always), or nothing (never)"
)


class HealRecipe(_Settings):
    """How the compressed checkpoint is distilled from its original; see `mea_compress.healing`."""

    text: Texts | None = Field(
        None,
        description=f"Text to distil on ({_TEXT_HELP}); without it text is sampled from the original.",
        json_schema_extra=_group("Data", "FILE"),
    )
    bos: Bos | None = Field(None, description=f"{_BOS_HELP}; auto without it.", json_schema_extra=_group("Data"))
    answers_only: bool | None = Field(
        None,
        description="Learn from the answers of conversations alone; all of the text has messages.",
        json_schema_extra=_group("Data"),
    )
    steps: int = Field(200, ge=1, description="Optimiser steps.", json_schema_extra=_group("Training", "N"))
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate; found by short trials without it.",
        json_schema_extra=_group("Training", "X"),
    )
    train: str | None = Field(
        None,
        description="Which weights learn: compositions, components (with k_proj and v_proj), attention (the default), "
        "lora (adapters on the rest too) or all; several, as compositions,attention, one after the other.",
        json_schema_extra=_group("Training", "STAGES"),
    )
    batch_size: int | None = Field(
        None, ge=1, description="Sequences in a step.", json_schema_extra=_group("Training", "N")
    )
    temperature: float | None = Field(
        None,
        gt=0,
        description="Divides the logits of both models; 1 without it.",
        json_schema_extra=_group("Training", "X"),
    )
    cross_entropy: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the text's own cross-entropy in the loss; 0 without it.",
        json_schema_extra=_group("Training", "X"),
    )
    top_logits: int | None = Field(
        None,
        ge=1,
        description="Less memory: only the original's K likeliest tokens are told apart in the loss.",
        json_schema_extra=_group("Training", "K"),
    )
    match_hidden: float | None = Field(
        None,
        ge=0,
        description="Weight of the error of the layers' outputs in the loss; 30 without it.",
        json_schema_extra=_group("Training", "X"),
    )
    match_attention: float | None = Field(
        None,
        ge=0,
        description="Weight of the error of the attention blocks' outputs in the loss; 0 without it.",
        json_schema_extra=_group("Training", "X"),
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="Less memory: every layer is run a second time for its gradients.",
        json_schema_extra=_group("Training"),
    )
    sequence_length: int | None = Field(
        None, ge=2, description="Tokens in a sequence.", json_schema_extra=_group("Data", "N")
    )
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="Seed of sampling and order.", json_schema_extra=_group("Run", "N")
    )
    device: str | None = Field(
        None, pattern=_DEVICE, description="auto, cpu, cuda, cuda:N or mps.", json_schema_extra=_group("Run", "D")
    )


def _heal_tag(value: object) -> str:
    """Name the kind of `heal`: settings of its own, or steps. Tags have no place in messages; see `_explain`."""
    return "<settings>" if isinstance(value, Mapping | BaseModel) else "<steps>"


def _heal_steps(value: object) -> object:
    """Steps as text, of what YAML, flags and calls in Python give."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not re.fullmatch(r"auto|\d{1,9}", text):
        raise ValueError(f"should be auto or a number of steps, or settings of its own, not {value!r}")
    return text


Heal = Annotated[
    Annotated[Annotated[str, BeforeValidator(_heal_steps)], Tag("<steps>")] | Annotated[HealRecipe, Tag("<settings>")],
    Discriminator(_heal_tag),
]
"""Steps of a distillation behind the fit, or how `run` heals what was written."""


class EvaluateRecipe(_Settings):
    """How a checkpoint is measured; see `mea_compress.measure.evaluation`."""

    text: Texts | None = Field(
        None,
        description=f"Text to measure on ({_TEXT_HELP}); with --tasks it may be left out.",
        json_schema_extra=_group("Data", "FILE"),
    )
    bos: Bos | None = Field(None, description=f"{_BOS_HELP}; auto without it.", json_schema_extra=_group("Data"))
    sequence_length: int | None = Field(
        None, ge=2, description="Tokens in a sequence, at most.", json_schema_extra=_group("Data", "N")
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="Measure this many sequences, examples of each task, and prompts at each place of retrieval.",
        json_schema_extra=_group("Data", "N"),
    )
    batch_size: int | None = Field(
        None, ge=1, description="Sequences in a batch.", json_schema_extra=_group("Run", "N")
    )
    device: str | None = Field(
        None, pattern=_DEVICE, description="auto, cpu, cuda, cuda:N or mps.", json_schema_extra=_group("Run", "D")
    )
    dtype: DType | None = Field(
        None, description="Compute in this type; the checkpoint's own without it.", json_schema_extra=_group("Run")
    )
    contexts: str | None = Field(
        None,
        pattern=_COUNTS,
        description="Also time prefill and decoding, and measure cache and memory, at these cached tokens: 1024,8192.",
        json_schema_extra=_group("Speed", "N,N"),
    )
    batches: str | None = Field(
        None,
        pattern=_COUNTS,
        description="Sequences at once, for --contexts; 1 without it.",
        json_schema_extra=_group("Speed", "N,N"),
    )

    tasks: str | None = Field(
        None,
        description="Tasks of lm-evaluation-harness: arc_easy,piqa,… (needs the extra eval).",
        json_schema_extra=_group("Tasks", "NAME,NAME"),
    )
    task_dir: LaxPath | None = Field(
        None, description="Directory of task files of your own, for --tasks.", json_schema_extra=_group("Tasks", "DIR")
    )
    few_shot: int | None = Field(
        None,
        ge=0,
        description="Solved examples in front of each; as the task says without it.",
        json_schema_extra=_group("Tasks", "N"),
    )
    chat_template: bool | None = Field(
        None,
        description="Put the tokenizer's chat template around prompts of tasks.",
        json_schema_extra=_group("Tasks"),
    )
    retrieval: str | None = Field(
        None,
        pattern=_COUNTS,
        description="Hide numbers in the text at these lengths in tokens, and count how many are found: 1024,4096.",
        json_schema_extra=_group("Retrieval and decoding", "N,N"),
    )
    agreement: int | None = Field(
        None,
        ge=1,
        description="Decode this many tokens, and count those before the first that is not the reference's.",
        json_schema_extra=_group("Retrieval and decoding", "N"),
    )
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**63,
        description="Seed of what --retrieval hides and where; 0 without it.",
        json_schema_extra=_group("Run", "N"),
    )

    @field_validator("contexts", "batches", "retrieval", mode="before")
    @classmethod
    def _counts_as_text(cls, value: object) -> object:
        return _numbers_as_text(value)

    @field_validator("tasks", mode="before")
    @classmethod
    def _names_as_text(cls, value: object) -> object:
        return ",".join(value) if isinstance(value, list) and all(isinstance(name, str) for name in value) else value

    @model_validator(mode="after")
    def _measures_something(self) -> EvaluateRecipe:
        if self.text is None and not self.tasks:
            raise ValueError("says nothing to measure on: give `text`, or `tasks`")
        return self


class Recipe(_Settings):
    """Everything `compress` can be told, and for `run` also where from, where to and what afterwards.

    Paths are relative to the directory the command runs in. `key_components` and `value_components` each take the place
    of `kv_ratio` for their side; a side that neither speaks of keeps all its heads.
    """

    description: str | None = Field(None, description="What the recipe is for, in a sentence.")
    source: LaxPath | None = Field(None, description="The checkpoint to compress (for `run`).")
    out: LaxPath | None = Field(None, description="Where the compressed checkpoint goes (for `run`).")

    kv_ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the original cache to keep in each compressed layer, above 0 and at most 1.",
        json_schema_extra=_group("What to keep", "X"),
    )
    key_components: int | None = Field(
        None,
        ge=1,
        description="Component key heads in each compressed layer, instead of --kv-ratio.",
        json_schema_extra=_group("What to keep", "N"),
    )
    value_components: int | None = Field(
        None,
        ge=1,
        description="Component value heads in each compressed layer, instead of --kv-ratio.",
        json_schema_extra=_group("What to keep", "N"),
    )
    layers: str = Field(
        "all",
        description="Layers to compress, 0-based: all, half or deep (the paper's, for any depth), or 0,2,4-7,20-.",
        json_schema_extra=_group("What to keep", "SPEC"),
    )
    kv_groups: int = Field(
        1,
        ge=1,
        description="Compose heads within this many separate groups of them.",
        json_schema_extra=_group("What to keep", "N"),
    )
    key_composition: MethodChoice | None = Field(
        None,
        description=f"How keys are fitted: {_built_in('key')}, or a method of your own; without it the best that the "
        "family allows.",
        json_schema_extra=_group("How to compose", "METHOD"),
    )
    value_composition: MethodChoice | None = Field(
        None,
        description=f"How values are fitted: {_built_in('value')}, or a method of your own; without it the best that "
        "the family allows.",
        json_schema_extra=_group("How to compose", "METHOD"),
    )
    budget: str | None = Field(
        None,
        description="How layers share what is kept: measured (by what each width of each layer costs; the default with "
        "calibration), uniform, half, deep or full (the paper's: some layers, all alike), or a file that `profile` "
        "wrote, or a list of widths.",
        json_schema_extra=_group("What to keep", "NAME|FILE"),
    )
    width_multiple: int | None = Field(
        None,
        ge=1,
        description="With a measured budget, cache multiples of this many channels (engines want 16 or 32).",
        json_schema_extra=_group("What to keep", "N"),
    )
    split: Literal["auto", "even"] = Field(
        "auto",
        description="How keys and values divide a layer's budget: as the error of the fitted layer says, or as in the "
        "source.",
        json_schema_extra=_group("What to keep"),
    )
    rotary_allocation: Literal["energy", "uniform", "shared"] = Field(
        "energy",
        description="How frequency keys allocate components to rotary pairs: by a layer's own energy, as many to each, "
        "or by energy alike in all layers (stock exports need one of the last two).",
        json_schema_extra=_group("How to compose"),
    )
    prune_by: Literal["pivot", "contribution"] = Field(
        "pivot",
        description="How prune chooses the heads to keep: by what they explain of the others, or by what they send.",
        json_schema_extra=_group("How to compose"),
    )
    fit: Fit = Field(
        "aligned",
        description="Data the fit uses: weights (the paper's), activations, or activations after aligning heads.",
        json_schema_extra=_group("How to compose"),
    )
    refine: int | None = Field(
        None,
        ge=0,
        description="Steps of a layer's refinement, 0 for none; by default as --effort says with --fit aligned.",
        json_schema_extra=_group("How to compose", "STEPS"),
    )
    effort: Literal["fast", "balanced", "best"] = Field(
        "balanced",
        description="How long to fit and to heal: the closed form alone; refined (layers of fewer than 512 channels) "
        "and 240 steps of healing; or all layers refined for three times as long and 960 steps.",
        json_schema_extra=_group("How to compose"),
    )
    time_limit: float | None = Field(
        None,
        gt=0,
        description="Minutes for all of it: healing, refinement, calibration text and the measuring of a budget are "
        "shortened or left out so that it ends in them; results then depend on the machine.",
        json_schema_extra=_group("How to compose", "MINUTES"),
    )
    heal: Heal = Field(
        "auto",
        description="Steps of distillation from the source after the fit, end to end, 0 for none; auto: as --effort "
        "says, where both fit in memory together. In a recipe also the settings of heal, for `run`.",
        json_schema_extra=_group("How to compose", "STEPS"),
    )
    text: Texts | None = Field(
        None,
        description=f"Calibration text ({_TEXT_HELP}); without it text is sampled from the model.",
        json_schema_extra=_group("Calibration", "FILE"),
    )
    bos: Bos = Field("auto", description=f"{_BOS_HELP}.", json_schema_extra=_group("Calibration"))
    sequence_length: int | None = Field(
        None, ge=2, description="Tokens in a calibration sequence.", json_schema_extra=_group("Calibration", "N")
    )
    sequences: int | None = Field(
        None, ge=1, description="Number of calibration sequences.", json_schema_extra=_group("Calibration", "N")
    )
    statistics: Literal["original", "sequential"] = Field(
        "original",
        description="A layer's inputs: as in the original model, or as the already compressed layers send them.",
        json_schema_extra=_group("Calibration"),
    )
    shard_size: str = Field(
        "5GB",
        description="Largest weight file to write, as 500MB or 5GB; smaller ones stay as in the source.",
        json_schema_extra=_group("Output", "SIZE"),
    )
    dtype: DType | None = Field(
        None,
        description="Data type of the weights written; the source's own without it.",
        json_schema_extra=_group("Output"),
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="Seed of everything random; same seed, same bytes.",
        json_schema_extra=_group("Run", "N"),
    )
    device: str = Field(
        "auto", pattern=_DEVICE, description="auto, cpu, cuda, cuda:N or mps.", json_schema_extra=_group("Run", "D")
    )

    evaluate: EvaluateRecipe | None = Field(None, description="Measure against the source at the end (for `run`).")

    @model_validator(mode="before")
    @classmethod
    def _take_former_names(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        # Where both are given, the former one stays and is an unknown key.
        names = {name: FORMER_NAMES.get(name, name) for name in values}
        return {name if names[name] in values else names[name]: value for name, value in values.items()}

    @field_validator("key_composition", "value_composition", mode="before")
    @classmethod
    def _method_known(cls, value: object, info: ValidationInfo) -> object:
        if value is None:
            return None
        if not isinstance(value, str | dict):
            raise ValueError(f"should be the name of a method, or a mapping with the key method, not {value!r}")
        if isinstance(value, dict) and not all(isinstance(item, str | int | float) for item in value.values()):
            raise ValueError(f"should map the options of a method to single values, not {value!r}")
        try:
            check_choice(value, str(info.field_name).removesuffix("_composition"))
        except RequestError as error:
            raise ValueError(f"cannot be used: {error}") from None
        return value

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_as_text(cls, value: object) -> object:
        return _numbers_as_text(value)

    @field_validator("layers")
    @classmethod
    def _layers_readable(cls, value: str) -> str:
        if value not in ("all", "half", "deep"):
            _parse_layers(value)
        return value

    @field_validator("budget")
    @classmethod
    def _budget_known(cls, value: str | None) -> str | None:
        if value is not None and value not in _BUDGETS and not Path(value).is_file():
            near = difflib.get_close_matches(value, _BUDGETS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"kinds are {', '.join(_BUDGETS)}"
            raise ValueError(f"is no kind of budget and no file: {value!r}; {hint}")
        return value

    @field_validator("shard_size")
    @classmethod
    def _size_readable(cls, value: str) -> str:
        parse_size(value)
        return value

    @property
    def shard_bytes(self) -> int:
        """`shard_size` in bytes."""
        return parse_size(self.shard_size)

    @property
    def says_how_much(self) -> bool:
        """Whether it says how much of the cache to keep."""
        return any(value is not None for value in (self.kv_ratio, self.key_components, self.value_components))

    @property
    def healing_settings(self) -> HealRecipe | None:
        """How `run` heals what was written, None where `heal` says nothing of it."""
        return self.heal if isinstance(self.heal, HealRecipe) else None


def budget_file(recipe: Recipe) -> Path | None:
    """Return the file that a recipe's budget names, None where it names a kind of budget."""
    return None if recipe.budget is None or recipe.budget in _BUDGETS else Path(recipe.budget)


def parse_size(text: str) -> int:
    """Bytes of a size as people write it.

    Args:
        text: A number with an optional unit: `500MB` (powers of 1000), `2GiB` (powers of 1024), `1000000`.

    Returns:
        The size in bytes, at least 1.

    Raises:
        ValueError: The text is no size.
    """
    match = _SIZE.match(text.strip())
    size = 0
    if match:
        base = 1024 if match[3] else 1000
        size = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
    if size < 1:
        raise ValueError(f"should be a size such as 500MB or 5GB, not {text!r}")
    return size


def parse_counts(text: str) -> tuple[int, ...]:
    """Return the whole numbers of a list such as `1024,8192`."""
    return tuple(int(number) for number in text.split(","))


def parse_names(text: str) -> tuple[str, ...]:
    """Return the names of a list such as `arc_easy,piqa`."""
    return tuple(name for name in (part.strip() for part in text.split(",")) if name)


def _parse_layers(spec: str) -> list[tuple[int, int | None]]:
    """Closed ranges of a layer list; None stands for the last layer."""
    ranges: list[tuple[int, int | None]] = []
    for item in spec.split(","):
        match = _LAYER_ITEM.match(item.strip())
        if not match:
            raise ValueError(f"should be all, half, deep or a list such as 0,2,4-7,20-, not {spec!r}")
        first = int(match[1])
        last = (int(match[3]) if match[3] else None) if match[2] else first
        if last is not None and last < first:
            raise ValueError(f"has a range that runs backwards: {item.strip()!r}")
        ranges.append((first, last))
    return ranges


def select_layers(spec: str, number_of_layers: int) -> tuple[int, ...]:
    """The layers that a specification means in a model of a given depth.

    `half` and `deep` are the settings of arXiv 2601.19611 scaled from its 48 layers: with n layers, `half` is n // 2
    layers (at least one) from round(11 n / 48) on (11-34 of 48), `deep` is all but the first round(3 n / 48), which is
    at least one; one layer always remains.

    Args:
        spec: `all`, `half`, `deep`, or 0-based layers and closed ranges: `11-34`, `0,2,4-7`, `3-` (to the last).
        number_of_layers: Depth of the model.

    Returns:
        Layer indices in ascending order, each once.

    Raises:
        RequestError: The specification cannot be read, or reaches past the last layer.
    """
    depth = number_of_layers
    if spec == "all":
        return tuple(range(depth))
    if spec == "half":
        first = round(11 * depth / 48)
        return tuple(range(first, first + max(1, depth // 2)))
    if spec == "deep":
        return tuple(range(min(max(1, round(3 * depth / 48)), depth - 1), depth))
    try:
        ranges = _parse_layers(spec)
    except ValueError as error:
        raise RequestError(f"`layers` {error}") from None
    chosen: set[int] = set()
    for first, last in ranges:
        highest = first if last is None else last
        if highest >= depth:
            raise RequestError(
                f"`layers` {spec} names layer {highest}, but the model has {depth}: choose from 0 to {depth - 1}"
            )
        chosen.update(range(first, (depth - 1 if last is None else last) + 1))
    return tuple(sorted(chosen))


def given_settings(settings: BaseModel) -> dict[str, Any]:
    """Return the settings that are set, by name; the defaults of the others stay where the work is done."""
    values = {name: value for name, value in settings if value is not None}
    values |= {name: parse_counts(values[name]) for name in ("contexts", "batches", "retrieval") if name in values}
    return values | ({"tasks": parse_names(values["tasks"])} if "tasks" in values else {})


def from_flags(settings: type[S], flags: Mapping[str, Any]) -> S:
    """Settings of a kind from flags alone, by field name; None means "not given".

    Raises:
        RequestError: A value is impossible, or one that must be given is not.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    return validated(settings, given, "the request", given)


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to the same settings.

    Unset fields are left out, and so are `source` and `out`: they say where, not what, and the same work in another
    directory should give the same bytes.
    """
    values = recipe.model_dump(mode="json", exclude_none=True, exclude={"source", "out"})
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def compression_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that `compress` works by, as plain data: those of the steps that `run` takes after it are left out.

    They may change between an interrupted run and the one that takes it up again.
    """
    later = {"description", "source", "out", "evaluate"}
    values = recipe.model_dump(mode="json", exclude_none=True, exclude=later)
    return values if recipe.healing_settings is None else values | {"heal": "0"}


def validated(
    settings: type[S],
    values: Mapping[str, Any],
    where: str,
    flags: Collection[str] = (),
    origins: Mapping[str, str] | None = None,
) -> S:
    """Return settings from plain values.

    Args:
        settings: Which.
        values: By field name.
        where: What holds the values, for messages.
        flags: Names of fields that were given as parameters; those of a section with its name and a dot in front.
        origins: What holds a value instead, by the same names.

    Raises:
        RequestError: A key is unknown, or a value of the wrong type or impossible.
    """
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise RequestError(_explain(error, where, flags, origins or {})) from None


def _explain(error: ValidationError, where: str, flags: Collection[str], origins: Mapping[str, str]) -> str:
    """The first validation error in one sentence that names the flag or the key."""
    first = error.errors(include_url=False)[0]
    keys = [str(part) for part in first["loc"] if not str(part).startswith("<")]
    name = ".".join(keys)
    names = [".".join(keys[:count]) for count in range(len(keys), 0, -1)]
    where = next((origins[key] for key in names if key in origins), where)
    if first["type"] == "extra_forbidden":
        return f"{where} has an unknown key {name}: {field_hint(keys)}"
    flag = next((key for key in names if key in flags), None)
    label = f"`{flag}`" if flag else f"{name} in {where}" if keys else where
    if first["type"] == "missing":
        return f"{label} is missing: add it"
    if first["type"] == "string_pattern_mismatch":
        device = first["ctx"]["pattern"] == _DEVICE
        wanted = "auto, cpu, cuda, cuda:N or mps" if device else "whole numbers such as 8192 or 1024,8192"
        return f"{label} should be {wanted}, not {first['input']!r}"
    if first["type"] == "value_error":
        return f"{label} {first['ctx']['error']}"
    if first["type"].endswith("_type") and first["type"] in ("model_type", "model_attributes_type"):
        return f"{label} should hold settings of its own, such as {', '.join(_nested_fields(keys))}"
    expectation = first["msg"].removeprefix("Input ").replace("valid integer", "whole number").replace("valid ", "")
    return f"{label} {expectation}, not {first['input']!r}"


def field_hint(keys: list[str]) -> str:
    """Return which field may have been meant by keys that lead to none."""
    fields = _nested_fields(keys[:-1])
    known = fields if keys[1:] else [*fields, EXTENDS]
    near = difflib.get_close_matches(keys[-1].replace("-", "_").lower(), known, n=1, cutoff=0.5)
    prefix = "".join(f"{key}." for key in keys[:-1])
    return f"did you mean {prefix}{near[0]}?" if near else f"known keys are {', '.join(fields)}"


def _nested_fields(keys: list[str]) -> list[str]:
    """Names of the fields of the settings that a path of keys leads to."""
    model: type[BaseModel] = Recipe
    for key in keys:
        (model,) = settings_in(model.model_fields[key].annotation)
    return list(model.model_fields)


def settings_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings among the types of a field's value."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [settings for part in get_args(annotation) for settings in settings_in(part)]


def value_type(annotation: Any) -> Any:
    """The type of a field's value: `X` of `X | None`, without annotations around it."""
    if get_origin(annotation) is Annotated:
        return value_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return value_type(next(part for part in get_args(annotation) if part is not type(None)))
    return annotation
