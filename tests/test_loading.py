import json

import pytest
import torch
from letters import character_tokenizer, ids_of, tiny_llama
from transformers import Cohere2Config, GemmaConfig, GPT2Config, LlamaConfig, Qwen2Config

from mea_compress.errors import RequestError
from mea_compress.loading import (
    choose_sequence_length,
    load_model,
    load_tokenizer,
    resolve_device,
    seeded,
    training_device,
)


def test_sequence_length_follows_the_context():
    model = tiny_llama()
    assert choose_sequence_length(model) == 32
    assert choose_sequence_length(tiny_llama(max_position_embeddings=4096)) == 1024
    assert choose_sequence_length(model, 7) == 7
    with pytest.raises(RequestError, match=r"`sequence_length` 33 .* context of 32"):
        choose_sequence_length(model, 33)
    with pytest.raises(RequestError, match="`sequence_length` 1 leaves nothing to predict"):
        choose_sequence_length(model, 1)


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
    with pytest.raises(RequestError, match="`device` gpu7 is not a device"):
        resolve_device("gpu7")
    with pytest.raises(RequestError, match=r"`device` cuda:77 .* no such GPU"):
        resolve_device("cuda:77")
    with pytest.raises(RequestError, match="`dtype` int8"):
        load_model(tmp_path, dtype="int8")


def test_a_second_gpu_is_trained_on_by_processes_of_a_launcher_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert [training_device(name).index for name in ("cpu", "cuda", "cuda:0")] == [None, None, 0]
    with pytest.raises(RequestError, match=r"`device` cuda:1 .* set CUDA_VISIBLE_DEVICES to 1 and give cuda"):
        training_device("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "2")  # each of which gets its own
    assert training_device("cuda:1").index == 1


@pytest.mark.parametrize("kind", [Qwen2Config, GemmaConfig, GPT2Config, Cohere2Config, LlamaConfig])
def test_a_directory_without_a_vocabulary_has_no_tokenizer(kind, tmp_path):
    """Of which transformers makes one that knows no word, where the family's tokenizer has a class of its own."""
    kind().save_pretrained(tmp_path)
    with pytest.raises(RequestError, match=r"cannot be loaded .* copy the tokenizer's files there"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(RequestError, match=r"cannot be loaded \(it has no vocabulary\)"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"")
    with pytest.raises(RequestError, match=r"cannot be loaded .* copy the tokenizer's files there"):
        load_tokenizer(tmp_path)


def test_loading_keeps_the_dtype(tmp_path):
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu").dtype == torch.bfloat16
    assert load_model(tmp_path, "float64", "cpu").dtype == torch.float64
    assert load_tokenizer(tmp_path)("ab")["input_ids"] == [1, *ids_of("ab")]


def test_seeding_is_for_the_block_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    draws = []
    for _ in range(2):
        with seeded(3, torch.device("cpu")):
            draws.append(torch.rand(4))
    with pytest.raises(ZeroDivisionError), seeded(3, torch.device("cpu")):
        torch.rand(4)
        raise ZeroDivisionError
    assert torch.equal(*draws) and torch.equal(draws[0], torch.rand(4, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(torch.get_rng_state(), state)
