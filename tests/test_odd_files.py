"""Hundreds of odd files: each gives its documents, or an InputError that names it; no traceback, no hang, no silent loss."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import time
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gqa_jax.data import sources
from gqa_jax.data.documents import Format, InputError, Reading, find_sources, read_documents

PACKINGS = {"gz": gzip.compress, "zst": zstandard.compress, "xz": lzma.compress, "bz2": bz2.compress}
SUFFIXES = ["", ".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz", ".jsonl.gz", ".txt.zst", ".xz", ".bz2", ".md"]
ENCODINGS = ["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1251", "utf-16-le", "utf-32-be"]
NAMES = [
    "plain",
    "two\nlines",
    "tab\t spaces ",
    "ünïcödé",
    "日本語",
    "-rf",
    "'\"",
    "*?[x]",
    "a.b.c",
    os.fsdecode(b"\xff\xfe"),
]
N_ROWS = 40
SECONDS = 2.0  # for one file; most take a thousandth


def odd_files():
    """Suffix, bytes, and what is checked: "text" (all is kept), "lines" (all are read or counted), "rows" (N_ROWS), or None."""
    generator = random.Random(7)
    rows = [{"id": i, "text": odd_text(generator, generator.randrange(80)), "s": "ab"[i % 2]} for i in range(N_ROWS)]
    lines = "".join(json.dumps(row, ensure_ascii=row["id"] % 2 == 0) + "\n" for row in rows).encode()
    whole = {
        ".jsonl": lines,
        ".json": json.dumps(rows, indent=1).encode(),
        ".csv": table(rows),
        ".parquet": parquet(rows),
        ".txt": "\n".join(row["text"] for row in rows).encode(),
        **{f".jsonl.{suffix}": pack(lines) for suffix, pack in PACKINGS.items()},
    }
    for _ in range(50):
        yield generator.choice(SUFFIXES), generator.randbytes(generator.choice([1, 2, 9, 100, 3000])), None
    for suffix, data in whole.items():
        for _ in range(7):
            yield suffix, data[: generator.randrange(len(data))], None
            yield suffix, mutated(generator, data), None
        yield generator.choice(SUFFIXES), data, None  # under another name
        if suffix not in (".csv", ".txt"):  # what these are, no first bytes tell
            yield generator.choice(["", ".txt", ".md", ".log"]), data, "rows"
    for _ in range(40):
        yield ".jsonl", mutated(generator, lines), "lines"
        text, encoding = odd_text(generator, generator.randrange(1, 2000)), generator.choice(ENCODINGS)
        yield generator.choice([".txt", "", ".md"]), text.encode(encoding, "ignore"), "text" if "utf-8" in encoding else None
    yield ".txt", b"x" * 3_000_000, "text"
    yield ".jsonl", b'{"text": "' + b"y" * 3_000_000 + b'"}', "lines"
    yield ".csv", b"text\n" + b"z" * 3_000_000, None
    for opening in (b"[", b'{"text": ', b'[{"a": ', b'{"a":['):
        for n in (10, 900, 50_000):
            yield generator.choice([".json", ".jsonl", ".txt"]), opening * n, None
            yield ".jsonl", b'{"text": "before"}\n' + opening * n + b'1\n{"text": "after"}\n', "lines"
    marks = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff\0", b"PAR1", b"PAR1PAR1", b"PK")
    for data in (b"", b"\n", b" \n\t\n", b"\0", b"\0" * 4096, *marks):
        for suffix in (".txt", ".jsonl", ".csv", ".parquet"):
            yield suffix, data, None
    yield ".txt", gzip.compress(zstandard.compress(bytes(8 << 20))), None
    yield ".jsonl.gz", gzip.compress(gzip.compress(lines)), None
    for ending in (b"\r\n", b"\r"):
        yield ".jsonl", lines.replace(b"\n", ending), "lines"
    yield ".json", b"NaN", "lines"
    yield ".json", b'{"text": "a", "text": "b"}', "lines"
    yield ".jsonl", b'{"text": "\\ud800"}\n{"text": "\\udfff\\ud83d"}\n', "lines"
    for path in sorted(Path("tests/data/inputs").iterdir()):
        yield path.suffix, path.read_bytes(), "lines" if path.suffix == ".jsonl" else None


def odd_text(generator, length):
    ranges = [(32, 127), (9, 14), (0xC0, 0x250), (0x4E00, 0x4F00), (0x1F600, 0x1F640)]
    return "".join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(length))


def table(rows):
    with io.StringIO(newline="") as file:
        csv.writer(file).writerows([list(rows[0]), *(row.values() for row in rows)])
        return file.getvalue().encode()


def parquet(rows):
    with io.BytesIO() as file:
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=7)
        return file.getvalue()


def mutated(generator, data):
    data = bytearray(data)
    for _ in range(generator.randrange(1, 6)):
        place = generator.randrange(len(data))
        match generator.randrange(4):
            case 0:
                data[place] = generator.randrange(256)
            case 1:
                data[place] ^= 1 << generator.randrange(8)
            case 2:
                del data[place : place + generator.randrange(1, 9)]
            case 3:
                data[place:place] = generator.randbytes(generator.randrange(1, 9))
    return bytes(data)


FILES = [(f"{i:03} {NAMES[i % len(NAMES)]}{suffix}", data, check) for i, (suffix, data, check) in enumerate(odd_files())]
SKIP = {"bad_lines": "skip"}


@pytest.mark.parametrize("options", [{}, SKIP, {**SKIP, "encoding_errors": "replace"}, {**SKIP, "source_key": "s"}], ids=str)
def test_every_file_gives_documents_or_a_sentence(tmp_path, options):
    assert len(FILES) > 300
    n_documents = n_errors = 0
    for name, data, check in FILES:
        path, reading, error = tmp_path / name, Reading(), None
        path.write_bytes(data)
        begin = time.perf_counter()
        try:
            with warnings.catch_warnings(action="error"):
                documents = list(read_documents(find_sources([path]).sources[0], Format(**options), reading))
        except InputError as raised:
            error = str(raised)
        assert time.perf_counter() - begin < SECONDS, name
        if error is None:
            n_documents += 1
            check_nothing_is_lost(data, check, documents, reading)
            assert options or not reading.bad_lines, name
        else:
            n_errors += 1
            assert error.startswith(sources.shown(path)), (name, error)
            assert error.isprintable(), (name, error)
            assert len(error) < 2000, (name, error)
            is_right = {"text": "source_key" in options, "lines": "bad_lines" not in options, "rows": False, None: True}
            assert is_right[check], (name, error)
        path.unlink()
    assert min(n_documents, n_errors) > 60, (n_documents, n_errors)


def check_nothing_is_lost(data, check, documents, reading):
    texts = [document.text for document in documents]
    bad = sum(lines.count for lines in reading.bad_lines.values())
    if check == "lines":
        assert len(texts) + bad == sum(bool(line.strip()) for line in data.split(b"\n"))
    if check == "rows":
        assert len(texts) == N_ROWS
        assert not bad
    if check == "text":
        assert "".join(texts) == data.decode("utf-8-sig")
    assert sum(kind.documents for kind in reading.kinds.values()) == len(texts)
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    assert sum(kind.text_bytes for kind in reading.kinds.values()) == size


def test_a_folder_of_texts_with_odd_names_is_read_in_order(tmp_path):
    texts = {name: data for name, data, check in FILES if check == "text"}
    for name, data in texts.items():
        (tmp_path / name).write_bytes(data)
    found = find_sources([tmp_path]).sources
    assert [source.name for source in found] == sorted(texts)
    read = [document.text for source in found for document in read_documents(source, Format(), Reading())]
    assert read == [texts[name].decode("utf-8-sig") for name in sorted(texts)]
