from pathlib import Path

import pytest
import torch
from letters import VOCABULARY, character_tokenizer, ids_of, tiny_llama

from mea_compress.errors import RequestError
from mea_compress.loading import load_tokenizer
from mea_compress.text import padded_sequences, read_documents, sample_sequences, token_sequences

SHARED = Path(__file__).resolve().parents[2] / "shared"


def test_documents_of_both_kinds(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    # A line separator inside a JSON string is no end of line.
    (tmp_path / "b.jsonl").write_text('"one"\n\n{"text": "two\u2028three"}\n', encoding="utf-8")
    assert read_documents(tmp_path / "a.txt") == ["one\ntwo\n"]
    assert read_documents(tmp_path / "b.jsonl") == ["one", "two\u2028three"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "does not exist"),
        ("a.csv", b"x", "neither .txt nor .jsonl"),
        ("a.txt", b"\xff\xfe\xfa", "not UTF-8"),
        ("a.txt", b" \n", "no text"),
        ("a.jsonl", b'"fine"\n{"text": ', "line 2"),
        ("a.jsonl", b'{"body": "x"}', "line 1"),
        ("a.jsonl", b"3", "neither a string"),
    ],
)
def test_documents_refused(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=says) as error:
        read_documents(tmp_path / name)
    assert name in str(error.value)


def test_one_document_is_read_to_its_end_in_windows():
    rows = token_sequences(["abcdefgh"], character_tokenizer(), 4)
    assert rows.tolist() == [[1, *ids_of("abc")], [1, *ids_of("def")]]
    rows = token_sequences(["abcdefgh"], character_tokenizer(bos=False), 4)
    assert rows.tolist() == [ids_of("abcd"), ids_of("efgh")]


def test_several_documents_give_their_beginnings_and_short_ones_are_joined():
    rows = token_sequences(["abcdefgh", "ab", "<s>xyzw", "cd"], character_tokenizer(), 4)
    assert rows.tolist() == [[1, *ids_of("abc")], [1, *ids_of("xyz")], [1, *ids_of("ab"), 1]]
    assert len(token_sequences(["abcdefgh"] * 9, character_tokenizer(), 4, limit=3)) == 3


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


def test_a_flood_of_unknown_tokens_is_said(capsys):
    token_sequences(["ab" * 4], character_tokenizer(), 4)
    assert capsys.readouterr().err == ""
    token_sequences(["aÄ" * 4], character_tokenizer(), 4)
    captured = capsys.readouterr()
    assert "unknown" in captured.err and captured.out == ""


def test_sampling_is_seeded_full_length_and_never_ends():
    model = tiny_llama()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    rows = sample_sequences(model, 1, 5, 20, seed=3, batch_size=2, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert rows.shape == (5, 20) and rows.dtype == torch.int64
    assert (rows[:, 0] == 1).all() and not (rows == 2).any()
    assert torch.equal(rows, sample_sequences(model, 1, 5, 20, seed=3, batch_size=2, progress=False))
    assert not torch.equal(rows, sample_sequences(model, 1, 5, 20, seed=4, batch_size=2, progress=False))


@pytest.mark.parametrize("bos", [1, None])
def test_samples_are_drawn_in_turn_from_one_generator(bos):
    """Written out: whole softmax of each last position, float32, end token taken out."""
    model, generator, rows = tiny_llama(), torch.Generator().manual_seed(3), []
    ordinary = torch.ones(len(VOCABULARY))
    ordinary[2] = 0
    for size in (2, 2, 1):
        row = torch.multinomial(ordinary.expand(size, -1), 1, generator=generator) if bos is None else None
        row = torch.full((size, 1), bos) if row is None else row
        for _ in range(11):
            with torch.no_grad():
                logits = model(input_ids=row).logits[:, -1]
            logits[:, 2] = -torch.inf
            row = torch.cat((row, torch.multinomial(logits.softmax(-1), 1, generator=generator)), dim=1)
        rows.append(row)
    assert torch.equal(sample_sequences(model, bos, 5, 12, seed=3, batch_size=2, progress=False), torch.cat(rows))


def test_what_a_checkpoint_says_of_generation_is_put_aside_and_back():
    model, tuned = tiny_llama(), tiny_llama()
    tuned.generation_config.update(top_k=1, repetition_penalty=5.0, temperature=0.1, max_new_tokens=2, eos_token_id=2)
    before = tuned.generation_config.to_dict()
    rows = sample_sequences(tuned, 1, 4, 12, progress=False)
    assert torch.equal(rows, sample_sequences(model, 1, 4, 12, progress=False))
    with pytest.raises(RuntimeError, match="stop"):
        tuned.register_forward_pre_hook(stop)
        sample_sequences(tuned, 1, 4, 12, progress=False)
    assert tuned.generation_config.to_dict() == before


def stop(*_):
    raise RuntimeError("stop")


def test_the_bar_counts_every_token(capsys):
    sample_sequences(tiny_llama(), 1, 5, 6, batch_size=2)
    captured = capsys.readouterr()
    assert captured.out == "" and "sampling text" in captured.err and "30/30" in captured.err


def test_samples_follow_the_models_distribution():
    # Against the uncached softmax, with the end token taken out.
    model = tiny_llama()
    rows = sample_sequences(model, 1, 4000, 3, batch_size=4000, progress=False)
    second = rows[rows[:, 1] == rows[:, 1].mode().values][:, 1:2]
    prefix = torch.tensor([[1, int(second[0])]])
    with torch.no_grad():
        p = model(input_ids=prefix).logits[0].double()
    p[:, 2] = -torch.inf
    p = p.softmax(-1)
    for observed, expected in ((rows[:, 1], p[0]), (rows[rows[:, 1] == second[0]][:, 2], p[1])):
        counts = observed.bincount(minlength=len(VOCABULARY)).double()
        spread = (expected * (1 - expected) / counts.sum()).sqrt()
        assert ((counts / counts.sum() - expected).abs() <= 5 * spread + 1e-9).all()


def test_without_bos_rows_start_with_ordinary_tokens():
    rows = sample_sequences(tiny_llama(), None, 50, 2, progress=False)
    assert len(set(rows[:, 0].tolist())) > 5 and not (rows == 2).any()
    with pytest.raises(RequestError, match="context of 32"):
        sample_sequences(tiny_llama(), 1, 1, 33, progress=False)
    with pytest.raises(RequestError, match="makes no text"):
        sample_sequences(tiny_llama(), 1, 0, 8, progress=False)
    assert sample_sequences(tiny_llama(), 1, 3, 1, progress=False).tolist() == [[1]] * 3


@pytest.mark.skipif(not (SHARED / "models/babyllama105").is_dir(), reason="shared/models/babyllama105 is not there")
def test_stories_of_a_real_checkpoint():
    tokenizer = load_tokenizer(SHARED / "models/babyllama105")
    documents = read_documents(SHARED / "text/tinystories_valid.jsonl")
    ids, mask = padded_sequences(documents, tokenizer, 256)
    assert ids.shape == (785, 256) and int((mask.sum(1) == 256).sum()) == 784
    assert (ids[:, 0] == 1).all() and not (ids[:, 1:] == 1).any()
    assert torch.equal(token_sequences(documents, tokenizer, 256), ids[mask.all(1)])
