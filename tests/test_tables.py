"""CSV, TSV, Parquet and datasets: rows in order, and a sentence with the row for what can't be read."""

import csv
import datetime
import io
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gqa_jax.data import rows
from gqa_jax.data.documents import InputError
from tests.reading import read, texts

INPUTS = Path("tests/data/inputs")
TEXTS = ["first", "zweite Zeile\r\nmit ü", "", '漢字, "quoted"\t;|\u2028\x85 end']


STRINGS, BYTES = ("string", "large_string", "string_view"), ("binary", "large_binary", "binary_view")


def write(tmp_path, data, name="a.csv"):
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return tmp_path / name


def write_parquet(tmp_path, columns, **options):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", **options)
    return tmp_path / "a.parquet"


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t"), ("csv", ";"), ("csv", "\t"), ("tsv", "|")])
def test_csv(tmp_path, suffix, delimiter):
    with io.StringIO(newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\r\n" if delimiter == ";" else "\n")
        writer.writerows([["id", " text", "s"], *([i, text, f"of {i % 2}"] for i, text in enumerate(TEXTS))])
        data = "\ufeff" + file.getvalue() + "\n"
    documents, reading = read(write(tmp_path, data, f"a.{suffix}"))
    assert [document.text for document in documents] == TEXTS
    assert [document.source for document in documents] == [f"a.{suffix}"] * 4
    assert reading.kinds[suffix.upper()].documents == 4
    assert documents[-1].position <= len(data.encode())
    assert [document.source for document in read(tmp_path, source_key="s")[0]] == ["of 0", "of 1", "of 0", "of 1"]
    with pytest.raises(InputError, match=rf"a.{suffix}: no column 'body'; columns: .* \(--text_key\)"):
        texts(tmp_path, text_key="body")
    with pytest.raises(InputError, match=r"no column 'url'; columns: id, text, s \(--source_key\)"):
        texts(tmp_path, source_key="url")


def test_large_fields_and_small_tables(tmp_path):
    long = "x" * 1_000_000 + '"\n'
    assert texts(write(tmp_path, 'text\n"' + long.replace('"', '""') + '"\n')) == [long]
    assert texts(write(tmp_path, "text")) == texts(write(tmp_path, "text\n\n\n")) == texts(write(tmp_path, "")) == []
    assert texts(write(tmp_path, "text\nlast line without an end")) == ["last line without an end"]


@pytest.mark.parametrize(
    ("row", "message", "reason"),
    [
        ("3", r"2 \(line 4\): 1 columns, the header 2", "another number of columns than the header"),
        ("3,x,y", r"2 \(line 4\): 3 columns, the header 2", "another number of columns than the header"),
        ('3,"x"y', r"2 \(line 4\): no row of a table \('.*' expected after", "no row of a table"),
        ("3,x\ry", r"2 \(line 4\): no row of a table \(new-line character", "no row of a table"),
        (b"3,caf\xe9", r"2 \(line 4\): byte 5 of line 4 is no UTF-8: it is in another encoding", "no UTF-8"),
        (b'3,"one\ncaf\xe9"', r"2 \(line 4\): byte 3 of line 5 is no UTF-8: it is in another encoding", "no UTF-8"),
    ],
)
def test_bad_rows_of_csv(tmp_path, row, message, reason):
    row = row if isinstance(row, bytes) else row.encode()
    path = write(tmp_path, b'id,text\n1,"two\nlines"\n' + row + b"\n4,after\n" + row + b"\n5,end")
    with pytest.raises(InputError, match=rf"a.csv row {message}.*; --bad_lines=skip"):
        texts(path)
    documents, reading = read(path, bad_lines="skip")
    assert [document.text for document in documents] == ["two\nlines", "after", "end"]
    assert {name: (bad.count, bad.first) for name, bad in reading.bad_lines.items()} == {reason: (2, f"{path} row 2 (line 4)")}
    if reason == "no UTF-8":
        assert len(texts(path, encoding_errors="replace")) == 5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('text\n"one\ntwo\nthree', r" row 1 \(line 2\): a field in quotes that does not end as one \(unexpected end"),
        ('text\n"one\ntwo"x\nthree', r" row 1 \(line 2\): a field in quotes that does not end as one"),
        ('te"xt\n', r": no column 'text'; columns: te\"xt"),
        ('"te\nxt', r":2: no header of a table: unexpected end"),
        (b"caf\xe9,text\nx,y", r":1: byte 3 of line 1 is no UTF-8"),
        ("text\rone\rtwo", r":1: no header of a table: new-line character"),
        ("Only prose, in a file\nthat is called .csv", r": no column 'text'; columns: Only prose, in a file \(--text_key\)"),
    ],
)
def test_tables_that_are_none(tmp_path, data, message):
    with pytest.raises(InputError, match=f"a.csv{message}"):
        texts(write(tmp_path, data), bad_lines="skip")


@pytest.mark.parametrize("name", [*STRINGS, "dictionary", *BYTES])
def test_parquet(tmp_path, name):
    values = [*TEXTS, None] * 3
    if name in BYTES:
        column = pa.array([None if value is None else value.encode() for value in values], getattr(pa, name)())
    else:
        column = pa.array(values)
        column = column.dictionary_encode() if name == "dictionary" else column.cast(getattr(pa, name)())
    path = write_parquet(tmp_path, {"n": range(15), "body": column, "s": [f"of {i}" for i in range(15)]}, row_group_size=4)
    documents, reading = read(path, text_key="body")
    assert [document.text for document in documents] == [*TEXTS, ""] * 3
    assert documents[-1].position == path.stat().st_size
    assert reading.kinds["Parquet"].files == 1
    assert reading.kinds["Parquet"].text_bytes == 3 * sum(len(text.encode()) for text in TEXTS)
    assert [document.source for document in read(path, text_key="body", source_key="n")[0]] == [str(i) for i in range(15)]
    assert [document.source for document in read(path, text_key="body", source_key="s")[0]][-1] == "of 14"


