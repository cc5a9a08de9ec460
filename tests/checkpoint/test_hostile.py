"""Checkpoints that lie: each ends in one sentence, never in a traceback, a hang or a look outside the directory."""

import json
import os

import ml_dtypes  # noqa: F401 - loaded here, so that no file of it is opened while checkpoints are read
import pytest
import torch
from audit import recorded_opens
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from mea_compress.checkpoint import CheckpointReader
from mea_compress.checkpoint.dtypes import DTYPE_BITS
from mea_compress.errors import RequestError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
HUGE = "9" * 5000


def refused(action, *words):
    """Runs what must be refused and checks that the message is one short sentence with these words in it."""
    with pytest.raises(RequestError) as caught:
        action()
    message = str(caught.value)
    check_sentence(message)
    for word in words:
        assert word in message, message
    return message


def check_sentence(message):
    assert message.isprintable() and message.isascii(), ascii(message)
    assert len(message) < 700, message
    assert ". " not in message and not message.endswith("."), message
    assert ";" in message, f"no remedy: {message}"


def pack(header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def spec(begin=0, end=8, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


GOOD = {"a": spec(), "b": spec(8, 16)}

HEADERS = {
    "empty file": (b"", ["truncated", "0 bytes"]),
    "seven bytes": (b"\x08" + bytes(6), ["truncated"]),
    "truncated data": (pack(GOOD, bytes(15)), ["'b'", "truncated"]),
    "truncated header": (pack(GOOD)[:30], ["truncated"]),
    "header longer than the file": (pack(GOOD, bytes(16), length=10_000), ["header claims 10000 bytes"]),
    "header of 2^64 - 1 bytes": (pack(GOOD, bytes(16), length=2**64 - 1), ["header claims"]),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", ["git lfs pull"]),
    "no header": (pack(b""), ["not a JSON object"]),
    "not UTF-8": (pack(b'{"\xff\xfe": {}}'), ["not UTF-8"]),
    "not JSON": (pack(b'{"a": }'), ["not valid JSON"]),
    "cut JSON": (pack(b'{"a": {"dtype"'), ["not valid JSON"]),
    "JSON with a tail": (pack(b"{} {}"), ["not valid JSON"]),
    "a JSON list": (pack(b"[]"), ["not a JSON object"]),
    "nested deeply": (pack(b'{"a":' * 100_000), ["nested too deeply"]),
    "lists nested deeply": (pack(b'{"a":' + b"[" * 1_000_000), ["nested too deeply"]),
    "a number of 5000 digits": (pack(b'{"a": {"shape": [' + HUGE.encode() + b"]}}"), ["long number"]),
    "a tensor twice": (pack(b'{"a": {}, "a": {}}'), ["'a' twice"]),
    "offsets twice": (
        pack(b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8],"data_offsets":[0,4]}}', bytes(8)),
        ["'data_offsets' twice"],
    ),
    "overlap": (pack({"a": spec(), "b": spec(4, 12)}, bytes(12)), ["overlaps"]),
    "the same bytes": (pack({"a": spec(), "b": spec()}, bytes(8)), ["overlaps"]),
    "gap": (pack({"a": spec(), "b": spec(12, 20)}, bytes(20)), ["gap"]),
    "gap at the start": (pack({"a": spec(8, 16)}, bytes(16)), ["gap"]),
    "bytes after the end": (pack(GOOD, bytes(17)), ["1 bytes that belong to no tensor"]),
    "out of range": (pack({"a": spec(0, 1 << 40, "U8", [1 << 40])}, bytes(8)), ["'a' ends at byte"]),
    "size is not that of the shape": (pack({"a": spec(shape=[3])}, bytes(8)), ["does not fit its shape"]),
    "size is not that of the dtype": (pack({"a": spec(dtype="F64")}, bytes(8)), ["does not fit its shape"]),
    "half a byte": (pack({"a": spec(0, 1, "F4", [3])}, bytes(1)), ["does not fit its shape"]),
    "odd size of an unknown dtype": (pack({"a": spec(0, 8, "NEW", [3])}, bytes(8)), ["does not fit its shape"]),
    "no bytes of an unknown dtype": (pack({"a": spec(0, 0, "NEW", [3])}), ["does not fit its shape"]),
    "begin after end": (pack({"a": spec(8, 0)}, bytes(8)), ["data_offsets out of range"]),
    "negative begin": (pack({"a": spec(-8, 0)}, bytes(8)), ["data_offsets out of range"]),
    "begin past 2^63": (pack({"a": spec(2**64, 2**64 + 8)}, bytes(8)), ["data_offsets out of range"]),
    "offsets are floats": (pack({"a": spec(0.0, 8.0)}, bytes(8)), ["no data_offsets"]),
    "offsets are booleans": (pack({"a": spec(False, True, "U8", [1])}, bytes(1)), ["no data_offsets"]),
    "offsets are infinite": (pack({"a": spec(0, float("inf"))}, bytes(8)), ["no data_offsets"]),
    "three offsets": (pack({"a": {**spec(), "data_offsets": [0, 8, 8]}}, bytes(8)), ["no data_offsets"]),
    "negative dimension": (pack({"a": spec(shape=[-2])}, bytes(8)), ["whole numbers"]),
    "two negative dimensions": (pack({"a": spec(shape=[-2, -1])}, bytes(8)), ["whole numbers"]),
    "huge dimension": (pack({"a": spec(shape=[2**63])}, bytes(8)), ["whole numbers"]),
    "dimensions that overflow": (pack({"a": spec(0, 0, shape=[2**32, 2**32])}), ["does not fit its shape"]),
    "dimension is a float": (pack({"a": spec(shape=[2.0])}, bytes(8)), ["whole numbers"]),
    "dimension is true": (pack({"a": spec(0, 4, shape=[True])}, bytes(4)), ["whole numbers"]),
    "dimension is a string": (pack({"a": spec(shape=["2"])}, bytes(8)), ["whole numbers"]),
    "too many dimensions": (pack({"a": spec(0, 4, shape=[1] * 65)}, bytes(4)), ["64 dimensions"]),
    "shape is a number": (pack({"a": {**spec(), "shape": 2}}, bytes(8)), ["no shape"]),
    "no shape": (pack({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), ["no shape"]),
    "no dtype": (pack({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), ["no dtype"]),
    "dtype with a line break": (pack({"a": spec(dtype="F32\n")}, bytes(8)), ["no dtype"]),
    "a tensor is null": (pack({"a": None}), ["not described by a JSON object"]),
    "a name that is half a character": (pack(b'{"\\ud800": {}}'), ["not valid text"]),
    "a name of a megabyte": (pack({"x\n" * 500_000: 1}), ["not described"]),
    "metadata is a list": (pack({"__metadata__": [], **GOOD}, bytes(16)), ["__metadata__"]),
    "metadata holds numbers": (pack({"__metadata__": {"format": 1}, **GOOD}, bytes(16)), ["__metadata__"]),
    "no tensors": (pack({"__metadata__": {"format": "pt"}}), ["hold no tensors"]),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(tmp_path, case):
    raw, words = HEADERS[case]
    (tmp_path / SINGLE).write_bytes(raw)
    refused(lambda: CheckpointReader(tmp_path), str(tmp_path), *words)
    if case != "no tensors":
        refused(lambda: CheckpointReader(tmp_path), SINGLE)


def test_a_header_above_the_limit(tmp_path):
    with open(tmp_path / SINGLE, "wb") as file:
        file.write((100_000_001).to_bytes(8, "little") + b"{")
        file.truncate(200_000_000)
    refused(lambda: CheckpointReader(tmp_path), SINGLE, "the limit of 100000000")


def shards(directory, index=None):
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, directory / FIRST)
    save_file({"c": torch.zeros(2)}, directory / SECOND)
    weight_map = {"a": FIRST, "b": FIRST, "c": SECOND} if index is None else index
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


ESCAPES = [
    "../outside.safetensors", "/etc/passwd", "/outside.safetensors", "sub/x.safetensors", "..", ".", "",
    "a\\b.safetensors", "C:\\x.safetensors", "x\0.safetensors", "\ud800.safetensors", ".hidden.safetensors",
    "./" + FIRST,
]  # fmt: skip


@pytest.mark.parametrize("shard", ESCAPES)
def test_index_entries_that_are_no_plain_names(tmp_path, shard):
    save_file({"c": torch.zeros(2)}, tmp_path / "outside.safetensors")
    (tmp_path / "in" / "sub").mkdir(parents=True)
    shards(tmp_path / "in", {"a": FIRST, "b": FIRST, "c": shard})
    refused(lambda: CheckpointReader(tmp_path / "in"), INDEX, "'c'", "no plain file name")


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "config.json"])
def test_index_entries_that_are_not_safetensors(tmp_path, shard):
    shards(tmp_path, {"a": FIRST, "b": FIRST, "c": shard})
    (tmp_path / shard).write_text("{}")
    refused(lambda: CheckpointReader(tmp_path), INDEX, "'c'", "pickles are never read")


