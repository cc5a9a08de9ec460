"""Text in, token sequences out: documents read from files, or text sampled from the model itself.

The measuring convention, used wherever a loss is reported: the tokenizer's own ids without the special tokens it may
add, one BOS in front of every sequence when the tokenizer has one. Of several documents each gives its beginning; a
single document is read to its end in consecutive windows, each with its own BOS. Characters outside the vocabulary,
line ends included, stay the unknown token that the tokenizer makes of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mea_compress.decoding import run_cached
from mea_compress.errors import RequestError
from mea_compress.modeling import register

MAX_DEFAULT_SEQUENCE = 1024
UNKNOWN_SHARE_WARNING = 0.2
_DOCUMENTS_AT_ONCE = 256


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The torch device that a ``--device`` value names; ``auto`` is the GPU when there is one.

    Raises:
        RequestError: the name is no device, or this machine has no such device.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise RequestError(f"--device {device} is not a device: use auto, cpu, cuda or cuda:N.") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"--device {device} was asked for, but this machine has no such GPU: use --device cpu.")
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The torch dtype that a ``--dtype`` value names; None stays None (the checkpoint's own).

    Raises:
        RequestError: the name is not a floating-point dtype.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    resolved = getattr(torch, dtype, None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise RequestError(f"--dtype {dtype} is not a floating-point type: use float32, bfloat16, float16 or float64.")
    return resolved


def _checkpoint_directory(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise RequestError(
            f"{path} is not a directory: give the directory of a checkpoint (config.json and *.safetensors)."
        )
    if not (path / "config.json").is_file():
        raise RequestError(f"{path} has no config.json: give the directory of a Hugging Face checkpoint.")
    return path


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def load_tokenizer(path: Path | str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint directory.

    Raises:
        RequestError: no such directory, or it holds no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer

    path = _checkpoint_directory(path)
    register()
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise RequestError(
            f"The tokenizer of {path} cannot be loaded ({_first_line(error)}): copy the tokenizer's files there."
        ) from error


def load_model(
    path: Path | str,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
    *,
    trust_remote_code: bool = False,
) -> Any:
    """The causal language model of a checkpoint directory, in evaluation mode, from safetensors only.

    Args:
        path: directory of the checkpoint.
        dtype: dtype of the weights; None keeps the checkpoint's.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        trust_remote_code: run modelling code found in the directory. Never needed for the models of this package.

    Raises:
        RequestError: no such directory, no safetensors in it, or transformers cannot make a model of it.
    """
    from transformers import AutoModelForCausalLM

    path = _checkpoint_directory(path)
    register()
    if not any(path.glob("*.safetensors")):
        raise RequestError(
            f"{path} has no *.safetensors file: convert its weights to safetensors first (pickles are not read)."
        )
    target, kept = resolve_device(device), resolve_dtype(dtype) or "auto"
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=kept,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:
        raise RequestError(f"The model of {path} cannot be loaded: {_first_line(error)}.") from error
    model.to(target)
    return model.eval()


def context_length(model: Any) -> int | None:
    """Positions the model was made for, from its config; None when it does not say."""
    value = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(value) if value else None


def choose_sequence_length(model: Any, sequence_length: int | None = None) -> int:
    """The tokens of a sequence: what was asked for, else the model's context, at most 1024.

    Raises:
        RequestError: shorter than two tokens, or longer than the model's context.
    """
    context = context_length(model)
    if sequence_length is None:
        return min(context or MAX_DEFAULT_SEQUENCE, MAX_DEFAULT_SEQUENCE)
    if sequence_length < 2:
        raise RequestError(f"--sequence-length {sequence_length} leaves nothing to predict: give 2 or more.")
    if context is not None and sequence_length > context:
        raise RequestError(
            f"--sequence-length {sequence_length} is longer than the model's context of {context} tokens."
        )
    return sequence_length


def read_documents(path: Path | str) -> list[str]:
    """The documents of a text file.

    Args:
        path: ``.txt`` (one document, UTF-8) or ``.jsonl`` (a document a line: a JSON string, or an object with
            ``text``).

    Raises:
        RequestError: not there, of another kind, not UTF-8, a line that is not a document, or no text at all.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"The text file {path} does not exist: give a .txt or .jsonl file.")
    if path.suffix not in (".txt", ".jsonl"):
        raise RequestError(f"{path} is neither .txt nor .jsonl: give one of these (a document a line in .jsonl).")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text: convert it first.") from error
    documents = [content] if path.suffix == ".txt" else list(_json_lines(path, content))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise RequestError(f"{path} holds no text: give a file with some.")
    return documents


def _json_lines(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise RequestError(
                f"Line {number} of {path} is not JSON: write a string or an object with text on it."
            ) from error
        if isinstance(value, dict):
            value = value.get("text")
        if not isinstance(value, str):
            raise RequestError(
                f'Line {number} of {path} is neither a string nor an object with "text": write one of these.'
            )
        yield value


def _encode(documents: Sequence[str], tokenizer: Any) -> Iterator[list[int]]:
    """Ids of each document, no special token added, a few hundred documents at a time."""
    bos = tokenizer.bos_token_id
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        chunk = list(documents[start : start + _DOCUMENTS_AT_ONCE])
        for ids in tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]:
            yield ids[1:] if bos is not None and ids[:1] == [bos] else ids


def _warn_of_unknown(rows: list[list[int]], tokenizer: Any) -> None:
    unknown = getattr(tokenizer, "unk_token_id", None)
    total = sum(len(row) for row in rows)
    if unknown is None or unknown == tokenizer.bos_token_id or not total:
        return
    share = sum(row.count(unknown) for row in rows) / total
    if share > UNKNOWN_SHARE_WARNING:
        print(
            f"Warning: {share:.0%} of the tokens are unknown to this tokenizer; figures on such text mean little.",
            file=sys.stderr,
        )


