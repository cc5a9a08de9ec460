"""Exports against the checkpoints they are made from, loaded by stock classes where this package cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exporting import HEAD, QUICK, WAYS, compressed, load
from safetensors.torch import load_file, save_file
from tiny import CASES, SIZES, contents, stock_checkpoint
from transformers.cache_utils import DynamicCache

from mea_compress.architectures import open_checkpoint
from mea_compress.cli import cli
from mea_compress.compression import compress
from mea_compress.errors import RequestError
from mea_compress.exporting.form import rotary
from mea_compress.exporting.stock import export
from mea_compress.recipe import Recipe, load_recipe

BABYLLAMA = Path(__file__).parents[3] / "shared" / "models" / "babyllama105"
WIDE = {case: sizes for case, sizes in CASES.items() if not case.startswith(("qwen3", "phi3"))}

STOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mea_compress":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

ids = load_file(sys.argv[1])["ids"]
count = int(sys.argv[3])
found = {}
with torch.no_grad():
    for out in sys.argv[4:]:
        model = AutoModelForCausalLM.from_pretrained(out, experts_implementation="eager").eval()
        assert type(model).__module__.startswith("transformers.models."), type(model)
        cache = DynamicCache()
        model(ids, past_key_values=cache, use_cache=True)
        held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        found[out + " bytes"] = torch.tensor(held / ids.numel())
        found[out + " logits"] = model(ids, use_cache=False).logits
        found[out + " text"] = model.generate(
            ids[:1, :4], max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
assert "mea_compress" not in sys.modules
save_file(found, sys.argv[2])
"""


