"""What a bare GPU machine lacks to run `benchmarks.first_light`: gathered here as wheels, installed there without network.

    make first-light-pack                                # here: wheels into .first-light/, then the command to run there
    bash benchmarks/first_light_run.sh OUT [OPTION ...]  # there: installs them beside the checkout, runs first_light

The machine has a Python 3.12 on x86-64 Linux and the packages of first_light_machine.txt. What pyproject.toml needs beyond
them, and tokamax with what it needs, travels at the versions of constraints.txt and first_light_requirements.txt. There, a
wheel is installed only where nothing that the machine has meets what is asked of it. Imports no jax.
"""

from __future__ import annotations

import argparse
import email
import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / ".first-light"
MACHINE = REPOSITORY / "benchmarks" / "first_light_machine.txt"
PINS = (REPOSITORY / "constraints.txt", REPOSITORY / "benchmarks" / "first_light_requirements.txt")
COMMAND = "bash benchmarks/first_light_run.sh OUT"
LARGEST_BYTES = 40 * 2**20  # the checkout and its pack have to travel together

#: What the wheels must run on. pip takes names of manylinux literally, so all those up to glibc 2.34 (2021) are listed.
PYTHON = "3.12"
PLATFORMS = tuple(f"manylinux{name}_x86_64" for name in ("1", "2010", "2014", *(f"_2_{minor}" for minor in range(5, 35))))
ENVIRONMENT = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": f"{PYTHON}.0",
    "python_version": PYTHON,
    "sys_platform": "linux",
}

#: Compared with at this very version, whatever the machine has.
EXACT = ("tokamax",)
#: tokamax imports this module of xprof at its top, and calls it only to read profiles of TPUs: an empty module does, into which
#: every call fails. xprof itself would double the pack.
EMPTY_MODULES = {"xprof": "xprof/cli/tools/get_kernel_stats_tool.py"}


class Wheel(NamedTuple):
    """A wheel and what its metadata says."""

    path: Path
    name: str  # canonical: lower case, hyphens
    version: Version
    requires: tuple[Requirement, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.path.stat().st_size / 1e3:,.0f} kB)"


class Unmet(NamedTuple):
    """A requirement, who has it, and the version that there is instead, None where there is none."""

    requirement: Requirement
    by: str
    found: Version | None

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    def __str__(self) -> str:
        instead = "which is neither in the pack nor on the machine" if self.found is None else f"and {self.found} is there"
        return f"{self.by} needs {self.requirement.name}{self.requirement.specifier}, {instead}"


class Walk(NamedTuple):
    """Names of the wheels that have to be installed, and what is still missing then."""

    wheels: set[str]
    unmet: list[Unmet]


def walk(roots: Mapping[str, Iterable[Requirement]], pack: Mapping[str, Wheel], machine: Mapping[str, Version | None]) -> Walk:
    """Follows requirements, through the wheels that meet them, to those that nothing meets.

    A package of the machine comes before a wheel, and is taken to have there what it needs itself. Where one requirement asks
    for the wheel, the wheel has to meet all others too: it is what will be imported.

    Args:
      roots: who needs something -> what.
      pack: wheels by canonical name.
      machine: what is installed there, by canonical name; None: in an unknown version, which is taken to do.
    """
    edges, seen = [], set()
    todo = [(requirement, by) for by, requirements in roots.items() for requirement in requirements]
    wheels: set[str] = set()
    while todo:
        requirement, by = todo.pop(0)
        name = canonicalize_name(requirement.name)
        if name in EMPTY_MODULES:
            continue
        edges.append((requirement, by))
        if name in machine and name not in EXACT and _meets(machine[name], requirement):
            continue
        if name not in pack or (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        wheels.add(name)
        todo += [(more, f"{name} {pack[name].version}") for more in pack[name].requires if _applies(more, requirement.extras)]
    unmet = []
    for requirement, by in edges:
        name = canonicalize_name(requirement.name)
        found = pack[name].version if name in wheels else machine.get(name)
        there = name in wheels or (name in machine and name not in EXACT)
        if not there or not _meets(found, requirement):
            unmet.append(Unmet(requirement, by, found if there else None))
    return Walk(wheels, unmet)


def _meets(version: Version | None, requirement: Requirement) -> bool:
    return version is None or requirement.specifier.contains(version, prereleases=True)


def _applies(requirement: Requirement, extras: Iterable[str] = ()) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate(ENVIRONMENT | {"extra": extra}) for extra in ("", *extras))


