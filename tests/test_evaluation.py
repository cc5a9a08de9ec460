import json
import math
from pathlib import Path

import pytest
import torch
from test_text import character_tokenizer, tiny_llama

from mea_compress.errors import RequestError
from mea_compress.healing import compare_logits
from mea_compress.measure.evaluation import cache_bytes, evaluate, measure_cache_bytes

SHARED = Path(__file__).resolve().parents[2] / "shared"
DOCUMENTS = ["the quick brown fox jumps over the lazy dog", "a b c", "hello world again and again", "x"]


def save(directory: Path, seed: int = 0, **changes) -> Path:
    tiny_llama(seed, **changes).save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    return tmp_path / "text.jsonl"


def test_figures_against_one_sequence_at_a_time(tmp_path, text):
    a, b = save(tmp_path / "a"), save(tmp_path / "b", seed=1)
    measured = evaluate(a, text, reference=b, sequence_length=24, batch_size=3, device="cpu", progress=False)

    tokenizer, models = character_tokenizer(), [tiny_llama(0).double(), tiny_llama(1).double()]
    losses, other_losses, kls, agreements = [], [], [], []
    for document in DOCUMENTS:
        ids = torch.tensor([tokenizer(document)["input_ids"][:24]])
        with torch.no_grad():
            p, q = (model(input_ids=ids).logits[0, :-1].log_softmax(-1) for model in models)
        for t, target in enumerate(ids[0, 1:]):
            losses.append(-p[t, target])
            other_losses.append(-q[t, target])
            kls.append((q[t].exp() * (q[t] - p[t])).sum())
            agreements.append(p[t].argmax() == q[t].argmax())
    mean = [float(torch.stack(values).double().mean()) for values in (losses, other_losses, kls, agreements)]

    assert measured.tokens == len(losses)
    assert measured.cross_entropy == pytest.approx(mean[0], abs=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(mean[0]), rel=1e-5)
    assert measured.reference.cross_entropy == pytest.approx(mean[1], abs=1e-5)
    assert measured.kl == pytest.approx(mean[2], abs=1e-5)
    assert measured.top1_agreement == pytest.approx(mean[3])
    assert measured.decode_tokens_per_second > 0


def test_json_has_the_promised_keys(tmp_path, text):
    a = save(tmp_path / "a")
    alone = evaluate(a, text, sequence_length=16, device="cpu", progress=False).to_json()
    assert list(alone) == [
        "tokens",
        "cross_entropy",
        "perplexity",
        "kl",
        "top1_agreement",
        "kv_bytes_per_token",
        "reference",
        "decode_tokens_per_second",
    ]
    assert alone["kl"] is alone["top1_agreement"] is alone["reference"] is None
    both = evaluate(a, text, reference=a, sequence_length=16, device="cpu", progress=False).to_json()
    assert list(both["reference"]) == ["cross_entropy", "perplexity", "kv_bytes_per_token"]
    assert both["kl"] == pytest.approx(0, abs=1e-9) and both["top1_agreement"] == 1
    json.dumps(both)


def test_batches_and_limit_do_not_change_the_figures(tmp_path, text):
    a = save(tmp_path / "a")
    figures = [
        evaluate(a, text, sequence_length=20, batch_size=size, device="cpu", progress=False).cross_entropy
        for size in (1, 4)
    ]
    assert figures[0] == pytest.approx(figures[1], abs=1e-6)
    assert evaluate(a, text, sequence_length=20, limit=2, device="cpu", progress=False).tokens == 19 + 5


def test_results_stay_off_stdout(tmp_path, text, capsys):
    evaluate(save(tmp_path / "a"), text, device="cpu", sequence_length=8)
    captured = capsys.readouterr()
    assert captured.out == "" and "evaluating" in captured.err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cache_bytes_are_those_of_the_tensors(dtype):
    model = tiny_llama().to(dtype)
    # keys and values of 2 layers × 2 heads × 4
    assert measure_cache_bytes(model) == 2 * 2 * 2 * 4 * dtype.itemsize
    assert measure_cache_bytes(model, torch.ones(3, 5, dtype=torch.int64)) == 2 * 2 * 2 * 4 * dtype.itemsize


def test_cache_bytes_see_everything_a_layer_holds():
    class Layer:
        def __init__(self):
            storage = torch.zeros(2, 8)
            self.keys, self.values = storage[:, :4], storage[:, 4:]  # one storage of 64 bytes
            self.scalars = {"norm": [torch.zeros(2, 3)]}  # 24 bytes
            self.length = torch.tensor(3)  # a counter

    class Cache:
        def __init__(self):
            self.layers = [Layer(), Layer()]
            self.owner = self

    assert cache_bytes(Cache()) == 2 * (64 + 24)


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


def test_wrong_requests(tmp_path, text):
    a = save(tmp_path / "a")
    with pytest.raises(RequestError, match=r"vocabulary of 30 .*40"):
        evaluate(a, text, reference=save(tmp_path / "b", vocab_size=40), device="cpu", progress=False)
    with pytest.raises(RequestError, match="context of 32"):
        evaluate(a, text, sequence_length=64, device="cpu", progress=False)
    with pytest.raises(RequestError, match="--contexts 64 cannot be measured"):
        evaluate(a, text, sequence_length=8, contexts="4,64", device="cpu", progress=False)
    with pytest.raises(RequestError, match="--batches 2 measures nothing"):
        evaluate(a, text, sequence_length=8, batches="2", device="cpu", progress=False)
    with pytest.raises(RequestError, match="--limit"):
        evaluate(a, text, limit=0, device="cpu", progress=False)
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(RequestError, match="has 4 tokens"):
        evaluate(a, tmp_path / "short.txt", device="cpu", progress=False)
    with pytest.raises(RequestError, match="the model has 10"):
        evaluate(save(tmp_path / "c", vocab_size=10), text, sequence_length=8, device="cpu", progress=False)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "models/babyllama105").is_dir(), reason="shared/models/babyllama105 is not there")
def test_loss_of_a_real_checkpoint():
    measured = evaluate(
        SHARED / "models/babyllama105", SHARED / "text/tinystories_valid.jsonl", device="cpu", limit=300, progress=False
    )
    assert measured.tokens == 76455  # one of the 300 stories is shorter
    assert measured.cross_entropy == pytest.approx(0.5211, abs=1e-3)
    assert measured.kv_bytes_per_token == 5 * 2 * 4 * 16 * 4
