"""JSON in every layout, and what is wrong with a line of it."""

import json
import random

import pytest

from gqa_jax.data.documents import InputError
from tests.reading import read, texts


def write(tmp_path, data, name="a.jsonl"):
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return tmp_path / name


OBJECTS = [{"id": 1, "text": "eins\nzwei"}, {"text": "", "tags": [{"a": {}}]}, {"text": None}, {"text": "]},{[ \u2028"}]
TEXTS = ["eins\nzwei", "", "", "]},{[ \u2028"]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    "data",
    [
        "\n".join(map(json.dumps, OBJECTS)),
        "\r\n".join(map(json.dumps, OBJECTS)) + "\r\n",
        "\ufeff\n \n" + "\n\n".join(map(json.dumps, OBJECTS)) + "\n\t\n",
        "\n".join("\ufeff" + json.dumps(value) for value in OBJECTS),  # files put together with cat
        json.dumps(OBJECTS),
        json.dumps(OBJECTS) + "\n",
        json.dumps(OBJECTS, indent=2),
        "[" + ",\n".join(map(json.dumps, OBJECTS)) + "]",
        "[\n" + "\n,".join(map(json.dumps, OBJECTS)) + "\n]\n\n",
        "\n".join(json.dumps(value, indent=1) for value in OBJECTS),  # as jq writes them
        "".join(json.dumps(value, indent="\t") for value in OBJECTS),
        json.dumps(TEXTS),
        json.dumps(TEXTS, indent=1),
        "\n".join(map(json.dumps, TEXTS)),
    ],
)
def test_layouts(tmp_path, suffix, data):
    documents, reading = read(write(tmp_path, data, f"a{suffix}"))
    assert [document.text for document in documents] == TEXTS
    assert reading.kinds["JSON"].documents == 4
    assert reading.kinds["JSON"].text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert reading.notes == []


def test_one_object_and_none(tmp_path):
    assert texts(write(tmp_path, json.dumps(OBJECTS[0]))) == TEXTS[:1]
    assert texts(write(tmp_path, json.dumps(OBJECTS[0], indent=4))) == TEXTS[:1]
    for empty in ("", "\n\n", "[]", "[\n]\n", "\ufeff"):
        assert texts(write(tmp_path, empty)) == []


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_larger_than_what_is_looked_at(tmp_path, monkeypatch, indent):
    monkeypatch.setattr("gqa_jax.data.kinds._HEAD_BYTES", 10)
    monkeypatch.setattr("gqa_jax.data.rows.BUFFER_BYTES", 10)
    values = [{"n": i, "text": "ü" * i} for i in range(200)]
    assert texts(write(tmp_path, json.dumps(values, indent=indent))) == ["ü" * i for i in range(200)]
    assert texts(write(tmp_path, "\n".join(json.dumps(value, indent=indent) for value in values)))[-1] == "ü" * 199


