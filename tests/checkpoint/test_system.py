"""Calls into the system: what they do on Linux, and that they do nothing where they are missing."""

import errno
import os
import sys

import pytest

from mea_compress.checkpoint import system

linux = pytest.mark.skipif(sys.platform != "linux", reason="calls of Linux")


def missing():
    raise OSError("no C library here")


@pytest.fixture
def file(tmp_path):
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o666)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("library", [missing, object])
def test_without_them_nothing_happens(library, file, tmp_path, monkeypatch):
    monkeypatch.setattr(system, "_library", library)
    system.trim_heap()
    system.raise_trim_threshold()
    system.start_writeback(file)
    assert system.allocate(file, 4096) == errno.ENOSYS and os.fstat(file).st_size == 0
    assert not system.exchange_paths(tmp_path / "a", tmp_path / "b")


@linux
def test_room_is_set_aside(file):
    assert system.allocate(file, 0) == 0 and os.fstat(file).st_size == 0
    assert system.allocate(-1, 4096) == errno.EBADF
    number = system.allocate(file, 10_000)
    assert number in (0, errno.EOPNOTSUPP) and os.fstat(file).st_size == (0 if number else 10_000)


@linux
def test_paths_change_places_in_one_step(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    if not system.exchange_paths(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot")
    assert (tmp_path / "a").read_text() == "b" and (tmp_path / "b").read_text() == "a"
    assert not system.exchange_paths(tmp_path / "a", tmp_path / "absent")


def test_a_page_is_shared_or_not_and_nothing_is_raised(file, tmp_path):
    (tmp_path / "source").write_bytes(b"x" * 8192)
    with open(tmp_path / "source", "rb") as source:
        shared = system.share_page(source.fileno(), file, system.PAGE_BYTES, 0)
    assert os.pread(file, 1, 0) == (b"x" if shared else b"")
    assert not system.share_page(-1, file, 0, 0)


def test_advice_that_nobody_hears_is_no_error(file, monkeypatch):
    system.advise(file, 0, 0, "POSIX_FADV_SEQUENTIAL")
    system.advise(-1, 0, 0, "POSIX_FADV_SEQUENTIAL")
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    system.advise(file, 0, 0, "POSIX_FADV_SEQUENTIAL")


def test_memory_tuning_is_accepted():
    system.raise_trim_threshold()
    system.trim_heap()
