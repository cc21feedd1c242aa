"""Inputs to documents: every format, order, and a sentence with file and line for what can't be read."""

import gzip
import json
import lzma
import os
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gqa_jax.data import documents
from gqa_jax.data.corpus import SOTU_BYTES
from gqa_jax.data.documents import Format, InputError, Reading, find_sources, read_documents

TEXTS = ["first", "zweite Zeile\r\nmit ü", "", "漢字\u2028\x85 end"]
LINES = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)).encode()


def texts(*inputs, include="*", exclude=None, **form):
    sources = find_sources(inputs, include, exclude).sources
    return [document.text for source in sources for document in read_documents(source, Format(**form), Reading())]


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".jsonl", lambda data: data),
        (".ndjson", lambda data: b"\xef\xbb\xbf" + data + b"\n"),  # byte-order mark, blank line
        (".json.gz", gzip.compress),
        (".jsonl.xz", lzma.compress),
        (".jsonl.zst", lambda data: zstandard.compress(data[:50]) + zstandard.compress(data[50:])),  # two frames
    ],
)
def test_json_lines(tmp_path, suffix, pack):
    path = tmp_path / f"a.b{suffix}"
    path.write_bytes(pack(LINES))
    assert texts(path) == TEXTS
    *_, last = read_documents(find_sources([path]).sources[0], Format(), Reading())
    assert last.position <= path.stat().st_size


def test_zst_with_a_long_window(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # as zstd --long=30 from a pipe
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(LINES) + compressor.flush())
    assert texts(tmp_path) == TEXTS


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": [*TEXTS, None], "n": range(5)}), path, row_group_size=2)
    assert texts(path, text_key="body") == [*TEXTS, ""]
    with pytest.raises(InputError, match=r"a.parquet: no column 'text'; columns: body, n \(--text_key\)"):
        texts(path)
    with pytest.raises(InputError, match=r"a.parquet row 1: 'n' is a int, not text"):
        texts(path, text_key="n")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"a.parquet: not a readable Parquet file"):
        texts(path, text_key="body")


def test_plain_files_are_kept_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    (tmp_path / "b.py.gz").write_bytes(gzip.compress(b"def f(): ...\n"))
    assert texts(tmp_path) == ["one\r\ntwo\n", "def f(): ...\n"]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("separator", ["|", "<>", "aab", "\n\n"])
def test_separator(tmp_path, monkeypatch, block, separator):
    monkeypatch.setattr("gqa_jax.data.documents._READ_BYTES", block)
    text = "üaaab<>x|aabaab\n\n\ny<<>>a|"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert texts(tmp_path, separator=separator) == text.split(separator)


def test_folder_is_sorted_recursive_and_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b/c.md", "a.txt", ".git/config", ".hidden"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert [source.name for source in find_sources([tmp_path]).sources] == ["a/b/c.md", "a/z.txt", "a.txt", "b.txt"]
    assert texts(tmp_path, include="*.txt") == ["a/z.txt", "a.txt", "b.txt"]
    assert texts(tmp_path, exclude="a/*") == ["a.txt", "b.txt"]
    assert texts(tmp_path / "b.txt", tmp_path / "a.txt") == ["b.txt", "a.txt"]
    with pytest.raises(InputError, match=r"no file in this folder \(include '\*.rs'"):
        texts(tmp_path, include="*.rs")


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (["/data/web", "sotu", "hf:a/b@en:test"], ["web", "sotu", "hf:a/b@en:test"]),
        (["/data/en/web", "/data/de/web/", "/data/web"], ["en/web", "de/web", "data/web"]),
        (["x/a.txt", "/a.txt", "./x/a.txt"], ["x/a.txt", "/a.txt", "x/a.txt"]),
    ],
)
def test_origins_are_the_shortest_ends_that_no_other_input_shares(inputs, names):
    assert documents._origins(inputs) == names


def test_sotu():
    (source,) = find_sources(["sotu"]).sources
    read = list(read_documents(source, Format(), Reading()))
    assert len(read) == 233
    assert read[-1].position == source.size == SOTU_BYTES


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken\n", r"a.jsonl:2: not one JSON object a line"),
        (b"[1]\n", r"a.jsonl:2: no field 'text'; it is a list"),
        (b'{"body": "x", "id": 1}\n', r"a.jsonl:2: no field 'text'; its fields: body, id \(--text_key\)"),
        (b'{"text": 5}\n', r"a.jsonl:2: 'text' is a int, not text"),
        (b'{"text": "\xff"}\n', r"a.jsonl:2: byte 10 is no UTF-8; --encoding_errors=replace"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n' + line)
    with pytest.raises(InputError, match=message):
        texts(tmp_path)


def test_bytes_that_are_no_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(InputError, match=r"latin.txt:3: not UTF-8 text \(byte 0xe9\): leave the file out \(--exclude\)"):
        texts(tmp_path)
    assert texts(tmp_path, encoding_errors="replace") == ["one\ntwo\ncaf\ufffd\n"]


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("zst", zstandard.compress), ("xz", lzma.compress)])
def test_damaged_archives_are_errors(tmp_path, suffix, pack):
    path = tmp_path / f"a.jsonl.{suffix}"
    whole = pack(LINES * 1000)
    for damaged in (whole[:-15], b"nonsense that is long enough to be a header"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"a.jsonl.{suffix}:\d+: damaged or unreadable from here on"):
            texts(path)


def test_missing_and_unreadable_inputs(tmp_path, monkeypatch):
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(InputError, match=r"no such file or folder, did you mean .*corpus.txt\?"):
        texts(tmp_path / "corpsu.txt")
    with pytest.raises(InputError, match="named inputs are sotu and hf:NAME"):
        texts("stou")
    with pytest.raises(InputError, match="no input: give files"):
        texts()
    with pytest.raises(InputError, match="separator is empty"):
        texts(tmp_path, separator="")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    with pytest.raises(InputError, match=r"corpus.txt: no permission to read it"):
        texts(tmp_path / "corpus.txt")


class Rows(list):
    """As much of `datasets.Dataset` as is used."""

    column_names = ("text", "url")

    def select_columns(self, names):
        return [{name: row[name] for name in names} for row in self]


def test_hugging_face_dataset(monkeypatch):
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        if path == "gone":
            raise FileNotFoundError("Dataset 'gone' doesn't exist on the Hub")
        return Rows({"text": text, "url": ""} for text in ["one", None, "three"])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert texts("hf:some/set", "hf:some/set@en:test") == ["one", "", "three"] * 2
    assert asked == [("some/set", None, "train"), ("some/set", "en", "test")]
    with pytest.raises(InputError, match="no column 'body'; columns: text, url"):
        texts("hf:some/set", text_key="body")
    with pytest.raises(InputError, match=r"hf:gone: datasets.load_dataset failed: Dataset 'gone' doesn't exist"):
        texts("hf:gone")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'gqa_jax\[datasets\]'"):
        texts("hf:some/set")


@pytest.mark.needs("datasets")
def test_local_folder_by_the_real_library(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert texts(f"hf:{tmp_path / 'set'}") == ["one", "two"]