WEIGHT_MAPS = {
    "a missing file": ({"a": FIRST, "b": FIRST, "c": "gone.safetensors"}, ["gone.safetensors", "missing"]),
    "a tensor of another shard": ({"a": FIRST, "b": SECOND, "c": SECOND}, ["'b' is not in " + SECOND]),
    "a tensor of no shard": ({"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND}, ["'d' is not in " + SECOND]),
    "a tensor left out": ({"a": FIRST, "c": SECOND}, ["'b' of " + FIRST, "missing from the index"]),
    "a number": ({"a": FIRST, "b": 2, "c": SECOND}, ["'b' is not a string"]),
    "nothing": ({}, ["weight_map"]),
    "a list": ([FIRST], ["weight_map"]),
}


@pytest.mark.parametrize("case", WEIGHT_MAPS)
def test_indices_that_do_not_fit_the_files(tmp_path, case):
    index, words = WEIGHT_MAPS[case]
    shards(tmp_path, index)
    refused(lambda: CheckpointReader(tmp_path), str(tmp_path), *words)


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "weight_map"),
        (b"\xff", "not UTF-8"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "'a' twice"),
        (b"[" * 100_000, "nested"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
    ],
)
def test_files_that_are_not_a_json_object(tmp_path, raw, word):
    shards(tmp_path)
    reader = CheckpointReader(tmp_path)
    (tmp_path / INDEX).write_bytes(raw)
    refused(lambda: CheckpointReader(tmp_path), INDEX, word)
    if raw != b"{}":
        (tmp_path / "config.json").write_bytes(raw)
        refused(reader.config, "config.json", word)


