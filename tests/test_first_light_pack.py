"""What travels to a machine without network: nothing that is there, everything else, at its pin. Wheels here are made up."""

import importlib.metadata
import os
import shlex
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from benchmarks import first_light_pack as pack


def wheel(folder, name, version, *requires, files=(), tag="py3-none-any"):
    path = folder / f"{name}-{version}-{tag}.whl"
    information = f"{name}-{version}.dist-info"
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{information}/RECORD", "")
        archive.writestr(f"{information}/METADATA", "\n".join(metadata))
        for file in (f"{name}.py", *files):
            archive.writestr(file, f"VERSION = {version!r}")
    return path


class Index:
    """Where wheels come from: what was asked for, and wheels by pin."""

    def __init__(self, **wheels):
        self.wheels, self.asked = {pin.replace("_", "-"): arguments for pin, arguments in wheels.items()}, []

    def __call__(self, pins, folder):
        for pin in pins:
            self.asked.append(pin)
            name, _, version = pin.partition("==")
            wheel(folder, name, version, *self.wheels[name])


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """A project that needs `train` and compares with tokamax; a machine that has jax 0.11.2 and numpy, in some version."""
    (tmp_path / "machine.txt").write_text("jax==0.11.2  # seen\nNumPy\n")
    (tmp_path / "pins.txt").write_text("train==1.1\nreader==2.0\ntokamax==0.0.17\nshapes==1.0\njax==0.12\n")
    wanted = {"gqa-jax": [Requirement("train>=1"), Requirement("jax>=0.11")], "gqa-jax[peers]": [Requirement("tokamax")]}
    monkeypatch.setattr(pack, "roots", lambda: wanted)
    return tmp_path


def gather(paths, index, **options):
    wheels = pack.gather(paths / "pack", paths / "machine.txt", pins=[paths / "pins.txt"], fetch=index, **options)
    return [f"{w.name} {w.version}" for w in wheels]


def index(**changes):
    return Index(**({"train": ["numpy", "reader[fast]>=2"], "reader": [], "tokamax": ["shapes"], "shapes": []} | changes))


ALL = ["reader 2.0", "shapes 1.0", "tokamax 0.0.17", "train 1.1"]


def test_what_is_lacking_is_followed_to_its_end(paths):
    optional = 'cuda-only; extra == "cuda"', 'old; python_version < "3.12"', 'windows; sys_platform == "win32"', "xprof>=2"
    found = index(tokamax=["shapes", *optional], reader=['numpy; extra == "fast"'])
    assert gather(paths, found) == ALL
    assert sorted(found.asked) == ["reader==2.0", "shapes==1.0", "tokamax==0.0.17", "train==1.1"]  # not jax, not numpy
    again = index()
    assert gather(paths, again) == ALL
    assert again.asked == []


def test_conditions_are_those_of_the_other_machine(paths, monkeypatch):
    monkeypatch.setattr(pack, "ENVIRONMENT", pack.ENVIRONMENT | {"sys_platform": "win32"})
    assert gather(paths, index(train=['reader; sys_platform == "linux"'])) == ["shapes 1.0", "tokamax 0.0.17", "train 1.1"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": ["reader", "nowhere>=3"]}, "train 1.1 needs nowhere>=3, which is neither in the pack nor on the machine"),
        (
            {"train": ['reader[fast]; python_version > "3"'], "reader": ['nowhere; extra == "fast"']},
            "reader 2.0 needs nowhere,",
        ),
        ({"train": ["reader>=3"]}, "train 1.1 needs reader>=3, and 2.0 is there\nchange the versions in pins.txt"),
        (
            {"train": ["jax>=1"], "jax": []},
            "train 1.1 needs jax>=1, and 0.12 is there",
        ),  # neither the machine's nor the pinned one
    ],
)
def test_what_nothing_meets_is_named(paths, changes, words):
    with pytest.raises(ValueError, match="needs") as raised:
        gather(paths, index(**changes))
    assert words in str(raised.value)


def test_too_old_a_package_of_the_machine_is_replaced(paths):
    (paths / "machine.txt").write_text("jax==0.11.2\ntokamax==0.0.18\n")  # and tokamax by its pin, whatever is there
    assert gather(paths, index(train=["jax>=0.12"], jax=[])) == ["jax 0.12", "shapes 1.0", "tokamax 0.0.17", "train 1.1"]


