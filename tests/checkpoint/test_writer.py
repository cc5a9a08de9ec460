"""The writer against the safetensors library, and what it leaves behind when it cannot finish."""

import dataclasses
import errno
import json
import os
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mea_compress.checkpoint import (
    CheckpointReader,
    NewTensor,
    array_dtype,
    as_array,
    dtype_name,
    plan_shards,
    shard_finished,
    system,
    torch_dtype,
    write_checkpoint,
    write_index,
    write_shard,
)
from mea_compress.checkpoint import files as files_module
from mea_compress.checkpoint import writer as writer_module
from mea_compress.errors import DiskFullError, RequestError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def new(name, tensor):
    return NewTensor(name, dtype_name(tensor.dtype), tuple(tensor.shape), lambda: as_array(tensor))


def source(directory, tensors):
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return CheckpointReader(directory)


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def same_bytes(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def test_one_file_has_the_bytes_of_the_library(tmp_path):
    tensors = {"a": torch.randn(3, 5), "é \n": torch.randn(()), "b": torch.randn(2, 0), "c": torch.randn(7)}
    order = sorted(tensors, key=lambda name: name.encode())
    files = write_checkpoint(tmp_path / "ours", [new(name, tensors[name]) for name in order])
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert files == [tmp_path / "ours" / "model.safetensors"]
    assert files[0].read_bytes() == (tmp_path / "theirs").read_bytes()
    assert os.listdir(tmp_path / "ours") == ["model.safetensors"]
    reader = CheckpointReader(tmp_path / "ours")
    write_checkpoint(tmp_path / "copy", list(reader.tensors.values()))
    assert contents(tmp_path / "copy") == contents(tmp_path / "ours")


def test_shards_are_what_transformers_loads(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    entries = [new(name, tensor) for name, tensor in model.state_dict().items()]
    files = write_checkpoint(tmp_path, entries, shard_bytes=4000)
    config.save_pretrained(tmp_path)
    count = len(files) - 1
    assert [file.name for file in files] == [
        *(f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)),
        INDEX,
    ]
    index = json.loads((tmp_path / INDEX).read_text())
    assert list(index) == ["metadata", "weight_map"] and list(index["weight_map"]) == sorted(index["weight_map"])
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in model.state_dict().values())}
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


