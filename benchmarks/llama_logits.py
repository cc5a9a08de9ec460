"""Tokens and logits of llama.cpp for `real_model.py`, run by the Python of an environment that has llama-cpp-python.

    python llama_logits.py MODEL.gguf TEXT OUT.npz

OUT has `ids` (T,) and `logits` (T, V), float32. Nothing of mea-compress is imported.
"""

import sys

import numpy as np
from llama_cpp import Llama


def main(model: str, text: str, out: str) -> None:
    with open(text, "rb") as file:
        content = file.read()
    llama = Llama(model_path=model, n_ctx=2048, n_batch=2048, logits_all=True, verbose=False)
    ids = llama.tokenize(content, add_bos=False, special=False)[:1024]
    llama.eval(ids)
    np.savez(out, ids=np.array(ids), logits=np.array(llama.scores[: len(ids)], dtype=np.float32))


if __name__ == "__main__":
    main(*sys.argv[1:])
