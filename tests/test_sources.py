"""Inputs to files: everything that can be reached is found once, or named."""

import json
import os
import re
import shlex
import socket
import stat
from pathlib import Path

import pytest

from gqa_jax.data import prepare, sources
from gqa_jax.data.documents import InputError, find_sources
from tests.reading import texts


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")


def names(*inputs, **options):
    return [source.name for source in find_sources(inputs, **options).sources]


@pytest.fixture
def closed(monkeypatch):
    """Paths that the system refuses, by their last name; root may read everything."""
    refused = set()
    access, scandir = os.access, os.scandir

    def scan(path):
        if Path(path).name in refused:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name not in refused and access(path, mode))
    monkeypatch.setattr(os, "scandir", scan)
    return refused


def test_folder_is_sorted_recursive_and_without_hidden_files(tmp_path):
    write(tmp_path, "b.txt", "a/z.txt", "a/b/c.md", "a.txt", ".git/config", ".hidden")
    assert names(tmp_path) == ["a/b/c.md", "a/z.txt", "a.txt", "b.txt"]
    assert names(tmp_path, include="*.txt") == ["a/z.txt", "a.txt", "b.txt"]
    assert names(tmp_path, exclude="a/*") == ["a.txt", "b.txt"]
    assert names(tmp_path / "b.txt", tmp_path / "a.txt") == ["b.txt", "a.txt"]
    assert find_sources([tmp_path], "*.txt", "b*").left_out == {
        "hidden": [f"{tmp_path}/.git/", f"{tmp_path}/.hidden"],
        "not selected by --include *.txt": [f"{tmp_path}/a/b/c.md"],
        "left out by --exclude b*": [f"{tmp_path}/b.txt"],
    }
    assert names(tmp_path, include=["*.md", "a*"], exclude=("a/z*", "b*")) == ["a/b/c.md", "a.txt"]
    left_out = find_sources([tmp_path], ["*.md", "b*"], ["x", "b*"]).left_out
    assert left_out["not selected by --include *.md b*"] == [f"{tmp_path}/a.txt", f"{tmp_path}/a/z.txt"]
    assert left_out["left out by --exclude b*"] == [f"{tmp_path}/b.txt"]
    with pytest.raises(InputError, match=r"no file in this folder \(include '\*.rs', exclude nothing\); .*not selected by"):
        names(tmp_path, include="*.rs")


def test_links_are_followed(tmp_path):
    write(tmp_path, "folder/a.txt", *(f"folder/sub/{i}.txt" for i in range(10, 30)), *(f"other/{i}.txt" for i in range(10, 30)))
    (tmp_path / "folder" / "linked").symlink_to("../other")
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "folder" / "z.txt").symlink_to(tmp_path / "one.txt")
    found = find_sources([tmp_path / "folder"])
    assert found.left_out == {}
    assert len(found.sources) == 42
    assert [source.name for source in found.sources][:2] == ["a.txt", "linked/10.txt"]
    assert found.sources[-1].name == "z.txt"
    assert found.sources[-1].size == 3


def test_what_can_be_reached_twice_is_read_once(tmp_path):
    write(tmp_path, "in/a.txt", "in/deep/b.txt", "in/z.txt", "out/c.txt")
    (tmp_path / "in" / "Again").symlink_to("deep")  # sorts before the folder itself
    (tmp_path / "in" / "deep" / "round").symlink_to("..")
    (tmp_path / "in" / "up").symlink_to("../..")  # the folder that holds the input
    (tmp_path / "in" / "deep" / "same.txt").symlink_to("../a.txt")
    (tmp_path / "out" / "back").symlink_to("../in")
    (tmp_path / "in" / "out").symlink_to("../out")
    (tmp_path / "in" / "outer").symlink_to("../out")
    os.link(tmp_path / "in" / "z.txt", tmp_path / "in" / "y.txt")
    found = find_sources([tmp_path / "in"])
    assert [source.name for source in found.sources] == ["a.txt", "deep/b.txt", "out/c.txt", "y.txt"]
    assert found.left_out == {
        f"the same folder as {tmp_path}/in/deep": [f"{tmp_path}/in/Again"],
        "a link to a folder that it lies in": [f"{tmp_path}/in/deep/round", f"{tmp_path}/in/up"],
        f"the same folder as {tmp_path}/in": [f"{tmp_path}/in/out/back"],
        f"the same folder as {tmp_path}/in/out": [f"{tmp_path}/in/outer"],
        f"the same file as {tmp_path}/in/a.txt": [f"{tmp_path}/in/deep/same.txt"],
        f"the same file as {tmp_path}/in/y.txt": [f"{tmp_path}/in/z.txt"],
    }
    again = find_sources([tmp_path / "in", "sotu", tmp_path / "in" / "a.txt", tmp_path / "in" / "deep", "sotu"])
    assert [source.name for source in again.sources] == [*(source.name for source in found.sources), "sotu"]
    assert {
        f"the same file as {tmp_path}/in/a.txt": [f"{tmp_path}/in/a.txt", f"{tmp_path}/in/deep/same.txt"],
        f"the same folder as {tmp_path}/in/deep": [f"{tmp_path}/in/Again", f"{tmp_path}/in/deep"],
        "the same input as sotu": ["sotu"],
    }.items() <= again.left_out.items()


