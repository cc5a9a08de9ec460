"""The cache under whatever name, and steps whose cache is missing."""

import pytest
import torch
from tiny import stock_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from mea_compress import decoding
from mea_compress.compression import compress
from mea_compress.decoding import cache_argument, cache_of, check_decoding, decode_greedily, run_cached
from mea_compress.errors import VerificationError
from mea_compress.loading import load_model
from mea_compress.modeling.attention_mea import MeaAttention, take_cache
from mea_compress.recipe import Recipe

FORMS = [("head", "head"), ("frequency", "latent"), ("latent", "latent"), ("joint", "joint"), ("pool", "pool")]


@pytest.fixture(params=FORMS, ids="-".join)
def model(request, tmp_path):
    keys, values = request.param
    source = stock_checkpoint(tmp_path / "source", head_dim=8)
    recipe = Recipe(kv_ratio=0.5, fit="weights", key_composition=keys, value_composition=values)
    return load_model(compress(source, tmp_path / "out", recipe=recipe, progress=False).out)


def ids(*shape):
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(1))


def test_a_decode_step_without_its_cache_is_refused(model):
    positions = torch.full((2, 1), 4)
    with pytest.raises(ValueError, match="no cache holds what came before"), torch.no_grad():
        model(ids(2, 1), position_ids=positions, use_cache=False)
    with pytest.raises(ValueError, match="no cache holds what came before"), torch.no_grad():
        model(ids(2, 3), position_ids=positions + torch.arange(3), use_cache=False)


def test_a_compiled_decode_step_without_its_cache_is_refused(model):
    torch.compiler.reset()  # what other tests have compiled counts towards its limit
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="no cache holds what came before"), torch.no_grad():
        compiled(ids(2, 1), position_ids=torch.full((2, 1), 4), use_cache=False)


def test_a_cache_that_is_lost_on_its_way_to_the_attention_is_noticed(model, monkeypatch):
    """As under a release that hands it over in a way that nobody knows yet."""
    forward = MeaAttention.forward

    def lose(self, *args, **kwargs):
        kept = {name: value for name, value in kwargs.items() if not isinstance(value, DynamicCache)}
        return forward(self, *args, **kept)

    monkeypatch.setattr(MeaAttention, "forward", lose)
    with pytest.raises(ValueError, match="no cache holds what came before"):
        model.generate(ids(1, 5), max_new_tokens=4, eos_token_id=None, pad_token_id=0)
    with pytest.raises(VerificationError, match="the cache holds 0"):
        check_decoding(model, ids(1, 5), 3, 1e-4)


def test_whole_sequences_and_training_need_no_cache(model):
    with torch.no_grad():
        padded = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        for positions in (
            None,
            (padded.cumsum(-1) - 1).clamp(min=0),
            (padded.cumsum(-1) - 1).masked_fill(padded == 0, 1),
        ):
            model(ids(2, 4), attention_mask=padded, position_ids=positions, use_cache=False)
    model.train()
    model(ids(1, 4), position_ids=torch.arange(8, 12)[None], use_cache=False)  # a part of a sequence on this device


@pytest.mark.parametrize("name", ["past_key_value", "past_key_values", "cache", "whatever_comes_next"])
def test_the_cache_is_found_under_any_name(name):
    cache = DynamicCache()
    assert take_cache((), {name: cache, "position_ids": 1}) == (cache, {"position_ids": 1})
    assert take_cache((cache,), {"x": None}) == (cache, {"x": None})


def test_a_cache_of_another_kind_is_refused():
    class PagedAttentionCache:
        pass

    with pytest.raises(ValueError, match="PagedAttentionCache"):
        take_cache((), {"cache": PagedAttentionCache()})


def test_decoding_is_what_generate_writes(model):
    prompt = ids(2, 6)
    expected = model.generate(prompt, max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(decode_greedily(model, prompt, 7)[0], expected)
    assert check_decoding(model, prompt, 7, 1e-4) < 1e-4


def test_decoding_that_goes_astray_is_noticed(model, monkeypatch):
    def astray(model, new, cache=None, **options):
        logits, cache = run_cached(model, new, cache, **options)
        return (logits if logits.shape[1] > 1 else logits.flip(-1)), cache

    monkeypatch.setattr(decoding, "run_cached", astray)
    with pytest.raises(VerificationError, match="differs from the whole sequence"):
        check_decoding(model, ids(1, 5), 3, 1e-4)


def test_stock_models_have_a_cache_argument_and_outputs_a_cache():
    small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 32}
    stock = LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=2))
    assert cache_argument(stock) in ("past_key_values", "cache")
    assert cache_of(stock(ids(1, 3) % 32, use_cache=True)).get_seq_length() == 3
    assert cache_of(stock(ids(1, 3) % 32, use_cache=False)) is None
    with pytest.raises(TypeError, match="takes no cache"):
        cache_argument(torch.nn.Linear(1, 1))
