"""First bytes decide what a file is, whatever its name says."""

import bz2
import gzip
import io
import json
import lzma
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gqa_jax.data import documents, kinds, rows, streams
from gqa_jax.data.documents import Format, InputError, Reading, find_sources, read_documents
from tests.reading import read, texts

TEXT = "first line\nzweite Zeile mit ü\n" * 400
LINES = "".join(json.dumps({"text": f"line {i} ü"}) + "\n" for i in range(300)).encode()
PACKINGS = {
    "gz": gzip.compress,
    "zst": zstandard.compress,
    "zstd": zstandard.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
}


def write(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


@pytest.mark.parametrize("suffix", PACKINGS)
def test_packed_files(tmp_path, suffix):
    pack = PACKINGS[suffix]
    path = write(tmp_path, f"a.jsonl.{suffix}", pack(LINES[:1000]) + pack(b"") + pack(LINES[1000:]))  # three members
    found, reading = read(path)
    assert [document.text for document in found] == [f"line {i} ü" for i in range(300)]
    assert found[-1].position == path.stat().st_size
    assert reading.notes == []
    assert texts(write(tmp_path, "no suffix", pack(LINES))) == [f"line {i} ü" for i in range(300)]
    assert texts(write(tmp_path, "a.txt", pack(TEXT.encode()))) == [TEXT]
    assert texts(write(tmp_path, "a.txt.gz.xz", lzma.compress(pack(TEXT.encode())))) == [TEXT]
    assert texts(write(tmp_path, "empty.txt", pack(b""))) == [""]


@pytest.mark.parametrize("suffix", PACKINGS)
def test_damage_of_packed_files_is_no_silent_loss(tmp_path, suffix):
    whole = PACKINGS[suffix](LINES * 30)
    # An end that is cut off within a member; other bytes after it. xz and bzip2 would leave those out in silence.
    for damaged in (whole[:-9], whole[: len(whole) // 2], whole[:10], whole + b"other bytes", whole + whole[:7]):
        for bad_lines in ("error", "skip"):
            with pytest.raises(InputError, match=rf"a.jsonl.{suffix}:\d+: damaged or unreadable from here on"):
                texts(write(tmp_path, f"a.jsonl.{suffix}", damaged), bad_lines=bad_lines)
    flipped = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(LINES) if "zst" in suffix else whole)
    flipped[len(flipped) // 2] ^= 0x10
    with pytest.raises(InputError, match=rf"a.txt.{suffix}:\d+: (damaged|not UTF-8)"):
        texts(write(tmp_path, f"a.txt.{suffix}", bytes(flipped)))
    assert texts(write(tmp_path, f"padded.{suffix}", whole + bytes(512)))[0] == "line 0 ü"


def test_documents_before_the_damage_come_first(tmp_path):
    path = write(tmp_path, "a.jsonl.gz", gzip.compress(LINES)[:-4])
    found = read_documents(find_sources([path]).sources[0], Format(), Reading())
    assert [next(found).text for _ in range(300)][-1] == "line 299 ü"
    with pytest.raises(InputError, match=r"a.jsonl.gz:301: damaged"):
        next(found)


def test_zstd_with_a_long_window_and_a_skippable_frame(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # as zstd --long=30 from a pipe
    data = compressor.compress(LINES) + compressor.flush()
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"pzst"
    assert len(texts(write(tmp_path, "a.jsonl.zst", skippable + data))) == 300


def test_packed_too_often(tmp_path):
    data = b"x"
    for _ in range(6):
        data = gzip.compress(data)
    with pytest.raises(InputError, match="packed more than 4 times"):
        texts(write(tmp_path, "a", data))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_utf16_and_utf32(tmp_path, encoding):
    name = encoding[:-3].upper()
    found, reading = read(write(tmp_path, "a.txt", ("\ufeff" + TEXT).encode(encoding)))
    assert [document.text for document in found] == [TEXT]
    assert reading.notes == [f"{tmp_path}/a.txt: {name}, read as such"]
    assert texts(write(tmp_path, "a.jsonl.gz", gzip.compress(("\ufeff" + LINES.decode()).encode(encoding))))[-1] == "line 299 ü"
    assert texts(write(tmp_path, "a.csv", "\ufeffid\ttext\n1\tü\n".encode(encoding))) == ["ü"]  # as Excel writes it
    half = ("\ufeff" + TEXT).encode(encoding)[:-1]
    with pytest.raises(InputError, match=r"a.txt:\d+: damaged .* not valid utf-"):
        texts(write(tmp_path, "a.txt", half))
    assert texts(write(tmp_path, "a.txt", half), encoding_errors="replace") == [TEXT[:-1] + "\ufffd"]
    for suffix in ("txt", "jsonl", "csv"):
        unmarked = (LINES.decode() if suffix == "jsonl" else TEXT).encode(encoding)
        for errors in ("strict", "replace"):
            with pytest.raises(
                InputError, match=rf"looks like {name}[LB]E without a byte-order mark: .*iconv -f {name}[LB]E -t"
            ):
                texts(write(tmp_path, f"a.{suffix}", unmarked), encoding_errors=errors)


def test_utf16_file_of_a_bug_report(tmp_path):
    (text,) = texts("tests/data/inputs/utf16.txt")
    assert text.startswith("hello wörld\nhello")


def zipped():
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.txt", TEXT)
        return file.getvalue()


def arrow(new):
    table = pa.table({"text": ["a", "b"]})
    with pa.BufferOutputStream() as file:
        with new(file, table.schema) as writer:
            writer.write_table(table)
        return file.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (zipped(), "a zip archive: unpack it first"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", r"a PDF: turn it into text first \(pdftotext\)"),
        (b"%PDF-1.4\r\n1 0 obj\n", r"a PDF: turn it into text first"),
        (b"GIF89a\x01\0\x01\0\x80\0\0", r"an image \(GIF\): take it off"),
        (b"PARE" + bytes(range(0x80, 0x90)) + b"PARE", "an encrypted Parquet file: decrypt it first"),
        (b"\x7fELF\x02\x01\x01" + bytes(9), r"a program \(ELF\): take it off"),
        (arrow(pa.ipc.new_file), "an Arrow file: write it as Parquet"),
        (arrow(pa.ipc.new_stream), "an Arrow stream: write it as Parquet"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), r"an image \(PNG\): take it off"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", r"an image \(JPEG\)"),
        (b"SQLite format 3\0" + bytes(80), "an SQLite database"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n",
            r"pointer to a file in Git LFS.*: git lfs pull",
        ),
        (b"a.txt".ljust(257, b"\0") + b"ustar\x0000" + bytes(248), "a tar archive: unpack it"),
        (b"MZ\x90\x00\x03\x00\x00\x00\x04", r"no text but binary data \(a zero byte at 3\): take it off"),
        (gzip.compress(b"\x7fELF\x02\x01\x01", mtime=0), "a program"),
    ],
)
@pytest.mark.parametrize("name", ["x.txt", "x", "x.jsonl", "x.csv"])
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_what_is_no_text_is_named_and_never_replaced(tmp_path, data, message, name, errors):
    with pytest.raises(InputError, match=rf"/{name}: .*{message}") as raised:
        texts(write(tmp_path, name, data), encoding_errors=errors)
    assert "--encoding_errors" not in str(raised.value)


def test_text_that_looks_odd_is_text(tmp_path):
    for text in (
        "BZh is how it begins",
        "PAR1",
        "PK",
        "GIF89a is a format, née GIF87a.",
        "GIF87a",
        "PARENTS and children",
        "%PDF-1.7 is how a file of PDF begins, ça va.\n",
        "%PDF-\n",
        "Rar!",
        "version https://git-lfs.github.com/spec/v1 is its address",
        "ustar".rjust(262),
        "a\0b and some more text",
        "",
        "\x1f",
        "PDF-1.4",
        "ORC",
        "{",
        "[1",
    ):
        assert texts(write(tmp_path, "a.txt", text.encode())) == [text]


def test_advice_for_another_encoding_makes_no_noise(tmp_path):
    few, many = "naïve café, and then more of it\n".encode("latin-1"), ("Привет, мир\n" * 9).encode("cp1251")
    convert = r"it is in another encoding \(often Windows-1252: iconv -f WINDOWS-1252 -t UTF-8\)"
    with pytest.raises(InputError, match=rf"a.txt:1: not UTF-8 text \(byte 0xef\): {convert}.*--encoding_errors=replace"):
        texts(write(tmp_path, "a.txt", few))
    with pytest.raises(InputError, match=rf"a.txt:1: not UTF-8 text .*: {convert}, or no text") as raised:
        texts(write(tmp_path, "a.txt", many))
    assert "replace" not in str(raised.value)
    assert "more than a tenth of its characters is U+FFFD" in read(tmp_path / "a.txt", encoding_errors="replace")[1].notes[0]


def test_names_that_first_bytes_deny(tmp_path):
    assert texts(write(tmp_path, "a.jsonl.gz", LINES))[0] == "line 0 ü"  # unpacked by a browser
    assert read(tmp_path)[1].notes == [f"{tmp_path}/a.jsonl.gz: no gzip file as the name says, read as it is"]
    write(tmp_path, "a.jsonl.gz", zstandard.compress(LINES))
    assert read(tmp_path)[1].notes == [f"{tmp_path}/a.jsonl.gz: zstd and not gzip as the name says, read as such"]
    for data in (b"", b"\x1f"):
        with pytest.raises(InputError, match=r"a.jsonl.gz: \d bytes are no gzip file, cut off\?"):
            texts(write(tmp_path, "a.jsonl.gz", data))
    (tmp_path / "a.jsonl.gz").unlink()
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "a.jsonl")
    found, reading = read(tmp_path)
    assert [document.text for document in found] == ["one"]
    assert reading.notes == [f"{tmp_path}/a.jsonl: Parquet, read as such"]
    with pytest.raises(InputError, match="Parquet within gzip, which can't be read in pieces: unpack it first"):
        texts(write(tmp_path, "a.parquet.gz", gzip.compress((tmp_path / "a.jsonl").read_bytes())))
    for data, begin in ((LINES, "it begins with b'{"), (b"", "it is empty"), (b"<html>", "it begins with b'<html>'")):
        with pytest.raises(InputError, match=f"a.parquet: not a readable Parquet file: {begin}"):
            texts(write(tmp_path, "a.parquet", data))


JSON_OF_TWO = {  # as files hold it, each with texts "a" and "b"
    "lines": b'{"text": "a"}\n{"text": "b"}\n',
    "an array": b'[{"text":"a"},{"text":"b"}]',
    "an array over lines": b' [\n  {\n  "text": "a"},\n {"text": "b"}\n]\n',
    "objects over lines": b'{\n  "text": "a"\n}\n{"text":\n"b"}',
}


@pytest.mark.parametrize("data", JSON_OF_TWO.values(), ids=JSON_OF_TWO)
def test_json_under_another_name(tmp_path, data):
    for name in ("a", "a.txt", "a.log", "a.csv"):
        for stored in (data, gzip.compress(data), b"\xef\xbb\xbf" + data):
            found, reading = read(write(tmp_path, name, stored))
            assert [document.text for document in found] == ["a", "b"]
            assert reading.notes == [f"{tmp_path}/{name}: JSON, read as such"]
            assert reading.kinds["JSON"].files == 1
    what = "looks like JSON without a field 'content' (--text_key): read as plain text"
    for name in ("a", "a.txt"):
        found, reading = read(write(tmp_path, name, data), text_key="content")
        assert [document.text for document in found] == [data.decode()]
        assert reading.notes == [f"{tmp_path}/{name}: {what}"]
    long = data.replace(b'"a"', b'"' + b"a" * 3 * streams.BUFFER_BYTES + b'"')
    assert [len(text) for text in texts(write(tmp_path, "long", long))] == [3 * streams.BUFFER_BYTES, 1]


def test_json_under_another_name_that_is_not_all_in_order(tmp_path):
    for first in (b'{"text": null}\n', b"\n \n", b'{"id": 1, "text": ""}\n'):
        assert texts(write(tmp_path, "a.txt", first + LINES))[-1] == "line 299 ü"
    assert len(texts(write(tmp_path, "a", b'{"id": 7}\n' + LINES), bad_lines="skip")) == 300
    for damaged, place in (
        (b"{cut off\n" + LINES, 1),
        (b"# comment\n" + LINES, 1),
        (LINES.partition(b"\n")[0] + b"\nno JSON" * 200, 2),
    ):
        with pytest.raises(InputError, match=rf"a.txt:{place}: not one JSON object a line"):
            texts(write(tmp_path, "a.txt", damaged))
    with pytest.raises(InputError, match=r"a.txt:1: 'text' is a number, not text"):
        texts(write(tmp_path, "a.txt", b'{"text": 5}\n'))
    with pytest.raises(InputError, match=r"a.txt:1, element 2: damaged JSON"):
        texts(write(tmp_path, "a.txt", JSON_OF_TWO["an array"][:-4]))


def test_what_only_begins_like_json_is_text(tmp_path):
    in_prose = b"In JSON:\n" + LINES[:100] + b"\nand so on.\n" * 9
    for data in (
        b"{% template %}\n",
        b"{" * 5000,
        b"[1, 2]",
        b'["a", "b"]',
        b"[1] Smith, 2020.\n",
        b'{"text": "x"} is JSON',
        in_prose,
    ):
        found, reading = read(write(tmp_path, "a.txt", data))
        assert [document.text for document in found] == [data.decode()]
        assert reading.notes == []
    one_column = b'text\n{"text":1}\n{"text":2}\n'
    assert texts(write(tmp_path, "a.csv", one_column)) == ['{"text":1}', '{"text":2}']
    assert texts(write(tmp_path, "a.txt", b"id,text\n1,one\n")) == ["id,text\n1,one\n"]  # CSV is known by its suffix


def test_what_must_be_held_whole_has_a_limit(tmp_path, monkeypatch):
    for module in (kinds, documents, rows):
        monkeypatch.setattr(module, "LARGEST", 1000)
    with pytest.raises(InputError, match=r"a.txt: a document of more than 1,000 characters: cut the file with --separator"):
        texts(write(tmp_path, "a.txt", b"x " * 501))
    assert len(texts(write(tmp_path, "a.txt", b"x " * 5000), separator=" ")) == 5001
    with pytest.raises(InputError, match=r"a.jsonl:2: a line of more than 1,000 bytes"):
        texts(write(tmp_path, "a.jsonl", b'{"text": "x"}\n{"text": "' + b"x" * 1000 + b'"}\n'))
    with pytest.raises(InputError, match=r"a.json: JSON of more than 1,000 bytes in one piece: make it one object a line"):
        texts(write(tmp_path, "a.json", json.dumps(["x" * 99] * 11, indent=1).encode()))
