"""What people report of tools like this one, tried on families that are composed at their cache."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from published import AT_CACHE, publish, told
from remote import remote_logits
from safetensors.torch import load_file, save_file
from test_every_family import compress_family, load, logits, stock_family, tokens
from tiny import store_another_head
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
)
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from mea_compress.architectures import open_checkpoint
from mea_compress.cli import cli
from mea_compress.errors import RequestError

# Sliding and full layers with a norm of keys; no RoPE, fused projections; RoPE of half of the channels, by neighbours;
# layers with RoPE and without.
NAMES = ("gemma3_text", "gpt2", "glm", "cohere2")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=NAMES)
def made(request, tmp_path_factory):
    """A family's checkpoint with a tokenizer, and it at half its cache."""
    place, name = tmp_path_factory.mktemp(request.param), request.param
    layout = next(layout for layout in AT_CACHE if layout[0] == name)
    source = publish(stock_family(name, place / "source", vocab_size=640), *layout)
    compress_family(source, place / "half", 0.5)
    return SimpleNamespace(name=name, source=source, half=place / "half")


def changed(source, change):
    tensors = load_file(source / "model.safetensors")
    save_file(change(tensors), source / "model.safetensors", metadata={"format": "pt"})
    return source


def refused(*arguments):
    done = CliRunner().invoke(cli, list(map(str, arguments)))
    assert done.exit_code == 2, (done.output, done.exception)
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("name", "kind"), AT_CACHE)
def test_ids_are_those_of_the_source_with_the_package_and_without(name, kind, tmp_path):
    source = publish(stock_family(name, tmp_path / "source", vocab_size=640), name, kind)
    compress_family(source, tmp_path / "out", 0.5)
    expected = told(source)
    assert told(tmp_path / "out") == expected
    assert told(tmp_path / "out", config=PreTrainedConfig()) == expected


def test_continuous_batching_is_refused_at_once(made):
    with pytest.raises(ValueError, match=r"continuous batching"):
        load(made.half).generate_batch(inputs=tokens(2, 6).tolist(), max_new_tokens=2)


def test_dropped_tokens_are_as_hidden_ones(made):
    if made.name not in ("gpt2", "glm"):
        pytest.skip("a sliding window is over what the cache still has")
    model, ids, kept = load(made.half, torch.float64), tokens(1, 31), [0, 1, 2, 3, *range(16, 30)]
    last = {"position_ids": torch.tensor([[30]])}
    mask = torch.zeros(1, 31, dtype=torch.long)
    mask[:, [*kept, 30]] = 1
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :30], past_key_values=cache)
    expected = logits(model, ids[:, 30:], past_key_values=copy.deepcopy(cache), attention_mask=mask, **last)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
    torch.testing.assert_close(logits(model, ids[:, 30:], past_key_values=cache, **last), expected, rtol=0, atol=1e-9)


def test_turns_of_a_chat_without_a_mask(made):
    """FlashAttention's rule where it gets no mask: causal, the last query beside the last key, within the window."""

    def attend(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **_):
        assert attention_mask is None
        group, new, length = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        places = torch.arange(new)[:, None] + length - new
        seen = torch.arange(length) <= places
        if sliding_window is not None:
            seen &= torch.arange(length) > places - sliding_window
        weights = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        return (weights.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("unmasked", attend)
    AttentionMaskInterface.register("unmasked", flash_attention_mask)
    model, ids = load(made.half, torch.float64), tokens(2, 30)
    expected = logits(model, ids, use_cache=False)
    model.set_attn_implementation("unmasked")
    cache = DynamicCache(config=model.config)
    turns = [logits(model, part, past_key_values=cache) for part in ids.split((12, 8, 1, 9), 1)]
    torch.testing.assert_close(torch.cat(turns, 1), expected, rtol=0, atol=1e-9)


class Wrapped(nn.Module):
    """Passes calls on, and hides everything else."""

    def __init__(self, module):
        super().__init__()
        self.inside = [module]

    def forward(self, *arguments):
        return self.inside[0](*arguments)


def test_compositions_are_used_by_calling_them(made):
    model, ids = load(made.half), tokens(2, 12)
    expected = logits(model, ids)
    parts = [(name, part) for name, part in model.named_modules() if name.endswith("_composition")]
    assert len(parts) == 4
    for name, part in parts:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Wrapped(part))
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=0)


def test_peft_trains_compositions_that_decoding_then_uses(made):
    peft = pytest.importorskip("peft")
    model, ids = load(made.half, torch.float64), tokens(2, 12)
    expected = logits(model, ids, use_cache=False)
    targets = ["c_attn"] if made.name == "gpt2" else ["q_proj", "o_proj"]
    trained = ["key_composition", "value_composition"]
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=trained, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(logits(adapted, ids, use_cache=False), expected, rtol=0, atol=1e-12)
    adapted(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                parameter -= 0.3 * parameter.grad / parameter.grad.norm().clamp(min=1e-12)
    after = logits(adapted, ids, use_cache=False)
    assert not torch.allclose(after, expected, atol=1e-3)
    cache = DynamicCache(config=model.config)
    steps = [logits(adapted, part, past_key_values=cache) for part in ids.split((7, 1, 1, 3), 1)]
    torch.testing.assert_close(torch.cat(steps, 1), after, rtol=0, atol=1e-9)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), ids, use_cache=False), after, rtol=0, atol=1e-6)


