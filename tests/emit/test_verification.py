import json

import pytest
from safetensors.torch import load_file, save_file
from tiny import CASES, stock_checkpoint

from mea_compress import compression as compress_module
from mea_compress.checkpoint.files import write_json
from mea_compress.compression import compress
from mea_compress.emit import verification
from mea_compress.emit.verification import verify
from mea_compress.errors import RequestError, VerificationError
from mea_compress.recipe import Recipe

KINDS = {
    "head": ("head", "head"),
    "frequency": ("frequency", "latent"),
    "latent": ("latent", "latent"),
    "pool": ("pool", "pool"),
    "prune": ("prune", "share"),
}


def emitted(tmp_path, case="llama", kind="head"):
    source = stock_checkpoint(tmp_path / "source", case)
    keys, values = KINDS[kind]
    recipe = Recipe(kv_ratio=0.5, fit="weights", key_composition=keys, value_composition=values)
    result = compress(source, tmp_path / "out", recipe=recipe, progress=False)
    return tmp_path / "out", result


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["llama", "qwen3", "phi3-partial"])
def test_what_compress_emits_is_right(case, kind, whole, tmp_path):
    out, result = emitted(tmp_path, case, kind)
    found = verify(out, result.plan.bytes_after, whole_model=whole, progress=False)
    assert found["largest_difference"] < 1e-5
    assert found["kv_bytes_per_token"] == result.plan.bytes_after
    assert ("logits" in found["compared"]) == whole


@pytest.mark.parametrize("case", CASES)
def test_every_family_is_verified_layer_by_layer(case, tmp_path):
    out, result = emitted(tmp_path, case, "frequency")
    found = verify(out, result.plan.bytes_after, whole_model=False, progress=False)
    assert found["compared"].startswith("keys and values") and found["decoding_difference"] < 1e-5


def test_other_cache_bytes_than_planned_are_noticed(tmp_path):
    out, result = emitted(tmp_path)
    with pytest.raises(VerificationError, match="bytes per token"):
        verify(out, result.plan.bytes_after + 4, progress=False)


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_that_computes_something_else_is_noticed(whole, tmp_path, monkeypatch):
    out, result = emitted(tmp_path)
    forward = verification.MeaAttention._expand
    monkeypatch.setattr(
        verification.MeaAttention,
        "_expand",
        lambda self, cached, composition: 1.01 * forward(self, cached, composition),
    )
    with pytest.raises(VerificationError, match="differs"):
        verify(out, result.plan.bytes_after, whole_model=whole, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_large_model_fitted_from_weights_alone_is_what_modules_say_it_is(case, kind, tmp_path, monkeypatch):
    """No module is loaded for it; what is said of it is what they measure afterwards."""
    monkeypatch.setattr("mea_compress.planning.decisions.WHOLE_MODEL_BYTES", 0)
    out, result = emitted(tmp_path, case, kind)
    told = result.fidelity["verification"]
    assert told["compared"] == "tensors of every layer, bit for bit"
    assert verify(out, result.plan.bytes_after, progress=False)["kv_bytes_per_token"] == told["kv_bytes_per_token"]


@pytest.mark.parametrize("damage", ["tensor", "configuration"])
def test_a_large_model_that_was_not_written_as_planned_is_noticed(damage, tmp_path, monkeypatch):
    monkeypatch.setattr("mea_compress.planning.decisions.WHOLE_MODEL_BYTES", 0)
    write_config = compress_module._write_config

    def spoil(plan, workspace):
        config = write_config(plan, workspace)
        if damage == "tensor":
            file = workspace.path / "model.safetensors"
            tensors = load_file(file)
            tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] += 1
            save_file(tensors, file, metadata={"format": "pt"})
        else:
            config["mea"]["layers"][1]["key_composition"] = "prune"
            config["mea"]["qk_norm"] = True
            write_json(workspace.path / "config.json", config)
        return config

    monkeypatch.setattr(compress_module, "_write_config", spoil)
    with pytest.raises((VerificationError, RequestError), match=r"v_proj|k_norm|q_norm|bytes per token"):
        emitted(tmp_path)
    assert not (tmp_path / "out").exists()


def test_not_a_number_is_noticed(tmp_path, monkeypatch):
    out, result = emitted(tmp_path)
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="inf"):
        verify(out, result.plan.bytes_after, progress=False)


def test_what_was_measured_is_in_the_report(tmp_path):
    out, result = emitted(tmp_path, "qwen3")
    told = json.loads((out / "compression.json").read_text())["fidelity"]
    assert told["verification"] == result.fidelity["verification"]
    assert set(told["layers"]) == {"0", "1"}
    assert all(0 < told["layers"]["0"][f"{side}_relative_error"] < 1 for side in ("key", "value"))
    assert 0 < told["verification"]["largest_difference"] < 1e-5
