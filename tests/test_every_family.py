"""Every family goes through one door: tiny random models of transformers' own classes, composed at their cache."""

import json
import signal
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import pytest
import tiny
import torch
from remote import remote_logits
from tiny import save, scatter
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import mea_compress as mc
from mea_compress.fit import layers as fit_layers

SIZES = tiny.SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {
    "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "num_local_experts": 0,
    "shared_intermediate_size": 48,
}
# A line for each family: what its configuration needs beside the sizes, and channels that RoPE rotates by layer, None
# for a layer that keeps another state.
FAMILIES = {
    "cohere2": (SLIDING, [8, 0]),
    "exaone4": (SLIDING, [8, 0]),
    "gemma": ({}, [8, 8]),
    "gemma2": ({"sliding_window": 5}, [8, 8]),
    "gemma3_text": (SLIDING, [8, 8]),
    "gemma4_text": (
        SLIDING | {"global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
        [8, 16],
    ),
    "glm": ({}, [4, 4]),
    "glm4": ({}, [4, 4]),
    "glm4_moe": (
        EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        [4, 4],
    ),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}, [0, 0]),
    "gpt_oss": (SLIDING | EXPERTS | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, [8, 8]),
    "granite": ({}, [8, 8]),
    "granitemoehybrid": (MAMBA, [None, 0]),
    "hunyuan_v1_dense": ({}, [8, 8]),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, [None, 8]),
    "llama4_text": (EXPERTS | {"num_local_experts": 2, "intermediate_size_mlp": 48}, [8, 8]),
    "ministral": ({"sliding_window": 5}, [8, 8]),
    "nemotron": ({}, [4, 4]),
    "olmo2": ({}, [8, 8]),
    "olmo3": (SLIDING, [8, 8]),
    "phi": ({}, [4, 4]),
    "qwen3_next": (HYBRID | EXPERTS | {"shared_expert_intermediate_size": 16}, [None, 2]),
    "seed_oss": ({}, [8, 8]),
    "smollm3": ({"no_rope_layers": [1, 0]}, [8, 0]),
    "stablelm": ({}, [2, 2]),
    "starcoder2": ({"sliding_window": 5}, [8, 8]),
}
INTERLEAVED = {"cohere2", "glm", "glm4", "llama4_text"}


def tokens(batch, length, seed=0):
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def stock_family(name, directory, **changes):
    """A checkpoint of transformers' own class."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**SIZES | FAMILIES[name][0] | changes)
    return save(scatter(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)), directory)


def compress_family(source, out, ratio, refine=0):
    """Compress at the cache, with the same random tokens for every fit: such a model samples no better than chance."""
    options = {"kv_ratio": ratio, "refine": refine, "heal": 0, "split": "even", "sequences": 6, "sequence_length": 48}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_layers, "calibration_tokens", lambda *_: tokens(6, 48, 1))
        return mc.compress(source, out, progress=False, **options)


@pytest.fixture(scope="module")
def outs(tmp_path_factory):
    """Each family's stock checkpoint, and it at whole and half width, made when first asked for."""

    @cache
    def make(name):
        directory = tmp_path_factory.mktemp(name)
        source, whole, half = (directory / part for part in ("source", "whole", "half"))
        stock_family(name, source)
        compress_family(source, whole, 1.0)
        return SimpleNamespace(
            source=source, whole=whole, half=half, result=compress_family(source, half, 0.5, refine=3)
        )

    return make