def test_layers_on_the_disk_generate_the_same(made, tmp_path):
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    whole = load(made.half)
    expected = whole.generate(tokens(2, 8), **options)
    base = whole.base_model_prefix
    layers = next(name for name, part in whole.named_modules() if isinstance(part, nn.ModuleList))
    places = {f"{base}.{name}": "cpu" for name, _ in getattr(whole, base).named_children()} | {"lm_head": "cpu"}
    del places[layers]
    places |= {f"{layers}.0": "cpu", f"{layers}.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(made.half, device_map=places, offload_folder=tmp_path / "disk")
    assert any(parameter.is_meta for parameter in model.get_submodule(f"{layers}.1").parameters())
    assert torch.equal(model.generate(tokens(2, 8), **options), expected)


def test_an_adapter_beside_the_weights_is_refused(made):
    (made.source / "adapter_config.json").write_text("{}")
    try:
        with pytest.raises(RequestError, match=r"adapter_config\.json: an adapter of peft .* merge it"):
            open_checkpoint(made.source)
    finally:
        (made.source / "adapter_config.json").unlink()


@pytest.mark.process
def test_saved_models_load_elsewhere(made, tmp_path):
    model, ids = load(made.half), tokens(2, 9)
    model.save_pretrained(tmp_path / "saved")
    found = remote_logits([made.half, tmp_path / "saved"], ids, tmp_path)
    for out in found:
        torch.testing.assert_close(found[out], logits(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_another_head_than_the_tied_one_is_kept_as_the_loader_keeps_it(name, tmp_path):
    source = store_another_head(stock_family(name, tmp_path / "source", tie_word_embeddings=True))
    compress_family(source, tmp_path / "whole", 1.0)
    expected, found = (logits(load(place), tokens(2, 9)) for place in (source, tmp_path / "whole"))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("_orig_mod.", r"named _orig_mod\.\S+ and .* torch\.compile"),
        ("module.", r"named module\.\S+ and .* DeepSpeed"),
        ("base_model.model.", r"named base_model\.model\..*merge_and_unload"),
    ],
)
def test_names_that_a_wrapper_makes_are_told_apart_from_a_broken_download(name, start, message, tmp_path):
    source = stock_family(name, tmp_path / "source")
    with pytest.raises(RequestError, match=message):
        open_checkpoint(changed(source, lambda tensors: {start + key: value for key, value in tensors.items()}))


def test_names_without_a_prefix_are_taken_as_the_loader_takes_them(tmp_path):
    """GPT-2 is published so."""
    source = stock_family("gpt2", tmp_path / "source")
    expected = logits(load(source), tokens(2, 9))
    changed(source, lambda tensors: {key.removeprefix("transformer."): value for key, value in tensors.items()})
    compress_family(source, tmp_path / "whole", 1.0)
    torch.testing.assert_close(logits(load(tmp_path / "whole"), tokens(2, 9)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma3_text", "gpt2", "glm"])
def test_a_classifier_is_no_language_model(name, tmp_path):
    source = stock_family(name, tmp_path / "source")
    config = CONFIG_MAPPING[name].from_pretrained(source, num_labels=3)
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)](config).save_pretrained(source)
    with pytest.raises(RequestError, match=r"ForSequenceClassification, which is no causal language model"):
        open_checkpoint(source)
    raw = json.loads((source / "config.json").read_text())
    del raw["architectures"]
    (source / "config.json").write_text(json.dumps(raw))
    with pytest.raises(RequestError, match=r"score\.weight is the head of a classifier"):
        open_checkpoint(source)


@pytest.mark.parametrize("name", NAMES)
def test_sources_that_no_text_can_be_made_of(name, tmp_path):
    quick = ("--kv-ratio", "0.5", "--refine", "0", "--sequences", "8", "--sequence-length", "30")
    layout = next(layout for layout in AT_CACHE if layout[0] == name)
    source, out = publish(stock_family(name, tmp_path / "source"), *layout), tmp_path / "out"
    (tmp_path / "text.txt").write_text("Once upon a time there was a dog. " * 60)
    message = refused("compress", source, out, *quick, "--text", tmp_path / "text.txt")
    assert "makes id" in message and "the model has 64" in message
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).unlink()
    for file in ("config.json", "generation_config.json"):
        settings = json.loads((source / file).read_text())
        (source / file).write_text(json.dumps(settings | {"bos_token_id": 128_000}))
    assert "BOS token 128000 is beyond the model's vocabulary of 64" in refused("compress", source, out, *quick)
    for file in ("config.json", "generation_config.json"):
        settings = json.loads((source / file).read_text())
        (source / file).write_text(json.dumps(settings | {"bos_token_id": 1}))

    def spoil(tensors):
        weight = next(
            key for key in tensors if ".1." in key and key.endswith(("down_proj.weight", "mlp.c_proj.weight"))
        )
        tensors[weight].view(-1)[0] = torch.nan
        return tensors

    changed(source, spoil)
    assert "NaN" in refused("compress", source, out, *quick)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "text.txt"]