@pytest.mark.parametrize("has_refs", [True, False])
def test_cache_of_the_hugging_face_hub_gives_each_file_once(tmp_path, has_refs):
    write(tmp_path, "blobs/0a1b", "blobs/2c3d", "blobs/4e5f", ".no_exist/x", *(["refs/main"] if has_refs else []))
    snapshot = tmp_path / "snapshots" / "revision"
    (snapshot / "data").mkdir(parents=True)
    for name, blob in {"data/train.jsonl": "0a1b", "README.md": "2c3d", "notes.txt": "4e5f"}.items():
        (snapshot / name).symlink_to(tmp_path / "blobs" / blob)
    found = find_sources([tmp_path])
    assert [source.name for source in found.sources] == ["snapshots/revision/data/train.jsonl", "snapshots/revision/notes.txt"]
    assert names(snapshot) == ["data/train.jsonl", "notes.txt"]
    others = [] if has_refs else [f"{tmp_path}/blobs/2c3d"]  # its text under the name that says nothing
    assert found.left_out.pop("README, licence or description beside data") == sorted([*others, f"{snapshot}/README.md"])
    del found.left_out["hidden"]
    if has_refs:
        why = "in a cache of the Hugging Face hub, whose snapshots name its files"
        assert found.left_out == {why: [f"{tmp_path}/blobs", f"{tmp_path}/refs"]}
    else:
        assert found.left_out == {
            f"the same file as {snapshot}/data/train.jsonl": [f"{tmp_path}/blobs/0a1b"],
            f"the same file as {snapshot}/notes.txt": [f"{tmp_path}/blobs/4e5f"],
        }


def test_readme_and_licence_beside_data(tmp_path):
    beside = ["README", "README.md", "README.rst", "LICENSE", "LICENSE-APACHE-2.0", "Licence.txt", "COPYING", "NOTICE"]
    beside += ["dataset_info.json", "dataset_infos.json"]
    data = ["README.jsonl", "data/train.parquet", "license-plates.txt", "notice-1.txt", "notice.1", "noticeboard.txt"]
    data += ["readme_corpus.txt", "text/readme.txt"]
    write(tmp_path, *beside, "data/LICENSE-MIT", *data)
    found = find_sources([tmp_path])
    assert [source.name for source in found.sources] == data
    assert len(found.left_out["README, licence or description beside data"]) == len(beside) + 1
    write(tmp_path / "prose", "README.md", "COPYING", "a.txt")
    assert names(tmp_path / "prose") == ["COPYING", "README.md", "a.txt"]
    assert names(tmp_path / "README.md") == ["README.md"]


def test_all_that_can_not_be_read_is_named_at_once(tmp_path, closed):
    write(tmp_path, "in/a.txt", "in/closed/x.txt", "in/secret.txt", "in/b.dat")
    (tmp_path / "in" / "dangling.txt").symlink_to("/nowhere/blob")
    (tmp_path / "in" / "self").symlink_to("self")
    os.mkfifo(tmp_path / "in" / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "in" / "socket"))
    closed |= {"closed", "secret.txt"}
    with pytest.raises(InputError) as raised:
        find_sources([tmp_path / "in", tmp_path / "in" / "pipe"])
    message = str(raised.value)
    assert message.startswith("7 files or folders can't be read: ")
    assert f"{tmp_path}/in/dangling.txt: a link to /nowhere/blob, which leads to nothing" in message
    assert f"{tmp_path}/in/pipe: a pipe, which can't be read twice: write it to a file" in message
    assert "; and 2 more. Repair that (a link to nothing: delete it; no permission: chmod -R u+rX)" in message
    with pytest.raises(
        InputError,
        match=r"^/[^;]*/in/secret.txt: no permission to read it\. Repair .*, or leave it out \(--exclude=secret.txt\)",
    ):
        find_sources([tmp_path / "in"], "*.txt", "[cd]*")
    for pattern in ("closed", "closed/*", "[cdsp]*"):
        found = find_sources([tmp_path / "in"], "[abc]*", pattern)
        assert f"{tmp_path}/in/closed" in found.left_out[f"left out by --exclude {pattern}"]
    with pytest.raises(InputError, match="in/closed: no permission"):
        find_sources([tmp_path / "in"], "*.txt", "[ds]*")  # may hold such a file


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    """As another user where the tests run as root, who may read everything."""
    write(tmp_path, "closed/x.txt", "a.txt")
    (tmp_path / "closed").chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # the folders above may be closed too
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65_534)
    try:
        with pytest.raises(InputError, match="closed: no permission to read it"):
            find_sources(["."])
    finally:
        if is_root:
            os.seteuid(0)
        (tmp_path / "closed").chmod(stat.S_IRWXU)