def test_a_missing_or_absurd_configuration(tmp_path):
    shards(tmp_path)
    reader = CheckpointReader(tmp_path)
    refused(reader.config, "config.json", "missing")
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 40)
    refused(reader.config, "config.json", "far too many")
    os.remove(tmp_path / "config.json")
    os.mkdir(tmp_path / "config.json")
    refused(reader.config, "config.json", "not a regular file")


def test_a_tensor_in_two_files(tmp_path):
    shards(tmp_path)
    save_file({"c": torch.zeros(2), "a": torch.ones(2)}, tmp_path / SECOND)
    refused(lambda: CheckpointReader(tmp_path), "'a'", FIRST, SECOND)
    (tmp_path / INDEX).unlink()
    refused(lambda: CheckpointReader(tmp_path), "'a'", FIRST, SECOND)


def test_a_shard_missing_without_an_index(tmp_path):
    shards(tmp_path)
    (tmp_path / INDEX).unlink()
    assert len(CheckpointReader(tmp_path).tensors) == 3
    (tmp_path / FIRST).unlink()
    refused(lambda: CheckpointReader(tmp_path), FIRST, "missing", "download it")


def test_both_one_file_and_an_index(tmp_path):
    shards(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / SINGLE)
    refused(lambda: CheckpointReader(tmp_path), SINGLE, INDEX, "remove the one")
    for name in (FIRST, SECOND):
        (tmp_path / name).unlink()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE}}))
    assert list(CheckpointReader(tmp_path).tensors) == ["a"]


