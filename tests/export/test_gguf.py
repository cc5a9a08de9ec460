"""Files for llama.cpp: what stands in them, and what llama.cpp itself makes of them."""

import ctypes
import json
import sys

import pytest
import torch
from exporting import compressed, load
from published import CHAT, TEXT, publish
from safetensors.torch import load_file, save_file
from tiny import SIZES, contents, stock_checkpoint
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, Unigram
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

from mea_compress.compression import compress
from mea_compress.errors import RequestError
from mea_compress.exporting import balance, gguf_file, gguf_tokenizer, stock
from mea_compress.exporting.stock import export
from mea_compress.recipe import Recipe

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
SPECIAL = ["<s>", "</s>", "<|im_end|>"]
PROBE = "Once upon a time 12345 dogs, don't it'LL  know?\n\n She's there\t— naïve café, 東京.  </s> end  "
CASES = {
    "llama": "frequency",
    "llama-rope-bias-wide-tied": "pool",
    "mistral-full": "frequency in 2 groups",
    "qwen2": "head",
    "phi3": "frequency",
}


def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def run(file, context=128):
    """The file in llama.cpp, with a cache in float32."""
    package = llama_cpp()
    return package.Llama(
        str(file), n_ctx=context, n_batch=context, logits_all=True, verbose=False, type_k=0, type_v=0, n_threads=1
    )


def logits(engine, ids):
    """Logits (T, V) of a text."""
    engine.reset()
    engine.eval(ids)
    return torch.from_numpy(engine.scores[: len(ids)].copy())


def said(file):
    """All that a file says of its model and tokenizer, by name."""
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def tokenizer(split):
    """A byte-level tokenizer that splits words in some way."""
    made = Tokenizer(BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence(split), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT] * 4, trainer)
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return made


def by_expression(expression):
    return [
        pre_tokenizers.Split(Regex(expression), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


SPLITS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    **{name: by_expression(expression) for expression, name in gguf_tokenizer._SPLITS.items()},
}


def by_words(directory):
    """Put a tokenizer as Llama 2 has it there: words with a space in front, and a token for every byte."""
    publish(directory, "llama", "LlamaTokenizer")
    file = directory / "tokenizer.json"
    described = json.loads(file.read_text())
    vocabulary = described["model"]["vocab"]
    first = max(vocabulary.values()) + 1
    vocabulary |= {f"<0x{byte:02X}>": first + byte for byte in range(256)}
    file.write_text(json.dumps(described))


def by_bytes(directory):
    """Put a byte-level tokenizer there whose special tokens stand in tokenizer_config.json."""
    tokenizer(SPLITS["gpt-2"]).save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def keep_settings(directory, kept, apart=()):
    """Leave some settings in tokenizer_config.json, and put others into special_tokens_map.json."""
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({name: settings[name] for name in kept}))
    if apart:
        (directory / "special_tokens_map.json").write_text(json.dumps({name: settings[name] for name in apart}))


