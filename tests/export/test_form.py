"""What can be exported, at which cost, and what is said where it cannot."""

import json
import re

import pytest
import torch
from exporting import HEAD, WAYS, compressed, load
from tiny import LLAMA3_ROPE, contents, save, stock_checkpoint, stock_model

from mea_compress.architectures import open_checkpoint
from mea_compress.compression import compress
from mea_compress.errors import RequestError
from mea_compress.exporting.form import FORMATS, _first_saving, uniform_rotary_components
from mea_compress.exporting.stock import export
from mea_compress.planning.plans import make_plan
from mea_compress.recipe import Recipe, load_recipe

LATENT = {"key_composition": "latent", "value_composition": "latent"}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
THREE_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}
# Recipe, source, and what the refusal says.
REFUSED = {
    "latent keys": (LATENT, {}, "latent keys.*serve-anywhere"),
    "latent keys with QK-norm": (LATENT, {"case": "qwen3"}, "latent keys.*pool"),
    "latent keys with dynamic rope": (LATENT, DYNAMIC, "latent keys.*pool"),
    "latent keys of phi3": (LATENT, {"case": "phi3"}, "latent keys.*serve-anywhere.*--format llama"),
    "unequal layers": ({**HEAD, "layers": "1"}, {}, "--layers all"),
    "unequal layers with QK-norm": ({**HEAD, "layers": "1"}, {"case": "qwen3"}, "--layers all"),
    "unequal sides": ({**HEAD, "kv_ratio": None, "key_components": 1, "value_components": 2}, {}, "same --key-comp"),
    "QK-norm": (HEAD, {"case": "qwen3"}, "QK-norm.*pool"),
    "two of three heads with QK-norm": (
        {**HEAD, "kv_ratio": None, "key_components": 2, "value_components": 2},
        {"case": "qwen3", **THREE_HEADS},
        "QK-norm.*pool.*--key-components 1",
    ),
    "wide phi3": (HEAD, {"case": "phi3"}, "--format llama"),
    "wide phi3 with a window": (HEAD, {"case": "phi3", "sliding_window": 5}, "phi3 takes no heads.*pool"),
    "latent keys of phi3 with a window": (LATENT, {"case": "phi3", "sliding_window": 5}, "latent keys.*pool"),
    "dynamic rope": (HEAD, DYNAMIC, "rope_type dynamic.*pool"),
}


def refused(directory, what):
    """A compressed checkpoint that is not exported, what is said of it, and what its plan said."""
    settings, source, _ = REFUSED[what]
    stock_checkpoint(directory / "source", **source)
    recipe = Recipe(**{"kv_ratio": 0.5, "fit": "weights", **settings})
    planned = make_plan(directory / "source", recipe).to_json()["stock_export"]
    compress(directory / "source", directory / "out", recipe=recipe, progress=False)
    before = contents(directory)
    with pytest.raises(RequestError) as refusal:
        export(directory / "out", directory / "export", progress=False)
    assert contents(directory) == before
    return str(refusal.value), planned


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_exact_is_refused_with_the_nearest_that_works(what, tmp_path):
    message, planned = refused(tmp_path, what)
    assert re.search(REFUSED[what][2], message)
    assert "\n" not in message
    assert planned == {"reason": message}
    follow(message, tmp_path)


def follow(message, directory):
    """Do each thing that a refusal proposes; all must end in a verified export."""
    advice, compressing = message.partition("; ")[2], message.partition("compress with ")[2]
    formats = re.findall("--format ([a-z]+)", advice)
    if formats and advice.startswith("export"):
        export(directory / "out", directory / "other format", format=formats[0], progress=False)
        formats = []
    options = compressing.rpartition("as by ")[2]
    values = dict(re.findall("--([a-z-]+) ([a-z0-9]+)", options.partition("export")[0]))
    assert values or advice.startswith("export")
    if values:
        settings = {name.replace("-", "_"): int(v) if v.isdecimal() else v for name, v in values.items()}
        if "key_components" not in settings:
            settings["kv_ratio"] = 0.5
        recipe = load_recipe("serve-anywhere", {}) if "serve-anywhere" in options else None
        assert recipe is None or all(
            str(getattr(recipe, name)) == settings[name] for name in settings.keys() - {"kv_ratio"}
        )
        settings.setdefault("value_composition", "latent")
        compress(directory / "source", directory / "again", recipe=Recipe(fit="weights", **settings), progress=False)
        export(directory / "again", directory / "export", format=[*formats, "stock"][0], progress=False)


@pytest.mark.parametrize("format", FORMATS)
def test_neither_format_is_proposed_where_none_holds_wide_heads(format, tmp_path):
    stock_checkpoint(tmp_path / "source", "phi3", sliding_window=5)
    out = compressed(tmp_path)
    with pytest.raises(RequestError, match="compress with --key-composition pool") as refusal:
        export(out, tmp_path / "export", format=format, progress=False)
    assert ("--format" in str(refusal.value)) == (format != "stock")
    pooled = compressed(tmp_path, way="pool")
    export(pooled, tmp_path / "export", progress=False)