DTYPES = ["BOOL", "U8", "F8_E4M3", "F8_E5M2", "BF16", "F16", "I32", "F32", "F64", "C64"]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    specs=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    shard_bytes=st.integers(1, 300),
    source_shard_bytes=st.integers(1, 300),
)
def test_any_layout_survives(tmp_path_factory, specs, shard_bytes, source_shard_bytes):
    folder = tmp_path_factory.mktemp("layout")
    tensors = {}
    for number, (dtype, shape, _) in enumerate(specs):
        made = (torch.arange(torch.Size(shape).numel()) + number) % (2 if dtype == "BOOL" else 7)
        tensors[f"t{number}"] = made.to(torch_dtype(dtype)).reshape(shape)
    write_checkpoint(folder / "a", [new(*item) for item in tensors.items()], source_shard_bytes)
    reader = CheckpointReader(folder / "a")
    entries = [
        reader.tensors[name] if copied else new(name, tensors[name])
        for name, (_, _, copied) in zip(tensors, specs, strict=True)
    ]
    counted = []
    files = write_checkpoint(folder / "b", entries, shard_bytes, progress=counted.append)
    shards = plan_shards(entries, shard_bytes)
    assert [entry.name for shard in shards for entry in shard.entries] == list(tensors)
    assert all(len(s.entries) == 1 or sum(e.nbytes for e in s.entries) <= shard_bytes for s in shards)
    assert [file.stat().st_size for file in files[: len(shards)]] == [shard.nbytes for shard in shards]
    assert sum(counted) == sum(shard.nbytes for shard in shards)
    assert all(shard_finished(folder / "b", shard) for shard in shards)
    theirs = {}
    for file in files[: len(shards)]:
        theirs.update(load_file(file))
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    ours = CheckpointReader(folder / "b")
    assert set(theirs) == set(ours.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert same_bytes(theirs[name], tensor) and same_bytes(ours.read(name), tensor)
        info = ours.tensors[name]
        assert info.offset % tensor.element_size() == 0  # aligned, as engines that map the file need it
    again = write_checkpoint(folder / "c", entries, shard_bytes)
    assert len(again) == len(files) and contents(folder / "c") == contents(folder / "b")


def test_tensors_are_written_contiguous_from_any_layout_and_renamed_on_request(tmp_path):
    reader = source(tmp_path / "src", {"old": torch.randn(4), "f": torch.randn(3).to(torch.float8_e4m3fn)})
    turned = torch.randn(3, 5).T
    wide = torch.randn(4, 1).expand(4, 6).requires_grad_()
    entries = [
        dataclasses.replace(reader.tensors["old"], name="new"),
        dataclasses.replace(reader.tensors["old"], name="newer"),
        reader.tensors["f"],
        new("turned", turned),
        new("wide", wide),
    ]
    write_checkpoint(tmp_path / "out", entries)
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert set(loaded) == {"new", "newer", "f", "turned", "wide"}
    assert torch.equal(loaded["new"], reader.read("old")) and torch.equal(loaded["newer"], reader.read("old"))
    assert same_bytes(loaded["f"], reader.read("f"))
    assert torch.equal(loaded["turned"], turned) and torch.equal(loaded["wide"], wide)


def test_a_tensor_larger_than_a_block_is_written_in_row_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "_BLOCK_BYTES", 100)
    tensors = {"narrow": torch.randn(50, 3).T, "rows": torch.randn(9, 11), "vector": torch.randn(1000)}
    reader = source(tmp_path / "src", {"copied": torch.randn(333)})
    write_checkpoint(tmp_path / "out", [reader.tensors["copied"], *(new(*item) for item in tensors.items())])
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(loaded.pop("copied"), reader.read("copied"))
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors) and len(loaded) == 3


def test_new_tensors_are_made_one_at_a_time_in_order(tmp_path):
    events = []

    def entry(number):
        def produce():
            events.append(number)
            return np.full(2, float(number), array_dtype(dtype))

        dtype = "F32" if number % 2 else "BF16"
        return NewTensor(str(number), dtype, (2,), produce)

    entries = [entry(number) for number in range(8)]
    shards = plan_shards(entries, 30)
    assert events == []
    for shard in shards:
        write_shard(tmp_path, shard)
    assert events == list(range(8))


needs_kernel_copy = pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="no os.copy_file_range here")


