"""Spectra and similarities against what the model's own projections send, and of heads that are alike by design."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_every_family import FAMILIES, load, stock_family
from tiny import stock_checkpoint, stock_model
from transformers.cache_utils import DynamicCache

from mea_compress.architectures import open_checkpoint
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.layers.read import read_heads
from mea_compress.sweeping.heads import cluster_order, describe_heads, survey_heads

TOKENS = torch.randint(3, 30, (4, 64), generator=torch.Generator().manual_seed(0))


def test_what_the_heads_send_is_what_the_model_computes(tmp_path):
    model = stock_model("qwen2", num_hidden_layers=3)
    model.save_pretrained(tmp_path / "SRC")
    sent = []
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda _, __, output: sent.append(output.flatten(0, 1).double()))
    with torch.no_grad():
        model(TOKENS)
    source = open_checkpoint(tmp_path / "SRC")
    found = list(survey_heads(source, TOKENS, torch.device("cpu"), progress=False))
    assert [layer["layer"] for layer in found] == [0, 1, 2]
    for layer, keys in zip(found, sent, strict=True):
        values = torch.linalg.svdvals(keys)
        expected = (values / values[0]).numpy()
        shown, ranks = np.array(layer["key"]["spectrum"]), np.array(layer["key"]["ranks"])
        assert layer["key"]["channels"] == len(values) == 16
        np.testing.assert_allclose(shown, expected[ranks - 1], rtol=2e-2, atol=1e-3)

        heads = keys.unflatten(1, (4, -1))
        gram = torch.einsum("ngc,nhc->gh", heads, heads)
        cosines = (gram / gram.diag().outer(gram.diag()).sqrt()).abs().numpy()
        order = layer["key"]["order"]
        assert sorted(order) == [0, 1, 2, 3]
        np.testing.assert_allclose(layer["key"]["before"], cosines[order][:, order], atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3_text", "gpt2", "qwen3_next"])
def test_heads_of_a_family_composed_at_its_cache_are_those_that_it_caches(name, tmp_path):
    source = stock_family(name, tmp_path / "SRC")
    cache = DynamicCache()  # without the configuration, so that no token slides out of a window
    if name == "qwen3_next":
        cache = DynamicCache(config=load(source).config)
    with torch.no_grad():
        load(source)(TOKENS, past_key_values=cache)
    found = list(survey_heads(open_checkpoint(source), TOKENS, torch.device("cpu"), progress=False))
    layers = [number for number, channels in enumerate(FAMILIES[name][1]) if channels is not None]
    assert [layer["layer"] for layer in found] == layers
    for layer in found:
        for side, heads in (("key", cache.layers[layer["layer"]].keys), ("value", cache.layers[layer["layer"]].values)):
            rows = heads.double().transpose(1, 2).flatten(0, 1)  # (N, H, d)
            values = torch.linalg.svdvals(rows.flatten(1))
            shown, ranks = np.array(layer[side]["spectrum"]), np.array(layer[side]["ranks"])
            assert layer[side]["channels"] == len(values)
            np.testing.assert_allclose(shown, (values / values[0]).numpy()[ranks - 1], rtol=2e-2, atol=1e-3)
            gram = torch.einsum("ngc,nhc->gh", rows, rows)
            cosines = (gram / gram.diag().outer(gram.diag()).sqrt()).abs().numpy()
            order = layer[side]["order"]
            np.testing.assert_allclose(layer[side]["before"], cosines[order][:, order], atol=2e-3)
            assert layer[side]["after"] is None


def statistics_of(heads, seed=1):
    """Statistics of unit inputs and keys that all count alike."""
    size = heads.key.shape[-1]
    first, second = heads.pairs
    pairs = (heads.key[:, first] + 1j * heads.key[:, second]).swapaxes(0, 1)  # (P, H, D + 1)
    covariance = pairs @ pairs.conj().swapaxes(1, 2)
    sensitivity = np.ones((len(heads.key), len(first)))
    return LayerStatistics(1000, np.eye(size), np.eye(size), covariance, sensitivity)


def test_alignment_finds_heads_that_differ_by_a_rotation_alone(tmp_path):
    heads = read_heads(open_checkpoint(stock_checkpoint(tmp_path / "SRC", head_dim=8)), 0)
    draw = np.random.default_rng(0)
    # Keys 2 and 3 are those of 0 and 1 with every rotary pair rotated; values likewise, with any rotation of a head.
    first, second = heads.pairs
    key = heads.key.copy()
    angles = draw.uniform(0, 2 * np.pi, (2, len(first)))[..., None]
    key[2:, first] = np.cos(angles) * key[:2, first] - np.sin(angles) * key[:2, second]
    key[2:, second] = np.sin(angles) * key[:2, first] + np.cos(angles) * key[:2, second]
    rotation = np.linalg.qr(draw.normal(size=(2, 8, 8)))[0]
    value, output = heads.value.copy(), heads.output.copy()
    value[2:] = rotation @ value[:2]
    output[4:] = output[:4] @ rotation.repeat(2, axis=0).mT
    heads = replace(heads, key=key, value=value, output=output)
    described = describe_heads(heads, statistics_of(heads))
    for side in ("key", "value"):
        order = described[side]["order"]
        partners = {tuple(sorted(order[:2])), tuple(sorted(order[2:]))}
        assert partners == {(0, 2), (1, 3)}, side
        before, after = (np.array(described[side][moment]) for moment in ("before", "after"))
        assert after[0, 1] == pytest.approx(1, abs=5e-3) and after[2, 3] == pytest.approx(1, abs=5e-3)
        assert before[0, 1] < 0.8 and before[2, 3] < 0.8


def test_a_norm_leaves_keys_as_they_are(tmp_path):
    source = open_checkpoint(stock_checkpoint(tmp_path / "SRC", "qwen3"))
    for layer in survey_heads(source, TOKENS, torch.device("cpu"), progress=False):
        assert layer["key"]["after"] is None and layer["value"]["after"] is not None


def test_a_head_that_is_alone_is_like_nothing(tmp_path):
    source = open_checkpoint(stock_checkpoint(tmp_path / "SRC", num_key_value_heads=1))
    (layer, _) = survey_heads(source, TOKENS, torch.device("cpu"), progress=False)
    assert "order" not in layer["key"] and layer["key"]["spectrum"][0] == 1


def test_heads_that_are_alike_lie_side_by_side():
    group = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    noise = np.random.default_rng(0).uniform(0, 0.2, (8, 8))
    similarity = np.where(group[:, None] == group, 0.9, 0.1) + (noise + noise.T) / 4
    np.fill_diagonal(similarity, 1)
    order = cluster_order(similarity)
    assert sorted(order) == list(range(8))
    changes = np.count_nonzero(np.diff(group[order]))
    assert changes == 2