def test_paths_that_are_no_checkpoint(tmp_path, monkeypatch):
    refused(lambda: CheckpointReader(tmp_path / "absent"), "absent", "no such directory")
    refused(lambda: CheckpointReader(tmp_path / "line\nbreak"), "no such directory")
    refused(lambda: CheckpointReader(f"{tmp_path}/nul\0"), "not a valid path")
    refused(lambda: CheckpointReader(tmp_path / ("x" * 300)), "File name too long")
    refused(lambda: CheckpointReader(tmp_path), str(tmp_path), "no *.safetensors weights")
    (tmp_path / "file").write_text("")
    refused(lambda: CheckpointReader(tmp_path / "file"), "not a directory")
    refused(lambda: CheckpointReader(tmp_path / "file" / "below"), "Not a directory")
    (tmp_path / "loop").symlink_to("loop")
    refused(lambda: CheckpointReader(tmp_path / "loop"), "symbolic links")

    def deny(*_):
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(os, "listdir", deny)
    refused(lambda: CheckpointReader(tmp_path), "cannot be listed (Permission denied)")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"])
def test_pickles_are_never_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    refused(
        lambda: CheckpointReader(tmp_path),
        str(tmp_path),
        "never read",
        "save_pretrained(directory, safe_serialization=True)",
    )


def test_a_file_without_read_permission(tmp_path, monkeypatch):
    shards(tmp_path)
    really_open = os.open

    def deny(path, *arguments):
        if str(path).endswith(SECOND):
            raise PermissionError(13, os.strerror(13))
        return really_open(path, *arguments)

    monkeypatch.setattr(os, "open", deny)
    refused(lambda: CheckpointReader(tmp_path), SECOND, "Permission denied")


@pytest.mark.parametrize("name", [SINGLE, INDEX, "config.json", "tokenizer.json"])
def test_links_out_of_the_directory(tmp_path, name):
    outside = tmp_path / "outside"
    inside = tmp_path / "snapshots" / "inside"
    for directory in (outside, inside, tmp_path / "blobs", tmp_path / "blobs-of-another"):
        directory.mkdir(parents=True)
    save_file({"a": torch.zeros(2)}, inside / (FIRST if name == INDEX else SINGLE))

    def use():
        reader = CheckpointReader(inside)
        reader.config()
        reader.other_files()

    for target in (outside / "secret", tmp_path / "blobs-of-another" / "secret", tmp_path / "blobs" / ".." / "secret"):
        target.write_text('{"secret": 1}')
        (inside / name).unlink(missing_ok=True)
        (inside / name).symlink_to(target)
        if name == "tokenizer.json":
            (inside / "config.json").write_text("{}")
        refused(use, str(inside / name), "symbolic link leaves the checkpoint directory")
    (inside / name).unlink()
    (inside / name).symlink_to("broken")
    refused(use, str(inside / name), "broken symbolic link")
    (inside / name).unlink()
    (inside / name).symlink_to(name)
    refused(use, str(inside / name), "symbolic links")


def test_blobs_that_are_themselves_a_link_out(tmp_path):
    snapshot = tmp_path / "cache" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "elsewhere" / "f00")
    (tmp_path / "cache" / "blobs").symlink_to(tmp_path / "elsewhere")
    (snapshot / SINGLE).symlink_to("../../blobs/f00")
    refused(lambda: CheckpointReader(snapshot), "leaves the checkpoint directory")


