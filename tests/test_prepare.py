"""The command line: stores from text, resumed after SIGKILL, never overwritten, with sentences for bad input."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gqa_jax import storage
from gqa_jax.data import parts, prepare, store
from gqa_jax.data.documents import Format, InputError
from gqa_jax.data.store import StoreError, TokenStore
from gqa_jax.data.tokenizer import TokenizerError, load_tokenizer

TEXTS = [f"Document {i} has a few words. " * (1 + i % 3) for i in range(40)]


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text, "body": text.upper()}) + "\n" for text in [*TEXTS[:7], "", *TEXTS[7:]]))
    return str(path)


@pytest.mark.parametrize("spec", ["bytes", "gpt2", "bpe:300"])
def test_store_is_the_tokenized_text(lines, tmp_path, spec, capsys):
    out = tmp_path / "store"
    assert prepare.main([lines, "--out", str(out), "--tokenizer", spec, "--holdout_every", "10"]) == 0
    made = TokenStore.open(out, verify=True)
    tokenizer = made.tokenizer()
    for split, chosen in (("validation", TEXTS[5::10]), ("train", [text for i, text in enumerate(TEXTS) if i % 10 != 5])):
        ids = [np.append(ids, tokenizer.eos_id) for ids in tokenizer.encode_batch(chosen)]
        np.testing.assert_array_equal(made.tokens(split), np.concatenate(ids))
        np.testing.assert_array_equal(made.documents(split)[:, 0], np.cumsum([len(document) for document in ids]))
        np.testing.assert_array_equal(made.documents(split)[:, 1], [len(text.encode()) for text in chosen])
    assert made.header["provenance"]["empty_documents"] == 1
    assert {path.name for path in out.iterdir()} - {"tokenizer.json"} == {
        *(f"{split}.{suffix}" for split in store.SPLITS for suffix in ("bin", "docs.npy")),
        "header.json",
        ".lock",
    }
    assert "1 empty documents left out; fingerprint" in capsys.readouterr().out


def test_large_vocabularies_are_stored_in_four_bytes(lines, tmp_path, monkeypatch):
    tokenizer = load_tokenizer("bytes")
    monkeypatch.setattr(type(tokenizer), "vocab_size", 70_000)
    made = prepare.prepare(prepare.Recipe((lines,), tokenizer="bytes"), tmp_path / "store")
    assert made.tokens("train").dtype == np.dtype("<u4")
    assert made.header["splits"]["train"]["tokens"] * 4 == (tmp_path / "store" / "train.bin").stat().st_size


def test_same_command_again_does_nothing(lines, tmp_path, capsys, monkeypatch):
    command = [lines, "--out", str(tmp_path / "store"), "--tokenizer", "bytes"]
    assert prepare.main(command) == 0
    monkeypatch.setattr(parts, "encode_documents", lambda *_: pytest.fail("encoded again"))
    assert prepare.main(command) == 0
    assert "is there already, nothing to do" in capsys.readouterr().out


def test_finished_store_is_not_overwritten(lines, tmp_path, capsys):
    out = tmp_path / "store"
    command = [lines, "--out", str(out), "--tokenizer", "bytes"]
    assert prepare.main(command) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert prepare.main([*command, "--text_key", "body", "--holdout_every", "5"]) == 2
    message = capsys.readouterr().err
    assert "holdout_every: 5 here, 20 there; text_key: 'body' here, 'text' there" in message
    assert "nothing was changed: choose another --out, or delete that folder first" in message
    Path(lines).write_text(Path(lines).read_text() + '{"text": "more"}\n')
    assert prepare.main(command) == 2
    assert "bytes:" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_killed_at_random_moments_and_started_again(tmp_path):
    """SIGKILL while parts are written; the store is the same as one that was never interrupted, finished parts are kept."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 50))
    code = (
        "import sys, time; from gqa_jax.data import parts, prepare; parts.CHUNK_CHARS = 1000;"
        "parts.token_dtype = lambda size: time.sleep(0.005) or 'uint16';"  # slow enough to be caught
        "sys.exit(prepare.main([sys.argv[1], '--out', sys.argv[2], '--tokenizer', 'bytes', '--quiet']))"
    )
    whole, out = tmp_path / "whole", tmp_path / "out"
    subprocess.run([sys.executable, "-c", code, path, whole], check=True)
    for n_parts in (1, 20, 40):
        process = subprocess.Popen([sys.executable, "-c", code, path, out])
        while process.poll() is None and len(list(out.glob("parts/*.npz"))) < n_parts:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    with pytest.raises(StoreError, match="is unfinished: run the prepare command that began it again"):
        TokenStore.open(out)
    assert len(list(out.glob("parts/*.npz"))) >= 40
    subprocess.run([sys.executable, "-c", code, path, out], check=True)
    assert TokenStore.open(out, verify=True).fingerprint == TokenStore.open(whole).fingerprint
    assert not (out / "parts").exists()


