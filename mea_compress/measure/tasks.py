"""Tasks that people know: any of lm-evaluation-harness, or task files of one's own, on models already loaded."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mea_compress.errors import RequestError, first_line

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BATCH = 8
_BOOTSTRAPS = 1000

# What the harness calls the filter of metrics that have none.
_UNFILTERED = "none"


@dataclass(frozen=True)
class TaskScore:
    """One score of one task, or of a group of tasks.

    Attributes:
        task: Its name in the harness.
        metric: As the harness calls it, such as ``acc`` or ``acc_norm``; its filter in brackets where it has one.
        value: Accuracies are shares of 1.
        standard_error: Of `value` over examples, None where the harness has none.
        examples: Examples measured.
        few_shot: Solved examples in front of each.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    examples: int
    few_shot: int


def find_tasks(names: Sequence[str], task_dir: Path | str | None = None) -> TaskManager:
    """Return the harness's manager of tasks once it has loaded those named, with their data.

    Args:
        names: Tasks, groups or tags of lm-evaluation-harness.
        task_dir: Directory of task files (YAML) of one's own; their names win over the harness's.

    Raises:
        RequestError: The harness is not installed, the directory is not there, a name is unknown, or a task or its
            data cannot be loaded.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RequestError(
            f"`tasks` needs lm-evaluation-harness, which cannot be imported ({error}): "
            "install it with pip install 'mea-compress[eval]'"
        ) from error
    if not names:
        raise RequestError("`tasks` names no task: give some, such as arc_easy,piqa")
    if task_dir is not None and not Path(task_dir).is_dir():
        raise RequestError(f"`task_dir` {task_dir} is not a directory: give the one with the task files (*.yaml)")
    directory = None if task_dir is None else str(task_dir)
    # Finding the thousands of tasks that the harness brings takes seconds.
    manager = TaskManager(include_path=directory, include_defaults=directory is None)
    if directory is not None and not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=directory)
    for name in names:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]}?" if near else "`task_dir` adds task files of your own"
            raise RequestError(f"`tasks` {name} is no task of lm-evaluation-harness: {hint}")
        try:
            manager.load([name])
        except Exception as error:
            raise RequestError(
                f"the task {name} cannot be loaded ({first_line(error)}): its data set must be reachable on the hub or "
                "cached, or be files of your own with `task_dir`"
            ) from error
    return manager


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check, before any work, that a tokenizer has a chat template.

    Raises:
        RequestError: It has none.
    """
    if not tokenizer.chat_template:
        raise RequestError("the tokenizer has no chat template: leave `chat_template` out")


def measure_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    manager: TaskManager,
    *,
    limit: int | None = None,
    few_shot: int | None = None,
    batch_size: int | None = None,
    chat_template: bool = False,
) -> tuple[TaskScore, ...]:
    """Score a model on tasks. Log-likelihoods are taken in float32 whatever dtype the model runs in.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer; it is not changed.
        names: Of tasks that `manager` knows.
        manager: Of `find_tasks`.
        limit: The first so many examples of each task only.
        few_shot: Solved examples in front of each, the same for every model; None as each task says.
        batch_size: Sequences at once, 8 without it.
        chat_template: Put the tokenizer's chat template around every prompt.

    Raises:
        RequestError: The tokenizer has no chat template.

    Returns:
        Every score of every task, then of groups, in the harness's order.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if chat_template:
        check_chat_template(tokenizer)
    with _without_warnings():  # that a loaded model's device and dtype are its own
        wrapped = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # it gets a padding token
            backend="causal",
            batch_size=batch_size or _BATCH,
            softmax_dtype="float32",
        )
    results: Any = simple_evaluate(
        wrapped,
        tasks=list(names),
        task_manager=manager,
        limit=limit,
        num_fewshot=few_shot,
        apply_chat_template=chat_template,
        log_samples=False,
        bootstrap_iters=_BOOTSTRAPS,
        # The seeds of the process are not the harness's; which examples are shown has one of its own.
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    return tuple(_scores(results))


def _scores(results: dict[str, Any]) -> Iterator[TaskScore]:
    """Yield the scores among the harness's results: ``acc,none`` with ``acc_stderr,none`` beside it."""
    rows = {**results["results"], **results.get("groups", {})}
    for task, figures in rows.items():
        for key, value in figures.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            yield TaskScore(
                task=task,
                metric=metric if kind == _UNFILTERED else f"{metric} ({kind})",
                value=float(value),
                standard_error=float(error) if isinstance(error, int | float) else None,
                examples=_examples(task, results),
                few_shot=int(results["n-shot"].get(task, 0)),
            )


def _examples(task: str, results: dict[str, Any]) -> int:
    """Return the examples measured of a task, or of all tasks of a group."""
    if task in results["n-samples"]:
        return int(results["n-samples"][task]["effective"])
    return sum(_examples(child, results) for child in results.get("group_subtasks", {}).get(task, ()))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Put the harness's warnings aside inside the block."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


__all__ = ["TaskScore", "check_chat_template", "find_tasks", "measure_tasks"]
