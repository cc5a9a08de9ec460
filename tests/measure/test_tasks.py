"""Tasks of lm-evaluation-harness with files made on the spot, held against log-likelihoods in float64."""

import json
import sys

import pytest
import torch
import yaml
from letters import character_tokenizer, tiny_llama

from mea_compress.errors import RequestError
from mea_compress.measure.evaluation import evaluate
from mea_compress.measure.tasks import find_tasks, measure_tasks

EXAMPLES = [
    {"query": "the fox", "choices": [" runs", " sits", " eats"], "gold": 0},
    {"query": "a dog", "choices": [" barks", " walks"], "gold": 1},
    {"query": "hello", "choices": [" world", " there", " again"], "gold": 2},
    {"query": "one", "choices": [" two", " ten"], "gold": 0},
    {"query": "again", "choices": [" and", " but"], "gold": 1},
    {"query": "the sun", "choices": [" is a star", " sets"], "gold": 0},
]


@pytest.fixture
def task_dir(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness (the extra eval) is not installed")
    directory = tmp_path / "tasks"
    directory.mkdir()
    (directory / "examples.jsonl").write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    task = {
        "task": "letters_choice",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(directory / "examples.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (directory / "letters.yaml").write_text(yaml.safe_dump(task))
    missing = {"task": "letters_missing", "dataset_kwargs": {"data_files": str(tmp_path / "no.jsonl")}}
    (directory / "missing.yaml").write_text(yaml.safe_dump(task | missing))
    return directory


def save(directory, seed=0, dtype=torch.float32, **changes):
    tiny_llama(seed, max_position_embeddings=128, **changes).to(dtype).save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return directory


def accuracy(seed, examples=EXAMPLES):
    model, tokenizer = tiny_llama(seed, max_position_embeddings=128).double(), character_tokenizer()
    right = []
    for example in examples:
        likelihoods = []
        for choice in example["choices"]:
            context, whole = (tokenizer(text)["input_ids"] for text in (example["query"], example["query"] + choice))
            with torch.no_grad():
                log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            likelihoods.append(sum(float(log_p[t - 1, whole[t]]) for t in range(len(context), len(whole))))
        right.append(likelihoods.index(max(likelihoods)) == example["gold"])
    return sum(right) / len(right)


@pytest.mark.slow
def test_scores_of_checkpoint_and_reference(tmp_path, task_dir):
    seeds = (0, 1)
    assert accuracy(seeds[0]) != accuracy(seeds[1])
    a, b = save(tmp_path / "a", seeds[0]), save(tmp_path / "b", seeds[1])
    settings = {"tasks": ["letters_choice"], "task_dir": task_dir, "device": "cpu", "progress": False}
    measured = evaluate(a, reference=b, **settings)
    for scores, seed in ((measured.tasks, seeds[0]), (measured.reference.tasks, seeds[1])):
        (score,) = scores
        share = accuracy(seed)
        assert (score.task, score.metric, score.examples, score.few_shot) == ("letters_choice", "acc", 6, 0)
        assert score.value == pytest.approx(share)
        assert score.standard_error == pytest.approx((share * (1 - share) / 5) ** 0.5)
    assert measured.tokens is measured.cross_entropy is measured.kl is measured.reference.cross_entropy is None
    assert measured.kv_bytes_per_token == 2 * 2 * 2 * 4 * 4
    text = measured.report()
    assert "letters_choice" in text and "±" in text and "cross-entropy" not in text
    json.dumps(measured.to_json())

    few = evaluate(a, limit=2, few_shot=1, batch_size=1, **settings).tasks[0]
    assert (few.examples, few.few_shot) == (2, 1)
    assert evaluate(a, limit=2, **settings).tasks[0].value == pytest.approx(accuracy(seeds[0], EXAMPLES[:2]))


@pytest.mark.slow
def test_chat_templates_surround_prompts_and_the_process_stays_as_it_was(tmp_path, task_dir):
    model, tokenizer = tiny_llama(0, max_position_embeddings=128), character_tokenizer()
    manager = find_tasks(["letters_choice"], task_dir)
    with pytest.raises(RequestError, match="no chat template"):
        measure_tasks(model, tokenizer, ["letters_choice"], manager, chat_template=True)
    tokenizer.chat_template = "{% for m in messages %}asked {{ m['content'] }} {% endfor %}answered"
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    state = torch.random.get_rng_state()
    measure_tasks(model, tokenizer, ["letters_choice"], manager, limit=1, batch_size=1, chat_template=True)
    letters = {number: letter for letter, number in tokenizer.get_vocab().items()}
    texts = ["".join(letters[int(number)] for number in ids[0]) for ids in seen]
    assert any(text.startswith("<s>asked the fox answered") for text in texts), texts
    assert torch.equal(state, torch.random.get_rng_state()) and tokenizer.pad_token is None


def test_wrong_requests(tmp_path, task_dir):
    with pytest.raises(RequestError, match=r"`task_dir` .* is not a directory"):
        find_tasks(["letters_choice"], tmp_path / "nowhere")
    with pytest.raises(RequestError, match=r"letters_missing cannot be loaded .*`task_dir`"):
        find_tasks(["letters_missing"], task_dir)


@pytest.mark.slow
def test_an_unknown_task(task_dir):
    with pytest.raises(RequestError, match=r"`tasks` letters_choise is no task .*did you mean letters_choice"):
        find_tasks(["letters_choise"], task_dir)


def test_the_harness_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(RequestError, match=r"`tasks` needs lm-evaluation-harness.*pip install 'mea-compress\[eval\]'"):
        find_tasks(["arc_easy"])
