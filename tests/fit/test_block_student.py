"""Distillation behind a fit at the cache: what it gains, trains and leaves alone, and that a kill changes nothing."""

import copy
import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_every_family import logits, stock_family, tokens
from tiny import contents
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig

import mea_compress as mc
from mea_compress.fit import layers as fit_layers
from mea_compress.fit.block_student import maps_beside_the_cache
from mea_compress.fit.progress import estimate_seconds
from mea_compress.loading import load_model
from mea_compress.training.losses import DistillationLoss
from mea_compress.training.settings import DistillationSettings

# What is trained beside encoders and decoders: fused projections make keys and values, and stay.
TRAINED = {
    "cohere2": {"q_proj.weight", "o_proj.weight"},
    "gemma3_text": {"q_proj.weight", "o_proj.weight"},
    "glm": {"q_proj.weight", "q_proj.bias", "o_proj.weight"},
    "gpt2": {"c_proj.weight", "c_proj.bias"},
    "gpt_oss": {"q_proj.weight", "q_proj.bias", "o_proj.weight", "o_proj.bias"},
    "qwen3_next": {"q_proj.weight", "o_proj.weight"},
}
CODED = {f"{side}_composition.{own}" for side in ("key", "value") for own in ("encoder", "weight")}
OPTIONS = {"kv_ratio": 0.5, "refine": 0, "split": "even", "sequences": 24, "sequence_length": 24}


def compress(source, out, **options):
    """Compress at the cache, with the same random tokens for fit and distillation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_layers, "calibration_tokens", lambda *_: tokens(60, 24, 1))
        return mc.compress(source, out, progress=False, **OPTIONS | options)


def kl(source, out):
    """KL(original ‖ compressed) on tokens that nobody was trained on, in plain PyTorch."""
    ids, options = tokens(48, 24, 9), {"experts_implementation": "eager"}
    p, q = (
        logits(AutoModelForCausalLM.from_pretrained(path, **options).eval(), ids, use_cache=False)
        .double()
        .log_softmax(-1)
        for path in (source, out)
    )
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_it_lowers_the_divergence_and_leaves_the_rest_as_it_was(name, tmp_path):
    source = stock_family(name, tmp_path / "source")
    compress(source, tmp_path / "closed", heal=0)
    result = compress(source, tmp_path / "healed", heal=12)
    assert kl(source, tmp_path / "healed") < kl(source, tmp_path / "closed")
    told = json.loads((tmp_path / "healed" / "compression.json").read_text())["fidelity"]["healing"]
    assert told == result.fidelity["healing"] and told["kept"] == "healed" and told["steps"] == 12
    assert set(told["trained"].split(", ")) == TRAINED[name] | CODED
    original, closed, healed = (
        load_file(tmp_path / name / "model.safetensors") for name in ("source", "closed", "healed")
    )
    assert closed.keys() == healed.keys()
    blocks = [layer["block"] for layer in result.plan.source.config.mea["layers"] if layer is not None]
    changed = {key for key in healed if not torch.equal(healed[key], closed[key])}
    assert changed == {f"{block}.{own}" for block in blocks for own in TRAINED[name] | CODED}
    assert all(torch.equal(healed[key], tensor) for key, tensor in original.items() if key not in changed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss"])
def test_the_student_is_the_checkpoint_to_be_and_shares_the_rest(name, tmp_path, monkeypatch):
    from mea_compress.fit import healing

    source, ids, seen = stock_family(name, tmp_path / "source"), tokens(2, 12), []

    def stop(student, teacher, *_, **__):
        seen.append((logits(student, ids, use_cache=False), logits(teacher, ids, use_cache=False)))
        theirs = {id(tensor) for tensor in [*teacher.parameters(), *teacher.buffers()]}
        assert not any(weight.requires_grad for weight in teacher.parameters())
        for own, tensor in [*student.named_parameters(), *student.named_buffers()]:
            assert (id(tensor) in theirs) != (tensor.requires_grad or "_composition." in own), own
        raise KeyboardInterrupt

    monkeypatch.setattr(healing, "distil", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "stopped", heal=4)
    compress(source, tmp_path / "out", heal=0)
    ((student, teacher),) = seen
    torch.testing.assert_close(student, logits(load_model(tmp_path / "out", None, "cpu"), ids), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(teacher, logits(load_model(source, None, "cpu"), ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(student, teacher, atol=1e-2)


KILLED = """
import os, signal, sys
import torch
from mea_compress import compress
from mea_compress.training import trials
from mea_compress.fit import layers

