"""One row of `quality.py` for cacheshrink, run by the Python of an environment that has it (geoopt and datasets too).

    python peer_cacheshrink.py CHECKPOINT TEXT CALIBRATION RATIO LENGTH LIMIT

Prints one JSON object. Nothing of mea-compress is imported: sequences are cut here as `evaluate` cuts them.
"""

import json
import sys
import time

import torch
from cacheshrink import convert_to_mla
from transformers import AutoModelForCausalLM, AutoTokenizer

SAMPLES = 100  # calibration texts


def stories(path: str) -> list[str]:
    with open(path, encoding="utf-8") as lines:
        values = [json.loads(line) for line in lines if line.strip()]
    return [value["text"] if isinstance(value, dict) else value for value in values]


def convert(checkpoint: str, ratio: float, texts: list[str], length: int) -> tuple[torch.nn.Module, float]:
    """Return the peer's checkpoint, calibrated, "separate", and the seconds that it took."""
    start = time.perf_counter()
    compressed, _ = convert_to_mla(
        checkpoint,
        compression_ratio=1 / ratio,
        compression_method="separate",
        device="cpu",
        dtype=torch.float32,
        calibration_texts=texts,
        num_calibration_samples=SAMPLES,
        max_calibration_length=length,
        verbose=False,
    )
    return compressed.eval(), time.perf_counter() - start


def main(checkpoint: str, text: str, calibration: str, ratio: float, length: int, limit: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = []
    for story in stories(text):
        ids = [tokenizer.bos_token_id, *tokenizer(story, add_special_tokens=False)["input_ids"]][:length]
        if len(ids) == length:
            rows.append(ids)
    ids = torch.tensor(rows[: limit or None])
    original = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    compressed, seconds = convert(checkpoint, ratio, stories(calibration)[:SAMPLES], length)
    kl = loss = own = same = 0.0
    with torch.no_grad():
        for part in ids.split(16):
            p = original(part, use_cache=False).logits[:, :-1].double().log_softmax(-1)
            q = compressed(part, use_cache=False).logits[:, :-1].double().log_softmax(-1)
            target = part[:, 1:, None]
            kl += float((p.exp() * (p - q)).sum())
            own -= float(p.gather(-1, target).sum())
            loss -= float(q.gather(-1, target).sum())
            same += float((p.argmax(-1) == q.argmax(-1)).sum())
    count = ids.shape[0] * (length - 1)
    config = original.config
    heads = config.num_key_value_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
    width = next(m.d_latent for m in compressed.modules() if hasattr(m, "d_latent"))
    print(
        json.dumps(
            {
                "kl": kl / count,
                "cross_entropy": loss / count,
                "top1_agreement": same / count,
                "kv_bytes_per_token": 2 * 4 * width * config.num_hidden_layers,
                "tokens": count,
                "reference": {
                    "cross_entropy": own / count,
                    "kv_bytes_per_token": 2 * 4 * heads * config.num_hidden_layers,
                },
                "seconds": round(seconds, 1),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:4], float(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6]))
