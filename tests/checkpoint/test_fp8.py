"""Checkpoints in fp8 with scales, quantised here: they become what the numbers that they stand for would become."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
import torch
from letters import character_tokenizer
from safetensors.torch import load_file, save_file
from tiny import save, stock_checkpoint, stock_model
from transformers import AutoConfig, AutoModelForCausalLM

import mea_compress as mc
from mea_compress.architectures import open_checkpoint
from mea_compress.errors import RequestError
from mea_compress.fit import layers as fit_layers

BLOCK = (16, 12)  # the second divides no width of these models: the last block of a row is cut off
WEIGHTS = {"kv_ratio": 0.5, "fit": "weights", "key_composition": "head", "value_composition": "head", "progress": False}
CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}


def scaled(weight, block):
    """A matrix in 8 bits, and its scales: the largest number of each block becomes fp8's largest."""
    rows, columns = block
    n, k = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    scales = torch.empty(n, k)
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(n):
        for j in range(k):
            part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = weight[part].abs().max() / 448
            stored[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return stored, scales


def stands_for(stored, scales, block):
    rows, columns = block
    grid = scales.repeat_interleave(rows, 0)[: stored.shape[0]].repeat_interleave(columns, 1)[:, : stored.shape[1]]
    return (stored.float() * grid).bfloat16()


def quantise(source, target, method, skipped=None, block=BLOCK):
    """Writes a checkpoint in fp8, all matrices of layers in it, and beside it one of the numbers that it stands for."""
    tensors, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        stem, _, own = name.rpartition(".")
        if (
            ".layers." not in name
            or tensor.dim() != 2
            or own != "weight"
            or any(skip in name for skip in skipped or ())
        ):
            tensors[name] = plain[name] = tensor
            continue
        block_of = (1, tensor.shape[1]) if method == "compressed-tensors" else block
        stored, scales = scaled(tensor.float(), block_of)
        tensors[name] = stored
        tensors[f"{stem}.{'weight_scale' if method == 'compressed-tensors' else 'weight_scale_inv'}"] = scales
        plain[name] = stands_for(stored, scales, block_of)
    config = json.loads((source / "config.json").read_text())
    if method == "fp8":
        settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
        settings |= {} if skipped is None else {"modules_to_not_convert": skipped}
    else:
        settings = {
            "quant_method": method,
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": CHANNEL}},
            "ignore": ["lm_head", *(skipped or [])],
        }
    for directory, stored, extra in (
        (target, tensors, {"quantization_config": settings}),
        (target.with_name(f"{target.name}-plain"), plain, {}),
    ):
        directory.mkdir()
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config | extra))
        (directory / "generation_config.json").write_bytes((source / "generation_config.json").read_bytes())
        character_tokenizer().save_pretrained(directory)
    return target, target.with_name(f"{target.name}-plain")


def equal(first, second):
    return first.dtype == second.dtype and torch.equal(first, second)


@pytest.fixture(params=["fp8", "compressed-tensors"])
def method(request):
    return request.param


