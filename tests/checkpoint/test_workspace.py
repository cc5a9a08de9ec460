import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mea_compress.checkpoint import workspace as workspace_module
from mea_compress.checkpoint.workspace import (
    MANIFEST,
    already_published,
    check_free,
    check_space,
    open_workspace,
    partial_path,
)
from mea_compress.errors import DiskFullError, RequestError, WritingError

INPUT = {"the source": "a", "the recipe": "b", "a library version": {"torch": "1", "numpy": "2"}}


def leave_behind(out):
    """A run that was interrupted after one layer."""
    with pytest.raises(KeyboardInterrupt), open_workspace(out, INPUT, resume=False) as workspace:
        workspace.commit("layers", "0", {"components": 2})
        (workspace.path / "half.json").write_text("{")
        raise KeyboardInterrupt


def test_published_at_once_and_nothing_beside_it(tmp_path):
    out = tmp_path / "above" / "out"
    with open_workspace(out, INPUT, resume=False) as workspace:
        (workspace.path / "sub").mkdir()
        (workspace.path / "sub" / "file").write_text("x")
        (workspace.work / "layer-00000").mkdir()
        assert not out.exists()
        workspace.publish(out)
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert [str(p.relative_to(out)) for p in out.rglob("*")] == ["sub", "sub/file"]


def test_an_interruption_says_how_to_go_on_and_keeps_what_is_finished(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt, match="--resume"), open_workspace(out, INPUT, resume=False) as workspace:
        workspace.commit("layers", "0", 7)
        raise KeyboardInterrupt
    with open_workspace(out, INPUT, resume=True) as workspace:
        assert workspace.result_of("layers", "0") == 7
        assert workspace.result_of("layers", "1") is None


def test_parts_of_files_do_not_survive(tmp_path):
    leave_behind(tmp_path / "out")
    with open_workspace(tmp_path / "out", INPUT, resume=True) as workspace:
        assert list(workspace.path.iterdir()) == []


def test_what_is_left_is_not_taken_up_unasked(tmp_path):
    leave_behind(tmp_path / "out")
    with pytest.raises(RequestError, match="add --resume"), open_workspace(tmp_path / "out", INPUT, resume=False):
        pass
    assert (partial_path(tmp_path / "out") / MANIFEST).is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"the source": "x"}, "the source changed"),
        ({"the recipe": "x"}, "the recipe changed"),
        ({"a library version": {"torch": "9", "numpy": "2"}}, r"a library version changed .*\(torch: 1 -> 9\)"),
    ],
)
def test_work_made_from_something_else_is_not_taken_up(change, said, tmp_path):
    leave_behind(tmp_path / "out")
    with pytest.raises(RequestError, match=said), open_workspace(tmp_path / "out", INPUT | change, resume=True):
        pass
    with open_workspace(tmp_path / "out", INPUT, resume=True):
        pass


@pytest.mark.parametrize("text", ["", "[]", "{", '{"fingerprint": 3}'])
def test_a_damaged_manifest_is_refused(text, tmp_path):
    leave_behind(tmp_path / "out")
    (partial_path(tmp_path / "out") / MANIFEST).write_text(text)
    with pytest.raises(RequestError, match="cannot be read"), open_workspace(tmp_path / "out", INPUT, resume=True):
        pass


@pytest.mark.parametrize("kind", ["file", "foreign", "link"])
def test_what_somebody_else_put_there_is_not_touched(kind, tmp_path):
    partial = partial_path(tmp_path / "out")
    if kind == "file":
        partial.write_text("mine")
    elif kind == "foreign":
        partial.mkdir()
        (partial / "mine").write_text("mine")
    else:
        (tmp_path / "elsewhere").mkdir()
        partial.symlink_to(tmp_path / "elsewhere")
    for resume in (False, True):
        with pytest.raises(RequestError, match="in the way"), open_workspace(tmp_path / "out", INPUT, resume):
            pass
    assert os.path.lexists(partial)
    assert kind != "foreign" or (partial / "mine").read_text() == "mine"