def paged(folder, sizes, lead):
    """A file with tensors of so many bytes, whose data begin `lead` bytes into a page."""
    raw, begin = {}, 0
    for name, size in sizes.items():
        raw[name] = {"dtype": "U8", "shape": [size], "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(raw).encode()
    text += b" " * ((lead - 8 - len(text)) % 4096)
    data = torch.randint(256, (begin,), dtype=torch.uint8, generator=torch.Generator().manual_seed(begin + lead))
    folder.mkdir(exist_ok=True)
    number = len(list(folder.iterdir())) + 1
    file = folder / f"model-{number:05d}-of-00002.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data.numpy().tobytes())


@needs_kernel_copy
@pytest.mark.parametrize("lead", [0, 8, 1096, 4088])
def test_copied_tensors_keep_their_place_in_a_page_and_files_those_of_the_source(tmp_path, monkeypatch, lead):
    """Pages can then be copied whole, or shared: nothing but the ends of a range is copied in parts of a page."""
    folder = tmp_path / "src"
    paged(folder, {"a": 1000, "old": 8192, "b": 3 * 4096, "c": 77}, lead)
    paged(folder, {"d": 40_000, "e": 5000}, 2048)
    index = {"weight_map": {"a": 1, "old": 1, "b": 1, "c": 1, "d": 2, "e": 2}}
    index["weight_map"] = {name: f"model-{file:05d}-of-00002.safetensors" for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    reader = CheckpointReader(folder)
    made = [new("new", torch.zeros(4096, dtype=torch.uint8)), new("odd", torch.zeros(64, dtype=torch.uint8))]
    entries = []
    for info in reader.tensors.values():
        entries += made if info.name == "old" else [info]
    calls, kernel_copy = [], os.copy_file_range

    def record(source, target, count, offset, position):
        calls.append((count, offset, position))
        return kernel_copy(source, target, count, offset, position)

    monkeypatch.setattr(os, "copy_file_range", record)
    files = write_checkpoint(tmp_path / "out", entries)
    assert len(files) == 3
    found = CheckpointReader(tmp_path / "out")
    for name, info in reader.tensors.items():
        if name != "old":
            copy = found.tensors[name]
            assert copy.file.name == info.file.name
            assert (copy.offset - info.offset) % 4096 == 0
            assert same_bytes(found.read(name), reader.read(name))
    assert calls and all((offset - position) % 4096 == 0 for _, offset, position in calls)
    whole = [call for call in calls if call[0] >= 4096]
    assert whole and all(count % 4096 == position % 4096 == 0 for count, _, position in whole)
    assert [len(shard.entries) for shard in plan_shards(entries, 4096)] == [1, 1, 1, 1, 1, 1, 1]


@needs_kernel_copy
def test_adjacent_tensors_are_copied_in_one_call(tmp_path, monkeypatch):
    tensors = {f"{number:02d}": torch.randn(4) for number in range(10)}
    reader = source(tmp_path / "src", tensors)
    calls = []
    kernel_copy = os.copy_file_range

    def count(*arguments):
        calls.append(arguments)
        return kernel_copy(*arguments)

    monkeypatch.setattr(os, "copy_file_range", count)
    entries = list(reader.tensors.values())
    write_checkpoint(tmp_path / "all", entries)
    assert len(calls) == 1
    calls.clear()
    write_checkpoint(tmp_path / "some", [entry for entry in entries if entry.name != "04"])
    assert len(calls) == 2
    calls.clear()
    write_checkpoint(tmp_path / "turned", entries[::-1])
    assert len(calls) == 10
    for folder in ("all", "some", "turned"):
        for name, tensor in load_file(tmp_path / folder / "model.safetensors").items():
            assert torch.equal(tensor, tensors[name])


@needs_kernel_copy
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize(
    "failure", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, "nothing", "absent"]
)
def test_where_the_kernel_cannot_copy_a_buffer_does(tmp_path, monkeypatch, failure, after):
    tensors = {"a": torch.randn(1000), "b": torch.randn(777)}
    reader = source(tmp_path / "src", tensors)
    calls = []
    kernel_copy = os.copy_file_range

    def odd(src, dst, count, *offsets):
        calls.append(count)
        if len(calls) <= after:
            return kernel_copy(src, dst, min(count, 123), *offsets)  # a partial copy first
        if failure == "nothing":
            return 0
        raise OSError(failure, os.strerror(failure))

    if failure == "absent":
        monkeypatch.delattr(os, "copy_file_range")
    else:
        monkeypatch.setattr(os, "copy_file_range", odd)
    monkeypatch.setattr(writer_module, "_BUFFER_BYTES", 256)
    monkeypatch.setattr(files_module, "_WRITE_BYTES", 256)
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: whole(fd, data[:100], offset))  # partial writes
    counted = []
    write_checkpoint(tmp_path / "out", list(reader.tensors.values()), progress=counted.append)
    path = tmp_path / "out" / "model.safetensors"
    assert contents(tmp_path / "out") == contents(tmp_path / "src")
    assert sum(counted) == path.stat().st_size


def test_a_source_that_shrinks_while_it_is_copied(tmp_path):
    reader = source(tmp_path / "src", {"a": torch.randn(1000)})
    os.truncate(tmp_path / "src" / "model.safetensors", 500)
    with pytest.raises(RequestError, match=r"src/model\.safetensors: .*truncated or was changed"):
        write_checkpoint(tmp_path / "out", list(reader.tensors.values()))
    assert os.listdir(tmp_path / "out") == []


def failing(number):
    """A stand-in for a system call."""

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