def test_torn_wheels_old_pins_and_what_the_machine_has_now_leave_the_folder(paths):
    gather(paths, index())
    (paths / "pack" / "train-1.1-py3-none-any.whl").write_bytes(b"PK")
    wheel(paths / "pack", "shapes", "0.9")
    (paths / "machine.txt").write_text("jax\nnumpy\nreader==2.5\ntokamax==0.0.18\n")
    found = index()
    assert gather(paths, found) == ["shapes 1.0", "tokamax 0.0.17", "train 1.1"]
    assert found.asked == ["train==1.1"]
    assert len(list((paths / "pack").iterdir())) == 3


def test_too_many_bytes_are_refused_with_their_sizes(paths, monkeypatch):
    monkeypatch.setattr(pack, "LARGEST_BYTES", 100)
    with pytest.raises(ValueError, match=r"more than 0:\n.*\(0 kB\)\n"):
        gather(paths, index())


@pytest.mark.parametrize("text", ["reader>=2", "reader==", "-r others.txt", "reader==two"])
def test_a_line_that_pins_nothing_is_refused(tmp_path, text):
    (tmp_path / "pins.txt").write_text(text)
    with pytest.raises(ValueError, match=r"pins\.txt: '.*' is n"):
        pack.read_pins(tmp_path / "pins.txt")


PIP = [
    (
        "WARNING: Retrying ... after connection broken by ...\nERROR: No matching distribution found for a==1",
        "is there a network",
    ),
    ("ERROR: Could not find a version\nERROR: No matching distribution found for b==2", "b==2 has no wheel for Python 3.12 on"),
    ("/bin/python: No module named pip", "make setup"),
    ("", "pip could not download a==1, b==2: it gave no reason"),
    ("ERROR: disk quota exceeded\n", "pip could not download a==1, b==2: ERROR: disk quota exceeded"),
]


@pytest.mark.parametrize(("stderr", "words"), PIP)
def test_why_pip_failed(tmp_path, monkeypatch, stderr, words):
    monkeypatch.setattr(subprocess, "run", lambda argv, **_: subprocess.CompletedProcess(argv, 1, "", stderr))
    with pytest.raises(ValueError, match=words):
        pack.download(["a==1", "b==2"], tmp_path)
    assert not list(tmp_path.iterdir())


def install(paths, monkeypatch, capsys, **there):
    there = {"jax": "0.11.2", "numpy": "2.5"} | there
    real = pack.installed
    known = {name: Version(version) for name, version in there.items()}
    monkeypatch.setattr(pack, "installed", lambda path: known if len(path) > 1 else real(path))
    monkeypatch.setitem(sys.modules, "xprof", None)  # not there
    pack.install(paths / "site", paths / "pack")
    return {name: str(v) for name, v in real([str(paths / "site")]).items()}, capsys.readouterr().err


def test_the_machine_gets_only_what_it_lacks(paths, monkeypatch, capsys):
    gather(paths, index())
    there, errors = install(paths, monkeypatch, capsys, reader="2.4", shapes="0.1")
    assert there == {"train": "1.1", "tokamax": "0.0.17", "gqa-jax": importlib.metadata.version("gqa-jax")}
    assert errors == ""
    assert (paths / "site" / "train.py").read_text() == "VERSION = '1.1'"
    assert (paths / "site" / "xprof" / "cli" / "tools" / "get_kernel_stats_tool.py").read_text() == ""
    (paths / "site" / "train.py").write_text("kept")
    there, errors = install(paths, monkeypatch, capsys, reader="1.9", numpy="1.0")  # not what train asks for
    assert there["reader"] == "2.0"
    assert (paths / "site" / "train.py").read_text() == "kept"


def test_what_the_machine_lacks_all_the_same_is_said(paths, monkeypatch, capsys):
    gather(paths, index(train=["numpy>=2"]))
    tag = "cp39-cp39-manylinux_2_17_x86_64"
    wheel(paths / "pack", "shapes", "1.0", tag=tag)
    (paths / "pack" / "shapes-1.0-py3-none-any.whl").unlink()
    there, errors = install(paths, monkeypatch, capsys, numpy="1.26")
    assert sorted(there) == ["gqa-jax", "tokamax", "train"]
    assert f"shapes-1.0-{tag}.whl is not for this Python" in errors
    assert "tokamax 0.0.17 needs shapes, which is neither" in errors
    assert "train 1.1 needs numpy>=2, and 1.26 is there" in errors


