"""The picture of a healing: drawn with what it is given, losses that are no numbers included."""

import math

import pytest

from mea_compress.errors import RequestError
from mea_compress.report.plots import draw_healing

HEALING = {"kl_before": 0.5, "kl_after": 0.1, "curve": [[0, 0.5], [2, 0.2], [4, 0.1]], "losses": [0.6, 0.4, 0.3, 0.2]}


@pytest.mark.parametrize(
    "changes",
    [{}, {"losses": [0.6, None, math.nan, math.inf]}, {"losses": [], "curve": [(0, math.inf)]}, {"losses": [0.0, 0.1]}],
)
def test_it_is_drawn(changes, tmp_path):
    draw_healing(HEALING | changes, tmp_path / "healing.png")
    assert (tmp_path / "healing.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_healing_gives_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        draw_healing(HEALING, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_no_picture_in_other_files(tmp_path):
    with pytest.raises(RequestError, match="no kind of picture"):
        draw_healing(HEALING, tmp_path / "healing.docx")
