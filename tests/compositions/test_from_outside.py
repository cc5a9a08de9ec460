"""A method and a form that the package does not have: added from outside, used to the end, nothing else touched."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import stock_checkpoint
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from mea_compress.architectures import open_checkpoint
from mea_compress.compositions import base, configured, find_method, methods, register
from mea_compress.compositions.moments import apply_covariance, moment
from mea_compress.compression import compress
from mea_compress.emit.code import carried_code, refresh
from mea_compress.emit.outside import FORM_FILES, register_form
from mea_compress.emit.verification import verify
from mea_compress.errors import RequestError
from mea_compress.heads.composed import EXPANSIONS, FactoredHeads, join_heads
from mea_compress.modeling.attention_mea import MODULES
from mea_compress.modeling.reference import RECONSTRUCT, reference_attention
from mea_compress.modeling.section_mea import FORMS, POOLED, REAL, Form
from mea_compress.recipe import Recipe, from_flags, load_recipe, to_yaml

FORM_FILE = Path(__file__).with_name("mapped_mea.py")


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What a test registers is unknown again after it."""
    registries = (base._methods, FORMS, MODULES, EXPANSIONS, RECONSTRUCT, FORM_FILES)
    for registry in registries:
        for name, entry in list(registry.items()):
            monkeypatch.setitem(registry, name, entry)
    before = [
        (registry, set(registry)) for registry in (base._methods, FORMS, MODULES, EXPANSIONS, RECONSTRUCT, FORM_FILES)
    ]
    yield
    for registry, names in before:
        for name in set(registry) - names - set(base.BUILT_IN):
            del registry[name]


def maps(heads, statistics, options, first):
    """Kept heads of each group, (C, d, D + 1), and the best d x d map of them for every head, (H, d, d)."""
    group = len(heads.value) // int(options.components)
    covariance = moment(statistics, options.fit, "value")
    kept = heads.value[(0 if first else group - 1) :: group]
    best = []
    for index, head in enumerate(heads.value):
        shared = kept[index // group]
        inputs = apply_covariance(shared, covariance)
        best.append((head @ inputs.T) @ np.linalg.pinv(shared @ inputs.T, hermitian=True))
    return kept, np.stack(best)


def strided():
    @register
    @dataclass(frozen=True)
    class Strided:
        """Every second value head, with the best map of it in o_proj: an existing form, under a name of its own."""

        name: ClassVar[str] = "strided"
        form: ClassVar[Form] = POOLED
        keep: Literal["first", "last"] = "first"

        def values(self, heads, statistics, options):
            kept, best = maps(heads, statistics, options, self.keep == "first")
            output = heads.output @ np.repeat(best, heads.group, axis=0)
            factored = FactoredHeads(self.form, len(heads.value), heads.value.shape[1], join_heads(kept))
            return factored, replace(heads, output=output)

    return Strided


def mapped(mapped_form):
    @register
    @dataclass(frozen=True)
    class Mapped:
        """Every second value head, with the best map of it in a weight of its own: a form of its own."""

        name: ClassVar[str] = "mapped"
        form: ClassVar[Form] = mapped_form

        def values(self, heads, statistics, options):
            kept, best = maps(heads, statistics, options, True)
            return FactoredHeads(self.form, len(best), best.shape[1], join_heads(kept), best), heads

    return Mapped


def compressed(tmp_path, name, case="llama", **settings):
    source = stock_checkpoint(tmp_path / "source", case)
    settings = {"kv_ratio": 0.5, "fit": "weights", "refine": 0, "key_composition": "frequency", **settings}
    return compress(source, tmp_path / "out", recipe=Recipe(value_composition=name, **settings), progress=False)


def check_decoding_and_reference(out):
    model = AutoModelForCausalLM.from_pretrained(out).double()
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for choice in ("expand", "absorb"):
            model.config.mea["decode"] = choice
            cache = DynamicCache(config=model.config)
            model(ids[:, :8], past_key_values=cache)
            steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(8, 12)]
            torch.testing.assert_close(torch.cat(steps, 1), expected[:, 8:], rtol=0, atol=1e-4)
        attention = model.model.layers[0].self_attn
        hidden = torch.randn(1, 12, model.config.hidden_size, dtype=torch.float64)
        cos, sin = model.model.rotary_emb(hidden, torch.arange(12)[None])
        mask = torch.ones(12, 12).tril().bool()
        plain = reference_attention(attention, hidden[0], cos[0], sin[0], mask)
        found = attention(hidden, (cos, sin), mask[None, None], position_ids=torch.arange(12)[None])[0]
        torch.testing.assert_close(found[0], plain, rtol=0, atol=1e-9)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 16)


