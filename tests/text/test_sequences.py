"""Sequences against the tokenizer's ids of whole texts, and what is taken of texts that have more than is wanted."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from letters import character_tokenizer, ids_of
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mea_compress.errors import RequestError
from mea_compress.loading import load_tokenizer
from mea_compress.text.documents import PIECE
from mea_compress.text.reading import read_documents
from mea_compress.text.sequences import padded_sequences, sequence_prefix, token_sequences

SHARED = Path(__file__).resolve().parents[3] / "shared"
WORDS = ["the", "quick", "brown", "fox", "", "jumps", "12", "dogs,", "naïve", "日本", "people's\n\n", "", "\n\t{x}\n"]
CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ' ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if tools %}{{ tools | length }}{% endif %}"
)


def random_text(count, seed=0):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def with_template(template, bos=True):
    """The letters' tokenizer, writing special tokens where a template has them: `<s> $A </s>`."""
    tokenizer = character_tokenizer(bos)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2), ("<unk>", 0)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "auto", "always"),
    [
        (with_template("<s> $A"), (1,), (1,)),
        (with_template("<s> $A </s>"), (1,), (1,)),
        (with_template("$A </s>"), (), (1,)),
        (with_template("</s> <s> $A"), (2, 1), (2, 1)),
        (with_template("$A"), (), (1,)),
        (with_template("</s> $A", bos=False), (2,), (2,)),
    ],
    ids=["bos", "bos-eos", "eos", "two", "none", "eos-in-front"],
)
def test_in_front_stands_what_the_tokenizer_writes_there(tokenizer, auto, always):
    assert sequence_prefix(tokenizer) == auto
    assert sequence_prefix(tokenizer, "always") == always
    assert sequence_prefix(tokenizer, "never") == ()
    for bos, front in (("auto", auto), ("always", always), ("never", ())):
        rows = token_sequences(["abcdefgh"], tokenizer, len(front) + 3, bos=bos)
        assert rows.tolist() == [[*front, *ids_of("abc")], [*front, *ids_of("def")]]
        ids, _ = padded_sequences(["ab", "abcdefgh"], tokenizer, len(front) + 3, bos=bos)
        assert ids.tolist()[1] == [*front, *ids_of("abc")]


def test_no_bos_to_put_in_front():
    with pytest.raises(RequestError, match=r"no bos_token.*`bos`"):
        sequence_prefix(character_tokenizer(bos=False), "always")
    with pytest.raises(RequestError, match="`bos` maybe is unknown"):
        sequence_prefix(character_tokenizer(), "maybe")
    with pytest.raises(RequestError, match="no room behind the 2 tokens"):
        token_sequences(["abc"], with_template("</s> <s> $A"), 2)


def test_a_prefix_that_the_text_writes_itself_is_not_doubled():
    tokenizer = with_template("</s> <s> $A")
    assert token_sequences(["</s><s>abcd", "xyzw"], tokenizer, 6)[:, :2].tolist() == [[2, 1], [2, 1]]
    rows = token_sequences(["<s>abc"], with_template("$A"), 4)  # it is the text's own here
    assert rows.tolist() == [[1, *ids_of("abc")]]
    assert token_sequences(["<s>abc"], with_template("$A"), 4, bos="always").tolist() == rows.tolist()


def test_conversations_are_written_by_the_chat_template(tmp_path):
    messages = [{"role": "u", "content": "hi"}, {"role": "a", "content": "yes"}]
    lines = [{"messages": messages}, {"messages": messages, "tools": [{}, {}]}, "plain text"]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    documents, tokenizer = read_documents(tmp_path / "a.jsonl"), character_tokenizer()
    with pytest.raises(RequestError, match=r"line 1 of .*a\.jsonl has messages.* no chat template"):
        padded_sequences(documents, tokenizer, 12)
    tokenizer.chat_template = CHATML
    ids, mask = padded_sequences(documents, tokenizer, 32)
    expected = [1, *ids_of("u hi"), 2, 1, *ids_of("a yes"), 2]  # its own BOS is not doubled
    assert ids[0][mask[0]].tolist() == expected
    assert ids[1][mask[1]].tolist() == [*expected, 0]  # two tools: a digit is no letter
    tokenizer.chat_template = "{{ raise_exception('only tools here') }}"
    with pytest.raises(RequestError, match=r"refuses line 1 of .*only tools here.*correct its messages"):
        padded_sequences(documents, tokenizer, 12)


def test_one_document_is_read_to_its_end_in_windows():
    rows = token_sequences(["abcdefgh"], character_tokenizer(), 4)
    assert rows.tolist() == [[1, *ids_of("abc")], [1, *ids_of("def")]]
    rows = token_sequences(["abcdefgh"], character_tokenizer(bos=False), 4)
    assert rows.tolist() == [ids_of("abcd"), ids_of("efgh")]


