"""The reader against the safetensors library, and its choice of files."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from audit import recorded_opens
from safetensors.torch import load_file, save_file

from mea_compress.checkpoint import CheckpointReader, array_dtype, as_array, as_tensor, dtype_name, torch_dtype
from mea_compress.checkpoint.dtypes import DTYPE_NAMES
from mea_compress.errors import RequestError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def random_tensor(dtype, shape, seed=0):
    count = torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=torch.Generator().manual_seed(seed))
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def same_bytes(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def sharded(directory, parts):
    """A checkpoint of several files with an index, written by the safetensors library."""
    weight_map = {}
    for number, tensors in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4), (2, 3, 4)])
def test_every_dtype_is_read_as_the_library_reads_it(tmp_path, name, shape):
    tensor = random_tensor(DTYPES[name], shape)
    save_file({"x": tensor, "y": torch.arange(3)}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    info = reader.tensors["x"]
    assert (info.dtype, info.shape, info.nbytes) == (name, shape, tensor.nbytes)
    assert same_bytes(reader.read("x"), load_file(tmp_path / "model.safetensors")["x"])
    assert torch_dtype(name) == DTYPES[name] and dtype_name(DTYPES[name]) == name


def test_what_is_read_can_be_changed_without_changing_the_file(tmp_path):
    save_file({"x": torch.zeros(4)}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    reader.read("x").add_(1)
    assert torch.equal(reader.read("x"), torch.zeros(4))


def test_rows(tmp_path):
    tensor = torch.randn(7, 3, 2).bfloat16()
    save_file({"x": tensor, "empty": torch.empty(0, 3)}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    for start, stop in [(0, 7), (2, 5), (6, 7), (3, 3)]:
        assert torch.equal(reader.read_rows("x", start, stop), tensor[start:stop])
    assert reader.read_rows("empty", 0, 0).shape == (0, 3)
    for start, stop in [(-1, 2), (3, 2), (0, 8)]:
        with pytest.raises(ValueError):
            reader.read_rows("x", start, stop)


def test_shards_with_an_index_come_in_file_and_offset_order(tmp_path):
    first = {"b": torch.randn(2, 2), "a": torch.randn(3)}
    second = {"0": torch.randn(5).half()}
    sharded(tmp_path, [first, second])
    save_file({"stray": torch.zeros(1)}, tmp_path / "consolidated.safetensors")  # not named by the index: not ours
    reader = CheckpointReader(tmp_path)
    assert [path.name for path in reader.files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    infos = list(reader.tensors.values())
    assert infos == sorted(infos, key=lambda info: (info.file.name, info.offset))
    assert set(reader.tensors) == {"a", "b", "0"}
    for name, tensor in {**first, **second}.items():
        assert reader.has(name) and torch.equal(reader.read(name), tensor)
    assert not reader.has("stray")
    with pytest.raises(RequestError, match="no tensor 'stray'"):
        reader.read("stray")


def test_files_without_an_index(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    assert [path.name for path in CheckpointReader(tmp_path).files] == ["weights.safetensors"]
    save_file({"b": torch.zeros(1)}, tmp_path / "more.safetensors")
    (tmp_path / "._more.safetensors").write_bytes(b"metadata of another system")
    assert list(CheckpointReader(tmp_path).tensors) == ["b", "a"]
    save_file({"c": torch.zeros(1)}, tmp_path / "model.safetensors")  # what transformers would load
    assert list(CheckpointReader(tmp_path).tensors) == ["c"]


def test_a_header_is_all_that_is_read_at_first(tmp_path):
    rows, width = 1 << 28, 1 << 10
    header = json.dumps({"x": {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, rows * width * 4]}}).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:  # a terabyte, of which next to nothing is on the disk
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + rows * width * 4)
    reader = CheckpointReader(tmp_path)
    assert reader.tensors["x"].nbytes == 1 << 40
    assert torch.equal(reader.read_rows("x", rows - 1, rows), torch.zeros(1, width))


def test_the_source_is_only_opened_for_reading(tmp_path):
    sharded(tmp_path, [{"a": torch.zeros(2)}, {"b": torch.zeros(2)}])
    (tmp_path / "config.json").write_text("{}")
    with recorded_opens() as opens:
        reader = CheckpointReader(tmp_path)
        reader.read("a")
        reader.read_rows("b", 0, 1)
        reader.config()
        reader.other_files()
    ours = [(path, flags) for path, flags in opens if path.startswith(str(tmp_path))]
    assert len(ours) >= 6
    assert all(flags & os.O_ACCMODE == os.O_RDONLY and not flags & (os.O_CREAT | os.O_TRUNC) for _, flags in ours)


@pytest.mark.slow
def test_twenty_thousand_tensors_open_quickly(tmp_path):
    save_file({f"model.layers.{i}.weight": torch.zeros(1) for i in range(20_000)}, tmp_path / "model.safetensors")
    start = time.perf_counter()
    assert len(CheckpointReader(tmp_path).tensors) == 20_000
    assert time.perf_counter() - start < 5  # some 0.2 s; the rest is for busy machines


def test_a_link_to_the_directory_and_links_inside_it(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    save_file({"a": torch.ones(2)}, real / "weights-of-a-model")
    (real / "model.safetensors").symlink_to("weights-of-a-model")
    (tmp_path / "link").symlink_to(real)
    assert torch.equal(CheckpointReader(tmp_path / "link").read("a"), torch.ones(2))


def test_a_snapshot_of_the_hub_cache(tmp_path):
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "f00")
    (blobs / "f01").write_text('{"model_type": "llama"}')
    (blobs / "f02").write_text("{}")
    for name, blob in [("model.safetensors", "f00"), ("config.json", "f01"), ("tokenizer.json", "f02")]:
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    reader = CheckpointReader(snapshot)
    assert torch.equal(reader.read("a"), torch.ones(2))
    assert reader.config() == {"model_type": "llama"}
    assert reader.other_files() == [Path("tokenizer.json")]


def test_the_configuration_is_parsed_as_transformers_parses_it(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"name": "é", "limit": Infinity}', encoding="utf-8")
    assert CheckpointReader(tmp_path).config() == {"name": "é", "limit": float("inf")}


def test_other_files_are_all_but_weights(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    kept = ["tokenizer.json", "chat_template.jinja", "original/params.json", "README.md", ".gitattributes", "a b/é.txt"]
    left = [
        "config.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.fp16.json",
        "original/consolidated.00.pth", "model.gguf", "tf_model.h5", "flax_model.msgpack", "optimizer.pt",
        "onnx/model.onnx", ".git/config", ".cache/huggingface/x.metadata", "__pycache__/modeling.pyc", "X.CKPT",
    ]  # fmt: skip
    for name in kept + left:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "original/config.json").write_text("x")
    assert CheckpointReader(tmp_path).other_files() == sorted(map(Path, [*kept, "original/config.json"]))


def test_dtypes_that_torch_cannot_compute_with_pass_but_are_not_read(tmp_path):
    header = json.dumps(
        {
            "known": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]},
            "new": {"dtype": "F12_NEXT", "shape": [2, 4], "data_offsets": [4, 16]},
        }
    ).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    reader = CheckpointReader(tmp_path)
    assert [info.nbytes for info in reader.tensors.values()] == [4, 12]
    for name in ("known", "new"):
        with pytest.raises(RequestError, match="can be copied but not computed with; convert"):
            reader.read(name)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    reader = CheckpointReader(tmp_path)
    os.truncate(path, 200)
    with pytest.raises(RequestError, match="truncated or was changed while it was read"):
        reader.read("a")
    path.unlink()
    with pytest.raises(RequestError, match=r"model\.safetensors: the file does not exist"):
        reader.read("a")


def test_too_little_memory_is_said(tmp_path, monkeypatch):
    save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)

    def refuse(*_, **__):
        raise MemoryError("Unable to allocate 400 B")

    monkeypatch.setattr(np, "empty", refuse)
    with pytest.raises(RequestError, match="needs 400 bytes of memory"):
        reader.read("a")


def test_a_long_read_that_the_kernel_splits(tmp_path, monkeypatch):
    tensor = torch.randn(1000)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: whole(fd, [views[0][:37]], offset))
    assert torch.equal(reader.read("a"), tensor)


def test_a_failing_disk_is_said(tmp_path, monkeypatch):
    save_file({"a": torch.zeros(10)}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)

    def fail(*_):
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(RequestError, match="reading failed \\(Input/output error\\)"):
        reader.read("a")


@pytest.mark.parametrize("dtype", list(DTYPE_NAMES))
def test_arrays_and_tensors_are_the_same_numbers(dtype, tmp_path):
    """Every dtype that safetensors and both libraries have, by bytes; bfloat16 and float8 through ml_dtypes."""
    torch_type = getattr(torch, dtype)
    raw = torch.arange(48, dtype=torch.uint8) % (2 if dtype == "bool" else 120)
    tensor = raw.view(torch_type).reshape(2, -1)
    save_file({"a": tensor, "b": tensor.reshape(-1)[0].clone()}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    for name in "ab":
        read, array = reader.read(name), reader.read_array(name)
        assert read.dtype == torch_type and array.dtype == array_dtype(reader.info(name).dtype)
        assert read.shape == array.shape and read.reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()
        assert dtype_name(array.dtype) == dtype_name(read.dtype) == reader.info(name).dtype
        assert as_array(read).tobytes() == array.tobytes() and as_array(read).dtype == array.dtype
        assert torch.equal(as_tensor(array).reshape(-1).view(torch.uint8), read.reshape(-1).view(torch.uint8))


def test_rounding_to_bfloat16_is_pytorchs():
    numbers = torch.randn(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10
    ours = numbers.numpy().astype(array_dtype("BF16"))
    assert torch.equal(as_tensor(ours), numbers.bfloat16())
