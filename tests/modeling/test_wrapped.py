"""Parts of a model behind what other libraries put around modules, which know of no way in but a call."""

import pytest
import torch
from test_modeling_mea import build, decode, forward, tokens
from tiny import save
from torch import nn
from transformers import AutoModelForCausalLM

FORMS = [("head", "head"), ("frequency", "latent"), ("latent", "latent"), ("joint", "joint"), ("pool", "head")]
PARTS = ("key_composition", "value_composition", "k_norm", "q_norm", "head_norm")
pytestmark = pytest.mark.usefixtures("exact_norms")


class Wrapped(nn.Module):
    """Passes calls on, and hides everything else."""

    def __init__(self, module):
        super().__init__()
        self.inside = [module]

    def forward(self, *arguments):
        return self.inside[0](*arguments)


def model_of(family, keys, values, decode_by):
    model = build(family, keys, values, head_norm=True)
    model.config.mea["decode"] = decode_by
    return model


@pytest.mark.parametrize("decode_by", ["absorb", "expand"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize(("keys", "values"), FORMS)
def test_parts_are_used_by_calling_them(keys, values, family, decode_by):
    model, ids = model_of(family, keys, values, decode_by), tokens(2, 12)
    expected = decode(model, ids, 6)[0]
    for layer in model.model.layers:
        for part in PARTS:
            if getattr(layer.self_attn, part, None) is not None:
                setattr(layer.self_attn, part, Wrapped(getattr(layer.self_attn, part)))
    torch.testing.assert_close(decode(model, ids, 6)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize(("keys", "values"), FORMS)
def test_layers_on_the_disk_generate_the_same(keys, values, family, tmp_path):
    path = save(build(family, keys, values, dtype=torch.float32), tmp_path / "model")
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = AutoModelForCausalLM.from_pretrained(path).generate(tokens(2, 8), **options)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(path, device_map=places, offload_folder=tmp_path / "disk")
    assert model.model.layers[1].self_attn.o_proj.weight.is_meta
    assert torch.equal(model.generate(tokens(2, 8), **options), expected)


@pytest.mark.parametrize("decode_by", ["absorb", "expand"])
@pytest.mark.parametrize(("keys", "values"), FORMS)
def test_peft_trains_compositions_that_decoding_then_uses(keys, values, decode_by):
    peft = pytest.importorskip("peft")
    model, ids = model_of("Qwen3", keys, values, decode_by), tokens(2, 12)
    expected = forward(model, ids)
    trained = [part for part in PARTS[:2] if getattr(model.model.layers[0].self_attn, part) is not None]
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], modules_to_save=trained, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(forward(adapted, ids), expected, rtol=0, atol=1e-12)
    adapted(ids, labels=ids).loss.backward()
    free = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in free:
            parameter -= 0.3 * parameter.grad / parameter.grad.norm().clamp(min=1e-12)
    after = forward(adapted, ids)
    assert not torch.allclose(after, expected, atol=1e-3)
    torch.testing.assert_close(decode(adapted, ids, 6)[0], after, rtol=0, atol=1e-9)
    torch.testing.assert_close(forward(adapted.merge_and_unload(), ids), after, rtol=0, atol=1e-6)
