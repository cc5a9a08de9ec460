"""Healing: end-to-end distillation of a compressed checkpoint from its original.

The loss is KL(original ‖ compressed) of the next-token distributions, in nats per token, averaged over tokens. Only the
attention blocks are trained by default: the components, their compositions, q_proj and o_proj are what compression
changed.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from mea_compress.architectures.families import language_settings
from mea_compress.checkpoint import (
    CheckpointReader,
    NewTensor,
    as_array,
    dtype_name,
    write_checkpoint,
)
from mea_compress.checkpoint.hub import is_hub_id, local_directory
from mea_compress.checkpoint.workspace import Workspace, open_workspace, remove_partial, unfinished_result
from mea_compress.decoding import check_decoding
from mea_compress.emit.directory import fingerprint, versions
from mea_compress.emit.healed import names_in_model, publish_healed, stored_dtypes
from mea_compress.emit.verification import TOLERANCE as DECODING_TOLERANCE
from mea_compress.errors import RequestError
from mea_compress.layers.runner import fast_products, reading_dtype
from mea_compress.loading import (
    check_ids,
    choose_sequence_length,
    load_model,
    load_tokenizer,
    training_device,
    vocabulary_size,
)
from mea_compress.measure.metrics import check_same_vocabulary
from mea_compress.processes import from_first_process, is_first_process, join_processes, process_count
from mea_compress.report.showing import Shown
from mea_compress.report.tables import key_value_table
from mea_compress.text.answers import answer_sequences
from mea_compress.text.documents import Documents
from mea_compress.text.kept_samples import kept_samples, tokenizer_digest
from mea_compress.text.reading import TextChoice, read_documents, text_state
from mea_compress.text.sampling import sample_sequences
from mea_compress.text.sequences import Bos, sequence_prefix, token_sequences
from mea_compress.training.distillation import distil, measure
from mea_compress.training.settings import DistillationSettings
from mea_compress.training.sharding import all_processes, gathered, in_turns, shard, sharding_asked_for
from mea_compress.training.stages import Stages, parse_stages
from mea_compress.training.step_bar import step_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLED_TEXT = "sampled from the teacher"
"""What ``healing.json`` calls the text where none was given."""
_SAMPLED = 1024  # sequences
_MOST_PASSES = 4  # over sampled text; from the second on, what is learnt is more and more that text alone
_MAX_HELD_OUT = 64
# Decoded with a cache and without before the healed checkpoint appears.
_PROMPT_TOKENS, _DECODED_TOKENS = 16, 8
_FINISHED = ("healed", "record")  # of the workspace: what was done, from shortly before the checkpoint is in place
# Stages that an earlier healing's step size serves: adapters begin at nothing, and compositions are few.
_SINGLE_RATE = (("attention",), ("all",))
_ROUGH_TOLERANCE = 0.1  # of bfloat16, whose logits differ by a hundredth or two


@dataclass(frozen=True)
class HealingStage:
    """One stage of a healing.

    Attributes:
        train: What learnt; see `STAGES`.
        steps: Optimiser steps.
        relative_rate: Peak as a share of each weight's root mean square, where it was found by trials.
        all_steps: Optimiser steps, those of trials among them.
        trial_rate: The same share, that would have been best in a trial.
    """

    train: str
    steps: int
    relative_rate: float | None
    all_steps: int
    trial_rate: float | None = None


@dataclass(frozen=True, repr=False)
class HealingResult(Shown):
    """What healing did; losses in nats per token on sequences held out from training.

    Attributes:
        out: The healed checkpoint.
        steps: Optimiser steps.
        tokens: Tokens trained on, those of trials among them.
        learning_rate: Peak, where one was given.
        relative_rate: Peak as a share of each weight's root mean square, where it was found by trials; of the last
            stage.
        train: The stages.
        text: Names of the texts, or that text was sampled.
        seed: Of sampling and of the order of sequences.
        trained_parameters: Numbers that were free to change, in the stage with the most.
        held_out_tokens: Predictions that losses are averaged over.
        kl_before: KL(original ‖ compressed) before healing.
        kl_after: The same of the weights kept.
        cross_entropy_before: Cross-entropy before healing.
        cross_entropy_after: The same of the weights kept.
        curve: KL on some of the held-out text by optimiser step.
        kept: ``unhealed`` where training did not lower the KL.
        seconds: Time it all took.
        prefix_ids: Ids in front of every sequence.
        answers_only: Whether only what answers predict counted, in training and in the losses above.
        stages: What was done, stage by stage.
        losses: The loss of what was trained on by optimiser step, trials left out.
        trial_rate: As `relative_rate`, that would have been best in a trial: what a healing of the result begins with.
    """

    out: Path
    steps: int
    tokens: int
    learning_rate: float | None
    relative_rate: float | None
    train: str
    text: str
    seed: int
    trained_parameters: int
    held_out_tokens: int
    kl_before: float
    kl_after: float
    cross_entropy_before: float
    cross_entropy_after: float
    curve: tuple[tuple[int, float], ...]
    kept: Literal["healed", "unhealed"]
    seconds: float
    prefix_ids: tuple[int, ...] = ()
    answers_only: bool = False
    stages: tuple[HealingStage, ...] = ()
    losses: tuple[float, ...] = ()
    trial_rate: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data, as in ``healing.json``."""
        return asdict(self) | {"out": str(self.out)}

    def report(self) -> str:
        """Return what people read."""
        shown = {
            name: value
            for name, value in self.to_json().items()
            if value is not None and name not in ("curve", "losses", "stages")
        }
        return key_value_table(shown)


