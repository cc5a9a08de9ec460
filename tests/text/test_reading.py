"""Every kind of file, by the documents that come out of it, and every way in which one can be wrong."""

import gzip
import json
import os
import random
import subprocess
import sys
import threading
from itertools import pairwise

import pyarrow
import pytest
import zstandard
from letters import character_tokenizer
from pyarrow import parquet

from mea_compress.errors import RequestError
from mea_compress.text import formats
from mea_compress.text.documents import PIECE, Chat, safe_cut, spread_order
from mea_compress.text.reading import read_documents, text_state
from mea_compress.text.sequences import padded_sequences, token_sequences

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def contents(text):
    """Documents of a text, whole: strings, or the messages of conversations; and which are read to their end."""
    documents, running = [], []
    for piece in read_documents(text).texts[0].pieces():
        content = piece.content.messages if isinstance(piece.content, Chat) else piece.content
        if piece.begins:
            documents.append(content)
            running.append(piece.running)
        else:
            documents[-1] += content
    return documents, running


def write_lines(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a", "a.csv", "A.TXT"])
def test_any_other_file_is_one_document(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbfone\r\ntwo \xc3\xa4\n")
    assert contents(tmp_path / name) == (["one\ntwo ä\n"], [True])


def test_lines_of_json(tmp_path):
    # A line separator inside a JSON string is no end of line; half of a surrogate pair is no character.
    (tmp_path / "a.jsonl").write_text('"one"\n\n{"text": "two\u2028three"}\n"\\ud800x"\n" "', encoding="utf-8")
    assert contents(tmp_path / "a.jsonl") == (["one", "two\u2028three", "?x"], [False] * 3)
    assert contents(write_lines(tmp_path / "b.jsonl", {"text": "alone"})) == (["alone"], [True])
    several = write_lines(
        tmp_path / "c.jsonl",
        {"prompt": "What? ", "completion": "That."},
        {"messages": CHAT},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
    )
    assert contents(several)[0] == ["What? That.", CHAT, CHAT]


def test_compressed_files_are_what_is_in_them(tmp_path):
    lines = b'"one"\n"two"\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    # Two frames, as several writers of one file leave them.
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(lines[:6]) + zstandard.compress(lines[6:]))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(lines))
    assert contents(tmp_path / "a.jsonl.gz")[0] == contents(tmp_path / "b.jsonl.zst")[0] == ["one", "two"]
    assert contents(tmp_path / "c.txt.gz")[0] == [lines.decode()]


def test_tables(tmp_path):
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["one", None, "three"]}), tmp_path / "a.parquet")
    assert contents(tmp_path / "a.parquet") == (["one", "three"], [False] * 2)
    parquet.write_table(pyarrow.table({"messages": [CHAT, CHAT]}), tmp_path / "b.parquet")
    assert contents(tmp_path / "b.parquet")[0] == [CHAT, CHAT]
    parquet.write_table(pyarrow.table({"prompt": ["a"], "completion": ["b"]}), tmp_path / "c.parquet")
    assert contents(tmp_path / "c.parquet") == (["ab"], [True])
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "d.parquet")
    with pytest.raises(RequestError, match=r"d\.parquet has the columns body, and none with text"):
        contents(tmp_path / "d.parquet")


def test_tools_may_be_written_as_text(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"messages": CHAT, "tools": '[{"name": "f"}]'}, {"messages": CHAT})
    tools = [piece.content.tools for piece in read_documents(path).texts[0].pieces()]
    assert tools == [[{"name": "f"}], None]


