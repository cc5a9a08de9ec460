"""Healing: end-to-end distillation of a compressed checkpoint from its original.

The loss is KL(original ‖ compressed) of the next-token distributions, in nats per token, averaged over tokens. Only the
attention blocks are trained by default: the components, their compositions, q_proj and o_proj are what compression
changed.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from mea_compress.checkpoint import (
    CheckpointReader,
    Entry,
    NewTensor,
    TensorInfo,
    as_array,
    dtype_name,
    torch_dtype,
    write_checkpoint,
    write_shard,
)
from mea_compress.checkpoint.files import copy_tree, refusals, replacing_directory, write_text
from mea_compress.checkpoint.layout import lay_out
from mea_compress.checkpoint.workspace import Workspace, open_workspace
from mea_compress.decoding import check_decoding
from mea_compress.distillation import DistillationSettings, distil, measure
from mea_compress.emit.code import carried_code, write_code
from mea_compress.emit.directory import fingerprint, versions
from mea_compress.emit.verification import TOLERANCE as DECODING_TOLERANCE
from mea_compress.errors import RequestError
from mea_compress.fit.refinement import kept_by_forms, mask_cross_group_gradients
from mea_compress.layers.runner import fast_products
from mea_compress.loading import (
    check_ids,
    choose_sequence_length,
    load_model,
    load_tokenizer,
    resolve_device,
    vocabulary_size,
)
from mea_compress.measure.metrics import check_same_vocabulary
from mea_compress.modeling.attention_mea import MeaAttention
from mea_compress.processes import from_first_process, is_first_process, join_processes
from mea_compress.report.showing import Shown
from mea_compress.report.tables import key_value_table
from mea_compress.text.documents import Documents
from mea_compress.text.reading import TextChoice, read_documents, text_state
from mea_compress.text.sampling import sample_sequences
from mea_compress.text.sequences import Bos, sequence_prefix, token_sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ATTENTION = re.compile(r"(^|\.)(self_attn|self_attention|attention|attn)\.")
_MAX_SAMPLED = 1024
_MAX_HELD_OUT = 64
# Decoded with a cache and without before the healed checkpoint appears.
_PROMPT_TOKENS, _DECODED_TOKENS = 16, 8


@dataclass(frozen=True, repr=False)
class HealingResult(Shown):
    """What healing did; losses in nats per token on sequences held out from training.

    Attributes:
        out: The healed checkpoint.
        steps: Optimiser steps.
        tokens: Tokens trained on, those of trials among them.
        learning_rate: Peak, where one was given.
        relative_rate: Peak as a share of each weight's root mean square, where it was found by trials.
        train: ``attention`` or ``all``.
        text: Names of the texts, or that text was sampled.
        seed: Of sampling and of the order of sequences.
        trained_parameters: Numbers that were free to change.
        held_out_tokens: Predictions that losses are averaged over.
        kl_before: KL(original ‖ compressed) before healing.
        kl_after: The same of the weights kept.
        cross_entropy_before: Cross-entropy before healing.
        cross_entropy_after: The same of the weights kept.
        curve: KL on some of the held-out text by optimiser step.
        kept: ``unhealed`` where training did not lower the KL.
        seconds: Time it all took.
        prefix_ids: Ids in front of every sequence.
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

    def to_json(self) -> dict[str, Any]:
        """Return plain data, as in ``healing.json``."""
        return asdict(self) | {"out": str(self.out)}

    def report(self) -> str:
        """Return what people read."""
        shown = {name: value for name, value in self.to_json().items() if value is not None and name != "curve"}
        return key_value_table(shown)


def _trainable(model: PreTrainedModel, train: str) -> dict[str, torch.nn.Parameter]:
    """Return the parameters to train by name, and freeze all others, such as heads that a form promises to keep."""
    kept = tuple(
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, MeaAttention)
        for own in kept_by_forms(module)
    )
    trainable = {
        name: parameter
        for name, parameter in model.named_parameters()
        if (train == "all" or _ATTENTION.search(name)) and not name.startswith(kept)
    }
    if not trainable:
        raise RequestError("the student has no weights that are recognised as attention: use all for `train`")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    mask_cross_group_gradients(model)
    return trainable


