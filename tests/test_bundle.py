import gzip
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time

import pytest
from etils import epath

from gqa_jax import storage
from gqa_jax.config import ConfigError
from gqa_jax.training import run_folder
from launch import grid
from launch.cells import REPOSITORY, Layout
from launch.executors import base, bundle, checkout
from tests import grid_fakes

#: Files of a small copy of the code, beside checkout.FILES.
SMALL = (
    "gqa_jax/train.py",
    "gqa_jax/schema.csv",
    "gqa_jax/data/presets/README.md",
    "launch/report/page.html",
    "configs/cell.py",
)


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
def unpacked(tmp_path, packed):
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


def test_the_same_code_is_the_same_bundle(unpacked, packed):
    first = bundle.pack(unpacked, commit="c")
    path = unpacked / "gqa_jax" / "costs.py"
    os.utime(path, (0, 0))
    path.chmod(0o600)
    assert bundle.pack(unpacked, commit="c") == first
    assert bundle.pack(unpacked, commit="d") != first
    path.write_text(path.read_text() + "\n")
    assert bundle.pack(unpacked, commit="c") != first


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


def small(root):
    """Code of a file or two a folder, which `checkout.contents` takes for this one."""
    package_data = '[tool.setuptools.package-data]\ngqa_jax = ["*.csv", "data/presets/*"]\n"launch.report" = ["*.html"]\n'
    texts = {name: name for name in (*checkout.FILES, *SMALL)} | {"pyproject.toml": package_data, ".gitignore": "ignored*\n"}
    write(root, texts)
    return root


def write(root, texts):
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def commit(root):
    git(root, "init", "--quiet")
    git(root, "add", "--force", ".")
    git(root, "commit", "--quiet", "-m", "all")


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A checkout with what can't be packed, tracked: never changed, but copied."""
    root = small(tmp_path_factory.mktemp("committed") / "code")
    others = ("configs/.env", "configs/.keys/all.py", "configs/clusters/mine.toml", "docs/page.md", "tests/a.py")
    write(root, dict.fromkeys(others, "key"))
    commit(root)
    return root


@pytest.fixture
def repository(committed, tmp_path):
    return shutil.copytree(committed, tmp_path / "code", symlinks=True)


def added(root, target, name="configs/link.py"):
    """A link of that name, which git tracks."""
    (root / name).symlink_to(target)
    git(root, "add", name)


def test_of_a_checkout_only_tracked_files_are_packed(repository):
    assert set(checkout.contents(repository)) == {*checkout.FILES, *SMALL}
    assert checkout.changes(repository) is None
    (repository / "configs" / "cell.py").chmod(0o755)  # bundles have no modes
    assert checkout.changes(repository) is None


@pytest.mark.parametrize(
    ("name", "is_packed"),
    [
        ("gqa_jax/new.py", True),
        ("configs/grids/mine.py", True),
        ("gqa_jax/ignored.py", False),
        ("gqa_jax/big.bin", False),
        ("gqa_jax/data/presets/mine.csv", False),
        ("configs/.env", False),
        ("configs/.hidden.py", False),
        ("configs/.keys/mine.py", False),
        ("configs/clusters/mine.py", False),
        ("tests/new.py", False),
        ("notes.py", False),
    ],
)
def test_of_untracked_files_new_modules_are_packed(repository, name, is_packed):
    write(repository, {name: "new"})
    found = checkout.contents(repository)
    assert found.get(name) == (b"new" if is_packed else None)
    assert len(found) == len(checkout.FILES) + len(SMALL) + is_packed
    changes = checkout.changes(repository)
    assert (changes.new if changes else []) == [name] * is_packed


def test_tracked_files_are_packed_as_they_are(repository):
    write(repository, {"launch/report/page.html": "changed", "gqa_jax/mine.bin": "data"})
    git(repository, "add", "gqa_jax/mine.bin")
    found = checkout.contents(repository)
    assert (found["launch/report/page.html"], found["gqa_jax/mine.bin"]) == (b"changed", b"data")
    git(repository, "rm", "--quiet", "gqa_jax/schema.csv")
    assert checkout.changes(repository).modified == ["gqa_jax/mine.bin", "gqa_jax/schema.csv", "launch/report/page.html"]