REMOTE = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name.split(".")[0] == "mea_compress":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = load_file(sys.argv[2])["tokens"]
model.generate(tokens, max_new_tokens=3, do_sample=False)
save_file({"logits": model(tokens).logits.detach()}, sys.argv[3])
"""


def check_remote_code(out, tmp_path):
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    save_file({"tokens": ids}, tmp_path / "tokens.safetensors")
    arguments = [str(out), str(tmp_path / "tokens.safetensors"), str(tmp_path / "logits.safetensors")]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)


@pytest.mark.parametrize("fit", ["weights", "aligned"])
def test_a_method_of_one_s_own_goes_to_the_end(fit, tmp_path):
    strided()
    settings = {} if fit == "weights" else {"sequences": 4, "sequence_length": 32, "budget": "uniform", "heal": 0}
    result = compressed(tmp_path, {"method": "strided", "keep": "last"}, fit=fit, **settings)
    layers = json.loads((result.out / "config.json").read_text())["mea"]["layers"]
    assert layers[0]["value_composition"] == "strided" and layers[0]["value_form"] == "pooled"
    assert "key_form" not in layers[0]
    assert verify(result.out, result.plan.bytes_after, progress=False)["largest_difference"] < 1e-3
    kept = load_file(tmp_path / "source" / "model.safetensors")["model.layers.0.self_attn.v_proj.weight"]
    found = load_file(result.out / "model.safetensors")["model.layers.0.self_attn.v_proj.weight"]
    assert torch.equal(found, kept.unflatten(0, (4, -1))[[1, 3]].flatten(0, 1))
    assert load_recipe(result.out / "recipe.yaml").value_composition == {"method": "strided", "keep": "last"}
    check_decoding_and_reference(result.out)


@pytest.mark.process
def test_a_method_of_one_s_own_is_served_where_the_package_is_absent(tmp_path):
    strided()
    check_remote_code(compressed(tmp_path, "strided").out, tmp_path)


def test_a_checkpoint_outlives_its_method(tmp_path):
    strided()
    out = compressed(tmp_path, "strided").out
    del base._methods["strided"]
    source = open_checkpoint(out)
    assert source.config.mea["layers"][0]["value_composition"] == "strided"
    check_decoding_and_reference(out)
    again = Recipe(kv_ratio=0.5, fit="weights", key_composition="head", value_composition="latent")
    layers = compress(out, tmp_path / "again", recipe=replace_keys(again), progress=False).plan.layers
    assert layers[0].spec.value.composition == "strided"


def replace_keys(recipe):
    return recipe.model_copy(update={"kv_ratio": None, "key_components": 1})


def test_a_form_of_one_s_own_goes_to_the_end(tmp_path):
    mapped(register_form(FORM_FILE))
    result = compressed(tmp_path, "mapped", "qwen2")
    layers = json.loads((result.out / "config.json").read_text())["mea"]["layers"]
    assert (layers[0]["value_composition"], layers[0]["value_form"]) == ("mapped", "mapped")
    assert load_file(result.out / "model.safetensors")["model.layers.0.self_attn.value_composition.weight"].dim() == 3
    assert verify(result.out, result.plan.bytes_after, progress=False)["largest_difference"] < 1e-3
    assert (result.out / "mapped_mea.py").read_bytes() == FORM_FILE.read_bytes()
    assert not carried_code(result.out).changed and not refresh(result.out).refreshed
    check_decoding_and_reference(result.out)


@pytest.mark.process
def test_a_form_of_one_s_own_is_served_where_the_package_is_absent(tmp_path):
    mapped(register_form(FORM_FILE))
    check_remote_code(compressed(tmp_path, "mapped").out, tmp_path)


def test_a_form_that_is_not_registered_is_named(tmp_path):
    mapped(register_form(FORM_FILE))
    out = compressed(tmp_path, "mapped").out
    del FORMS["mapped"]
    with pytest.raises(RequestError, match="unknown value_form 'mapped'; import the module that registers it"):
        open_checkpoint(out)


def test_flags_and_recipes_take_every_registered_method(tmp_path):
    strided()
    assert from_flags(Recipe, {"value_composition": "strided", "kv_ratio": 0.5}).value_composition == "strided"
    with pytest.raises(RequestError, match=r"value_composition` cannot be used: .*did you mean strided\?$"):
        from_flags(Recipe, {"value_composition": "stridet"})
    with pytest.raises(RequestError, match="does not fit keys; choose one of head"):
        from_flags(Recipe, {"key_composition": "strided"})
    path = tmp_path / "mine.yaml"
    path.write_text("kv_ratio: 0.5\nkey_composition: {method: prune, by: contribution}\nprune_by: pivot\n")
    recipe = load_recipe(path)
    assert configured(recipe.key_composition, recipe).by == "contribution"
    assert yaml_again(tmp_path, recipe) == recipe
    for text, message in {
        "{method: prune, bi: contribution}": r"has no option bi; did you mean by\?",
        "{method: prune, by: luck}": "option by of method prune should be 'pivot' or 'contribution', not 'luck'",
        "{by: contribution}": "names no method",
        "3": "should be the name of a method",
    }.items():
        path.write_text(f"kv_ratio: 0.5\nkey_composition: {text}\n")
        with pytest.raises(RequestError, match=message):
            load_recipe(path)


def yaml_again(tmp_path, recipe):
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    return load_recipe(tmp_path / "again.yaml")


def test_flags_are_the_methods_options():
    recipe = Recipe(kv_ratio=0.5, prune_by="contribution", rotary_allocation="uniform")
    assert configured("prune", recipe).by == "contribution"
    assert configured("frequency", recipe).allocation == "uniform"
    assert configured({"method": "joint", "key_weight": 2.0}, recipe).key_weight == 2.0
    assert set(base.BUILT_IN) <= set(methods())


def test_what_is_no_method_is_refused():
    class Named:
        name, form = "other", REAL

    with pytest.raises(RequestError, match="fits neither side"):
        register(Named)
    with pytest.raises(RequestError, match="taken"):
        register(type("Mine", (), {"name": "head", "form": REAL, "keys": print}))
    with pytest.raises(RequestError, match="side that the form complex cannot have"):
        register(type("Mine", (), {"name": "mine", "form": FORMS["complex"], "values": print}))
    with pytest.raises(RequestError, match=r"there is no method 'prun'; did you mean prune\?"):
        find_method("prun")


def test_a_method_comes_from_an_entry_point(monkeypatch):
    class Point:
        name = "strided"

        def load(self):
            return strided()

    monkeypatch.setattr(base, "entry_points", lambda group: [Point()] if group == "mea_compress.methods" else [])
    assert Recipe(kv_ratio=0.5, value_composition="strided")
    assert find_method("strided").form == POOLED


NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "new_composition.ipynb"


@pytest.mark.slow
@pytest.mark.skipif(not NOTEBOOK.is_file(), reason="not in a checkout of the repository")
def test_the_notebook_runs_to_its_end():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    scope = {"__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), scope)
    assert scope["result"].plan.bytes_after == scope["result"].plan.bytes_before // 2
