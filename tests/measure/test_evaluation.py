import inspect
import json
import math
from pathlib import Path

import pytest
import torch
from letters import character_tokenizer, tiny_llama

from mea_compress.errors import RequestError
from mea_compress.measure import evaluation
from mea_compress.measure.evaluation import Measuring, evaluate

SHARED = Path(__file__).resolve().parents[3] / "shared"
DOCUMENTS = ["the quick brown fox jumps over the lazy dog", "a b c", "hello world again and again", "x"]


def save(directory: Path, seed: int = 0, **changes) -> Path:
    tiny_llama(seed, **changes).save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    return tmp_path / "text.jsonl"


def test_type_checkers_know_every_setting():
    parameters = inspect.signature(evaluate).parameters
    settings = {name: parameter.annotation for name, parameter in parameters.items() if name != "checkpoint"}
    assert settings == {name: hint.__forward_arg__ for name, hint in Measuring.__annotations__.items()}


def test_figures_against_one_sequence_at_a_time(tmp_path, text):
    a, b = save(tmp_path / "a"), save(tmp_path / "b", seed=1)
    measured = evaluate(a, text=text, reference=b, sequence_length=24, batch_size=3, device="cpu", progress=False)

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
    alone = evaluate(a, text=text, sequence_length=16, device="cpu", progress=False).to_json()
    assert list(alone) == [
        "tokens",
        "cross_entropy",
        "perplexity",
        "kl",
        "top1_agreement",
        "kv_bytes_per_token",
        "reference",
        "decode_tokens_per_second",
        "prefix_ids",
    ]
    assert alone["kl"] is alone["top1_agreement"] is alone["reference"] is None
    both = evaluate(a, text=text, reference=a, sequence_length=16, device="cpu", progress=False).to_json()
    assert list(both["reference"]) == ["cross_entropy", "perplexity", "kv_bytes_per_token"]
    assert both["kl"] == pytest.approx(0, abs=1e-9) and both["top1_agreement"] == 1
    json.dumps(both)


def test_batches_and_limit_do_not_change_the_figures(tmp_path, text):
    a = save(tmp_path / "a")
    figures = [
        evaluate(a, text=text, sequence_length=20, batch_size=size, device="cpu", progress=False).cross_entropy
        for size in (1, 4)
    ]
    assert figures[0] == pytest.approx(figures[1], abs=1e-6)
    assert evaluate(a, text=text, sequence_length=20, limit=2, device="cpu", progress=False).tokens == 19 + 5


def test_what_stands_in_front_is_said_and_counted(tmp_path, text):
    a = save(tmp_path / "a")
    settings = {"text": text, "sequence_length": 24, "device": "cpu", "progress": False}
    auto, never = evaluate(a, **settings), evaluate(a, bos="never", **settings)
    assert (list(auto.prefix_ids), list(never.prefix_ids)) == ([1], [])
    # Of the two documents that fill no sequence the first letter is predicted from BOS alone.
    assert auto.tokens - never.tokens == 2
    assert [report.splitlines()[-1].split()[-2] for report in (auto.report(), never.report())] == ["1", "–"]


def test_several_texts_are_measured_together(tmp_path, text):
    a = save(tmp_path / "a")
    (tmp_path / "b.txt").write_text("lorem ipsum dolor sit amet " * 3)
    settings = {"sequence_length": 24, "device": "cpu", "progress": False}
    one, other = (evaluate(a, text=name, **settings) for name in (text, tmp_path / "b.txt"))
    both = evaluate(a, text=[text, tmp_path / "b.txt"], **settings)
    assert both.tokens == one.tokens + other.tokens
    total = one.cross_entropy * one.tokens + other.cross_entropy * other.tokens
    assert both.cross_entropy == pytest.approx(total / both.tokens, abs=1e-5)


def test_speed_is_there_where_it_was_asked_for(tmp_path, text):
    a, b = save(tmp_path / "a"), save(tmp_path / "b", seed=1)
    measured = evaluate(
        a, text=text, reference=b, sequence_length=8, contexts=[8, 16], batches=[1, 2], device="cpu", progress=False
    )
    places = [(line["model"], line["context"], line["batch"]) for line in measured.to_json()["speed"]]
    assert places == [(m, c, n) for c in (8, 16) for n in (1, 2) for m in ("checkpoint", "reference")]