def exported(directory, put_tokenizer=None, case="llama", way="frequency", **options):
    """An export as GGUF and the checkpoint that it is of."""
    source = stock_checkpoint(directory / "source", case, vocab_size=700 if put_tokenizer else SIZES["vocab_size"])
    if put_tokenizer:
        put_tokenizer(source)
    out = compressed(directory, case, way)
    export(out, directory / "export", format="gguf", progress=False, **options)
    return directory / "export" / "model.gguf", out


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_the_compressed_checkpoint_does_from_half_the_state(case, tmp_path):
    package = llama_cpp()
    way = CASES[case]
    stock_checkpoint(tmp_path / "source", case, vocab_size=700)
    by_words(tmp_path / "source")
    out = compressed(tmp_path, case, way)
    export(out, tmp_path / "export", format="gguf", progress=False)
    whole = compressed(tmp_path, case, "pool", ratio=1.0, seed=1)
    export(whole, tmp_path / "whole", format="gguf", progress=False)
    engine, model = run(tmp_path / "export" / "model.gguf"), load(out)
    ids = torch.randint(3, 300, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
        text = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=None)[0].tolist()
    found = logits(engine, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    continued = list(ids)
    while len(continued) < len(text):
        continued.append(int(logits(engine, continued)[-1].argmax()))
    assert continued == text
    states = []
    for file in (tmp_path / "export" / "model.gguf", tmp_path / "whole" / "model.gguf"):
        held = run(file)
        logits(held, ids * 4)
        states.append(package.llama_state_seq_get_size(held._ctx.ctx, ctypes.c_int32(0)))
    assert states[0] / states[1] == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "balance"), [("llama", False), ("llama-rope-bias-wide-tied", False), ("qwen2", False), ("qwen2", True)]
)
def test_layers_with_different_numbers_of_pooled_heads_go_into_a_file_alone(case, balance, tmp_path):
    package = llama_cpp()
    stock_checkpoint(tmp_path / "source", case, vocab_size=700)
    by_words(tmp_path / "source")
    out = compressed(tmp_path, case, "pool", layers="1-1")
    with pytest.raises(RequestError, match="export it with --format gguf"):
        export(out, tmp_path / "refused", progress=False)
    result = export(out, tmp_path / "export", format="gguf", balance=balance, progress=False)
    counts = [layer["key_components"] for layer in json.loads((out / "config.json").read_text())["mea"]["layers"]]
    assert result.to_json()["key_value_heads"] == counts and counts[1] < counts[0]
    record = json.loads((out / "compression.json").read_text())["plan"]["kv_bytes_per_token"]
    assert result.verification["kv_bytes_per_token"] == record["after"]
    assert result.cost.kv_bytes_per_token == record["before"] - record["after"]
    engine, model = run(tmp_path / "export" / "model.gguf"), load(out)
    ids = torch.randint(3, 300, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(engine, ids), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    whole = compressed(tmp_path, case, "pool", ratio=1.0, seed=1)
    export(whole, tmp_path / "whole", format="gguf", progress=False)
    states = []
    for directory in ("export", "whole"):  # without flash attention llama.cpp pads values to the widest layer's
        held = package.Llama(
            str(tmp_path / directory / "model.gguf"), n_ctx=128, verbose=False, type_k=0, type_v=0, flash_attn=True
        )
        held.eval(ids * 4)
        states.append(package.llama_state_seq_get_size(held._ctx.ctx, ctypes.c_int32(0)))
    assert states[0] / states[1] == pytest.approx(record["after"] / record["before"], abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLITS)
def test_llama_cpp_makes_the_same_tokens_of_a_text(name, tmp_path):
    def put(directory):
        tokenizer(SPLITS[name]).save(str(directory / "tokenizer.json"))
        settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))

    file, out = exported(tmp_path, put)
    engine = run(file)
    expected = AutoTokenizer.from_pretrained(out)(PROBE)["input_ids"]
    assert engine.tokenize(PROBE.encode(), add_bos=True, special=True) == expected
    assert engine.metadata["tokenizer.ggml.pre"] == name and engine.metadata["tokenizer.chat_template"] == CHAT
    assert engine.token_eos() == 1


@pytest.mark.slow
def test_words_with_a_space_in_front_are_merged_as_before(tmp_path):
    file, out = exported(tmp_path, by_words)
    engine = run(file)
    # Of a text that begins with a space llama.cpp makes one more; docs/serving.md says so.
    for text in (PROBE.replace("</s>", "x"), TEXT, "a", "b  "):
        expected = AutoTokenizer.from_pretrained(out)(text)["input_ids"]
        assert engine.tokenize(text.encode(), add_bos=True, special=True) == expected
    assert engine.token_bos() == 1 and engine.metadata["tokenizer.ggml.add_bos_token"] == "true"


@pytest.mark.parametrize(
    ("put", "kept", "apart"),
    [
        (by_bytes, ["chat_template"], ["bos_token", "eos_token"]),
        (by_words, ["chat_template", "tokenizer_class"], ["bos_token", "eos_token", "unk_token"]),
        (by_words, ["chat_template", "tokenizer_class"], []),  # as the class has them
    ],
)
def test_special_tokens_are_those_that_the_tokenizer_loads_with(put, kept, apart, tmp_path):
    def put_otherwise(directory):
        put(directory)
        keep_settings(directory, kept, apart)

    expected = said(exported(tmp_path / "one", put)[0])
    assert said(exported(tmp_path / "other", put_otherwise)[0]) == expected
    tokens = expected["tokenizer.ggml.tokens"]
    assert tokens[expected["tokenizer.ggml.bos_token_id"]] == "<s>"
    assert tokens[expected["tokenizer.ggml.eos_token_id"]] == "</s>"
    assert expected["tokenizer.ggml.add_bos_token"] == (put is by_words) and expected["tokenizer.chat_template"] == CHAT


def test_what_early_conversions_store_and_leave_out_changes_nothing(tmp_path):
    left_to_the_class = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    files = []
    for name in ("now", "then"):
        source = stock_checkpoint(tmp_path / name / "source", **left_to_the_class)
        if name == "then":
            config = json.loads((source / "config.json").read_text())
            settings = {key: value for key, value in config.items() if key not in left_to_the_class}
            (source / "config.json").write_text(json.dumps(settings))
            tensors = load_file(source / "model.safetensors")
            tensors |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(2) for layer in range(2)}
            save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        out = compressed(tmp_path / name)
        export(out, tmp_path / name / "export", format="gguf", progress=False)
        export(out, tmp_path / name / "stock", progress=False)
        files.append(contents(tmp_path / name / "export")["model.gguf"])
        assert not [
            tensor for tensor in load_file(tmp_path / name / "stock" / "model.safetensors") if "rotary" in tensor
        ]
    assert files[0] == files[1]


