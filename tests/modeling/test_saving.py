"""What save_pretrained and Trainer write loads where this package is not installed."""

import os

import pytest
import torch
from remote import remote_logits
from test_modeling_mea import FAMILIES, build, forward, tokens
from tiny import save, stock_checkpoint
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mea_compress.compression import compress
from mea_compress.emit.code import CODE_FILES, carried_code
from mea_compress.recipe import Recipe

IDS = torch.arange(3, 9)[None]


@pytest.mark.process
def test_saved_models_load_elsewhere(tmp_path):
    expected = {}
    for family in FAMILIES:
        model = build(family, "frequency", "latent", dtype=torch.float32)
        path = save(model, tmp_path / family)
        assert carried_code(path).changed == () and {*CODE_FILES} <= {*os.listdir(path)}
        expected[path] = forward(model, IDS)
    source = stock_checkpoint(tmp_path / "source")
    out = compress(source, tmp_path / "out", recipe=Recipe(kv_ratio=0.5, fit="weights"), progress=False).out
    model = AutoModelForCausalLM.from_pretrained(out)
    arguments = TrainingArguments(output_dir=tmp_path / "trained", max_steps=1, report_to=[], use_cpu=True)
    rows = [{"input_ids": row, "labels": row} for row in tokens(2, 8)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "trained" / "last")
    expected[tmp_path / "trained" / "last"] = forward(model.eval(), IDS)
    for path, logits in remote_logits(list(expected), IDS, tmp_path, base=False).items():
        torch.testing.assert_close(logits, expected[path], rtol=0, atol=1e-5)