def tokens(vocabulary=SIZES["vocab_size"], shape=(2, 20)):
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def observe(directory, ids, count):
    """Logits, cache bytes per token and greedy text of a checkpoint."""
    model, cache = load(directory), DynamicCache()
    model(ids, past_key_values=cache, use_cache=True)
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    text = model.generate(ids[:1, :4], max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model(ids, use_cache=False).logits, held / ids.numel(), text


def observe_apart(directories, ids, count, scratch):
    """The same of several, in a process of its own that has nothing but torch and transformers."""
    scratch.mkdir(exist_ok=True)
    save_file({"ids": ids}, scratch / "ids.safetensors")
    (scratch / "stock.py").write_text(STOCK)
    arguments = [scratch / "stock.py", scratch / "ids.safetensors", scratch / "found.safetensors", count, *directories]
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=scratch,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(scratch / "found.safetensors")
    return {d: tuple(found[f"{d} {what}"] for what in ("logits", "bytes", "text")) for d in directories}


@pytest.mark.process
@pytest.mark.parametrize("case", WIDE)
def test_stock_classes_compute_the_same_from_half_the_cache(case, tmp_path):
    made = {way: compressed(tmp_path, case, way) for way in WAYS}
    exports = {way: tmp_path / f"{way} export" for way in WAYS}
    for way in WAYS:
        export(made[way], exports[way], progress=False)
    ids = tokens()
    _, whole, _ = observe(tmp_path / "source", ids, 2)
    found = observe_apart(list(exports.values()), ids, 12, tmp_path / "apart")
    for way in WAYS:
        logits, held, text = observe(made[way], ids, 12)
        stock_logits, stock_held, stock_text = found[exports[way]]
        torch.testing.assert_close(stock_logits, logits, rtol=0, atol=2e-5 * float(logits.abs().max()))
        assert torch.equal(stock_text, text), way
        assert stock_held == held == whole / 2, way
        heads = json.loads((exports[way] / "config.json").read_text())["num_key_value_heads"]
        assert heads == (2 if way == "pool" or "2 groups" in way else 1)


@pytest.mark.process
@pytest.mark.parametrize("case", ["qwen3", "qwen3_moe", "phi3", "phi3-partial"])
def test_pooled_heads_are_plain_grouped_query_attention_in_every_family(case, tmp_path):
    out = compressed(tmp_path, case, "pool")
    result = export(out, tmp_path / "export", progress=False)
    ids = tokens()
    logits, held, text = observe(out, ids, 8)
    found = observe_apart([tmp_path / "export"], ids, 8, tmp_path / "apart")[tmp_path / "export"]
    torch.testing.assert_close(found[0], logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    assert torch.equal(found[2], text) and found[1] == held
    assert result.cost.weight_bytes < 0 and result.cost.tokens == 0


@pytest.mark.process
@pytest.mark.parametrize("case", ["mistral-full", "qwen2", "phi3", "phi3-partial"])
def test_other_families_written_as_llama(case, tmp_path):
    out = compressed(tmp_path, case, "frequency")
    result = export(out, tmp_path / "export", format="llama", progress=False)
    assert result.model_type == "llama"
    ids = tokens()
    logits, held, text = observe(out, ids, 8)
    found = observe_apart([tmp_path / "export"], ids, 8, tmp_path / "apart")[tmp_path / "export"]
    torch.testing.assert_close(found[0], logits, rtol=0, atol=2e-5 * float(logits.abs().max()))
    assert torch.equal(found[2], text) and found[1] == held


def test_what_a_family_leaves_to_its_class_is_said_where_it_is_written_as_llama(tmp_path):
    source = stock_checkpoint(tmp_path / "source", "qwen2", max_position_embeddings=32768)
    config = json.loads((source / "config.json").read_text())
    del config["max_position_embeddings"]  # of which Llama's class would make 2048
    (source / "config.json").write_text(json.dumps(config))
    export(compressed(tmp_path, "qwen2", "pool"), tmp_path / "export", format="llama", progress=False)
    assert load(tmp_path / "export").config.max_position_embeddings == 32768


ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 3.0],
        "long_factor": [1.0, 3.0],
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("rope", ROPES)
def test_rope_scaling_is_folded_in_also_beyond_the_trained_length(rope, tmp_path):
    stock_checkpoint(tmp_path / "source", "llama", rope_parameters={"rope_theta": 10000.0, **ROPES[rope]})
    out = compressed(tmp_path, way="head")
    _, factor = rotary(open_checkpoint(out))
    assert (factor != 1) == (rope in ("yarn", "longrope"))  # their factor on cos and sin went into q_proj
    export(out, tmp_path / "export", progress=False)
    ids = tokens(shape=(1, 300))  # the model's context is 256
    with torch.no_grad():
        expected, found = load(out)(ids).logits, load(tmp_path / "export")(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
def test_compressed_by_activations_and_refined_groups_stay_apart(tmp_path):
    for way, key, value in (("1", "head", "latent"), ("2", "frequency", "latent"), ("3", "prune", "share")):
        kinds = {"key_composition": key, "value_composition": value, "rotary_allocation": "uniform"}
        out = compressed(tmp_path, way=way, fit="aligned", refine=4, kv_groups=2, **kinds, **QUICK)
        assert json.loads((out / "config.json").read_text())["mea"]["layers"][0]["groups"] == 2
        assert export(out, tmp_path / f"{way} export", progress=False).form.groups == 2


@pytest.mark.slow
def test_groups_of_fewer_heads_lose_more_and_grow_less(tmp_path):
    lost, grown = [], []
    for groups in (1, 2):
        stock_checkpoint(tmp_path / "source", "mistral-full") if groups == 1 else None
        recipe = Recipe(kv_ratio=0.5, fit="weights", kv_groups=groups, **HEAD)
        result = compress(tmp_path / "source", tmp_path / f"{groups}", recipe=recipe, progress=False)
        lost.append(result.fidelity["layers"]["0"]["key_relative_error"])
        grown.append(export(tmp_path / f"{groups}", tmp_path / f"{groups}-stock", progress=False).cost)
    assert lost[0] < lost[1]
    assert grown[0].factor == 2 and grown[1].factor == 1
    assert grown[0].weight_bytes > 0 > grown[1].weight_bytes


def test_keys_pooled_alone_keep_values_with_their_heads(tmp_path):
    stock_checkpoint(tmp_path / "source")
    settings = {"key_composition": "pool", "fit": "aligned", "refine": 0, **QUICK}
    compress(tmp_path / "source", tmp_path / "whole", recipe=Recipe(key_components=4, **settings), progress=False)
    ids = tokens()
    expected, found = observe(tmp_path / "source", ids, 1)[0], observe(tmp_path / "whole", ids, 1)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(dtype, tmp_path):
    stock_checkpoint(tmp_path / "source", dtype=getattr(torch, dtype))
    out = compressed(tmp_path, way="frequency")
    result = export(out, tmp_path / "export", progress=False)
    assert load(tmp_path / "export").dtype == getattr(torch, dtype)
    assert result.verification["kv_bytes_per_token"] == 64


def test_a_stock_checkpoint_is_not_exported(tmp_path):
    stock_checkpoint(tmp_path / "source")
    with pytest.raises(RequestError, match="already"):
        export(tmp_path / "source", tmp_path / "export", progress=False)


def test_everything_else_is_copied_and_nothing_of_this_package_remains(tmp_path):
    source = stock_checkpoint(tmp_path / "source", "llama-rope-bias-wide-tied")
    (source / "tokenizer.json").write_text("{}")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Original\n")
    out = compressed(tmp_path)
    before = contents(out)
    export(out, tmp_path / "export", progress=False)
    assert contents(out) == before
    files = contents(tmp_path / "export")
    assert not [name for name in files if name.endswith(".py")]
    assert files["tokenizer.json"] == b"{}" and files["recipe.yaml"] == before["recipe.yaml"]
    assert b"license: mit" in files["README.md"] and b"# source with a smaller KV cache" in files["README.md"]
    config = json.loads(files["config.json"])
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert not {"mea", "auto_map"} & set(config)
    assert config["rope_parameters"]["attention_factor"] == 1.0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in (out.name, "export"))
    same = [name for name in theirs if name in ours and torch.equal(theirs[name], ours[name])]
    assert {"model.embed_tokens.weight", "model.layers.1.self_attn.v_proj.weight"} <= set(same)


def test_the_command_prints_what_it_costs(tmp_path, capsys):
    out = compressed(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", str(out), str(tmp_path / "export"), "--json", str(tmp_path / "report.json")])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "q_proj and o_proj grow 2 times" in printed and "from 96 cached tokens on" in printed
    assert json.loads((tmp_path / "report.json").read_text())["head_dim"] == 8
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", str(out), str(tmp_path / "export")])
    assert stopped.value.code == 2 and "already exists" in capsys.readouterr().err


def test_a_finished_export_is_returned_to_a_run_that_is_resumed(tmp_path):
    out = compressed(tmp_path)
    first = export(out, tmp_path / "export", progress=False)
    again = export(out, tmp_path / "export", resume=True, progress=False)
    assert again.to_json() == first.to_json()
    with pytest.raises(RequestError, match="was exported with another `format`;"):
        export(out, tmp_path / "export", format="llama", resume=True, progress=False)
    (tmp_path / "export" / "export.json").write_text("{")
    with pytest.raises(RequestError, match="was exported with another `format`, `weights`, `balance`;"):
        export(out, tmp_path / "export", resume=True, progress=False)


@pytest.mark.process
@pytest.mark.skipif(not BABYLLAMA.is_dir(), reason="../shared/models/babyllama105 is not here")
def test_a_trained_model_says_the_same_two_hundred_tokens(tmp_path):
    recipe = load_recipe("serve-anywhere", {"refine": 0, "sequences": 32, "sequence_length": 128})
    compress(BABYLLAMA, tmp_path / "half", recipe=recipe, progress=False)
    export(tmp_path / "half", tmp_path / "export", progress=False)
    ids = tokens(105, (2, 64))
    _, whole, _ = observe(BABYLLAMA, ids, 1)
    logits, held, text = observe(tmp_path / "half", ids, 200)
    found = observe_apart([tmp_path / "export"], ids, 200, tmp_path / "apart")[tmp_path / "export"]
    torch.testing.assert_close(found[0], logits, rtol=0, atol=1e-4)
    assert torch.equal(found[2], text) and text.shape[1] == 204
    assert found[1] == held == whole / 2
