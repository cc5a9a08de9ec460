"""Which files of a checkpoint directory hold the vocabulary of its tokenizer."""

from pathlib import Path

_VOCABULARIES = ("tokenizer.json", "tekken.json", "vocab*", "*.model", "*.tiktoken", "*.spm")


def has_vocabulary(directory: Path) -> bool:
    """Return whether a checkpoint directory has the files of a tokenizer."""
    return any(any(directory.glob(name)) for name in _VOCABULARIES)


__all__ = ["has_vocabulary"]
