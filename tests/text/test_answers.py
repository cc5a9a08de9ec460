"""Answers of conversations: marked by the template, or told by what a conversation has more than the one before."""

import json

import pytest
from letters import character_tokenizer, ids_of

from mea_compress.errors import RequestError
from mea_compress.text.answers import answer_ids, answer_sequences
from mea_compress.text.documents import Chat
from mea_compress.text.reading import read_documents
from mea_compress.text.sequences import token_sequences

PLAIN = (
    "{% for m in messages %}{{ '<s>' + m['role'][0] + ' ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>a ' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<s>' + m['role'][0] + ' ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] + '</s>' }}{% endif %}"
    "{% endfor %}"
)
# Opens a turn with a thought, and leaves the thoughts of answers before the last out.
THINKING = (
    "{% for m in messages %}{{ '<s>' + m['role'][0] + ' ' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ 'thought' }}{% endif %}{{ m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>a th' }}{% endif %}"
)
BACKWARDS = "{% for m in messages[::-1] %}{{ m['content'] }}{% endfor %}"
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "so"},
    {"role": "assistant", "content": "no"},
]


def tokenizer_with(template):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def answers_of(template, messages=TALK):
    tokenizer = tokenizer_with(template)
    ids, answers = answer_ids(Chat(messages, None, "line 1"), tokenizer)
    assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    text = ""
    for id, answer in zip(ids, answers, strict=True):
        text += tokenizer.decode([id]) if answer else "|"
    return [part for part in text.split("|") if part]


def test_both_ways_find_the_answers_and_the_ends_of_their_turns():
    assert answers_of(PLAIN) == answers_of(MARKED) == ["yes</s>", "no</s>"]


def test_an_answer_that_is_written_otherwise_later_is_none():
    assert answers_of(THINKING) == ["oughtno</s>"]


def test_what_the_model_says_first_answers_nothing():
    assert answers_of(PLAIN, TALK[1:]) == ["no</s>"]


def test_a_template_in_which_answers_cannot_be_told_is_refused():
    with pytest.raises(RequestError, match=r"line 1 .*mark them .*or leave `answers_only` out") as refusal:
        answers_of(BACKWARDS)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_sequences_are_those_without_masks(template, tmp_path):
    tokenizer = tokenizer_with(template)
    lines = [{"messages": TALK}, {"messages": TALK[:2]}, {"messages": [*TALK, *TALK]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    documents = read_documents(tmp_path / "a.jsonl")
    ids, answers = answer_sequences(documents, tokenizer, 12)
    assert ids.tolist() == token_sequences(documents, tokenizer, 12).tolist()
    # <s>u hi</s><s>a y|es</s>: each line fills a row with its beginning, but the second, which is short.
    assert ids[0].tolist() == [1, *ids_of("u hi"), 2, 1, *ids_of("a yes")][:12]
    assert [[index for index, answer in enumerate(row) if answer] for row in answers.tolist()] == [[9, 10, 11]] * len(
        ids
    )


def test_rows_without_an_answer_are_left_out_and_refused_where_there_is_no_other(tmp_path):
    tokenizer = tokenizer_with(PLAIN)
    long = [{"role": "user", "content": "so " * 9}, TALK[1]]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in (long, TALK, long, TALK)))
    documents = read_documents(tmp_path / "a.jsonl")
    ids, answers = answer_sequences(documents, tokenizer, 16)
    assert len(ids) == 2 and bool(answers.any(1).all()) and not answers[:, 0].any()
    assert len(token_sequences(documents, tokenizer, 16)) == 4
    with pytest.raises(RequestError, match=r"no sequence of 8 tokens .*`answers_only` out"):
        answer_sequences(documents, tokenizer, 8)


def test_text_without_messages_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("abc " * 20)
    with pytest.raises(RequestError, match=r"a\.txt has text without messages.*`answers_only` out") as refusal:
        answer_sequences(read_documents(tmp_path / "a.txt"), tokenizer_with(PLAIN), 8)
    assert "\n" not in str(refusal.value)
