"""A tokenizer as GGUF describes it to llama.cpp, read from tokenizer.json and as transformers loads it.

llama.cpp splits a text into words by rules of its own, which a file names. A tokenizer whose rules have no name known
here is refused: with another's, texts would become other tokens without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mea_compress.errors import RequestError
from mea_compress.loading import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names of the expressions by which words are split before bytes are merged.
_SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}
_OWN = "export with --format llama and convert that with a tokenizer that llama.cpp knows"


def tokenizer_fields(directory: Path, vocabulary: int) -> dict[str, Any]:
    """Return what a file says of the tokenizer of a checkpoint directory, or that there is none.

    Args:
        directory: With tokenizer.json, and whatever else transformers loads the tokenizer from.
        vocabulary: Rows of the embedding; ids beyond the tokenizer's are filled up.

    Returns:
        Values by the method of ``GGUFWriter`` that writes each, in the order of the file.

    Raises:
        RequestError: llama.cpp has no tokenizer that does the same.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        others = [name for name in ("tokenizer.model", "vocab.json") if (directory / name).is_file()]
        if others:
            raise RequestError(
                f"{others[0]} cannot be written as GGUF; load the tokenizer with AutoTokenizer and save it beside the "
                "checkpoint, which writes tokenizer.json"
            )
        return {"add_tokenizer_model": "none"}
    described = json.loads(file.read_text(encoding="utf-8"))
    model = described["model"]
    if model.get("type") != "BPE":
        raise RequestError(f"{file} is a {model.get('type')} tokenizer, which is not written as GGUF; {_OWN}")
    tokens, types = _tokens(described, vocabulary, file)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    fields: dict[str, Any]
    if model.get("byte_fallback"):
        if types.count(_BYTE) < 256:  # llama.cpp ends its process over a character that has no token
            raise RequestError(f"{file} has no token for every byte, which llama.cpp needs; {_OWN}")
        fields = {
            "add_tokenizer_model": "llama",
            "add_tokenizer_pre": "default",
            "add_add_space_prefix": _prepends_space(described, file),
            "add_token_scores": _scores(tokens, merges),
        }
    else:
        fields = {
            "add_tokenizer_model": "gpt2",
            "add_tokenizer_pre": _split_name(described, file),
            "add_token_merges": merges,
        }
    return fields | {"add_token_list": tokens, "add_token_types": types} | _special(directory, tokens)


def add_tokenizer(writer: GGUFWriter, fields: Mapping[str, Any]) -> None:
    """Write into a file what `tokenizer_fields` says of a tokenizer."""
    for method, value in fields.items():
        getattr(writer, method)(value)


def _tokens(described: dict[str, Any], vocabulary: int, file: Path) -> tuple[list[str], list[int]]:
    """Return every token by its id, and its kind."""
    ids = dict(described["model"]["vocab"])
    added = {entry["content"]: entry for entry in described.get("added_tokens", [])}
    ids |= {content: entry["id"] for content, entry in added.items()}
    if max(ids.values()) >= vocabulary:
        raise RequestError(f"{file} has {max(ids.values()) + 1} tokens and the model {vocabulary}; {_OWN}")
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [_UNUSED] * vocabulary
    for token, index in ids.items():
        tokens[index], types[index] = token, _NORMAL
        if token in added:
            types[index] = _CONTROL if added[token].get("special") else _USER_DEFINED
        elif described["model"].get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            types[index] = _BYTE
        if token == described["model"].get("unk_token"):
            types[index] = _UNKNOWN
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return the rank of every token among the merges: llama.cpp merges the highest score first."""
    rank = {"".join(pair.split(" ")): index for index, pair in reversed(list(enumerate(merges)))}
    return [-float(rank.get(token, 0)) for token in tokens]


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, which may be a sequence of them."""
    if part is None:
        return []
    return part[inner] if part["type"] == "Sequence" else [part]


def _prepends_space(described: dict[str, Any], file: Path) -> bool:
    """Return whether a tokenizer of words with ▁ puts one in front of a text."""
    steps = [
        *_steps(described.get("normalizer"), "normalizers"),
        *_steps(described.get("pre_tokenizer"), "pretokenizers"),
    ]
    kinds = {step["type"] for step in steps}
    if not kinds <= {"Prepend", "Replace", "Metaspace"} or not kinds & {"Replace", "Metaspace"}:
        raise RequestError(f"{file} changes texts in a way that llama.cpp has no name for; {_OWN}")
    return any(step["type"] == "Prepend" or step.get("prepend_scheme") in ("first", "always") for step in steps)


def _split_name(described: dict[str, Any], file: Path) -> str:
    """Return llama.cpp's name of the way in which a byte-level tokenizer splits words."""
    steps = _steps(described.get("pre_tokenizer"), "pretokenizers")
    normalized = {step["type"] for step in _steps(described.get("normalizer"), "normalizers")}
    kinds = [step["type"] for step in steps]
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space") and normalized <= {"NFC"}:
        by_words = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and by_words:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and by_words and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not by_words and not steps[0].get("invert"):
            name = _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
            if name is not None and steps[0].get("behavior") == "Isolated":
                return name
    raise RequestError(f"{file} splits words in a way that llama.cpp has no name for; {_OWN}")


def _special(directory: Path, tokens: list[str]) -> dict[str, Any]:
    """Return which tokens begin, end and fill up a text, whether a text begins with one, and the chat template.

    They are the loaded tokenizer's, for several files and the tokenizer's class may say them.
    """
    tokenizer = load_tokenizer(directory)
    index = {token: number for number, token in enumerate(tokens)}
    ids = {name: index.get(getattr(tokenizer, f"{name}_token")) for name in ("bos", "eos", "unk", "pad")}
    if ids["eos"] is None:  # llama.cpp would take one of its own, whatever stands there
        raise RequestError(
            f"the tokenizer of {directory} has no eos_token, which llama.cpp ends texts by; name one in "
            "tokenizer_config.json"
        )
    fields: dict[str, Any] = {f"add_{name}_token_id": number for name, number in ids.items() if number is not None}
    fields["add_add_bos_token"] = ids["bos"] is not None and tokenizer("a")["input_ids"][:1] == [ids["bos"]]
    fields["add_add_eos_token"] = False
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    return fields | ({"add_chat_template": template} if template else {})


__all__ = ["add_tokenizer", "tokenizer_fields"]
