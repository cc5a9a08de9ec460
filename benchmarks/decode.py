"""Cache bytes, memory and time of decoding and prefill: the original, and compressed to half, expanded and absorbed.

Attention alone (what happens between the cache and the output projection, on caches that take turns so that none
stays in the processor's own cache, and that are one token longer in every round), then a small stack of layers with
transformers' DynamicCache. All variants of a line take turns in one run; what counts are their ratios. The original
appears in transformers' default, in SDPA with the query heads of a group as rows, and in plain matrix products in
three orders, on a GPU also in FlashAttention's, cuDNN's and FlexAttention's kernels; the fastest of them all is what
the compressed layer is held against. On a GPU attention is measured twice: called from Python, launches included, and
as CUDA graphs between CUDA events, the time of the device alone.

    python benchmarks/decode.py --contexts 1024 8192 65536 --batches 1 4 --clock cpu --threads 1
    python benchmarks/decode.py --device cuda --contexts 8192 32768 --batches 1 8 --prefill-up-to 32768
    python benchmarks/decode.py --plot benchmarks/results/decode-cpu-bfloat16.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import cache, lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._dynamo
import transformers
from common import machine, versions
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mea_compress.modeling import attention_mea, decode_cpu_mea
from mea_compress.modeling.configuration_mea import MeaLlamaConfig
from mea_compress.modeling.modeling_mea import MeaLlamaForCausalLM

SHAPES = {"llama-3.2-1b": (32, 8, 64), "llama-3.1-8b": (32, 8, 128)}
"""Query heads, key/value heads, head_dim."""
COMPRESSED = {"head": ("head", "head"), "frequency+latent": ("frequency", "latent")}
RESULTS = Path(__file__).parent / "results"
LAYERS = 4  # of the stack; also the caches that take turns, at least
GPU_TURNS_BYTES = 2**28  # of compressed caches that take turns on a GPU: several times its second-level cache
GPU_TURNS_AT_MOST = 64
GPU_BLOCK = 128  # tokens of a block of FlexAttention


def clock(arguments):
    if arguments.device != "cpu":
        torch.cuda.synchronize()
    return time.process_time() if arguments.clock == "cpu" else time.perf_counter()


def first_rounds(arguments):
    """Rounds that do not count: on a GPU the kernel is compiled for one length, then for all of them."""
    return 1 if arguments.device == "cpu" else 3


def measure(variants, arguments, calls):
    """Median milliseconds of every variant: each round calls every one of them `calls` times, after the first ones."""
    times = {name: [] for name in variants}
    for turn in range(arguments.rounds + first_rounds(arguments)):
        for name, variant in variants.items():
            began = clock(arguments)
            for call in range(calls):
                variant(turn * calls + call)
            if turn >= first_rounds(arguments):
                times[name].append((clock(arguments) - began) / calls * 1000)
    return {name: statistics.median(found) for name, found in times.items()}


def grouped(query, heads):
    return query.reshape(query.shape[0], heads, -1, query.shape[-1])


def packed(query, key, value, scale):
    rows = grouped(query, key.shape[1])
    return torch.nn.functional.scaled_dot_product_attention(rows, key, value, scale=scale)


def products(query, key, value, scale):
    logits = (grouped(query, key.shape[1]) * scale) @ key.mT
    return logits.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def products_keys_first(query, key, value, scale):
    logits = (key @ (grouped(query, key.shape[1]) * scale).mT).mT
    return logits.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def products_one_by_one(query, key, value, scale):
    """What the compressed layer does without its kernel, on the original's heads."""
    from mea_compress.modeling.decode_mea import key_scores, softmax, weighted_values

    logits = key_scores(grouped(query, key.shape[1]) * scale, key)
    return weighted_values(softmax(logits.float()).to(value.dtype), value)


def flash(query, key, value, scale):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)


def cudnn(query, key, value, scale):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)


@cache
def compiled_flex(name):
    """FlexAttention compiled for one of the two ways below."""
    return torch.compile(lambda *tensors, **options: flex_attention(*tensors, **options), fullgraph=True)