def test_the_disk_is_asked_for_the_bytes_of_the_type_that_is_written(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(stock, "check_space", lambda out, needed: asked.append(needed))
    out, written = compressed(tmp_path, way="pool"), []
    for weights in ("stored", "f16", "q8_0"):
        export(out, tmp_path / weights, format="gguf", weights=weights, progress=False)
        written.append(sum(tensor.n_bytes for tensor in gguf.GGUFReader(tmp_path / weights / "model.gguf").tensors))
    assert written[0] > written[1] > written[2]
    assert len({needed - size for needed, size in zip(asked, written, strict=True)}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "largest"), [("f16", 0.01), ("q8_0", 0.1)])
def test_narrower_weights_stay_close_and_are_smaller(weights, largest, tmp_path):
    file, out = exported(tmp_path, by_words, weights=weights)
    found = logits(run(file), [5, 9, 20, 31])
    with torch.no_grad():
        expected = load(out)(torch.tensor([[5, 9, 20, 31]])).logits[0]
    difference = float((found - expected).abs().max() / expected.abs().max())
    assert 1e-5 < difference < largest
    again = tmp_path / "stored"
    export(out, again, format="gguf", progress=False)
    assert file.stat().st_size < (again / "model.gguf").stat().st_size


def test_the_directory_holds_the_file_and_what_says_what_it_is(tmp_path):
    file, _ = exported(tmp_path)
    assert {entry.name for entry in file.parent.iterdir()} == {"model.gguf", "README.md", "export.json", "recipe.yaml"}
    assert "llama.cpp" in (file.parent / "README.md").read_text()
    assert json.loads((file.parent / "export.json").read_text())["format"] == "gguf"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.Whitespace()), "splits words"),
        (lambda made: setattr(made, "model", Unigram([("a", 0.0)], unk_id=0)), "Unigram tokenizer"),
        (lambda made: made.add_tokens([f"word{i}" for i in range(400)]), "tokens and the model 700"),
        (lambda made: None, "has no eos_token, .*; name one in tokenizer_config"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(change, said, tmp_path):
    def put(directory):
        made = tokenizer(SPLITS["gpt-2"])
        change(made)
        made.save(str(directory / "tokenizer.json"))

    stock_checkpoint(tmp_path / "source", vocab_size=700)
    out = compressed(tmp_path)
    put(out)
    with pytest.raises(RequestError, match=said):
        gguf_tokenizer.tokenizer_fields(out, 700)


def test_a_vocabulary_without_bytes_is_refused(tmp_path):
    publish(stock_checkpoint(tmp_path / "source", vocab_size=700), "llama", "LlamaTokenizer")
    with pytest.raises(RequestError, match="no token for every byte"):
        gguf_tokenizer.tokenizer_fields(tmp_path / "source", 700)


@pytest.fixture
def no_work(monkeypatch):
    """Fails a test that begins to balance or to write."""

    def begun(*_):
        raise AssertionError("work has begun")

    monkeypatch.setattr(balance, "balancing_tokens", begun)
    monkeypatch.setattr(stock, "write_shards", begun)


@pytest.mark.parametrize("balanced", [False, True])
def test_a_tokenizer_that_is_not_written_is_refused_before_any_work(balanced, tmp_path, no_work):
    source = stock_checkpoint(tmp_path / "source", vocab_size=700)
    by_bytes(source)
    keep_settings(source, ["bos_token"])
    out = compressed(tmp_path)
    with pytest.raises(RequestError, match="has no eos_token"):
        export(out, tmp_path / "export", format="gguf", balance=balanced, progress=False)
    assert not (tmp_path / "export").exists()


def test_a_rope_that_is_not_written_is_refused_before_any_work(tmp_path, no_work):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    stock_checkpoint(tmp_path / "source", rope_parameters=yarn)
    compress(
        tmp_path / "source",
        tmp_path / "out",
        recipe=Recipe(kv_ratio=0.5, fit="weights", key_composition="pool", value_composition="pool"),
        progress=False,
    )
    with pytest.raises(RequestError, match=r"type yarn is not written as GGUF.*--format llama"):
        export(tmp_path / "out", tmp_path / "export", format="gguf", progress=False)
    assert not (tmp_path / "export").exists()


def test_without_the_package_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RequestError, match=r"mea-compress\[gguf\]"):
        gguf_file.require_gguf()
