"""The partial directory of OUT, next to it: resumable until its checkpoint is complete and renamed to OUT.

::

    OUT.partial/
        manifest.json    what the work is made from and which of it is finished; replaced atomically
        layer-00000/     tensors of a composed layer
        checkpoint/      becomes OUT
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mea_compress.checkpoint.files import DENIED, FULL, TEMPORARY, refusal, sync, sync_tree, write_json
from mea_compress.checkpoint.untrusted import printable_path
from mea_compress.errors import RequestError, WritingError

MANIFEST = "manifest.json"
CHECKPOINT = "checkpoint"
# Sections of the manifest that take long to make: a profile and layers; checkpoints for a table, and its rows; the
# sequences of a distillation, beside which lies how far it has come.
_RESULTS = ("profile", "layers", "made", "rows", "text")
# Fsync finished layers at most this often (seconds).
_SYNC_INTERVAL = 5.0


def partial_path(out: Path) -> Path:
    """Return where OUT is built."""
    return out.with_name(out.name + ".partial")


class Workspace:
    """A partial directory that this process holds the lock of; threads of it may share it.

    Attributes:
        work: The partial directory.
        manifest: What is finished; `commit` replaces it on disk.
    """

    def __init__(self, work: Path, manifest: dict[str, Any]) -> None:
        self.work = work
        self.manifest = manifest
        self._lock = threading.Lock()
        self._unsynced: list[Path] = []
        self._saved = time.monotonic()
        self._keeps_results = _has_results(manifest)

    @property
    def path(self) -> Path:
        """The directory that becomes OUT."""
        return self.work / CHECKPOINT

    def commit(self, section: str, key: str, value: Any) -> None:
        """Save a result whose files are on disk in the manifest, and with it all that was committed for later.

        Args:
            section: Kind of work, e.g. ``shards``.
            key: Which piece of it.
            value: The result, plain data.
        """
        with self._lock:
            self.manifest.setdefault(section, {})[key] = value
            self._save()

    def commit_later(self, key: str, folder: Path, **sections: Any) -> None:
        """Keep a result, a value in each section, whose files in `folder` need not be on disk yet.

        They and the manifest get there with the next `commit`, or when the last one is some seconds past.
        """
        with self._lock:
            self._unsynced.append(folder)
            for section, value in sections.items():
                self.manifest.setdefault(section, {})[key] = value
            if time.monotonic() - self._saved > _SYNC_INTERVAL:
                self._save()

    def flush(self) -> bool:
        """Save what was committed for later, if the disk allows it; return whether there is a result to go on from."""
        with self._lock, contextlib.suppress(OSError, RequestError):
            if self._unsynced:
                self._save()
        return self._keeps_results

    def _save(self) -> None:
        # In this order, so that after a power cut the manifest names nothing that is not there.
        for folder in self._unsynced:
            for file in folder.iterdir():
                sync(file)
            sync(folder)
        sync(self.work)
        write_json(self.work / MANIFEST, self.manifest)
        self._unsynced.clear()
        self._keeps_results = _has_results(self.manifest)
        self._saved = time.monotonic()

    def result_of(self, section: str, key: str) -> Any:
        """Return what was committed for a piece of work, or None."""
        return self.manifest.get(section, {}).get(key)

    def clear_unfinished(self) -> None:
        """Remove whatever of the checkpoint was not committed: a kill may have left parts of files."""
        for child in self.path.iterdir():
            if child.is_dir():
                shutil.rmtree(child)
            elif self.result_of("shards", child.name) is None:
                child.unlink()

    def discard(self) -> None:
        """Remove all of it: what it was for is elsewhere."""
        with contextlib.suppress(OSError):
            _remove(self.work)

    def publish(self, out: Path) -> None:
        """Make the checkpoint durable, rename it to OUT and remove the scratch."""
        sync_tree(self.path)
        os.rename(self.path, out)
        with contextlib.suppress(OSError):  # OUT is complete, whatever becomes of what is left
            sync(out.parent)
            _remove(self.work)


class FollowedWorkspace(Workspace):
    """What another process than the first one has of a workspace: it reads there, and only remembers what is finished.

    Args:
        out: The output directory.
        manifest: That of the first process.
    """

    def __init__(self, out: Path, manifest: dict[str, Any]) -> None:
        super().__init__(partial_path(out), manifest)

    def _save(self) -> None:
        self._unsynced.clear()


def _has_results(manifest: Mapping[str, Any]) -> bool:
    return any(manifest.get(section) for section in _RESULTS)


def check_free(out: Path, source: Path) -> None:
    """Check that OUT is new, that its parent is writable, and that neither it nor the source lies inside the other.

    Raises:
        RequestError: One of these does not hold.
    """
    longest = 255 - len(partial_path(Path("x")).name) + 1
    if len(os.fsencode(out.name)) > longest:
        raise RequestError(
            f"the name of {printable_path(out)} has more than {longest} bytes, and its partial directory could not be "
            "made; choose a shorter one"
        )
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise RequestError(f"{printable_path(out)} already exists; choose another output directory or remove it")
    resolved, origin = out.resolve(), source.resolve()
    if resolved == origin or origin in resolved.parents or resolved in origin.parents:
        raise RequestError(
            f"{printable_path(out)} lies inside the source or around it; choose an output directory elsewhere"
        )
    parent = _existing(resolved.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RequestError(f"{printable_path(parent)} cannot be written to; choose another output directory")


def check_space(out: Path, needed: int) -> None:
    """Check before any work that the disk can hold the result; what a partial directory holds counts as there.

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
            f"{printable_path(place)} has {free / 1e9:.2f} GB free and {(needed - there) / 1e9:.2f} GB are needed; "
            "make room or write elsewhere"
        )


