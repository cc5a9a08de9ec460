"""Run under one release of transformers: how components at the cache of stock blocks are read there, as JSON on stdout.

python at_cache.py
"""

import json
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "modeling"))
from test_encoded_reading import blocks, composed, decoded, difference, tokens

from mea_compress.modeling.encoded_mea import EncodedAttention

FAMILIES = {"gemma2": "eager", "gpt_oss": "eager", "olmo2": "sdpa", "qwen3_next": "sdpa", "smollm3": "sdpa"}
attend, absorbed = EncodedAttention.attend_to_components, []


def counted(self, *args, **kwargs):
    absorbed.append(self)
    return attend(self, *args, **kwargs)


EncodedAttention.attend_to_components = counted
results = {}
for name, implementation in FAMILIES.items():
    model = composed(name, implementation)
    ids, mask = tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[0, :3] = 0
    absorbed.clear()
    expected, found = (decoded(model, choice, ids, 10, mask) for choice in ("expand", "absorb"))
    results[name] = {
        "difference": difference(expected[:, 10:], found[:, 10:]),
        "absorbed": len(absorbed) / len(blocks(model)),
    }
print(json.dumps({"transformers": transformers.__version__, "found": results}))