def test_a_wrong_request_leaves_nothing_not_even_directories_above(tmp_path):
    with (
        pytest.raises(RequestError, match="no"),
        open_workspace(tmp_path / "a" / "b" / "out", INPUT, resume=False) as workspace,
    ):
        workspace.commit("layers", "0", 1)
        raise RequestError("no")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_refuses_keeps_what_is_finished(tmp_path):
    with (
        pytest.raises(WritingError, match=r"cannot be written .*--resume, .*out\.partial keeps what is finished\)$"),
        open_workspace(tmp_path / "out", INPUT, resume=False) as workspace,
    ):
        workspace.commit_later("0", tmp_path, layers=1)
        raise OSError(errno.EACCES, "Permission denied", "file")
    with open_workspace(tmp_path / "out", INPUT, resume=True) as workspace:
        assert workspace.result_of("layers", "0") == 1


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with open_workspace(tmp_path / "out", INPUT, resume=False) as workspace:
        workspace.publish(tmp_path / "out")
    assert "out.partial cannot be locked (No locks available)" in capsys.readouterr().err


def test_a_wrong_request_does_not_throw_an_earlier_run_away(tmp_path):
    leave_behind(tmp_path / "out")
    with pytest.raises(RequestError), open_workspace(tmp_path / "out", INPUT, resume=True):
        raise RequestError("no")
    assert partial_path(tmp_path / "out").is_dir()


@pytest.mark.parametrize("finished", [None, "calibration", "profile", "layers", "made", "rows", "text"])
def test_a_full_disk_keeps_finished_work_only(finished, tmp_path):
    with pytest.raises(DiskFullError) as refusal, open_workspace(tmp_path / "out", INPUT, resume=False) as workspace:
        if finished:
            workspace.commit(finished, "0", 1)
        raise OSError(errno.ENOSPC, "No space left on device", "file")
    kept = finished not in (None, "calibration")  # text is read or sampled again as it was
    assert ("--resume" in str(refusal.value)) == kept
    assert partial_path(tmp_path / "out").exists() == kept


def test_a_directory_that_cannot_be_made_is_a_sentence(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(args[0]))

    monkeypatch.setattr(os, "mkdir", refuse)
    with (
        pytest.raises(RequestError, match="choose an output directory"),
        open_workspace(tmp_path / "out", INPUT, False),
    ):
        pass


