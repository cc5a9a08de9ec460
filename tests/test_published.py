"""A finished output directory and a run that is resumed after it."""

import pytest
from tiny import stock_checkpoint

from mea_compress.compression import compress
from mea_compress.errors import RequestError
from mea_compress.recipe import Recipe

WEIGHTS = {"fit": "weights", "key_composition": "head", "value_composition": "head"}


def test_resuming_what_is_finished_says_what_was_made(tmp_path):
    source, out = stock_checkpoint(tmp_path / "src"), tmp_path / "out"
    recipe = Recipe(kv_ratio=0.5, **WEIGHTS)
    first = compress(source, out, recipe=recipe, progress=False)
    again = compress(source, out, recipe=recipe, resume=True, progress=False)
    assert again.plan.to_json() == first.plan.to_json()
    assert again.fidelity == first.fidelity
    with pytest.raises(RequestError, match="another recipe"):
        compress(source, out, recipe=Recipe(kv_ratio=0.25, **WEIGHTS), resume=True, progress=False)
    with pytest.raises(RequestError, match="already exists"):
        compress(source, out, recipe=recipe, progress=False)