WHERE = ["pwrite", "fsync", "replace", pytest.param("copy_file_range", marks=needs_kernel_copy)]


@pytest.mark.parametrize("call", WHERE)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch, call, number):
    reader = source(tmp_path / "src", {"a": torch.randn(1000)})
    shard = plan_shards([reader.tensors["a"], new("b", torch.randn(3))])[0]
    out = tmp_path / "out"
    out.mkdir()
    before = contents(tmp_path)
    monkeypatch.setattr(os, call, failing(number))
    with pytest.raises(RequestError) as caught:
        write_shard(out, shard)
    monkeypatch.undo()
    assert f"{out / 'model.safetensors'}: the disk or quota is full" in str(caught.value)
    assert f"needs {shard.nbytes} bytes" in str(caught.value)
    assert contents(tmp_path) == before


def test_a_full_disk_half_way_keeps_the_shards_before(tmp_path, monkeypatch):
    reader = source(tmp_path / "src", {str(number): torch.randn(1000) for number in range(4)})
    entries = list(reader.tensors.values())
    whole, room = os.pwrite, [10_000]

    def limited(descriptor, data, offset):
        count = min(len(data), room[0])
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= count
        return whole(descriptor, data[:count], offset)

    monkeypatch.setattr(os, "pwrite", limited)
    monkeypatch.setattr(os, "copy_file_range", failing(errno.EXDEV), raising=False)
    with pytest.raises(RequestError, match=r"00003-of-00004.*disk or quota is full"):
        write_checkpoint(tmp_path / "out", entries, shard_bytes=4000)
    shards = plan_shards(entries, 4000)
    assert [shard_finished(tmp_path / "out", shard) for shard in shards] == [True, True, False, False]
    assert sorted(os.listdir(tmp_path / "out")) == [shard.name for shard in shards[:2]]
    monkeypatch.undo()
    for shard in shards:  # what a resumed run does
        if not shard_finished(tmp_path / "out", shard):
            write_shard(tmp_path / "out", shard)
    write_index(tmp_path / "out", shards)
    write_checkpoint(tmp_path / "at once", entries, shard_bytes=4000)
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")


def test_a_real_limit_on_the_size_of_files(tmp_path):
    reader = source(tmp_path / "src", {"a": torch.randn(100_000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(RequestError, match=r"more than this file system or limit allows.*smaller shard size"):
            write_checkpoint(tmp_path / "out", list(reader.tensors.values()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_directory_that_may_not_be_written_to(tmp_path, monkeypatch, number):
    really_open = os.open

    def refuse(path, flags, *mode):
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number))
        return really_open(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RequestError, match=r"model\.safetensors\.tmp: cannot be written .*choose an output directory"):
        write_checkpoint(tmp_path / "out", [new("a", torch.zeros(1))])


@pytest.mark.skipif(os.geteuid() == 0, reason="everything may be written to by root")
def test_a_directory_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RequestError, match="cannot be written"):
        write_checkpoint(tmp_path, [new("a", torch.zeros(1))])


def test_odd_output_directories(tmp_path):
    entry = new("a", torch.zeros(1))
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below", str(tmp_path) + "/nul\0"):
        with pytest.raises(RequestError, match="writing failed"):
            write_checkpoint(directory, [entry])
    with pytest.raises(RequestError, match="writing failed"):
        write_shard(tmp_path / "absent", plan_shards([entry])[0])
    (tmp_path / "out" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(RequestError, match="writing failed"):
        write_checkpoint(tmp_path / "out", [entry])
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RequestError("from the producer"), ZeroDivisionError])
def test_what_stops_a_producer_stops_the_file_and_keeps_the_old_one(tmp_path, error):
    write_checkpoint(tmp_path, [new("a", torch.ones(5))])
    before = contents(tmp_path)

    def produce():
        raise error

    with pytest.raises(type(error) if isinstance(error, BaseException) else error):
        write_checkpoint(tmp_path, [new("b", torch.zeros(5)), NewTensor("c", "F32", (5,), produce)])
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "made", [np.zeros((2, 3), np.float32), np.zeros((3, 2), array_dtype("BF16")), np.zeros((3, 2))]
)
def test_a_producer_must_keep_its_word(tmp_path, made):
    with pytest.raises(RequestError, match=r"'x' came out as \w+ \[.*instead of float32 \[3, 2\]"):
        write_checkpoint(tmp_path, [NewTensor("x", "F32", (3, 2), lambda: made)])
    assert os.listdir(tmp_path) == []


