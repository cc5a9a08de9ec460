import ast
import math
from pathlib import Path

import pytest
import torch
from letters import tiny_llama

from mea_compress import measure
from mea_compress.errors import RequestError
from mea_compress.measure.metrics import check_same_vocabulary, compare_logits, compare_models, max_batch_size


def test_logits_are_compared_in_pieces():
    torch.manual_seed(0)
    logits, reference = torch.randn(2, 3, 7, 2**22 // 64)
    ids, mask = torch.randint(0, 2**16, (3, 7)), torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    total = compare_logits(logits, reference, ids, mask)
    keep = mask[:, 1:]
    p, q = logits[:, :-1].double().log_softmax(-1), reference[:, :-1].double().log_softmax(-1)
    assert total.tokens == 15
    assert total.kl == pytest.approx(float((q.exp() * (q - p)).sum(-1)[keep].sum()), rel=1e-9)
    loss = -p.gather(-1, ids[:, 1:, None]).squeeze(-1)[keep].sum()
    assert total.cross_entropy == pytest.approx(float(loss), rel=1e-9)


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