def load(directory, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, experts_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, **options).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_goes_through(name, outs):
    made, ids = outs(name), tokens(2, 12)
    rotary = FAMILIES[name][1]
    layers = json.loads((made.half / "config.json").read_text())["mea"]["layers"]
    assert [layer and layer["rotary_dim"] for layer in layers] == rotary
    for layer in filter(None, layers):
        assert layer["interleaved"] == (name in INTERLEAVED and layer["rotary_dim"] > 0)

    # The whole width is the original, the half is not, and its cache is half.
    original, whole, half = load(made.source), load(made.whole), load(made.half)
    expected = logits(original, ids, use_cache=False)
    size = expected.abs().max()
    assert (logits(whole, ids, use_cache=False) - expected).abs().max() < 2e-5 * size
    uncached = logits(half, ids, use_cache=False)
    assert (uncached - expected).abs().max() > 1e-3 * size
    assert made.result.plan.bytes_after == made.result.plan.bytes_before / 2
    assert len(half(ids, output_hidden_states=True).hidden_states) == 3  # each layer's, and the embeddings

    # Cached equals uncached, and what is alive in the cache is what the plan says, to the byte.
    cache = DynamicCache(config=half.config)
    steps = [logits(half, ids[:, :4], past_key_values=cache)]
    held = sum(
        side.untyped_storage().nbytes()
        for layer, spec in zip(cache.layers, layers, strict=False)
        if spec is not None
        for side in (layer.keys, layer.values)
    )
    assert held == made.result.plan.bytes_after * 8
    steps += [logits(half, ids[:, t : t + 1], past_key_values=cache) for t in range(4, 12)]
    assert (torch.cat(steps, 1) - uncached).abs().max() < 1e-5 * size

    # Refinement looked at held-out text and never ends worse than it began.
    for report in made.result.fidelity["layers"].values():
        assert report["refinement"]["after"] <= report["refinement"]["before"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_by_a_family(name, outs):
    model, ids = load(outs(name).half, torch.float64), tokens(2, 7)
    greedy = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    cached = model.generate(ids, **greedy)
    passes = ids
    for _ in range(6):
        passes = torch.cat((passes, logits(model, passes, use_cache=False)[:, -1:].argmax(-1)), 1)
    assert torch.equal(cached, passes)
    hybrid = None in FAMILIES[name][1]
    beams = model.generate(ids, num_beams=2, **greedy)
    if not hybrid:  # transformers runs beams of a model with another state with a cache alone
        assert torch.equal(beams, model.generate(ids, num_beams=2, use_cache=False, **greedy))
    if model._can_compile_fullgraph and not hybrid:
        assert torch.equal(model.generate(ids, cache_implementation="static", **greedy), cached)

    if not hybrid:
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[0, :3] = 0
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        model = load(outs(name).half)  # in float64 the stock Gemma 2 makes NaN of a padded sequence itself
        padded = logits(model, ids, attention_mask=mask, position_ids=places)
        alone = logits(model, ids[:1, 3:])
        assert (padded[0, 3:] - alone[0]).abs().max() < 1e-4 * alone.abs().max()


KILLED = """
import os, signal, sys
import torch
from mea_compress import compress
from mea_compress.fit import layers

def ids(*_):
    return torch.randint(3, 64, (6, 48), generator=torch.Generator().manual_seed(1))

layers.calibration_tokens = ids
source, out, kill, resume = sys.argv[1:]
if kill == "kill":
    write = layers.write_checkpoint
    def once(directory, *args, **kwargs):
        write(directory, *args, **kwargs)
        if directory.name == "layer-00001":
            os.kill(os.getpid(), signal.SIGKILL)
    layers.write_checkpoint = once
compress(source, out, kv_ratio=0.5, refine=3, heal=0, split="even", sequences=6, sequence_length=48, progress=False,
         resume=resume == "resume")
"""


@pytest.mark.slow
@pytest.mark.process
def test_a_killed_run_is_taken_up_again_to_the_same_bytes(tmp_path):
    stock_family("gemma3_text", tmp_path / "source")
    (tmp_path / "killed.py").write_text(KILLED)

    def run(out, *options):
        arguments = [sys.executable, "killed.py", "source", out, *options]
        return subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)

    whole = run("whole", "-", "-")
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert run("out", "kill", "-").returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    resumed = run("out", "-", "resume")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.process
def test_families_load_as_remote_code_where_the_package_is_absent(outs, tmp_path):
    made = [outs(name).half for name in ("gemma3_text", "gpt2", "gpt_oss", "qwen3_next")]
    ids = tokens(2, 9)
    for out, found in remote_logits(made, ids, tmp_path).items():
        torch.testing.assert_close(found, logits(load(out), ids), rtol=0, atol=1e-5)
