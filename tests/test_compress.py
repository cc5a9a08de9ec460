import errno
import json
import os
import random
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import CASES, contents, stock_checkpoint
from transformers import AutoModelForCausalLM

from mea_compress.checkpoint import writer
from mea_compress.checkpoint.workspace import MANIFEST, partial_path
from mea_compress.compression import compress
from mea_compress.errors import RequestError
from mea_compress.fit import layers as fitting
from mea_compress.planning.plans import make_plan
from mea_compress.recipe import Recipe, load_recipe

HEAD = {"kv_ratio": 0.5, "key_composition": "head", "value_composition": "head"}
HALF = Recipe(kv_ratio=0.5, fit="weights", key_composition="head", value_composition="head")


def with_recipe(**changes):
    return HALF.model_copy(update=changes)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint with everything that is not weights; tests copy what they change."""
    source = stock_checkpoint(tmp_path_factory.mktemp("original") / "source", num_hidden_layers=3)
    (source / "tokenizer.json").write_text('{"a": 1}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "README.md").write_text("---\nlicense: mit\n---\nThe original.")
    (source / "pytorch_model.bin").write_bytes(b"never read")
    (source / "extra").mkdir()
    (source / "extra" / "notes.txt").write_text("notes")
    return source


@pytest.fixture
def source(original, tmp_path):
    for name, data in contents(original).items():
        file = tmp_path / "source" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return tmp_path / "source"


def run(source, out, recipe=HALF, **options):
    return compress(source, out, recipe=recipe, progress=False, **options)


def test_a_tokenizer_that_cannot_be_kept_is_refused_before_the_fit(tmp_path, monkeypatch):
    source = stock_checkpoint(tmp_path / "src")

    def refuse(*_):
        raise RequestError("it cannot be kept")

    monkeypatch.setattr("mea_compress.compression.keep_tokenizer", refuse)
    monkeypatch.setattr(fitting, "fit_layers", lambda *_, **__: pytest.fail("hours of work"))
    with pytest.raises(RequestError, match=r"^it cannot be kept$"):
        compress(source, tmp_path / "out", kv_ratio=0.5, sequences=4, sequence_length=16, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def edit_config(source, **changes):
    file = source / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_weights(source, change):
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def test_the_emitted_directory_is_complete(source, tmp_path):
    out = tmp_path / "out"
    result = run(source, out)
    assert result.out == out
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == ["out"]
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "extra/notes.txt"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert (out / "README.original.md").read_bytes() == (source / "README.md").read_bytes()
    assert not (out / "pytorch_model.bin").exists()
    assert "license: mit" in (out / "README.md").read_text()

    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "mea_llama"
    assert config["num_key_value_heads"] == 4
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert config["mea"]["format"] == 1
    assert [layer["key_components"] for layer in config["mea"]["layers"]] == [2, 2, 2]

    weights, before = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    prefix = "model.layers.1.self_attn."
    assert weights[prefix + "k_proj.weight"].shape == (8, 32)
    assert weights[prefix + "key_composition.weight"].shape == (2, 4)
    for name in before:
        if "k_proj" not in name and "v_proj" not in name:
            assert torch.equal(weights[name], before[name]), name

    told = json.loads((out / "compression.json").read_text())
    assert told["plan"] == make_plan(source, HALF).to_json() == result.plan.to_json()
    assert told["fidelity"]["verification"]["kv_bytes_per_token"] == told["plan"]["kv_bytes_per_token"]["after"]
    assert told["versions"]["torch"] == torch.__version__
    assert load_recipe(out / "recipe.yaml") == HALF
    modes = {stat.S_IMODE(file.stat().st_mode) for file in out.rglob("*") if file.is_file()}
    assert modes == {0o666 & ~current_umask()}


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_plan_comes_true_on_disk_and_in_memory(source, tmp_path):
    plan = run(source, tmp_path / "out").plan
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert plan.costs.parameters_after == sum(tensor.numel() for tensor in weights.values())
    assert plan.costs.output_bytes == sum(tensor.nbytes for tensor in weights.values())
    assert plan.costs.parameters_before == sum(t.numel() for t in load_file(source / "model.safetensors").values())


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(source, tmp_path):
    run(source, tmp_path / "one" / "out", with_recipe(shard_size="20KB"))
    run(source, tmp_path / "two" / "out", with_recipe(shard_size="20KB"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_shards_hold_the_same_model(source, tmp_path):
    run(source, tmp_path / "one")
    run(source, tmp_path / "many", with_recipe(shard_size="10KB"))
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weights_are_cast_where_asked(dtype, source, tmp_path):
    result = run(source, tmp_path / "out", with_recipe(dtype=dtype))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, dtype)}
    assert result.plan.costs.output_bytes == sum(tensor.nbytes for tensor in weights.values())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)


def test_numbers_too_large_for_a_dtype_are_refused(source, tmp_path):
    edit_weights(source, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    with pytest.raises(RequestError, match=r"model\.norm\.weight has numbers too large for float16"):
        run(source, tmp_path / "out", with_recipe(dtype="float16"))
    assert os.listdir(tmp_path) == ["source"]


def test_a_config_that_names_another_dtype_does_not_count(source, tmp_path):
    edit_config(source, dtype="bfloat16")
    result = run(source, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
    assert result.plan.bytes_before == 3 * 2 * 4 * 4 * 4


def test_one_side_only(source, tmp_path):
    recipe = Recipe(key_components=2, fit="weights", key_composition="head")
    run(source, tmp_path / "out", recipe)
    layer = json.loads((tmp_path / "out" / "config.json").read_text())["mea"]["layers"][0]
    assert (layer["key_composition"], layer["value_composition"], layer["value_components"]) == ("head", "none", 4)


def nan_keys(source):
    edit_weights(source, lambda t: t["model.layers.2.self_attn.k_proj.weight"][3, 4].fill_(float("nan")))


def infinite_values(source):
    edit_weights(source, lambda t: t["model.layers.0.self_attn.v_proj.weight"][0, 0].fill_(float("inf")))


def missing_tensor(source):
    edit_weights(source, lambda t: t.pop("model.layers.1.self_attn.o_proj.weight"))


def missing_mlp(source):
    edit_weights(source, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


def missing_norm(source):
    edit_weights(source, lambda t: t.pop("model.norm.weight"))


def integer_keys(source):
    edit_weights(source, lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": torch.zeros(16, 32).long()}))


def wrong_shape(source):
    edit_weights(source, lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": torch.zeros(16, 31)}))


def truncated(source):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_pickles(source):
    (source / "model.safetensors").unlink()


def no_weights(source):
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").unlink()


def no_config(source):
    (source / "config.json").unlink()


def configs(**changes):
    def change(source):
        edit_config(source, **changes)

    return change


HOSTILE = {
    "nan": (nan_keys, "NaN or infinite"),
    "infinite": (infinite_values, "NaN or infinite"),
    "missing": (missing_tensor, "o_proj.weight is missing"),
    "missing-mlp": (missing_mlp, "up_proj.weight is missing"),
    "missing-norm": (missing_norm, "model.norm.weight is missing"),
    "integers": (integer_keys, "attention weights must be one of"),
    "shape": (wrong_shape, r"shape \[16, 31\] where config.json asks for \[16, 32\]"),
    "truncated": (truncated, "truncated"),
    "pickles": (only_pickles, "only pickled weights"),
    "no-weights": (no_weights, "no \\*.safetensors"),
    "no-config": (no_config, "config.json"),
    "family": (configs(model_type="unheard_of"), "that this release of transformers knows"),
    "no-type": (configs(model_type=...), "has no model_type"),
    "heads": (configs(num_key_value_heads=3), "cannot share 3"),
    "no-heads": (configs(num_attention_heads=...), "num_attention_heads must be"),
    "zero-heads": (configs(num_attention_heads=0), "num_attention_heads must be"),
    "text-heads": (configs(num_attention_heads="8"), "num_attention_heads must be"),
    "list-heads": (configs(num_key_value_heads=[4, 4, 4]), "num_key_value_heads must be"),
    "head_dim": (configs(head_dim=5), "config"),
    "odd-head_dim": (configs(head_dim=..., hidden_size=36), "hidden_size 36 does not divide"),
    "fewer-layers": (configs(num_hidden_layers=2), "says 2 layers but the weights have model.layers.2"),
    "more-layers": (configs(num_hidden_layers=4), "model.layers.3.* is missing"),
    "huge": (configs(num_hidden_layers=1_000_000), "more than any model"),
    "hidden": (configs(hidden_size=64), "config.json asks for"),
    "vocabulary": (configs(vocab_size=65), "embed_tokens.weight has shape"),
    "inner": (configs(intermediate_size=50), "config.json asks for"),
    "bias": (configs(attention_bias=True), "bias is missing"),
    "rope": (configs(rope_parameters={"rope_type": "imaginary", "rope_theta": 1e4}), "config"),
    "rotary": (
        configs(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 3}),
        "RoPE cannot rotate",
    ),
    "rope-lengths": (
        configs(
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1] * 3,
                "long_factor": [1] * 3,
            }
        ),
        "config",
    ),
    "activation": (configs(hidden_act="loud"), "hidden_act"),
    "types": (configs(rms_norm_eps="small"), "config"),
    "mea": (configs(model_type="mea_llama", mea={"format": 7}), "format 7"),
    "mea-layers": (configs(model_type="mea_llama", mea={"layers": "none"}), "config"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_checkpoints_get_one_sentence_and_nothing_is_written(case, source, tmp_path):
    change, said = HOSTILE[case]
    change(source)
    before = contents(tmp_path)
    with pytest.raises(RequestError, match=said) as refusal:
        run(source, tmp_path / "above" / "out")
    assert "\n" not in str(refusal.value)
    assert contents(tmp_path) == before
    assert not (tmp_path / "above").exists()


IMPOSSIBLE = {
    "no count": (HEAD | {"kv_ratio": 0.3}, "nearest possible are 0.25 and 0.5"),
    "too little": (HEAD | {"kv_ratio": 0.1}, "nearest possible are 0.25"),
    "too many": ({"key_components": 5, "value_components": 2}, "choose 1 to 4"),
    "layers": ({"kv_ratio": 0.5, "layers": "2-9"}, "layer 9"),
    "pool": ({"kv_ratio": 0.75, "key_composition": "pool", "value_composition": "pool"}, "divide"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_requests_are_refused(case, source, tmp_path):
    fields, said = IMPOSSIBLE[case]
    with pytest.raises(RequestError, match=said):
        run(source, tmp_path / "out", Recipe(fit="weights", **fields))
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("ratio", [0, -1, 1.5, float("nan")])
def test_ratios_out_of_range_are_refused(ratio):
    with pytest.raises(RequestError, match="kv_ratio"):
        load_recipe(None, {"kv_ratio": ratio})


def test_a_path_that_is_no_directory(tmp_path):
    for path in (tmp_path / "nowhere", Path(__file__)):
        with pytest.raises(RequestError, match="directory"):
            run(path, tmp_path / "out")


def test_an_output_that_is_there_is_not_touched(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for resume in (False, True):
        with pytest.raises(RequestError, match="already exists"):
            run(source, tmp_path / "out", resume=resume)
    assert os.listdir(tmp_path / "out") == ["mine"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "hidden_size",
                "num_hidden_layers",
                "vocab_size",
                "intermediate_size",
                "attention_bias",
                "tie_word_embeddings",
                "rope_parameters",
                "rms_norm_eps",
                "max_position_embeddings",
                "mea",
                "model_type",
                "hidden_act",
            ]
        ),
        st.none()
        | st.booleans()
        | st.integers(-3, 70)
        | st.sampled_from([2**40, 1e300, "8", "mea_llama", "qwen3", [], [4], {}, {"layers": 3}, {"layers": [{}] * 3}]),
        min_size=1,
        max_size=3,
    )
)
def test_a_config_that_lies_is_refused_or_harmless(original, tmp_path_factory, lies):
    source = tmp_path_factory.mktemp("lies") / "source"
    source.mkdir()
    os.link(original / "model.safetensors", source / "model.safetensors")
    (source / "config.json").write_bytes((original / "config.json").read_bytes())
    edit_config(source, **lies)
    try:
        plan = make_plan(source, HALF)
    except RequestError as refusal:
        assert "\n" not in str(refusal)
    else:
        assert plan.bytes_after * 2 == plan.bytes_before


@pytest.mark.process
def test_the_source_is_never_opened_for_writing(source, tmp_path):
    """An audit hook cannot be taken away, so this runs in a process of its own."""
    script = """
