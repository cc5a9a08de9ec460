"""One allocation over rotary pairs for all layers: the best there is, and what makes stock exports possible."""

import itertools
import json

import numpy as np
import pytest
import torch
from tiny import stock_checkpoint
from transformers import AutoModelForCausalLM

import mea_compress as mc
from mea_compress.compositions.frequency import Frequency, allocate_components
from mea_compress.errors import RequestError
from mea_compress.layers.read import read_heads
from mea_compress.planning.plans import make_plan
from mea_compress.recipe import Recipe

SHARED = {"kv_ratio": 0.5, "heal": "0", "rotary_allocation": "shared", "split": "even", "budget": "uniform"}
FITS = [{"fit": "weights"}, {"refine": 0, "sequence_length": 32, "sequences": 16}]


def counts_of(directory):
    layers = json.loads((directory / "config.json").read_text())["mea"]["layers"]
    return [layer["rotary_components"] for layer in layers]


@pytest.mark.parametrize("fit", FITS, ids=["weights", "aligned"])
@pytest.mark.parametrize("case", ["llama", "llama-rope-bias-wide-tied", "qwen2", "mistral"])
def test_all_layers_have_one_list_and_export(case, fit, tmp_path):
    source = stock_checkpoint(tmp_path / "source", case)
    mc.compress(source, tmp_path / "out", progress=False, **SHARED, **fit)
    counts = counts_of(tmp_path / "out")
    assert all(count == counts[0] for count in counts)
    mc.export(tmp_path / "out", tmp_path / "stock", format="llama" if case == "qwen2" else "stock")
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        mine, stock = (AutoModelForCausalLM.from_pretrained(tmp_path / n)(ids).logits for n in ("out", "stock"))
    torch.testing.assert_close(mine, stock, atol=1e-4, rtol=1e-3)


def test_three_heads_export_at_half(tmp_path):
    source = stock_checkpoint(
        tmp_path / "source", hidden_size=48, num_attention_heads=6, num_key_value_heads=3, head_dim=8
    )
    mc.compress(source, tmp_path / "out", progress=False, fit="weights", **SHARED)
    result = mc.export(tmp_path / "out", tmp_path / "stock")
    assert sum(counts_of(tmp_path / "out")[0]) == 3 * 8 // 2 // 2
    assert result.to_json()


def test_groups_share_it_too(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    mc.compress(source, tmp_path / "out", progress=False, fit="weights", kv_groups=2, **SHARED)
    assert all(count % 2 == 0 for count in counts_of(tmp_path / "out")[0])
    mc.export(tmp_path / "out", tmp_path / "stock")


def test_no_other_list_keeps_more(tmp_path):
    source = stock_checkpoint(tmp_path / "source", head_dim=8)
    mc.compress(source, tmp_path / "out", progress=False, fit="weights", **SHARED)
    plan = make_plan(source, Recipe(fit="weights", **SHARED))
    method = Frequency(allocation="shared")
    energies = sum(
        method.energies(read_heads(plan.source, layer, with_queries=False), None, "weights") for layer in range(2)
    )
    chosen = counts_of(tmp_path / "out")[0]
    kept = [np.cumsum(np.concatenate(([0], row)))[: len(row) + 1] for row in energies]

    def worth(counts):
        return sum(row[count] for row, count in zip(kept, counts, strict=True))

    best = max(
        (counts for counts in itertools.product(range(5), repeat=4) if sum(counts) == sum(chosen)),
        key=worth,
    )
    assert worth(chosen) == pytest.approx(worth(best))
    assert tuple(chosen) == allocate_components(energies, sum(chosen))


def test_other_widths_cannot_share(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    file = tmp_path / "widths.json"
    file.write_text(json.dumps({"layers": [{"layer": 1, "key_components": 1, "value_components": 2}]}))
    with pytest.raises(RequestError, match="one width"):
        mc.plan(source, **SHARED | {"budget": str(file)})
    with pytest.raises(RequestError, match="widths that are alike"):
        mc.plan(source, kv_ratio=0.5, rotary_allocation="shared", budget="measured")
