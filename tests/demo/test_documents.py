import sysconfig
from pathlib import Path

import pytest

from mea_compress.demo import documents as documents_module
from mea_compress.demo.documents import library_documents, split_documents
from mea_compress.errors import RequestError


@pytest.mark.slow
def test_documents_are_held_out_whole():
    documents = library_documents(2_000_000)
    assert documents == library_documents(2_000_000)
    assert len(set(documents)) == len(documents)
    train, held_out = split_documents(documents, 0.04)
    assert train and held_out and sorted(train + held_out) == sorted(documents)
    assert sum(map(len, held_out)) >= 0.04 * sum(map(len, documents))
    assert sum(len(text.encode()) for text in documents) <= 2_000_000


def test_topics_are_among_the_documents():
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "pydoc_data" / "topics.py").is_file():
        pytest.skip("this Python has no language topics")
    everything = library_documents(100_000_000)
    assert any("Assignment statements" in text and "topics = {" not in text for text in everything)


def test_a_python_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(RequestError, match=r"\.py files"):
        library_documents(1000)