@dataclass(frozen=True)
class _Request:
    """What is healed, by what, and how: the arguments of `heal`, looked at."""

    student: Path
    names: dict[str, str]
    teacher: Path
    out: Path
    documents: Documents | None
    answers_only: bool
    settings: DistillationSettings
    sequence_length: int | None
    bos: Bos
    stages: tuple[str, ...]
    target: torch.device
    sharded: bool
    progress: bool


def _check_places(student: Path, teacher: Path, out: Path) -> None:
    if student == teacher:
        raise RequestError(f"{student} cannot be its own teacher: give the original as `teacher`")
    if out != student and (out.exists() or out.is_symlink()):
        raise RequestError(f"{out} exists already: remove it, or choose another place")
    if (
        teacher == out
        or teacher in out.parents
        or out in teacher.parents
        or (out != student and student in out.parents)
    ):
        raise RequestError(f"{out} lies in a checkpoint that is read: choose another place")


def _sequences(
    asked: _Request, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int
) -> dict[str, torch.Tensor]:
    """Return sequences to train on and sequences held out, ids (N, length) of each, N at least one.

    They are ``training`` and ``held_out``. Where only answers count there are also ``training_answers`` and
    ``held_out_answers``, bool of the same shapes; see `answer_sequences`.

    Args:
        asked: Where they come from, documents or the teacher, and for how many steps; sampled are so many at most.
        teacher: The original, loaded.
        tokenizer: Makes ids of the text.
        length: Tokens of a sequence.
    """
    documents, seed, bos, answers = asked.documents, asked.settings.seed, asked.bos, None
    trained = asked.settings.steps * asked.settings.batch_size
    if documents is not None:
        limit = trained + _MAX_HELD_OUT
        if asked.answers_only:
            ids, answers = answer_sequences(documents, tokenizer, length, limit=limit, seed=seed, bos=bos)
        else:
            ids = token_sequences(documents, tokenizer, length, limit=limit, seed=seed, bos=bos)
        if len(ids) < 2:
            raise RequestError(
                f"{documents.name} fills one sequence of {length} tokens, and healing holds one out: "
                "give more text, or a smaller `sequence_length`"
            )
    else:
        count = min(trained, max(_SAMPLED, math.ceil(trained / _MOST_PASSES)))
        count += max(2, min(_MAX_HELD_OUT, count // 8))
        reader = CheckpointReader(asked.teacher)
        what = {
            "model": fingerprint(reader, reader.config()),
            "tokenizer": tokenizer_digest(tokenizer),  # the student's own
            "shape": [count, length],
            "seed": seed,
            "bos": bos,
            "device": teacher.device.type,
            "versions": versions(),
        }
        ids = kept_samples(
            what, lambda: sample_sequences(teacher, tokenizer, count, length, seed, bos=bos, progress=asked.progress)
        )
    held_out = max(1, min(_MAX_HELD_OUT, len(ids) // 9))
    made = {"training": ids[:-held_out], "held_out": ids[-held_out:]}
    if answers is not None:
        made |= {"training_answers": answers[:-held_out], "held_out_answers": answers[-held_out:]}
    return made


def heal(
    checkpoint: Path | str,
    *,
    teacher: Path | str,
    text: TextChoice | None = None,
    steps: int = 200,
    out: Path | str | None = None,
    learning_rate: float | None = None,
    batch_size: int = 16,
    sequence_length: int | None = None,
    seed: int = 0,
    bos: Bos = "auto",
    device: str = "auto",
    progress: bool = True,
    train: str | Sequence[str] = "attention",
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    gradient_checkpointing: bool = False,
    answers_only: bool = False,
    top_logits: int | None = None,
    match_hidden: float | None = None,
    match_attention: float = 0.0,
    resume: bool = False,
) -> HealingResult:
    """Distil a compressed checkpoint from its original, and keep the better of before and after.

    AdamW without weight decay on float32 masters, KL(teacher ‖ student) per token, a short warm-up and a cosine to a
    twentieth; products are bfloat16 where the student is stored so and the hardware is made for it. A tenth of the
    sequences (64 at most) is held out: the step size and the weights are those that do best there, and the healed
    weights, rounded to the dtype they are stored in, are kept only where they lower the KL there. See `distil`. A
    checkpoint that says how it was healed before, in no more steps, is healed at the step size that was chosen then.

    How far it has come is kept beside `out`, in a directory with ``.partial`` behind its name, until it is through.
    Started by ``torchrun`` or ``accelerate launch``, several processes share the sequences of every step; where the
    launcher asks for FSDP2, both models are sharded over them, see `mea_compress.training.sharding`.

    Args:
        checkpoint: Directory of the compressed checkpoint, the student, or its hub id; then `out` says where to.
        teacher: Directory or hub id of the original; never written to.
        text: One text or several, as `read_documents` takes them; None samples the text from the teacher.
        steps: Optimiser steps.
        out: Directory of the healed checkpoint, which must not exist; None puts it in the student's place.
            Either way it appears complete or not at all.
        learning_rate: Peak, the same for all weights; None tries some in short runs, relative to each weight's size.
        batch_size: Sequences in a step.
        sequence_length: Tokens of a sequence; None takes the model's context, at most 1024.
        seed: Of sampling, of the places that are read in large files, and of the order of sequences.
        bos: What stands in front of every sequence; see `sequence_prefix`.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        progress: Show bars on stderr.
        train: What learns, one of `STAGES` or several, which then follow one another with equal shares of the steps:
            ``compositions``, ``components`` (these and k_proj and v_proj), ``attention`` (the whole of it), ``lora``
            (attention, and adapters of peft on all other linear maps, which are merged in the end), ``all`` weights.
        temperature: Divides the logits of both models.
        cross_entropy: Share of the text's own cross-entropy in the loss, 0 to 1; KL from the original is the rest.
        gradient_checkpointing: Less memory for a second run of each layer in every step.
        answers_only: The text is conversations, and only what their answers predict counts; see `answer_sequences`.
        top_logits: Tokens of the teacher, the likeliest, that the loss tells apart; all others count as one, and only
            a slice of the vocabulary is in memory. None tells all apart.
        match_hidden: Weight of the error of the layers' outputs in the loss, each token relative to its own size, when
            a run begins; it falls as the step size does. None takes 30 where both models tell these outputs, less the
            share of `cross_entropy`.
        match_attention: Weight of the error of the attention blocks' outputs in the loss, measured and falling alike.
        resume: Go on where an interrupted run of the same request stopped.

    Returns:
        What was done, as in ``healing.json`` in the directory of the weights.

    Raises:
        RequestError: A path is wrong or in the way, the teacher is another model, the text is too short, a number
            makes no sense, or there is something to take up and `resume` is off.

    Example:
        >>> result = heal("HALF", teacher="SRC", out="HEALED", text="held-out.txt", steps=2, progress=False)
        >>> result.kl_after <= result.kl_before
        True
    """
    began = time.monotonic()
    if out is None and is_hub_id(checkpoint):
        raise RequestError(f"{checkpoint} lies on the hub and cannot be replaced there: give `out`")
    student, teacher = local_directory(checkpoint).resolve(), local_directory(teacher).resolve()
    out = student if out is None else Path(os.path.abspath(out))
    stages = check_settings(
        vocabulary=language_settings(CheckpointReader(student).config()).get("vocab_size"),
        text=text,
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        train=train,
        temperature=temperature,
        cross_entropy=cross_entropy,
        answers_only=answers_only,
        top_logits=top_logits,
        match_hidden=match_hidden,
        match_attention=match_attention,
    )
    _check_models(student, teacher)
    with sharding_asked_for() as sharded:
        _check_sharded(sharded, text, stages)
        target = join_processes(training_device(device))
        if finished := from_first_process(take_finished(out) if resume and is_first_process() else None):
            return _from_record(out, finished)
        _check_places(student, teacher, out)
        progress = progress and is_first_process()
        documents = None if text is None else read_documents(text)
        settings = DistillationSettings(
            steps,
            batch_size,
            learning_rate,
            seed=seed,
            temperature=temperature,
            cross_entropy=cross_entropy,
            gradient_checkpointing=gradient_checkpointing,
            top_logits=top_logits,
            match_hidden=match_hidden,
            match_attention=match_attention,
        )
        former = _former_healing(student) if learning_rate is None and stages in _SINGLE_RATE else None
        if former is not None and former[1] <= steps:
            settings = replace(settings, trial_rate=former[0])
        request = asdict(settings) | {
            "products": None,
            "train": stages,
            "sequence_length": sequence_length,
            "bos": bos,
            "answers_only": answers_only,
            "sharded": sharded,
        }
        states = {
            "the checkpoint": fingerprint(CheckpointReader(student), CheckpointReader(student).config()),
            "the teacher": fingerprint(CheckpointReader(teacher), CheckpointReader(teacher).config()),
            "the request": json.loads(json.dumps(request)),
            "the text": None if text is None else text_state(text),
            "a library version": versions(),
        }
        with _state(out, states, resume) as state:
            names = names_in_model(CheckpointReader(student))
            asked = _Request(
                student,
                names,
                teacher,
                out,
                documents,
                answers_only,
                settings,
                sequence_length,
                bos,
                stages,
                target,
                sharded,
                progress,
            )
            result, changed = _healed(asked, state, began)
            if is_first_process():
                record = json.loads(json.dumps({k: value for k, value in result.to_json().items() if k != "out"}))
                assert state is not None
                state.commit(*_FINISHED, record)
                publish_healed(CheckpointReader(student), out, names, changed, record)
            from_first_process(None)  # the others return when it is there
    return result


def _former_healing(checkpoint: Path) -> tuple[float, int] | None:
    """Return the step size that trials of the last healing that helped a checkpoint found, and its steps, or None."""
    for name, place in (("healing.json", ()), ("compression.json", ("fidelity", "healing"))):
        try:
            record = json.loads((checkpoint / name).read_text(encoding="utf-8"))
            for key in place:
                record = record[key]
            stages = tuple(record.get("train", "attention").split(","))  # `compress` trains nothing else
            if record["kept"] == "healed" and record["trial_rate"] and stages in _SINGLE_RATE:
                return float(record["trial_rate"]), int(record["steps"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def take_finished(out: Path) -> dict[str, Any] | None:
    """Return what a run did that was stopped when its checkpoint was in place, and remove what it left; None if none.

    Raises:
        RequestError: Another process is at work there.
    """
    record = unfinished_result(out, *_FINISHED)
    try:
        there = json.loads((out / "healing.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if record is None or {name: there.get(name) for name in record} != record:
        return None
    remove_partial(out)
    return record


def _from_record(out: Path, record: Mapping[str, Any]) -> HealingResult:
    """Return the result that `HealingResult.to_json` was made of."""
    lists = {name: tuple(value) for name, value in record.items() if isinstance(value, list)}
    lists["stages"] = tuple(HealingStage(**stage) for stage in record["stages"])
    lists["curve"] = tuple((step, value) for step, value in record["curve"])
    return HealingResult(out=out, **{**record, **lists})


def check_settings(
    *,
    vocabulary: int | None = None,
    text: TextChoice | None = None,
    steps: int = 200,
    learning_rate: float | None = None,
    batch_size: int = 16,
    train: str | Sequence[str] = "attention",
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    answers_only: bool = False,
    top_logits: int | None = None,
    match_hidden: float | None = None,
    match_attention: float = 0.0,
    **_: Any,
) -> tuple[str, ...]:
    """Check what can be checked of the settings of `heal` while no model is loaded, and return the stages.

    Others of its settings may be given too, and are not looked at. The vocabulary is the number of tokens that the
    models predict, None where that is not known.

    Raises:
        RequestError: A number makes no sense, settings do not go together, or a stage is unknown or needs peft, which
            is not installed.
    """
    if steps < 1 or batch_size < 1:
        raise RequestError(f"`steps` {steps} with `batch_size` {batch_size} trains nothing: give 1 or more of each")
    count = process_count()
    if batch_size % count:
        raise RequestError(
            f"`batch_size` {batch_size} cannot be shared out to {count} processes: give a multiple of {count}"
        )
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise RequestError(f"`learning_rate` {learning_rate} is not a positive number: give one such as 1e-4")
    if not 0 < temperature < math.inf:
        raise RequestError(f"`temperature` {temperature} is not a positive number: give one such as 2")
    if not 0 <= cross_entropy <= 1:
        raise RequestError(f"`cross_entropy` {cross_entropy} is no share of the loss: give 0 to 1")
    stages = parse_stages(train)
    if steps < len(stages):
        raise RequestError(f"`steps` {steps} cannot be shared out to {len(stages)} stages of `train`: give more steps")
    for name, weight in (("match_hidden", match_hidden or 0.0), ("match_attention", match_attention)):
        if not 0 <= weight < math.inf:
            raise RequestError(f"`{name}` {weight} is no weight: give 0 or more")
    if top_logits is not None and not 0 < top_logits < (vocabulary or math.inf):
        raise RequestError(
            f"`top_logits` {top_logits} are no part of a vocabulary of {vocabulary}: give fewer, such as 256, or none"
        )
    if answers_only and text is None:
        raise RequestError("`answers_only` needs conversations, and there is no text: give some as `text`")
    return stages


@contextmanager
def _state(out: Path, states: dict[str, Any], resume: bool) -> Iterator[Workspace | None]:
    """Open the directory beside `out` that keeps how far healing has come; of several processes the first has it.

    It is removed when the block is through, and after an error.
    """
    if not is_first_process():
        yield None
        return
    with open_workspace(out, states, resume) as workspace:
        yield workspace
        workspace.discard()


def _check_sharded(sharded: bool, text: TextChoice | None, stages: tuple[str, ...]) -> None:
    """Check that what is asked for can be done with models of which no process has all.

    Raises:
        RequestError: It cannot.
    """
    if sharded and text is None:
        raise RequestError("a sharded original samples no text: give `text`")
    if sharded and "lora" in stages:
        raise RequestError("adapters are not sharded: leave lora out of `train`, or --use_fsdp out of the launcher")


def _check_models(student: Path, teacher: Path) -> None:
    """Check, from their configurations, that a teacher may be what a student was made from.

    Raises:
        RequestError: They differ in family, depth, hidden size or vocabulary.
    """
    configs = [CheckpointReader(path).config() for path in (student, teacher)]
    if configs[0].get("quantization_config") is not None:
        raise RequestError(
            f"{student} stores quantised weights, which are not trained: compress an unquantised original"
        )
    families = [str(config.get("model_type", "")).removeprefix("mea_") for config in configs]
    told = {
        "num_hidden_layers": "layers",
        "hidden_size": "channels",
        "vocab_size": "tokens in its vocabulary",
    }
    for key, what in told.items():
        own, other = (language_settings(config).get(key) for config in configs)
        if own != other:
            raise RequestError(
                f"{teacher} has {other} {what} and {student} {own}: give the original it was made from as `teacher`"
            )
    if families[0] not in (families[1], "llama"):  # which other families are exported as
        raise RequestError(
            f"{teacher} is a {families[1]} and {student} a {families[0]}: give the original it was made from as "
            "`teacher`"
        )


def _loaded(asked: _Request) -> tuple[PreTrainedModel, PreTrainedModel, torch.dtype]:
    """Return the student, to be trained in float32, its teacher, frozen, and the dtype of their products."""
    mesh = all_processes(asked.target) if asked.sharded else None

    def load(checkpoint: Path) -> tuple[PreTrainedModel, torch.dtype]:
        model = load_model(checkpoint, None, asked.target if mesh is None else "cpu")
        products = fast_products(model.dtype, asked.target)
        if mesh is not None:
            shard(model, mesh, products)
        return model, products

    teacher, _ = load(asked.teacher) if mesh is None else in_turns(partial(load, asked.teacher))
    model, products = load(asked.student) if mesh is None else in_turns(partial(load, asked.student))
    teacher.requires_grad_(False)
    if mesh is None:
        original: Any = teacher
        wanted = reading_dtype(original.dtype, asked.target)
        if wanted != original.dtype and getattr(original.config, "quantization_config", None) is None:
            # Wider: to the same dtype it would round tables that are kept in float32.
            teacher = original.to(wanted)
    return model if model.dtype == torch.float64 else model.float(), teacher, products


@dataclass
class _Course:
    """What is known of the stages that were trained, and the course of all of them together."""

    stages: list[HealingStage] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: int = 0


def _train(
    asked: _Request,
    settings: DistillationSettings,
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    training_of: Stages,
    sequences: Mapping[str, torch.Tensor],
    place: Path | None,
) -> _Course:
    """Train one stage after the other, each for its share of all steps.

    Args:
        asked: For its stages, whether models are sharded, and whether progress is shown.
        settings: Of all steps.
        model: The student, in place.
        teacher: Its original.
        training_of: What each stage trains of the student.
        sequences: Training and held-out ones, and which of their tokens count where not all do.
        place: Directory for what is kept of each stage; None keeps nothing.
    """
    answers = sequences.get("held_out_answers")
    counted = None if answers is None else (sequences["training_answers"], answers)
    shares = [settings.steps // len(asked.stages)] * len(asked.stages)
    shares[-1] += settings.steps % len(asked.stages)
    parts = [replace(settings, steps=share) for share in shares]
    course = _Course()
    with step_bar(sum(part.all_steps for part in parts), asked.progress) as bar:
        for index, (stage, part) in enumerate(zip(asked.stages, parts, strict=True)):
            if model.dtype != torch.float64:
                model.float()  # what was frozen before may learn now
            training_of.begin(stage)
            if not asked.sharded:
                training_of.share(teacher, settings.products)
            kept = place / f"training-{index}-{stage}" if place else None
            known = partial(bar.known, later=sum(one.all_steps for one in parts[index + 1 :]))
            texts = (sequences["training"], sequences["held_out"])
            distillation = distil(model, teacher, *texts, part, bar.tick, kept, counted, known)
            bar.through()
            first = sum(one.steps for one in course.stages)
            course.curve += [(first + step, value) for step, value in distillation.curve if step or not index]
            course.losses += distillation.losses
            course.tokens += distillation.tokens
            done = HealingStage(
                stage, distillation.steps, distillation.rate, distillation.all_steps, distillation.trial_rate
            )
            course.stages.append(done)
    return course


def _healed(asked: _Request, state: Workspace | None, began: float) -> tuple[HealingResult, dict[str, torch.Tensor]]:
    """Distil the student; return what was done, and its new weights by name, none where it did not help."""
    student, teacher, target = asked.student, asked.teacher, asked.target
    settings, stages = asked.settings, asked.stages
    model, teacher_model, products = _loaded(asked)
    check_same_vocabulary(model, teacher_model, (student, teacher))
    length = choose_sequence_length(teacher_model, asked.sequence_length)
    training_of = Stages(model, settings.seed)
    for stage in reversed(stages):  # all are looked at before anything is done, and the first one is begun with
        training_of.begin(stage)
    stored = stored_dtypes(CheckpointReader(student), asked.names)
    if missing := sorted(training_of.trained - stored.keys()):
        raise RequestError(
            f"{student} stores {missing[0]} under another name, so it cannot be trained: use attention for `train`"
        )
    tokenizer = load_tokenizer(student)
    prefix = sequence_prefix(tokenizer, asked.bos)
    sequences: dict[str, torch.Tensor] = {}
    if is_first_process():
        sequences = _stored_sequences(state, lambda: _sequences(asked, teacher_model, tokenizer, length))
        for name in ("training", "held_out"):
            check_ids(sequences[name], vocabulary_size(model), student)
    sequences = from_first_process(sequences)
    held_out, judged = sequences["held_out"], sequences.get("held_out_answers")
    settings = replace(settings, products=products)
    before = measure(model, teacher_model, held_out, products, judged)
    if math.isnan(before.kl):
        raise RequestError(f"the logits of {teacher} or {student} are not all numbers: look for NaN in their weights")
    place = from_first_process(None if state is None else state.work)
    course = _train(asked, settings, model, teacher_model, training_of, sequences, place)
    training_of.end()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in training_of.trained:
                parameter.copy_(parameter.to(stored[name]))
    after = measure(model, teacher_model, held_out, products, judged)
    better = after.kl < before.kl
    if model.dtype != torch.float64:
        model = model.float()
    prompt = held_out[:2, : min(_PROMPT_TOKENS, length - 1)].to(model.device)
    decoded = min(_DECODED_TOKENS, length - prompt.shape[1])
    if asked.sharded and products != torch.float32:  # weights are gathered as products take them
        with torch.autocast(target.type, products):
            check_decoding(model, prompt, decoded, _ROUGH_TOLERANCE)
    else:
        check_decoding(model, prompt, decoded, DECODING_TOLERANCE)

    result = HealingResult(
        out=asked.out,
        steps=settings.steps,
        tokens=course.tokens,
        learning_rate=settings.learning_rate,
        relative_rate=course.stages[-1].relative_rate,
        train=",".join(stages),
        text=SAMPLED_TEXT if asked.documents is None else asked.documents.title,
        seed=settings.seed,
        trained_parameters=training_of.largest,
        held_out_tokens=before.tokens,
        kl_before=before.kl / before.tokens,
        kl_after=(after if better else before).kl / before.tokens,
        cross_entropy_before=before.cross_entropy / before.tokens,
        cross_entropy_after=(after if better else before).cross_entropy / before.tokens,
        curve=tuple(course.curve),
        kept="healed" if better else "unhealed",
        seconds=round(time.monotonic() - began, 1),
        prefix_ids=prefix,
        answers_only=asked.answers_only,
        stages=tuple(course.stages),
        losses=tuple(course.losses),
        trial_rate=course.stages[-1].trial_rate,
    )
    if not better and is_first_process():
        print(
            f"healing did not help (KL {before.kl / before.tokens:.4g} → {after.kl / after.tokens:.4g} on held-out "
            "text), and the weights stay as they were: try a lower learning rate, or more steps",
            file=sys.stderr,
        )
    weights = model.state_dict()
    # Where all weights learn a tied weight may be stored under both of its names.
    names = stored if "all" in stages else sorted(training_of.trained)
    changed = {name: weights[name] for name in names if name in weights} if better else {}
    return result, gathered(changed) if asked.sharded else changed


def _stored_sequences(state: Workspace | None, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the sequences that `make` gives, kept so that a resumed run has the same."""
    assert state is not None
    directory = state.work / "text"
    if not state.result_of("text", "tokens"):
        arrays = {name: as_array(made) for name, made in make().items()}
        entries = [
            NewTensor(name, dtype_name(array.dtype), array.shape, partial(np.asarray, array))
            for name, array in arrays.items()
        ]
        write_checkpoint(directory, entries)
        state.commit("text", "tokens", len(arrays["training"]))
    reader = CheckpointReader(directory)
    return {name: reader.read(name) for name in reader.tensors}
