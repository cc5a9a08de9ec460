"""Time and memory of a weights-only compression, beside `cp -r` of the same checkpoint.

Makes a sharded bfloat16 checkpoint of a chosen shape with random weights, then alternates `cp -r`, `mea-compress
compress --fit weights` and, where an environment with it is named, mergekit's passthrough. Every command is a process
of its own, started with the file cache in the same state: a first round is not counted, a copy has been made and
removed before each command, and what is said of the others are medians. Peak resident memory is the
kernel's (`ru_maxrss`), and the baseline is that of a process that imports what compressing imports; nothing large is
imported here, for a child's peak counts from the memory of the process that started it. Nothing that is made is kept.

    OMP_NUM_THREADS=1 python benchmarks/surgery.py --shape llama-3.2-1b --shape llama-3.2-3b
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

SHAPES = {
    "tiny": (512, 1024, 4, 8, 4, 64, 32_000, True),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128_256, True),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128, 128_256, True),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128, 128_256, False),
}
"""Hidden size, MLP size, layers, query heads, key/value heads, head_dim, vocabulary, tied embeddings."""

# All that compressing imports, PyTorch and transformers included.
BASELINE = """
import sys
import mea_compress.cli, mea_compress.compression, mea_compress.fit.layers, mea_compress.emit.verification
from mea_compress.modeling import register
register()
"""
RESULTS = Path(__file__).parent / "results" / "surgery.json"


def make_checkpoint(directory: Path, shape: tuple, shard_bytes: int) -> None:
    import numpy as np

    from mea_compress.checkpoint import NewTensor, array_dtype, write_checkpoint

    hidden, inner, layers, queries, heads, head_dim, vocabulary, tied = shape
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.q_proj.weight": (queries * head_dim, hidden),
            f"{prefix}self_attn.k_proj.weight": (heads * head_dim, hidden),
            f"{prefix}self_attn.v_proj.weight": (heads * head_dim, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, queries * head_dim),
            f"{prefix}mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}mlp.up_proj.weight": (inner, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, inner),
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
        }
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    generator = np.random.default_rng(0)

    def produce(shape: tuple[int, ...]):
        return lambda: (0.02 * generator.standard_normal(shape, np.float32)).astype(array_dtype("BF16"))

    write_checkpoint(
        directory, [NewTensor(name, "BF16", shape, produce(shape)) for name, shape in shapes.items()], shard_bytes
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": queries,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131_072,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def run(command: list[str]) -> dict:
    """Wall time in seconds and peak resident bytes of a command."""
    started = time.perf_counter()
    # An installed program has its bytecode beside it, and so have the others here.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{' '.join(command)} failed: {said[-2000:]}")
    return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024, "processor_seconds": _processor(usage)}


def _processor(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def settle(source: Path, cold: bool) -> None:
    """Writes out what is dirty and brings memory to one state: the source's pages all in it, or none.

    A virtual machine gives free memory back to its host, and getting it again takes several times as long as a copy.
    So a copy is made and removed before each of them, and all find the same memory.
    """
    copy = source.with_name("settling")
    subprocess.run(["cp", "-r", str(source), str(copy)], check=True)
    os.sync()
    shutil.rmtree(copy)
    for file in source.glob("*.safetensors"):
        with open(file, "rb", buffering=0) as stream:
            if cold:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while stream.read(1 << 24):
                    pass


def mergekit_command(python: Path, source: Path, work: Path) -> list[str]:
    recipe = work / "mergekit.yaml"
    recipe.write_text(f"merge_method: passthrough\nmodels:\n  - model: {source}\ndtype: bfloat16\n")
    return [str(python.with_name("mergekit-yaml")), str(recipe), str(work / "out"), "--copy-tokenizer"]


def measure(name: str, work: Path, options: argparse.Namespace) -> dict:
    source, out = work / "source", work / "out"
    make = [sys.executable, __file__, "--make", name, "--shard-bytes", str(options.shard_bytes), "--work", str(source)]
    subprocess.run(make, check=True)
    hidden, _, layers, queries, heads, head_dim, _, _ = SHAPES[name]
    one_layer = 2 * hidden * head_dim * 2 * (queries + heads)  # bfloat16 q, k, v, o
    total = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    program = [sys.executable, str(Path(sys.executable).with_name("mea-compress"))]
    compress = [*program, "compress", str(source), str(out)]
    compress += ["--kv-ratio", "0.5", "--fit", "weights", "--key-composition", "head", "--value-composition", "head"]
    compress += ["--shard-size", str(options.shard_bytes)]
    commands = {
        "imports": [sys.executable, "-c", BASELINE],
        "cp": ["cp", "-r", str(source), str(out)],
        "cp and sync": ["sh", "-c", f"cp -r '{source}' '{out}' && sync -f '{out}'"],
        "mea-compress": compress,
    }
    if options.mergekit:
        commands["mergekit"] = mergekit_command(options.mergekit, source, work)
    runs: dict[str, list[dict]] = {command: [] for command in commands}
    for round_ in range(options.repeats + 1):
        for command, arguments in commands.items():
            settle(source, options.cold)
            measured = run(arguments)
            if round_:
                runs[command].append(measured)
            shutil.rmtree(out, ignore_errors=True)
    median = {c: {k: statistics.median(r[k] for r in runs[c]) for k in runs[c][0]} for c in commands}
    above = max(r["peak_bytes"] for r in runs["mea-compress"]) - median["imports"]["peak_bytes"]
    seconds = {command: median[command]["seconds"] for command in commands}
    return {
        "weight_bytes": total,
        "layers": layers,
        "attention_bytes_of_one_layer": one_layer,
        "import_peak_bytes": median["imports"]["peak_bytes"],
        "peak_bytes_above_imports": above,
        "allowed_bytes_above_imports": 200_000_000 + one_layer,
        "time_over_cp": seconds["mea-compress"] / seconds["cp"],
        "time_over_cp_and_sync": seconds["mea-compress"] / seconds["cp and sync"],
        **({"mergekit_time_over_cp": seconds["mergekit"] / seconds["cp"]} if options.mergekit else {}),
        "median": median,
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be given several times")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count, after one that does not")
    parser.add_argument("--shard-bytes", type=int, default=1_000_000_000)
    parser.add_argument("--cold", action="store_true", help="start every run with the source out of the file cache")
    parser.add_argument("--mergekit", type=Path, help="python of an environment that has mergekit")
    parser.add_argument("--work", type=Path, help="where checkpoints are made (a temporary directory without it)")
    parser.add_argument("--make", choices=SHAPES, help="only make this checkpoint, in --work")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.make:
        make_checkpoint(options.work, SHAPES[options.make], options.shard_bytes)
        return
    found = {}
    for name in options.shape or ["llama-3.2-1b"]:
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            found[name] = measure(name, Path(work), options)
    threads = os.environ.get("OMP_NUM_THREADS")
    machine = {
        "processors": os.cpu_count(),
        "threads": int(threads) if threads else None,
        "machine": platform.machine(),
        "torch": version("torch"),
    }
    result = {"cold": options.cold, "repeats": options.repeats, "machine": machine, "shapes": found}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    for name, measured in found.items():
        above, allowed = (measured[f"{what}_bytes_above_imports"] / 1e6 for what in ("peak", "allowed"))
        print(f"{name}: {above:.0f} MB above the imports (allowed {allowed:.0f})", end="")
        for key in ("time_over_cp", "time_over_cp_and_sync"):
            print(f", {key.replace('_', ' ')} {measured[key]:.2f}", end="")
        print()


if __name__ == "__main__":
    main()
