"""Compressed checkpoints and exports in vLLM on a CPU.

vLLM brings a PyTorch of its own, so these run in an environment of its own, whose Python MEA_VLLM_PYTHON names
(see benchmarks/vllm_cpu.py for how to make one).
"""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tiny import stock_checkpoint

from mea_compress.compression import compress
from mea_compress.exporting.stock import export
from mea_compress.planning.plans import make_plan
from mea_compress.recipe import Recipe

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("MEA_VLLM_PYTHON")
pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="MEA_VLLM_PYTHON names no Python that has vLLM"),
]
WIDE = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 1024}
HALF = {"kv_ratio": 0.5, "fit": "weights"}
FREQUENCY = {"key_composition": "frequency", "value_composition": "latent"}
# Case, and recipe of what is compressed: what no stock model holds, and one that one does.
COMPRESSED = {
    "by energy, sides and layers unlike": (
        "llama",
        {
            **FREQUENCY,
            "kv_ratio": 0.5,
            "fit": "aligned",
            "refine": 0,
            "heal": "0",
            "sequence_length": 32,
            "sequences": 16,
        },
    ),
    "one layer alone": (
        "llama",
        {"key_composition": "head", "value_composition": "latent", "fit": "weights", "layers": "1-1"}
        | {"key_components": 1, "value_components": 2},
    ),
    "QK-norm": ("qwen3", {**FREQUENCY, **HALF, "rotary_allocation": "uniform"}),
    "rebuilt before RoPE": ("qwen2", {"key_composition": "joint", "value_composition": "joint", **HALF}),
    "a window, pooled values": ("mistral", {"key_composition": "head", "value_composition": "pool", **HALF}),
    "experts": ("qwen3_moe", {"key_composition": "latent", "value_composition": "latent", **HALF}),
}
BLOCK = 128
RUN = """
import gc, json, sys
sys.path.insert(0, sys.argv[1])
import vllm_cpu
options, found = json.loads(sys.argv[2]), {}
for checkpoint in sys.argv[4:]:
    found[checkpoint] = vllm_cpu.greedy(checkpoint, options)
    gc.collect()
    from vllm.distributed import cleanup_dist_env_and_memory
    cleanup_dist_env_and_memory()
with open(sys.argv[3], "w") as file:
    json.dump(found, file)
"""


def installed(directory):
    """What pip would write of this package's entry points, so that vLLM finds the plugin."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = directory / f"mea_compress-{project['version']}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mea-compress\nVersion: {project['version']}\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return directory


def in_vllm(checkpoints, scratch, tokens=40, **options):
    """Greedy tokens, log-probabilities and room of several checkpoints, one engine after another."""
    settings = {
        "memory": 1,
        "dtype": "float32",
        "kv_cache_dtype": "auto",
        "eager": True,
        "tokens": tokens,
        "prompts": [[1, 5, 9, 20, 31, 40], [1] + [3 + 7 * i % 50 for i in range(150)], [1, 7]],
        "batch": 3,
        "context": 400,
        **options,
    }
    (scratch / "run.py").write_text(RUN)
    places = [str(ROOT), str(installed(scratch / "installed"))]
    done = subprocess.run(
        [PYTHON, str(scratch / "run.py"), str(ROOT / "benchmarks"), json.dumps(settings), str(scratch / "found.json")]
        + [str(checkpoint) for checkpoint in checkpoints],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places), "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((scratch / "found.json").read_text()), settings


def check(found, settings, checkpoints):
    """Hold what vLLM said to what transformers says of the same checkpoints."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import vllm_cpu

    for checkpoint in checkpoints:
        agreed = vllm_cpu.reference(str(checkpoint), found[str(checkpoint)], settings)
        assert agreed["same_greedy_tokens"] == [settings["tokens"]] * len(settings["prompts"]), checkpoint.name
        assert agreed["largest_logprob_difference"] < 2e-5, checkpoint.name


def test_every_compressed_checkpoint_has_its_small_cache(tmp_path):
    made, shares = {}, {}
    for name, (case, settings) in COMPRESSED.items():
        source = tmp_path / f"{name} source"
        stock_checkpoint(source, case, **(WIDE if case != "qwen2" else {"max_position_embeddings": 1024}))
        recipe = Recipe(**settings)
        made[name] = tmp_path / name
        compress(source, made[name], recipe=recipe, progress=False)
        planned = make_plan(source, recipe).to_json()["kv_bytes_per_token"]
        # Beside latent keys transformers caches three numbers for the position, which an engine with pages knows.
        layers = json.loads((made[name] / "config.json").read_text())["mea"]["layers"]
        positions = 3 * 4 * sum(layer["key_composition"] in ("latent", "joint") for layer in layers)
        shares[name] = planned["after"] - positions
    found, settings = in_vllm(made.values(), tmp_path)
    check(found, settings, made.values())
    for name, checkpoint in made.items():
        room = found[str(checkpoint)]["cached_tokens"] * shares[name]
        assert (1 << 30) - 2 * BLOCK * shares[name] <= room <= 1 << 30, name


def test_exports_are_served_by_vllm_s_own_classes(tmp_path):
    exports = {}
    for way, settings in {"wide": FREQUENCY, "pool": {"key_composition": "pool", "value_composition": "pool"}}.items():
        source = stock_checkpoint(tmp_path / f"{way} source", "llama", **WIDE)
        recipe = Recipe(**settings, **HALF, rotary_allocation="uniform")
        compress(source, tmp_path / way, recipe=recipe, progress=False)
        exports[way] = tmp_path / f"{way} export"
        export(tmp_path / way, exports[way], engine="vllm-cpu", progress=False)
    source = stock_checkpoint(tmp_path / "original", "llama", **WIDE)
    found, settings = in_vllm([source, *exports.values()], tmp_path)
    check(found, settings, [source, *exports.values()])
    before = found[str(source)]["cached_tokens"]
    for checkpoint in exports.values():
        assert abs(found[str(checkpoint)]["cached_tokens"] - 2 * before) <= 2 * BLOCK


def test_what_the_cache_is_not_read_in_is_refused(tmp_path):
    source = stock_checkpoint(tmp_path / "source", "llama", **WIDE)
    compress(source, tmp_path / "half", recipe=Recipe(**FREQUENCY, **HALF), progress=False)
    with pytest.raises(AssertionError, match="leave --kv-cache-dtype at auto"):
        in_vllm([tmp_path / "half"], tmp_path, kv_cache_dtype="fp8")