def test_directories_and_patterns_are_their_files_in_order(tmp_path, capsys):
    for name in ("b.txt", "a.txt", "deep/c.md", ".hidden/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    write_lines(tmp_path / "d.jsonl", "x", "y")
    assert contents(tmp_path) == (["a.txt", "b.txt", "x", "y", "deep/c.md"], [True, True, False, False, True])
    assert capsys.readouterr().err == ""
    assert contents(tmp_path / "*.txt")[0] == ["a.txt", "b.txt"]
    assert contents(f"{tmp_path}/**/*.md")[0] == ["deep/c.md"]
    (tmp_path / "model.bin").write_bytes(b"\0\1\2")
    (tmp_path / "empty.txt").touch()
    assert len(contents(tmp_path)[0]) == 5
    assert "2 of 6 files are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "does not exist"),
        ("missing-*.txt", None, "matches no file"),
        ("a.txt", b"fine\n\xff\xfe\xfa", "line 2 of .* not UTF-8"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n", "no text"),
        ("a.bin", b"ab\0c", "NUL"),
        ("a.jsonl", b'"fine"\n{"text": ', "line 2 of .* not JSON"),
        ("a.jsonl", b"\n" + b"[" * 100_000, "line 2 of .* not JSON"),
        ("a.jsonl", b'{"body": "x"}', "line 1 of .* no document"),
        ("a.jsonl", b'{"messages": []}', "no document"),
        ("a.jsonl", b'{"prompt": "x", "completion": [{"role": "user"}]}', "no document"),
        ("a.jsonl", b'{"messages": [{"role": "user"}], "tools": "["}', "tools that are not JSON"),
        ("a.jsonl", b"3", "no document"),
        ("a.jsonl", b'"\xff"', "line 1 of .* not UTF-8"),
        ("a.txt.gz", b"plain", "damaged"),
        ("a.txt.gz", gzip.compress(b"some text" * 99, mtime=0)[:-12], "damaged"),
        ("a.txt.zst", b"plain", "damaged"),
        ("a.parquet", b"plain", "damaged"),
    ],
)
def test_texts_refused(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=says) as error:
        padded_sequences(read_documents(tmp_path / name), character_tokenizer(), 4)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_file_is_called_by_its_kind(tmp_path):
    with pytest.raises(RequestError, match="/dev/null is a device"):
        read_documents("/dev/null")
    with pytest.raises(RequestError, match=r"directory .* has no files"):
        read_documents(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"\xff")
    with pytest.raises(RequestError, match="1 files and none of them is text"):
        read_documents(tmp_path)
    with pytest.raises(RequestError, match="names nothing"):
        read_documents([])
    with pytest.raises(RequestError, match="read once"):
        read_documents(["-", "-"])


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, library in (("a.zst", "zstandard"), ("a.parquet", "pyarrow"), ("dataset:x", "datasets")):
        (tmp_path / name).write_text("x")
        with pytest.raises(RequestError, match=rf"needs {library}, .*pip install 'mea-compress\[{library}\]'"):
            read_documents(name if ":" in name else tmp_path / name)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (b"one\ntwo", ["one\ntwo"]),
        (b'\n"one"\n{"text": "two"}', ["one", "two"]),
        (b'"one" he said\nand went', ['"one" he said\nand went']),
        (b"", []),
    ],
)
def test_streams_are_what_their_first_line_is(tmp_path, monkeypatch, given, expected):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(given,))
    writer.start()
    assert contents(pipe)[0] == expected
    writer.join()
    read, write = os.pipe()
    os.write(write, given)
    os.close(write)
    with os.fdopen(read) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert contents("-")[0] == expected


