"""Weight files: what was fitted is what was written, and nobody waits for a fit that has ended."""

import threading

import pytest
from safetensors.torch import load_file, save_file
from tiny import stock_checkpoint

from mea_compress.checkpoint.workspace import open_workspace
from mea_compress.emit.weights import check_written, write_weights, writing_concurrently
from mea_compress.errors import VerificationError
from mea_compress.fit.layers import fit_layers
from mea_compress.planning.plans import make_plan
from mea_compress.recipe import Recipe

HALF = {"kv_ratio": 0.5, "fit": "weights", "key_composition": "head", "value_composition": "head"}


@pytest.fixture
def plan(tmp_path):
    return make_plan(stock_checkpoint(tmp_path / "source"), Recipe(**HALF))


@pytest.fixture
def workspace(tmp_path):
    with open_workspace(tmp_path / "out", {}, resume=False) as workspace:
        yield workspace


def test_what_was_fitted_takes_the_place_of_the_old(plan, workspace, tmp_path):
    fit_layers(plan, workspace, progress=False)
    write_weights(plan, workspace, progress=False)
    check_written(plan, workspace)
    before = load_file(tmp_path / "source" / "model.safetensors")
    after = load_file(workspace.path / "model.safetensors")
    changed = {name for name in before if name in after and not before[name].equal(after[name])}
    sides = ("k_proj", "v_proj")
    assert changed == {f"model.layers.{i}.self_attn.{side}.weight" for i in range(2) for side in sides}
    assert set(after) - set(before) == {
        f"model.layers.{i}.self_attn.{side}_composition.weight" for i in range(2) for side in ("key", "value")
    }


@pytest.mark.parametrize("name", ["k_proj.weight", "value_composition.weight"])
def test_a_tensor_that_was_not_written_as_it_was_fitted_is_noticed(name, plan, workspace):
    fit_layers(plan, workspace, progress=False)
    write_weights(plan, workspace, progress=False)
    file = workspace.path / "model.safetensors"
    tensors = load_file(file)
    tensors[f"model.layers.1.self_attn.{name}"].view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=f"layer 1: {name}"):
        check_written(plan, workspace)


def test_a_fit_that_fails_ends_the_writing(plan, workspace):
    with pytest.raises(ZeroDivisionError), writing_concurrently(plan, workspace, progress=False):
        raise ZeroDivisionError
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]
    assert not (workspace.path / "model.safetensors").exists()