@pytest.mark.parametrize(
    ("case", "ratio", "traits"),
    [("llama", 0.5, THREE_HEADS), ("llama", 0.625, {"head_dim": 8}), ("mistral-full", 0.3125, {})],
)
def test_uniform_budgets_that_leave_some_pairs_one_more_are_exported_as_planned(case, ratio, traits, tmp_path):
    source = stock_checkpoint(tmp_path / "source", case, **traits)
    settings = {"kv_ratio": ratio, "rotary_allocation": "uniform", "fit": "weights", "refine": 0}
    recipe = load_recipe("serve-anywhere", settings)
    planned = make_plan(source, recipe).costs.stock_export
    compress(source, tmp_path / "out", recipe=recipe, progress=False)
    opened = open_checkpoint(tmp_path / "out")
    for layer in opened.config.mea["layers"]:
        assert len(set(layer["rotary_components"])) == 2
        assert layer["rotary_components"] == uniform_rotary_components(layer["key_components"], opened.head_dim)
    result = export(tmp_path / "out", tmp_path / "export", progress=False).to_json()
    assert {name: result[name] for name in planned} == planned
    assert result["head_dim"] == 2 * sum(opened.config.mea["layers"][0]["rotary_components"])


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 64,
}
ROPES = {
    "default": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "linear": ("mistral-full", {"rope_parameters": {"rope_type": "linear", "rope_theta": 3000.0, "factor": 4.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 777.0}}),
    "dynamic": ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 3000.0, "factor": 2.0}}),
    "partial": ("phi3-partial", {"rope_parameters": {"rope_type": "default", "rope_theta": 3000.0}}),
    "longrope": (
        "phi3",
        {"rope_parameters": LONGROPE | {"rope_theta": 3000.0}, "original_max_position_embeddings": 64},
    ),
}


@pytest.mark.parametrize(
    ("rope", "way"),
    [*((rope, "pool") for rope in ROPES), *((rope, "frequency") for rope in ("default", "linear", "llama3"))],
)
def test_libraries_of_any_age_read_the_same_rope(rope, way, tmp_path):
    case, traits = ROPES[rope]
    stock_checkpoint(tmp_path / "source", case, **traits)
    export(compressed(tmp_path, way=way), tmp_path / "export", progress=False)
    ids = torch.randint(3, 64, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = load(tmp_path / "export")(ids).logits
    written = json.loads((tmp_path / "export" / "config.json").read_text())
    assert written["rope_theta"] == (traits["rope_parameters"]["rope_theta"] if way == "pool" else 1.0)
    assert (written["rope_scaling"] is None) == (written["rope_parameters"]["rope_type"] == "default")
    for dropped in (
        ["rope_parameters"],
        ["rope_theta", "rope_scaling"],
    ):  # what older, and newer, libraries do not read
        kept = {name: value for name, value in written.items() if name not in dropped}
        (tmp_path / "export" / "config.json").write_text(json.dumps(kept))
        with torch.no_grad():
            assert torch.equal(load(tmp_path / "export")(ids).logits, expected), dropped
    if rope == "longrope":
        assert set(written["rope_scaling"]) == {"type", "short_factor", "long_factor"}


def test_energy_budgets_are_refused_before_and_after(tmp_path):
    model = stock_model("mistral-full")
    with torch.no_grad():  # the first rotary pair has most of the energy, so that it gets most of the components
        model.model.layers[0].self_attn.k_proj.weight.unflatten(0, (4, 8))[:, ::4] *= 10
    save(model, tmp_path / "source")
    kinds = {"key_composition": "frequency", "value_composition": "latent", "rotary_allocation": "energy"}
    recipe = Recipe(kv_ratio=0.5, fit="weights", **kinds)
    assert "shared" in make_plan(tmp_path / "source", recipe).costs.stock_export["reason"]
    compress(tmp_path / "source", tmp_path / "out", recipe=recipe, progress=False)
    with pytest.raises(RequestError, match="--rotary-allocation shared"):
        export(tmp_path / "out", tmp_path / "export", progress=False)


def test_sliding_windows_and_norms_are_not_written_as_llama(tmp_path):
    for case, message in (("mistral", "sliding window"), ("qwen3", "as Llama")):
        out = compressed(tmp_path / case, case, "pool")
        with pytest.raises(RequestError, match=message):
            export(out, tmp_path / "export", format="llama", progress=False)


def test_groups_must_divide(tmp_path):
    stock_checkpoint(tmp_path / "source")
    with pytest.raises(RequestError, match=r"`kv_groups` 4 does not divide .* choose one of 1, 2"):
        make_plan(tmp_path / "source", Recipe(kv_ratio=0.5, kv_groups=4, **HEAD))
    with pytest.raises(RequestError, match="cannot divide the one latent"):
        make_plan(
            tmp_path / "source",
            Recipe(kv_ratio=0.5, kv_groups=2, key_composition="joint", value_composition="joint"),
        )
    out = compressed(tmp_path)
    with pytest.raises(RequestError, match="compress the original"):
        make_plan(out, Recipe(value_components=1, kv_groups=2, **HEAD))


def test_plan_and_export_say_the_same_of_weights_and_cache(tmp_path):
    stock_checkpoint(tmp_path / "source", "qwen2")
    recipe = Recipe(kv_ratio=0.5, fit="weights", **WAYS["frequency"])
    planned = make_plan(tmp_path / "source", recipe).costs.stock_export
    compress(tmp_path / "source", tmp_path / "out", recipe=recipe, progress=False)
    result = export(tmp_path / "out", tmp_path / "export", progress=False).to_json()
    assert {name: result[name] for name in planned} == planned
    sizes = [
        sum(info.nbytes for info in open_checkpoint(tmp_path / name).reader.tensors.values())
        for name in ("source", "export")
    ]
    assert sizes[1] - sizes[0] == planned["weight_bytes_added"]
    saved = planned["kv_bytes_saved_per_token"]
    assert planned["saves_memory_from_tokens"] == -(-planned["weight_bytes_added"] // saved)


def test_windows_bound_what_a_cache_can_save():
    assert _first_saving(100, [10], [None]) == 10
    assert _first_saving(100, [10, 10], [4, None]) == 6
    assert _first_saving(100, [10, 10], [4, 5]) is None
    assert _first_saving(-1, [10], [None]) == 0
    assert _first_saving(100, [30, 10], [2, None]) == 4  # layers that save unlike