def read_wheel(path: Path) -> Wheel:
    """Name, version and requirements of a wheel. Raises ValueError where the file is torn or no wheel."""
    try:
        name, version, _, _ = parse_wheel_filename(path.name)
        with zipfile.ZipFile(path) as archive:
            if (torn := archive.testzip()) is not None:
                raise ValueError(f"{path.name}: {torn} in it is damaged: delete the wheel and gather again")
            metadata = next(n for n in archive.namelist() if n.count("/") == 1 and n.endswith(".dist-info/METADATA"))
            headers = email.message_from_bytes(archive.read(metadata))
    except (InvalidWheelFilename, StopIteration, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name} is no wheel, or is damaged: delete it and gather again ({error})") from error
    return Wheel(path, name, version, tuple(map(Requirement, headers.get_all("Requires-Dist", []))))


def read_pins(*paths: Path) -> dict[str, str]:
    """NAME==VERSION by canonical name; a later file comes first. Raises ValueError for a line that pins nothing."""
    found = {}
    for path in paths:
        for name, (text, version) in _read_names(path).items():
            if version is None:
                raise ValueError(f"{path.name}: {text!r} is no pin: write NAME==VERSION")
            found[name] = f"{name}=={version}"
    return found


def read_machine(path: Path) -> dict[str, Version | None]:
    """What is installed there: lines of NAME or NAME==VERSION, as `python3 -m pip list --format=freeze` prints them."""
    return {name: version for name, (_, version) in _read_names(path).items()}


def _read_names(path: Path) -> dict[str, tuple[str, Version | None]]:
    found = {}
    for line in path.read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text:
            name, _, version = (part.strip() for part in text.partition("=="))
            try:
                found[canonicalize_name(name, validate=True)] = (text, Version(version) if version else None)
            except ValueError as error:
                raise ValueError(f"{path.name}: {text!r} is neither NAME nor NAME==VERSION ({error})") from error
    return found


def roots() -> dict[str, list[Requirement]]:
    """What gqa_jax needs, and the kernels that its benchmarks compare with, as pyproject.toml says."""
    project = _project()
    wanted = {"gqa-jax": project["dependencies"], "gqa-jax[peers]": project["optional-dependencies"]["peers"]}
    return {by: [r for r in map(Requirement, texts) if _applies(r)] for by, texts in wanted.items()}