def _stored_dtypes(student: Path) -> dict[str, torch.dtype]:
    """Return the dtype of every stored tensor that torch can compute with, by name."""
    stored = {}
    for info in CheckpointReader(student).tensors.values():
        with suppress(KeyError):
            stored[info.name] = torch_dtype(info.dtype)
    return stored


def _write_weights(student: CheckpointReader, directory: Path, changed: dict[str, torch.Tensor]) -> None:
    """Write the student's weight files again with some tensors replaced: same names, shards, dtypes and metadata.

    Args:
        student: The checkpoint; its index says the same of the new files and is not written again.
        directory: Where to.
        changed: New values by name, on any device, rounded to the dtype in which they are stored.

    Raises:
        RequestError: The disk is full or refuses, or a source cannot be read.
    """

    def entry(info: TensorInfo) -> Entry:
        tensor = changed.get(info.name)
        if tensor is None:
            return info
        return NewTensor(info.name, info.dtype, info.shape, lambda: as_array(tensor.to("cpu", torch_dtype(info.dtype))))

    for file in student.files:
        entries = [entry(info) for info in student.tensors.values() if info.file == file]
        write_shard(directory, lay_out(file.name, entries, student.metadata[file.name]))


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
    documents: Documents | None,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    trained: int,
    seed: int,
    bos: Bos,
    progress: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sequences to train on and sequences held out, ids (N, length) of each, N at least one.

    Args:
        documents: Where they come from; None samples them from the teacher.
        teacher: The original.
        tokenizer: Makes ids of the text.
        length: Tokens of a sequence.
        trained: Sequences in all steps together; as many are taken, sampled within bounds.
        seed: Of sampling, and of the places that are read in large files.
        bos: See `sequence_prefix`.
        progress: Show a bar on stderr.
    """
    if documents is not None:
        ids = token_sequences(documents, tokenizer, length, limit=trained + _MAX_HELD_OUT, seed=seed, bos=bos)
        if len(ids) < 2:
            raise RequestError(
                f"{documents.name} fills one sequence of {length} tokens, and healing holds one out: "
                "give more text, or a smaller `sequence_length`"
            )
    else:
        count = min(trained, _MAX_SAMPLED)
        count += max(2, min(_MAX_HELD_OUT, count // 8))
        ids = sample_sequences(teacher, tokenizer, count, length, seed, bos=bos, progress=progress)
    held_out = max(1, min(_MAX_HELD_OUT, len(ids) // 9))
    return ids[:-held_out], ids[-held_out:]


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
    train: Literal["attention", "all"] = "attention",
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    gradient_checkpointing: bool = False,
    resume: bool = False,
) -> HealingResult:
    """Distil a compressed checkpoint from its original, and keep the better of before and after.

    AdamW without weight decay on float32 masters, KL(teacher ‖ student) per token, a short warm-up and a cosine to a
    twentieth; products are bfloat16 where the student is stored so and the hardware is made for it. A tenth of the
    sequences (64 at most) is held out: the step size and the weights are those that do best there, and the healed
    weights, rounded to the dtype they are stored in, are kept only where they lower the KL there. See `distil`.

    How far it has come is kept beside `out`, in a directory with ``.partial`` behind its name, until it is through.
    Started by ``torchrun`` or ``accelerate launch``, several processes share the sequences of every step.

    Args:
        checkpoint: Directory of the compressed checkpoint, the student.
        teacher: Directory of the original; never written to.
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
        train: ``attention`` trains the attention blocks only, ``all`` every weight.
        temperature: Divides the logits of both models.
        cross_entropy: Share of the text's own cross-entropy in the loss, 0 to 1; KL from the original is the rest.
        gradient_checkpointing: Less memory for a second run of each layer in every step.
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
    student, teacher = Path(checkpoint).resolve(), Path(teacher).resolve()
    out = student if out is None else Path(os.path.abspath(out))
    if steps < 1 or batch_size < 1:
        raise RequestError(f"`steps` {steps} with `batch_size` {batch_size} trains nothing: give 1 or more of each")
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise RequestError(f"`learning_rate` {learning_rate} is not a positive number: give one such as 1e-4")
    if not 0 < temperature < math.inf:
        raise RequestError(f"`temperature` {temperature} is not a positive number: give one such as 2")
    if not 0 <= cross_entropy <= 1:
        raise RequestError(f"`cross_entropy` {cross_entropy} is no share of the loss: give 0 to 1")
    if train not in ("attention", "all"):
        raise RequestError(f"`train` {train} is unknown: use attention or all")
    _check_places(student, teacher, out)
    _check_models(student, teacher)
    target = join_processes(resolve_device(device))
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
    )
    request = asdict(settings) | {"products": None, "train": train, "sequence_length": sequence_length, "bos": bos}
    states = {
        "the checkpoint": fingerprint(CheckpointReader(student), CheckpointReader(student).config()),
        "the teacher": fingerprint(CheckpointReader(teacher), CheckpointReader(teacher).config()),
        "the request": json.loads(json.dumps(request)),
        "the text": None if text is None else text_state(text),
        "a library version": versions(),
    }
    with _state(out, states, resume) as state:
        result, changed = _healed(
            student, teacher, out, documents, settings, sequence_length, bos, target, train, progress, state, began
        )
        if is_first_process():
            _publish(student, out, changed, result)
    return result


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


