"""Run under one release of transformers: compress tiny models end to end, heal one, export one, save one again.

python compress_here.py DIRECTORY
"""

import gc
import json
import sys
from pathlib import Path

import torch
from test_multimodal import MODELS
from test_multimodal import stock_checkpoint as multimodal_checkpoint
from tiny import save, stock_checkpoint
from transformers import AutoModelForCausalLM

import mea_compress  # noqa: F401
from mea_compress.compression import compress
from mea_compress.exporting.stock import export
from mea_compress.measure.cache import measure_cache_bytes
from mea_compress.recipe import Recipe

QUICK = {"kv_ratio": 0.5, "sequences": 8, "sequence_length": 24, "refine": 3, "split": "even"}
CASES = {
    "default": ("llama", {}),
    "joint": ("mistral", {"key_composition": "joint", "value_composition": "joint"}),
    "normed": ("qwen3_moe", {"key_composition": "head", "value_composition": "head"}),
    "exportable": ("llama", {"rotary_allocation": "uniform"}),
    "fused": (
        "phi3-partial",
        {"fit": "weights", "refine": 0, "key_composition": "latent", "value_composition": "latent"},
    ),
    "images": ("llava", {"sequence_length": 32, "sequences": 10}),
}
gc.collect()
gc.freeze()  # accelerate looks for garbage behind every training
place = Path(sys.argv[1])
found = {}
for name, (case, options) in CASES.items():
    source = place / f"{name}-source"
    if case in MODELS:
        multimodal_checkpoint(case, source)
    else:
        stock_checkpoint(source, case, **({"head_dim": 8} if case == "llama" else {}))
    recipe = Recipe(**{**QUICK, **options})
    result = compress(source, place / name, recipe=recipe, progress=False)
    model = AutoModelForCausalLM.from_pretrained(place / name, experts_implementation="eager")
    found[name] = {"planned": result.plan.bytes_after, "measured": measure_cache_bytes(model)}
    found[name]["decoding"] = result.fidelity["verification"]["decoding_difference"]
    again = AutoModelForCausalLM.from_pretrained(save(model, place / f"{name}-again"), experts_implementation="eager")
    ids = torch.arange(3, 15)[None]
    found[name]["saved"] = float((again(ids).logits - model(ids).logits).abs().max())
exported = export(place / "exportable", place / "stock", progress=False)
found["stock"] = exported.to_json()["verification"]
print(json.dumps(found))