def test_an_installed_wheel_meets_all_that_is_asked_of_it(paths):
    wheels = {
        name: pack.read_wheel(wheel(paths, name, version, *requires))
        for name, version, requires in [("model", "2.12", ["core==2.41"]), ("core", "2.41", []), ("other", "1.0", ["core>2.5"])]
    }
    wanted = {"gqa-jax": [Requirement("other"), Requirement("model")]}
    newer = pack.walk(wanted, wheels, {"core": Version("2.50")})
    assert newer.wheels == {"model", "core", "other"}  # other would do with the machine's, model does not
    assert newer.unmet == []
    wheels["other"] = pack.read_wheel(wheel(paths, "other", "1.0", "core>2.45"))
    clash = pack.walk(wanted, wheels, {"core": Version("2.50")})
    assert list(map(str, clash.unmet)) == ["other 1.0 needs core>2.45, and 2.41 is there"]


def test_another_version_in_the_target_is_refused(paths, monkeypatch, capsys):
    gather(paths, index())
    (paths / "site" / "train-1.0.dist-info").mkdir(parents=True)
    (paths / "site" / "train-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: train\nVersion: 1.0\n")
    with pytest.raises(ValueError, match=r"has train 1\.0, the pack 1\.1: delete"):
        install(paths, monkeypatch, capsys)


def test_wheels_with_a_data_folder_and_one_cut_off(tmp_path):
    files = ["tool-1.0.data/platlib/fast.py", "tool-1.0.data/scripts/serve.py", "tool-1.0.data/purelib/deep/slow.py"]
    made = pack.read_wheel(wheel(tmp_path, "tool", "1.0", files=files))
    (tmp_path / "site" / "tool-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "tool-1.0.dist-info" / "METADATA").write_text("Name: tool\nVersion: 1.0\n")  # no RECORD: cut off
    (tmp_path / "site" / "fast.py").mkdir()
    with pytest.raises(OSError, match="fast"):
        pack._unpack(made, tmp_path / "site")
    (tmp_path / "site" / "fast.py").rmdir()
    pack._unpack(made, tmp_path / "site")
    found = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*") if path.is_file()}
    assert found == {"tool.py", "fast.py", "deep/slow.py", "tool-1.0.dist-info/METADATA", "tool-1.0.dist-info/RECORD"}


def test_the_committed_lists_are_read_and_tokamax_has_its_pins():
    pins = pack.read_pins(*pack.PINS)
    assert pins["tokamax"] == "tokamax==0.0.17"
    machine = pack.read_machine(pack.MACHINE)
    assert machine["numpy"] >= Version("2")
    direct = {requirement.name.lower().replace("_", "-") for each in pack.roots().values() for requirement in each}
    assert "tokamax" in direct - machine.keys()
    assert direct - machine.keys() <= pins.keys()


def test_the_command_installs_then_runs_and_gives_its_exit_code(tmp_path):
    """The printed command in a copy of what it needs, with a `first_light` that says what it was given."""
    for name in ("benchmarks/__init__.py", "benchmarks/first_light_pack.py", "benchmarks/first_light_run.sh", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((pack.REPOSITORY / name).read_text())
    (tmp_path / ".first-light").mkdir()
    wheel(tmp_path / ".first-light", "tokamax", "0.0.17")
    program = "import os, sys, tokamax", "print(sys.argv[1:], tokamax.VERSION, os.environ['GQA_JAX_CACHE'])", "sys.exit(7)"
    (tmp_path / "benchmarks" / "first_light.py").write_text("\n".join(program))
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "GQA_JAX_CACHE")}
    environment |= {"TMPDIR": str(tmp_path / "tmp"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (tmp_path / "bin" / "python3").chmod(0o755)
    argv = ["bash", *pack.COMMAND.split()[1:], "--only", "two words"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert (
        done.stdout.splitlines()[-1]
        == f"['--out', '{tmp_path / 'OUT'}', '--only', 'two words'] 0.0.17 {tmp_path}/tmp/first-light/cache"
    )
    usage = subprocess.run([*argv[:2], "--only"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (usage.returncode, usage.stderr.split()[0]) == (2, "usage:")
