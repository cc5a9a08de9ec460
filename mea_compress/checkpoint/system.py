"""Calls into the system that Python's library does not have, for glibc and Linux; elsewhere they do nothing."""

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import sys
from functools import cache
from pathlib import Path

PAGE_BYTES = 4096
"""Size of the pages in which files are cached, and of the blocks in which they are stored."""

_CLONE_RANGE = 0x4020940D  # FICLONERANGE of Linux
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt
_SYNC_FILE_RANGE_WRITE = 2
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA's, AMD's, and either's within Windows
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@cache
def _library() -> ctypes.CDLL:
    """Return the C library that this process runs with."""
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> int:
    """Call a function of the C library; return its error number, 0 where all is well and ENOSYS where it has none."""
    try:
        function = getattr(_library(), name)
    except (AttributeError, OSError):
        return errno.ENOSYS
    return ctypes.get_errno() if function(*arguments) else 0


def trim_heap() -> None:
    """Return freed memory to the system where glibc's malloc would keep it.

    It serves tensors of up to 32 MB from its heap once it has seen some, and a heap of tensors of many sizes grows with
    every layer.
    """
    _call("malloc_trim", 0)


def raise_trim_threshold() -> None:
    """Have glibc's malloc keep up to 256 MB of freed memory, so that layers of the same sizes find it again.

    Fresh memory is cleared by the system page by page, which takes longer than a weights-only fit computes, and a
    fifth of a calibrated one's passes. It holds for the rest of the process; `trim_heap` returns what is kept.
    """
    _call("mallopt", _M_MMAP_THRESHOLD, 32 << 20)
    _call("mallopt", _M_TRIM_THRESHOLD, 256 << 20)


def allocate(descriptor: int, nbytes: int) -> int:
    """Set room for a file aside, where the file system can; return the error number, or 0.

    The C library's own `posix_fallocate` would write to every block where the file system cannot.
    """
    return _call("fallocate", descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) if nbytes else 0


def start_writeback(descriptor: int) -> None:
    """Have the system begin to write a file to disk, without waiting for it."""
    whole = ctypes.c_int64(0)
    _call("sync_file_range", descriptor, whole, whole, _SYNC_FILE_RANGE_WRITE)


def exchange_paths(first: Path, second: Path) -> bool:
    """Let two paths change places in one step; return whether the system could."""
    paths = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second))
    return not _call("renameat2", *paths, _RENAME_EXCHANGE)


def share_page(source: int, target: int, offset: int, position: int) -> bool:
    """Let a file have a page of another one instead of a copy (Btrfs, XFS); return whether the file system could.

    Args:
        source: Descriptor of the file that has the page.
        target: Descriptor of the file that gets it.
        offset: Where the page begins in the source, a multiple of `PAGE_BYTES`.
        position: Where it begins in the target, likewise.
    """
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(target, _CLONE_RANGE, struct.pack("qQQQ", source, offset, PAGE_BYTES, position))
    except OSError:
        return False
    return True


def memory_bytes() -> int | None:
    """Return the memory of this machine, or of the container that this process runs in; None where nobody says."""
    limits = []
    with contextlib.suppress(OSError, ValueError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            limits.append(int(Path(file).read_text(encoding="ascii")))
    return min((limit for limit in limits if limit > 0), default=None)


def gpu_bytes(device: str) -> int | None:
    """Return the memory of the GPU that a device such as ``auto`` or ``cuda:0`` is; None where it is none."""
    if device == "cpu" or not any(Path(file).exists() for file in _GPU_DRIVERS):  # or PyTorch is loaded for nothing
        return None
    import torch

    number = int(device.partition(":")[2] or 0)
    return int(torch.cuda.get_device_properties(number).total_memory) if number < torch.cuda.device_count() else None


def has_bfloat16_products() -> bool:
    """Return whether this processor multiplies matrices in bfloat16, as far as the system says so."""
    with contextlib.suppress(OSError):
        return any(flag in Path("/proc/cpuinfo").read_text() for flag in ("amx_bf16", "avx512_bf16"))
    return False


def advise(descriptor: int, offset: int, nbytes: int, advice: str) -> None:
    """Tell the system how a range of a file will be used, by the name of a constant of `os`, where it listens."""
    with contextlib.suppress(AttributeError, OSError):
        os.posix_fadvise(descriptor, offset, nbytes, getattr(os, advice))


__all__ = [
    "PAGE_BYTES",
    "advise",
    "allocate",
    "exchange_paths",
    "gpu_bytes",
    "has_bfloat16_products",
    "memory_bytes",
    "raise_trim_threshold",
    "share_page",
    "start_writeback",
    "trim_heap",
]
