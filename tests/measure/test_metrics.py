import ast
import math
from pathlib import Path

import pytest
import torch
from letters import tiny_llama

from mea_compress import measure
from mea_compress.errors import RequestError
from mea_compress.measure.metrics import (
    NOTHING,
    check_same_vocabulary,
    compare,
    compare_models,
    max_batch_size,
    predictions,
)


def compare_logits(logits, reference, ids, mask):
    """Compare logits (B, T, V) of a model and of a reference for ids (B, T)."""
    return compare(predictions(logits, ids, mask), predictions(reference, ids, mask))


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-13), (torch.float32, 2e-7), (torch.bfloat16, 2e-7)])
@pytest.mark.parametrize("noise", [3.0, 0.01])
def test_figures_are_those_of_float64(dtype, error, noise):
    """Nats per token, of peaked distributions over a vocabulary that takes many slices, and of nearly equal ones."""
    generator = torch.Generator().manual_seed(0)
    reference = 3 * torch.randn(3, 7, 2**17 + 3, generator=generator, dtype=torch.float64)
    logits = (reference + noise * torch.randn(reference.shape, generator=generator, dtype=torch.float64) - 40).to(dtype)
    reference = reference.to(dtype)
    ids, mask = torch.randint(0, 2**17, (3, 7), generator=generator), torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    total = compare_logits(logits, reference, ids, mask)
    keep = mask[:, 1:]
    p, q = logits[:, :-1].double().log_softmax(-1), reference[:, :-1].double().log_softmax(-1)
    losses = [-x.gather(-1, ids[:, 1:, None]).squeeze(-1)[keep].sum() for x in (p, q)]
    assert total.tokens == 15
    assert total.kl / 15 == pytest.approx(float((q.exp() * (q - p)).sum(-1)[keep].sum()) / 15, abs=error)
    assert total.cross_entropy / 15 == pytest.approx(float(losses[0]) / 15, rel=error)
    assert total.reference_cross_entropy / 15 == pytest.approx(float(losses[1]) / 15, rel=error)
    assert total.agreements == int((p.argmax(-1) == q.argmax(-1))[keep].sum())
    same = compare_logits(logits, logits, ids, mask)
    assert same.kl == 0 and same.agreements == 15


def test_one_reference_serves_several_models():
    generator = torch.Generator().manual_seed(0)
    one, other, reference = torch.randn(3, 2, 5, 40, generator=generator)
    ids, mask = torch.randint(0, 40, (2, 5), generator=generator), torch.ones(2, 5, dtype=torch.bool)
    kept = predictions(reference, ids, mask)
    for logits in (one, other):
        assert compare(predictions(logits, ids, mask), kept) == compare_logits(logits, reference, ids, mask)
    assert kept.logits.data_ptr() == reference.data_ptr()
    wide = compare(predictions(one.double(), ids, mask), kept)
    assert wide.kl == pytest.approx(compare_logits(one, reference, ids, mask).kl, rel=1e-6)


def test_nothing_to_predict_adds_nothing():
    logits, ids = torch.randn(1, 1, 4), torch.zeros(1, 1, dtype=torch.int64)
    assert compare_logits(logits, logits, ids, torch.ones(1, 1, dtype=torch.bool)) == NOTHING


def test_a_token_that_only_the_model_rules_out_is_infinitely_far():
    logits, reference = torch.zeros(2, 1, 2, 3)
    logits[..., 2] = -torch.inf
    total = compare_logits(logits, reference, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool))
    assert total.kl == math.inf and total.cross_entropy == pytest.approx(math.log(2))


def test_tokens_ruled_out_by_the_reference_add_nothing():
    logits = torch.zeros(1, 2, 3)
    reference = torch.tensor([[[0.0, 0.0, -torch.inf]] * 2])
    total = compare_logits(logits, reference, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool))
    assert total.kl == pytest.approx(math.log(3 / 2))


def test_padding_changes_nothing_and_models_are_compared_by_their_logits():
    model, reference = tiny_llama(0), tiny_llama(1)
    ids = torch.randint(3, 30, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, 5:] = mask[2, 8:] = False
    total = compare_models(model, reference, ids, mask)
    alone = [
        compare_models(model, reference, *(x[i : i + 1, : int(mask[i].sum())] for x in (ids, mask))) for i in range(3)
    ]
    assert total.tokens == sum(row.tokens for row in alone) == 4 + 8 + 7
    for name in ("cross_entropy", "kl", "reference_cross_entropy"):
        assert getattr(total, name) == pytest.approx(sum(getattr(row, name) for row in alone), rel=1e-5)
    assert compare_models(model, None, ids, mask).kl == 0 < total.kl


def test_logits_of_a_batch_are_bounded():
    assert max_batch_size(256, 32768) == 8
    assert max_batch_size(2048, 262144) == 1


def test_vocabularies_that_differ_are_refused():
    check_same_vocabulary(tiny_llama(0), tiny_llama(1), ("a", "b"))
    with pytest.raises(RequestError, match=r"^a has a vocabulary of 30 and b one of 40"):
        check_same_vocabulary(tiny_llama(), tiny_llama(vocab_size=40), ("a", "b"))


def test_measuring_knows_no_training():
    for file in Path(measure.__path__[0]).glob("*.py"):
        imported = [
            node.module or "" for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)
        ]
        assert imported or file.name == "__init__.py"
        assert not [name for name in imported if name.startswith(("mea_compress.healing", "mea_compress.fit"))]