def test_changes_are_named(repository):
    write(repository, {"configs/cell.py": "changed", "tests/a.py": "changed"} | {f"launch/m{i:02}.py": "" for i in range(12)})
    head = subprocess.run(["git", "-C", repository, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    named = ", ".join(f"launch/m{i:02}.py" for i in range(10))
    assert checkout.changes(repository).said() == (
        f"the bundle differs from commit {head[:10]} in 1 file: configs/cell.py; "
        f"it has 12 files that git does not track: {named} and 2 more"
    )


def test_changes_before_the_first_commit(tmp_path):
    root = small(tmp_path)
    git(root, "init", "--quiet")
    git(root, "add", ".")
    found = checkout.changes(root)
    assert (set(found.modified), list(found.new)) == ({*checkout.FILES, *SMALL}, [])
    assert "differs from commit (none yet) in 10 files" in found.said()


def test_code_in_a_folder_of_a_repository(tmp_path):
    """Names are those below the code."""
    root = small(tmp_path / "code")
    commit(tmp_path)
    write(root, {"configs/cell.py": "changed", "configs/new.py": ""})
    assert set(checkout.contents(root)) == {*checkout.FILES, *SMALL, "configs/new.py"}
    found = checkout.changes(root)
    assert (found.modified, found.new) == (["configs/cell.py"], ["configs/new.py"])


def test_a_tracked_file_that_is_gone(repository):
    (repository / "configs" / "cell.py").unlink()
    with pytest.raises(ConfigError, match=r"lacks configs/cell\.py, which git tracks: `git restore` it, or `git rm` it"):
        checkout.contents(repository)


@pytest.mark.parametrize("target", ["cell.py", "../docs/page.md", "link.d/../cell.py"])
def test_a_link_to_a_tracked_file_is_packed_as_its_content(repository, target):
    (repository / "configs" / "link.d").mkdir()
    added(repository, target)
    (repository / "configs" / "new.py").symlink_to("cell.py")
    found = checkout.contents(repository)
    assert found["configs/link.py"] == (repository / "configs" / target).read_bytes()
    assert found["configs/new.py"] == b"configs/cell.py"


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("/etc/hostname", "is none of the code's files"),
        ("../../outside.py", "is none of the code's files"),
        ("../gqa_jax", "is none of the code's files"),
        (".env", "is none of the code's files"),
        ("clusters/mine.toml", "is none of the code's files"),
        ("../untracked.txt", "is none of the code's files"),
        ("nowhere.py", "is not there"),
        ("link.py", "is not there"),
    ],
)
@pytest.mark.parametrize("is_tracked", [True, False])
def test_a_link_to_anything_else_is_refused(repository, target, why, is_tracked):
    (repository.parent / "outside.py").write_text("")
    (repository / "untracked.txt").write_text("")
    added(repository, target)
    if not is_tracked:
        git(repository, "rm", "--quiet", "--cached", "configs/link.py")
    with pytest.raises(ConfigError, match=rf"^configs/link\.py is a link to /.*, which {why}: put a copy of the file in"):
        checkout.contents(repository)


def test_a_link_that_is_no_module_is_left_out(repository):
    (repository / "configs" / "link").symlink_to("/etc/hostname")
    assert "configs/link" not in checkout.contents(repository)


def test_a_folder_in_whose_place_is_a_link(repository, tmp_path):
    shutil.move(repository / "launch", tmp_path / "elsewhere")
    (repository / "launch").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"launch/report/page\.html is a link to .*elsewhere"):
        checkout.contents(repository)


@pytest.mark.parametrize("has_git", [True, False])
def test_code_that_is_too_large(repository, monkeypatch, has_git):
    write(repository, {"gqa_jax/a.py": "x" * 400_000, "gqa_jax/b.py": "x" * 300_000, "gqa_jax/c.py": "x" * 299_000})
    if not has_git:
        shutil.rmtree(repository / ".git")
    monkeypatch.setattr(checkout, "MOST_BYTES", 1_000_000)
    assert "gqa_jax/a.py" in checkout.contents(repository)
    write(repository, {"gqa_jax/d.py": "x" * 1000})
    largest = r"gqa_jax/a\.py \(0\.4 MB\), gqa_jax/b\.py \(0\.3 MB\), gqa_jax/c\.py \(0\.3 MB\): keep data outside"
    with pytest.raises(ConfigError, match=rf"has 1\.0 MB, and at most 1 MB go to hosts; its largest files are {largest}"):
        checkout.contents(repository)


