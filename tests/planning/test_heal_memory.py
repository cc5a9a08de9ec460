"""Memory of healing: what is computed is what tensors take, and what the documentation says."""

import gc
from pathlib import Path

import pytest
import torch
from letters import character_tokenizer, tiny_llama

from mea_compress.compression import compress
from mea_compress.healing import heal
from mea_compress.planning.heal_memory import heal_step_bytes, heal_weight_bytes, sharded_heal_weight_bytes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "healing.md"
# Vocabulary, channels, layers, query heads, key/value heads, channels of a head and of the MLP, whether tied.
MODELS = {
    "SmolLM2-135M": (49152, 576, 30, 9, 3, 64, 1536, True),
    "Llama-3.2-1B": (128256, 2048, 16, 32, 8, 64, 8192, True),
    "Llama-3.1-8B": (128256, 4096, 32, 32, 8, 128, 14336, False),
    "Llama-3.1-70B": (128256, 8192, 80, 64, 8, 128, 28672, False),
}


def row(name):
    vocabulary, hidden, layers, queries, heads, dim, inner, tied = MODELS[name]
    embeddings = 0 if tied else vocabulary * hidden
    norms = (2 * layers + 1) * hidden
    outer = layers * (2 * hidden * queries * dim + 3 * hidden * inner) + vocabulary * hidden + embeddings + norms
    original = outer + layers * 2 * hidden * heads * dim
    half = layers * (hidden * heads * dim + heads * dim * heads * dim)  # latent components, and their maps to heads
    trained = half + layers * 2 * hidden * queries * dim
    weights = [heal_weight_bytes(original, outer + half, trained, embeddings, 2, count) for count in (1, 8)]
    parts = (original, outer + half, trained, embeddings, vocabulary * hidden, layers, 2)
    weights += [sharded_heal_weight_bytes(*parts, count) for count in (8, 64)]
    shape = (layers, hidden, inner, vocabulary)
    steps = [heal_step_bytes(*shape, *how, 2, *more) for how, more in (((16, 1024), ()), ((8, 1024), ()))]
    steps.append(heal_step_bytes(*shape, 8, 1024, 2, True))
    return f"| {name} | " + " | ".join(f"{size / 1e9:,.1f}" for size in (*weights, *steps)) + " |"


@pytest.mark.parametrize("name", MODELS)
def test_the_table_in_the_documentation_is_computed(name):
    assert row(name) in PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.slow
def test_tensors_take_what_is_computed(tmp_path, monkeypatch):
    model = tiny_llama(hidden_size=128, intermediate_size=192, num_hidden_layers=3)
    model.save_pretrained(tmp_path / "src")
    character_tokenizer().save_pretrained(tmp_path / "src")
    del model
    settings = {"kv_ratio": 0.5, "fit": "weights", "key_composition": "latent", "value_composition": "latent"}
    plan = compress(tmp_path / "src", tmp_path / "out", progress=False, **settings).plan
    gc.collect()
    before, found = floats(), []
    step = torch.optim.AdamW.step

    def measured(self, *arguments, **options):
        result = step(self, *arguments, **options)
        gradients = sum(p.grad.nbytes for group in self.param_groups for p in group["params"])
        states = sum(t.nbytes for state in self.state.values() for t in state.values() if t.dim())
        assert gradients and states == 2 * gradients
        gc.collect()
        found.append(floats() - before)
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", measured)
    heal(tmp_path / "out", teacher=tmp_path / "src", steps=2, batch_size=2, device="cpu", progress=False)
    assert max(found) == pytest.approx(plan.costs.heal_bytes, rel=0.06)


def floats():
    """Bytes of all tensors of floating-point numbers that are alive, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):  # and none of those that stand for others
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.is_floating_point():
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