def test_several_checkpoints_are_measured_as_each_alone_and_the_reference_runs_once(tmp_path, text, monkeypatch):
    paths = [save(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 1), ("source", 2))]
    settings = {"text": text, "reference": paths[2], "sequence_length": 20, "batch_size": 2, "device": "cpu"}
    alone = [evaluate(path, **settings, progress=False).to_json() for path in paths[:2]]
    passes = []
    predict = evaluation.predict
    monkeypatch.setattr(evaluation, "predict", lambda model, *rows: passes.append(model) or predict(model, *rows))
    both = evaluate(paths[:2], **settings, progress=False)
    assert [passes.count(model) for model in dict.fromkeys(passes)] == [2, 2, 2]  # two batches of each model
    assert list(both.checkpoints) == [str(path) for path in paths[:2]]
    for name, expected in zip(both.checkpoints, alone, strict=True):
        measured = both.to_json()["checkpoints"][name]
        measured.pop("decode_tokens_per_second"), expected.pop("decode_tokens_per_second")
        assert measured == expected
    assert [cell.strip() for cell in both.report().splitlines()[0].split("|")[2:-1]] == ["a", "b", "reference"]
    again = evaluate((paths[2],), **settings, progress=False)
    assert again.checkpoints[str(paths[2])].kl == 0
    with pytest.raises(RequestError, match="is given twice"):
        evaluate([paths[0], paths[0]], text=text, device="cpu")
    with pytest.raises(RequestError, match="no checkpoint"):
        evaluate([], text=text, device="cpu")


def test_agreement_of_checkpoint_and_reference(tmp_path, text):
    a, b = save(tmp_path / "a"), save(tmp_path / "b", seed=1)
    settings = {"text": text, "sequence_length": 16, "device": "cpu", "progress": False}
    same = evaluate(a, reference=a, agreement=5, **settings)
    assert same.agreement.never_differs == 1 and same.agreement.mean == 5
    assert (same.agreement.prompts, same.agreement.prompt_tokens) == (2, 8)  # two documents have eight tokens
    other = evaluate(a, reference=b, agreement=5, **settings)
    assert other.agreement.mean < 5
    assert "never differs" in other.report() and list(other.to_json())[-1] == "agreement"
    json.dumps(other.to_json())


def test_results_stay_off_stdout(tmp_path, text, capsys):
    evaluate(save(tmp_path / "a"), text=text, device="cpu", sequence_length=8)
    captured = capsys.readouterr()
    assert captured.out == "" and "evaluating" in captured.err


@pytest.mark.parametrize(
    ("capabilities", "dtype", "warns"), [({}, None, True), ({"avx512_bf16": True}, None, False), ({}, "float32", False)]
)
def test_where_bfloat16_is_imitated_it_is_said(capabilities, dtype, warns, tmp_path, text, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "a")
    character_tokenizer().save_pretrained(tmp_path / "a")
    evaluate(tmp_path / "a", text=text, device="cpu", sequence_length=8, dtype=dtype, progress=False)
    assert ("dtype float32" in capsys.readouterr().err) == warns


