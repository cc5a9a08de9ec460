"""The directory a compression works in: beside OUT, renamed to OUT last, resumable until then."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mea_compress.errors import RequestError
from mea_compress.report import write_json

WORK = ".work"


def partial_path(out: Path) -> Path:
    """Where OUT is built."""
    return out.with_name(out.name + ".partial")


class Workspace:
    """OUT.partial: finished shards and files, and below ``.work`` one directory per finished layer and a manifest.

    Attributes:
        path: The partial directory.
        manifest: What is finished; `record` replaces it on disk atomically.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @property
    def work(self) -> Path:
        """Scratch that OUT will not have."""
        return self.path / WORK

    def record(self, section: str, key: str, value: Any) -> None:
        """Notes a finished piece of work."""
        self.manifest.setdefault(section, {})[key] = value
        write_json(self.work / "manifest.json", self.manifest)

    def finished(self, section: str, key: str) -> Any:
        """What was noted for a piece of work, or None."""
        return self.manifest.get(section, {}).get(key)

    def publish(self, out: Path) -> None:
        """Removes the scratch, makes the rest durable and renames it to OUT."""
        shutil.rmtree(self.work)
        _sync(self.path)
        os.rename(self.path, out)
        _sync(out.parent)


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
    parent = resolved.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RequestError(f"{parent} cannot be written to; choose another output directory")


def check_space(out: Path, needed: int) -> None:
    """Refuses before any work when the disk cannot hold the result.

    Args:
        out: The output directory (it or a parent exists).
        needed: Bytes to be written.

    Raises:
        RequestError: The disk has less room.
    """
    place = out.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise RequestError(
            f"{place} has {free / 1e9:.2f} GB free and the result needs {needed / 1e9:.2f} GB; "
            "make room or write elsewhere"
        )


@contextlib.contextmanager
def open_workspace(out: Path, fingerprint: dict[str, Any], resume: bool) -> Iterator[Workspace]:
    """The workspace of OUT, new or taken up again.

    A request that turns out wrong leaves nothing behind; an interruption leaves what is finished, for ``--resume``.

    Args:
        out: The output directory, not there yet.
        fingerprint: What must be the same for work to be taken up again, by what to call it (``the source``).
        resume: Take up what an interrupted run left.

    Raises:
        RequestError: There is something to take up and `resume` is off, what is there was made from other input,
            or another process is at work there.
    """
    path = partial_path(out)
    manifest_file = path / WORK / "manifest.json"
    manifest: dict[str, Any] = {"fingerprint": fingerprint}
    taken_up = False
    if path.exists():
        if manifest_file.is_file():
            if not resume:
                raise RequestError(f"{path} is left from an interrupted run; add --resume to go on, or delete it")
            manifest, taken_up = _read_manifest(manifest_file, fingerprint), True
        elif any(path.iterdir()) and not _is_remains(path):
            raise RequestError(f"{path} is in the way and was not made by an interrupted run; move it elsewhere")
    (path / WORK).mkdir(parents=True, exist_ok=True)
    with _locked(path):
        workspace = Workspace(path, manifest)
        if not taken_up:
            write_json(manifest_file, manifest)
        try:
            yield workspace
        except RequestError:
            if not taken_up:
                shutil.rmtree(path, ignore_errors=True)
            raise


def _is_remains(path: Path) -> bool:
    """Only the scratch directory: what a kill leaves before the first manifest or while publishing."""
    return (path / WORK).is_dir() and not any(child.suffix == ".safetensors" for child in path.iterdir())


def _read_manifest(file: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        then = manifest["fingerprint"]
    except (ValueError, KeyError, TypeError, OSError):
        raise RequestError(f"{file} cannot be read; delete {file.parent.parent} and start again") from None
    for what, now in fingerprint.items():
        if then.get(what) != now:
            raise RequestError(f"{what} changed since the interrupted run; delete {file.parent.parent} to start again")
    return manifest


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path / WORK, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(
                f"{path} is being written by another process; wait for it or choose another output"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