def _too_short(count: int, sequence_length: int) -> RequestError:
    return RequestError(
        f"The text has {count} tokens, fewer than one sequence of {sequence_length}: "
        f"give more text with --text, or a smaller --sequence-length."
    )


def _check_length(sequence_length: int) -> None:
    if sequence_length < 2:
        raise RequestError(f"--sequence-length {sequence_length} leaves nothing to predict: give 2 or more.")


def token_sequences(
    documents: Sequence[str], tokenizer: Any, sequence_length: int, *, limit: int | None = None
) -> torch.Tensor:
    """Full sequences, without padding: for calibration and training.

    A single document is cut into consecutive windows. Of several, each that fills a sequence gives its first
    ``sequence_length`` tokens; shorter ones are put one after the other, a BOS before each, until they fill one. What
    is left over is dropped.

    Args:
        documents: texts.
        tokenizer: a transformers tokenizer.
        sequence_length: tokens of a sequence, BOS included.
        limit: at most so many sequences.

    Returns:
        int64 ids (N, sequence_length), N at least 1; BOS first when the tokenizer has one.

    Raises:
        RequestError: the text does not fill one sequence.
    """
    _check_length(sequence_length)
    front = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows: list[list[int]] = []
    pending: list[int] = []
    count = 0
    for ids in _encode(documents, tokenizer):
        if limit is not None and len(rows) >= limit:
            break
        count += len(ids) + len(front)
        if len(documents) == 1:
            width = sequence_length - len(front)
            rows += [front + ids[i : i + width] for i in range(0, len(ids) - width + 1, width)]
        elif len(front) + len(ids) >= sequence_length:
            rows.append((front + ids)[:sequence_length])
        elif ids:
            pending += front + ids
            if len(pending) >= sequence_length:
                rows.append(pending[:sequence_length])
                pending = []
    if not rows:
        raise _too_short(count, sequence_length)
    rows = rows[:limit]
    _warn_of_unknown(rows, tokenizer)
    return torch.tensor(rows, dtype=torch.int64)


def padded_sequences(
    documents: Sequence[str], tokenizer: Any, sequence_length: int, *, limit: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences that never mix documents, padded on the right: for measuring.

    A single document is cut into consecutive windows (a last, shorter one is kept). Of several, each gives its first
    ``sequence_length`` tokens, or all it has.

    Args:
        documents: texts.
        tokenizer: a transformers tokenizer.
        sequence_length: tokens of a sequence at most, BOS included.
        limit: at most so many sequences.

    Returns:
        int64 ids (N, longest) and a bool mask of the same shape, False where there is padding (id 0).

    Raises:
        RequestError: all of the text together is shorter than one sequence.
    """
    _check_length(sequence_length)
    front = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows: list[list[int]] = []
    count = 0
    for ids in _encode(documents, tokenizer):
        if limit is not None and len(rows) >= limit:
            break
        count += len(ids) + len(front)
        if len(documents) == 1:
            width = sequence_length - len(front)
            rows += [front + ids[i : i + width] for i in range(0, len(ids), width)]
        else:
            rows.append((front + ids)[:sequence_length])
    rows = [row for row in rows if len(row) >= 2]
    stopped_early = limit is not None and len(rows) >= limit
    if not rows or (count < sequence_length and not stopped_early):
        raise _too_short(count, sequence_length)
    rows = rows[:limit]
    _warn_of_unknown(rows, tokenizer)
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros(padded.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = True
    return padded, mask


def end_tokens(model: Any) -> tuple[int, ...]:
    """Ids that end a text, from the model's config and generation config."""
    found: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        value = getattr(config, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or [])
    return tuple(sorted(found))


@torch.no_grad()
def sample_sequences(
    model: Any,
    bos_token_id: int | None,
    count: int,
    length: int,
    seed: int = 0,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> torch.Tensor:
    """Text sampled from the model itself: temperature 1, the whole vocabulary except the end tokens.

    Args:
        model: a causal language model with a KV cache.
        bos_token_id: first token of every row; None starts each from a token drawn at random.
        count: rows.
        length: tokens of each row, the first included.
        seed: same seed, model and machine: same ids. Global random state is left alone.
        batch_size: rows sampled at once.
        progress: show a bar on stderr.

    Returns:
        int64 ids (count, length) on the CPU.

    Raises:
        RequestError: count or length below 1, or length beyond the model's context.
    """
    if count < 1 or length < 1:
        raise RequestError(f"Sampling {count} sequences of {length} tokens makes no text: ask for 1 or more of each.")
    context = context_length(model)
    if context is not None and length > context:
        raise RequestError(f"--sequence-length {length} is longer than the model's context of {context} tokens.")
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    ends = [token for token in end_tokens(model) if 0 <= token < vocabulary]
    ordinary = torch.ones(vocabulary, device=device)
    ordinary[ends] = 0
    rows = []
    with tqdm(total=count * length, desc="sampling text", unit="tok", disable=not progress, file=sys.stderr) as bar:
        for start in range(0, count, batch_size):
            size = min(batch_size, count - start)
            if bos_token_id is None:
                token = torch.multinomial(ordinary.expand(size, -1), 1, generator=generator)
            else:
                token = torch.full((size, 1), bos_token_id, dtype=torch.int64, device=device)
            row, cache = [token], None
            bar.update(size)
            for _ in range(length - 1):
                following, cache = run_cached(model, token, cache)
                logits = following[:, -1].float()
                logits[:, ends] = -torch.inf
                token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                row.append(token)
                bar.update(size)
            rows.append(torch.cat(row, dim=1).cpu())
    return torch.cat(rows)