def test_killed_while_the_header_is_written(lines, tmp_path, monkeypatch):
    recipe, out = prepare.Recipe((lines,), tokenizer="bpe:300"), tmp_path / "store"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_header", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(recipe, out)
    monkeypatch.setattr(prepare, "train_bpe", lambda *_: pytest.fail("trained again"))
    made = prepare.prepare(recipe, out)
    assert all(made.header["splits"][split]["documents"] for split in store.SPLITS)


def test_two_at_once(lines, tmp_path):
    out = tmp_path / "store"
    out.mkdir()
    with store.locked(out, wait=False), pytest.raises(StoreError, match="is being prepared by another process"):
        prepare.prepare(prepare.Recipe((lines,)), out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.txt"], "input nothing.txt: no such file or folder"),
        (["TEXT", "--holdout_every", "1"], "--holdout_every 1: must be at least 2"),
        (
            ["TEXT", "--holdout_every", "100"],
            "40 documents are too few to hold out every 100th: use --holdout_every=79 or less",
        ),
        (["TEXT", "--tokenizer", "bpe:12"], "N of bpe:N must be at least 257"),
        (["TEXT", "--tokenizer", "bpe:300", "--eos", "x"], "a trained BPE ends documents with <|endoftext|>"),
        (["TEXT", "--tokenizer", "gpt5"], "no file gpt5, and no name of a tokenizer"),
        (["TEXT", "--text_key", "content"], "text.jsonl:1: no field 'content'; its fields: text, body"),
        (["TEXT", "--threads", "0"], "--threads 0: must be at least 1"),
        (["TEXT", "--separator", ""], "the separator is empty"),
    ],
)
def test_bad_requests(lines, tmp_path, capsys, arguments, message):
    arguments = [lines if argument == "TEXT" else argument for argument in arguments]
    assert prepare.main(["--out", str(tmp_path / "store"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "store" / "header.json").exists()


def test_suggested_holdout_works(lines, tmp_path):
    assert prepare.prepare(prepare.Recipe((lines,), "bytes", holdout_every=79), tmp_path / "store")


def test_too_few_documents(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"no text in the input: 0 documents \(1 empty ones\)"):
        prepare.prepare(prepare.Recipe((str(tmp_path / "a.txt"),), "bytes"), tmp_path / "store")
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    recipe = {"inputs": (str(tmp_path / "a.txt"),), "tokenizer": "bytes", "holdout_every": 2}
    with pytest.raises(InputError, match=r"1 document: .*--separator cuts a file into documents"):
        prepare.prepare(prepare.Recipe(**recipe), tmp_path / "store")
    made = prepare.prepare(prepare.Recipe(**recipe, form=Format(separator="\n\n")), tmp_path / "store")
    assert made.tokenizer().decode(made.tokens("validation")) == "two<|endoftext|>"


def test_separator_of_lines_that_end_as_on_windows(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\r\n\r\n".join(b"Paragraph %d\r\nof two lines." % i for i in range(40)))
    command = [str(tmp_path / "a.txt"), "--out", str(tmp_path / "store"), "--tokenizer", "bytes", "--separator", r"\r\n\r\n"]
    assert prepare.main(command) == 0
    splits = TokenStore.open(tmp_path / "store").header["splits"]
    assert sum(split["documents"] for split in splits.values()) == 40


def test_unsuitable_folders(lines, tmp_path):
    recipe = prepare.Recipe((str(tmp_path),), tokenizer="bytes")
    with pytest.raises(StoreError, match=r"isn't empty and holds no token store: give a new or an empty folder"):
        prepare.prepare(prepare.Recipe((lines,)), tmp_path)
    with pytest.raises(StoreError, match="is a file: give a folder"):
        prepare.prepare(prepare.Recipe((lines,)), lines)
    with pytest.raises(StoreError, match=r"lies in the input .* and would be read as text"):
        prepare.prepare(recipe, tmp_path / "store")


def test_malformed_line_keeps_what_was_done(lines, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parts, "CHUNK_CHARS", 200)
    good = Path(lines).read_text()
    Path(lines).write_text(good + "{oops\n")
    command = [lines, "--out", str(tmp_path / "store"), "--tokenizer", "bytes", "--quiet"]
    assert prepare.main(command) == 2
    assert "text.jsonl:42: not one JSON object a line" in capsys.readouterr().err
    kept = len(list((tmp_path / "store" / "parts").glob("*.npz")))
    assert kept > 3
    Path(lines).write_text(good)
    assert prepare.main(command) == 0


def test_full_disk_and_interruption(lines, tmp_path, capsys, monkeypatch):
    command = [lines, "--out", str(tmp_path / "store"), "--tokenizer", "bytes"]

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for cause, code, message in (
        (full, 1, "no space left for .*store: free some, or choose another disk; the same command goes on from here"),
        (interrupted, 130, "stopped; the same command goes on from here"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(np, "savez", cause)
            assert prepare.main(command) == code
        assert re.search(message, capsys.readouterr().err)
    assert prepare.main(command) == 0


def test_progress_bar_shows_documents_tokens_and_speed(lines, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    prepare.prepare(prepare.Recipe((lines,), "bytes"), tmp_path / "store", progress=True)
    shown = capsys.readouterr().err
    assert "40 documents, 0.0 M tokens" in shown
    assert "MB/s" in shown
    assert "100%" in shown


def test_module_runs_as_a_program(lines, tmp_path):
    command = [sys.executable, "-W", "error", "-m", "gqa_jax.data.prepare", lines, "--out", tmp_path / "s", "--eos", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "prepare: --eos 'x': tokenizer gpt2 ends documents with id 50256; leave --eos out\n"


def test_unknown_end_of_document_is_named_before_anything_is_written(lines, tmp_path):
    with pytest.raises(TokenizerError, match="leave --eos out"):
        prepare.prepare(prepare.Recipe((lines,), eos="x"), tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_a_store_is_prepared_for_a_bucket(lines, tmp_path, gcs_root, spec, monkeypatch, capsys):
    monkeypatch.setenv("GQA_JAX_CACHE", str(tmp_path / "cache"))
    out, command = f"{gcs_root}/store", [lines, "--tokenizer", spec, "--holdout_every", "10"]
    uploaded = []
    real = storage.upload

    def upload(source, target):
        real(source, target)
        uploaded.append(source.name)
        if len(uploaded) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "upload", upload)
        assert prepare.main([*command, "--out", out]) == 130
        assert not store.exists(out)
        patch.setattr(parts, "encode_documents", None)  # is not done again
        assert prepare.main([*command, "--out", out]) == 0
    assert uploaded[-1] == "header.json"
    assert f"{out}: made in" in capsys.readouterr().out
    made = prepare.prepare(prepare.Recipe((lines,), tokenizer=spec, holdout_every=10), tmp_path / "local")
    assert storage.names(out) == sorted(path.name for path in made.path.iterdir() if path.name != ".lock")
    assert sorted(path.name for path in (tmp_path / "cache" / "stores").iterdir()) == [made.fingerprint]
    assert store.open_store(out).path.name == made.fingerprint

    header = storage.read_bytes(f"{out}/header.json")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "upload", None)
        assert prepare.main([*command, "--out", out]) == 0
        assert f"{out}: is there already" in capsys.readouterr().out
        assert prepare.main([*command[:-1], "5", "--out", out]) == 2
    assert (
        "holds a finished store of another request (holdout_every: 5 here, 10 there); nothing was changed"
        in capsys.readouterr().err
    )
    assert storage.read_bytes(f"{out}/header.json") == header
    assert not list((tmp_path / "cache" / "stores").glob("prepare-*"))


def test_folders_on_a_bucket_that_are_refused_before_anything_is_encoded(lines, tmp_path, gcs_root, monkeypatch, capsys):
    monkeypatch.setenv("GQA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(parts, "encode_documents", None)
    storage.write_bytes(f"{gcs_root}/notes.txt", b"")
    for out, message in (
        (gcs_root, "isn't empty and holds no token store (notes.txt)"),
        ("gs://none/store", "there is no bucket 'none'"),
        ("s3://none/store", "s3:// is not supported"),
    ):
        assert prepare.main([lines, "--tokenizer", "bytes", "--out", out]) == 2
        assert message in capsys.readouterr().err
