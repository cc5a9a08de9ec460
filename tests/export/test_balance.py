"""Balanced exports: the same function, and less lost where the cache keeps few bits."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from exporting import QUICK, WAYS, compressed, load
from published import TEXT, publish
from safetensors.torch import load_file, save_file
from tiny import stock_checkpoint
from transformers import AttentionInterface, AutoTokenizer
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mea_compress.architectures import open_checkpoint
from mea_compress.cli import cli
from mea_compress.compression import compress
from mea_compress.errors import RequestError
from mea_compress.exporting.balance import balanced_bases, balancing, balancing_tokens, exported_pairs
from mea_compress.exporting.fold import changed_projections, unchanged_projections
from mea_compress.exporting.form import stock_form
from mea_compress.exporting.stock import export
from mea_compress.recipe import Recipe

TOKENS = 7
EXPORTS = [("llama", way, "stock") for way in WAYS]
EXPORTS += [
    ("llama-rope-bias-wide-tied", "frequency", "stock"),
    ("mistral", "head in 2 groups", "stock"),
    ("qwen2", "frequency", "stock"),
    ("qwen2", "frequency in 2 groups", "llama"),
    ("qwen3", "pool", "stock"),
    ("phi3-partial", "pool", "stock"),
    ("phi3", "head", "llama"),
]
# A model whose exported head has 64 channels, in blocks of 32.
LARGE = {"hidden_size": 64, "head_dim": 32}


def ids(shape=(2, 20)):
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "way", "form"), EXPORTS)
def test_a_balanced_export_computes_what_the_compressed_checkpoint_does(case, way, form, tmp_path):
    out = compressed(tmp_path, case, way)
    plain = export(out, tmp_path / "plain", format=form, progress=False)
    result = export(out, tmp_path / "export", format=form, balance=True, progress=False)
    with torch.no_grad():
        expected = load(out)(ids()).logits
        found = load(tmp_path / "export")(ids()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert result.verification["kv_bytes_per_token"] == plain.verification["kv_bytes_per_token"]
    assert result.to_json()["balanced"] and not plain.to_json()["balanced"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "export"))
    assert {name: tensor.shape for name, tensor in before.items()} == {n: tensor.shape for n, tensor in after.items()}
    assert not all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("case", ["llama-rope-bias-wide-tied", "phi3-partial"])
@pytest.mark.parametrize("way", WAYS)
def test_in_float64_logits_and_outputs_are_the_same_to_rounding(case, way, tmp_path):
    source = open_checkpoint(compressed(tmp_path, case, way))
    form = stock_form(
        source,
        source.config.mea["layers"],
        "stock" if case == "llama-rope-bias-wide-tied" or way == "pool" else "llama",
    )
    generator = np.random.default_rng(0)
    hidden = np.concatenate((generator.standard_normal((TOKENS, source.config.hidden_size)), np.ones((TOKENS, 1))), 1)
    first, second = (np.array(channels) for channels in exported_pairs(source, form))
    # Channels that rotate together do so by one angle for every source pair; those that do not rotate have none.
    angles = 6 * generator.random((TOKENS, source.head_dim // 2))
    angles[:, source.rotary_dim // 2 :] = 0
    angles = angles[:, list(form.source_pairs)]

    def heads(rows):
        return np.einsum("hdx,tx->htd", rows.reshape(-1, form.head_dim, rows.shape[-1]), hidden)

    def rotated(rows):
        channels = heads(rows)
        return (channels[..., first] + 1j * channels[..., second]) * np.exp(1j * angles)

    def attention(projections):
        queries, keys, values = (
            rotated(projections["q_proj"]()),
            rotated(projections["k_proj"]()),
            heads(projections["v_proj"]()),
        )
        group = len(queries) // len(keys)
        logits = (queries @ keys.repeat(group, 0).conj().mT).real
        output = projections["o_proj"]().reshape(-1, len(queries), form.head_dim)
        return logits, np.einsum("xhd,htd->htx", output, values.repeat(group, 0)), keys

    for layer, basis in enumerate(balanced_bases(source, form, ids((4, 32)), progress=False)):
        before = attention(unchanged_projections(source, layer) | changed_projections(source, form, layer))
        after = attention(changed_projections(source, form, layer, basis))
        for expected, found in zip(before[:2], after[:2], strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
        assert np.abs(after[2] - before[2]).max() > 1e-3


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_balancing_makes_both_matrices_the_same_diagonal_and_their_product_smallest(kind):
    generator = np.random.default_rng(0)

    def positive(size=6):
        root = generator.standard_normal((size, size)) * np.geomspace(0.5, 2, size)
        root = root + 1j * generator.standard_normal((size, size)) if kind == "complex" else root
        return root @ root.conj().T

    covariance, metric = positive(), positive()
    basis = balancing(covariance, metric)
    inverse = np.linalg.inv(basis)
    cached, read = basis @ covariance @ basis.conj().T, inverse.conj().T @ metric @ inverse
    np.testing.assert_allclose(cached, read, rtol=0, atol=1e-9 * np.abs(read).max())
    np.testing.assert_allclose(cached, np.diag(np.diag(cached)), rtol=0, atol=1e-9 * np.abs(read).max())
    smallest = np.trace(cached).real * np.trace(read).real
    assert smallest < np.trace(covariance).real * np.trace(metric).real
    for _ in range(20):  # no other basis near it or far from it does better
        change = np.eye(6) + generator.standard_normal((6, 6)) * generator.choice([0.01, 1.0])
        back = np.linalg.inv(change)
        other = np.trace(change @ cached @ change.T).real * np.trace(back.T @ read @ back).real
        assert other > smallest * (1 - 1e-12)


def with_outliers(directory, case):
    """A source some of whose key and value channels are much louder than the others, as biases make them in Qwen2."""
    stock_checkpoint(directory, case, **LARGE, num_key_value_heads=4)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("k_proj.weight"):
            tensor.view(4, 32, -1)[:, [3, 19]] *= 20
        if name.endswith("k_proj.bias"):
            tensor.view(4, 32)[:, [5, 21]] += 20
        if name.endswith("v_proj.weight"):
            tensor.view(4, 32, -1)[:, [1, 8]] *= 20
        if name.endswith("q_proj.weight"):  # so that no logit is too large for a softmax
            tensor.view(8, 32, -1)[:, [3, 19]] /= 20
    save_file(tensors, file, metadata={"format": "pt"})


def rounded(tensor, kind):
    """What llama.cpp's q4_0 and q8_0 make of a tensor in blocks of 32 (ggml-quants.c), its scales in float16."""
    blocks = tensor.reshape(-1, 32)
    if kind == "q8_0":
        scale = (blocks.abs().amax(1, keepdim=True) / 127).half().float()
        codes = torch.where(scale != 0, blocks / scale, 0).round()
    else:
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        scale = (largest / -8).half().float()
        codes = torch.where(scale != 0, (blocks / scale + 8.5).floor().clamp(0, 15) - 8, 0)
    return (codes * scale).reshape(tensor.shape)


