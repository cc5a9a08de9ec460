"""Components at the cache of stock attention blocks, against dense matrices that are applied to what they cache."""

import copy

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GlmConfig, GlmForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

from mea_compress.heads.composed import FactoredHeads
from mea_compress.measure.cache import cache_bytes
from mea_compress.modeling import family_classes, register
from mea_compress.modeling.attention_mea import MODULES, SideSizes
from mea_compress.modeling.encoded_mea import ComponentCache, cache_parameter, encoded_class
from mea_compress.modeling.section_mea import (
    ENCODED,
    ENCODED_COMPLEX,
    ENCODED_LOW_RANK,
    ENCODED_REAL,
    rotary_pairs,
    side_section,
)

HEADS, HEAD_DIM = 4, 8
SIZES = tiny.SIZES | {"num_key_value_heads": HEADS, "head_dim": HEAD_DIM}
GEMMA = {**SIZES, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
COUNTS = [3, 2, 1, 2]  # complex components of each rotary pair


def composition(form, interleaved=False):
    """A module of the form with random weights, at half its width."""
    width = HEADS * HEAD_DIM // 2
    sizes = SideSizes(
        width, HEADS, HEAD_DIM, HEAD_DIM // 2, tuple(COUNTS) if form.per_pair else (), interleaved=interleaved
    )
    shape, encoder = (of(width, width, HEADS, HEAD_DIM) for of in (form.weight_shape, form.encoder_shape))
    module = MODULES[form.name](sizes, shape, encoder).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def dense(form, module):
    """Decoder (H * d, width) and encoder (width, H * d) as matrices."""
    pairs = rotary_pairs(HEAD_DIM, HEAD_DIM // 2, module.sizes.interleaved)
    counts = tuple(COUNTS) if form.per_pair else None
    side = FactoredHeads(
        form, HEADS, HEAD_DIM, np.zeros((module.sizes.width, 1)), module.weight.detach().numpy(), counts, pairs
    )
    weight = module.encoder.detach().numpy()
    if form is ENCODED_LOW_RANK:
        encoder = weight
    elif form is ENCODED_REAL:
        encoder = np.kron(weight, np.eye(HEAD_DIM))
    else:  # a complex number for each component and head, on the channels of the component's pair
        total, encoder = sum(COUNTS), np.zeros((2 * sum(COUNTS), HEADS, HEAD_DIM))
        pair_of = [pair for pair, count in enumerate(COUNTS) for _ in range(count)]
        for component, pair in enumerate(pair_of):
            a, b = pairs[0][pair], pairs[1][pair]
            real, imaginary = weight[0, component], weight[1, component]
            encoder[component, :, a], encoder[component, :, b] = real, -imaginary
            encoder[total + component, :, a], encoder[total + component, :, b] = imaginary, real
        encoder = encoder.reshape(2 * total, -1)
    return side.expansion(), encoder


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("form", ENCODED.values(), ids=lambda form: form.name)
def test_encoding_and_rebuilding_are_the_matrices_that_they_stand_for(form, interleaved):
    torch.manual_seed(0)
    module = composition(form, interleaved)
    decoder, encoder = dense(form, module)
    heads = torch.randn(2, HEADS, 5, HEAD_DIM, dtype=torch.float64)
    components = module(heads, "encode")
    flat = heads.transpose(1, 2).flatten(2)
    torch.testing.assert_close(components, flat @ torch.from_numpy(encoder).T, rtol=0, atol=1e-12)
    rebuilt = module(components).flatten(2)
    torch.testing.assert_close(rebuilt, components @ torch.from_numpy(decoder).T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ENCODED.values(), ids=lambda form: form.name)
def test_absorbed_queries_see_what_heads_would_show_them(form):
    module = composition(form)
    queries = torch.randn(1, HEADS, 3, HEAD_DIM, dtype=torch.float64)
    components = torch.randn(1, 6, module.sizes.width, dtype=torch.float64)
    expected = queries @ module(components).transpose(1, 2).mT
    measured = module(queries, "absorb") @ components[:, None].mT
    torch.testing.assert_close(measured, expected, rtol=0, atol=1e-12)


def spec(block, key_form, components, rotary_dim=HEAD_DIM, interleaved=False):
    entry = {"block": block, "heads": HEADS, "head_dim": HEAD_DIM, "value_dim": HEAD_DIM}
    entry |= {"rotary_dim": rotary_dim, "interleaved": interleaved}
    entry |= side_section("key", "frequency" if key_form.per_pair else "latent", components, key_form)
    entry |= side_section("value", "latent", components, ENCODED_LOW_RANK)
    return entry | ({"rotary_components": COUNTS} if key_form.per_pair else {})


def composed(config, stock, layers):
    register()
    kind, _, model_class = family_classes(config.model_type)
    settings = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    model = model_class(kind.from_dict(settings | {"mea": {"layers": layers}})).double().eval()
    missing, unexpected = model.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected and all("_composition." in name for name in missing)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "_composition." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


class Dense(DynamicCache):
    """Hands back what a composed cache would, from every head, by dense matrices."""

    def __init__(self, blocks):
        super().__init__()
        self.maps = {}
        for index, block in blocks.items():
            parts = []
            for side in ("key", "value"):
                module = getattr(block, f"{side}_composition")
                form = ENCODED_COMPLEX if module.sizes.rotary_components else ENCODED_LOW_RANK
                decoder, encoder = dense(form, module)
                parts.append(torch.from_numpy(decoder @ encoder))
            self.maps[index] = parts

    def update(self, keys, values, layer_idx, *args, **kwargs):
        keys, values = super().update(keys, values, layer_idx, *args, **kwargs)
        if layer_idx not in self.maps:
            return keys, values
        heads = []
        for side, matrix in zip((keys, values), self.maps[layer_idx], strict=True):
            flat = side.transpose(1, 2).flatten(2) @ matrix.T
            heads.append(flat.unflatten(-1, (HEADS, -1)).transpose(1, 2))
        return heads


@pytest.fixture(scope="module", params=["gemma3", "glm"])
def models(request):
    """A stock model in float64 and the same with components: sliding and full layers, or interleaved partial RoPE."""
    torch.manual_seed(0)
    if request.param == "gemma3":
        config, kind = Gemma3TextConfig(**GEMMA), Gemma3ForCausalLM
        layers = [
            spec("model.layers.0.self_attn", ENCODED_LOW_RANK, 2),
            spec("model.layers.1.self_attn", ENCODED_LOW_RANK, 2),
        ]
    else:
        config, kind = GlmConfig(**SIZES), GlmForCausalLM
        layers = [None, spec("model.layers.1.self_attn", ENCODED_COMPLEX, 2, HEAD_DIM // 2, True)]
    stock = kind(config).double().eval()
    return stock, composed(config, stock, copy.deepcopy(layers))


def tokens(batch, length):
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_composed_model_is_the_stock_one_over_projected_heads(models):
    stock, model = models
    ids = tokens(2, 12)
    blocks = {
        index: layer.self_attn for index, layer in enumerate(model.model.layers) if hasattr(layer.self_attn, "mea")
    }
    expected = stock(ids, past_key_values=Dense(blocks)).logits
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=1e-10)
    assert (stock(ids).logits - expected).abs().max() > 1e-2


@torch.no_grad()
def test_cached_equals_uncached_and_the_cache_holds_components_alone(models):
    _, model = models
    ids, cache = tokens(2, 12), DynamicCache()
    steps = [model(ids[:, :5], past_key_values=cache).logits]
    steps += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(5, 12)]
    torch.testing.assert_close(torch.cat(steps, 1), model(ids, use_cache=False).logits, rtol=0, atol=1e-10)
    heads = sum(HEADS if spec is None else spec["key_components"] for spec in model.config.mea["layers"])
    assert cache_bytes(cache) == 2 * heads * HEAD_DIM * ids.numel() * 8


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generate_with_any_cache_is_generate_without(models, options):
    _, model = models
    ids = tokens(2, 7)
    common = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    beams = {name: value for name, value in options.items() if name == "num_beams"}
    expected = model.generate(ids, use_cache=False, **common, **beams)
    assert torch.equal(model.generate(ids, **common, **options), expected)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(models):
    _, model = models
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(padded[0, 4:], model(ids[:1, 4:]).logits[0], rtol=0, atol=1e-10)


@torch.no_grad()
def test_saving_and_loading_changes_nothing(models, tmp_path):
    _, model = models
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and again.config.mea == model.config.mea
    ids = tokens(2, 9)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


def test_the_cache_is_found_whatever_it_is_called():
    """A release that renames the argument again changes nothing."""

    class Block(torch.nn.Module):
        def forward(self, hidden, storage: "DynamicCache | None" = None, scale=1.0):
            return storage, hidden * scale

    block = encoded_class(Block)()
    assert cache_parameter(type(block)) == "storage"
    cache, hidden = DynamicCache(), torch.ones(1)
    for arguments, options in (((hidden, cache), {}), ((hidden,), {"storage": cache}), ((hidden,), {"cache": cache})):
        stand_in, output = block(*arguments, scale=2.0, **options)
        assert isinstance(stand_in, ComponentCache) and stand_in.cache is cache and output == 2
    assert block(hidden)[0].cache is None


def test_a_static_cache_of_a_stock_model_has_room_for_components(models):
    _, model = models
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(tokens(1, 6), past_key_values=cache)
    widths = [layer.keys.shape[1] * layer.keys.shape[3] for layer in cache.layers]
    expected = [HEADS if spec is None else spec["key_components"] for spec in model.config.mea["layers"]]
    assert widths == [count * HEAD_DIM for count in expected]
