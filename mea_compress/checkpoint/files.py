"""Files and directories that appear whole or not at all, and the sentences for what the disk refuses."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from mea_compress.checkpoint.system import exchange_paths
from mea_compress.checkpoint.untrusted import printable_path
from mea_compress.errors import DiskFullError, WritingError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk and of a quota that is used up."""

DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Error numbers of a place that may not be written to."""

TEMPORARY = ".tmp"
"""What follows the name of a file until it is complete."""

_WRITE_BYTES = 1 << 20  # one system call; larger ones have been measured to be up to ten times slower on ext4
_OTHER_PLACE = "choose an output directory that this user may write to"


def refusal(
    error: OSError | ValueError, path: Path, needed: int | None = None, remedy: str = _OTHER_PLACE
) -> WritingError:
    """Return the sentence for what went wrong when writing.

    Args:
        error: What the system said.
        path: The file or directory.
        needed: Bytes of the file, where that is known.
        remedy: What to do where the place may not be written to.
    """
    number = error.errno if isinstance(error, OSError) else errno.EINVAL
    if number in FULL:
        size = "" if needed is None else f" and this file needs {needed} bytes"
        return DiskFullError(
            f"{printable_path(path)}: the disk or quota is full{size}; free some space and run the same command again"
        )
    if number in DENIED:
        return WritingError(f"{printable_path(path)}: cannot be written ({os.strerror(number)}); {remedy}")
    if number == errno.EFBIG:
        size = "this file has more bytes" if needed is None else f"{needed} bytes are more"
        return WritingError(
            f"{printable_path(path)}: {size} than this file system or limit allows for one file; "
            "give a smaller shard size"
        )
    reason = os.strerror(number) if number else str(error)
    return WritingError(
        f"{printable_path(path)}: writing failed ({reason}); choose another output directory or check the disk"
    )


@contextlib.contextmanager
def refusals(place: Path, remedy: str = _OTHER_PLACE) -> Iterator[None]:
    """Turn every error of the system in the block into a `RequestError` or `DiskFullError`.

    Args:
        place: What is written, for errors that name no file.
        remedy: What to do where it may not be written to.
    """
    try:
        yield
    except OSError as error:
        file = error.filename2 or error.filename  # of a copy, the one that is written
        name = file if isinstance(file, (str, os.PathLike)) else place
        raise refusal(error, Path(name), remedy=remedy) from None


@contextlib.contextmanager
def replacing(path: Path, needed: int, durable: bool = True) -> Iterator[int]:
    """Write a file next to its place, under a temporary name, and rename it when it is complete.

    What a killed process left under the temporary name is removed. Two writers of one file at a time are not expected.

    Args:
        path: The file; what is there is replaced if, and only if, the block ends well.
        needed: Bytes of the file, for the sentence about a full disk.
        durable: Synchronise the file and its directory to disk; without it that is left to the caller.

    Yields:
        A descriptor to write to.

    Raises:
        RequestError: The place cannot be written to, or the disk is full.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        # The mode is that of any new file: the system applies the umask, which is the whole process's.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except (OSError, ValueError) as error:
        raise refusal(error, temporary, needed) from None
    try:
        try:
            yield descriptor
        except BaseException:
            os.close(descriptor)
            raise
        try:
            try:
                if durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except OSError as error:
            raise refusal(error, path, needed) from None
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if durable:
        with contextlib.suppress(OSError):  # not every file system can synchronise a directory
            sync(path.parent)