def neighbours(tensor):
    """Channels in the order in which llama.cpp caches keys: the two of a rotary pair beside each other."""
    return tensor.unflatten(-1, (2, -1)).mT.flatten(-2)


def halves(tensor):
    return tensor.unflatten(-1, (-1, 2)).mT.flatten(-2)


@torch.no_grad()
def logits(directory, kind=None):
    """Logits of a text (T, V), what attention reads being rounded first."""

    def attend(module, query, key, value, mask, **options):
        if kind is not None:
            key, value = halves(rounded(neighbours(key), kind)), rounded(value, kind)
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register("rounded_cache", attend)
    model = load(directory)
    model.set_attn_implementation("rounded_cache")
    return model(ids((4, 48)), use_cache=False).logits.log_softmax(-1)


def spread(directory):
    """How much louder the loudest channel of cached keys and of values is than the median, of the worst head."""
    cache = DynamicCache()
    with torch.no_grad():
        load(directory)(ids((4, 48)), past_key_values=cache, use_cache=True)
    result = []
    for side in ("keys", "values"):
        power = [getattr(layer, side).square().mean((0, 2)) for layer in cache.layers]  # (heads, channels)
        result.append(max(float((channels.amax(-1) / channels.median(-1).values).sqrt().max()) for channels in power))
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("case", "way"), [("llama", "frequency"), ("qwen2", "pool"), ("mistral-full", "head")])
def test_outlying_channels_are_spread_and_few_bits_lose_less(case, way, tmp_path):
    with_outliers(tmp_path / "source", case)
    out = compressed(tmp_path, case, way)
    for balance in (False, True):
        export(out, tmp_path / f"export {balance}", balance=balance, progress=False)
    before, after = (spread(tmp_path / f"export {balance}") for balance in (False, True))
    assert before[0] > 10 and after[0] < 0.3 * before[0]
    assert after[1] < min(before[1], 1.5)  # latents of random values are even already
    lost = {}
    for kind in ("q4_0", "q8_0"):
        for balance in (False, True):
            exact = logits(tmp_path / f"export {balance}")
            found = logits(tmp_path / f"export {balance}", kind)
            lost[kind, balance] = float((exact.exp() * (exact - found)).sum(-1).mean())
        assert 0 < lost[kind, True] < 0.3 * lost[kind, False]