def test_parquet_columns_that_are_no_text(tmp_path):
    columns = {
        "n": [1],
        "list": [["a"]],
        "struct": [{"text": "a"}],
        "null": pa.nulls(1),
        "a.b": ["dotted"],
        "day": [datetime.date(2020, 1, 2)],
    }
    path = write_parquet(tmp_path, columns)
    with pytest.raises(InputError, match=r"a.parquet: no column 'text'; columns: n, list, struct, null, a.b, day"):
        texts(path)
    for key, kind in (("n", "int64"), ("list", "list<.*string>"), ("struct", "struct<text: string>"), ("day", "date32.*")):
        with pytest.raises(InputError, match=rf"a.parquet: column '{key}' is {kind}, not text \(--text_key\)"):
            texts(path, text_key=key)
    assert texts(path, text_key="null") == [""]
    assert texts(path, text_key="a.b") == ["dotted"]
    assert read(path, text_key="a.b", source_key="day")[0][0].source == "2020-01-02"
    with pytest.raises(InputError, match=r"column 'list' is .*, not text \(--source_key\)"):
        texts(path, text_key="a.b", source_key="list")
    with pytest.raises(InputError, match=r"a.parquet row 1: 'null' is null and names no source \(--source_key\)"):
        texts(path, text_key="a.b", source_key="null")


def test_parquet_of_no_rows_and_of_long_ones(tmp_path, monkeypatch):
    assert texts(write_parquet(tmp_path, {"text": pa.array([], pa.string())})) == []
    monkeypatch.setattr(rows, "BATCH_BYTES", 1000)
    long = [f"{i} " * 1000 for i in range(20)]
    assert texts(write_parquet(tmp_path, {"text": long})) == long


def test_parquet_bytes_that_are_no_utf8(tmp_path):
    with pytest.raises(InputError, match=r"badutf8.parquet row 1: byte 4 of its text is no UTF-8: write it as UTF-8, or"):
        texts(INPUTS / "badutf8.parquet")
    replaced = texts(INPUTS / "badutf8.parquet", encoding_errors="replace")
    assert replaced == [f"bad \ufffd byte {i}" for i in range(30)]
    assert texts(INPUTS / "binary.parquet") == [f"doc number {i} says hello" for i in range(30)]
    path = write_parquet(tmp_path, {"text": [b"one", b"\xff", None, b"four"]})
    documents, reading = read(path, bad_lines="skip")
    assert [document.text for document in documents] == ["one", "", "four"]
    assert reading.bad_lines["no UTF-8"].first == f"{path} row 2"


def test_damaged_parquet(tmp_path, monkeypatch):
    texts_of_rows = [f"{i} " * 50 for i in range(500)]
    whole = write_parquet(tmp_path, {"text": texts_of_rows}, write_page_checksum=True, compression="none").read_bytes()
    for end in (5, len(whole) // 2, len(whole) - 10, len(whole) - 1):
        with pytest.raises(InputError, match=r"a.parquet: not a readable Parquet file"):
            texts(write(tmp_path, whole[:end], "a.parquet"), bad_lines="skip")
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1  # within a text: nothing but its checksum tells
    with pytest.raises(InputError, match=r"a.parquet.*: not a readable Parquet file: .*CRC"):
        texts(write(tmp_path, bytes(flipped), "a.parquet"))
    write(tmp_path, whole, "a.parquet")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda self, **_: iter([self.read().to_batches()[0][:499]]))
    with pytest.raises(InputError, match=r"a.parquet: not a readable Parquet file: 499 rows, and 500 by its own account"):
        texts(tmp_path / "a.parquet")


class Rows(list):
    """As much of `datasets.Dataset` as is used."""

    column_names = ("text", "url")
    fails_at = None

    def select_columns(self, names):
        for number, row in enumerate(self):
            if number == self.fails_at:
                raise RuntimeError("a shard is damaged")
            yield {name: row[name] for name in names}


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
    with pytest.raises(InputError, match="input hf:some/set: no column 'body'; columns: text, url"):
        texts("hf:some/set", text_key="body")
    with pytest.raises(InputError, match=r"hf:some/set row 0: 'url' is empty and names no source \(--source_key\)"):
        texts("hf:some/set", source_key="url")
    monkeypatch.setattr(Rows, "fails_at", 2)
    with pytest.raises(InputError, match=r"hf:some/set row 2: damaged or unreadable from here on: a shard is damaged"):
        texts("hf:some/set")
    with pytest.raises(InputError, match=r"hf:gone: datasets.load_dataset failed: Dataset 'gone' doesn't exist"):
        texts("hf:gone")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[datasets\]'"):
        texts("hf:some/set")


@pytest.mark.needs("datasets")
def test_local_folder_by_the_real_library(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "one", "s": 1}\n{"text": "two", "s": 2}\n')
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert texts(f"hf:{tmp_path / 'set'}") == ["one", "two"]
    assert [document.source for document in read(f"hf:{tmp_path / 'set'}", source_key="s")[0]] == ["1", "2"]