@lru_cache(maxsize=1)
def blocks_of(length, device):
    """The explicit list of all blocks for a single query."""
    blocks = -(-length // GPU_BLOCK)
    count = torch.full((1, 1, 1), blocks, dtype=torch.int32, device=device)
    indices = torch.arange(blocks, dtype=torch.int32, device=device)[None, None, None]
    return BlockMask.from_kv_blocks(count, indices, BLOCK_SIZE=GPU_BLOCK, seq_lengths=(1, length))


def flex(query, key, value, scale):
    return compiled_flex("flex")(query, key, value, scale=scale, enable_gqa=True)


def flex_by_blocks(query, key, value, scale):
    """With the list of blocks that lets the kernel share the cache out among the processors."""
    blocks = blocks_of(key.shape[2], key.device)
    return compiled_flex("by blocks")(query, key, value, scale=scale, enable_gqa=True, block_mask=blocks)


def runs(function, query, key, value, scale):
    """Whether this machine has a kernel for it."""
    try:
        function(query, key, value, scale)
    except Exception as error:  # whatever a compiler raises: the way is left out, the others are measured
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"original: {function.__name__} is left out: {reason}", file=sys.stderr)
        return False
    return True


def device_times(variants, first, turns, arguments):
    """Median milliseconds of every variant on the device alone: a CUDA graph of `turns` calls between two events."""
    graphs = {}
    for name, variant in variants.items():
        try:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for call in range(first, first + turns):
                    variant(call)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for call in range(first, first + turns):
                    variant(call)
            graphs[name] = graph
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"{name} has no device time: {reason}", file=sys.stderr)
    times = {name: [] for name in graphs}
    for turn in range(arguments.rounds + 2):
        for name, graph in graphs.items():
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            graph.replay()
            ended.record()
            torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(began.elapsed_time(ended) / turns)
    return {name: statistics.median(measured) for name, measured in times.items()}


ORIGINALS = {
    "packed": packed,
    "products": products,
    "keys first": products_keys_first,
    "one by one": products_one_by_one,
}
ORIGINALS_ON_GPUS = {"flash": flash, "cudnn": cudnn, "flex": flex, "flex by blocks": flex_by_blocks}


