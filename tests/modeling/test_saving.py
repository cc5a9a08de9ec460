"""What save_pretrained and Trainer write loads where this package is not installed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from test_modeling_mea import FAMILIES, build, forward, tokens
from tiny import save, stock_checkpoint
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mea_compress.compression import compress
from mea_compress.emit.code import CODE_FILES, carried_code
from mea_compress.recipe import Recipe

LOGITS = """
import json, sys
sys.modules["mea_compress"] = None
import torch
from transformers import AutoModelForCausalLM
found = {}
for path in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, experts_implementation="eager")
    found[path] = model(torch.arange(3, 9)[None]).logits.flatten().tolist()
    model.save_pretrained(path + "-again")
    AutoModelForCausalLM.from_pretrained(path + "-again", trust_remote_code=True)
print(json.dumps(found))
"""


@pytest.mark.process
def test_saved_models_load_elsewhere(tmp_path):
    expected = {}
    for family in FAMILIES:
        model = build(family, "frequency", "latent", dtype=torch.float32)
        path = save(model, tmp_path / family)
        assert carried_code(path).changed == () and {*CODE_FILES} <= {*os.listdir(path)}
        expected[str(path)] = forward(model, torch.arange(3, 9)[None]).flatten()
    source = stock_checkpoint(tmp_path / "source")
    out = compress(source, tmp_path / "out", recipe=Recipe(kv_ratio=0.5, fit="weights"), progress=False).out
    model = AutoModelForCausalLM.from_pretrained(out)
    arguments = TrainingArguments(output_dir=tmp_path / "trained", max_steps=1, report_to=[], use_cpu=True)
    rows = [{"input_ids": row, "labels": row} for row in tokens(2, 8)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "trained" / "last")
    expected[str(tmp_path / "trained" / "last")] = forward(model.eval(), torch.arange(3, 9)[None]).flatten()
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", LOGITS, *expected], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for path, logits in json.loads(done.stdout.splitlines()[-1]).items():
        torch.testing.assert_close(torch.tensor(logits), expected[path], rtol=0, atol=1e-5)