import os, sys
from pathlib import Path
source, touched = sys.argv[1], []
def audit(event, args):
    if event == "open" and isinstance(args[0], str) and args[0].startswith(source):
        if isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            touched.append((event, args))
    elif event.split(".")[0] in ("os", "shutil") and event not in ("os.listdir", "os.scandir", "os.walk"):
        places = args[1:2] if event in ("shutil.copyfile", "os.link", "os.symlink") else args
        if any(isinstance(place, str | os.PathLike) and str(place).startswith(source) for place in places):
            touched.append((event, args))
    elif event == "pickle.find_class":
        touched.append((event, args))
from mea_compress.compression import compress
from mea_compress.recipe import Recipe
recipe = Recipe(kv_ratio=0.5, fit="weights", key_composition="head", value_composition="head")
sys.addaudithook(audit)
compress(Path(source), Path(sys.argv[2]), recipe=recipe, progress=False)
print(touched)
"""
    before = contents(source)
    for folder in (source, source / "extra"):
        folder.chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", script, str(source), str(tmp_path / "out")], capture_output=True, text=True
    )
    for folder in (source, source / "extra"):
        folder.chmod(0o755)
    assert done.stdout == "[]\n", done.stderr[-2000:]
    assert contents(source) == before


INTERRUPTED = {
    "weights": ({**HEAD, "fit": "weights", "shard_size": "20KB"}, 4, 22, 8),
    "aligned": ({**HEAD, "fit": "aligned", "refine": 3, "sequences": 16, "sequence_length": 8}, 2, 5, 2),
}


@pytest.mark.process
@pytest.mark.parametrize("case", INTERRUPTED)
def test_a_run_that_was_killed_or_out_of_space_resumes_to_the_same_bytes(case, tmp_path):
    recipe, layers, kills, failures = INTERRUPTED[case]
    source = stock_checkpoint(tmp_path / "source", num_hidden_layers=layers)
    (source / "tokenizer.json").write_text("{}")
    (tmp_path / "work").mkdir()
    arguments = [Path(__file__).with_name("interrupt.py"), source, tmp_path / "work", json.dumps(recipe), 0]
    done = subprocess.run(
        [sys.executable, *map(str, [*arguments, kills, failures])],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = json.loads(done.stdout.splitlines()[-1])[1:]
    assert len(reports) == kills + failures
    for report in reports:
        assert report["same"] and not report["left"], report
        assert report["resumed"]["status"] == 0, report
        if report["action"] == "kill":
            assert report["stopped"]["status"] == -9, report
        else:  # a full disk is a sentence
            assert report["stopped"]["status"] == 2 and "full" in report["stopped"]["said"], report
            assert report["partial"] == ("--resume" in report["stopped"]["said"]), report


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("weights", "the source changed"),
        ("config", "the source changed"),
        ("recipe", "the recipe changed"),
        ("version", "a library version changed"),
        ("nothing", None),
    ],
)
def test_resuming_refuses_what_has_changed(change, said, source, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mea_compress.compression.check_written", stop)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            run(source, out)
    recipe = HALF
    if change == "weights":
        edit_weights(source, lambda tensors: tensors["model.norm.weight"].mul_(2))
    elif change == "config":
        edit_config(source, rms_norm_eps=1e-4)
    elif change == "recipe":
        recipe = with_recipe(kv_ratio=0.25)
    elif change == "version":
        monkeypatch.setattr("mea_compress.compression.versions", lambda: {"torch": "1.0"})
    if said is None:
        run(source, out, recipe, resume=True)
        assert out.is_dir()
    else:
        with pytest.raises(RequestError, match=said):
            run(source, out, recipe, resume=True)
        assert not out.exists()


WRITERS = "weights"


def no_writer_is_left():
    return not any(thread.name.startswith(WRITERS) for thread in threading.enumerate())


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 2])
def test_an_interruption_of_the_fit_ends_the_thread_that_writes(at, source, tmp_path, monkeypatch):
    out, compose = tmp_path / "out", fitting.compose
    run(source, tmp_path / "whole", with_recipe(shard_size="20KB"))

    def interrupt(source, layer, *arguments):
        if layer.layer == at:
            raise KeyboardInterrupt
        return compose(source, layer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "compose", interrupt)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            run(source, out, with_recipe(shard_size="20KB"))
    assert no_writer_is_left()
    partial = partial_path(out)
    assert not list(partial.rglob("*.tmp"))
    assert len(json.loads((partial / MANIFEST).read_text()).get("layers", {})) == at
    run(source, out, with_recipe(shard_size="20KB"), resume=True)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "error", [RequestError("the source is gone"), OSError(errno.ENOSPC, "No space left"), KeyError(7)]
)
def test_an_error_of_the_thread_that_writes_ends_the_fit(error, source, tmp_path, monkeypatch):
    copy_tensors = writer._copy_tensors

    def fail(*arguments):  # layers of the fit are stored by the same function, and those are fine
        if threading.current_thread().name.startswith(WRITERS):
            raise error
        copy_tensors(*arguments)

    monkeypatch.setattr(writer, "_copy_tensors", fail)
    fitted = []
    compose = fitting.compose
    monkeypatch.setattr(fitting, "compose", lambda *given: (time.sleep(0.3), fitted.append(1), compose(*given))[-1])
    expected = RequestError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match=r"gone|full|7"):
        run(source, tmp_path / "out")
    assert no_writer_is_left()
    assert len(fitted) == 1
    if not isinstance(error, KeyError | OSError):
        assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
def test_a_writer_that_cannot_be_started_leaves_none_waiting(error, source, tmp_path, monkeypatch):
    """The first one is under way by then and would wait for a layer that nobody fits."""
    submit, submitted = ThreadPoolExecutor.submit, []

    def fail(self, *arguments):
        submitted.append(submit(self, *arguments))
        if len(submitted) == 2:
            raise error
        return submitted[-1]

    monkeypatch.setattr(ThreadPoolExecutor, "submit", fail)
    with pytest.raises(type(error)):
        run(source, tmp_path / "out", with_recipe(shard_size="20KB"))
    assert len(submitted) == 2 and no_writer_is_left()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kinds", [("head", "head"), ("frequency", "latent"), ("pool", "share"), ("joint", "joint")])
def test_files_written_beside_the_fit_are_those_written_after_it(case, kinds, tmp_path, monkeypatch):
    source = stock_checkpoint(tmp_path / "source", case)
    recipe = Recipe(kv_ratio=0.5, fit="weights", key_composition=kinds[0], value_composition=kinds[1])
    recipe = recipe.model_copy(update={"shard_size": "10KB"})
    plan = make_plan(source, recipe)
    assert plan.decisions.has_static_shapes
    run(source, tmp_path / "beside", recipe)
    late = replace(plan, decisions=replace(plan.decisions, has_static_shapes=False))
    monkeypatch.setattr("mea_compress.compression.plan_source", lambda *_: late)
    run(source, tmp_path / "after", recipe)
    assert contents(tmp_path / "beside") == contents(tmp_path / "after")


def test_resume_without_anything_to_resume_starts(source, tmp_path):
    run(source, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "config.json").is_file()


def test_no_room_is_said_before_any_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(RequestError, match="make room"):
        run(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.process
def test_memory_does_not_grow_with_layers_or_shards(tmp_path):
    """Peak memory beyond the imports, of 3 and of 24 layers of 4 MB of attention each."""
    script = """
