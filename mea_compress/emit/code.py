"""The modeling code that a checkpoint carries: which release it is from, and its replacement by this one's."""

import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mea_compress import modeling
from mea_compress.architectures import Checkpoint, open_checkpoint
from mea_compress.checkpoint.files import copy_tree, refusals, replacing_directory
from mea_compress.checkpoint.hub import is_hub_id
from mea_compress.emit.outside import FORM_FILES, form_file, outside_forms
from mea_compress.emit.tokenizer import keep_tokenizer
from mea_compress.errors import RequestError
from mea_compress.modeling.section_mea import CODE_VERSION, TESTED_TRANSFORMERS
from mea_compress.report.showing import Shown
from mea_compress.report.tables import key_value_table

CODE_FILES = (
    "attention_mea.py",
    "configuration_mea.py",
    "decode_cpu_mea.py",
    "decode_mea.py",
    "encoded_mea.py",
    "modeling_mea.py",
    "section_mea.py",
)
# The file in which a release says its number, and what the one release that did not say it was.
_VERSION_FILE, _VERSION = "section_mea.py", re.compile(r'^CODE_VERSION = "([^"]+)"$', re.MULTILINE)
_UNNUMBERED = "0.1.0"
# The file that is imported first, and whose settings name the forms of layers.
_CONFIGURATION_FILE = "configuration_mea.py"
# Faults of code that is out there, by release.
_KNOWN_FAULTS = {
    "0.1.0": "under transformers 5.24 and later it misses the cache that generate hands over and writes wrong text",
}
# The sentence of the card that tells of a refresh; a later one replaces it.
_CARD_NOTE = re.compile(r"\n\n> The modeling code of this checkpoint was replaced by [^\n]*\n")


@dataclass(frozen=True)
class CarriedCode:
    """The code in a checkpoint directory.

    Attributes:
        version: Release of mea-compress that it is from, or None where the checkpoint carries none.
        changed: Files that differ from this release's, or are not there.
        fault: What this code is known to do wrong, or None.
    """

    version: str | None
    changed: tuple[str, ...]
    fault: str | None

    def to_json(self) -> dict[str, Any]:
        """Return part of `inspect --json` and of `refresh --json`."""
        return {"version": self.version, "current": not self.changed, "fault": self.fault}


def carried_code(directory: Path) -> CarriedCode:
    """Return which code a checkpoint carries, as its files say; nothing of it is run."""
    present = [name for name in CODE_FILES if (directory / name).is_file()]
    changed = tuple(name for name in CODE_FILES if name not in present or not _is_ours(directory / name))
    if not present:
        return CarriedCode(None, changed, None)
    version = _UNNUMBERED
    with suppress(OSError):
        match = _VERSION.search((directory / _VERSION_FILE).read_text(encoding="utf-8", errors="replace"))
        version = match[1] if match else _UNNUMBERED
    return CarriedCode(version, changed, _KNOWN_FAULTS.get(version))


def write_code(directory: Path) -> None:
    """Write this release's modeling code into a checkpoint directory, with the forms that its config.json names."""
    for name in outside_forms(directory):
        if name in FORM_FILES:  # otherwise the checkpoint has it from whoever wrote it
            (directory / form_file(name)).unlink(missing_ok=True)
            shutil.copyfile(FORM_FILES[name], directory / form_file(name))
    for name in CODE_FILES:
        code = _ours(directory / name)
        (directory / name).unlink(missing_ok=True)  # a copy may be write-protected
        (directory / name).write_bytes(code)


def _ours(file: Path) -> bytes:
    """Return what a code file of a checkpoint is to hold; the configuration imports forms from outside the package."""
    code = Path(modeling.__file__).with_name(file.name).read_bytes()
    if file.name != _CONFIGURATION_FILE:
        return code
    lines = [f"from .{form_file(name)[:-3]} import FORM  # noqa\n" for name in outside_forms(file.parent)]
    return code + "".join(lines).encode()


def _is_ours(file: Path) -> bool:
    return file.read_bytes() == _ours(file)


@dataclass(frozen=True, repr=False)
class RefreshResult(Shown):
    """What `refresh` found and did.

    Attributes:
        checkpoint: The checkpoint directory.
        before: The code that it carried.
        refreshed: Whether that was replaced.
    """

    checkpoint: Path
    before: CarriedCode
    refreshed: bool

    def to_json(self) -> dict[str, Any]:
        """Return `refresh --json`."""
        return {
            "checkpoint": str(self.checkpoint),
            "before": self.before.to_json(),
            "refreshed": self.refreshed,
            "version": CODE_VERSION,
            "tested_transformers": list(TESTED_TRANSFORMERS),
        }

    def report(self) -> str:
        """Return what people read."""
        return key_value_table(self.to_json())


def refresh(checkpoint: Path | str, *, check: bool = False) -> RefreshResult:
    """Replace the modeling code that a checkpoint carries by this release's; weights and configuration stay.

    What 0.1.0 wrote may load another tokenizer than its source, whose class is then named in tokenizer_config.json.

    A sibling directory is made, with links to the same weights, and changes places with the old one, so that a kill
    leaves one or the other.

    Args:
        checkpoint: A checkpoint that this program wrote, by whatever release.
        check: Only report.

    Raises:
        RequestError: It is no such checkpoint, its directory cannot be written to, or the disk is full.

    Example:
        >>> refresh("HALF").refreshed  # what was compressed now carries the code of now
        False
    """
    if is_hub_id(checkpoint):
        raise RequestError(f"{checkpoint} lies on the hub, where nothing can be replaced; give a directory")
    directory = Path(os.path.realpath(checkpoint))
    source = open_checkpoint(Path(checkpoint))
    if not source.native:
        raise RequestError(
            f"{checkpoint} is a {source.raw_config['model_type']} checkpoint and carries no code of this program; "
            "give a checkpoint that compress or heal wrote"
        )
    before = carried_code(directory)
    if check or not before.changed:
        return RefreshResult(Path(checkpoint), before, False)
    remedy = f"make {directory.parent} writable, or copy the checkpoint elsewhere and refresh that"
    with refusals(directory, remedy), replacing_directory(directory, directory, "refresh") as work:
        copy_tree(directory, work, (*CODE_FILES, "README.md"), _link, follow_links=False)
        write_code(work)
        if before.version == _UNNUMBERED:
            keep_tokenizer(directory, work, _stock_config(source))
        _note(directory / "README.md", work / "README.md")
    return RefreshResult(Path(checkpoint), before, True)


def _stock_config(checkpoint: Checkpoint) -> Any:
    """Return a configuration of the family by which transformers chooses the tokenizer that its checkpoints have."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(checkpoint.family.model_type)
    for name in ("tokenizer_class", "_name_or_path"):
        if isinstance(checkpoint.raw_config.get(name), str):
            setattr(config, name, checkpoint.raw_config[name])
    return config


def _link(old: str, new: str) -> None:
    """Link a file, so that weights are not copied, or copy it where the file system has no links."""
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)


def _note(card: Path, new: Path) -> None:
    """Write the card with a sentence that says which code the checkpoint carries now."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    oldest, newest = TESTED_TRANSFORMERS
    note = (
        f"\n\n> The modeling code of this checkpoint was replaced by that of mea-compress {CODE_VERSION}, tested with "
        f"transformers {oldest} to {newest}; its weights are as they were.\n"
    )
    new.write_text(_CARD_NOTE.sub("\n", text).rstrip("\n") + note, encoding="utf-8")


__all__ = ["CODE_FILES", "CarriedCode", "RefreshResult", "carried_code", "refresh", "write_code"]
