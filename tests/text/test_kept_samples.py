"""Sampled text that is kept: the same again without a model, anything else anew."""

import torch
from letters import character_tokenizer

from mea_compress.text import kept_samples as module
from mea_compress.text.kept_samples import kept_samples, tokenizer_digest

IDS = torch.tensor([[1, 70000, 3], [4, 5, 6]])


def fail():
    raise AssertionError("sampled again")


def test_the_same_is_sampled_once(tmp_path, monkeypatch):
    monkeypatch.setenv(module.PLACE, str(tmp_path / "kept"))
    what = {"model": "m", "seed": 0}
    assert kept_samples(what, lambda: IDS) is IDS
    again = kept_samples(what, fail)
    assert again.dtype == torch.int64 and torch.equal(again, IDS)
    assert torch.equal(kept_samples(what | {"seed": 1}, lambda: IDS + 1), IDS + 1)
    (file, *_) = (tmp_path / "kept").iterdir()
    for file in (tmp_path / "kept").iterdir():
        file.write_bytes(file.read_bytes()[:-5])
    assert kept_samples(what, lambda: IDS) is IDS  # damaged, made again
    assert torch.equal(kept_samples(what, fail), IDS)


def test_another_tokenizer_is_another_reason():
    plain, other, template = character_tokenizer(), character_tokenizer(bos=False), character_tokenizer()
    template.chat_template = "{{ messages }}"
    digests = [tokenizer_digest(one) for one in (plain, character_tokenizer(), other, template)]
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_nothing_is_kept_where_it_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in ("", str(tmp_path / "file" / "below")):
        monkeypatch.setenv(module.PLACE, place)
        for _ in range(2):
            assert kept_samples({}, lambda: IDS) is IDS
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
