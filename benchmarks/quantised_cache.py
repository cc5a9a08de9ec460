"""Few bits on top of few components: caches of llama.cpp in f16, q8_0 and q4_0, KL and perplexity beside bytes.

    pip install 'mea-compress[gguf]' llama-cpp-python
    mea-compress export HALF HALF-GGUF --format gguf --weights f16
    python benchmarks/quantised_cache.py SRC HALF-GGUF/model.gguf ... --text held-out.txt \\
        --json benchmarks/results/quantised_cache.json

SRC is the original, a Llama checkpoint, and its logits with a cache in f16 are what all others are compared with. Each
window is read in one batch: what its tokens attend to has been rounded to the type of the cache before.
"""

import argparse
import ctypes
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import llama_cpp
import numpy as np

from mea_compress.exporting.gguf_file import write_gguf

CACHES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}


def engine(file, tokens, kind, threads):
    """A model with a cache of a type, read by flash attention, without which values are not quantised."""
    options = {"type_k": CACHES[kind], "type_v": CACHES[kind], "flash_attn": True}
    return llama_cpp.Llama(
        str(file),
        n_ctx=tokens,
        n_batch=tokens,
        n_ubatch=tokens,
        logits_all=True,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
        **options,
    )


def log_probabilities(model, ids):
    """Log-probabilities (T, V) of what follows each token, and bytes that the sequence keeps."""
    model.reset()
    model.eval(ids)
    logits = model.scores[: len(ids)].astype(np.float32)
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits, llama_cpp.llama_state_seq_get_size(model._ctx.ctx, ctypes.c_int32(0))


def measured(file, kind, windows, reference, threads):
    """KL to the reference's log-probabilities, perplexity, bytes of a token; fills a reference that is empty."""
    model = engine(file, len(windows[0]), kind, threads)
    divergence, loss = [], []
    for index, ids in enumerate(windows):
        found, state = log_probabilities(model, ids)
        if len(reference) == index:
            reference.append(found)
        expected = reference[index]
        divergence.append((np.exp(expected) * (expected - found)).sum(-1).mean())
        loss.append(-found[np.arange(len(ids) - 1), ids[1:]].mean())
    model.close()
    return {
        "kl": float(np.mean(divergence)),
        "perplexity": float(np.exp(np.mean(loss))),
        "state_bytes_per_token": state / len(windows[0]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path, help="a Llama checkpoint directory")
    parser.add_argument("files", type=Path, nargs="*", help="what export --format gguf has written")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {name: version(name) for name in ("llama_cpp_python", "gguf", "mea_compress")},
        "windows": arguments.windows,
        "tokens": arguments.tokens,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "original.gguf"
        write_gguf(arguments.original, whole, arguments.original.name, "f16")
        model = engine(whole, 512, "f16", arguments.threads)
        ids = model.tokenize(arguments.text.read_bytes(), add_bos=False, special=False)
        model.close()
        size = arguments.tokens
        starts = np.linspace(0, len(ids) - size, arguments.windows).astype(int)
        windows = [ids[start : start + size] for start in starts]
        reference = []
        for file in [whole, *arguments.files]:
            name = "original" if file == whole else file.parent.name
            for kind in CACHES:
                row = {"model": name, "cache": kind, **measured(file, kind, windows, reference, arguments.threads)}
                row["share_of_f16"] = (
                    row["state_bytes_per_token"] / (result["rows"] or [row])[0]["state_bytes_per_token"]
                )
                result["rows"].append(row)
                print(json.dumps(row), flush=True)
                if arguments.json:
                    arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
