"""What becomes of freed memory: given back, so that layers do not add up, or kept for layers of the same sizes."""

import contextlib
import ctypes


def release() -> None:
    """Returns freed memory to the system where the C library would keep it (glibc); does nothing elsewhere.

    glibc serves tensors of up to 32 MB from its heap once it has seen some, and a heap of tensors of many sizes grows
    with every layer.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed() -> None:
    """Has the C library keep freed memory (glibc, up to 256 MB): layer after layer of the same sizes finds it again.

    Fresh memory is cleared by the system page by page, which takes longer than a weights-only fit computes. It
    holds for the rest of the process; `release` gives back what is kept.
    """
    largest_in_heap, kept = (-3, 32 << 20), (-1, 256 << 20)  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
    with contextlib.suppress(AttributeError, OSError):
        for parameter in (largest_in_heap, kept):
            ctypes.CDLL(None).mallopt(*parameter)
