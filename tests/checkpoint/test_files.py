"""Files and directories that appear whole or not at all."""

import errno
import json
import math
import os
import stat
import threading
from pathlib import Path

import pytest

from mea_compress.checkpoint import files, system
from mea_compress.checkpoint.files import (
    copy_tree,
    exchange,
    refusal,
    refusals,
    replacing,
    replacing_directory,
    write_bytes,
    write_json,
    write_text,
)
from mea_compress.errors import DiskFullError, RequestError


def failing(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


class TestJson:
    def test_whole_or_not_at_all(self, tmp_path):
        path = tmp_path / "deep" / "a.json"
        write_json(path, {"é": [1, 2.5, None]})
        assert json.loads(path.read_text("utf-8")) == {"é": [1, 2.5, None]}
        before = path.read_bytes()
        with pytest.raises(TypeError):
            write_json(path, {"x": object()})
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == ["a.json"]

    def test_numbers_that_json_has_no_words_for_become_null(self, tmp_path):
        write_json(tmp_path / "a.json", {"x": math.nan, "of": [(1.5, math.inf), {"y": -math.inf}]})
        assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "of": [[1.5, None], {"y": None}]}

    def test_a_failed_replace_leaves_nothing_behind(self, tmp_path):
        (tmp_path / "taken").mkdir()
        with pytest.raises(RequestError, match="taken: writing failed"):
            write_json(tmp_path / "taken", {})
        assert os.listdir(tmp_path) == ["taken"]

    def test_permissions_follow_the_umask(self, tmp_path):
        (tmp_path / "plain").write_text("")
        write_json(tmp_path / "a.json", {})
        assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode

    @pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, DiskFullError), (errno.EACCES, RequestError)])
    @pytest.mark.parametrize("call", ["open", "pwrite", "fsync", "replace"])
    def test_what_the_disk_refuses_is_a_sentence_and_leaves_the_old_file(
        self, tmp_path, monkeypatch, call, number, error
    ):
        write_json(tmp_path / "a.json", {"old": 1})
        monkeypatch.setattr(os, call, failing(number))
        with pytest.raises(error, match=r"a\.json.*; (free some space|choose an output directory)"):
            write_json(tmp_path / "a.json", {"new": 2})
        monkeypatch.undo()
        assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
        assert os.listdir(tmp_path) == ["a.json"]

    def test_a_directory_above_that_cannot_be_made_is_a_sentence(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(RequestError, match="writing failed"):
            write_json(tmp_path / "file" / "a.json", {})


def test_the_umask_of_the_process_is_never_touched(tmp_path, monkeypatch):
    """It is one for all threads: a file that another one creates meanwhile would be open to everybody."""
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the umask was changed"))
    write_json(tmp_path / "a.json", {})


def test_a_file_that_another_thread_creates_meanwhile_has_the_usual_mode(tmp_path):
    (tmp_path / "usual").write_text("")
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    modes, stop = set(), threading.Event()

    def create():
        number = 0
        while not stop.is_set():
            path = tmp_path / f"other-{number % 50}"
            path.unlink(missing_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            modes.add(stat.S_IMODE(path.stat().st_mode))
            number += 1

    thread = threading.Thread(target=create)
    thread.start()
    try:
        for number in range(200):
            write_json(tmp_path / "a.json", {"number": number})
            modes.add(stat.S_IMODE((tmp_path / "a.json").stat().st_mode))
    finally:
        stop.set()
        thread.join()
    assert modes == {usual}


def test_a_restrictive_umask_holds_from_the_first_moment(tmp_path):
    before = os.umask(0o077)
    try:
        with replacing(tmp_path / "a", 1) as descriptor:
            assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o600
            write_bytes(descriptor, b"x", 0, tmp_path / "a", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_a_leftover_of_a_killed_process_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "precious").write_text("keep me")
    (tmp_path / "a.json.tmp").symlink_to("precious")
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "precious").read_text() == "keep me"
    assert sorted(os.listdir(tmp_path)) == ["a.json", "precious"]


def test_long_text_is_written_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_WRITE_BYTES", 7)
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: whole(fd, data[:3], offset))
    write_text(tmp_path / "a", "äöü" * 20)
    assert (tmp_path / "a").read_text(encoding="utf-8") == "äöü" * 20


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk or quota is full and this file needs 7 bytes; free some space"),
        (errno.EDQUOT, "the disk or quota is full"),
        (errno.EROFS, "cannot be written (Read-only file system); do this instead"),
        (errno.EFBIG, "7 bytes are more than this file system or limit allows"),
        (errno.EIO, "writing failed (Input/output error); choose another output directory"),
    ],
)
def test_sentences(number, words):
    sentence = str(refusal(OSError(number, ""), Path("here\n"), 7, "do this instead"))
    assert words in sentence and sentence.startswith("'here\\n': ") and not sentence.endswith(".")