layers.calibration_tokens = lambda *_: torch.randint(3, 64, (40, 24), generator=torch.Generator().manual_seed(1))
source, out, kill, resume = sys.argv[1:]
if kill == "kill":
    write, count = trials.write_text, []
    def once(*args):
        write(*args)
        count.append(1)
        if len(count) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
    trials.write_text = once
compress(source, out, kv_ratio=0.5, refine=0, split="even", sequences=16, sequence_length=24, heal=10, progress=False,
         resume=resume == "resume")
"""


@pytest.mark.slow
@pytest.mark.process
def test_a_killed_distillation_is_taken_up_again_to_the_same_bytes(tmp_path):
    stock_family("gemma3_text", tmp_path / "source")
    (tmp_path / "killed.py").write_text(KILLED)

    def run(out, *options):
        arguments = [sys.executable, "killed.py", "source", out, *options]
        return subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)

    whole = run("whole", "-", "-")
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert run("out", "kill", "-").returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert list(tmp_path.glob("out*/**/healing/progress.json"))  # it was in the middle of it
    resumed = run("out", "-", "resume")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_names_without_the_base_model_in_front_stay_so(tmp_path):
    source = stock_family("gpt2", tmp_path / "source")
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert estimate_seconds(mc.plan(source, **OPTIONS, heal=6)) > 0
    compress(source, tmp_path / "closed", heal=0)
    result = compress(source, tmp_path / "healed", heal=6)
    assert result.fidelity["healing"]["kept"] == "healed"
    assert kl(source, tmp_path / "healed") < kl(source, tmp_path / "closed")
    healed = load_file(tmp_path / "healed" / "model.safetensors")
    assert {name for name in tensors if not torch.equal(healed.pop(name), tensors[name])} == {
        f"h.{layer}.attn.{own}" for layer in range(2) for own in TRAINED["gpt2"]
    }
    assert {name.rpartition("attn.")[2] for name in healed} == CODED


def test_weights_that_another_part_reads_are_not_trained():
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=32)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    blocks = {layer: f"transformer.h.{layer}.attn" for layer in range(2)}
    assert maps_beside_the_cache(model, blocks) == {
        0: ["c_proj.weight", "c_proj.bias"],
        1: ["c_proj.weight", "c_proj.bias"],
    }
    first, second = (layer.attn.c_proj for layer in model.transformer.h)
    second.weight = first.weight
    assert maps_beside_the_cache(model, blocks) == {0: ["c_proj.bias"], 1: ["c_proj.bias"]}
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "opt"])  # modules that drop, and functions that do
def test_dropout_is_off_in_training_as_it_is_in_the_teacher(family, checkpointing):
    sizes = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "gpt2":
        dropped = {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
        config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **sizes, **dropped)
    else:
        dropped = {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}
        config = OPTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=32,
            word_embed_proj_dim=16,
            **sizes,
            **dropped,
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    teacher = copy.deepcopy(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = DistillationSettings(1, 1, gradient_checkpointing=checkpointing)
    loss = DistillationLoss(model, teacher, settings, sliced=False).train()
    found = loss(torch.arange(8)[None])[0]
    assert float(found.detach().abs()) < 1e-6
    runs = []
    attention = next(module for name, module in model.named_modules() if name.endswith((".attn", ".self_attn")))
    attention.register_forward_hook(lambda *_: runs.append(1))
    loss(torch.arange(8)[None])[0].backward()
    assert len(runs) == 1 + checkpointing  # a second time for its gradients