@pytest.mark.parametrize("case", ["llama", "qwen2", "phi3", "qwen3_moe"])
def test_attention_is_stored_in_full_and_the_rest_as_it_was(case, method, tmp_path):
    source = stock_checkpoint(tmp_path / "source", case, torch.bfloat16)
    skipped = ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"] if case == "qwen3_moe" else None
    quantised, plain = quantise(source, tmp_path / "quantised", method, skipped)
    assert mc.open(quantised).to_json()["kv_bytes_per_token"] == mc.open(plain).to_json()["kv_bytes_per_token"]
    result = mc.compress(quantised, tmp_path / "half", **WEIGHTS)
    mc.compress(plain, tmp_path / "half-plain", **WEIGHTS)
    half, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "half-plain"))
    stored = load_file(quantised / "model.safetensors")
    attention = {name for name in half if ".self_attn." in name}
    assert attention == {name for name in expected if ".self_attn." in name}
    for name in attention:
        assert equal(half[name], expected[name]), name
    rest = {name for name in stored if ".self_attn." not in name}
    assert half.keys() == rest | attention
    assert {half[name].dtype for name in rest if "mlp" in name and name.endswith("down_proj.weight")} == {
        torch.float8_e4m3fn
    }
    for name in rest:
        assert equal(half[name].view(torch.uint8), stored[name].view(torch.uint8)), name
    written = sum(tensor.numel() * tensor.element_size() for tensor in half.values())
    assert result.plan.costs.output_bytes == pytest.approx(written, rel=0.02)

    settings = json.loads((tmp_path / "half" / "config.json").read_text())["quantization_config"]
    names = settings["modules_to_not_convert" if method == "fp8" else "ignore"]
    modules = {name.removesuffix(".weight") for name in half if name.endswith(".weight") and half[name].dim() == 2}
    full = {name for name in modules if half[f"{name}.weight"].dtype == torch.bfloat16} - {"model.embed_tokens"}
    for module in sorted(modules):
        listed = any(
            re.match(name.removeprefix("re:"), module)
            if name.startswith("re:")
            else f"{module}.".startswith(f"{name}.")
            for name in names
        )
        assert listed == (module in full) or module == "model.embed_tokens", module


@pytest.mark.parametrize("case", ["llama", "qwen3_moe"])
def test_it_loads_as_transformers_loads_such_checkpoints(case, method, tmp_path):
    if method == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
        if case == "qwen3_moe":
            pytest.skip("transformers fuses experts as it loads them, and compressed-tensors does not know fused ones")
    block = (16, 16) if method == "fp8" else BLOCK
    source = stock_checkpoint(tmp_path / "source", case, torch.bfloat16)
    skipped = ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"] if case == "qwen3_moe" else None
    quantised, plain = quantise(source, tmp_path / "quantised", method, skipped, block)
    mc.compress(quantised, tmp_path / "half", **WEIGHTS)
    mc.compress(plain, tmp_path / "half-plain", **WEIGHTS)
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        models = [mc.load(tmp_path / name, device="cpu")[0] for name in ("half", "half-plain")]
        found, expected = (model(ids).logits.float() for model in models)
    # compressed-tensors rounds scales to bfloat16 before it multiplies with them.
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert type(models[0]).__name__.startswith("Mea")
    tokens = models[0].generate(ids, max_new_tokens=8, do_sample=False)
    assert tokens.shape == (2, 20)


@pytest.mark.slow
def test_calibration_and_refinement_see_the_numbers_it_stands_for(method, tmp_path):
    source = save(stock_model("llama", torch.bfloat16), tmp_path / "source")
    quantised, plain = quantise(source, tmp_path / "quantised", method)
    text = tmp_path / "text.txt"
    text.write_text("once upon a time there was a small model that read a story " * 40)
    options = {
        "kv_ratio": 0.5,
        "text": str(text),
        "sequences": 8,
        "sequence_length": 32,
        "refine": 3,
        "progress": False,
    }
    mc.compress(quantised, tmp_path / "half", heal="0", **options)
    mc.compress(plain, tmp_path / "half-plain", heal="0", **options)
    half, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "half-plain"))
    for name in half:
        if ".self_attn." in name:
            assert equal(half[name], expected[name]), name
    with pytest.raises(RequestError, match="`heal` 5 trains through weights that are stored in fp8"):
        mc.compress(quantised, tmp_path / "healed", heal="5", **options)
    with pytest.raises(RequestError, match="stores quantised weights, which are not trained"):
        mc.heal(tmp_path / "half", teacher=plain, out=tmp_path / "healed", text=str(text), progress=False)
    with pytest.raises(RequestError, match="stores weights in fp8, which no export does"):
        mc.export(tmp_path / "half", tmp_path / "stock", progress=False)