def _check_models(student: Path, teacher: Path) -> None:
    """Check, from their configurations, that a teacher may be what a student was made from.

    Raises:
        RequestError: They differ in family, depth, hidden size or vocabulary.
    """
    configs = [CheckpointReader(path).config() for path in (student, teacher)]
    families = [str(config.get("model_type", "")).removeprefix("mea_") for config in configs]
    told = {
        "num_hidden_layers": "layers",
        "hidden_size": "channels",
        "vocab_size": "tokens in its vocabulary",
    }
    for key, what in told.items():
        own, other = (config.get(key) for config in configs)
        if own != other:
            raise RequestError(
                f"{teacher} has {other} {what} and {student} {own}: give the original it was made from as `teacher`"
            )
    if families[0] not in (families[1], "llama"):  # which other families are exported as
        raise RequestError(
            f"{teacher} is a {families[1]} and {student} a {families[0]}: give the original it was made from as "
            "`teacher`"
        )


def _healed(
    student: Path,
    teacher: Path,
    out: Path,
    documents: Documents | None,
    settings: DistillationSettings,
    sequence_length: int | None,
    bos: Bos,
    target: torch.device,
    train: str,
    progress: bool,
    state: Workspace | None,
    began: float,
) -> tuple[HealingResult, dict[str, torch.Tensor]]:
    """Distil the student; return what was done, and its new weights by name, none where it did not help."""
    steps, batch_size, seed = settings.steps, settings.batch_size, settings.seed
    teacher_model = load_model(teacher, None, target)
    model = load_model(student, None, target)
    products = fast_products(model.dtype, target)
    if model.dtype != torch.float64:
        model = model.float()
    check_same_vocabulary(model, teacher_model, (student, teacher))
    length = choose_sequence_length(teacher_model, sequence_length)
    parameters = _trainable(model, train)
    stored = _stored_dtypes(student)
    changed_names = [name for name in parameters if name in stored]
    if len(changed_names) != len(parameters):
        missing = next(name for name in parameters if name not in stored)
        raise RequestError(
            f"{student} stores {missing} under another name, so it cannot be trained: use attention for `train`"
        )
    tokenizer = load_tokenizer(student)
    prefix = sequence_prefix(tokenizer, bos)
    training = held_out = torch.empty(0)
    if is_first_process():
        training, held_out = _stored_sequences(
            state,
            lambda: _sequences(documents, teacher_model, tokenizer, length, steps * batch_size, seed, bos, progress),
        )
        for ids in (training, held_out):
            check_ids(ids, vocabulary_size(model), student)
    training, held_out = from_first_process((training, held_out))
    settings = replace(settings, products=products)
    before = measure(model, teacher_model, held_out, products)
    if math.isnan(before.kl):
        raise RequestError(f"the logits of {teacher} or {student} are not all numbers: look for NaN in their weights")
    with tqdm(total=settings.all_steps, desc="healing", unit="step", disable=not progress, file=sys.stderr) as bar:

        def tick(loss: float) -> None:
            bar.set_postfix(kl=f"{loss:.4f}", refresh=False)
            bar.update(1)

        place = from_first_process(None if state is None else state.work / "training")
        distillation = distil(model, teacher_model, training, held_out, settings, tick, place)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(parameter.to(stored[name]))
    after = measure(model, teacher_model, held_out, products)
    better = after.kl < before.kl
    if model.dtype != torch.float64:
        model = model.float()
    prompt = held_out[:2, : min(_PROMPT_TOKENS, length - 1)].to(model.device)
    check_decoding(model, prompt, min(_DECODED_TOKENS, length - prompt.shape[1]), DECODING_TOLERANCE)

    result = HealingResult(
        out=out,
        steps=steps,
        tokens=distillation.all_steps * batch_size * length,
        learning_rate=settings.learning_rate,
        relative_rate=distillation.rate,
        train=train,
        text="sampled from the teacher" if documents is None else documents.title,
        seed=seed,
        trained_parameters=sum(parameter.numel() for parameter in parameters.values()),
        held_out_tokens=before.tokens,
        kl_before=before.kl / before.tokens,
        kl_after=(after if better else before).kl / before.tokens,
        cross_entropy_before=before.cross_entropy / before.tokens,
        cross_entropy_after=(after if better else before).cross_entropy / before.tokens,
        curve=distillation.curve,
        kept="healed" if better else "unhealed",
        seconds=round(time.monotonic() - began, 1),
        prefix_ids=prefix,
    )
    if not better and is_first_process():
        print(
            f"healing did not help (KL {before.kl / before.tokens:.4g} → {after.kl / after.tokens:.4g} on held-out "
            "text), and the weights stay as they were: try a lower learning rate, or more steps",
            file=sys.stderr,
        )
    weights = model.state_dict()
    # Under train: all a tied weight may be stored under both of its names.
    changed = {name: weights[name] for name in (stored if train == "all" else changed_names) if name in weights}
    return result, changed if better else {}