def test_leftovers_of_a_killed_run_are_replaced_and_links_are_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors.tmp").symlink_to(precious)
    (out / "model.safetensors").symlink_to(precious)
    write_checkpoint(out, [new("a", torch.ones(2))])
    assert precious.read_text() == "keep me"
    assert os.listdir(out) == ["model.safetensors"] and not (out / "model.safetensors").is_symlink()


def test_a_source_is_never_replaced(tmp_path):
    reader = source(tmp_path / "src", {"a": torch.randn(10)})
    before = contents(tmp_path / "src")
    (tmp_path / "link").symlink_to("src")
    for directory in (tmp_path / "src", tmp_path / "link"):
        with pytest.raises(RequestError, match="would be overwritten while it is copied from"):
            write_checkpoint(directory, [reader.tensors["a"], new("b", torch.zeros(1))])
    assert contents(tmp_path / "src") == before


def test_a_finished_shard_is_told_from_another(tmp_path):
    shard = plan_shards([new("a", torch.zeros(2))])[0]
    assert not shard_finished(tmp_path, shard)
    path = write_shard(tmp_path, shard)
    assert shard_finished(tmp_path, shard)
    assert not shard_finished(tmp_path, plan_shards([new("b", torch.zeros(2))])[0])
    os.truncate(path, shard.nbytes - 1)
    assert not shard_finished(tmp_path, shard)
    path.unlink()
    os.mkfifo(path)
    assert not shard_finished(tmp_path, shard)


@pytest.mark.slow
def test_requests_that_cannot_be_planned():
    one = new("a", torch.zeros(2))
    with pytest.raises(RequestError, match="at least 1 byte"):
        plan_shards([one], 0)
    with pytest.raises(RequestError, match="no tensors to write"):
        plan_shards([])
    with pytest.raises(RequestError, match="two tensors would be written as 'a'"):
        plan_shards([one, one])
    with pytest.raises(RequestError, match="would be written as '__metadata__'"):
        plan_shards([new("__metadata__", torch.zeros(2))])
    with pytest.raises(RequestError, match="would make 100000 files"):
        plan_shards([NewTensor(str(number), "F32", (1,), lambda: torch.zeros(1)) for number in range(100_000)], 4)


def test_dtypes_that_torch_cannot_compute_with_are_copied(tmp_path):
    header = json.dumps(
        {
            "f4": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]},
            "new": {"dtype": "F12_NEXT", "shape": [2, 4], "data_offsets": [4, 16]},
            "f": {"dtype": "F32", "shape": [1], "data_offsets": [16, 20]},
        }
    ).encode()
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(range(1, 21))
    )
    reader = CheckpointReader(tmp_path / "src")
    write_checkpoint(tmp_path / "out", list(reader.tensors.values()))
    copied = CheckpointReader(tmp_path / "out").tensors
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    for name, info in reader.tensors.items():
        theirs = copied[name]
        assert (theirs.dtype, theirs.shape) == (info.dtype, info.shape)
        begin = info.offset - 8 - len(header)
        assert raw[theirs.offset : theirs.offset + theirs.nbytes] == bytes(range(1, 21))[begin : begin + info.nbytes]