@pytest.mark.parametrize(
    ("line", "message", "reason"),
    [
        (b"{broken", r"2: not one JSON object a line", "no JSON"),
        (b'{"text": "cut o', r"2: not one JSON object a line \(Invalid control", "no JSON"),
        (b'{"text": "a"} {"text": "b"}', r"2: not one JSON object a line \(Extra data", "no JSON"),
        (b'{"text": "nul \0"}', r"2: not one JSON object a line \(Invalid control", "no JSON"),
        (b'{"text": "x"}\0\0', r"2: not one JSON object a line \(Extra data", "no JSON"),
        (b"[1]", r"2: no field 'text'; it is a list", "no object"),
        (b"5", r"2: no field 'text'; it is a number", "no object"),
        (b"null", r"2: no field 'text'; it is null", "no object"),
        (b'{"body": "x", "id": 1}', r"2: no field 'text'; its fields: body, id \(--text_key\)", "no field 'text'"),
        (b"{}", r"2: no field 'text'; its fields: none", "no field 'text'"),
        (b'{"text": 5}', r"2: 'text' is a number, not text", "'text' is a number"),
        (b'{"text": ["x"]}', r"2: 'text' is a list, not text", "'text' is a list"),
        (b'{"text": {"x": 1}}', r"2: 'text' is an object, not text", "'text' is an object"),
        (b'{"text": true}', r"2: 'text' is true or false, not text", "'text' is true or false"),
        (b'{"text": ' + b"7" * 5000 + b"}", r"2: 'text' is a number, not text", "'text' is a number"),
        (b'{"text": "caf\xe9"}', r"2: byte 13 is no UTF-8: it is .*iconv.*--encoding_errors=replace", "no UTF-8"),
        (b'{"x": ' + b"[" * 100_000 + b', "text": "x"}', r"2: lists or objects within each other, too deep", "nested too deep"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
def test_bad_lines_are_named_or_counted(tmp_path, line, message, reason):
    path = write(tmp_path, b'{"text": "ok"}\n' + line + b'\n{"text": "after"}\n' + line)
    with pytest.raises(InputError, match=rf"a.jsonl:{message}.*; --bad_lines=skip leaves such ones out$"):
        texts(path)
    documents, reading = read(path, bad_lines="skip")
    assert [document.text for document in documents] == ["ok", "after"]
    assert {name: (bad.count, bad.first) for name, bad in reading.bad_lines.items()} == {reason: (2, f"{path}:2")}
    assert reading.notes == []
    # A first line that can't be used is no whole file that can't.
    documents, reading = read(write(tmp_path, line + b'\n{"text": "after"}\n'), bad_lines="skip")
    assert [document.text for document in documents] == ["after"]
    assert reading.bad_lines[reason].first == f"{path}:1"
    with pytest.raises(InputError, match=r"a.jsonl:1: ") as raised:
        texts(path)
    assert "--bad_lines" not in str(raised.value)  # perhaps all lines are so
    _, reading = read(write(tmp_path, line + b"\n" + line), bad_lines="skip")
    assert reading.notes == [f"{path}: none of its lines or rows can be used"]


def test_an_integer_of_more_digits_than_python_reads(tmp_path):
    documents = texts("tests/data/inputs/bigint.jsonl")
    assert len(documents) == 31
    assert documents[30] == "prime digits"
    digits = "7" * 5000
    array = f'[{{"id": {digits}, "text": "a"}}, {{"id": 1, "text": "b"}}]'
    assert texts(write(tmp_path, array)) == ["a", "b"]
    with pytest.raises(InputError, match=r"a.jsonl:1: 'id' is longer than 200 characters and names no source"):
        texts(write(tmp_path, f'{{"id": {digits}, "text": "a"}}\n'), source_key="id")


def test_half_surrogates_are_kept_and_counted(tmp_path):
    documents, reading = read(
        write(tmp_path, r'{"text": "a\ud83d", "s": "b\ud83d"}' + "\n" + r'{"text": "\ud83d\ude00", "s": "x"}')
    )
    assert [document.text for document in documents] == ["a\ud83d", "\U0001f600"]
    assert reading.kinds["JSON"].text_bytes == 4 + 4
    assert [document.source for document in read(tmp_path / "a.jsonl", source_key="s")[0]] == ["b\ufffd", "x"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('[{"text": "a"},\n{"text": "b"', r"2, element 2: damaged JSON"),
        ('[{"text": "a"},\n{"text": "b"}', r"2, element 2: damaged JSON \(no comma or ] after it"),
        ('[{"text": "a"},\n{"text": "b"},\n]', r"3, element 3: damaged JSON"),
        ('[{"text": "a"},\n{"text": "b"}] x', r"2, element 2: damaged JSON \(something follows the end"),
        ('[{"text": "a"},\n{"text": 5}]', r"2, element 2: 'text' is a number"),
        ('[\n["a"], "b"]', r"2, element 1: no field 'text'; it is a list"),
        ('{\n"text": "a"}\n{\n"text": "b"', r"3: damaged JSON"),
        (b'[\n"a",\n"caf\xe9"]', r"3: not UTF-8 text"),
        ('[\n"a",\n' + "[" * 100_000 + "]", r"3, element 2: lists or objects within each other, too deep"),
    ],
)
def test_faults_of_a_whole_file_have_a_place(tmp_path, data, message):
    with pytest.raises(InputError, match=rf"a.json:{message}"):
        texts(write(tmp_path, data, "a.json"))


def test_bad_elements_of_an_array_are_counted(tmp_path):
    documents, reading = read(write(tmp_path, '[{"text": "a"}, 5,\n{"body": ""}, "b"]', "a.json"), bad_lines="skip")
    assert [document.text for document in documents] == ["a", "b"]
    assert {name: bad.first for name, bad in reading.bad_lines.items()} == {
        "no object": f"{tmp_path}/a.json:1, element 2",
        "no field 'text'": f"{tmp_path}/a.json:2, element 3",
    }


def test_mutated_lines_are_documents_or_counted(tmp_path):
    generator = random.Random(7)
    for _ in range(60):
        lines = [bytearray(json.dumps({"id": i, "text": f"ü line {i}"}).encode()) for i in range(20)]
        for _ in range(generator.randrange(1, 12)):
            line = generator.choice(lines)
            line[generator.randrange(len(line))] = generator.choice([b for b in range(256) if b != 10])
        documents, reading = read(write(tmp_path, b"\n".join(lines)), bad_lines="skip")
        blank = sum(not line.strip() for line in lines)
        assert len(documents) + sum(bad.count for bad in reading.bad_lines.values()) + blank == 20
