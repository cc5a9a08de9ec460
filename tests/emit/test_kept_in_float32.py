"""`--dtype` leaves in float32 what transformers keeps in float32 beside that dtype."""

import pytest
import torch
from safetensors.torch import load_file
from test_every_family import FAMILIES, SIZES, tokens
from tiny import scatter
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

import mea_compress as mc
from mea_compress.architectures.families import FAMILIES as WRITTEN_OUT
from mea_compress.fit import layers as fit_layers

CASES = {  # of a family, what stays in float32 beside each type
    ("glm4_moe", "bfloat16"): ("e_score_correction_bias",),
    ("glm4_moe", "float16"): ("e_score_correction_bias",),
    ("gpt_oss", "bfloat16"): (),
    ("gpt_oss", "float16"): ("norm",),
}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_tensors_have_the_types_that_transformers_gives_them(family, dtype, tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SIZES | FAMILIES[family][0])
    scatter(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)).save_pretrained(tmp_path / "source")
    monkeypatch.setattr(fit_layers, "calibration_tokens", lambda *_: tokens(3, 32, 1))
    options = {"kv_ratio": 0.5, "fit": "activations", "refine": 0, "sequences": 3, "sequence_length": 32}
    mc.compress(tmp_path / "source", tmp_path / "out", dtype=dtype, progress=False, **options)

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=getattr(torch, dtype))
    expected = {name: tensor.dtype for name, tensor in stock.state_dict().items()}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    shared = stored.keys() & expected.keys()
    assert len(shared) > 10
    assert {name: stored[name].dtype for name in shared} == {name: expected[name] for name in shared}
    wide = {name for name in stored if stored[name].dtype == torch.float32}
    assert bool(wide) == bool(CASES[family, dtype])
    assert all(any(part in name for part in CASES[family, dtype]) for name in wide)
    model, _ = mc.load(tmp_path / "out", device="cpu")
    for name, tensor in model.state_dict().items():
        assert name not in stored or tensor.dtype == stored[name].dtype, name


@pytest.mark.parametrize("family", WRITTEN_OUT, ids=lambda family: family.model_type)
def test_no_family_that_is_written_out_keeps_any(family):
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family.model_type]]
    assert not kind._keep_in_fp32_modules and not kind._keep_in_fp32_modules_strict
