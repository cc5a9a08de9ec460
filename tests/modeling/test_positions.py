"""Where cached tokens stood is known and not guessed, whatever hands the cache, the mask and the frequencies over."""

import copy

import pytest
import torch
from test_modeling_mea import build, decode, forward, tokens
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

FORMS = [("none", "none"), ("head", "head"), ("frequency", "latent"), ("pool", "pool"), ("latent", "head")]
LATENT = [("latent", "latent"), ("joint", "joint")]
LIMIT = 40
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": LIMIT,
    "partial_rotary_factor": 1.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
pytestmark = pytest.mark.usefixtures("exact_norms")


def attend_without_mask(module, query, key, value, attention_mask, scaling=None, **_):
    """FlashAttention's rule where it gets no mask: causal, the last query beside the last key."""
    assert attention_mask is None
    group, new, length = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    seen = torch.arange(length) <= torch.arange(new)[:, None] + length - new
    return ((query @ key.mT * scaling).masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2), None


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize(("keys", "values"), FORMS + LATENT)
def test_turns_of_a_chat_without_a_mask(keys, values, family):
    AttentionInterface.register("unmasked", attend_without_mask)
    AttentionMaskInterface.register("unmasked", flash_attention_mask)
    model, ids = build(family, keys, values), tokens(2, 30)
    expected = forward(model, ids)
    model.set_attn_implementation("unmasked")
    cache, turns = DynamicCache(config=model.config), []
    with torch.no_grad():
        for part in ids.split((12, 8, 1, 9), 1):
            turns.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(turns, 1), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize(("keys", "values"), FORMS + LATENT)
def test_dropped_tokens_are_as_hidden_ones(keys, values, family):
    """As kvpress, StreamingLLM and H2O drop them: from the tensors of a filled cache."""
    model, ids, kept = build(family, keys, values), tokens(1, 31), [0, 1, 2, 3, *range(16, 30)]
    last = {"position_ids": torch.tensor([[30]])}
    mask = torch.zeros(1, 31, dtype=torch.long)
    mask[:, [*kept, 30]] = 1
    with torch.no_grad():
        full = model(ids[:, :30], past_key_values=DynamicCache(config=model.config)).past_key_values
        expected = model(ids[:, 30:], past_key_values=copy.deepcopy(full), attention_mask=mask, **last).logits
        for layer in full.layers:
            layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
        found = model(ids[:, 30:], past_key_values=full, **last).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "values"), [("head", "head"), ("latent", "latent")])
def test_flex_attention_decodes(keys, values):
    model, ids = build("Llama", keys, values, dtype=torch.float32), tokens(1, 14)
    expected = forward(model, ids)
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(decode(model, ids, 9)[0], expected, rtol=0, atol=1e-4)


def long_model(rope, keys, values):
    if rope is LONGROPE:
        more = {"max_position_embeddings": 4096, "original_max_position_embeddings": LIMIT, "rope_parameters": rope}
        return build("Phi3", keys, values, partial_rotary_factor=1.0, **more)
    return build("Llama", keys, values, max_position_embeddings=LIMIT, rope_parameters=rope)


@pytest.mark.parametrize("decode_by", ["absorb", "expand"])
@pytest.mark.parametrize(("keys", "values"), FORMS + LATENT)
def test_decoding_beyond_the_limit_of_longrope(keys, values, decode_by, monkeypatch):
    """More tokens than a tile, beyond the limit where frequencies change."""
    monkeypatch.setattr("mea_compress.modeling.attention_mea.TILE", 16)
    model, ids = long_model(LONGROPE, keys, values), tokens(1, 60)
    model.config.mea["decode"] = decode_by
    torch.testing.assert_close(decode(model, ids, 50)[0], forward(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
@pytest.mark.parametrize(("keys", "values"), FORMS + LATENT)
def test_a_static_cache_longer_than_the_limit_changes_nothing(keys, values, rope):
    model, ids = long_model(rope, keys, values), tokens(1, 20)
    cache, steps = StaticCache(config=model.config, max_cache_len=100), []
    with torch.no_grad():
        for part in ids.split((12, 1, 1, 6), 1):
            steps.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(steps, 1), forward(long_model(rope, keys, values), ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("keys", "values"), LATENT)
def test_reading_a_cache_leaves_the_frequencies_as_the_model_set_them(keys, values):
    model, ids = long_model(DYNAMIC, keys, values), tokens(1, 60)
    _, cache = decode(model, ids, 50)
    before = model.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache, position_ids=torch.tensor([[60]]))
    assert model.model.rotary_emb.max_seq_len_cached == 61 and not torch.equal(before, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(("keys", "values"), LATENT)
def test_a_quantised_cache_is_refused(keys, values):
    class QuantizedLayer(type(DynamicCache().layer_class_to_replicate())):
        pass

    model, cache = build("Llama", keys, values), DynamicCache()
    cache.layer_class_to_replicate = QuantizedLayer
    with pytest.raises(ValueError, match="a quantised cache would round the positions"):
        model(tokens(1, 4), past_key_values=cache)