def test_missing_inputs(tmp_path, closed):
    write(tmp_path, "corpus.txt")
    with pytest.raises(InputError, match=r"no such file or folder, did you mean .*corpus.txt\?"):
        names(tmp_path / "corpsu.txt")
    with pytest.raises(InputError, match="named inputs are sotu and hf:NAME"):
        names("stou")
    for entry in ("a\0b", "x" * 5000, "~nobody-at-all/x", ""):
        with pytest.raises(InputError, match=r"no such file or folder|an input is empty") as raised:
            names(entry)
        assert len(str(raised.value)) < 6000
    with pytest.raises(InputError, match="no input: give files"):
        names()
    (tmp_path / "gone").symlink_to("nothing")
    with pytest.raises(InputError, match=r"gone: a link to nothing, which leads to nothing"):
        names(tmp_path / "gone")
    closed.add("corpus.txt")
    with pytest.raises(InputError, match=r"corpus.txt: no permission to read it"):
        names(tmp_path / "corpus.txt")


def test_odd_names(tmp_path):
    odd = ["two\nlines.txt", "spaces  and\ttab", "ünï.txt", "-rf", "*?[a]", "日本.jsonl", "'\"\\", os.fsdecode(b"\xff\xfe.txt")]
    for name in odd:
        (tmp_path / name).write_text('{"text": "x"}')
    found = find_sources([tmp_path])
    assert [source.name for source in found.sources] == sorted(odd)
    assert texts(tmp_path) == ["x"] * len(odd)
    assert names(tmp_path / odd[0]) == [odd[0]]
    (origin,) = {source.origin for source in find_sources([tmp_path / odd[0]]).sources}
    assert origin == "two\\nlines.txt"
    (tmp_path / odd[-1]).write_bytes(b"\xff" * 6)
    with pytest.raises(InputError, match=r"\\udcff\\udcfe.txt:1: not UTF-8 text"):
        texts(tmp_path)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (["/data/web", "sotu", "hf:a/b@en:test"], ["web", "sotu", "hf:a/b@en:test"]),
        (["/data/en/web", "/data/de/web/", "/data/web"], ["en/web", "de/web", "data/web"]),
        (["x/a.txt", "/a.txt", "./x/a.txt"], ["x/a.txt", "/a.txt", "x/a.txt"]),
        (["/"], ["/"]),
    ],
)
def test_origins_are_the_shortest_ends_that_no_other_input_shares(inputs, expected):
    assert sources._origins(inputs) == expected


ODD_NAMES = ["sub/gif.txt", "sub/[a]*?.txt", "-rf", "it's two words", "two\nlines", os.fsdecode(b"\xff.txt"), "!x", "$HOME"]


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_the_advice_to_leave_a_file_out_works(tmp_path, capfd, name):
    write(tmp_path, "in/other.txt", "in/sub/gif2.txt")
    path = tmp_path / "in" / name
    path.write_bytes(b"GIF89a\0\0")
    out = ["--tokenizer=bytes", f"--out={tmp_path / 'store'}"]
    assert prepare.main([*out, str(tmp_path / "in")]) == 2
    (option,) = re.findall(r"leave it out \((--exclude=.*)\)", capfd.readouterr().err)
    assert prepare.main([*out, str(path)]) == 2
    assert "take it off the command" in capfd.readouterr().err
    assert prepare.main([*out, str(tmp_path / "in"), *shlex.split(option), "--exclude=none"]) == 0
    provenance = json.loads((tmp_path / "store" / "header.json").read_text())["provenance"]
    assert [facts["first"] for facts in provenance["left_out"].values()] == [[sources.shown(path)]]
