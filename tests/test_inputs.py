"""Inputs that change: while they are read, and after the store is finished."""

import json
import os
import subprocess
import time

import pytest

from gqa_jax import storage
from gqa_jax.data import inputs, parts, prepare, store
from gqa_jax.data.documents import InputError, find_sources
from gqa_jax.data.store import StoreError


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": f"good text number {i}"}) + "\n" for i in range(30)))
    return path


@pytest.fixture
def command(lines, tmp_path):
    return [str(lines), "sotu", "--out", str(tmp_path / "store"), "--tokenizer", "bytes"]


def test_the_record_of_a_store(lines, command, tmp_path):
    assert prepare.main(command) == 0
    digest = subprocess.run(["sha256sum", lines], capture_output=True, text=True, check=True).stdout.split()[0]
    assert json.loads((tmp_path / "store" / "inputs.json").read_text()) == {
        "files": [{"name": "in.jsonl", "bytes": lines.stat().st_size, "mtime_ns": lines.stat().st_mtime_ns, "sha256": digest}]
    }
    assert prepare.main(["sotu", "--out", str(tmp_path / "named"), "--tokenizer", "bytes"]) == 0
    assert not (tmp_path / "named" / "inputs.json").exists()


def test_a_file_that_was_edited_in_place(lines, command, tmp_path, capsys, monkeypatch):
    assert prepare.main(command) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    good = lines.read_text()
    lines.write_text(good.replace("good", "evil"))  # as many bytes
    os.utime(lines, ns=(0, 10**18))
    assert prepare.main(command) == 2
    assert f"as they were; since then {lines} has changed; nothing was changed in the store: choose" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    lines.write_text(good)  # another time, the same text
    assert prepare.main(command) == 0
    assert "is there already, nothing to do" in capsys.readouterr().out
    monkeypatch.setattr(inputs, "_sha256", None)  # the same time: not read
    os.utime(lines, ns=(0, json.loads(before["inputs.json"])["files"][0]["mtime_ns"]))
    assert prepare.main(command) == 0


def test_many_changes_are_counted(tmp_path):
    for i in range(7):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    recipe = prepare.Recipe(tuple(str(tmp_path / f"{i}.txt") for i in range(7)), "bytes")
    prepare.prepare(recipe, tmp_path / "store")
    for i in range(7):
        (tmp_path / f"{i}.txt").write_text(f"TEXT {i}")
        os.utime(tmp_path / f"{i}.txt", ns=(0, 10**18))
    with pytest.raises(StoreError, match=r"since then \S+0.txt has changed, .*\S+4.txt has changed, and 2 more;"):
        prepare.prepare(recipe, tmp_path / "store")