HOLDER = """
import sys, time
from pathlib import Path
from mea_compress.checkpoint.workspace import open_workspace
with open_workspace(Path(sys.argv[1]), {"the source": "a"}, resume=False) as workspace:
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.process
def test_only_one_process_at_a_time_and_a_kill_lets_go(tmp_path):
    out = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        for resume in (False, True):
            with (
                pytest.raises(RequestError, match="another process"),
                open_workspace(out, {"the source": "a"}, resume=resume),
            ):
                pass
        assert (partial_path(out) / MANIFEST).is_file()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with open_workspace(out, {"the source": "a"}, resume=True):
        pass


def test_a_kill_right_after_publishing_is_cleaned_up(tmp_path):
    out = tmp_path / "out"
    assert not already_published(out)
    leave_behind(out)
    assert not already_published(out)
    partial = partial_path(out)
    (partial / "checkpoint" / "half.json").unlink()
    (partial / "checkpoint").rename(out)
    assert already_published(out)
    assert not partial.exists()
    assert out.is_dir()
    partial.mkdir()  # the last but one thing that goes is the manifest
    assert already_published(out)
    assert not partial.exists()


def test_space_is_checked_before_any_work(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    check_space(tmp_path / "not" / "yet" / "out", 1000)
    with pytest.raises(RequestError, match="make room"):
        check_space(tmp_path / "out", 1001)
    layer = partial_path(tmp_path / "out") / "layer-00000"
    layer.mkdir(parents=True)
    (layer / "model.safetensors").write_bytes(b"x" * 10)
    check_space(tmp_path / "out", 1010)


def test_out_must_be_new_and_apart_from_the_source(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    check_free(tmp_path / "new", source)
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / "empty", source)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (source, source / "inside", tmp_path, tmp_path / "link", source / "config.json"):
        with pytest.raises(RequestError, match=r"another output directory|elsewhere"):
            check_free(out, source)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(RequestError, match="cannot be written to"):
        check_free(tmp_path / "new", source)


def test_the_manifest_is_never_half_written(tmp_path):
    with open_workspace(tmp_path / "out", INPUT, resume=False) as workspace:
        for number in range(5):
            workspace.commit("layers", str(number), {"n": number})
            stored = json.loads(Path(workspace.work, MANIFEST).read_text())
            assert stored["layers"][str(number)] == {"n": number}
        assert sorted(p.name for p in workspace.work.iterdir()) == ["checkpoint", MANIFEST]


def finished_layer(workspace, number):
    folder = workspace.work / f"layer-{number:05d}"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x")
    workspace.commit_later(str(number), folder, layers={"n": number}, fidelity=number / 2)
    return folder


def on_disk(workspace):
    return json.loads((workspace.work / MANIFEST).read_text()).get("layers", {})


def test_noted_work_reaches_the_disk_with_the_next_record_and_never_before_its_files(tmp_path, monkeypatch):
    done = []
    real_sync, real_write = workspace_module.sync, workspace_module.write_json
    monkeypatch.setattr(workspace_module, "sync", lambda path: (done.append(path.name), real_sync(path)))
    monkeypatch.setattr(
        workspace_module, "write_json", lambda path, data: (done.append(path.name), real_write(path, data))
    )
    with open_workspace(tmp_path / "out", INPUT, resume=False) as workspace:
        folders = [finished_layer(workspace, number) for number in range(2)]
        assert workspace.result_of("layers", "1") == {"n": 1} and workspace.result_of("fidelity", "1") == 0.5
        assert on_disk(workspace) == {}
        done.clear()
        workspace.commit("shards", "model.safetensors", True)
        assert on_disk(workspace) == {"0": {"n": 0}, "1": {"n": 1}}
        for folder in folders:
            assert done.index(folder.name) < done.index(MANIFEST)
        assert done[: done.index(MANIFEST)].count("model.safetensors") == 2
        done.clear()
        workspace.commit("shards", "other.safetensors", True)
        assert not {folder.name for folder in folders} & set(done)


def test_noted_work_is_saved_after_a_while(tmp_path, monkeypatch):
    with open_workspace(tmp_path / "out", INPUT, resume=False) as workspace:
        finished_layer(workspace, 0)
        assert on_disk(workspace) == {}
        monkeypatch.setattr(workspace_module, "_SYNC_INTERVAL", 0.0)
        finished_layer(workspace, 1)
        assert set(on_disk(workspace)) == {"0", "1"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_noted_work_is_kept_by_an_interruption_and_by_a_full_disk(stop, tmp_path):
    with (
        pytest.raises((KeyboardInterrupt, DiskFullError), match="--resume"),
        open_workspace(tmp_path / "out", INPUT, resume=False) as workspace,
    ):
        finished_layer(workspace, 0)
        raise stop
    assert set(on_disk(workspace)) == {"0"}


def test_threads_may_record_at_once(tmp_path):
    with open_workspace(tmp_path / "out", INPUT, resume=False) as workspace, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: workspace.commit("layers", str(number), number), range(40)))
        assert on_disk(workspace) == {str(number): number for number in range(40)}


def test_messages_stay_on_one_line(tmp_path):
    out = tmp_path / "two\nlines"
    leave_behind(out)
    with pytest.raises(RequestError) as refusal, open_workspace(out, INPUT, resume=False):
        pass
    assert "\n" not in str(refusal.value)
