import json
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mea_compress.errors import RequestError
from mea_compress.text import (
    choose_sequence_length,
    load_model,
    load_tokenizer,
    padded_sequences,
    read_documents,
    resolve_device,
    sample_sequences,
    token_sequences,
)

SHARED = Path(__file__).resolve().parents[2] / "shared"
LETTERS = "abcdefghijklmnopqrstuvwxyz "
VOCABULARY = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + i for i, letter in enumerate(LETTERS)}


def character_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    names = {"unk_token": "<unk>", "eos_token": "</s>"}
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        names["bos_token"] = "<s>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    } | changes
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def ids_of(text: str) -> list[int]:
    return [VOCABULARY[letter] for letter in text]


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
        ("a.jsonl", b'"fine"\n{"text": ', "Line 2"),
        ("a.jsonl", b'{"body": "x"}', "Line 1"),
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
    with pytest.raises(RequestError, match=r"has 4 tokens.*sequence of 9.*--sequence-length"):
        make(["abc"], character_tokenizer(), 9)
    with pytest.raises(RequestError, match="nothing to predict"):
        make(["abc"], character_tokenizer(), 1)


def test_a_flood_of_unknown_tokens_is_said(capsys):
    token_sequences(["ab" * 4], character_tokenizer(), 4)
    assert capsys.readouterr().err == ""
    token_sequences(["aÄ" * 4], character_tokenizer(), 4)
    captured = capsys.readouterr()
    assert "unknown" in captured.err and captured.out == ""


def test_sequence_length_follows_the_context():
    model = tiny_llama()
    assert choose_sequence_length(model) == 32
    assert choose_sequence_length(tiny_llama(max_position_embeddings=4096)) == 1024
    assert choose_sequence_length(model, 7) == 7
    with pytest.raises(RequestError, match="context of 32"):
        choose_sequence_length(model, 33)


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
    for observed, wanted in ((rows[:, 1], p[0]), (rows[rows[:, 1] == second[0]][:, 2], p[1])):
        counts = observed.bincount(minlength=len(VOCABULARY)).double()
        spread = (wanted * (1 - wanted) / counts.sum()).sqrt()
        assert ((counts / counts.sum() - wanted).abs() <= 5 * spread + 1e-9).all()


def test_without_bos_rows_start_with_ordinary_tokens():
    rows = sample_sequences(tiny_llama(), None, 50, 2, progress=False)
    assert len(set(rows[:, 0].tolist())) > 5 and not (rows == 2).any()
    with pytest.raises(RequestError, match="context of 32"):
        sample_sequences(tiny_llama(), 1, 1, 33, progress=False)


def test_loading_says_what_is_wrong(tmp_path):
    with pytest.raises(RequestError, match="not a directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(RequestError, match=r"config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(RequestError, match="pickles"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(RequestError, match="cannot be loaded"):
        load_model(tmp_path)
    with pytest.raises(RequestError, match="tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(RequestError, match="--device"):
        resolve_device("gpu7")
    with pytest.raises(RequestError, match="--dtype"):
        load_model(tmp_path, dtype="int8")


def test_loading_keeps_the_dtype(tmp_path):
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu").dtype == torch.bfloat16
    assert load_model(tmp_path, "float64", "cpu").dtype == torch.float64
    assert load_tokenizer(tmp_path)("ab")["input_ids"] == [1, *ids_of("ab")]


@pytest.mark.skipif(not (SHARED / "models/babyllama105").is_dir(), reason="shared/models/babyllama105 is not there")
def test_stories_of_a_real_checkpoint():
    tokenizer = load_tokenizer(SHARED / "models/babyllama105")
    documents = read_documents(SHARED / "text/tinystories_valid.jsonl")
    ids, mask = padded_sequences(documents, tokenizer, 256)
    assert ids.shape == (785, 256) and int((mask.sum(1) == 256).sum()) == 784
    assert (ids[:, 0] == 1).all() and not (ids[:, 1:] == 1).any()
    assert torch.equal(token_sequences(documents, tokenizer, 256), ids[mask.all(1)])
