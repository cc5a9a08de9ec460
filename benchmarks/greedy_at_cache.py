"""Greedy text at whole width, composed at the cache against the original's, of families with windows and sinks.

Tiny random models of transformers' own classes; their layers slide over fewer tokens than are written. Run it with

    python benchmarks/greedy_at_cache.py --json benchmarks/results/greedy_at_cache.json
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

import mea_compress as mc

TOKENS = 200
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
FAMILIES = {"gemma3_text": {}, "gpt_oss": EXPERTS | ROPE, "olmo3": {}}


def measure(name: str, work: Path) -> dict[str, object]:
    """Compress a model of a family to the whole width, and compare what both write."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**SIZES | FAMILIES[name])
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.3))
    model.save_pretrained(work / name)
    options = {"refine": 0, "split": "even", "sequences": 4, "sequence_length": 128, "progress": False}
    mc.compress(work / name, work / f"{name}-whole", kv_ratio=1.0, **options)
    prompt = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    texts = []
    for directory in (work / name, work / f"{name}-whole"):
        loaded, _ = mc.load(directory, dtype="float32", device="cpu")
        loaded.generation_config.eos_token_id = None
        texts.append(loaded.generate(prompt, max_new_tokens=TOKENS, do_sample=False)[:, 16:])
    same = (texts[0] == texts[1]).int().cumprod(1).sum(1)
    return {"tokens": TOKENS, "equal_from_the_start": same.tolist(), "different_tokens": texts[0].unique().numel()}


def main() -> None:
    """Measure every family, and print or keep what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        results: dict[str, object] = {name: measure(name, Path(work)) for name in FAMILIES}
    command = "python benchmarks/greedy_at_cache.py --json benchmarks/results/greedy_at_cache.json"
    results |= {"command": command, "transformers": transformers.__version__, "torch": torch.__version__}
    text = json.dumps(results, indent=2) + "\n"
    print(text, end="")
    if arguments.json:
        arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