@pytest.mark.parametrize("why", ["no program", "no repository"])
def test_a_checkout_that_git_cannot_read(repository, monkeypatch, why):
    """What it ignores is not known then."""
    if why == "no program":
        monkeypatch.setenv("PATH", "")
    else:
        shutil.rmtree(repository / ".git")
        (repository / ".git").write_text("gitdir: nowhere")
    for function in (checkout.contents, checkout.changes):
        with pytest.raises(
            ConfigError, match=r"is not known, for git can't say it \((git: No such file|fatal: not a git repo)"
        ):
            function(repository)


def test_without_git_modules_and_package_data_are_packed(tmp_path):
    """Also below another project's checkout, as an installed package may be."""
    root = small(tmp_path / "code")
    others = (
        "gqa_jax/big.bin",
        "gqa_jax/costs/deep.csv",
        "gqa_jax/.x.py",
        "configs/.env",
        "configs/clusters/a.py",
        "configs/a.csv",
    )
    write(root, dict.fromkeys((*others, "gqa_jax/__pycache__/train.cpython-312.pyc"), ""))
    assert set(checkout.contents(root)) == {*checkout.FILES, *SMALL}
    git(tmp_path, "init", "--quiet")
    assert set(checkout.contents(root)) == {*checkout.FILES, *SMALL}
    assert checkout.changes(root) is None
    (root / "gqa_jax" / "link.py").symlink_to("train.py")
    assert checkout.contents(root)["gqa_jax/link.py"] == b"gqa_jax/train.py"
    (root / "gqa_jax" / "link.csv").symlink_to("/etc/hostname")
    with pytest.raises(ConfigError, match=r"gqa_jax/link\.csv is a link to /etc/hostname"):
        checkout.contents(root)


def test_without_git_the_whole_code_is_packed(unpacked, packed):
    """But for tables of configs/, which no run reads."""
    assert set(members(packed)) - set(members(bundle.pack(unpacked, commit="c"))) == {"configs/grids/paper-plan.csv"}


@pytest.mark.parametrize("engine", ["tpu", "sky"])
@pytest.mark.parametrize("command", ["run", "run --dry_run"])
def test_it_is_said_what_is_in_no_commit(engine, command, tmp_path, packed, monkeypatch, caplog):
    """Once a launcher."""
    monkeypatch.setattr(bundle, "pack", lambda: packed)
    monkeypatch.setattr(checkout, "changes", lambda: checkout.Changes("c" * 40, ["configs/cell.py"], ["launch/new.py"]))
    options = {"engine": engine, "topology": "v5e:2x4", "shared_root": True}
    options |= {"project": "my-own-project", "zones": ["us-west4-a"]} if engine == "tpu" else {}
    one = base.make(options, Layout(epath.Path(tmp_path / "grid")))
    if command == "run":
        one.check_bundle()
        one.prepare()
    (cell, *_) = grid.cells(grid_fakes.small_grid())
    one.submission(cell)
    said = "in 1 file: configs/cell.py; it has 1 file that git does not track: launch/new.py"
    assert caplog.messages == [f"the bundle differs from commit {'c' * 10} {said}"]


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


def test_uv_is_pinned():
    """By its version and the hashes of two files; pip refuses all others."""
    assert re.fullmatch(r"uv==\d+\.\d+\.\d+( --hash=sha256:[0-9a-f]{64}){2}", bundle.UV)
    assert {"--require-hashes", "--no-deps", "--only-binary=:all:", "--requirement=/dev/stdin"} < {*bundle.INSTALL_UV}
    scripts = [path for path in (REPOSITORY / "launch" / "executors").iterdir() if path.is_file()]
    assert not [path.name for path in scripts if "astral.sh" in path.read_text()]  # whose installer brings the newest


def test_it_is_quick(packed):
    started = time.monotonic()
    bundle.check(bundle.named("/x", packed), packed)
    assert time.monotonic() - started < 30.0
    assert len(packed) < 20e6
