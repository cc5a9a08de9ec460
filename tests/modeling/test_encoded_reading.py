"""Decode steps that read components as they lie, against the same with heads rebuilt of them."""

import copy
import gc
import weakref
from itertools import pairwise

import pytest
import torch
from test_every_family import FAMILIES, SIZES
from tiny import scatter
from torch import nn
from transformers import CONFIG_MAPPING, AttentionInterface, PreTrainedConfig
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mea_compress.architectures.families import LayerGeometry
from mea_compress.architectures.geometry import find_geometry
from mea_compress.modeling import encoded_mea, family_classes
from mea_compress.modeling.encoded_mea import EncodedAttention, RoutedConfig, compose_block
from mea_compress.modeling.section_mea import ENCODED_COMPLEX, ENCODED_LOW_RANK, ENCODED_REAL, side_section

NAMES = (
    "cohere2",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "glm4",
    "gpt2",
    "gpt_oss",
    "granite",
    "granitemoehybrid",
    "llama4_text",
    "olmo2",
    "phi",
    "qwen3_next",
    "smollm3",
    "starcoder2",
)
EAGER_ONLY = {"gemma2", "gpt_oss"}


def spec(geometry, real=False):
    """A layer's entry: keys complex for each pair where RoPE rotates, else of low rank; or real ones on both sides."""
    if isinstance(geometry, str):
        return None
    entry = {name: getattr(geometry, name) for name in LayerGeometry.__dataclass_fields__}
    heads, pairs = geometry.heads, geometry.head_dim // 2
    if real:
        sides = side_section("key", "head", 1, ENCODED_REAL), side_section("value", "head", 1, ENCODED_REAL)
        return entry | sides[0] | sides[1]
    if geometry.rotary_dim:
        entry |= side_section("key", "frequency", heads / 2, ENCODED_COMPLEX)
        counts = [heads // 2] * pairs
        if heads > 2:
            counts[0], counts[1] = counts[0] + 1, counts[1] - 1
        entry["rotary_components"] = counts
    else:
        entry |= side_section("key", "latent", heads / 2, ENCODED_LOW_RANK)
    return entry | side_section("value", "latent", heads / 2 - 0.25, ENCODED_LOW_RANK)


def composed(name, implementation, real=False, **changes):
    """A model of a family with random weights and components of half its heads."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**SIZES | FAMILIES[name][0] | changes)
    settings = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    settings["mea"] = {"layers": [spec(geometry, real) for geometry in find_geometry(config)]}
    kind, _, model = family_classes(name)
    config = kind.from_dict(settings)
    config._attn_implementation, config._experts_implementation = implementation, "eager"
    return scatter(model(config))


def tokens(batch, length, seed=0):
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decoded(model, choice, ids, prompt, mask=None, cache=None, at_once=1):
    """Logits of every step that follows a prompt."""
    model.config.mea["decode"] = choice
    cache = DynamicCache(config=model.config) if cache is None else cache
    mask = torch.ones_like(ids) if mask is None else mask
    found = []
    steps = [0, *range(prompt, ids.shape[1], at_once), ids.shape[1]]
    for start, stop in pairwise(steps):
        output = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        found.append(output.logits)
    return torch.cat(found, dim=1)


def difference(first, second):
    return float((first - second).abs().max() / first.abs().max())


@pytest.fixture
def absorbed(monkeypatch):
    """Counts the layers and steps that read components as they lie."""
    calls = []
    attend = EncodedAttention.attend_to_components

    def counted(self, *args, **kwargs):
        calls.append(self)
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(EncodedAttention, "attend_to_components", counted)
    return calls


def blocks(model):
    return [module for module in model.modules() if isinstance(module, EncodedAttention)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_reading_components_is_reading_the_heads_rebuilt_of_them(name, implementation, absorbed):
    """Over soft-capping, sinks, windows shorter than the text, gates, norms, NoPE layers, and padding on the left."""
    if implementation == "sdpa" and name in EAGER_ONLY:
        pytest.skip("transformers has no sdpa for it")
    model = composed(name, implementation)
    ids, mask = tokens(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[0, :3] = 0
    expected = decoded(model, "expand", ids, 10, mask)
    assert not absorbed
    found = decoded(model, "absorb", ids, 10, mask)
    # Six steps, and the prompt, which has a mask here.
    assert len(absorbed) == 7 * len(blocks(model))
    assert difference(expected[:, 10:], found[:, 10:]) < 3e-6


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("cache", ["static", "several tokens"])
def test_other_caches_and_several_tokens_at_once(cache, real, absorbed):
    model = composed("olmo2", "sdpa", real)
    ids = tokens(2, 16)
    made = [StaticCache(config=model.config, max_cache_len=24) if cache == "static" else None for _ in range(2)]
    at_once = 1 if cache == "static" else 3
    expected = decoded(model, "expand", ids, 10, cache=made[0], at_once=at_once)
    found = decoded(model, "absorb", ids, 10, cache=made[1], at_once=at_once)
    assert absorbed
    assert difference(expected, found) < 3e-6


def test_wide_types_are_rounded_as_elsewhere(absorbed):
    model = composed("gemma3_text", "sdpa").bfloat16()
    ids = tokens(2, 16)
    expected, found = (decoded(model, choice, ids, 10).float() for choice in ("expand", "absorb"))
    assert absorbed
    assert difference(expected, found) < 0.05
    model = model.double()
    expected, found = (decoded(model, choice, ids, 10) for choice in ("expand", "absorb"))
    assert difference(expected, found) < 1e-6  # its norms compute in float32


def test_the_faster_one_is_taken_and_prompts_are_expanded(absorbed):
    model = composed("olmo2", "sdpa")
    ids = tokens(1, 100)
    decoded(model, "auto", ids, 98)
    assert len(absorbed) == 2 * len(blocks(model))  # two steps behind the prompt


def test_the_same_sequence_becomes_the_same_again(absorbed):
    """Also where its mask would let a short one be read absorbed from the second time on."""
    model = composed("gemma3_text", "eager")
    ids = tokens(2, 12)
    with torch.no_grad():
        first, second = (model(ids, use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)
    assert not absorbed


def test_attention_weights_are_given_where_they_were_given(absorbed):
    model = composed("gpt_oss", "eager")
    ids = tokens(1, 8)
    weights = {"expand": [], "absorb": []}
    for choice, kept in weights.items():
        hooks = [
            block.register_forward_hook(lambda _, __, output, kept=kept: kept.append(output[1]))
            for block in blocks(model)
        ]
        decoded(model, choice, ids, 7)
        for hook in hooks:
            hook.remove()
    assert absorbed
    assert len(weights["expand"]) == 4
    for expected, found in zip(*weights.values(), strict=True):
        torch.testing.assert_close(expected, found, atol=1e-5, rtol=1e-4)


def test_without_a_cache_and_with_gradients_nothing_changes():
    model = composed("olmo2", "sdpa")
    ids = tokens(2, 12)
    expected = decoded(model, "expand", ids, 11)
    for _ in range(2):
        output = model(ids, use_cache=False).logits
        output.sum().backward()
        assert difference(expected, output.detach()) < 3e-6
    assert all(block.key_composition.encoder.grad is not None for block in blocks(model))


def test_somebody_elses_attention_stays(monkeypatch, absorbed):
    model = composed("olmo2", "sdpa")
    stock, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def own(module, query, key, *args, **kwargs):
        seen.append(key.shape)
        return stock(module, query, key, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", own)
    decoded(model, "absorb", tokens(1, 8), 6)
    assert not absorbed
    assert seen[-1] == (1, 2, 8, 8)


def test_who_puts_the_implementation_back_puts_back_what_it_stood_for():
    model = composed("olmo2", "sdpa")
    config = blocks(model)[0].config
    before = config._attn_implementation
    assert before == encoded_mea.ATTENTION
    config._attn_implementation = "flex_attention"
    assert model.config._attn_implementation == config._attn_implementation == "flex_attention"
    config._attn_implementation = before
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    ids = tokens(1, 8)
    expected, found = (decoded(model, choice, ids, 6) for choice in ("expand", "absorb"))
    assert difference(expected, found) < 3e-6


def test_copies_and_caches_go_their_own_way(absorbed):
    model = composed("olmo2", "sdpa")
    ids = tokens(1, 8)
    expected = decoded(model, "absorb", ids, 6)
    twin = copy.deepcopy(model)
    assert blocks(twin)[0].config.routed is twin.config
    assert torch.equal(decoded(twin, "absorb", ids, 6), expected)
    cache = DynamicCache(config=model.config)
    decoded(model, "absorb", ids, 6, cache=cache)
    gone = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert gone() is None  # no mark holds it
    finally:
        gc.enable()


@pytest.mark.slow
def test_compiled_steps_are_the_same():
    model = composed("olmo2", "sdpa")
    ids = tokens(2, 12)
    expected = decoded(model, "absorb", ids, 9)
    forward = torch.compile(model, backend="eager")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        found = [forward(ids[:, :9], past_key_values=cache).logits]
        found += [forward(ids[:, t : t + 1], past_key_values=cache).logits for t in range(9, 12)]
    assert difference(expected, torch.cat(found, dim=1)) < 3e-6


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """As transformers' files have one; `bias` is what this one has beside softmax attention."""
    logits = query @ key.repeat_interleave(2, 1).mT * scaling + module.bias * torch.arange(key.shape[2])
    logits = logits if attention_mask is None else logits + attention_mask
    weights = logits.softmax(-1)
    return (weights @ value.repeat_interleave(2, 1)).transpose(1, 2), weights


class Block(nn.Module):
    """An attention block as families have them, which can do what none should."""

    def __init__(self, config):
        super().__init__()
        self.config, self.layer_idx = config, 0
        self.touches, self.keeps, self.bias = False, None, 0.0

    def forward(self, hidden, past_key_values: DynamicCache | None = None, attention_mask=None):
        query = hidden.unflatten(-1, (4, 8)).transpose(1, 2)
        key = value = query[:, ::2]
        key, value = past_key_values.update(key, value, self.layer_idx)
        if self.touches:
            key = key + 0.0
        if self.keeps is not None:
            self.keeps.append(key)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return attend(self, query, key, value, attention_mask, scaling=0.3)[0].flatten(2)


@pytest.fixture
def block():
    torch.manual_seed(0)
    config = PreTrainedConfig()
    config._attn_implementation, config.mea = "eager", {"decode": "absorb"}
    block = Block(config)
    geometry = LayerGeometry("block", 2, 8, 8, 0)
    compose_block(block, spec(geometry))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    return block.eval()


@torch.no_grad()
def run(block, steps=4, cache=None, hidden=None):
    cache = DynamicCache() if cache is None else cache
    hidden = torch.randn(1, 6 + steps, 32, generator=torch.Generator().manual_seed(1)) if hidden is None else hidden
    found = [block(hidden[:, :6], past_key_values=cache)]
    found += [block(hidden[:, t : t + 1], past_key_values=cache) for t in range(6, 6 + steps)]
    return torch.cat(found, dim=1)


def expanded(block):
    block.config.mea["decode"] = "expand"
    block.reads_components.clear()
    return run(block)


def test_a_block_is_read_absorbed_once_it_has_shown_that_it_can_be(block, absorbed):
    found = run(block)
    assert isinstance(block.config, RoutedConfig)
    assert block.reads_components == {"eager": True}
    assert len(absorbed) == 4  # not the first forward, which shows it
    torch.testing.assert_close(found, expanded(block), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("fault", "value"), [("touches", True), ("keeps", []), ("bias", 0.1)])
def test_blocks_that_do_something_else_get_heads(fault, value, block, absorbed):
    setattr(block, fault, value)
    found = run(block)
    assert block.reads_components == {"eager": False}
    assert not absorbed
    assert torch.equal(found, expanded(block))


def test_a_block_that_changes_components_later_is_an_error_and_not_another_answer(block):
    cache = DynamicCache()
    run(block, cache=cache)
    block.touches = True
    with pytest.raises(RuntimeError, match="set decode to expand in the section mea"):
        block(torch.randn(1, 1, 32), past_key_values=cache)


def test_settings_that_nobody_knows_are_left_to_the_block(block, absorbed):
    run(block)
    count = len(absorbed)
    mask = torch.zeros(1, 1, 1, 3)
    known = {"scaling": 0.3, "sliding_window": 4, "position_ids": mask, "other": None}
    query = torch.zeros(1, 4, 1, 8)
    assert block.may_absorb(query, 3, mask, known)
    assert not block.may_absorb(query, 3, mask, known | {"position_bias": mask})
    assert not block.may_absorb(query, 3, mask, known | {"dropout": 0.1})
    assert not block.may_absorb(query, 3, mask, known | {"scaling": None})
    assert not block.may_absorb(query.repeat(1, 1, 2, 1), 3, None, known)
    assert len(absorbed) == count
