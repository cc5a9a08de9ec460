"""Sequences of conversations in which the answers are marked: what the assistant wrote, up to the end of its turn.

A chat template that marks its answers (``{% generation %}``) says which tokens they are. With any other, an answer is
what the conversation up to it has more than the conversation before it and the opening of the assistant's turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from mea_compress.errors import RequestError
from mea_compress.text.documents import Chat, Documents, Piece
from mea_compress.text.sequences import Bos, Part, chat_text, cut_sequences, template_refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = 1 << 40
"""Added to the ids of answers while sequences are cut; no vocabulary is so large."""
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ANSWER = "assistant"


def answer_sequences(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    limit: int | None = None,
    seed: int = 0,
    bos: Bos = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut conversations into full sequences as `token_sequences` does, and mark what is an answer.

    Sequences without an answer are left out.

    Args:
        documents: Of `read_documents`; all are conversations.
        tokenizer: Their tokenizer, a fast one, with a chat template.
        sequence_length: Tokens of a sequence, the prefix included.
        limit: At most so many sequences.
        seed: Of the places that are read where not all are.
        bos: See `sequence_prefix`.

    Returns:
        Ids (N, sequence_length), int64, N at least 1; and a bool mask of the same shape, True where a token is part of
        an answer and there is a token before it that predicts it.

    Raises:
        RequestError: A document is no conversation, none has an answer, the template refuses one or writes it so that
            its answers cannot be told, the tokenizer is a slow one, or the text does not fill one sequence.
    """

    def encode(pieces: Iterable[Piece]) -> Iterator[Part]:
        for piece in pieces:
            if not isinstance(piece.content, Chat):
                raise RequestError(
                    f"{documents.name} has text without messages, in which nothing is an answer: give conversations "
                    "(objects with messages), or leave `answers_only` out"
                )
            ids, answers = answer_ids(piece.content, tokenizer)
            marked = [id + _MARK * answer for id, answer in zip(ids, answers, strict=True)]
            yield Part(marked, piece.begins, piece.running)

    def has_answer(row: list[int]) -> bool:
        return any(id >= _MARK for id in row[1:])

    rows = cut_sequences(documents, tokenizer, sequence_length, limit, seed, bos, encode, has_answer)
    if not len(rows):
        raise RequestError(
            f"no sequence of {sequence_length} tokens of {documents.name} has an answer, which is what the role "
            f"{_ANSWER} says: give a larger `sequence_length`, other conversations, or leave `answers_only` out"
        )
    answers = rows >= _MARK
    answers[:, 0] = False  # nothing predicts it
    return rows % _MARK, answers


def answer_ids(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation as the chat template writes it, and for each whether it is part of an answer.

    Raises:
        RequestError: See `answer_sequences`.
    """
    text = chat_text(chat, tokenizer)
    if not tokenizer.is_fast:
        raise RequestError(
            "the tokenizer does not say where its tokens lie in a text, so that answers cannot be told: give a "
            "checkpoint with a tokenizer.json, or leave `answers_only` out"
        )
    if _MARKS_ANSWERS.search(str(tokenizer.get_chat_template(None, chat.tools))):
        try:
            encoded: Any = tokenizer.apply_chat_template(
                chat.messages,
                tools=chat.tools,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except Exception as error:  # whatever a template raises
            raise template_refusal(chat, error) from error
        return list(encoded["input_ids"]), [bool(answer) for answer in encoded["assistant_masks"]]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = _answer_spans(chat, text, tokenizer)
    answers = [
        begin < end and any(begin < last and first < end for first, last in spans)
        for begin, end in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), answers


def _answer_spans(chat: Chat, text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Return where the answers of a conversation lie in its text, as positions of characters.

    What stands at the front answers nothing. An earlier answer that the template writes otherwise once the conversation
    has gone on, as some leave out what was thought, is none.

    Raises:
        RequestError: That holds for the last answer, or the template refuses a beginning of the conversation.
    """
    turns = [turn for turn, message in enumerate(chat.messages) if turn and message.get("role") == _ANSWER]
    spans = []
    for turn in turns:
        before, after = (replace(chat, messages=chat.messages[:end]) for end in (turn, turn + 1))
        asked, opened = chat_text(before, tokenizer), chat_text(before, tokenizer, opened=True)
        answered = chat_text(after, tokenizer)
        # A template may open a turn with more than it writes in front of an answer.
        same = takewhile(lambda pair: pair[0] == pair[1], zip(opened, answered, strict=False))
        first = sum(1 for _ in same)
        if answered.startswith(asked) and first >= len(asked) and text.startswith(answered):
            spans.append((first, len(answered)))
        elif turn == turns[-1]:
            raise RequestError(
                f"the chat template does not write {chat.place} as the conversation before its last answer and the "
                "answer, so that answers cannot be told: mark them in the template with {% generation %}, or leave "
                "`answers_only` out"
            )
    return spans


__all__ = ["answer_ids", "answer_sequences"]
