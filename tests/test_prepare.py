"""The command line: stores from text, resumed after SIGKILL, never overwritten, with sentences for bad input."""

import errno
import hashlib
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
from gqa_jax.data.tokenizer import load_tokenizer
from gqa_jax.data.vocabulary import TokenizerError

TEXTS = [f"Document {i} has a few words. " * (1 + i % 3) for i in range(40)]


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text, "body": text.upper()}) + "\n" for text in [*TEXTS[:7], "", *TEXTS[7:]]))
    return str(path)


@pytest.mark.parametrize("rule", store.HOLDOUT_RULES)
@pytest.mark.parametrize("spec", ["bytes", "gpt2", "bpe:300"])
def test_store_is_the_tokenized_text(lines, tmp_path, spec, rule, capsys):
    out = tmp_path / "store"
    command = [lines, "--out", str(out), "--tokenizer", spec, "--holdout_every", "4", "--holdout_rule", rule]
    assert prepare.main(command) == 0
    made = TokenStore.open(out, verify=True)
    tokenizer = made.tokenizer()
    if rule == "position":
        held_out, order = [i % 4 == 2 for i in range(40)], TEXTS[2::4]
    else:
        hashes = [int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) for text in TEXTS]
        held_out = [number < 2**64 / 4 for number in hashes]
        order = [text for _, text, held in sorted(zip(hashes, TEXTS, held_out, strict=True)) if held]
        assert 5 < len(order) < 15
    trained = [text for text, held in zip(TEXTS, held_out, strict=True) if not held]
    for split, chosen in (("validation", order), ("train", trained)):
        ids = [np.append(ids, tokenizer.eos_id) for ids in tokenizer.encode_batch(chosen)]
        np.testing.assert_array_equal(made.tokens(split), np.concatenate(ids))
        np.testing.assert_array_equal(made.documents(split)[:, 0], np.cumsum([len(document) for document in ids]))
        np.testing.assert_array_equal(made.documents(split)[:, 1], [len(text.encode()) for text in chosen])
    assert made.header["provenance"]["empty_documents"] == 1
    assert {path.name for path in out.iterdir()} - {"tokenizer.json"} == {
        *(f"{split}.{suffix}" for split in store.SPLITS for suffix in ("bin", "docs.npy")),
        "sources.npz",
        "inputs.json",
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
    assert f"since then {lines} has changed; nothing was changed" in capsys.readouterr().err
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


def test_files_of_another_request_that_was_not_finished_do_not_stay(lines, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_header", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(prepare.Recipe((lines,), tokenizer="bpe:300"), tmp_path / "store")
    assert {"tokenizer.json", "inputs.json"} <= {path.name for path in (tmp_path / "store").iterdir()}
    recipe = prepare.Recipe(("sotu",), tokenizer="bytes")
    assert prepare.prepare(recipe, tmp_path / "store").tokenizer().name == "bytes"
    assert prepare.prepare(recipe, tmp_path / "store")


def test_a_folder_with_the_name_of_a_built_in_store(lines, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = prepare.prepare(prepare.Recipe((lines,), "bytes"), "sotu-bytes")
    assert prepare.prepare(prepare.Recipe((lines,), "bytes"), "sotu-bytes").fingerprint == made.fingerprint


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
            ["TEXT", "--holdout_every", "100", "--holdout_rule", "position"],
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
    assert prepare.prepare(prepare.Recipe((lines,), "bytes", holdout_every=79, holdout_rule="position"), tmp_path / "store")
    # By hash there are always some.
    made = prepare.prepare(prepare.Recipe((lines,), "bytes", holdout_every=10**6), tmp_path / "other")
    assert made.header["splits"]["validation"]["documents"] == 1


def test_unknown_rules():
    with pytest.raises(InputError, match="--holdout_rule 'moon': must be hash or position"):
        prepare.Recipe(("sotu",), holdout_rule="moon")


def test_too_few_documents(tmp_path):
    def made(rule, text, separator=None, every=2):
        (tmp_path / "a.txt").write_text(text)
        form = Format(separator=separator)
        recipe = prepare.Recipe((str(tmp_path / "a.txt"),), "bytes", holdout_every=every, form=form, holdout_rule=rule)
        return prepare.prepare(recipe, tmp_path / f"store-{rule}")

    for rule in store.HOLDOUT_RULES:
        with pytest.raises(InputError, match=r"no text in the input: 0 documents \(1 empty ones\)"):
            made(rule, " \n")
    with pytest.raises(InputError, match=r"1 document: .*--separator cuts a file into documents"):
        made("position", "one\n\ntwo\n\nthree")
    split = made("position", "one\n\ntwo\n\nthree", "\n\n")
    assert split.tokenizer().decode(split.tokens("validation")) == "two<|endoftext|>"

    with pytest.raises(InputError, match="3 documents, all of them the same text: what is held out would be trained on too"):
        made("hash", "one|one|one", "|")
    with pytest.raises(InputError, match="1 document of 1 token: too short to hold out its end"):
        made("hash", "a")
    below = [text for text in map(str, range(20)) if hashlib.sha256(text.encode()).digest()[0] < 128]
    with pytest.raises(InputError, match=r"all of them with hashes in the lowest 1/2: .* or more") as error:
        made("hash", "|".join(below), "|")
    suggested = int(re.search(r"=(\d+)", str(error.value))[1])
    assert made("hash", "|".join(below), "|", every=suggested).header["splits"]["train"]["documents"] >= 1


def test_the_end_of_a_single_document_is_held_out(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(400)))
    for spec in ("bytes", "gpt2", "bpe:270"):
        out = tmp_path / spec
        assert prepare.main([str(tmp_path / "a.txt"), "--out", str(out), "--tokenizer", spec]) == 0
        said = capsys.readouterr().out
        assert "note: 1 document: its end is held out" in said
        assert "held out is the end of its one document: " in said
        assert "1 source: a.txt (the end of its 1 document held out)\n" in said
        made = TokenStore.open(out, verify=True)
        texts = [made.tokenizer().decode(made.tokens(split)[:-1]) for split in store.SPLITS]
        assert "".join(texts) == (tmp_path / "a.txt").read_text()
        assert [made.documents(split)[0, 1] for split in store.SPLITS] == [len(text) for text in texts]
        tokens = [made.header["splits"][split]["tokens"] - 1 for split in store.SPLITS]
        block = 1 << (sum(tokens) // 20).bit_length() - 1
        assert tokens[0] % block == 0
        assert sum(tokens) // 20 <= tokens[1] <= sum(tokens) // 20 + block


DOMAINS = {
    "arxiv": "theorem lemma proof " * 3,
    "books": "once upon a time " * 3,
    "code": "def f(x): return x\n" * 3,
    "web": "click here to buy " * 3,
}


def _held_out(made):
    """Texts of the held-out documents in their order."""
    return made.tokenizer().decode(made.tokens("validation")).split("<|endoftext|>")[:-1]


def test_every_domain_is_held_out_whatever_the_order(tmp_path):
    """A folder for each, and one file with the domains in turn, of which by position only one is held out."""
    for name, text in DOMAINS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jsonl").write_text("".join(json.dumps({"text": f"{text}{i}"}) + "\n" for i in range(200)))
    orders = [sorted(DOMAINS), sorted(DOMAINS, reverse=True), ["code", "arxiv", "web", "books"]]
    made = []
    for i, order in enumerate(orders):
        recipe = prepare.Recipe(tuple(str(tmp_path / name) for name in order), "bytes")
        made.append(prepare.prepare(recipe, tmp_path / f"store{i}"))
    first = made[0]
    names, sources = first.sources("validation")
    assert names == sorted(DOMAINS)
    for name, count in zip(names, np.bincount(sources), strict=True):
        assert 3 <= count <= 20, name
    for text, source in zip(_held_out(first), sources, strict=True):
        assert text.startswith(DOMAINS[names[source]])
    assert (np.diff(sources) >= 0).all()
    for other in made[1:]:
        np.testing.assert_array_equal(other.tokens("validation"), first.tokens("validation"))
        np.testing.assert_array_equal(other.documents("validation"), first.documents("validation"))
        np.testing.assert_array_equal(other.sources("validation")[1], sources)
        assert other.fingerprint == first.fingerprint  # of train too
        assert other.header["provenance"]["request"] == first.header["provenance"]["request"]

    (tmp_path / "books" / "1.jsonl").symlink_to(tmp_path / "web" / "0.jsonl")  # of two inputs: it belongs to one
    linked = [
        prepare.prepare(prepare.Recipe(tuple(str(tmp_path / name) for name in order), "bytes"), tmp_path / f"linked{i}")
        for i, order in enumerate((["books", "web"], ["web", "books"]))
    ]
    assert linked[0].fingerprint == linked[1].fingerprint
    (tmp_path / "books" / "1.jsonl").unlink()

    lines = [json.dumps({"text": f"{text}{i}", "domain": name}) + "\n" for i in range(200) for name, text in DOMAINS.items()]
    (tmp_path / "turns.jsonl").write_text("".join(lines))
    recipe = prepare.Recipe((str(tmp_path / "turns.jsonl"),), "bytes")
    assert sorted(_held_out(prepare.prepare(recipe, tmp_path / "turns"))) == sorted(_held_out(first))
    by_key = prepare.prepare(
        prepare.Recipe((str(tmp_path / "turns.jsonl"),), "bytes", form=Format(source_key="domain")), tmp_path / "by-key"
    )
    np.testing.assert_array_equal(by_key.tokens("validation"), first.tokens("validation"))
    assert by_key.sources("validation")[0] == names
    np.testing.assert_array_equal(by_key.sources("validation")[1], sources)


def test_a_source_key_of_too_many_values(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_SOURCES", 3)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i}", "url": f"u{i}"}) + "\n" for i in range(5)))
    recipe = prepare.Recipe((str(tmp_path / "a.jsonl"),), "bytes", form=Format(source_key="url"))
    with pytest.raises(InputError, match=r"--source_key url: more than 3 values, as 'u3' in a.jsonl: give a field that"):
        prepare.prepare(recipe, tmp_path / "store")


