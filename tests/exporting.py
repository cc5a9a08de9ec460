"""Tiny compressed checkpoints to export, for tests of exports."""

from tiny import stock_checkpoint
from transformers import AutoModelForCausalLM

from mea_compress.compression import compress
from mea_compress.recipe import Recipe

QUICK = {"sequence_length": 32, "sequences": 16}
# Compositions that a stock checkpoint can hold, and what of the recipe each needs.
HEAD = {"key_composition": "head", "value_composition": "head"}
WAYS = {
    "head": HEAD,
    "frequency": {"key_composition": "frequency", "value_composition": "latent", "rotary_allocation": "uniform"},
    "pool": {"key_composition": "pool", "value_composition": "pool"},
    "head in 2 groups": {**HEAD, "kv_groups": 2},
    "frequency in 2 groups": {
        "key_composition": "frequency",
        "value_composition": "latent",
        "rotary_allocation": "uniform",
        "kv_groups": 2,
    },
}


def compressed(directory, case="llama", way="head", ratio=0.5, **more):
    """A tiny checkpoint of a family at half its cache, by weights alone."""
    if not (directory / "source").exists():
        stock_checkpoint(directory / "source", case)
    settings = {"kv_ratio": ratio, "fit": "weights", **WAYS.get(way, {}), **more}
    out = directory / f"{way} {more or ''}"
    compress(directory / "source", out, recipe=Recipe(**settings), progress=False)
    return out


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager").eval()