def test_wrong_requests(tmp_path, text):
    a = save(tmp_path / "a")
    with pytest.raises(RequestError, match=r"vocabulary of 30 .*40"):
        evaluate(a, text=text, reference=save(tmp_path / "b", vocab_size=40), device="cpu", progress=False)
    with pytest.raises(RequestError, match="context of 32"):
        evaluate(a, text=text, sequence_length=64, device="cpu", progress=False)
    with pytest.raises(RequestError, match="`contexts` 64 cannot be measured"):
        evaluate(a, text=text, sequence_length=8, contexts=[4, 64], device="cpu", progress=False)
    with pytest.raises(RequestError, match="`batches` 2,4 measures nothing without `contexts`"):
        evaluate(a, text=text, sequence_length=8, batches=(2, 4), device="cpu", progress=False)
    with pytest.raises(RequestError, match="`batches` 0 measures nothing"):
        evaluate(a, text=text, sequence_length=8, contexts=(4,), batches=(0,), device="cpu", progress=False)
    with pytest.raises(RequestError, match="`batch_size` 0 measures nothing"):
        evaluate(a, text=text, batch_size=0, device="cpu", progress=False)
    for name, value in (("retrieval", [64]), ("agreement", 3), ("contexts", [4])):
        with pytest.raises(RequestError, match=f"`{name}` measures nothing without `text`"):
            evaluate(a, reference=a, tasks=["piqa"], **{name: value}, device="cpu", progress=False)
    for name, value in (("task_dir", tmp_path), ("few_shot", 0), ("chat_template", True)):
        with pytest.raises(RequestError, match=f"`{name}` measures nothing without `tasks`"):
            evaluate(a, text=text, **{name: value}, device="cpu", progress=False)
    with pytest.raises(RequestError, match="give `text`, or `tasks`"):
        evaluate(a, device="cpu", progress=False)
    with pytest.raises(RequestError, match="give `reference` too"):
        evaluate(a, text=text, agreement=4, device="cpu", progress=False)
    with pytest.raises(RequestError, match="`agreement` 32 leaves no room"):
        evaluate(a, text=text, reference=a, agreement=32, sequence_length=8, device="cpu", progress=False)
    with pytest.raises(RequestError, match="cannot write"):  # letters know no digits
        evaluate(a, text=text, sequence_length=8, retrieval=[30], device="cpu", progress=False)
    with pytest.raises(RequestError, match="`limit` 0 measures nothing"):
        evaluate(a, text=text, limit=0, device="cpu", progress=False)
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(RequestError, match="has 4 tokens"):
        evaluate(a, text=tmp_path / "short.txt", device="cpu", progress=False)
    with pytest.raises(RequestError, match="the model has 10"):
        evaluate(save(tmp_path / "c", vocab_size=10), text=text, sequence_length=8, device="cpu", progress=False)


def test_what_cannot_be_measured_is_said_before_the_text_has_run(tmp_path, text, monkeypatch):
    a = save(tmp_path / "a")
    for name in ("predict", "measure_cache_bytes"):
        monkeypatch.setattr(evaluation, name, lambda *_: pytest.fail("the models have run"))
    settings = {"text": text, "sequence_length": 8, "device": "cpu", "progress": False}
    with pytest.raises(RequestError, match="`agreement` 32 leaves no room"):
        evaluate(a, reference=a, agreement=32, **settings)
    with pytest.raises(RequestError, match="cannot write"):
        evaluate(a, retrieval=[30], **settings)


def test_a_model_without_a_cache_is_refused_before_the_text_has_run(tmp_path, text, monkeypatch):
    monkeypatch.setattr("mea_compress.measure.cache.run_cached", lambda *_: (None, None))
    monkeypatch.setattr(evaluation, "predict", lambda *_: pytest.fail("the text has run"))
    with pytest.raises(RequestError, match="keeps no KV cache"):
        evaluate(save(tmp_path / "a"), text=text, sequence_length=8, device="cpu", progress=False)


def test_a_tokenizer_that_does_not_do_is_refused_before_models_are_loaded(tmp_path, text, monkeypatch):
    a = save(tmp_path / "a")
    tiny_llama().save_pretrained(tmp_path / "bare")
    for name in ("load_model", "find_tasks"):
        monkeypatch.setattr(evaluation, name, lambda *_: pytest.fail("a model or a task was loaded"))
    with pytest.raises(RequestError, match=r"the tokenizer of .*bare cannot be loaded"):
        evaluate(tmp_path / "bare", text=text, device="cpu", progress=False)
    with pytest.raises(RequestError, match="no chat template: leave `chat_template` out"):
        evaluate(a, tasks=["piqa"], chat_template=True, device="cpu", progress=False)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "models/babyllama105").is_dir(), reason="shared/models/babyllama105 is not there")
def test_loss_of_a_real_checkpoint():
    measured = evaluate(
        SHARED / "models/babyllama105",
        text=SHARED / "text/tinystories_valid.jsonl",
        device="cpu",
        limit=300,
        progress=False,
    )
    assert measured.tokens == 76455  # one of the 300 stories is shorter
    assert measured.cross_entropy == pytest.approx(0.5211, abs=1e-3)
    assert measured.kv_bytes_per_token == 5 * 2 * 4 * 16 * 4