def test_the_command_line_balances_and_says_so(tmp_path):
    out = compressed(tmp_path, way="frequency")
    done = CliRunner().invoke(cli, ["export", str(out), str(tmp_path / "export"), "--balance"])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "export" / "export.json").read_text())["balanced"] is True
    assert "balanced" in (tmp_path / "export" / "README.md").read_text()


def test_a_text_is_looked_at_where_there_is_one(tmp_path):
    stock_checkpoint(tmp_path / "source", "llama", vocab_size=700)
    publish(tmp_path / "source", "llama", "LlamaTokenizer")
    out = compressed(tmp_path, way="frequency")
    (tmp_path / "text.txt").write_text(TEXT * 100)
    tokens = balancing_tokens(open_checkpoint(out), str(tmp_path / "text.txt"), progress=False)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokens.shape[1] == 256 and tokenizer.decode(tokens[0], skip_special_tokens=True)[:40] in TEXT * 100
    export(out, tmp_path / "sampled", balance=True, progress=False)
    arguments = ["export", str(out), str(tmp_path / "read"), "--balance", "--text", str(tmp_path / "text.txt")]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    sampled, read = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("sampled", "read"))
    assert sampled != read


def test_a_text_that_nothing_looks_at_is_refused(tmp_path):
    with pytest.raises(RequestError, match="ask for `balance` too"):
        export(compressed(tmp_path), tmp_path / "export", text="text.txt", progress=False)


def test_the_same_bytes_come_out_twice(tmp_path):
    out = compressed(tmp_path, way="frequency")
    for name in ("once", "again"):
        export(out, tmp_path / name, balance=True, progress=False)
    once, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "again"))
    assert once == again


@pytest.mark.slow
def test_rounding_in_half_precision_is_as_small_as_without(tmp_path):
    stock_checkpoint(tmp_path / "source", "llama", torch.bfloat16)
    out = tmp_path / "out"
    compress(
        tmp_path / "source",
        out,
        recipe=Recipe(kv_ratio=0.5, fit="weights", **WAYS["frequency"], **QUICK),
        progress=False,
    )
    plain = export(out, tmp_path / "plain", progress=False).verification
    result = export(out, tmp_path / "export", balance=True, progress=False).verification
    assert result["attention_difference_float32"] < 1e-5
    assert result["attention_difference"] < 3 * plain["attention_difference"]
