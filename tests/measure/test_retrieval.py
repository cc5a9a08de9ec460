"""Retrieval: what is hidden lies where it should, and a model finds it exactly where greedy decoding says it."""

import re

import pytest
import torch
from letters import character_tokenizer
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mea_compress.errors import RequestError
from mea_compress.loading import context_length
from mea_compress.measure.evaluation import evaluate
from mea_compress.measure.retrieval import (
    DEPTHS,
    RetrievalScore,
    check_lengths,
    measure_retrieval,
    retrieval_prompts,
)

DOCUMENTS = ["Once upon a time there was a miller. " * 30]


@pytest.fixture(scope="module")
def tokenizer():
    """Single characters of all that is written, two digits or a word as one token."""
    pieces = [chr(code) for code in range(32, 127)] + ["\n"] + [f"{i:02}" for i in range(100)] + ["magic", "number"]
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1} | {piece: 2 + i for i, piece in enumerate(pieces)}, "<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"\d\d|magic|number|.|\n"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1500, **sizes, initializer_range=0.3)
    return LlamaForCausalLM(config).eval()


def filler_of(tokenizer):
    """Ids of a text."""
    return tokenizer("\n".join(DOCUMENTS), add_special_tokens=False)["input_ids"]


def text_of(tokenizer, ids):
    vocabulary = {number: piece for piece, number in tokenizer.get_vocab().items()}
    return "".join(vocabulary[int(number)] for number in ids)


def test_the_number_lies_at_its_depth_and_the_question_asks_for_it(tokenizer):
    prompts = retrieval_prompts(filler_of(tokenizer), tokenizer, [1], [1200, 1000], prompts=2)
    assert len(prompts) == 2 * 2 * 2 * len(DEPTHS)
    assert len({prompt.ids.numpy().tobytes() for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        assert len(prompt.ids) == prompt.length in (1200, 1000) and prompt.ids[0] == 1
        text = text_of(tokenizer, prompt.ids)
        key, answer = re.search(r"magic number for (\w+) mentioned in the provided text is (\d{7})$", text).groups()
        assert text_of(tokenizer, prompt.ids[-prompt.answer_tokens :]).strip() == answer
        hidden = re.findall(r"special magic numbers for (\w+) is: (\d{7})\.", text)
        assert (key, answer) in hidden
        assert len(hidden) == len(dict(hidden)) == {"passkey": 1, "lookup": 8}[prompt.task]
        assert len({value for _, value in hidden}) == len(hidden)
        needle = re.compile(r"\nOne of the special magic numbers for \w+ is: \d{7}\.\n")
        filler = needle.sub("", text[: text.index("\nWhat is")]).split("afterwards.\n")[1]
        before = needle.sub("", text[: text.index(f"\nOne of the special magic numbers for {key} ")])
        before = before.split("afterwards.\n")[1]
        assert len(before) == pytest.approx(prompt.depth * len(filler), abs=1)
        assert filler in DOCUMENTS[0] * 2


def test_seeds(tokenizer):
    def ids(seed):
        return torch.stack(
            [p.ids for p in retrieval_prompts(filler_of(tokenizer), tokenizer, [], [900], prompts=1, seed=seed)]
        )

    assert torch.equal(ids(0), ids(0)) and not torch.equal(ids(0), ids(1))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_exact_matches_are_those_of_greedy_decoding(tokenizer, model, batch_size):
    """Answers that the model gives by itself in place of some: found, and not found where one token is another."""
    prompts = retrieval_prompts(filler_of(tokenizer), tokenizer, [1], [900], prompts=3)
    expected = {}
    for index, prompt in enumerate(prompts):
        question, width = prompt.ids[: -prompt.answer_tokens], prompt.answer_tokens
        said = model.generate(
            question[None],
            attention_mask=torch.ones(1, len(question), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=width,
            eos_token_id=None,
            pad_token_id=0,
        )[0, -width:]
        if index % 3:
            prompt.ids[-width:] = said
        if index % 3 == 2:
            prompt.ids[-width + index % width] += 1
        exact = bool((prompt.ids[-width:] == said).all())
        expected.setdefault((prompt.task, 900, prompt.depth), []).append(exact)
    scores = measure_retrieval(model, prompts, batch_size=batch_size, progress=False)
    assert scores == tuple(RetrievalScore(*place, 3, sum(e) / 3) for place, e in expected.items())
    assert {score.exact_match for score in scores} == {1 / 3}


def test_wrong_requests(tokenizer, model):
    with pytest.raises(RequestError, match=r"`retrieval` 64 has no room .*: give \d+ tokens or more") as refusal:
        retrieval_prompts(filler_of(tokenizer), tokenizer, [], [64])
    needed = int(re.search(r"give (\d+)", str(refusal.value))[1])
    with pytest.raises(RequestError, match="cannot write"):
        retrieval_prompts([3], character_tokenizer(), [], [4000])
    check_lengths(context_length(model), [1500])
    check_lengths(None, [1501])
    with pytest.raises(RequestError, match="`retrieval` 1501 is longer than the model's context of 1500"):
        check_lengths(context_length(model), [4, 1501])
    assert needed > 64


def test_checkpoint_and_reference_through_evaluate(tokenizer, model, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    settings = {"text": tmp_path / "text.txt", "sequence_length": 100, "device": "cpu", "progress": False}
    measured = evaluate(tmp_path / "a", reference=tmp_path / "b", retrieval=[900], limit=1, **settings)
    places = [(score.task, score.length, score.depth, score.prompts) for score in measured.retrieval]
    assert places == [(task, 900, depth, 1) for task in ("passkey", "lookup") for depth in DEPTHS]
    assert measured.reference.retrieval == measured.retrieval
    text = measured.report()
    assert text.count("| passkey") == text.count("| lookup") == 2 and "at 25 %" in text
    measured.draw_retrieval(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    both = evaluate([tmp_path / "a", tmp_path / "b"], retrieval=[900], limit=1, **settings)
    both.draw_retrieval(tmp_path / "maps.svg")
    drawn = (tmp_path / "maps.svg").read_text()
    assert all(f"{task}: {name} -->" in drawn for task in ("passkey", "lookup") for name in ("a", "b"))
    with pytest.raises(RequestError, match="`plot` draws what `retrieval` finds"):
        evaluate(tmp_path / "a", limit=1, **settings).draw_retrieval(tmp_path / "map.png")
    with pytest.raises(RequestError, match="longer than the model's context of 1500"):
        evaluate(tmp_path / "a", retrieval=[2000], **settings)
