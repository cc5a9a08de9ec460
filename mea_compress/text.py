"""Text in, token sequences out: documents read from files, or text sampled from the model itself.

Evaluation protocol, used wherever a loss is reported: the tokenizer's own ids without the special tokens it may add,
one BOS in front of every sequence where the tokenizer has one. Of several documents each gives its beginning; a single
document is read to its end in consecutive windows, each with its own BOS. Characters outside the vocabulary, line ends
included, stay the unknown token that the tokenizer makes of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from mea_compress.errors import RequestError
from mea_compress.loading import check_context, check_sequence_length, end_tokens, seeded, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

UNKNOWN_SHARE_WARNING = 0.2
_DOCUMENTS_AT_ONCE = 256


def read_documents(path: Path | str) -> list[str]:
    """Return the documents of a text file.

    Args:
        path: A ``.txt`` (one document, UTF-8) or ``.jsonl`` (a document a line: a JSON string, or an object with
            ``text``).

    Raises:
        RequestError: It is not there, of another kind, not UTF-8, has a line that is no document, or no text at all.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"the text file {path} does not exist: give a .txt or .jsonl file")
    if path.suffix not in (".txt", ".jsonl"):
        raise RequestError(f"{path} is neither .txt nor .jsonl: give one of these (a document a line in .jsonl)")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text: convert it first") from error
    documents = [content] if path.suffix == ".txt" else list(_json_lines(path, content))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise RequestError(f"{path} holds no text: give a file with some")
    return documents


def _json_lines(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise RequestError(
                f"line {number} of {path} is not JSON: write a string or an object with text on it"
            ) from error
        if isinstance(value, dict):
            value = value.get("text")
        if not isinstance(value, str):
            raise RequestError(
                f'line {number} of {path} is neither a string nor an object with "text": write one of these'
            )
        yield value


def _encode(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the ids of each document, no special token added, a few hundred documents at a time."""
    bos = tokenizer.bos_token_id
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        chunk = list(documents[start : start + _DOCUMENTS_AT_ONCE])
        for ids in tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]:
            yield ids[1:] if bos is not None and ids[:1] == [bos] else ids


def _warn_of_unknown(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> None:
    unknown = getattr(tokenizer, "unk_token_id", None)
    total = sum(len(row) for row in rows)
    if unknown is None or unknown == tokenizer.bos_token_id or not total:
        return
    share = sum(row.count(unknown) for row in rows) / total
    if share > UNKNOWN_SHARE_WARNING:
        print(
            f"warning: {share:.0%} of the tokens are unknown to this tokenizer, and figures on such text mean little: "
            "give the tokenizer that belongs to the text",
            file=sys.stderr,
        )


def _too_short(count: int, sequence_length: int) -> RequestError:
    return RequestError(
        f"the text has {count} tokens, fewer than one sequence of {sequence_length}: "
        "give more text with `text`, or a smaller `sequence_length`"
    )


def token_sequences(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int, *, limit: int | None = None
) -> torch.Tensor:
    """Cut documents into full sequences without padding, for calibration and training.

    A single document is cut into consecutive windows. Of several, each that fills a sequence gives its first
    ``sequence_length`` tokens; shorter ones are put one after the other, a BOS before each, until they fill one. What
    is left over is dropped.

    Args:
        documents: Texts.
        tokenizer: Their tokenizer.
        sequence_length: Tokens of a sequence, BOS included.
        limit: At most so many sequences.

    Returns:
        Ids (N, sequence_length), int64, N at least 1; BOS first where the tokenizer has one.

    Raises:
        RequestError: The text does not fill one sequence.
    """
    check_sequence_length(sequence_length)
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
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int, *, limit: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut documents into sequences that never mix them, padded on the right, for measuring.

    A single document is cut into consecutive windows (a last, shorter one is kept). Of several, each gives its first
    ``sequence_length`` tokens, or all it has.

    Args:
        documents: Texts.
        tokenizer: Their tokenizer.
        sequence_length: Tokens of a sequence at most, BOS included.
        limit: At most so many sequences.

    Returns:
        Ids (N, longest), int64, and a bool mask of the same shape, False where there is padding (id 0).

    Raises:
        RequestError: All of the text together is shorter than one sequence.
    """
    check_sequence_length(sequence_length)
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


@torch.no_grad()
def sample_sequences(
    model: PreTrainedModel,
    bos_token_id: int | None,
    count: int,
    length: int,
    seed: int = 0,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> torch.Tensor:
    """Sample text from a model itself: temperature 1, the whole vocabulary except the end tokens.

    Args:
        model: Causal language model.
        bos_token_id: First token of every row; None starts each from a token drawn at random.
        count: Rows.
        length: Tokens of each row, the first included.
        seed: Same seed, model and machine: same ids. Global random state is left alone.
        batch_size: Rows sampled at once.
        progress: Show a bar on stderr.

    Returns:
        Ids (count, length), int64, on the CPU.

    Raises:
        RequestError: `count` or `length` is below 1, `length` is beyond the model's context, the BOS beyond its
            vocabulary, or its logits are not finite.
    """
    if count < 1 or length < 1:
        raise RequestError(f"sampling {count} sequences of {length} tokens makes no text: ask for 1 or more of each")
    check_context(model, length)
    device = next(model.parameters()).device
    vocabulary = vocabulary_size(model)
    if bos_token_id is not None and bos_token_id >= vocabulary:
        raise RequestError(
            f"the BOS token {bos_token_id} is beyond the model's vocabulary of {vocabulary}, so no text can be "
            "sampled: correct bos_token_id, or give text with `text`"
        )
    ends = [token for token in end_tokens(model) if 0 <= token < vocabulary]
    ordinary = torch.ones(vocabulary, device=device)
    ordinary[ends] = 0
    if not model(torch.tensor([[bos_token_id or 0]], device=device), use_cache=False).logits.isfinite().all():
        raise RequestError(
            "the model's logits are not all numbers, so no text can be sampled: look for NaN in its weights"
        )
    rows = []
    bar = tqdm(total=count * length, desc="sampling text", unit="tok", disable=not progress, file=sys.stderr)
    with bar, seeded(seed, device), _plain_sampling(model, ends, length):
        for start in range(0, count, batch_size):
            size = min(batch_size, count - start)
            if bos_token_id is None:
                first = torch.multinomial(ordinary.expand(size, -1), 1)
            else:
                first = torch.full((size, 1), bos_token_id, dtype=torch.int64, device=device)
            bar.update(size)
            if length > 1:
                # Without a mask generate would make one itself, and take a BOS that is also the padding for padding.
                mask, criteria = torch.ones_like(first), [_bar_criterion(bar)]
                first = model.generate(first, attention_mask=mask, stopping_criteria=criteria)  # type: ignore[operator]
            rows.append(first.cpu())
    return torch.cat(rows)


@contextmanager
def _plain_sampling(model: PreTrainedModel, ends: list[int], length: int) -> Iterator[None]:
    """Put aside a model's own generation config, whose top-k or penalties `generate` would mix into any other."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        suppress_tokens=ends or None,
        max_length=length,
        pad_token_id=0,  # nothing is padded; unset, generate warns
    )
    try:
        yield
    finally:
        model.generation_config = before


def _bar_criterion(bar: tqdm) -> StoppingCriteria:
    """Return a stopping criterion that stops nothing and moves a bar by a token of every row."""
    from transformers import StoppingCriteria

    class Progress(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            bar.update(len(input_ids))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    return Progress()
