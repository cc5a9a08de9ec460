"""Time of one decode step of one attention block: the original's, composed in its projections, and at its cache.

The whole block, from its hidden states to o_proj, with transformers' DynamicCache, at half of the cache with
`frequency` keys and `latent` values. At the cache the new token's final heads are encoded first, and what is cached is
read as it lies (absorbed) or as heads that are rebuilt of it (expanded). All variants take turns; what counts are their
ratios.

    python benchmarks/decode_at_cache.py --dtype bfloat16 --json benchmarks/results/decode-at-cache-cpu-bfloat16.json
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from common import machine, versions
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from mea_compress.modeling.attention_mea import MeaAttention
from mea_compress.modeling.configuration_mea import MeaLlamaConfig
from mea_compress.modeling.encoded_mea import compose_block
from mea_compress.modeling.section_mea import ENCODED_COMPLEX, ENCODED_LOW_RANK, side_section

HIDDEN, QUERIES, HEADS, HEAD_DIM = 2048, 32, 8, 64
"""Llama-3.2-1B's attention."""
SIZES = {
    "hidden_size": HIDDEN,
    "num_attention_heads": QUERIES,
    "num_key_value_heads": HEADS,
    "head_dim": HEAD_DIM,
    "num_hidden_layers": 1,
    "max_position_embeddings": 1 << 17,
    "attn_implementation": "sdpa",
}
FIRST_ROUNDS = 3  # that do not count: the kernel is built, and blocks show how they may be read


def section(at_cache):
    """The layer's entry at half of the cache."""
    half = HEADS // 2
    if at_cache:
        entry = {"block": "block", "heads": HEADS, "head_dim": HEAD_DIM, "value_dim": HEAD_DIM, "rotary_dim": HEAD_DIM}
        entry |= side_section("key", "frequency", half, ENCODED_COMPLEX)
        entry |= side_section("value", "latent", half, ENCODED_LOW_RANK)
    else:
        entry = {"key_composition": "frequency", "key_components": half}
        entry |= {"value_composition": "latent", "value_components": half}
    return entry | {"rotary_components": [half] * (HEAD_DIM // 2)}


def build(name, dtype):
    """A block with random weights."""
    torch.manual_seed(0)
    if name == "projections":
        block = MeaAttention(MeaLlamaConfig(**SIZES, mea={"layers": [section(False)]}), 0)
    else:
        config = LlamaConfig(**SIZES)
        block = LlamaAttention(config, 0)
        if name != "original":
            config.mea = {
                "decode": name.removeprefix("cache: ").replace("absorbed", "absorb").replace("expanded", "expand")
            }
            compose_block(block, section(True))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return block.to(dtype).eval()


def filled(block, context, embeddings, dtype):
    """A cache of random numbers as wide as the block's own, and a first forward behind it."""
    probe, cache = DynamicCache(), DynamicCache()
    hidden = torch.randn(1, 2, HIDDEN).to(dtype)
    rotation = tuple(part[:, :2] for part in embeddings)
    mask = torch.ones(2, 2, dtype=torch.bool).tril()[None, None]
    block(hidden, rotation, attention_mask=mask, past_key_values=probe)
    sides = (probe.layers[0].keys, probe.layers[0].values)
    cache.update(*(torch.randn(1, side.shape[1], context, side.shape[3]).to(dtype) for side in sides), 0)
    return cache, sum(side.shape[1] * side.shape[3] * side.element_size() for side in sides)


@torch.no_grad()
def measure(context, arguments):
    """Median milliseconds of each variant's step, and of what the encoder alone takes of it."""
    dtype = getattr(torch, arguments.dtype)
    rotary = LlamaRotaryEmbedding(LlamaConfig(**SIZES))
    tokens = torch.randn(1, 1, HIDDEN).to(dtype)
    embeddings = rotary(tokens.float(), torch.arange(context + 64)[None])
    embeddings = tuple(part.to(dtype) for part in embeddings)
    blocks = {name: build(name, dtype) for name in ("original", "projections", "cache: absorbed", "cache: expanded")}
    caches = {name: filled(block, context, embeddings, dtype) for name, block in blocks.items()}
    heads = torch.randn(1, HEADS, 1, HEAD_DIM).to(dtype)
    times = {name: [] for name in [*blocks, "encoder alone"]}
    for turn in range(arguments.rounds + FIRST_ROUNDS):
        rotation = tuple(part[:, context + turn : context + turn + 1] for part in embeddings)
        for name, kept in times.items():
            began = time.process_time()
            if name == "encoder alone":
                blocks["cache: absorbed"].encode(heads, heads)
            else:
                blocks[name](tokens, rotation, attention_mask=None, past_key_values=caches[name][0])
            if turn >= FIRST_ROUNDS:
                kept.append((time.process_time() - began) * 1000)
    milliseconds = {name: statistics.median(kept) for name, kept in times.items()}
    assert blocks["cache: absorbed"].reads_components == {"sdpa": True}
    projected = milliseconds["projections"]
    return {
        "context": context,
        "milliseconds": milliseconds,
        "cache_bytes_per_token": {name: size for name, (_, size) in caches.items()},
        "at the cache / in the projections": milliseconds["cache: absorbed"] / projected,
        "original / at the cache": milliseconds["original"] / milliseconds["cache: absorbed"],
        "expanded / absorbed, at the cache": milliseconds["cache: expanded"] / milliseconds["cache: absorbed"],
        "encoder / step": milliseconds["encoder alone"] / milliseconds["cache: absorbed"],
    }


def main() -> None:
    """Measure every context, and print or keep what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "shape": "llama-3.2-1b, one attention block",
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "clock": "time of the processor",
        "machine": machine("cpu"),
        "versions": versions(),
        "lines": [],
    }
    for context in arguments.contexts:
        line = measure(context, arguments)
        results["lines"].append(line)
        print(json.dumps(line, indent=2), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
