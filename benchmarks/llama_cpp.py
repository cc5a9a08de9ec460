"""An export in an engine that was not written here: GGUF by the gguf package, run by llama.cpp beside transformers.

    pip install 'mea-compress[gguf]' llama-cpp-python
    mea-compress compress SRC HALF --recipe serve-anywhere
    mea-compress export HALF EXPORT --format llama
    python benchmarks/llama_cpp.py EXPORT --compressed HALF --json benchmarks/results/llama_cpp.json

Tokens go in and come out as numbers, so that no tokenizer is converted. The file is written as `export --format gguf`
writes it. For Llama, llama.cpp's `convert_hf_to_gguf.py` writes the tensor `rope_freqs.weight` only where rope_type is
llama3, and leaves out the factors of longrope.
"""

import argparse
import ctypes
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from mea_compress.exporting.gguf_file import write_gguf


def write(checkpoint, file):
    """A Llama checkpoint as GGUF in float32; a tokenizer that llama.cpp has no name for is left out."""
    with tempfile.TemporaryDirectory() as scratch:
        for path in Path(checkpoint).iterdir():
            if path.suffix == ".safetensors" or path.name == "config.json":
                (Path(scratch) / path.name).symlink_to(path.resolve())
        write_gguf(Path(scratch), Path(file), Path(checkpoint).name, "f32")


class Engine:
    """llama.cpp, fed tokens and read logits, with a cache in float32."""

    def __init__(self, file, context):
        llama_cpp.llama_backend_init()
        self.log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.log, ctypes.c_void_p(0))
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        assert model, "llama.cpp does not load it"
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        settings.flash_attn_type = 0  # off: it would round queries to half precision
        settings.n_threads = settings.n_threads_batch = 1
        self.context = llama_cpp.llama_init_from_model(model, settings)
        assert self.context, "llama.cpp makes no context for it"
        self.size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def state_bytes(self):
        """Bytes of everything a sequence keeps: its cache and little else."""
        return llama_cpp.llama_state_seq_get_size(self.context, 0)

    def __call__(self, tokens, position):
        """Logits (len(tokens), vocabulary) of tokens at positions from `position` on."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position + i
            batch.n_seq_id[i], batch.logits[i] = 1, 1
            batch.seq_id[i][0] = 0
        assert llama_cpp.llama_decode(self.context, batch) == 0
        rows = [
            np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, i), shape=(self.size,)).copy()
            for i in range(len(tokens))
        ]
        llama_cpp.llama_batch_free(batch)
        return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def greedy(forward, prompt, count):
    """Prompt logits, and the prompt continued one most likely token at a time."""
    logits = forward(prompt, 0)
    tokens, last = list(prompt), logits[-1]
    for _ in range(count):
        tokens.append(int(last.argmax()))
        last = forward(tokens[-1:], len(tokens) - 1)[-1]
    return logits, tokens


def stock(directory):
    """The same of transformers."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    cache = DynamicCache()

    def forward(tokens, position):
        return model(torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits[0]

    return forward


def compare(logits, tokens, expected, text, prompt):
    """Largest difference of prompt logits, and generated tokens that are the same."""
    return {
        "largest_logit_difference": float((logits - expected).abs().max()),
        "same_greedy_tokens": sum(a == b for a, b in zip(tokens, text, strict=True)) - prompt,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("--compressed", type=Path, help="what it was exported from")
    parser.add_argument("--original", type=Path, help="the model before compression, for the size of its cache")
    parser.add_argument("--prompt", type=int, nargs="+", default=[1, 5, 9, 20, 31, 40])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    context = len(arguments.prompt) + arguments.tokens + 2
    file = arguments.export / "model-f32.gguf"
    write(arguments.export, file)
    engine = Engine(file, context)
    logits, tokens = greedy(engine, arguments.prompt, arguments.tokens)
    versions = {name: version(name) for name in ("llama_cpp_python", "gguf", "transformers", "torch")}
    result = {"versions": versions, "tokens": arguments.tokens, "state_bytes": engine.state_bytes()}
    references = {"export_in_transformers": arguments.export}
    if arguments.compressed:
        import mea_compress  # noqa: F401  (registers the compressed checkpoint's classes)

        references["compressed_checkpoint"] = arguments.compressed
    for name, directory in references.items():
        expected, text = greedy(stock(directory), arguments.prompt, arguments.tokens)
        result[name] = compare(logits, tokens, expected, text, len(arguments.prompt))
    if arguments.original:
        whole = arguments.export / "original-f32.gguf"
        write(arguments.original, whole)
        original = Engine(whole, context)
        logits, tokens = greedy(original, arguments.prompt, arguments.tokens)
        expected, text = greedy(stock(arguments.original), arguments.prompt, arguments.tokens)
        # How far llama.cpp and transformers are apart on a checkpoint that nobody touched.
        result["original"] = compare(logits, tokens, expected, text, len(arguments.prompt))
        result["original"]["state_bytes"] = original.state_bytes()
        whole.unlink()
    file.unlink()
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