def test_linked_folders_are_not_followed(tmp_path):
    shards(tmp_path)
    reader = CheckpointReader(tmp_path)
    (tmp_path / "sub").symlink_to("/etc")
    refused(reader.other_files, "sub", "leaves the checkpoint directory")
    (tmp_path / "sub").unlink()
    (tmp_path / "sub").symlink_to(".")
    refused(reader.other_files, "sub", "not a regular file")


@pytest.mark.parametrize("name", [SINGLE, INDEX, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_what_is_not_a_file_does_not_hang(tmp_path, name, kind):
    save_file({"a": torch.zeros(2)}, tmp_path / ("x" + SINGLE))
    reader = CheckpointReader(tmp_path)
    path = tmp_path / name
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    words = ["leaves the checkpoint directory" if kind == "device" else "not a regular file", str(path)]
    if name in (SINGLE, INDEX):
        refused(lambda: CheckpointReader(tmp_path), *words)
    elif name == "config.json":
        refused(reader.config, *words)
    elif kind == "folder":
        assert reader.other_files() == []
    else:
        refused(reader.other_files, *words)


def judged(directory):
    """What the reader makes of a directory: its tensors, or None if it refuses, properly."""
    with recorded_opens() as opens:
        try:
            reader = CheckpointReader(directory)
            for name, info in reader.tensors.items():
                if DTYPE_BITS.get(info.dtype, 0) >= 8:
                    assert tuple(reader.read(name).shape) == info.shape
            tensors = reader.tensors
        except RequestError as error:
            check_sentence(str(error))
            tensors = None
    paths = [os.path.realpath(path) for path, _ in opens]
    root = os.path.realpath(directory) + os.sep
    assert all(path.startswith(root) for path in paths), paths
    return tensors


def agrees_with_the_library(path, tensors):
    """What the reader accepts, the library accepts too, and sees the same in it."""
    if any(info.dtype not in DTYPE_BITS or "FNUZ" in info.dtype for info in tensors.values()):
        return  # the library refuses the whole file for a dtype that it does not know
    with safe_open(path, "pt") as library:
        assert set(library.keys()) == set(tensors)
        for name, info in tensors.items():
            part = library.get_slice(name)
            assert (part.get_dtype(), tuple(part.get_shape())) == (info.dtype, info.shape)


VALID = pack(
    {"__metadata__": {"format": "pt"}, "a": spec(0, 24, shape=[2, 3]), "b": spec(24, 32, "BF16", [4])}, bytes(32)
)

EDIT = st.one_of(
    st.tuples(st.just("set"), st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=4)),
    st.tuples(st.just("insert"), st.integers(0, len(VALID)), st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("delete"), st.integers(0, len(VALID) - 1), st.integers(1, 40)),
    st.tuples(st.just("truncate"), st.integers(0, len(VALID)), st.none()),
)


@pytest.mark.slow
@settings(max_examples=400, deadline=5000)
@given(edits=st.lists(EDIT, max_size=4), fix_length=st.booleans())
@example(edits=[], fix_length=False)
def test_fuzzed_bytes(tmp_path_factory, edits, fix_length):
    raw = bytearray(VALID)
    for kind, place, value in edits:
        if kind == "set":
            raw[place : place + len(value)] = value
        elif kind == "insert":
            raw[place:place] = value
        elif kind == "delete":
            del raw[place : place + value]
        else:
            del raw[place:]
    if fix_length and len(raw) > 40:
        raw[:8] = (len(raw) - 40).to_bytes(8, "little")
    directory = tmp_path_factory.getbasetemp() / "bytes"
    directory.mkdir(exist_ok=True)
    (directory / SINGLE).write_bytes(raw)
    tensors = judged(directory)
    if tensors is not None:
        agrees_with_the_library(directory / SINGLE, tensors)
    assert edits or tensors is not None


NUMBERS = st.one_of(
    st.integers(-2, 12),
    st.sampled_from(
        [2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 2**64 - 8, 10**30, 1.0, 0.5, True, None, "8"]
    ),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
SPEC = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from([*DTYPE_BITS, "F7", "f32", "", "F32 "]), JSON),
        "shape": st.one_of(st.lists(NUMBERS, max_size=4), JSON),
        "data_offsets": st.one_of(st.lists(NUMBERS, min_size=2, max_size=2), JSON),
        "more": JSON,
    },
)
SOUND = st.builds(
    lambda dtype, shape: (dtype, shape), st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.integers(0, 4), max_size=3)
)