def test_sources_without_text_are_said(tmp_path, capsys):
    for name in ("full", "blank"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(40)))
    (tmp_path / "blank" / "a.txt").write_text(" \n")
    command = [str(tmp_path / "blank"), str(tmp_path / "full"), "--out", str(tmp_path / "store"), "--tokenizer", "bytes"]
    assert prepare.main(command) == 0
    assert "note: source blank has no text\n" in capsys.readouterr().out
    assert TokenStore.open(tmp_path / "store").sources("train")[0] == ["full"]


def test_a_bpe_of_an_input_that_was_edited_since_is_not_taken(lines, tmp_path, monkeypatch):
    """After a run that was stopped when it was trained; the edited file has the same name and size."""
    recipe, out = prepare.Recipe((str(lines),), "bpe:270", holdout_every=5), tmp_path / "store"
    with monkeypatch.context() as stopped:
        stopped.setattr(parts, "encode_documents", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(recipe, out)
    assert len(list((out / "parts").glob("bpe-*.json"))) == 1
    Path(lines).write_text(Path(lines).read_text().replace("a", "u"))
    made = prepare.prepare(recipe, out)
    assert made.fingerprint == prepare.prepare(recipe, tmp_path / "fresh").fingerprint


def test_what_can_be_said_no_more_is_a_sentence(lines, tmp_path, capsys):
    command = [str(lines), "--out", str(tmp_path / "store"), "--tokenizer", "bytes"]
    assert prepare.main(command) == 0
    header = tmp_path / "store" / "header.json"
    for damage, message in (
        (lambda: (tmp_path / "store" / "sources.npz").write_bytes(b"PK"), "sources.npz is damaged"),
        (lambda: (tmp_path / "store" / "train.bin").write_bytes(b""), "header says"),
        (lambda: _without_every(header), "lacks or garbles 'every'"),
    ):
        capsys.readouterr()
        damage()
        assert prepare.main([*command, "--report"]) == 2
        assert message in (said := capsys.readouterr().err)
        assert "Traceback" not in said
    lost = tmp_path / "lost"
    assert prepare.main([str(lines), "--out", str(lost), "--tokenizer", "bytes"]) == 0
    ids = np.fromfile(lost / "train.bin", "<u2")
    ids[3] ^= 1
    ids.tofile(lost / "train.bin")
    capsys.readouterr()
    assert prepare.main([str(lines), "--out", str(lost), "--tokenizer", "bytes"]) == 2
    assert f"to make it again delete {lost} first, then give the same command" in capsys.readouterr().err


def _without_every(header):
    values = json.loads(header.read_text())
    del values["holdout"]["every"]
    header.write_text(json.dumps(values))


def test_a_reader_of_the_report_that_has_seen_enough(lines, tmp_path):
    command = [sys.executable, "-m", "gqa_jax.data.prepare", str(lines), "--out", str(tmp_path / "store"), "--report"]
    with subprocess.Popen([*command, "--tokenizer", "bytes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        run.stdout.close()
        assert (run.wait(60), run.stderr.read()) == (0, "")


def test_lines_that_are_all_bad_are_told_of(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("[1]\n" * 3)
    command = [str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "store"), "--tokenizer", "bytes", "--bad_lines", "skip"]
    assert prepare.main(command) == 2
    assert re.search(r"0 documents \(0 empty ones\); 3 bad lines: .* \(\S*a\.jsonl:1\)", capsys.readouterr().err)


@pytest.mark.parametrize("rule", store.HOLDOUT_RULES)
def test_a_bpe_is_not_trained_on_what_is_held_out(tmp_path, rule):
    """Of three sources the second has none below the limit and gives its lowest; the third has one text."""
    limit = 2**64 / 20
    texts = [f"text {i}" for i in range(200)]
    high = [text for text in texts if int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) >= limit]
    contents = {"a": texts[:100], "b": high[100:130], "c": [high[140]]}
    for name, own in contents.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in own))
    recipe = prepare.Recipe(tuple(str(tmp_path / f"{name}.jsonl") for name in contents), "bytes", holdout_rule=rule)
    documents = [(text, i) for i, own in enumerate(contents.values()) for text in own]
    made = prepare.prepare(recipe, tmp_path / "store")
    trained = sorted(prepare._training_texts(iter([("", 0), *documents]), recipe))
    assert trained == sorted(made.tokenizer().decode(made.tokens("train")).split("<|endoftext|>")[:-1])
    assert "b.jsonl" in made.sources("validation")[0]

    for few in ([("one", 0), ("two", 1)], [("one", 0), ("one", 0), ("two", 1), ("two", 1)]):  # the lowest of the store
        hashed = prepare.Recipe(("sotu",), "bytes", holdout_every=10**9)
        assert set(prepare._training_texts(iter(few), hashed)) == {"one"}
    assert list(prepare._training_texts(iter([("a" * 100, 0)]), hashed)) == ["a" * 99]
    assert list(prepare._limited(iter("abcdef"), 3)) == ["a", "b", "c"]


