"""One row of `real_model.py` for cacheshrink, run by the Python of an environment that has it, geoopt and datasets.

    python peer_real_model.py CHECKPOINT WINDOWS.json CALIBRATION.txt RATIO DTYPE

DTYPE, `auto` for the checkpoint's own, is that of the caches in other rows. WINDOWS.json maps `perplexity` and the name
of each text to lists of token ids. Prints one JSON object. Nothing of mea-compress is imported.
"""

import json
import math
import resource
import sys

import torch
from peer_cacheshrink import SAMPLES, convert
from transformers import AutoModelForCausalLM

LENGTH = 512


@torch.no_grad()
def compare(original, compressed, rows):
    kl = loss = own = same = 0.0
    for ids in torch.tensor(rows).split(1):
        q = compressed(ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
        target = ids[0, 1:, None]
        loss -= float(q.gather(-1, target).sum())
        if original is not None:
            p = original(ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            own -= float(p.gather(-1, target).sum())
            kl += float((p.exp() * (p - q)).sum())
            same += float((p.argmax(-1) == q.argmax(-1)).sum())
    count = len(rows) * (len(rows[0]) - 1)
    figures = {"perplexity": math.exp(loss / count), "windows": len(rows), "length": len(rows[0])}
    if original is None:
        return figures | {"cross_entropy": loss / count}
    figures |= {"kl": kl / count, "top1_agreement": same / count, "original_perplexity": math.exp(own / count)}
    return figures


def main(checkpoint: str, windows: str, calibration: str, ratio: float, dtype: str) -> None:
    with open(windows, encoding="utf-8") as file:
        rows = json.load(file)
    with open(calibration, encoding="utf-8") as file:
        text = file.read()
    pieces = [text[start : start + 4 * LENGTH] for start in range(0, 4 * LENGTH * SAMPLES, 4 * LENGTH)]
    compressed, seconds = convert(checkpoint, ratio, [piece for piece in pieces if piece.strip()], LENGTH)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    original = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    stored = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).dtype  # the cache's type, as in other rows
    widths = [module.d_latent for module in compressed.modules() if hasattr(module, "d_latent")]
    figures = {
        "compression": {"seconds": round(seconds, 1), "peak_bytes": peak},
        "kv_bytes_per_token": 2 * stored.itemsize * widths[0] * original.config.num_hidden_layers,
        "texts": {name: compare(original, compressed, ids) for name, ids in rows.items() if name != "perplexity"},
        "perplexity": compare(None, compressed, rows["perplexity"]),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:4], float(sys.argv[4]), sys.argv[5])