def test_files_that_came_and_went_are_named(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.txt").write_text(f"text of {name}")
    recipe = prepare.Recipe((str(tmp_path / "in"),), "bytes")
    prepare.prepare(recipe, tmp_path / "store")
    (tmp_path / "in" / "b.txt").rename(tmp_path / "in" / "c.txt")
    with pytest.raises(StoreError, match=r"since then \S+c\.txt is new, b\.txt is gone; nothing was changed in the store"):
        prepare.prepare(recipe, tmp_path / "store")


@pytest.mark.parametrize("content", ["{", "[]", '{"files": [{"name": "in.jsonl"}]}'])
def test_an_unusable_record(command, tmp_path, content, capsys):
    assert prepare.main(command) == 0
    (tmp_path / "store" / "inputs.json").write_text(content)
    assert prepare.main(command) == 2
    assert "inputs.json can't be used" in capsys.readouterr().err


def test_a_store_without_a_record_names_a_newer_input(lines, command, tmp_path, caplog):
    assert prepare.main(command) == 0
    (tmp_path / "store" / "inputs.json").unlink()
    assert prepare.main(command) == 0
    assert not caplog.messages
    os.utime(lines, (0, time.time() + 100))
    assert prepare.main(command) == 0
    assert caplog.messages == [
        f"{lines} was written after {tmp_path}/store was made, which keeps no record of its inputs: is it of this text?"
    ]


def _change(lines):
    with lines.open("a") as file:
        file.write('{"text": "more"}\n')


def _replace(lines):
    content, state = lines.read_bytes(), lines.stat()
    lines.with_suffix(".new").write_bytes(content.replace(b"good", b"evil"))
    os.utime(lines.with_suffix(".new"), ns=(state.st_atime_ns, state.st_mtime_ns))
    os.replace(lines.with_suffix(".new"), lines)


@pytest.mark.parametrize("change", [_change, _replace])
@pytest.mark.parametrize("spec", ["bytes", "bpe:270"])
def test_a_file_that_changes_while_it_is_read(lines, tmp_path, change, spec, monkeypatch):
    real = prepare.read_documents

    def reading(source, *arguments):
        for i, document in enumerate(real(source, *arguments)):
            if i == 5:
                change(lines)
            yield document

    monkeypatch.setattr(prepare, "read_documents", reading)
    message = r"in.jsonl has changed while it was read: give the same command again when nothing writes to it"
    with pytest.raises(InputError, match=message):
        prepare.prepare(prepare.Recipe((str(lines),), spec), tmp_path / "store")
    assert not (tmp_path / "store" / "header.json").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_a_change_is_noticed_before_the_next_file_and_is_the_better_reason(lines, tmp_path, fails, monkeypatch):
    real = prepare.read_documents

    def reading(source, *arguments):
        assert source.name == "in.jsonl"
        yield from real(source, *arguments)
        _change(lines)
        if fails:
            raise InputError("in.jsonl:31: not one JSON object a line")

    monkeypatch.setattr(prepare, "read_documents", reading)
    with pytest.raises(InputError, match=r"in\.jsonl has changed while it was read"):
        prepare.prepare(prepare.Recipe((str(lines), "sotu"), "bytes"), tmp_path / "store")


def test_a_file_that_changes_after_it_was_read_or_is_gone(lines, tmp_path, monkeypatch):
    real, acts = parts.encode_documents, []

    def encode(*arguments):
        found = real(*arguments)
        acts[-1]()
        return found

    monkeypatch.setattr(parts, "encode_documents", encode)
    for act, message in ((lambda: _change(lines), " has changed while"), (lines.unlink, ": No such file or directory: it was")):
        acts.append(act)
        with pytest.raises(InputError, match=rf"in\.jsonl{message}"):
            prepare.prepare(prepare.Recipe((str(lines),), "bytes"), tmp_path / "store")
    assert not (tmp_path / "store" / "header.json").exists()


def test_a_file_that_changed_after_it_was_found(lines):
    found = find_sources([lines])
    _change(lines)
    with pytest.raises(InputError, match=r"in\.jsonl has changed"):
        inputs.InputFiles(found.sources)


def test_stopping_does_not_wait_for_digests(tmp_path):
    """A terabyte, of which nothing is on the disk."""
    with (tmp_path / "huge.txt").open("w") as file:
        file.truncate(1 << 40)
    sources = find_sources([tmp_path / "huge.txt"]).sources
    begin = time.monotonic()
    with inputs.InputFiles(sources) as files:
        files.begin(sources[0])
    assert time.monotonic() - begin < 20


def test_the_record_goes_with_the_store_to_a_bucket(lines, tmp_path, gcs_root, monkeypatch, capsys):
    monkeypatch.setenv("GQA_JAX_CACHE", str(tmp_path / "cache"))
    command = [str(lines), "--out", f"{gcs_root}/store", "--tokenizer", "bytes"]
    assert prepare.main(command) == 0
    assert {store.INPUTS, store.SOURCES} <= set(storage.names(f"{gcs_root}/store"))
    assert prepare.main(command) == 0
    lines.write_text(lines.read_text().replace("good", "evil"))
    os.utime(lines, ns=(0, 10**18))
    assert prepare.main(command) == 2
    assert f"since then {lines} has changed" in capsys.readouterr().err