import resource, sys
from pathlib import Path
from mea_compress.compression import compress
from mea_compress.recipe import Recipe
import mea_compress.planning.decisions
mea_compress.planning.decisions.WHOLE_MODEL_BYTES = 0
recipe = Recipe(kv_ratio=0.5, fit="weights", key_composition="head", value_composition="head", shard_size="4MB")
compress(Path(sys.argv[1]), Path(sys.argv[1] + "-out"), recipe=recipe, progress=False)
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    peaks = []
    for layers in (3, 24):
        sizes = {"hidden_size": 512, "head_dim": 64, "num_key_value_heads": 8, "intermediate_size": 512}
        source = stock_checkpoint(tmp_path / f"{layers}", num_hidden_layers=layers, **sizes)
        done = subprocess.run([sys.executable, "-c", script, str(source)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(int(done.stdout) * 1024)
    assert peaks[1] - peaks[0] < 24e6, peaks


def test_a_random_order_of_tensors_changes_nothing_but_the_order(source, tmp_path):
    run(source, tmp_path / "one")
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    random.Random(0).shuffle(names)
    for number, part in enumerate((names[:9], names[9:])):
        save_file({name: tensors[name] for name in part}, source / f"model-{number + 1:05d}-of-00002.safetensors")
    (source / "model.safetensors").unlink()
    run(source, tmp_path / "two")
    one = load_file(tmp_path / "one" / "model.safetensors")
    halves = [load_file(tmp_path / "two" / f"model-{number:05d}-of-00002.safetensors") for number in (1, 2)]
    two = halves[0] | halves[1]
    assert len(one) == len(two) == sum(len(half) for half in halves) and set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
