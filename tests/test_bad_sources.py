"""Sources that no text can be made of, and names that are too long, end in one sentence and leave nothing."""

import json
import os

import pytest
import torch
from click.testing import CliRunner
from letters import character_tokenizer, tiny_llama
from safetensors.torch import load_file, save_file
from tiny import save, stock_checkpoint

from mea_compress.cli import cli

QUICK = ("--kv-ratio", "0.5", "--refine", "0", "--sequences", "8", "--sequence-length", "30")


def told(tmp_path, *arguments):
    before = set(os.listdir(tmp_path))
    done = CliRunner().invoke(cli, list(map(str, arguments)))
    assert done.exit_code == 2, (done.output, done.exception)
    assert set(os.listdir(tmp_path)) == before
    return done.stderr.splitlines()[-1]


@pytest.fixture
def larger_tokenizer(tmp_path):
    """A checkpoint whose tokenizer has a token more than its embedding, and text with it."""
    source = save(tiny_llama(), tmp_path / "source")
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["!"])
    tokenizer.save_pretrained(source)
    (tmp_path / "text.txt").write_text("once upon a time! " * 60)
    return source


def test_a_tokenizer_larger_than_the_embedding(larger_tokenizer, tmp_path):
    text = ("--text", tmp_path / "text.txt")
    assert "makes id 30, and the model has 30" in told(
        tmp_path, "compress", larger_tokenizer, tmp_path / "out", *QUICK, *text
    )
    weights = ("--kv-ratio", "0.5", "--fit", "weights", "--key-composition", "head", "--value-composition", "head")
    done = CliRunner().invoke(cli, list(map(str, ("compress", larger_tokenizer, tmp_path / "out", *weights))))
    assert done.exit_code == 0
    heal = ("heal", tmp_path / "out", "--teacher", larger_tokenizer, "--steps", "1", "--sequence-length", "16")
    assert "makes id 30" in told(tmp_path, *heal, *text, "--out", tmp_path / "healed")


def test_a_bos_beyond_the_vocabulary(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    for name in ("config.json", "generation_config.json"):
        (source / name).write_text(json.dumps(json.loads((source / name).read_text()) | {"bos_token_id": 128_000}))
    message = told(tmp_path, "compress", source, tmp_path / "out", *QUICK)
    assert "BOS token 128000 is beyond the model's vocabulary of 64" in message and "--text" in message


def test_nan_outside_attention(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert "look for NaN in its weights" in told(tmp_path, "compress", source, tmp_path / "out", *QUICK)


def test_an_output_name_that_is_too_long(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    assert "has more than 247 bytes" in told(tmp_path, "compress", source, tmp_path / ("é" * 124), *QUICK)
