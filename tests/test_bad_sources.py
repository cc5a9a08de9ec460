"""Sources that no text can be made of, and names that are too long, end in one sentence and leave nothing."""

import json
import os
import shutil

import pytest
import torch
from click.testing import CliRunner
from letters import character_tokenizer, tiny_llama
from safetensors.torch import load_file, save_file
from tiny import save, stock_checkpoint

from mea_compress.cli import cli

WEIGHTS = ("--kv-ratio", "0.5", "--fit", "weights", "--key-composition", "head", "--value-composition", "head")
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
    done = CliRunner().invoke(cli, list(map(str, ("compress", larger_tokenizer, tmp_path / "out", *WEIGHTS))))
    assert done.exit_code == 0
    heal = ("heal", tmp_path / "out", "--teacher", larger_tokenizer, "--steps", "1", "--sequence-length", "16")
    assert "makes id 30" in told(tmp_path, *heal, *text, "--out", tmp_path / "healed")


def test_a_bos_beyond_the_vocabulary(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    for name in ("config.json", "generation_config.json"):
        (source / name).write_text(json.dumps(json.loads((source / name).read_text()) | {"bos_token_id": 128_000}))
    message = told(tmp_path, "compress", source, tmp_path / "out", *QUICK)
    assert "BOS token 128000 is beyond the model's vocabulary of 64" in message and "--text" in message


def spoil(source, name):
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def test_nan_outside_attention(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    spoil(source, "model.layers.1.mlp.down_proj.weight")
    assert "look for NaN in its weights" in told(tmp_path, "compress", source, tmp_path / "out", *QUICK)


def test_nan_behind_the_layer_whose_costs_are_measured(tmp_path):
    """Given text, nothing is sampled, and no fit reads the weight."""
    source = save(tiny_llama(), tmp_path / "source")
    character_tokenizer().save_pretrained(source)
    spoil(source, "model.norm.weight")
    (tmp_path / "text.txt").write_text("once upon a time " * 60)
    shape = ("--sequences", "8", "--sequence-length", "30", "--text", tmp_path / "text.txt")
    compress = ("compress", source, tmp_path / "out", "--kv-ratio", "0.5", "--refine", "0", *shape)
    for command in (("profile", source, "--json", tmp_path / "profile.json", *shape), compress):
        assert "so no cost can be measured: look for NaN in its weights" in told(tmp_path, *command)


@pytest.mark.parametrize(
    "name",
    ["embed_tokens", "norm", "layers.0.input_layernorm", "layers.1.self_attn.q_proj", "layers.1.self_attn.o_proj"],
)
def test_nan_that_no_fit_reads_is_found_where_verification_fails(name, tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    spoil(source, f"model.{name}.weight")
    message = told(tmp_path, "compress", source, tmp_path / "out", *WEIGHTS)
    assert f"tensor model.{name}.weight holds NaN or infinite numbers" in message


def test_a_model_that_computes_nan_has_no_figures(tmp_path):
    source, text = save(tiny_llama(), tmp_path / "source"), tmp_path / "text.txt"
    character_tokenizer().save_pretrained(source)
    text.write_text("once upon a time " * 20)
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    spoil(broken, "model.norm.weight")
    measure = ("--text", text, "--sequence-length", "16", "--limit", "2")
    shutil.copytree(source, tmp_path / "student")
    heal = ("heal", tmp_path / "student", "--teacher", broken, "--out", tmp_path / "healed", "--steps", "1")
    message = told(tmp_path, *heal, "--text", text, "--sequence-length", "16")
    assert f"the logits of {broken} or " in message
    for arguments in ((broken,), (source, "--reference", broken), (source, broken)):
        message = told(tmp_path, "evaluate", *arguments, *measure)
        assert f"the logits of {broken} are not all numbers" in message and "--dtype float32" in message


def test_a_model_without_all_of_its_tensors_is_not_measured(tmp_path):
    source = save(tiny_llama(), tmp_path / "source")
    character_tokenizer().save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text.txt").write_text("once upon a time " * 20)
    message = told(tmp_path, "evaluate", source, "--text", tmp_path / "text.txt", "--sequence-length", "16")
    assert f"{source}: tensor model.layers.1.mlp.down_proj.weight is missing" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", [], "generation_config.json: the file is not a JSON object"),
        ("config.json", {"max_position_embeddings": 0}, "max_position_embeddings 0 leaves no room for a token"),
        ("config.json", {"rope_parameters": {"rope_theta": "x"}}, "rope_theta 'x' is not a positive number"),
        ("config.json", {"rope_parameters": {"rope_theta": -1.0}}, "rope_theta -1.0 is not a positive number"),
    ],
)
def test_a_configuration_that_no_model_can_run_with(name, content, message, tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    if isinstance(content, dict):
        content = json.loads((source / name).read_text()) | content
    (source / name).write_text(json.dumps(content))
    for command in (("inspect", source), ("compress", source, tmp_path / "out", *WEIGHTS)):
        assert message in told(tmp_path, *command)


def test_an_output_name_that_is_too_long(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    assert "has more than 247 bytes" in told(tmp_path, "compress", source, tmp_path / ("é" * 124), *QUICK)