@pytest.mark.slow
def test_at_the_cache_nothing_has_to_be_stored_in_full(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "olmo2", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    source = save(AutoModelForCausalLM.from_config(config).bfloat16(), tmp_path / "source")
    quantised, plain = quantise(source, tmp_path / "quantised", "fp8", block=(16, 16))
    text = tmp_path / "text.txt"
    text.write_text("once upon a time there was a small model that read a story " * 40)
    options = {
        "kv_ratio": 0.5,
        "text": str(text),
        "sequences": 8,
        "sequence_length": 32,
        "refine": 0,
        "progress": False,
    }
    mc.compress(quantised, tmp_path / "half", **options)
    # What is stored in fp8 is neither fitted again nor healed; so that the other can be compared, it is not either.
    monkeypatch.setattr(fit_layers, "find_output_map", lambda *_: "left alone")
    mc.compress(plain, tmp_path / "half-plain", heal=0, **options)
    half, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "half-plain"))
    stored = load_file(quantised / "model.safetensors")
    for name in half:
        other = stored if name in stored else expected
        assert equal(half[name].view(torch.uint8), other[name].view(torch.uint8)), name
    assert any("_composition." in name for name in half)
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = (
            mc.load(tmp_path / name, device="cpu")[0](ids).logits.float() for name in ("half", "half-plain")
        )
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised otherwise than in fp8"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "quantised otherwise than in fp8"),
        ({"quant_method": "fp8", "weight_block_size": [16, 0]}, "quantised otherwise than in fp8"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "quantised otherwise than in fp8"),
        ({"quant_method": "fp8", "weight_block_size": [8, 8]}, r"has scales of shape \[2, 4\]"),
    ],
)
def test_other_forms_are_refused(settings, sentence, tmp_path):
    quantised, _ = quantise(
        stock_checkpoint(tmp_path / "source", "llama", torch.bfloat16), tmp_path / "quantised", "fp8"
    )
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(RequestError, match=sentence):
        mc.open(quantised)


def test_a_matrix_without_its_scales(tmp_path):
    quantised, _ = quantise(
        stock_checkpoint(tmp_path / "source", "llama", torch.bfloat16), tmp_path / "quantised", "fp8"
    )
    tensors = load_file(quantised / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, quantised / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RequestError, match=r"layers\.1\.mlp\.up_proj\.weight' is in 8 bits and has no scales beside it"
    ):
        mc.open(quantised)


def test_scales_of_every_published_shape(tmp_path):
    quantised, _ = quantise(
        stock_checkpoint(tmp_path / "source", "llama", torch.bfloat16), tmp_path / "quantised", "fp8"
    )
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors = load_file(quantised / "model.safetensors")
    rows, columns = tensors[name].shape
    for scales in (
        torch.tensor(0.5),
        torch.tensor([0.5]),
        torch.rand(rows, 1),
        torch.rand(-(-rows // 16), -(-columns // 12)),
    ):
        tensors[f"{name}_scale_inv"] = scales
        save_file(tensors, quantised / "model.safetensors", metadata={"format": "pt"})
        reader = open_checkpoint(quantised).reader
        block = {0: (rows, columns), 1: (rows, columns), rows: (1, columns)}.get(
            scales.numel() if scales.dim() else 0, BLOCK
        )
        expected = stands_for(tensors[name], scales.reshape(-1, 1) if scales.numel() == 1 else scales, block)
        assert torch.equal(reader.read(name), expected)
        assert torch.equal(reader.read_rows(name, 3, 9), expected[3:9])
    exponents = torch.full((-(-rows // 16), -(-columns // 12)), 125, dtype=torch.uint8)
    tensors[f"{name}_scale_inv"] = exponents
    save_file(tensors, quantised / "model.safetensors", metadata={"format": "pt"})
    array = open_checkpoint(quantised).reader.read_array(name)
    assert array.dtype == np.dtype(ml_dtypes.bfloat16)
    assert np.array_equal(array.astype(np.float32), tensors[name].float().numpy() / 4)
