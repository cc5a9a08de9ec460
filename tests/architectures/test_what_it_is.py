"""Sources that are something else than a causal language model, or more than its weights, are told what they are."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CASES, SIZES, save, stock_checkpoint, store_another_head
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from mea_compress.architectures import open_checkpoint
from mea_compress.compression import compress
from mea_compress.errors import RequestError
from mea_compress.recipe import Recipe

WEIGHTS = Recipe(kv_ratio=1.0, fit="weights")
FAMILIES = [case for case in CASES if "-" not in case]


def renamed(source, rename):
    tensors = load_file(source / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, source / "model.safetensors")
    return source


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: f"_orig_mod.{name}", r"named _orig_mod\.\S+ and .* torch\.compile"),
        (lambda name: f"module.{name}", r"named module\.\S+ and .* DeepSpeed"),
        (lambda name: f"base_model.model.{name}", r"named base_model\.model\..*merge_and_unload"),
        (lambda name: name.removeprefix("model."), "named embed_tokens.* save_pretrained into a new directory"),
    ],
)
def test_names_that_a_wrapper_makes_are_told_apart_from_a_broken_download(rename, message, case, tmp_path):
    with pytest.raises(RequestError, match=message):
        open_checkpoint(renamed(stock_checkpoint(tmp_path / "source", case), rename))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", FAMILIES)
def test_a_classifier_is_no_language_model(case, tied, tmp_path):
    kind, traits = CASES[case]
    config = kind(**{**SIZES, **traits, "tie_word_embeddings": tied}, num_labels=3)
    source = save(AutoModelForSequenceClassification.from_config(config), tmp_path / "source")
    with pytest.raises(RequestError, match=r"ForSequenceClassification, which is no causal language model"):
        open_checkpoint(source)
    raw = json.loads((source / "config.json").read_text())
    del raw["architectures"]
    (source / "config.json").write_text(json.dumps(raw))
    with pytest.raises(RequestError, match=r"score\.weight is the head of a classifier"):
        open_checkpoint(source)


def test_an_adapter_beside_the_weights_is_refused_and_one_below_is_not_copied(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    (source / "checkpoint-5").mkdir()
    (source / "checkpoint-5" / "adapter_config.json").write_text("{}")
    out = compress(source, tmp_path / "out", recipe=WEIGHTS, progress=False).out
    assert not list(out.rglob("adapter*"))
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(RequestError, match=r"adapter_config\.json: an adapter of peft .* merge it"):
        compress(source, tmp_path / "again", recipe=WEIGHTS, progress=False)


@pytest.mark.parametrize("case", FAMILIES)
def test_another_head_than_the_tied_one_is_kept_as_the_loader_keeps_it(case, tmp_path):
    source = store_another_head(stock_checkpoint(tmp_path / "source", case, tie_word_embeddings=True))
    out = compress(source, tmp_path / "out", recipe=WEIGHTS, progress=False).out
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected, found = (
            AutoModelForCausalLM.from_pretrained(place, experts_implementation="eager")(ids).logits
            for place in (source, out)
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_model_for_images_that_transformers_does_not_know_is_told_what_it_is(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    assert not open_checkpoint(source).at_cache
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vision_config": {"hidden_size": 16}}))
    with pytest.raises(RequestError, match=r"llama checkpoint has more than a language model in it \(vision_config\)"):
        open_checkpoint(source)