def section(kinds, heads, head_dim, layers):
    half = heads // 2
    layer = {
        "key_composition": kinds[0],
        "key_components": half,
        "value_composition": kinds[1],
        "value_components": half,
    }
    if kinds[0] == "frequency":
        layer["rotary_components"] = [half] * (head_dim // 2)
    return {"layers": [dict(layer) for _ in range(layers)]}


def sizes(shape, hidden, layers, context):
    queries, heads, head_dim = SHAPES[shape]
    return {
        "vocab_size": 1024,
        "hidden_size": hidden,
        "intermediate_size": hidden * 3,
        "num_hidden_layers": layers,
        "num_attention_heads": queries,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "max_position_embeddings": context + 4096,
    }


def build(shape, kinds, context, arguments, hidden=1024, layers=LAYERS, decode="auto"):
    options = sizes(shape, hidden, layers, context)
    torch.manual_seed(0)
    if kinds is None:
        model = LlamaForCausalLM(LlamaConfig(**options, attn_implementation="sdpa"))
    else:
        mea = section(kinds, options["num_key_value_heads"], options["head_dim"], layers) | {"decode": decode}
        model = MeaLlamaForCausalLM(MeaLlamaConfig(**options, mea=mea, attn_implementation="sdpa"))
        for layer in model.model.layers:
            for composition in (layer.self_attn.key_composition, layer.self_attn.value_composition):
                torch.nn.init.normal_(composition.weight, std=0.5)
    return model.to(arguments.device, getattr(torch, arguments.dtype)).eval()


def attention_alone(shape, context, batch, arguments):
    queries, heads, head_dim = SHAPES[shape]
    options = {"dtype": getattr(torch, arguments.dtype), "device": arguments.device}
    query = torch.randn(batch, queries, 1, head_dim, **options)
    scale, room = head_dim**-0.5, context
    width = heads // 2 * head_dim
    turns = turns_of(batch * room * width * 2 * options["dtype"].itemsize, arguments)
    full = [[torch.randn(batch, heads, room, head_dim, **options) for _ in range(2)] for _ in range(turns)]
    halves = {  # each compressed variant has its own, or the second would find them in the processor's cache
        name: [[torch.randn(batch, 1, room, width, **options) for _ in range(2)] for _ in range(turns)]
        for name in COMPRESSED
    }
    module = SimpleNamespace(num_key_value_groups=queries // heads, is_causal=True)

    def sides(caches, call):  # one token longer every time that it is a cache's turn again, up to the context
        length = room - arguments.rounds - first_rounds(arguments) + 1 + call // turns
        return (side[:, :, :length] for side in caches[call % turns])

    def default(call):
        return sdpa_attention_forward(module, query, *sides(full, call), None, scaling=scale)

    variants = {"original: default": default}
    originals = dict(ORIGINALS)
    if arguments.device != "cpu":
        originals |= {name: way for name, way in ORIGINALS_ON_GPUS.items() if runs(way, query, *sides(full, 0), scale)}
    for name, function in originals.items():
        variants[f"original: {name}"] = lambda call, function=function: function(query, *sides(full, call), scale)
    for name, kinds in COMPRESSED.items():
        attention = build(shape, kinds, context, arguments, 64, 1).model.layers[0].self_attn

        def expanded(call, attention=attention, half=halves[name]):
            keys, values = attention.expand(*sides(half, call), (None, None))
            return sdpa_attention_forward(module, query, keys, values, None, scaling=scale)

        def absorbed(call, attention=attention, half=halves[name]):
            return attention.attend_to_components(query, *sides(half, call), None, None)

        def absorbed_by_products(call, attention=attention, half=halves[name]):
            fused, attention_mea.may_fuse = attention_mea.may_fuse, lambda *tensors, **options: False
            try:
                return attention.attend_to_components(query, *sides(half, call), None, None)
            finally:
                attention_mea.may_fuse = fused

        if context <= arguments.expand_up_to:
            variants[f"{name}: expanded"] = expanded
        variants[f"{name}: absorbed"] = absorbed
        if arguments.device == "cpu":  # elsewhere products are what absorbed decoding is
            variants[f"{name}: absorbed, plain products"] = absorbed_by_products
    times = measure(variants, arguments, turns)
    best = best_original(times)
    line = {"shape": shape, "context": context, "batch": batch, "milliseconds": times, "best_original": best}
    for name in COMPRESSED:
        line[f"{name}: absorbed / best original"] = times[f"{name}: absorbed"] / times[best]
        line[f"{name}: default original / absorbed"] = times["original: default"] / times[f"{name}: absorbed"]
    if arguments.device != "cpu":
        line["caches_taking_turns"] = turns
        line |= on_the_device(
            device_times(variants, (arguments.rounds + first_rounds(arguments) - 1) * turns, turns, arguments)
        )
    return line


def turns_of(compressed_bytes, arguments):
    """How many caches take turns, given the bytes of a compressed one."""
    if arguments.device == "cpu":
        return LAYERS
    return max(LAYERS, min(GPU_TURNS_AT_MOST, -(-GPU_TURNS_BYTES // compressed_bytes)))


def best_original(times):
    """The fastest of the original's ways, None where none was measured."""
    return min((name for name in times if name.startswith("original")), key=times.get, default=None)


def on_the_device(times):
    """The part of a line that says what the device alone takes, beside the best original and flash decoding."""
    best = best_original(times)
    part = {"device_milliseconds": times, "best_original_on_the_device": best}
    for name in COMPRESSED:
        for label, other in (("best original", best), ("flash", "original: flash")):
            if f"{name}: absorbed" in times and other in times:
                part[f"{name}: absorbed / {label}, on the device"] = times[f"{name}: absorbed"] / times[other]
    return part


def fill(model, context, batch, arguments):
    """A cache of random numbers, as wide as this model's own."""
    cache, options = DynamicCache(config=model.config), {"dtype": model.dtype, "device": arguments.device}
    probe = DynamicCache(config=model.config)
    model(torch.zeros(1, 1, dtype=torch.long, device=arguments.device), past_key_values=probe)
    for index, layer in enumerate(probe.layers):
        shapes = [(batch, side.shape[1], context, side.shape[3]) for side in (layer.keys, layer.values)]
        cache.update(*(torch.randn(shape, **options) for shape in shapes), index)
    return cache


def cache_bytes_per_token(cache):
    """Bytes a token of one sequence, from the tensors of the live cache."""
    first = cache.layers[0].keys
    stored = sum(side.untyped_storage().nbytes() for layer in cache.layers for side in (layer.keys, layer.values))
    return stored / (first.shape[0] * first.shape[2])


def best_products(module, query, key, value, attention_mask, scaling=None, **options):
    """The original with plain products where one token is decoded without a mask, else transformers' own."""
    if query.shape[2] > 1 or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    output = products_keys_first(query, key, value, scaling)
    return output.reshape(query.shape).transpose(1, 2).contiguous(), None


VARIANTS = {
    "original: default": (None, "auto"),
    "original: keys first": (None, "auto"),
    "head: expanded": (COMPRESSED["head"], "expand"),
    "head: absorbed": (COMPRESSED["head"], "auto"),
    "frequency+latent: absorbed": (COMPRESSED["frequency+latent"], "auto"),
}


def variant_model(name, shape, context, arguments):
    kinds, decode = VARIANTS[name]
    model = build(shape, kinds, context, arguments, decode=decode)
    if name == "original: keys first":
        AttentionInterface.register("best_products", best_products)
        transformers.masking_utils.AttentionMaskInterface.register(
            "best_products", transformers.masking_utils.sdpa_mask
        )
        model.set_attn_implementation("best_products")
    return model


@torch.no_grad()
def stack(shape, context, batch, arguments):
    models = {name: variant_model(name, shape, context, arguments) for name in VARIANTS}
    token = torch.zeros(batch, 1, dtype=torch.long, device=arguments.device)
    prompt = torch.randint(1024, (batch, context), device=arguments.device)
    line = {"shape": shape, "context": context, "batch": batch, "layers": LAYERS}
    line["cache_bytes_per_token"] = {}
    steps = {}
    for name, model in models.items():
        cache = fill(model, context, batch, arguments)
        line["cache_bytes_per_token"][name] = cache_bytes_per_token(cache)
        steps[name] = lambda _, model=model, cache=cache: model(token, past_key_values=cache)
    line["decode_milliseconds"] = measure(steps, arguments, 1)
    steps.clear()
    if context <= arguments.prefill_up_to:
        prefill = {
            name: lambda _, model=models[name]: model(prompt, use_cache=True, logits_to_keep=1)
            for name in ("original: default", "head: absorbed", "frequency+latent: absorbed")
        }
        few = argparse.Namespace(**{**vars(arguments), "rounds": min(arguments.rounds, 3)})
        line["prefill_milliseconds"] = measure(prefill, few, 1)
    if context > arguments.peaks_up_to:
        return line
    line["decode_peak_megabytes"] = {}
    for name in VARIANTS:
        command = [sys.executable, __file__, "--peak", name, "--shapes", shape, "--contexts", str(context)]
        for flag in ("device", "dtype", "threads"):
            command += [f"--{flag}", str(getattr(arguments, flag))]
        found = subprocess.run([*command, "--batches", str(batch)], capture_output=True, text=True, check=True)
        line["decode_peak_megabytes"][name] = float(found.stdout)
    return line


def resident(field):
    """Megabytes of this process, as Linux says."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


@torch.no_grad()
def peak(name, arguments):
    """Megabytes above the loaded model that a cache of the context and three decoded tokens take at their peak."""
    shape, context, batch = arguments.shapes[0], arguments.contexts[0], arguments.batches[0]
    model = variant_model(name, shape, context, arguments)
    token = torch.zeros(batch, 1, dtype=torch.long, device=arguments.device)
    model(token)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    if arguments.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    cache = fill(model, context, batch, arguments)
    for _ in range(3):
        model(token, past_key_values=cache)
    after = resident("VmHWM")
    if arguments.device != "cpu":
        after = torch.cuda.max_memory_allocated() / 2**20
    print(after - before)


def plot(result, file):
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    panels = list(dict.fromkeys((line["shape"], line["batch"]) for line in result["attention"]))
    curves = {
        "original: default": {"color": "0.6", "linestyle": "--"},
        "original: best": {"color": "black"},
        "head: expanded": {"color": "tab:orange", "linestyle": "--"},
        "head: absorbed": {"color": "tab:blue"},
        "frequency+latent: absorbed": {"color": "tab:green"},
    }
    contexts = sorted({line["context"] for line in result["attention"]})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.2), sharey=True, squeeze=False)
    for axis, (shape, batch) in zip(axes[0], panels, strict=True):
        lines = [line for line in result["attention"] if (line["shape"], line["batch"]) == (shape, batch)]
        for name, style in curves.items():
            points = sorted(
                (line["context"], line["milliseconds"][line["best_original"] if name == "original: best" else name])
                for line in lines
                if name == "original: best" or name in line["milliseconds"]
            )
            axis.plot(*zip(*points, strict=True) if points else ([], []), marker="o", label=name, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(contexts, [f"{context / 1024:g} K" for context in contexts])
        axis.set_xlim(contexts[0] / 1.4, contexts[-1] * 1.4)
        axis.grid(alpha=0.3, which="both")
        axis.set(title=f"{shape}, {result['dtype']}, batch {batch}", xlabel="cached tokens")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[0, 0].set_ylabel("ms per decoded token and layer")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3 if len(panels) > 1 else 2, frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(file, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 65536])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, one thread")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--expand-up-to", type=int, default=16384, help="longest context that is expanded")
    parser.add_argument("--prefill-up-to", type=int, default=8192, help="longest prompt")
    parser.add_argument("--stack-up-to", type=int, default=65536, help="longest context of the stack; 0: none")
    parser.add_argument("--peaks-up-to", type=int, default=65536, help="longest context of peak memory; 0: none")
    parser.add_argument("--out", type=Path, help="JSON; default: results/decode-DEVICE-DTYPE.json")
    parser.add_argument("--plot", type=Path, help="draw this JSON beside itself and measure nothing")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plot:
        plot(json.loads(arguments.plot.read_text()), arguments.plot.with_suffix(".png"))
        return
    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"this torch sees no GPU for --device {arguments.device}")
    if arguments.clock == "cpu" and arguments.device != "cpu":
        parser.error("--clock cpu does not see what a GPU does: leave it out with --device cuda")
    if arguments.clock == "cpu" and arguments.threads != 1:
        parser.error("--clock cpu adds up the time of all threads: give --threads 1 with it")
    if arguments.device != "cpu":  # one process measures more forms than a model has
        for name in ("recompile_limit", "cache_size_limit"):  # the second is its name before torch 2.7
            if hasattr(torch._dynamo.config, name):
                setattr(torch._dynamo.config, name, 64)
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    if arguments.peak:
        peak(arguments.peak, arguments)
        return
    out = arguments.out or RESULTS / f"decode-{arguments.device}-{arguments.dtype}.json"
    result = {
        "command": " ".join(["python benchmarks/decode.py", *sys.argv[1:]]),
        "machine": machine(arguments.device),
        "versions": versions(),
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "clock": arguments.clock,
        # Whether the absorbed times of a CPU are the kernel's.
        "kernel_on_cpu": arguments.device == "cpu"
        and decode_cpu_mea.readable(torch.empty(0, dtype=getattr(torch, arguments.dtype))),
        "attention": [],
        "stack": [],
    }
    combinations = [(s, c, b) for s in arguments.shapes for b in arguments.batches for c in arguments.contexts]
    with torch.no_grad():
        for part, function in (("attention", attention_alone), ("stack", stack)):
            for combination in combinations:
                if part == "stack" and combination[1] > arguments.stack_up_to:
                    continue
                result[part].append(function(*combination, arguments))
                print(part, json.dumps(result[part][-1]), file=sys.stderr)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(result, indent=2) + "\n")
    plot(result, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