def test_several_documents_give_their_beginnings_and_short_ones_are_joined():
    rows = token_sequences(["abcdefgh", "ab", "<s>xyzw", "cd"], character_tokenizer(), 4)
    assert rows.tolist() == [[1, *ids_of("abc")], [1, *ids_of("xyz")], [1, *ids_of("ab"), 1]]
    assert len(token_sequences(["abcdefgh"] * 9, character_tokenizer(), 4, limit=3)) == 3


def test_files_of_a_directory_are_read_to_their_ends_and_short_ones_joined(tmp_path):
    for name, text in {"a": "abcdefgh", "b": "ab", "c": "xyzwabc", "d": "cd"}.items():
        (tmp_path / name).write_text(text)
    rows = token_sequences(read_documents(tmp_path), character_tokenizer(), 4)
    texts = ["abc", "def", "xyz", "wab"]
    assert rows.tolist() == [[1, *ids_of(text)] for text in texts] + [[1, *ids_of("ab"), 1]]
    ids, mask = padded_sequences(read_documents(tmp_path), character_tokenizer(), 4)
    windows = [row[present].tolist() for row, present in zip(ids, mask, strict=True)]
    assert windows == [[1, *ids_of(text)] for text in ["abc", "def", "gh", "ab", "xyz", "wab", "c", "cd"]]


def test_padded_sequences_keep_documents_apart():
    ids, mask = padded_sequences(["abcdefgh", "ab", ""], character_tokenizer(), 5)
    assert ids.tolist() == [[1, *ids_of("abcd")], [1, *ids_of("ab"), 0, 0]]
    assert mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    ids, mask = padded_sequences(["abcdef"], character_tokenizer(), 5)
    assert ids.tolist() == [[1, *ids_of("abcd")], [1, *ids_of("ef"), 0, 0]]
    assert padded_sequences(["ab"] * 9, character_tokenizer(), 8, limit=2)[0].shape == (2, 3)


@pytest.mark.parametrize("make", [token_sequences, padded_sequences])
def test_text_shorter_than_a_sequence(make):
    with pytest.raises(RequestError, match=r"has 4 tokens.*sequence of 9.*`sequence_length`"):
        make(["abc"], character_tokenizer(), 9)
    with pytest.raises(RequestError, match="nothing to predict"):
        make(["abc"], character_tokenizer(), 1)
    with pytest.raises(RequestError, match="no text"):
        make(["", " "], character_tokenizer(), 9)


def test_a_flood_of_unknown_tokens_is_said(capsys):
    token_sequences(["ab" * 4], character_tokenizer(), 4)
    assert capsys.readouterr().err == ""
    token_sequences(["aÄ" * 4], character_tokenizer(), 4)
    captured = capsys.readouterr()
    assert "unknown" in captured.err and captured.out == ""