def test_the_file_of_an_error_is_named(tmp_path):
    with pytest.raises(RequestError, match="the-file: cannot be written"), refusals(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", "the-file")
    with pytest.raises(DiskFullError, match=r"^to: the disk or quota is full"), refusals(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device", "from", None, "to")
    with pytest.raises(DiskFullError, match=f"^{tmp_path}: the disk or quota is full; free"), refusals(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("in_one_step", [True, False])
def test_directories_change_places(tmp_path, monkeypatch, in_one_step):
    if not in_one_step:
        monkeypatch.setattr(system, "_library", lambda: None)
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "what").write_text(name)
    exchange(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "what").read_text() == "new"
    assert (tmp_path / "new" / "what").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["new", "old"]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_directory_appears_whole(in_place, tmp_path):
    old = tmp_path / "old"
    old.mkdir(mode=0o750)
    (old / "what").write_text("old")
    out = old if in_place else tmp_path / "above" / "out"
    with replacing_directory(out, old, "test") as work:
        (work / "what").write_text("new")
        assert (old / "what").read_text() == "old" and work.parent == out.parent
    assert (out / "what").read_text() == "new" and stat.S_IMODE(out.stat().st_mode) == 0o750
    assert (old / "what").read_text() == ("new" if in_place else "old")
    assert os.listdir(out.parent) == [out.name]


def test_a_directory_gets_a_mode_that_forbids_writing_when_it_is_written(tmp_path):
    (tmp_path / "old").mkdir(mode=0o555)
    with replacing_directory(tmp_path / "new", tmp_path / "old", "test") as work:
        assert work.stat().st_mode & stat.S_IWUSR
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o555


def test_a_directory_that_is_not_finished_does_not_appear(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    (old / "what").write_text("old")
    with pytest.raises(ZeroDivisionError), replacing_directory(old, old, "test") as work:
        (work / "what").write_text("new")
        raise ZeroDivisionError
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    with pytest.raises(OSError), replacing_directory(tmp_path / "taken", old, "test"):
        pass
    assert (old / "what").read_text() == "old" and (tmp_path / "taken" / "mine").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["old", "taken"]


@pytest.mark.parametrize("follow_links", [True, False])
def test_a_tree_is_copied(follow_links, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "sub" / "__pycache__").mkdir(parents=True)
    for name in ("a", "skipped", "sub/skipped", ".hidden", "sub/__pycache__/b"):
        (source / name).write_text(name)
    (source / "a").chmod(0o640)
    (source / "sub").chmod(0o750)
    (source / "link").symlink_to("a")
    (source / "folder").symlink_to("sub")
    target.mkdir()
    copy = (lambda old, new: os.link(old, new, follow_symlinks=False)) if not follow_links else None
    copy_tree(source, target, ["skipped"], **({"copy": copy} if copy else {}), follow_links=follow_links)
    assert sorted(os.listdir(target)) == [".hidden", "a", "folder", "link", "sub"]
    assert os.listdir(target / "sub") == ["skipped"] == os.listdir(target / "folder")
    assert (target / "link").is_symlink() is (target / "folder").is_symlink() is not follow_links
    assert (target / "link").read_text() == "a"
    assert stat.S_IMODE((target / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((target / "sub").stat().st_mode) == 0o750


def test_an_error_of_copying_a_tree_keeps_its_number(tmp_path):
    (tmp_path / "source" / "sub").mkdir(parents=True)
    (tmp_path / "source" / "sub" / "a").write_text("")
    (tmp_path / "target").mkdir()
    with pytest.raises(OSError) as caught:
        copy_tree(tmp_path / "source", tmp_path / "target", copy=failing(errno.ENOSPC))
    assert caught.value.errno == errno.ENOSPC