def test_unsuitable_folders(lines, tmp_path):
    recipe = prepare.Recipe((str(tmp_path),), tokenizer="bytes")
    with pytest.raises(StoreError, match=r"isn't empty and holds no token store: give a new or an empty folder"):
        prepare.prepare(prepare.Recipe((lines,)), tmp_path)
    with pytest.raises(StoreError, match="is a file: give a folder"):
        prepare.prepare(prepare.Recipe((lines,)), lines)
    with pytest.raises(StoreError, match=r"lies in the input .* and would be read as text"):
        prepare.prepare(recipe, tmp_path / "store")


def test_a_link_from_an_input_to_the_store(lines, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("text")
    (tmp_path / "in" / "made").symlink_to(tmp_path / "stores")
    (tmp_path / "stores" / "one").mkdir(parents=True)
    (tmp_path / "stores" / "one" / "header.json").write_text("{}")
    recipe = prepare.Recipe((str(tmp_path / "in"),), "bytes")
    with pytest.raises(StoreError, match=r"is reached from an input, as \S+in/made/one/header\.json, and would be read"):
        prepare.prepare(recipe, tmp_path / "stores" / "one")


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
        assert not store.is_finished(out)
        patch.setattr(parts, "encode_documents", None)  # is not done again
        assert prepare.main([*command, "--out", out]) == 0
    assert uploaded[-1] == "header.json"
    assert f"{out}: made in" in capsys.readouterr().out
    made = prepare.prepare(prepare.Recipe((lines,), tokenizer=spec, holdout_every=10), tmp_path / "local")
    assert storage.names(out) == sorted(path.name for path in made.path.iterdir() if path.name != ".lock")
    assert sorted(path.name for path in (tmp_path / "cache" / "stores").iterdir()) == [made.fingerprint]
    assert store.open_folder(out).path.name == made.fingerprint

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


def test_a_store_that_another_machine_has_put_on_the_bucket_meanwhile(lines, tmp_path, gcs_root, monkeypatch):
    recipe, out = prepare.Recipe((lines,), "bytes"), f"{gcs_root}/store"
    make = prepare._make

    def overtaken(*arguments):
        made = make(*arguments)
        with monkeypatch.context() as other:
            other.setenv("GQA_JAX_CACHE", str(tmp_path / "other"))
            other.setattr(prepare, "_make", make)
            prepare.prepare(recipe, out)
        return made

    monkeypatch.setenv("GQA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare, "_make", overtaken)
    assert prepare.prepare(recipe, out).fingerprint == store.read_header(storage.path(out))["fingerprint"]


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
