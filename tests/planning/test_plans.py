import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import CASES, stock_checkpoint

from mea_compress.errors import RequestError
from mea_compress.planning.plans import inspect_checkpoint, make_plan
from mea_compress.planning.types import CONTEXTS, cache_sizes
from mea_compress.recipe import Recipe

HEAD = {"fit": "weights", "key_composition": "head", "value_composition": "head"}


def half(**changes):
    return Recipe(**{**HEAD, "kv_ratio": 0.5, **changes})


@pytest.mark.parametrize("case", CASES)
def test_half_is_half_of_the_numbers_that_are_cached(case, tmp_path):
    source = stock_checkpoint(tmp_path / "source", case)
    plan, found = make_plan(source, half()), inspect_checkpoint(source).to_json()
    scalars = 4 * 4 if found["qk_norm"] else 0  # 1/rms of every composed head, float32
    assert plan.bytes_before == found["kv_bytes_per_token"] == 2 * 2 * 4 * found["head_dim"] * 4
    assert plan.bytes_after == plan.bytes_before // 2 + 2 * scalars
    assert [layer.bytes_after for layer in plan.layers] == [plan.bytes_after // 2] * 2


def test_only_headers_are_read(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    file = source / "model.safetensors"
    header = file.read_bytes()[: 8 + int.from_bytes(file.read_bytes()[:8], "little")]
    size = file.stat().st_size
    file.write_bytes(header)
    with open(file, "r+b") as stream:
        stream.truncate(size)  # a hole where the weights were
    before = make_plan(source, half()).to_json()
    assert before["kv_bytes_per_token"]["after"] * 2 == before["kv_bytes_per_token"]["before"]


def test_the_json_is_the_contract(tmp_path):
    plan = make_plan(stock_checkpoint(tmp_path / "source"), half(layers="1")).to_json()
    assert json.loads(json.dumps(plan)) == plan
    assert set(plan["kv_bytes_per_token"]) == set(plan["parameters"]) == {"before", "after"}
    assert plan["layers"][1] == {
        "layer": 1,
        "key_components": 2,
        "value_components": 2,
        "key_composition": "head",
        "value_composition": "head",
        "kv_bytes_per_token": {"before": 128, "after": 64},
    }
    assert plan["layers"][0]["key_composition"] == "none"
    assert plan["kv_bytes_per_token"] == {"before": 256, "after": 192}


def test_whole_caches_at_a_batch(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    cache = make_plan(source, half()).to_json(batch=3)["cache"]
    assert [size["tokens"] for size in cache] == list(CONTEXTS) == [8192, 32768, 131072]
    assert all(size["before"] == 3 * size["tokens"] * 256 == 2 * size["after"] for size in cache)
    assert inspect_checkpoint(source).to_json(batch=3)["cache"][0]["bytes"] == cache[0]["before"]


def test_a_window_bounds_the_cache():
    sizes = cache_sizes([(10, 5, None), (10, 5, 100)], batch=1)
    assert sizes[0] == {"tokens": 8192, "batch": 1, "before": 81920 + 1000, "after": 40960 + 500}


def test_windows_are_those_of_the_family(tmp_path):
    def windows(case):
        layers = inspect_checkpoint(stock_checkpoint(tmp_path / case, case)).layers
        return [layer.window for layer in layers]

    assert windows("mistral") == [5, 5]
    assert windows("mistral-full") == [None, None]
    assert windows("qwen2-sliding") == [None, 5]


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_a_dtype_changes_what_is_cached_and_written(dtype, tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    plain, cast = make_plan(source, half()), make_plan(source, half(dtype=dtype))
    size = {"float16": 2, "float64": 8}[dtype]
    assert cast.bytes_before == plain.bytes_before
    assert cast.bytes_after * 4 == plain.bytes_after * size
    assert cast.costs.output_bytes * 4 == plain.costs.output_bytes * size


def test_counts_may_differ_between_sides(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    plan = make_plan(source, Recipe(**HEAD, key_components=1, value_components=3))
    assert {(layer.spec.key.components, layer.spec.value.components) for layer in plan.layers} == {(1, 3)}
    assert plan.bytes_before == 2 * plan.bytes_after
    with pytest.raises(RequestError, match="choose 1 to 4"):
        make_plan(source, Recipe(**HEAD, key_components=1, value_components=9))


def test_what_is_expected_of_memory_and_disk(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    weights, aligned = make_plan(source, half()), make_plan(source, half(fit="aligned"))
    assert 0 < weights.costs.memory_bytes < aligned.costs.memory_bytes
    assert weights.costs.output_bytes < weights.costs.disk_bytes < aligned.costs.disk_bytes


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("steps", [0, 2])
def test_the_memory_that_is_promised_is_what_a_fit_takes(steps, tmp_path):
    """Peak memory above what is there before the work, of a layer that is not small beside the libraries."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "max_position_embeddings": 256}
    source = stock_checkpoint(tmp_path / "source", **sizes)
    script = """
import sys
import mea_compress.planning.decisions, mea_compress.emit.verification, mea_compress.fit.layers
from mea_compress.compression import compress
from mea_compress.planning.plans import make_plan
from mea_compress.recipe import Recipe
from pathlib import Path

def resident(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

mea_compress.modeling.register()
mea_compress.planning.decisions.WHOLE_MODEL_BYTES = 0
recipe = Recipe(kv_ratio=0.5, sequences=48, sequence_length=256, refine=int(sys.argv[2]), split="even", heal=3)
promised = make_plan(Path(sys.argv[1]), recipe).costs.memory_bytes
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
compress(sys.argv[1], sys.argv[1] + "-out", recipe=recipe, progress=False)
print(promised, resident("VmHWM") - before)
"""
    command = [sys.executable, "-c", script, str(source), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    promised, peak = map(int, done.stdout.split()[-2:])
    assert peak <= 1.2 * promised and promised <= 2.5 * peak, (promised >> 20, peak >> 20)