@pytest.mark.slow
@pytest.mark.process
def test_standard_input_is_read_no_further_than_is_asked_for():
    script = (
        "from letters import character_tokenizer; from mea_compress.text.reading import read_documents\n"
        "from mea_compress.text.sequences import padded_sequences\n"
        "print(padded_sequences(read_documents('-'), character_tokenizer(), 16, limit=3)[0].shape)"
    )
    with subprocess.Popen(["yes", "some words"], stdout=subprocess.PIPE) as endless:
        done = subprocess.run(
            [sys.executable, "-c", script],
            stdin=endless.stdout,
            capture_output=True,
            text=True,
            timeout=100,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        endless.kill()
    assert "[3, 16]" in done.stdout, done.stderr


def test_data_sets(tmp_path, monkeypatch):
    directory = tmp_path / "set"
    directory.mkdir()
    write_lines(directory / "train.jsonl", {"text": "one"}, {"text": "two"})
    write_lines(directory / "test.jsonl", {"text": "three"})
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert contents(f"dataset:{directory}")[0] == ["one", "two"]
    assert contents(f"dataset:{directory}:test")[0] == ["three"]
    with pytest.raises(RequestError, match=r"dataset:.*:nosuch cannot be read .*check its name and split"):
        contents(f"dataset:{directory}:nosuch")
    with pytest.raises(RequestError, match=r"dataset:.*/nowhere cannot be read"):
        contents(f"dataset:{tmp_path}/nowhere")


def test_data_sets_of_a_hub_are_streamed(monkeypatch):
    import datasets

    def load_dataset(name, *, split, streaming):
        assert (name, split, streaming) == ("someone/books", "train[:1%]", True)
        return iter([{"messages": CHAT, "id": 1}, {"messages": CHAT, "id": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert contents("dataset:someone/books:train[:1%]")[0] == [CHAT, CHAT]


def test_the_state_of_a_text_is_that_of_all_its_files(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/one.txt", "a/two.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    names = [tmp_path / "a", tmp_path / "b.txt", "-", "dataset:x"]
    before = text_state(names)
    assert before == text_state(names) and len(before) == 5 and before[3:] == ["-", "dataset:x"]
    (tmp_path / "a/two.txt").write_text("changed")
    assert before != text_state(names)
    with pytest.raises(RequestError, match="does not exist"):
        text_state(tmp_path / "c.txt")


@pytest.mark.parametrize("separator", ["\n", " ", ""])
def test_pieces_put_together_are_the_file(tmp_path, separator):
    words = ["wörd" * 3, "x", "\u2028", "日本"]
    text = separator.join(random.Random(0).choices(words, k=60_000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = list(read_documents(tmp_path / "a.txt").texts[0].pieces())
    assert "".join(piece.content for piece in pieces) == text
    assert len(pieces) > 2 and max(len(piece.content) for piece in pieces) <= 2 * PIECE
    if separator:
        borders = pairwise(pieces)
        assert all(before.content[-1] == "\n" or behind.content[0] == " " for before, behind in borders)


def test_texts_are_cut_before_lines_else_between_words():
    assert safe_cut("aaaa\n\nbb cc") == 6
    assert safe_cut("aa\n\nb\n c d") == 8
    assert safe_cut("aaaaaa bb\n") == 6
    assert safe_cut("a\nbbbbbbbb") == safe_cut("aaaa\n  bbb") == 10


@pytest.mark.parametrize("count", [0, 1, 2, 7, 100, 4181])
def test_any_beginning_of_the_order_is_spread(count):
    order = list(spread_order(count, seed=3))
    assert sorted(order) == list(range(count))
    for taken in (2, 5, 20):
        if taken < count:
            places = sorted(order[:taken])
            gaps = [b - a for a, b in zip(places, [*places[1:], places[0] + count], strict=True)]
            assert max(gaps) <= 3 * count / taken
    assert count < 100 or order != list(spread_order(count, seed=5))


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_blocks_hold_every_line_once_at_most(tmp_path, suffix):
    lines = [f"{number} " + "wörter " * (number % 9) for number in range(900)]
    path = tmp_path / f"a.{suffix}"
    if suffix == "txt":
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        write_lines(path, *lines)
    (text,) = read_documents(path).texts
    pieces = [piece.content for piece in text.spread(512, seed=1)]
    if suffix == "jsonl":
        assert sorted(pieces) == sorted(lines)
        return
    seen = [line for piece in pieces for line in piece.splitlines()]
    assert all(piece.splitlines()[0] in lines for piece in pieces)
    assert len(set(seen) & set(lines)) > 0.8 * len(lines)
    assert len([line for line in seen if line in lines]) == len(set(seen) & set(lines))


def test_blocks_say_the_line_that_is_wrong(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'"fine"\n' * 700 + b"{\n" + b'"fine"\n' * 700)
    with pytest.raises(RequestError, match="line 701 of"):
        list(read_documents(tmp_path / "a.jsonl").texts[0].spread(1024, seed=0))
    (tmp_path / "a.txt").write_bytes(b"fine\n" * 700 + b"\xff\n" + b"fine\n" * 700)
    with pytest.raises(RequestError, match="line 701 of"):
        list(read_documents(tmp_path / "a.txt").texts[0].spread(1024, seed=0))


def test_what_can_be_read_in_order_only_takes_its_turns(tmp_path):
    hexadecimal = random.Random(0).randbytes(200_000).hex()
    (tmp_path / "a.txt").write_text("wx " * 400_000)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(hexadecimal.encode()))
    pieces = list(read_documents(tmp_path).texts[0].spread(PIECE, seed=0))
    kinds = "".join("a" if "w" in piece.content else "b" for piece in pieces)
    assert "".join(piece.content for piece in pieces if "w" not in piece.content) == hexadecimal
    assert "bab" in kinds and all(piece.begins for piece in pieces)


def test_only_what_is_needed_of_a_large_file_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("some words of a text\n" * 200_000)
    blocks = []
    plain = formats.running_block
    monkeypatch.setattr(
        "mea_compress.text.reading.running_block", lambda *given: (blocks.append(given), plain(*given))[1]
    )
    rows = token_sequences(read_documents(path), character_tokenizer(), 64, limit=4)
    assert rows.shape == (4, 64) and len(blocks) < 40
    assert max(end for _, _, end in blocks) > 2_000_000
    assert path.stat().st_size > 4_000_000