@pytest.mark.slow
@settings(max_examples=400, deadline=5000)
@given(
    sound=st.lists(SOUND, max_size=4),
    changes=st.dictionaries(st.integers(0, 4), st.one_of(SPEC, JSON), max_size=2),
    shifts=st.dictionaries(st.integers(0, 3), st.tuples(st.integers(-3, 3), st.integers(-3, 3)), max_size=1),
    metadata=st.one_of(st.none(), JSON),
    extra=st.integers(-3, 3),
)
def test_fuzzed_headers(tmp_path_factory, sound, changes, shifts, metadata, extra):
    header, end = {}, 0
    for number, (dtype, shape) in enumerate(sound):
        begin, end = end, end + -(-torch.Size(shape).numel() * DTYPE_BITS[dtype] // 8)
        low, high = shifts.get(number, (0, 0))
        header[f"t{number}"] = spec(begin + low, end + high, dtype, shape)
    for number, change in changes.items():
        if isinstance(change, dict) and set(change) <= {"dtype", "shape", "data_offsets", "more"}:
            change = {**header.get(f"t{number}", {}), **change}
        header[f"t{number}"] = change
    if metadata is not None:
        header["__metadata__"] = metadata
    directory = tmp_path_factory.getbasetemp() / "headers"
    directory.mkdir(exist_ok=True)
    (directory / SINGLE).write_bytes(pack(header, bytes(max(0, end + extra))))
    tensors = judged(directory)
    if tensors is not None:
        agrees_with_the_library(directory / SINGLE, tensors)


TENSORS = st.one_of(st.sampled_from(["a", "b", "c", "d"]), st.text(max_size=4))
FILES = st.one_of(st.sampled_from([FIRST, SECOND, SINGLE, *ESCAPES]), st.text(max_size=8), JSON)


@pytest.mark.slow
@settings(max_examples=300, deadline=5000)
@given(
    weight_map=st.one_of(st.dictionaries(TENSORS, FILES, max_size=4), JSON),
    right=st.sets(st.sampled_from(["a", "b", "c"])),
    wrap=st.sampled_from(["weight_map", "weight_map", "weight_map", "weights", None]),
    cut=st.one_of(st.none(), st.none(), st.integers(0, 200)),
)
@example(weight_map={}, right={"a", "b", "c"}, wrap="weight_map", cut=None)
def test_fuzzed_indices(tmp_path_factory, weight_map, right, wrap, cut):
    directory = tmp_path_factory.getbasetemp() / "indices" / "in"
    if not directory.exists():
        directory.mkdir(parents=True)
        shards(directory)
        save_file({"c": torch.zeros(2)}, directory.parent / "outside.safetensors")
    if isinstance(weight_map, dict):
        truth = {"a": FIRST, "b": FIRST, "c": SECOND}
        weight_map = {**weight_map, **{name: truth[name] for name in right}}
    text = json.dumps({wrap: weight_map} if wrap else weight_map)
    (directory / INDEX).write_text(text if cut is None else text[:cut])
    tensors = judged(directory)
    if tensors is not None:
        assert {name: info.file.name for name, info in tensors.items()} == weight_map


def test_the_fuzzers_start_from_something_good(tmp_path):
    (tmp_path / SINGLE).write_bytes(VALID)
    assert set(judged(tmp_path)) == {"a", "b"}
    agrees_with_the_library(tmp_path / SINGLE, judged(tmp_path))
    (tmp_path / SINGLE).unlink()
    shards(tmp_path)
    assert set(judged(tmp_path)) == {"a", "b", "c"}
