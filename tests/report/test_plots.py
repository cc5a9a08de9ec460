"""Pictures whose file cannot be written are one sentence; what they show is looked at with what makes their figures."""

import errno
import os

import pytest
from matplotlib.figure import Figure

from mea_compress.checkpoint.files import refusals
from mea_compress.errors import DiskFullError, RequestError
from mea_compress.report.plots import draw_profile, draw_retrieval

RETRIEVAL = {"a": {"retrieval": [{"task": "passkey", "length": 1024, "depth": 0.5, "exact_match": 1.0}]}}
POINT = {"layer": 0, "side": "key", "components": 2, "kl": 0.1, "loss": 0.1}
PROFILE = {"source": "SRC", "layers": 1, "heads": 4, "points": [POINT], "floor": 0.0}
PICTURES = {"retrieval": (draw_retrieval, RETRIEVAL), "profile": (draw_profile, PROFILE)}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_cannot_be_written_is_one_sentence(name, tmp_path, monkeypatch):
    draw, data = PICTURES[name]
    draw(data, tmp_path / "there.png")
    assert (tmp_path / "there.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RequestError, match=r"nowhere/map\.png lies in no directory that exists"):
        draw(data, tmp_path / "nowhere" / "map.png")
    with monkeypatch.context() as patch, pytest.raises(RequestError, match=r"map\.png cannot be written: name a file"):
        patch.setattr(os, "access", lambda *_: False)
        draw(data, tmp_path / "map.png")

    (tmp_path / "taken.png").mkdir()
    with pytest.raises(RequestError, match=r"taken\.png is there and no file that this user may write"):
        draw(data, tmp_path / "taken.png")
    with monkeypatch.context() as patch, pytest.raises(RequestError, match=r"there\.png is there and no file"):
        patch.setattr(os, "access", lambda path, _: path != tmp_path / "there.png")  # write-protected
        draw(data, tmp_path / "there.png")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    file = tmp_path / "map.png"
    with pytest.raises(DiskFullError, match=r"map\.png: the disk or quota is full"), refusals(file):  # as callers do
        draw(data, file)