def trained(model, trainer, **parts):
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator([random_text(3000, seed=9)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module", params=["bytes", "metaspace", "prepended"])
def subwords(request):
    """Tokenizers as GPT-2's, as T5's, and as Llama 2's, which takes a text for one word and marks its beginning."""
    if request.param == "bytes":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        parts = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False), "decoder": decoders.ByteLevel()}
        return trained(models.BPE(), trainer, **parts)
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False)
    if request.param == "metaspace":
        return trained(models.BPE(), trainer, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first"))
    tokenizer = trained(models.BPE(), trainer, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first"))
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return tokenizer


def test_pieces_have_the_ids_of_the_whole(tmp_path, subwords):
    text = random_text(60_000)
    assert len(text) > 4 * PIECE
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    whole = subwords(text, add_special_tokens=False)["input_ids"]
    ids, mask = padded_sequences(read_documents(tmp_path / "a.txt"), subwords, 512)
    assert ids[mask].tolist() == whole
    assert torch.equal(padded_sequences([text], subwords, 512)[0], ids)
    assert token_sequences([text], subwords, 512).flatten().tolist() == whole[: len(whole) // 512 * 512]
    beginnings = padded_sequences([text, text], subwords, 512)[0]
    assert beginnings.tolist() == [whole[:512]] * 2


def test_measuring_reads_from_the_beginning_in_order(tmp_path, subwords):
    text = random_text(60_000)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    whole = subwords(text, add_special_tokens=False)["input_ids"]
    ids, _ = padded_sequences(read_documents(tmp_path / "a.txt"), subwords, 64, limit=5)
    assert ids.flatten().tolist() == whole[: 5 * 64]


def test_a_text_that_is_used_up_gives_the_same_in_the_same_order(tmp_path):
    text = random_text(2000)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in text.split("\n")))
    for name in ("a.txt", "a.jsonl"):
        documents = read_documents(tmp_path / name)
        everything = token_sequences(documents, character_tokenizer(), 16)
        assert torch.equal(token_sequences(documents, character_tokenizer(), 16, limit=len(everything)), everything)
        assert torch.equal(token_sequences(documents, character_tokenizer(), 16, limit=10**6, seed=5), everything)


@pytest.mark.parametrize("lines", [3_000, 60_000])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_calibration_takes_what_lies_spread_over_a_text(tmp_path, suffix, lines):
    """Each line says in letters where it stands."""
    path = tmp_path / f"a.{suffix}"
    marks = ["".join(chr(97 + int(digit)) for digit in f"{line:05}") + " " + "x" * 30 for line in range(lines)]
    path.write_text("\n".join(marks if suffix == "txt" else [json.dumps(mark) for mark in marks]))

    def places(seed):
        rows = token_sequences(read_documents(path), character_tokenizer(), 64, limit=24, seed=seed)
        assert rows.shape == (24, 64) and (rows[:, 0] == 1).all()
        text = ["".join(chr(94 + token) if 3 <= token < 29 else " " for token in row) for row in rows.tolist()]
        found = [[word for word in row.split() if len(word) == 5 and word < "k"] for row in text]
        return [int("".join(str(ord(letter) - 97) for letter in row[0])) for row in found if row]

    found = places(0)
    assert len(set(found)) == len(found) > 20
    assert max(b - a for a, b in zip(sorted(found), sorted(found)[1:], strict=False)) < lines / 6
    assert min(found) < lines / 6 and max(found) > lines * 5 / 6
    assert found == places(0) and found != places(2)


def test_several_texts_take_turns_by_their_sizes(tmp_path):
    sizes = {"a": 800, "b": 2400, "c": 40}
    for name, size in sizes.items():
        (tmp_path / f"{name}.txt").write_text(name * size)
    documents = read_documents([tmp_path / f"{name}.txt" for name in sizes])
    for rows in (
        token_sequences(documents, character_tokenizer(), 8, limit=33),
        padded_sequences(documents, character_tokenizer(), 8, limit=33)[0],
    ):
        letters = "".join("abc"[row[1] - 3] for row in rows.tolist())
        assert letters[:3] == "abc" and letters.count("b") == 24 and letters.count("a") == 8
        assert letters.count("c") == 1
    assert len(token_sequences(documents, character_tokenizer(), 8)) == 800 // 7 + 2400 // 7 + 40 // 7
    origins: list[int] = []
    rows = token_sequences(documents, character_tokenizer(), 8, limit=33, origins=origins)
    assert origins == (rows[:, 1] - 3).tolist()


MEASURE = """
import resource, sys, tracemalloc
import pyarrow, zstandard  # what importing takes is not counted
from transformers import PreTrainedTokenizerFast
from mea_compress.text.reading import read_documents
from mea_compress.text.sequences import padded_sequences, token_sequences
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
token_sequences(["the quick brown fox " * 9] * 2, tokenizer, 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    assert token_sequences(read_documents(path), tokenizer, 128, limit=4).shape == (4, 128)
    assert padded_sequences(read_documents(path), tokenizer, 128, limit=4)[0].shape == (4, 128)
token_sequences(read_documents(sys.argv[2]), tokenizer, 128, limit=3000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.process
def test_memory_is_bounded_whatever_the_size_of_a_file(tmp_path):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    parts = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False)}
    trained(models.BPE(), trainer, **parts).save_pretrained(tmp_path / "tokenizer")
    text = random_text(10_000)
    units = {"a.txt": text, "b.txt": text.replace("\n", " "), "c.jsonl": json.dumps(text[:3000]) + "\n"}
    for name, unit in units.items():
        with open(tmp_path / name, "w", encoding="utf-8") as file:
            for _ in range(-(-100_000_000 // len(unit.encode()))):
                file.write(unit)
    names = [str(tmp_path / name) for name in units]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "tokenizer"), *names], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150_000  # KiB


@pytest.mark.skipif(not (SHARED / "models/babyllama105").is_dir(), reason="shared/models/babyllama105 is not there")
def test_stories_of_a_real_checkpoint():
    tokenizer = load_tokenizer(SHARED / "models/babyllama105")
    assert sequence_prefix(tokenizer) == (1,)
    documents = read_documents(SHARED / "text/tinystories_valid.jsonl")
    ids, mask = padded_sequences(documents, tokenizer, 256)
    assert ids.shape == (785, 256) and int((mask.sum(1) == 256).sum()) == 784
    assert (ids[:, 0] == 1).all() and not (ids[:, 1:] == 1).any()
    assert torch.equal(token_sequences(documents, tokenizer, 256), ids[mask.all(1)])