def _project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def gather(folder: Path = FOLDER, machine: Path = MACHINE, *, pins: Sequence[Path] = PINS, fetch=None) -> list[Wheel]:
    """Wheels of all that the machine lacks, in a folder; those that are there already are kept, others removed.

    Args:
      machine: file with the names of what is installed there.
      pins: files with the versions that travel.
      fetch: puts the wheels of some pins into a folder; None: pip's download.
    Raises:
      ValueError: a requirement that nothing meets, a package without pin or wheel, no network, or too many bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known, there, wanted = read_pins(*pins), read_machine(machine), roots()
    for path in sorted(folder.glob("*.whl")):
        try:
            wheel = read_wheel(path)
            stale = known.get(wheel.name) != f"{wheel.name}=={wheel.version}"
        except ValueError:
            stale = True  # cut off while it was written
        if stale:
            path.unlink()
    while True:
        pack = {wheel.name: wheel for wheel in map(read_wheel, sorted(folder.glob("*.whl")))}
        wheels, unmet = walk(wanted, pack, there)
        lacking = {need.name: need for need in unmet if need.name not in wheels}
        if unmet and not lacking:
            raise ValueError("\n".join(map(str, unmet)) + f"\nchange the versions in {_names(pins)} to some that agree")
        if not lacking:
            break
        if unpinned := [need for name, need in lacking.items() if name not in known]:
            raise ValueError("\n".join(map(str, unpinned)) + f"\npin them in {pins[-1].name}, or list them in {machine.name}")
        (fetch or download)([known[name] for name in sorted(lacking)], folder)
        if absent := lacking.keys() - {read_wheel(path).name for path in folder.glob("*.whl")}:
            raise ValueError(f"asked for wheels of {', '.join(sorted(absent))}, and got others")
    for name in pack.keys() - wheels:  # the machine has them now
        pack.pop(name).path.unlink()
    total = sum(wheel.path.stat().st_size for wheel in pack.values())
    if total > LARGEST_BYTES:
        sizes = "\n".join(map(str, sorted(pack.values(), key=lambda wheel: -wheel.path.stat().st_size)))
        raise ValueError(f"the pack has {total / 2**20:.1f} MiB, more than {LARGEST_BYTES / 2**20:.0f}:\n{sizes}")
    return sorted(pack.values())


def _names(paths: Iterable[Path]) -> str:
    return " and ".join(path.name for path in paths)


def download(pins: Sequence[str], folder: Path) -> None:
    """Wheels of these pins, and of nothing that they need, for the machine's Python. Raises ValueError where pip fails."""
    platforms = [f"--platform={name}" for name in PLATFORMS]
    with tempfile.TemporaryDirectory(dir=folder) as arriving:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries=2", "--no-deps"]
        target = ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *platforms, f"--dest={arriving}"]
        done = subprocess.run([*pip, *target, *pins], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(_explain(done.stderr, pins))
        for path in Path(arriving).glob("*.whl"):
            path.replace(folder / path.name)


def _explain(stderr: str, pins: Sequence[str]) -> str:
    """pip says that there is no such version where it reached no index, too."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if "No module named pip" in stderr:
        return f"{sys.executable} has no pip: `make setup` makes an environment that has one"
    if "after connection broken" in stderr or "Failed to establish a new connection" in stderr:
        return f"pip reached no package index, is there a network? Wanted: {', '.join(pins)}"
    for line in lines:
        pin = line.rpartition("No matching distribution found for ")[2]
        if pin in pins:
            return f"{pin} has no wheel for Python {PYTHON} on x86-64 Linux: pin another version in {_names(PINS)}"
    return f"pip could not download {', '.join(pins)}: {lines[-1] if lines else 'it gave no reason'}"


def install(target: Path, folder: Path = FOLDER) -> None:
    """Unpacks into a folder for PYTHONPATH what this Python lacks of the pack, and says on standard error what it lacks then.

    That stops nothing: most of first_light may run all the same, and machine time is dear. Wheels are unpacked as the archives
    that they are: that needs no pip. What an earlier call unpacked is kept.

    Raises:
      ValueError: no wheels in `folder`, or another version of one of them in `target`.
    """
    paths = sorted(folder.glob("*.whl"))
    if not paths:
        raise ValueError(f"no wheels in {folder}: run `make first-light-pack` where there is a network, and bring that folder")
    tags = set(sys_tags())
    for path in paths:
        if not parse_wheel_filename(path.name)[3] & tags:
            print(f"first light: {path.name} is not for this Python ({sys.version.split()[0]}) and system", file=sys.stderr)
    pack = {w.name: w for w in map(read_wheel, (p for p in paths if parse_wheel_filename(p.name)[3] & tags))}
    target.mkdir(parents=True, exist_ok=True)
    machine = installed([path for path in sys.path if path and Path(path).resolve() != target.resolve()])
    wheels, unmet = walk(roots(), pack, machine)
    for need in unmet:
        print(f"first light: {need}", file=sys.stderr)
    for name in sorted(wheels):
        _unpack(pack[name], target)
    for name, module in EMPTY_MODULES.items():
        if importlib.util.find_spec(name) is None:
            (target / module).parent.mkdir(parents=True, exist_ok=True)
            (target / module).touch()
    project = _project()
    if canonicalize_name(project["name"]) not in machine:  # the checkout is run as it is, and runs write its version down
        name, version = project["name"], project["version"]
        information = target / f"{name.replace('-', '_')}-{version}.dist-info"
        information.mkdir(exist_ok=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    kept = ", ".join(sorted(pack.keys() - wheels)) or "none"
    print(f"first light: {len(wheels)} of {len(paths)} wheels are in {target}; there before: {kept}")


def installed(path: Sequence[str]) -> dict[str, Version]:
    """Versions of what is installed on a search path; the first counts, as it does for an import."""
    found: dict[str, Version] = {}
    for distribution in importlib.metadata.distributions(path=list(path)):
        if distribution.metadata["Name"]:
            found.setdefault(canonicalize_name(distribution.metadata["Name"]), Version(distribution.version))
    return found


def _unpack(wheel: Wheel, target: Path) -> None:
    """Unpacks a wheel, its RECORD at last: where that is, all of it is there. Scripts and headers stay in it."""
    there = installed([str(target)]).get(wheel.name)
    if there not in (None, wheel.version):
        raise ValueError(f"{target} has {wheel.name} {there}, the pack {wheel.version}: delete {target}")
    with zipfile.ZipFile(wheel.path) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.filename.endswith(".dist-info/RECORD"))
        if (target / entries[-1].filename).exists():
            return
        for entry in entries:
            head, _, rest = entry.filename.partition("/")
            if head.endswith(".data"):
                kind, _, entry.filename = rest.partition("/")
                if kind not in ("purelib", "platlib") or not entry.filename:
                    continue
            archive.extract(entry, target)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_light_pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    gathering = commands.add_parser("gather", help="download what the machine lacks")
    gathering.add_argument("--machine", type=Path, default=MACHINE, help="its packages: `python3 -m pip list --format=freeze`")
    installing = commands.add_parser("install", help="unpack, on the machine, what it lacks")
    installing.add_argument("target", type=Path, help="a folder for PYTHONPATH")
    options = parser.parse_args(arguments)
    try:
        if options.command == "install":
            install(options.target)
            return
        wheels = gather(machine=options.machine)
    except (OSError, ValueError) as error:
        sys.exit(f"first light: {error}")
    total = sum(wheel.path.stat().st_size for wheel in wheels)
    print(f"{len(wheels)} wheels, {total / 2**20:.1f} MiB, in {FOLDER.name}/: {', '.join(map(str, wheels))}")
    print(f"on the machine, from the root of a checkout with that folder in it:\n\n    {COMMAND}")


if __name__ == "__main__":
    main()