def write_bytes(
    descriptor: int,
    data: bytes | memoryview,
    position: int,
    path: Path,
    needed: int,
    count_bytes: Callable[[int], object] | None = None,
) -> None:
    """Write bytes to a place in an open file.

    Args:
        descriptor: The file.
        data: What to write.
        position: Where it begins in the file.
        path: The file's name, for the sentence.
        needed: Bytes of the whole file, likewise.
        count_bytes: Called with the number of bytes written since its last call.

    Raises:
        RequestError: The disk is full or refuses.
    """
    view = memoryview(data)
    done = 0
    while done < len(view):
        try:
            count = os.pwrite(descriptor, view[done : done + _WRITE_BYTES], position + done)
        except OSError as error:
            raise refusal(error, path, needed) from None
        done += count
        if count_bytes is not None:
            count_bytes(count)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that the file appears whole or not at all.

    Args:
        path: The file; missing directories above it are made. An existing file is replaced.
        text: What it will hold.

    Raises:
        RequestError: The place cannot be written to, or the disk is full.
    """
    data = text.encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise refusal(error, path.parent) from None
    with replacing(path, len(data)) as descriptor:
        write_bytes(descriptor, data, 0, path, len(data))


def to_json(data: object) -> str:
    """Return JSON with two spaces of indentation and a final newline.

    Numbers that are NaN or infinite, for which JSON has no words, become null.
    """
    return json.dumps(finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def finite(data: object) -> object:
    """Return plain data with None for every number that is NaN or infinite."""
    if isinstance(data, Mapping):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_json(path: Path, data: object) -> None:
    """Write JSON so that the file appears whole or not at all.

    Args:
        path: The file; missing directories above it are made. An existing file is replaced.
        data: Anything that `to_json` takes.

    Raises:
        RequestError: The place cannot be written to, or the disk is full.
    """
    write_text(path, to_json(data))


@contextlib.contextmanager
def replacing_directory(path: Path, like: Path, purpose: str) -> Iterator[Path]:
    """Make a directory in a sibling directory and put it in its place when it is complete.

    Args:
        path: The directory, which must not be there yet unless it is `like`.
        like: A directory whose mode the new one gets. If it is `path`, both change places in one step, and it is then
            removed.
        purpose: Part of the sibling's name, to tell what it is for if a kill leaves it.

    Yields:
        The sibling, empty; it vanishes when the block does not end well.

    Raises:
        OSError: The place cannot be written to, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.{purpose}-", dir=path.parent))
    try:
        yield work
        work.chmod(like.stat().st_mode & 0o777)  # only now: it may forbid writing
        sync_tree(work)
        if path == like:
            exchange(work, path)  # the old one goes with the sibling
        else:
            os.rename(work, path)
    finally:
        with contextlib.suppress(OSError):
            work.chmod(0o700)
        shutil.rmtree(work, ignore_errors=True)


def copy_tree(
    source: Path,
    target: Path,
    skip: Collection[str] = (),
    copy: Callable[[str, str], object] = shutil.copy2,
    follow_links: bool = True,
) -> None:
    """Copy what is in a directory and below it, but for `__pycache__`.

    `shutil.copytree` would go on after an error, and forget whether it was a full disk.

    Args:
        source: The directory.
        target: An existing directory.
        skip: Names right in `source` that are left out.
        copy: Copies one file, or a link where links are not followed.
        follow_links: Copy what links lead to.

    Raises:
        OSError: The disk is full or refuses.
    """
    for entry in os.scandir(source):
        if entry.name == "__pycache__" or entry.name in skip:
            continue
        copied = target / entry.name
        if entry.is_dir(follow_symlinks=follow_links):
            copied.mkdir()
            copy_tree(Path(entry.path), copied, copy=copy, follow_links=follow_links)
            shutil.copystat(entry.path, copied)
        else:
            copy(entry.path, str(copied))


def exchange(new: Path, old: Path) -> None:
    """Let two directories change places, in one step where the system can.

    Elsewhere it takes three renames, and a kill between them leaves the old directory next to its place.
    """
    if exchange_paths(new, old):
        return
    aside = old.with_name(f".{old.name}.before-{os.getpid()}")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise
    os.rename(aside, new)


def sync(path: Path) -> None:
    """Make a file or the entries of a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Make a directory and what is in it durable; weights were synchronised when they were written."""
    for folder, _, files in os.walk(directory):
        for name in files:
            if not name.endswith(".safetensors"):
                sync(Path(folder, name))
        sync(Path(folder))


__all__ = [
    "DENIED",
    "FULL",
    "TEMPORARY",
    "copy_tree",
    "exchange",
    "finite",
    "refusal",
    "refusals",
    "replacing",
    "replacing_directory",
    "sync",
    "sync_tree",
    "to_json",
    "write_bytes",
    "write_json",
    "write_text",
]
