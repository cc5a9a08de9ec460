"""The tokenizer of what is emitted is that of its source."""

import json
import shutil
from pathlib import Path

import pytest
from published import LAYOUTS, publish, told
from tiny import contents, stock_checkpoint
from transformers import MistralConfig, PreTrainedConfig, Qwen3Config

from mea_compress.architectures.families import Family
from mea_compress.compression import compress
from mea_compress.emit.code import refresh
from mea_compress.emit.directory import auto_map
from mea_compress.emit.tokenizer import keep_tokenizer
from mea_compress.errors import RequestError
from mea_compress.exporting.stock import export
from mea_compress.recipe import Recipe

WRITTEN_BY_010 = Path(__file__).parents[1] / "data" / "checkpoint-0.1.0"
WHOLE = Recipe(kv_ratio=1.0, fit="weights")
FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize(("case", "name"), LAYOUTS)
def test_ids_are_those_of_the_source_with_the_package_and_without(case, name, tmp_path):
    source = publish(stock_checkpoint(tmp_path / "source", case, vocab_size=640), case, name)
    expected = told(source)
    out = compress(source, tmp_path / "out", recipe=WHOLE, progress=False).out
    assert told(out) == expected
    assert told(out, config=PreTrainedConfig()) == expected  # what is left where the model's code is not trusted
    again = compress(out, tmp_path / "again", recipe=WHOLE, progress=False).out
    assert told(again) == expected


def test_the_case_that_was_reported_would_differ(tmp_path):
    """Llama's class, which Mistral's layout names and its family overrides, puts a space behind special tokens."""
    source = publish(stock_checkpoint(tmp_path / "source", "mistral-full"), "mistral-full", "LlamaTokenizer")
    assert told(source) != told(source, config=PreTrainedConfig())


def test_a_tokenizer_that_is_the_same_already_keeps_its_bytes(tmp_path):
    source = publish(stock_checkpoint(tmp_path / "source"), "llama", "PreTrainedTokenizerFast")
    out = compress(source, tmp_path / "out", recipe=WHOLE, progress=False).out
    assert [contents(out)[file] for file in FILES] == [contents(source)[file] for file in FILES]


@pytest.mark.parametrize("form", ["stock", "llama"])
@pytest.mark.parametrize(
    ("case", "name"), [("mistral-full", "LlamaTokenizer"), ("qwen2", None), ("qwen2", "Qwen2Tokenizer")]
)
def test_exports_keep_it_too(case, name, form, tmp_path):
    source = publish(stock_checkpoint(tmp_path / "source", case, vocab_size=640), case, name)
    recipe = Recipe(kv_ratio=0.5, fit="weights", key_composition="pool", value_composition="pool")
    out = compress(source, tmp_path / "out", recipe=recipe, progress=False).out
    assert told(export(out, tmp_path / "exported", format=form, progress=False).out) == told(source)


def test_settings_stay_and_only_the_class_is_named(tmp_path):
    source = publish(stock_checkpoint(tmp_path / "source", "mistral-full"), "mistral-full", "LlamaTokenizer")
    out = compress(source, tmp_path / "out", recipe=WHOLE, progress=False).out
    before, after = (json.loads((place / "tokenizer_config.json").read_text()) for place in (source, out))
    assert after == before | {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert contents(out)["tokenizer.json"] == contents(source)["tokenizer.json"]


def test_what_the_class_changes_in_memory_is_written_where_naming_it_is_not_enough(tmp_path):
    source = publish(stock_checkpoint(tmp_path / "source", "qwen3"), "qwen3", "PreTrainedTokenizerFast")
    target = publish(stock_checkpoint(tmp_path / "target"), "qwen3", "PreTrainedTokenizerFast")
    other = json.loads((target / "tokenizer.json").read_text())
    other["normalizer"] = {"type": "Lowercase"}
    (target / "tokenizer.json").write_text(json.dumps(other))
    keep_tokenizer(source, target, Qwen3Config())
    assert told(target) == told(source)


def test_a_tokenizer_that_cannot_be_kept_is_refused(tmp_path, monkeypatch):
    source = publish(stock_checkpoint(tmp_path / "source", "qwen3"), "qwen3", None)
    monkeypatch.setattr("mea_compress.emit.tokenizer._behaves", lambda *_: False)
    with pytest.raises(RequestError, match=r"source: the tokenizer, a Qwen2Tokenizer, .* save_pretrained"):
        compress(source, tmp_path / "out", recipe=WHOLE, progress=False)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_refreshing_a_checkpoint_of_010_mends_its_tokenizer(tmp_path):
    """Its class of Llama stands for a Mistral: what 0.1.0 copied there names Llama's tokenizer too."""
    old = publish(shutil.copytree(WRITTEN_BY_010, tmp_path / "old"), "mistral-full", "LlamaTokenizer")
    config = json.loads((old / "config.json").read_text())
    config["model_type"], config["auto_map"] = "mea_mistral", auto_map(Family("mistral", "Mistral"))
    (old / "config.json").write_text(json.dumps(config))
    wrong, right = told(old), told(old, config=MistralConfig())
    assert refresh(old).refreshed and wrong != right == told(old)


def test_a_tokenizer_that_does_not_load_is_copied_with_a_warning(tmp_path, capsys):
    source = stock_checkpoint(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    out = compress(source, tmp_path / "out", recipe=WHOLE, progress=False).out
    assert contents(out)["tokenizer.json"] == b"{}" and "copied without being compared" in capsys.readouterr().err