@pytest.mark.slow
def test_twenty_thousand_tensors_are_written_quickly(tmp_path):
    reader = source(tmp_path / "src", {f"model.layers.{i}.weight": torch.zeros(1) for i in range(20_000)})
    start = time.perf_counter()
    write_checkpoint(tmp_path / "out", list(reader.tensors.values()))
    assert time.perf_counter() - start < 5  # some 0.3 s; the rest is for busy machines


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from mea_compress.checkpoint import CheckpointReader, NewTensor, array_dtype, write_checkpoint
folder = Path(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
np.ascontiguousarray(np.zeros((2, 1 << 20), array_dtype("BF16")).T)
base = peak()
make = lambda: np.zeros((1 << 12, 1 << 12), array_dtype("BF16")).T
write_checkpoint(folder / "a", [NewTensor(str(i), "BF16", (1 << 12, 1 << 12), make) for i in range(8)], 1 << 26)
write_checkpoint(folder / "b", list(CheckpointReader(folder / "a").tensors.values()))
print(peak() - base)
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """256 MiB made and 256 MiB copied, tensors of 32 MiB: at most one, the contiguous form of it, and change."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 90


def test_what_is_copied_is_there_before_anything_is_made(tmp_path):
    copied = source(tmp_path / "source", {"a": torch.arange(3.0)}).info("a")
    found = []

    def produce():
        found.append((tmp_path / "out" / "model.safetensors.tmp").read_bytes())
        return np.ones(2, np.float32)

    (shard,) = plan_shards([NewTensor("b", "F32", (2,), produce), copied])
    (tmp_path / "out").mkdir()
    write_shard(tmp_path / "out", shard)
    begin = shard.positions[1]
    assert found[0][begin : begin + 12] == np.arange(3, dtype=np.float32).tobytes()
    assert len(found[0]) <= shard.nbytes and torch.equal(load_file(tmp_path / "out" / shard.name)["b"], torch.ones(2))


def test_room_is_set_aside_before_anything_is_written(tmp_path, monkeypatch):
    """A disk that is too small is told at once; a file system that cannot tell is written to all the same."""
    written, pwrite = [], os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *arguments: written.append(arguments) or pwrite(*arguments))
    for error, refused in ((errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EOPNOTSUPP, False)):
        monkeypatch.setattr(system, "_call", lambda name, *_, error=error: error if name == "fallocate" else 0)
        written.clear()
        directory = tmp_path / str(error)
        if refused:
            with pytest.raises(DiskFullError, match="disk or quota is full"):
                write_checkpoint(directory, [new("a", torch.ones(5))])
        else:
            write_checkpoint(directory, [new("a", torch.ones(5))])
        assert bool(written) is not refused and os.listdir(directory) == ([] if refused else ["model.safetensors"])


@pytest.mark.skipif(sys.platform != "linux", reason="pages are shared on Linux only")
@pytest.mark.parametrize("shared", [True, False])
def test_no_room_is_set_aside_where_pages_are_shared(shared, tmp_path, monkeypatch):
    """One whole page is tried, with the same place in a page on both sides; the file comes out the same either way."""
    folder = tmp_path / "src"
    paged(folder, {"a": 1000, "b": 3 * 4096}, 1096)
    (folder / "model-00001-of-00002.safetensors").rename(folder / "model.safetensors")
    tried, called = [], []

    def clone(target, request, argument):
        tried.append((request, struct.unpack("qQQQ", argument)))
        if not shared:
            raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(system.fcntl, "ioctl", clone)
    monkeypatch.setattr(system, "_call", lambda name, *_: called.append(name) or 0)
    reader = CheckpointReader(folder)
    (file,) = write_checkpoint(tmp_path / "out", [*reader.tensors.values(), new("c", torch.ones(3, dtype=torch.uint8))])
    ((request, (_, offset, count, position)),) = tried
    assert request == 0x4020940D and count == 4096 and offset % 4096 == position % 4096 == 0
    assert file.read_bytes()[position : position + count] == (folder / SINGLE).read_bytes()[offset : offset + count]
    assert ("fallocate" in called) is not shared
    for name in "ab":
        assert torch.equal(load_file(file)[name], reader.read(name))


@pytest.mark.parametrize("durable", [True, False])
def test_files_are_synchronised_unless_the_caller_does_it(durable, tmp_path, monkeypatch):
    synchronised = []
    monkeypatch.setattr(os, "fsync", synchronised.append)
    entries = [new("a", torch.arange(3.0))]
    write_checkpoint(tmp_path, entries, durable=durable)
    assert len(synchronised) == (2 if durable else 0)  # the file and its directory
