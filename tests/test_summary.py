"""What is said of a store: the same when it is made and later, of what was left out, of doubts, and of old stores."""

import json

import pytest

from gqa_jax.data import prepare, store, summary
from gqa_jax.data.documents import BadLines, Found, Reading
from gqa_jax.data.store import TokenStore
from tests import first_version
from tests.test_roundtrip import FEW_LETTERS

PARAGRAPH = "This paragraph is in several documents, here and there, and long enough to be looked for in the other split. "


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Two sources, of which one has copies and near-duplicates, the other one document; what is left out is invented."""
    books = [f"Text {i}, of a book.\n\n{PARAGRAPH if i % 2 else PARAGRAPH.upper()}" for i in range(60)]
    for name, texts in (("books", [*books, books[0]]), ("letter", ["Dear reader"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    find, read = prepare.find_sources, prepare.read_documents

    def found(*arguments):
        left_out = {"README beside data": ["README"], "hidden": [f".x{i}" for i in range(22)]}
        return Found(find(*arguments).sources, left_out | {f"the same file as {i}": [f"{i}b"] for i in range(25)})

    def reading(source, form, met: Reading):
        met.bad_lines["not JSON"] = BadLines(3, "books.jsonl:7")
        met.note("UTF-16, read as such", "x.txt")
        return read(source, form, met)

    monkeypatch.setattr(prepare, "find_sources", found)
    monkeypatch.setattr(prepare, "read_documents", reading)
    tokenizer = tmp_path / "few.json"
    tokenizer.write_text(json.dumps(FEW_LETTERS))
    files = [str(tmp_path / f"{name}.jsonl") for name in ("books", "letter")]
    return [*files, "--out", str(tmp_path / "store"), "--tokenizer", str(tokenizer)]


def test_summary_and_report(command, tmp_path, capsys, monkeypatch):
    assert prepare.main(command) == 0
    short = capsys.readouterr().out
    made = TokenStore.open(tmp_path / "store")
    held_out = made.header["splits"]["validation"]["documents"]
    for line in (
        "held out by hash of the text, one document of 20: ",
        f"2 sources: books.jsonl ({held_out} of 61 documents held out), letter.jsonl (0 of 1 document held out)\n",
        "LOSES TEXT: of a sample (",
        "1 exact copy of another document, always in the same split\n",
        f"{held_out} of {held_out} held-out paragraphs (100.0%), in {held_out} of {held_out} documents, are in the training",
        "left out: 48 paths (22 hidden, 1 README beside data, 1 the same file as 0, 24 for other reasons)\n",
        "3 bad lines left out: see --report\n",
        "note: source letter.jsonl has 1 document: none of it is held out\n",
        "note: x.txt and 1 more: UTF-16, read as such\n",
    ):
        assert f"  {line}" in short
    sample = made.header["provenance"]["tokenizer_sample"]
    assert sample["changed"] == sample["pieces"]
    assert 0.5 < sample["lost_bytes"] / sample["text_bytes"] < 1

    monkeypatch.undo()
    monkeypatch.setattr(prepare, "_documents", None)
    assert prepare.main([*command, "--quiet", "--report"]) == 0
    report = capsys.readouterr().out
    assert report == summary.report(made) + "\n"
    for line in (
        "sources:\n",
        "books.jsonl          61",
        "JSON      2         62",
        "22 hidden:\n    .x0\n",
        "    .x19\n    and 2 more\n",
        "  7 for other reasons\n",
        "3 bad lines: not JSON; first: books.jsonl:7\n",
        "LOSES TEXT: of a sample (",
        "source letter.jsonl has 1 document: none of it is held out\n",
    ):
        assert line in report


def test_a_store_without_doubts_is_short(tmp_path, capsys):
    command = ["sotu", "--out", str(tmp_path / "store"), "--tokenizer", "bytes"]
    assert prepare.main(command) == 0
    short = capsys.readouterr().out
    assert "lossless on a sample (64 pieces of documents" in short
    assert "1 source: sotu (10 of 233 documents held out)" in short
    for word in ("note", "left out:", "bad", "exact cop", "paragraphs", "LOSES"):
        assert word not in short
    assert prepare.main([*command, "--report"]) == 0
    assert "0 of 10 held-out paragraphs (0.0%), in 0 of 10 documents, are in the training split too" in capsys.readouterr().out


def test_copies_are_on_both_sides_where_documents_are_held_out_by_position(tmp_path, capsys):
    texts = ["all the same" if i % 2 == 0 else f"text {i}" for i in range(40)]  # held out are numbers 10 and 30
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [str(tmp_path / "a.jsonl"), "--tokenizer", "bytes", "--out"]
    assert prepare.main([*command, str(tmp_path / "position"), "--holdout_rule", "position"]) == 0
    assert "19 exact copies of another document; 2 held-out documents in the training split too\n" in capsys.readouterr().out
    assert prepare.main([*command, str(tmp_path / "hash")]) == 0
    assert "19 exact copies of another document, always in the same split\n" in capsys.readouterr().out


def test_a_share_that_is_far_from_what_was_asked_for(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i}" * (1 + 1000 * (i == 9))}) + "\n" for i in range(10)))
    assert prepare.main([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "store"), "--tokenizer", "bytes"]) == 0
    assert " of the tokens are held out, 0.05 was asked for: few documents" in capsys.readouterr().out


def test_the_command_of_a_store_of_the_first_version(tmp_path, monkeypatch, capsys):
    first_version.unpack(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    command = ["--out", "store", "--tokenizer", "bytes", "documents.jsonl"]
    assert prepare.main([*command, "--report"]) == 0
    said = capsys.readouterr().out
    assert "store: is there already, nothing to do" in said
    assert said.count("held out by position, one document of 20 in the order of the inputs (the rule of the first") == 2
    assert said.count("not recorded by the version that made this store") == 5
    assert prepare.main([*command, "--holdout_rule", "position"]) == 0
    for option, message in (
        (["--source_key", "domain"], "source_key: 'domain' here, None there"),
        (["--bad_lines", "skip"], "bad_lines: 'skip' here, 'error' there"),
        (["--holdout_every", "10"], "holdout_every: 10 here, 20 there"),
    ):
        assert prepare.main([*command, *option]) == 2
        assert f"store holds a finished store of another request ({message}); nothing was changed" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == {".lock": b"", **before}

    made = prepare.prepare(prepare.Recipe(("documents.jsonl",), "bytes", holdout_rule="position"), "again")
    assert made.fingerprint == first_version.FINGERPRINT
    for name in store.FILES:
        assert (made.path / name).read_bytes() == before[name]
    assert prepare.main([*command[:1], "again", *command[2:]]) == 2  # by position was asked for here
    assert "holdout_rule: 'hash' here, 'position' there" in capsys.readouterr().err
