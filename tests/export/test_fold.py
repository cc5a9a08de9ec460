"""Folded projections against attention over the reconstructed heads, in float64."""

import numpy as np
import pytest
from exporting import WAYS, compressed

from mea_compress.architectures import open_checkpoint
from mea_compress.errors import RequestError
from mea_compress.exporting.fold import absorbed_output, absorbed_queries, ordered_keys
from mea_compress.exporting.form import stock_form
from mea_compress.heads.composed import split_heads
from mea_compress.layers.read import read_composed, read_projection, read_side
from mea_compress.modeling.section_mea import rotary_pairs

TOKENS = 7


def opened(directory, case, way, **more):
    source = open_checkpoint(compressed(directory, case, way, **more))
    return source, stock_form(source, source.config.mea["layers"], "llama" if case.startswith("phi3") else "stock")


def inputs(source):
    """Hidden states with a last one for biases, (T, D + 1), and the angle of every source pair at every token."""
    generator = np.random.default_rng(0)
    angles = generator.random((TOKENS, source.head_dim // 2)) * 6
    angles[:, source.rotary_dim // 2 :] = 0
    hidden = generator.standard_normal((TOKENS, source.config.hidden_size))
    return np.concatenate((hidden, np.ones((TOKENS, 1))), 1), angles


def logits(queries, keys, angles, pairs, hidden):
    """Scaled logits of heads (h, d, D + 1) that RoPE rotates in the given pairs of channels: (Hq, T, T)."""
    first, second = pairs

    def rotated(heads):
        projected = np.einsum("hdx,tx->htd", heads, hidden)
        return (projected[..., first] + 1j * projected[..., second]) * np.exp(1j * angles)

    keys = rotated(keys).repeat(len(queries) // len(keys), 0)
    return (rotated(queries) @ keys.conj().mT).real / queries.shape[1] ** 0.5


CASES = [("llama-rope-bias-wide-tied", way) for way in WAYS]
CASES += [("phi3-partial", way) for way in WAYS if way != "pool"]  # pooled heads keep their RoPE: nothing is folded


@pytest.mark.parametrize(("case", "way"), CASES)
def test_folded_queries_and_ordered_keys_give_the_same_logits(case, way, tmp_path):
    source, form = opened(tmp_path, case, way)
    hidden, angles = inputs(source)
    if case == "llama-rope-bias-wide-tied":  # biases take part
        assert np.abs(read_projection(source, 0, "query")[:, -1]).min() > 0
    expected = logits(
        split_heads(read_projection(source, 0, "query"), source.head_dim),
        read_side(source, 0, "key"),
        angles,
        rotary_pairs(source.head_dim, source.rotary_dim),
        hidden,
    )
    queries = split_heads(absorbed_queries(source, form, 0), form.head_dim)
    keys = split_heads(ordered_keys(source, form, 0), form.head_dim)
    assert len(keys) == form.groups
    half = form.head_dim // 2
    halves = (list(range(half)), list(range(half, form.head_dim)))
    found = logits(queries, keys, angles[:, list(form.source_pairs)], halves, hidden)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("way", WAYS)
def test_a_folded_output_projection_reads_the_components(way, tmp_path):
    source, form = opened(tmp_path, "llama", way)
    group = source.config.num_attention_heads // source.config.num_key_value_heads
    output = source.reader.read_array("model.layers.0.self_attn.o_proj.weight").astype(np.float64)
    values = read_side(source, 0, "value").repeat(group, 0)  # (Hq, d, D + 1)
    components = split_heads(read_composed(source, 0, "value").projection, form.head_dim)
    components = components.repeat(source.config.num_attention_heads // form.groups, 0)
    for head in range(source.config.num_attention_heads):
        old = slice(head * source.head_dim, (head + 1) * source.head_dim)
        new = slice(head * form.head_dim, (head + 1) * form.head_dim)
        found = absorbed_output(source, form, 0)[:, new] @ components[head]
        np.testing.assert_allclose(found, output[:, old] @ values[head], rtol=0, atol=1e-12)


def test_heads_that_read_another_group_are_noticed(tmp_path):
    source, form = opened(tmp_path, "llama", "head")
    for layer in source.config.mea["layers"]:
        layer["groups"] = 2
    form = stock_form(source, source.config.mea["layers"])
    with pytest.raises(RequestError, match="set groups to 1"):
        absorbed_queries(source, form, 0)
