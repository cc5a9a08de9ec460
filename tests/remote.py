"""Checkpoints loaded by the code that they carry, in a process that does not know this package."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SCRIPT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mea_compress":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

tokens, base, found = load_file(sys.argv[1])["tokens"], sys.argv[3] == "base", {}
options = {"trust_remote_code": True, "experts_implementation": "eager", "dtype": torch.float32}
with torch.no_grad():
    for index, out in enumerate(sys.argv[4:]):
        model = AutoModelForCausalLM.from_pretrained(out, **options)
        assert model.config.model_type.startswith("mea_") and "transformers_modules" in type(model).__module__
        found[out] = model(tokens).logits
        generated = model.generate(tokens[:, :4], max_new_tokens=3, do_sample=False)
        assert generated.shape[1] > 4
        if base:
            assert type(AutoModel.from_pretrained(out, **options)) is type(getattr(model, model.base_model_prefix))
        model.save_pretrained(f"saved-{index}")
        again = AutoModelForCausalLM.from_pretrained(f"saved-{index}", **options)
        assert torch.equal(again(tokens).logits, found[out])
assert "mea_compress" not in sys.modules
save_file(found, sys.argv[2])
"""


def remote_logits(
    outs: Sequence[Path], ids: torch.Tensor, directory: Path, base: bool = True
) -> dict[Path, torch.Tensor]:
    """Return what each checkpoint makes of tokens (B, T): as remote code, and the same when it saved itself there.

    Args:
        outs: Checkpoints.
        ids: Tokens.
        directory: To work in.
        base: Load what AutoModel makes of each too; a model that never was a checkpoint of ours names no such class.
    """
    save_file({"tokens": ids}, directory / "tokens.safetensors")
    (directory / "remote.py").write_text(SCRIPT)
    environment = os.environ | {"HF_MODULES_CACHE": str(directory / "modules"), "HF_HUB_OFFLINE": "1"}
    arguments = ["remote.py", "tokens.safetensors", "logits.safetensors", "base" if base else "-", *map(str, outs)]
    done = subprocess.run([sys.executable, *arguments], cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(directory / "logits.safetensors")
    return {out: found[str(out)] for out in outs}
