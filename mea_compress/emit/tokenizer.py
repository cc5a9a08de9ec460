"""The tokenizer of an emitted checkpoint, which must make of every text what its source's makes of it.

``AutoTokenizer`` chooses by ``model_type`` among others, by tables that change between releases, and an emitted
checkpoint is of another ``model_type`` than its source. A class that ``tokenizer_config.json`` names is taken as it
stands where the ``model_type`` is in none of these tables.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mea_compress.checkpoint.files import write_json, write_text
from mea_compress.checkpoint.vocabulary import has_vocabulary
from mea_compress.errors import RequestError, first_line
from mea_compress.modeling import register

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
# TokenizersBackend reads tokenizer.json as it stands; this older name of it is understood before transformers 5 too.
_PLAIN_CLASS = {"TokenizersBackend": "PreTrainedTokenizerFast"}
_TEXTS = (
    "Once upon a time there was a naïve café, 12345 km away.",
    "  two spaces,\n\n\ttabs; it's 3.14 and don't!  ",
    "def f(x):\n    return x**2  # 漢字 🙂 Ünïcödé",
    "",
)
# Added tokens that are tried, first and last ones: some vocabularies have hundreds.
_ADDED_TOKENS = 24
_CHAT = (
    {"role": "user", "content": "Who is there?"},
    {"role": "assistant", "content": "It's me.\nAnd you?"},
    {"role": "user", "content": "Nobody "},
)


def keep_tokenizer(source: Path, target: Path, config: Any = None) -> None:
    """Compare what both directories make of texts with special tokens and of a chat, and mend the second's.

    Its class is named in ``tokenizer_config.json``; where that is not enough, ``tokenizer.json`` is written as the
    source's tokenizer has it in memory. Nothing is touched where both make the same and the class is named already.

    Args:
        source: A checkpoint directory; nothing is done where it has no tokenizer, and a warning
            printed where its tokenizer needs code of its own.
        target: A directory with the same tokenizer files and the config.json of the emitted checkpoint.
        config: Configuration to choose the source's tokenizer by, in place of that of its directory.

    Raises:
        RequestError: The tokenizer cannot be made the same.
    """
    if not has_vocabulary(source):
        return
    register()
    try:
        tokenizer = _load(source, config)
    except Exception as error:
        print(
            f"warning: the tokenizer of {source} does not load without code of its own ({first_line(error)}), and is "
            "copied without being compared: compare the ids of a text with both before relying on it",
            file=sys.stderr,
        )
        return
    expected = _behaviour(tokenizer)
    path = target / TOKENIZER_CONFIG
    settings: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        settings = json.loads(path.read_text(encoding="utf-8"))
    name = type(tokenizer).__name__
    # Releases differ in whether they take the class that is named; they agree on the one that is loaded.
    named = _PLAIN_CLASS.get(name, name)
    if settings.get("tokenizer_class") not in (named, name, f"{name}Fast"):
        settings["tokenizer_class"] = named
        write_json(path, settings)
    if _behaves(target, expected):
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        write_text(target / TOKENIZER, backend.to_str(pretty=True))
        write_json(path, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    if backend is None or not _behaves(target, expected):
        raise RequestError(
            f"{source}: the tokenizer, a {name}, is chosen by the model_type and cannot be kept under another; load it "
            "with AutoTokenizer and save it by save_pretrained into a copy of the checkpoint, and give that"
        )


def _load(directory: Path, config: Any = None) -> "PreTrainedTokenizerBase":
    """Load a tokenizer; no code of the directory is run."""
    from transformers import AutoTokenizer

    options = {} if config is None else {"config": config}
    with _quiet():
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **options)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning of one tokenizer several times; whoever loads the checkpoint hears it then."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _behaves(directory: Path, expected: dict[str, Any]) -> bool:
    """Return whether a directory's tokenizer is as expected, where this package is known and where it is not."""
    from transformers import PreTrainedConfig

    # Whoever loads a tokenizer alone need not trust the model's code: its configuration is then of no known class.
    for config in (None, PreTrainedConfig()):
        try:
            if _behaviour(_load(directory, config)) != expected:
                return False
        except Exception:
            return False
    return True


def _behaviour(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return what a tokenizer makes of texts: ids, masks, text again, and which tokens are special."""
    added = sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])
    if len(added) > _ADDED_TOKENS:
        added = added[: _ADDED_TOKENS // 2] + added[-_ADDED_TOKENS // 2 :]
    # A word behind each: what follows a special token is where classes differ.
    texts = [*_TEXTS, *(f"{_TEXTS[0]}{token}{_TEXTS[0]} {token} and" for token, _ in added)]
    behaviour: dict[str, Any] = {
        "encoded": [dict(tokenizer(text, verbose=False)) for text in texts],
        "plain": [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts],
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "special_ids": tokenizer.all_special_ids,
        "padding_side": tokenizer.padding_side,
        "chat": None,
    }
    for skip in (False, True):
        behaviour[f"decoded, {skip}"] = [
            tokenizer.decode(ids, skip_special_tokens=skip) for ids in behaviour["plain"] if ids
        ]
    with suppress(Exception):  # no template, or one that takes no such chat
        behaviour["chat"] = tokenizer.apply_chat_template(list(_CHAT), tokenize=False, add_generation_prompt=True)
        behaviour["chat_ids"] = tokenizer(behaviour["chat"], add_special_tokens=False)["input_ids"]
    return behaviour


__all__ = ["keep_tokenizer"]
