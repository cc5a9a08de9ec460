"""The package as its users meet it: one screen of names, quick to import, results that show themselves."""

import doctest
import inspect
import json
import shutil
import subprocess
import sys

import pytest
from letters import character_tokenizer
from tiny import stock_checkpoint

import mea_compress as mc

VERBS = [name for name in mc.__all__ if inspect.isfunction(getattr(mc, name))]


def python(script, *arguments):
    done = subprocess.run([sys.executable, *arguments, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with a checkpoint in SRC, which examples speak of."""
    stock_checkpoint(tmp_path / "SRC", head_dim=8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.process
def test_importing_loads_no_library():
    libraries = ("torch", "transformers", "numpy", "pydantic")
    script = f"import sys, mea_compress\nprint([name for name in {libraries} if name in sys.modules])"
    assert python(script) == "[]"


@pytest.mark.process
@pytest.mark.parametrize("first", ["mea_compress", "transformers"])
def test_transformers_knows_the_models_whichever_is_imported_first(first):
    second = {"mea_compress": "transformers", "transformers": "mea_compress"}[first]
    looked = "importlib.util.find_spec('transformers')"  # looking whether it is there must not use the hook up
    script = f"import importlib.util, {first}\n{looked}\nimport {second}\nfrom transformers import AutoConfig\n"
    assert python(script + "print(AutoConfig.for_model('mea_qwen3').model_type)") == "mea_qwen3"


@pytest.mark.process
@pytest.mark.parametrize("module", ["attention_mea", "configuration_mea", "modeling_mea", "decode_mea"])
def test_a_module_of_ours_may_be_what_imports_transformers(module):
    script = f"import warnings\nwarnings.simplefilter('error')\nfrom mea_compress.modeling import {module}\n"
    script += "from transformers import AutoConfig\nprint(AutoConfig.for_model('mea_llama').model_type)"
    assert python(script) == "mea_llama"


@pytest.mark.process
def test_what_is_wrong_with_the_package_does_not_keep_transformers_from_loading():
    script = (
        "import warnings, mea_compress.modeling as m\n"
        "def fail(): raise ImportError('too old')\n"
        "m.register = fail\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import transformers\n"
        "print(transformers.__name__, [str(w.message) for w in caught if 'too old' in str(w.message)])"
    )
    assert python(script).startswith("transformers ['MEA checkpoints are not known")


@pytest.mark.process
def test_the_package_is_a_program():
    done = subprocess.run([sys.executable, "-m", "mea_compress", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("mea-compress") and mc.__version__ in done.stdout


def test_names_stay_verbs_whatever_else_is_loaded(place):
    mc.open("SRC")  # loads sub-packages
    mc.compress("SRC", "OUT", kv_ratio=0.5, fit="weights", progress=False)
    for name in VERBS:
        assert inspect.isfunction(getattr(mc, name)), name
    assert set(mc.__all__) <= set(dir(mc))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mc.nothing


def test_every_verb_takes_paths_first_and_keywords_behind_them():
    for name in VERBS:
        kinds = [parameter.kind for parameter in inspect.signature(getattr(mc, name)).parameters.values()]
        assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) <= 2, name


@pytest.mark.slow
@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_an_example_that_runs(name, place):
    verb = getattr(mc, name)
    character_tokenizer().save_pretrained("SRC")
    (place / "held-out.txt").write_text("".join(chr(97 + i * 7 % 26) for i in range(4000)))
    if name != "compress":
        uniform = {"key_composition": "head", "value_composition": "head"}
        mc.compress("SRC", "HALF", kv_ratio=0.5, fit="weights", progress=False, **uniform)
    examples = doctest.DocTestFinder().find(verb, name, globs={name: verb, "mc": mc})
    assert sum(len(example.examples) for example in examples) > 0
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    runner = doctest.DocTestRunner(optionflags=flags)
    for example in examples:
        assert runner.run(example).failed == 0


def test_results_show_themselves(place):
    inspection, plan = mc.open("SRC"), mc.plan("SRC", kv_ratio=0.5)
    result = mc.compress("SRC", "OUT", recipe="paper-full", progress=False)
    for shown in (inspection, plan, result):
        assert str(shown) == repr(shown) and "|" in str(shown)
        assert shown._repr_html_().startswith("<table>") and "|" not in shown._repr_html_()
        assert json.loads(json.dumps(shown.to_json())) == shown.to_json()
    assert "50 %" in str(plan) and str(result).endswith(f"Written to {place / 'OUT'}")


def test_one_calling_style(place):
    by_fields = mc.plan("SRC", kv_ratio=0.25, key_composition="head", value_composition="head")
    recipe = mc.Recipe(kv_ratio=0.5, key_composition="head", value_composition="head")
    assert mc.plan("SRC", recipe=recipe, kv_ratio=0.25).to_json() == by_fields.to_json()
    assert recipe.kv_ratio == 0.5
    named = mc.plan("SRC", recipe="paper-half")
    assert named.recipe.layers == "half" and named.bytes_after < named.bytes_before
    with pytest.raises(mc.RequestError, match="kv_ratio"):
        mc.plan("SRC", recipe=recipe, kv_ratio=2.0)
    with pytest.raises(mc.RequestError, match="kv_ration"):
        mc.plan("SRC", kv_ration=0.5)


def test_run_does_what_a_recipe_says(place):
    (place / "r.yaml").write_text("source: SRC\nout: A\nkv_ratio: 0.5\nfit: weights\n")
    first = mc.run("r.yaml", progress=False)
    second = mc.run(mc.Recipe(kv_ratio=0.5, fit="weights"), source="SRC", out="B", progress=False)
    assert first.compression.plan.to_json() == second.compression.plan.to_json()
    assert first.healing is None and first.to_json().keys() == {"plan", "fidelity"}
    shutil.rmtree("A")
    with pytest.raises(mc.RequestError, match="where from"):
        mc.run(mc.Recipe(kv_ratio=0.5))
