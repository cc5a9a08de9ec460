"""The directory a compression works in: beside OUT, a part of it renamed to OUT last, resumable until then.

::

    OUT.partial/
        manifest.json    what the work is made from and which of it is finished; replaced atomically
        layer-00000/     tensors of a composed layer
        checkpoint/      becomes OUT
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mea_compress.errors import DiskFullError, RequestError
from mea_compress.report.tables import write_json

MANIFEST = "manifest.json"
CHECKPOINT = "checkpoint"
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Work that is done again in less than this many seconds is not worth waiting for the disk.
_SAVE_AFTER = 5.0


def partial_path(out: Path) -> Path:
    """Where OUT is built."""
    return out.with_name(out.name + ".partial")


class Workspace:
    """A partial directory that this process holds the lock of; threads of it may share it.

    Attributes:
        work: The partial directory.
        manifest: What is finished; `record` replaces it on disk.
    """

    def __init__(self, work: Path, manifest: dict[str, Any]) -> None:
        self.work = work
        self.manifest = manifest
        self._lock = threading.Lock()
        self._noted: list[Path] = []
        self._saved = time.monotonic()
        self._keeps_layers = bool(manifest.get("layers"))

    @property
    def path(self) -> Path:
        """What becomes OUT."""
        return self.work / CHECKPOINT

    def record(self, section: str, key: str, value: Any) -> None:
        """Notes a finished piece of work whose files are on disk, and with it all that was noted before."""
        with self._lock:
            self.manifest.setdefault(section, {})[key] = value
            self._save()

    def note(self, key: str, folder: Path, **sections: Any) -> None:
        """Notes a finished piece of work, a value in each section, whose files in `folder` need not be on disk yet.

        They and the manifest get there with the next record, or when the last one is some seconds past.
        """
        with self._lock:
            self._noted.append(folder)
            for section, value in sections.items():
                self.manifest.setdefault(section, {})[key] = value
            if time.monotonic() - self._saved > _SAVE_AFTER:
                self._save()

    def keep(self) -> bool:
        """Saves what was noted, if the disk allows it; whether any finished layer is there to go on from."""
        with self._lock, contextlib.suppress(OSError):
            if self._noted:
                self._save()
        return self._keeps_layers

    def _save(self) -> None:
        # In this order, so that after a power cut the manifest names nothing that is not there.
        for folder in self._noted:
            for file in folder.iterdir():
                _sync(file)
            _sync(folder)
        _sync(self.work)
        write_json(self.work / MANIFEST, self.manifest)
        self._noted.clear()
        self._keeps_layers = bool(self.manifest.get("layers"))
        self._saved = time.monotonic()

    def finished(self, section: str, key: str) -> Any:
        """What was noted for a piece of work, or None."""
        return self.manifest.get(section, {}).get(key)

    def clear_unfinished(self) -> None:
        """Removes whatever of the checkpoint is not noted as finished: a kill may have left parts of files."""
        for child in self.path.iterdir():
            if child.is_dir():
                shutil.rmtree(child)
            elif self.finished("shards", child.name) is None:
                child.unlink()

    def publish(self, out: Path) -> None:
        """Makes the checkpoint durable, renames it to OUT and removes the scratch."""
        sync_tree(self.path)
        os.rename(self.path, out)
        with contextlib.suppress(OSError):  # OUT is complete, whatever becomes of what is left
            _sync(out.parent)
            _remove(self.work)


def check_free(out: Path, source: Path) -> None:
    """OUT must be new, its parent must be writable, and neither may lie inside the other.

    Raises:
        RequestError: One of these does not hold.
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise RequestError(f"{out} already exists; choose another output directory or remove it")
    resolved, origin = out.resolve(), source.resolve()
    if resolved == origin or origin in resolved.parents or resolved in origin.parents:
        raise RequestError(f"{out} lies inside the source or around it; choose an output directory elsewhere")
    parent = _existing(resolved.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RequestError(f"{parent} cannot be written to; choose another output directory")


def check_space(out: Path, needed: int) -> None:
    """Refuses before any work when the disk cannot hold the result; what a partial directory holds counts as there.

    Args:
        out: The output directory (it or a parent exists).
        needed: Bytes to be written.

    Raises:
        RequestError: The disk has less room.
    """
    place = _existing(out.resolve())
    there = sum(file.stat().st_size for file in partial_path(out).rglob("*.safetensors"))
    free = shutil.disk_usage(place).free
    if free < needed - there:
        raise RequestError(
            f"{place} has {free / 1e9:.2f} GB free and {(needed - there) / 1e9:.2f} GB are needed; "
            "make room or write elsewhere"
        )


def already_published(out: Path) -> bool:
    """Whether an interrupted run got as far as renaming its result to OUT; if so, its scratch is removed."""
    work = partial_path(out)
    if not out.is_dir() or not work.is_dir() or (work / CHECKPOINT).exists():
        return False
    if not (work / MANIFEST).is_file() and any(work.iterdir()):  # the manifest goes last, so this is something else
        return False
    _remove(work)
    return True


@contextlib.contextmanager
def open_workspace(out: Path, fingerprint: dict[str, Any], resume: bool) -> Iterator[Workspace]:
    """The workspace of OUT, new or taken up again.

    A request that turns out wrong leaves nothing behind; an interruption or a full disk leaves what is finished, for
    ``--resume``.

    Args:
        out: The output directory, not there yet.
        fingerprint: What must be the same for work to be taken up again, by what to call it (``the source``).
        resume: Take up what an interrupted run left.

    Raises:
        RequestError: There is something to take up and `resume` is off, what is there was made from other input,
            another process is at work there, or the disk is full or cannot be written to.
        KeyboardInterrupt: With a message that says how to go on.
    """
    work = partial_path(out)
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise RequestError(f"{work} is in the way and was not made by an interrupted run; move it elsewhere")
    made = _first_missing(work)
    with _writing(work), _locked(work):
        manifest, taken_up = _take_up(work, fingerprint, resume)
        workspace = Workspace(work, manifest)
        try:
            with _writing(work):
                if not taken_up:
                    write_json(work / MANIFEST, manifest)
                workspace.path.mkdir(exist_ok=True)
                workspace.clear_unfinished()
                yield workspace
        except KeyboardInterrupt:
            workspace.keep()
            raise KeyboardInterrupt(f"interrupted; {work} keeps what is finished: add --resume to go on") from None
        except DiskFullError as error:
            if workspace.keep():
                raise DiskFullError(f"{error} (add --resume, {work} keeps what is finished)") from None
            _discard(work, made)
            raise
        except RequestError:
            if not taken_up:
                _discard(work, made)
            raise


def _take_up(work: Path, fingerprint: dict[str, Any], resume: bool) -> tuple[dict[str, Any], bool]:
    """The manifest to go on from, and whether it is that of an earlier run."""
    if (work / MANIFEST).is_file():
        if not resume:
            raise RequestError(f"{work} is left from an interrupted run; add --resume to go on, or delete it")
        return _read_manifest(work / MANIFEST, fingerprint), True
    # A kill before the first manifest leaves nothing but, perhaps, a part of it.
    if not all(child.name.startswith(f".{MANIFEST}.") for child in work.iterdir()):
        raise RequestError(f"{work} is in the way and was not made by an interrupted run; move it elsewhere")
    return {"fingerprint": fingerprint}, False


def _read_manifest(file: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        then = dict(manifest["fingerprint"])
    except (ValueError, KeyError, TypeError, OSError):
        raise RequestError(f"{file} cannot be read; delete {file.parent} and start again") from None
    for what, now in fingerprint.items():
        before = then.get(what)
        if before != now:
            detail = ""
            if isinstance(before, dict) and isinstance(now, dict):
                names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
                detail = " (" + ", ".join(f"{name}: {before.get(name)} -> {now.get(name)}" for name in names) + ")"
            raise RequestError(
                f"{what} changed since the interrupted run{detail}; put it back, or delete {file.parent} to start again"
            )
    return manifest


@contextlib.contextmanager
def _writing(work: Path) -> Iterator[None]:
    """Turns what the operating system refuses into a sentence."""
    try:
        yield
    except OSError as error:
        place = error.filename or work
        if error.errno in _FULL:
            raise DiskFullError(
                f"{place}: the disk or quota is full; free some space and run the command again"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise RequestError(f"{place}: {os.strerror(error.errno)}; choose another output directory") from None
        raise


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Makes the directory where there is none and holds it against other processes; released even by a kill."""
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(
                f"{work} is being written by another process; wait for it or choose another output"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _first_missing(path: Path) -> Path:
    """The uppermost directory that will have to be made."""
    while not path.parent.exists():
        path = path.parent
    return path


def _discard(work: Path, made: Path) -> None:
    """Removes the partial directory and the empty directories that were made above it."""
    shutil.rmtree(work, ignore_errors=True)
    folder = work.parent
    while made != work and folder.is_relative_to(made):
        with contextlib.suppress(OSError):
            folder.rmdir()
        folder = folder.parent


def _remove(work: Path) -> None:
    """Removes a partial directory, the manifest last, so that a kill leaves something that explains itself."""
    for child in work.iterdir():
        if child.name != MANIFEST:
            shutil.rmtree(child) if child.is_dir() else child.unlink()
    (work / MANIFEST).unlink(missing_ok=True)
    work.rmdir()


def sync_tree(directory: Path) -> None:
    """Makes a directory and what is in it durable; weights were synchronised when they were written."""
    for folder, _, files in os.walk(directory):
        for name in files:
            if not name.endswith(".safetensors"):
                _sync(Path(folder, name))
        _sync(Path(folder))


def exchange(new: Path, old: Path) -> None:
    """Puts one directory in the place of another and that one in its own, in one step where the system has one.

    Elsewhere it takes three renames, and a kill between them leaves the old directory beside its place.
    """
    here, swap = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None and rename(here, os.fsencode(new), here, os.fsencode(old), swap) == 0:
        return
    beside = old.with_name(f".{old.name}.before-{os.getpid()}")
    os.rename(old, beside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(beside, old)
        raise
    os.rename(beside, new)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
