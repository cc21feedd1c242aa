"""Documents of plain files and of the corpus, their sources, and what is counted on the way."""

import gzip
import json

import pytest

from gqa_jax.data.corpus import SOTU_BYTES
from gqa_jax.data.documents import Format, InputError, Reading, find_sources, read_documents
from tests.reading import read, texts


def test_plain_files_are_kept_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\xef\xbb\xbf")
    (tmp_path / "b.py.gz").write_bytes(gzip.compress(b"def f(): ...\n"))
    assert texts(tmp_path) == ["one\r\ntwo\n\ufeff", "def f(): ...\n"]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("separator", ["|", "<>", "aab", "\n\n", None])
def test_separator(tmp_path, monkeypatch, block, separator):
    monkeypatch.setattr("gqa_jax.data.documents._READ_BYTES", block)
    text = "üaaab<>x|aabaab\n\n\ny<<>>a|"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert texts(tmp_path, separator=separator) == ([text] if separator is None else text.split(separator))


def test_separator_of_lines_that_end_as_on_windows():
    found = texts("tests/data/inputs/crlf.txt", separator="\r\n\r\n")
    assert len(found) == 40
    assert found[1] == "paragraph 1 of a text"


def test_bytes_that_are_no_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(
        InputError, match=r"latin.txt:3: not UTF-8 text \(byte 0xe9\): it is in another encoding .*iconv.* leave"
    ):
        texts(tmp_path)
    assert texts(tmp_path, encoding_errors="replace") == ["one\ntwo\ncaf\ufffd\n"]
    (tmp_path / "latin.txt").write_bytes("cut off ü".encode()[:-1])
    with pytest.raises(InputError, match=r"latin.txt:1: not UTF-8 text \(byte 0xc3\)"):
        texts(tmp_path)


def test_sotu():
    (source,) = find_sources(["sotu"]).sources
    found = list(read_documents(source, Format(), Reading()))
    assert len(found) == 233
    assert found[-1].position == source.size == SOTU_BYTES
    assert {document.source for document in found} == {"sotu"}


def test_counts_of_a_reading(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ü"}\n{"text": 5}\n{"text": ""}\n', encoding="utf-8")
    (tmp_path / "b.json").write_text('["漢字"]\n5', encoding="utf-8")
    for name in ("c.txt", "d", "e.md"):
        (tmp_path / name).write_text("äx", encoding="utf-16")
    (tmp_path / "f.txt").write_bytes(b"")
    _, reading = read(tmp_path, "sotu", bad_lines="skip")
    assert {kind: (found.files, found.documents, found.text_bytes) for kind, found in reading.kinds.items()} == {
        "JSON": (2, 2, 2),
        "plain text": (4, 4, 9),
        "embedded corpus": (1, 233, SOTU_BYTES),
    }
    assert {reason: (bad.count, bad.first) for reason, bad in reading.bad_lines.items()} == {
        "'text' is a number": (1, f"{tmp_path}/a.jsonl:2"),
        "no object": (2, f"{tmp_path}/b.json:1"),
    }
    assert reading.notes == [
        f"{tmp_path}/b.json: none of its lines or rows can be used",
        f"{tmp_path}/c.txt and 2 more: UTF-16, read as such",
        f"{tmp_path}/f.txt: empty",
    ]
    # What was taken so far is counted when a reader stops early, as the training of a BPE does.
    reading = Reading()
    documents = read_documents(find_sources([tmp_path / "a.jsonl"]).sources[0], Format(), reading)
    next(documents)
    documents.close()
    assert reading.kinds["JSON"].documents == 1


def test_text_bytes_of_long_texts(tmp_path):
    text = "漢ü x" * 100_000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert read(tmp_path)[1].kinds["plain text"].text_bytes == len(text.encode())


def test_source_key(tmp_path):
    path = tmp_path / "a.jsonl"
    values = ["en", "de", 7, 1.5, True, "en"]
    path.write_text("".join(json.dumps({"text": f"{i}", "from": value}) + "\n" for i, value in enumerate(values)))
    assert [document.source for document in read(path)[0]] == ["a.jsonl"] * 6
    assert [document.source for document in read(path, source_key="from")[0]] == ["en", "de", "7", "1.5", "True", "en"]
    for fields, message, reason in (
        ({}, r"no field 'from'; its fields: text \(--source_key\)", "no field 'from'"),
        ({"from": None}, r"'from' is null and names no source \(--source_key\)", "'from' is null"),
        ({"from": " "}, r"'from' is empty and names no source", "'from' is empty"),
        ({"from": ["en"]}, r"'from' is a list and names no source", "'from' is a list"),
        ({"from": "x" * 300}, r"'from' is longer than 200 characters", "'from' is longer than 200 characters"),
    ):
        path.write_text('{"text": "a", "from": "en"}\n' + json.dumps({"text": "b", **fields}) + "\n")
        with pytest.raises(InputError, match=rf"a.jsonl:2: {message}"):
            read(path, source_key="from")
        assert list(read(path, source_key="from", bad_lines="skip")[1].bad_lines) == [reason]
    path.write_text('["only a text"]')
    with pytest.raises(InputError, match=r"a.jsonl:1, element 1: a text without fields, and no 'from'"):
        read(path, source_key="from")
    (tmp_path / "b.txt").write_text("text")
    for entry in (tmp_path / "b.txt", "sotu"):
        with pytest.raises(InputError, match=r"(b.txt|sotu): plain text has no fields, and no 'from' .*leave --source_key out"):
            read(entry, source_key="from")


def test_formats_that_make_no_sense():
    with pytest.raises(InputError, match="separator is empty"):
        Format(separator="")
    with pytest.raises(InputError, match="--bad_lines=ignore: must be error or skip"):
        Format(bad_lines="ignore")
    with pytest.raises(InputError, match="--encoding_errors=ignore: must be strict or replace"):
        Format(encoding_errors="ignore")
