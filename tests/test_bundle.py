import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
import time

import pytest

from gqa_jax import storage
from gqa_jax.config import ConfigError
from gqa_jax.training import run_folder
from launch.executors import bundle


@pytest.fixture(scope="module")
def packed():
    return bundle.pack()


def members(content):
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers()}


def without(packed, name):
    """A bundle that lacks a file."""
    contents = members(packed)
    del contents[name]
    return bundle._tar(contents)


@pytest.fixture
def checkout(tmp_path, packed):
    """A copy of the code, outside of any checkout."""
    for name, content in members(packed).items():
        if name != bundle.COMMIT:
            path = tmp_path / "copy" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return tmp_path / "copy"


def git(folder, *arguments):
    who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, "-C", folder, *arguments], check=True, capture_output=True)


def test_the_same_code_is_the_same_bundle(checkout, packed):
    first = bundle.pack(checkout, commit="c")
    path = checkout / "gqa_jax" / "costs.py"
    os.utime(path, (0, 0))
    path.chmod(0o600)
    assert bundle.pack(checkout, commit="c") == first
    assert bundle.pack(checkout, commit="d") != first
    path.write_text(path.read_text() + "\n")
    assert bundle.pack(checkout, commit="c") != first


def test_nothing_of_this_machine_is_in_it(packed):
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as tar:
        names = [m.name for m in tar.getmembers()]
        assert names == sorted(names)
        for m in tar.getmembers():
            assert (m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) == (0, 0, 0, "", "", 0o644)
    assert gzip.decompress(packed)
    assert packed[4:8] == b"\0\0\0\0"  # time of the gzip header


def test_what_is_in_it(packed):
    names = set(members(packed))
    assert {
        "gqa_jax/data/sotu.jsonl.xz",
        "launch/executors/tpu_startup.sh",
        "configs/cell.py",
        "pyproject.toml",
        "NOTICE",
    } <= names
    assert not [name for name in names if name.startswith(("tests/", "configs/clusters/", ".")) or "__pycache__" in name]
    assert members(packed)[bundle.COMMIT].decode().strip() == (run_folder.commit() or "")


def test_files_that_git_does_not_ignore(checkout):
    git(checkout, "init", "--quiet")
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "-m", "all")
    (checkout / "configs" / "clusters").mkdir()
    for name in ("gqa_jax/new.py", "gqa_jax/ignored.py", "configs/clusters/mine.toml", "notes.txt"):
        (checkout / name).write_text("")
    (checkout / ".gitignore").write_text("ignored.py\n")
    names = set(members(bundle.pack(checkout, commit="c")))
    assert "gqa_jax/new.py" in names
    assert not names & {"gqa_jax/ignored.py", "configs/clusters/mine.toml", "notes.txt"}
    (checkout / "gqa_jax" / "formatting.py").unlink()
    with pytest.raises(ConfigError, match=r"lacks gqa_jax/formatting\.py, which git tracks: `git restore` it, or `git rm` it"):
        bundle.pack(checkout)


def test_without_git(checkout, packed):
    """Also below another project's checkout, as an installed package may be."""
    assert set(members(bundle.pack(checkout, commit="c"))) == set(members(packed))
    (checkout / "gqa_jax" / "__pycache__").mkdir()
    (checkout / "gqa_jax" / "__pycache__" / "costs.cpython-312.pyc").write_bytes(b"")
    git(checkout.parent, "init", "--quiet")
    assert set(members(bundle.pack(checkout, commit="c"))) == set(members(packed))


def test_it_is_put_once(tmp_path, packed, monkeypatch):
    made = bundle.make(tmp_path / "a", packed)
    assert made.path.name == f"{made.sha256}.tar.gz"
    bundle.check(made)
    written = []
    write = storage.write_bytes
    monkeypatch.setattr(storage, "write_bytes", lambda path, content: (written.append(path), write(path, content)))
    assert bundle.make(tmp_path / "a", packed) == made
    assert written == []
    assert bundle.make(tmp_path / "b", bundle.read(bundle.find(made.path))) == bundle.Bundle(
        tmp_path / "b" / made.path.name, made.sha256
    )
    assert written == [tmp_path / "b" / made.path.name]


def test_it_is_put_on_gs(gcs_root, packed, monkeypatch):
    made = bundle.make(gcs_root, packed)
    bundle.check(made)
    assert storage.names(gcs_root) == [made.path.name]
    monkeypatch.setattr(storage, "write_bytes", lambda *_: pytest.fail("written again"))
    assert bundle.make(gcs_root, bundle.read(made)) == made


def test_a_damaged_one_is_replaced_by_make_and_refused_by_check(tmp_path, packed):
    made = bundle.make(tmp_path, packed)
    made.path.write_bytes(packed[:-1])
    with pytest.raises(ConfigError, match="is damaged: its SHA-256 is"):
        bundle.check(made)
    bundle.make(tmp_path, packed)
    bundle.check(made)


#: setuptools refuses to install without NOTICE.
@pytest.mark.parametrize("name", ["gqa_jax/train.py", "configs/cell.py", "pyproject.toml", "NOTICE", "COMMIT"])
def test_what_is_missing_is_named(tmp_path, packed, name):
    with pytest.raises(ConfigError, match=f"lacks {name}"):
        bundle.make(tmp_path, without(packed, name))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../evil.py", "/etc/evil.py"])
def test_a_member_outside(tmp_path, packed, name):
    content = bundle._tar(members(packed) | {name: b""})
    with pytest.raises(ConfigError, match="is not a plain file below the bundle"):
        bundle.make(tmp_path, content)


def test_no_bundle(tmp_path):
    for name in ("code.tar.gz", f"{'0' * 63}.tar.gz", f"{'0' * 64}.tar"):
        with pytest.raises(ConfigError, match="must be <sha256>"):
            bundle.find(tmp_path / name)
    with pytest.raises(ConfigError, match="is not there"):
        bundle.check(bundle.find(tmp_path / f"{'0' * 64}.tar.gz"))
    with pytest.raises(ConfigError, match="is no bundle"):
        bundle.make(tmp_path, b"text")


def test_it_runs_unpacked(tmp_path, packed):
    """The launcher's side of it; training itself runs from one in tests/test_tpu.py."""
    made = bundle.make(tmp_path, packed)
    shutil.unpack_archive(made.path, tmp_path / "code", filter="data")
    program = "import gqa_jax.costs, launch.grid; print(gqa_jax.__file__, launch.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "code", capture_output=True, text=True, check=True
    ).stdout
    assert found.split() == [str(tmp_path / "code" / name / "__init__.py") for name in ("gqa_jax", "launch")]


def test_it_is_quick(packed):
    started = time.monotonic()
    bundle.check(bundle.named("/x", packed), packed)
    assert time.monotonic() - started < 30.0
    assert len(packed) < 20e6
