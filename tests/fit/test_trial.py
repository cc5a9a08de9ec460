"""Two allocations are tried, and the one that is closer to the original is taken."""

import json
import math

import pytest
from tiny import stock_checkpoint

from mea_compress.compression import compress
from mea_compress.fit import trial
from mea_compress.recipe import Recipe

MEASURED = {"sequence_length": 32, "sequences": 24, "kv_ratio": 0.5, "budget": "measured", "refine": 0, "heal": 0}


def budget_of(source, out, **changes):
    result = compress(source, out, recipe=Recipe(**{**MEASURED, **changes}), progress=False)
    told = json.loads((out / "compression.json").read_text())["fidelity"]["budget"]
    assert told == result.fidelity["budget"]
    return result.plan, told


@pytest.mark.parametrize("methods", [{}, {"key_composition": "joint", "value_composition": "joint"}])
def test_a_trial_finds_what_the_checkpoint_then_has(methods, tmp_path):
    """The closed form of all layers is measured as the compression itself does it, on the same text."""
    _, told = budget_of(stock_checkpoint(tmp_path / "src"), tmp_path / "out", **methods)
    tried = {name: told[f"{name}_trial_kl"] for name in ("measured", "uniform")}
    assert tried[told["chosen"]] == min(tried.values())
    assert told["measured_kl"] == pytest.approx(min(tried.values()), rel=1e-4)


@pytest.mark.parametrize("better", ["measured", "uniform"])
def test_the_better_one_is_taken_and_an_interrupted_run_does_not_try_again(better, tmp_path, monkeypatch):
    source, tried = stock_checkpoint(tmp_path / "src", num_hidden_layers=3), []

    def kl(plan, tokens, title, progress):
        (name,) = (name for name in ("measured", "uniform") if name in title)
        tried.append(name)
        if len(tried) == 2 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return 0.1 if name == better else 0.2

    stopped = []
    monkeypatch.setattr(trial, "closed_form_kl", kl)
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", recipe=Recipe(**MEASURED), progress=False)
    result = compress(source, tmp_path / "out", recipe=Recipe(**MEASURED), progress=False, resume=True)
    assert tried == ["measured", "uniform", "uniform"] and result.fidelity["budget"]["chosen"] == better
    monkeypatch.setattr(trial, "better_plan", lambda plans, *_: plans[better])
    expected = compress(source, tmp_path / "expected", recipe=Recipe(**MEASURED), progress=False).plan
    assert [layer.spec for layer in result.plan.layers] == [layer.spec for layer in expected.layers]
    assert result.plan.predicted_kl == expected.predicted_kl > 0 and math.isfinite(result.plan.predicted_kl)