def _stored_sequences(
    state: Workspace | None, make: Callable[[], tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sequences that `make` gives, kept so that a resumed run has the same."""
    assert state is not None
    directory = state.work / "text"
    if not state.result_of("text", "tokens"):
        names = ("training", "held_out")
        arrays = [as_array(ids) for ids in make()]
        entries = [
            NewTensor(name, dtype_name(array.dtype), array.shape, partial(np.asarray, array))
            for name, array in zip(names, arrays, strict=True)
        ]
        write_checkpoint(directory, entries)
        state.commit("text", "tokens", len(arrays[0]))
    reader = CheckpointReader(directory)
    return reader.read("training"), reader.read("held_out")


def _publish(student: Path, out: Path, changed: dict[str, torch.Tensor], result: HealingResult) -> None:
    """Write the student's directory with new weights and a ``healing.json``, complete or not at all.

    Raises:
        RequestError: The disk is full or refuses; what was at `out` is as it was.
    """
    reader = CheckpointReader(student)
    with refusals(out), replacing_directory(out, student, "healing") as work:
        copy_tree(student, work, {file.name for file in reader.files})
        _write_weights(reader, work, changed)
        if carried_code(work).version is not None:  # by an older release, perhaps: what was run is this one's
            write_code(work)
        record = {name: value for name, value in result.to_json().items() if name != "out"}
        # A loss may be infinite here, which `write_json` refuses.
        write_text(work / "healing.json", json.dumps(record | {"versions": versions()}, indent=2) + "\n")
