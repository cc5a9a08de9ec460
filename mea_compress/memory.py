"""Giving freed memory back, so that what one layer took does not add up with what the next one takes."""

import contextlib
import ctypes


def release() -> None:
    """Returns freed memory to the system where the C library would keep it (glibc); does nothing elsewhere.

    glibc serves tensors of up to 32 MB from its heap once it has seen some, and a heap of tensors of many sizes grows
    with every layer.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
