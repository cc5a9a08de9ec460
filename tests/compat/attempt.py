"""Run under one release of transformers: what must hold of a checkpoint there, as JSON on stdout.

    python attempt.py package|remote CHECKPOINT...

`package` loads with this package imported, `remote` with the code that the checkpoint carries and the package hidden.
"""

import json
import sys
import warnings

MODE, *CHECKPOINTS = sys.argv[1:]


class Absent:
    """Hides the package from the import system."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mea_compress":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if MODE == "remote":
    sys.meta_path.insert(0, Absent())
else:
    import mea_compress  # noqa: F401
import torch
import transformers
from transformers import AutoModelForCausalLM

OPTIONS = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def cache_of(output):
    return output["cache"] if "cache" in output else output["past_key_values"]


def attempt(directory):
    options = {"trust_remote_code": MODE == "remote", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(directory, **options).eval().float()
    name = "cache" if "cache" in model.forward.__wrapped__.__code__.co_varnames else "past_key_values"
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(5))
    padded = torch.ones_like(ids)
    padded[0, :3] = 0  # on the left
    found = {}
    with torch.no_grad():
        steps, cache = [], None
        for part in (ids[:, :7], ids[:, 7:8], ids[:, 8:10], ids[:, 10:]):
            output = model(part, use_cache=True, **({} if cache is None else {name: cache}))
            cache = cache_of(output)
            steps.append(output.logits)
        whole = model(ids, use_cache=False).logits
        found["cached"] = float((torch.cat(steps, 1) - whole).abs().max())
        held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
        found["held"] = sum(tensor.nbytes for tensor in held) / ids.numel()
        alone = model(ids[:1, 3:], use_cache=False).logits
        positions = (padded.cumsum(-1) - 1).clamp(min=0)
        hidden = model(ids, attention_mask=padded, position_ids=positions, use_cache=False).logits[:1, 3:]
        found["padded"] = float((hidden - alone).abs().max())
        for key, more in (("dynamic", {}), ("static", {"cache_implementation": "static"})):
            found[key] = model.generate(ids, attention_mask=padded, **more, **OPTIONS).tolist()
        found["uncached"] = model.generate(ids, attention_mask=padded, use_cache=False, **OPTIONS).tolist()
        try:
            model(ids[:, :1], position_ids=torch.full((2, 1), 7), use_cache=False)
            found["withheld"] = "answered"
        except ValueError as error:
            found["withheld"] = str(error)
        try:
            model.generate_batch(inputs=ids.tolist(), max_new_tokens=2)
            found["batched"] = "answered"
        except ValueError as error:
            found["batched"] = str(error)
    return found


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    results = {directory: attempt(directory) for directory in CHECKPOINTS}
untested = [str(one.message) for one in caught if "was tested with transformers" in str(one.message)]
print(json.dumps({"transformers": transformers.__version__, "untested": untested, "found": results}))