def already_published(out: Path) -> bool:
    """Return whether an interrupted run got as far as renaming its result to OUT; if so, its scratch is removed."""
    work = partial_path(out)
    if not out.is_dir() or not work.is_dir() or (work / CHECKPOINT).exists():
        return False
    if not (work / MANIFEST).is_file() and any(work.iterdir()):  # the manifest goes last, so this is something else
        return False
    _remove(work)
    return True


def unfinished_result(out: Path, section: str, key: str) -> Any:
    """Return what an interrupted run committed for a piece of work, None where it left nothing of it."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        return json.loads((partial_path(out) / MANIFEST).read_text(encoding="utf-8")).get(section, {}).get(key)
    return None


def remove_partial(out: Path) -> None:
    """Remove what an interrupted run left.

    Raises:
        RequestError: Another process is at work there.
    """
    with _locked(partial_path(out)):
        _remove(partial_path(out))


@contextlib.contextmanager
def open_workspace(out: Path, fingerprint: dict[str, Any], resume: bool) -> Iterator[Workspace]:
    """Open the workspace of OUT, new or taken up again.

    A request that turns out wrong leaves nothing behind; an interruption, and a place that is full or refuses what is
    written, leave what is finished, for ``--resume``.

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
        raise RequestError(
            f"{printable_path(work)} is in the way and was not made by an interrupted run; move it elsewhere"
        )
    topmost = _first_missing(work)
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
            workspace.flush()
            raise KeyboardInterrupt(
                f"interrupted; {printable_path(work)} keeps what is finished: add --resume to go on"
            ) from None
        except WritingError as error:
            if workspace.flush():
                raise type(error)(f"{error} (add --resume, {printable_path(work)} keeps what is finished)") from None
            _discard(work, topmost)
            raise
        except Exception as error:
            # Nothing to go on from: a wrong request, or a defect before the first layer was finished.
            if not taken_up and (isinstance(error, RequestError) or not workspace.flush()):
                _discard(work, topmost)
            raise


def _take_up(work: Path, fingerprint: dict[str, Any], resume: bool) -> tuple[dict[str, Any], bool]:
    """Return the manifest to go on from, and whether it is that of an earlier run."""
    if (work / MANIFEST).is_file():
        if not resume:
            raise RequestError(
                f"{printable_path(work)} is left from an interrupted run; add --resume to go on, or delete it"
            )
        return _read_manifest(work / MANIFEST, fingerprint), True
    # A kill before the first manifest leaves nothing but, perhaps, a part of it.
    if not all(child.name == MANIFEST + TEMPORARY for child in work.iterdir()):
        raise RequestError(
            f"{printable_path(work)} is in the way and was not made by an interrupted run; move it elsewhere"
        )
    return {"fingerprint": fingerprint}, False


def _read_manifest(file: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        earlier = dict(manifest["fingerprint"])
    except (ValueError, KeyError, TypeError, OSError):
        raise RequestError(
            f"{printable_path(file)} cannot be read; delete {printable_path(file.parent)} and start again"
        ) from None
    for what, after in fingerprint.items():
        before = earlier.get(what)
        if before != after:
            detail = ""
            if isinstance(before, dict) and isinstance(after, dict):
                names = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
                detail = " (" + ", ".join(f"{name}: {before.get(name)} -> {after.get(name)}" for name in names) + ")"
            raise RequestError(
                f"{what} changed since the interrupted run{detail}; put it back, "
                f"or delete {printable_path(file.parent)} to start again"
            )
    return manifest


@contextlib.contextmanager
def _writing(work: Path) -> Iterator[None]:
    """Turn a full disk and a place that may not be written to into sentences; anything else is a defect."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*FULL, *DENIED):
            raise
        raise refusal(error, Path(error.filename or work)) from None


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Make the directory where there is none and hold it against other processes; a kill releases it.

    The lock is on the directory itself. A lock file, as the package filelock makes one, is not removed when the lock is
    released: it would be left next to OUT, or be put into a directory that turns out to be somebody else's. Where a
    file system has no flock, that package also falls back to a file that a killed process leaves locked.
    """
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(
                f"{printable_path(work)} is being written by another process; wait for it or choose another output"
            ) from None
        except OSError as error:  # some network file systems have no locks
            print(
                f"warning: {printable_path(work)} cannot be locked ({error.strerror}): see to it that no other process "
                "writes there",
                file=sys.stderr,
            )
        yield
    finally:
        os.close(descriptor)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _first_missing(path: Path) -> Path:
    """Return the uppermost directory that will have to be made."""
    while not path.parent.exists():
        path = path.parent
    return path


def _discard(work: Path, topmost: Path) -> None:
    """Remove the partial directory and the empty directories that were made above it, from `topmost` down."""
    shutil.rmtree(work, ignore_errors=True)
    folder = work.parent
    while topmost != work and folder.is_relative_to(topmost):
        with contextlib.suppress(OSError):
            folder.rmdir()
        folder = folder.parent


def _remove(work: Path) -> None:
    """Remove a partial directory, the manifest last, so that a kill leaves something that explains itself."""
    for child in work.iterdir():
        if child.name != MANIFEST:
            shutil.rmtree(child) if child.is_dir() else child.unlink()
    (work / MANIFEST).unlink(missing_ok=True)
    work.rmdir()


__all__ = [
    "CHECKPOINT",
    "MANIFEST",
    "FollowedWorkspace",
    "Workspace",
    "already_published",
    "check_free",
    "check_space",
    "open_workspace",
    "partial_path",
    "remove_partial",
    "unfinished_result",
]
