"""First light: everything that this project claims of GPUs, tried on one, in one call of at most nine minutes.

    python -m benchmarks.first_light --out DIR                       # on a machine with an H100 or H200
    python -m benchmarks.first_light --out DIR --rehearse            # the same code on a CPU: interpreted kernels, tiny shapes
    python -m benchmarks.first_light --out DIR --compile_only h100   # every program ahead of time; nothing runs
    python -m benchmarks.first_light --report DIR/first-light.json   # tables, verdicts and what follows, in Markdown

DIR/first-light.json is whole at every moment: a call that is stopped keeps all that it had. A worker that hangs, dies or runs
out of memory costs its own rows. Steps, in order of value, with the most seconds of each:

{steps}

`make first-light-pack` gathers what a bare machine lacks and prints the command to run there.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.first_light import fleet, report, sizes, steps, verdicts
from benchmarks.first_light.supervisor import PATIENCE, SCHEMA, Lab

STOP_AFTER = 540  # seconds, of all steps
TARGETS = ("h100", "h200")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 when the steps were run, with --check only if all was right; 2 for options that can't be."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.report is not None:
        try:
            record = report.read(options.report)
        except (OSError, ValueError) as error:
            parser.error(f"--report {options.report}: {error}")
        _tell(parser, record, options.keep)
        return 0
    mode = "rehearse" if options.rehearse else "compile_only" if options.compile_only else "device"
    if mode == "device" and not any((shutil.which("nvidia-smi"), Path("/dev/nvidiactl").exists())):
        parser.error("there is no NVIDIA GPU here: --rehearse tries the script on a CPU, --compile_only h100 compiles for one")
    try:
        wanted = steps.chosen(options.only)
    except ValueError as error:
        parser.error(f"--only: {error}")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "first-light-cache"))
    chosen = sizes.one_of_each(sizes.SIZES[mode]) if options.one_of_each else sizes.SIZES[mode]
    kinds = fleet.kinds(mode, chosen, options.compile_only or "", _torch_python(options.torch_python))
    facts = {
        "command": f"python -m benchmarks.first_light {shlex.join(arguments)}".strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "target": options.compile_only,
        "host": {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()},
    }
    try:
        lab = Lab(options.out, mode, chosen, kinds, facts)
    except FileExistsError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: lab.end())
    lab.run(wanted, PATIENCE[mode] * STOP_AFTER if options.stop_after is None else options.stop_after)
    lab.record["verdicts"] = verdicts.of(lab.record)
    lab.save()
    if lab.ending:
        return 128 + signal.SIGTERM
    _tell(parser, report.read(lab.path), options.keep)
    if options.check and (amiss := _amiss(lab.record)):
        print("\n".join(["not as it should be:", *amiss]), file=sys.stderr)
        return 1
    return 0


def _amiss(record: dict[str, Any]) -> list[str]:
    """Steps that were not done, and rows that are neither right nor refused with a reason."""
    steps_amiss = [f"step {name}: {step['status']}" for name, step in record["steps"].items() if step["status"] != "done"]
    rows = [row for row in record["rows"] if row.get("status") not in ("ok", "compiled", "refused")]
    return steps_amiss + [
        f"step {row['step']}, {row.get('case')}, {row.get('implementation', '')}: {row.get('status')}: {row.get('reason')}"
        for row in rows
    ]


def _tell(parser: argparse.ArgumentParser, record: dict[str, Any], folder: Path | None) -> None:
    """Prints what a run says, and keeps it with the results where that is asked for."""
    print(report.markdown(record))
    if folder is not None:
        try:
            print("kept:", *report.write(record, folder))
        except FileExistsError as error:
            parser.error(f"--keep: {error}")


def make_parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"    {step.name:>3}  {step.title:<26} {step.seconds:>4} s" for step in steps.STEPS)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_light",
        description=__doc__.format(steps=listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs", "first-light"), help="folder (default: %(default)s)")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="STEP,...", help="only these steps")
    parser.add_argument("--one_of_each", action="store_true", help="the first shape of each step: a program or two")
    parser.add_argument(
        "--stop_after", type=_seconds, metavar="SECONDS", help=f"of all steps (default: {STOP_AFTER} on a device)"
    )
    parser.add_argument("--torch_python", help="a Python that has torch and transformers; default: this one, if it has")
    parser.add_argument("--check", action="store_true", help="exit code 1 where anything failed, was wrong or was left out")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="add what ran, and its report, to the results there")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--rehearse", action="store_true", help="on a CPU, with interpreted kernels and tiny shapes")
    group.add_argument("--compile_only", choices=TARGETS, metavar="|".join(TARGETS), help="compile for one, run nothing")
    group.add_argument("--report", type=Path, metavar="FILE", help=f"print what a file of schema {SCHEMA} says, and end")
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


def _torch_python(given: str | None) -> str | None:
    """The Python for PyTorch's workers: the one that was named, this one where it has torch, else none."""
    if given is not None:
        return given
    return sys.executable if importlib.util.find_spec("torch") is not None else None


def _commit() -> str | None:
    """Of this checkout; + when files differ from it; None where git knows none."""
    here = Path(__file__).parent
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12"], cwd=here, capture_output=True, text=True
    )
    return found.stdout.strip() or None if found.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(main())
