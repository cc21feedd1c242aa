"""What some tests need that `make setup` does not bring, and the command that brings it.

Such a test is marked, `@pytest.mark.needs("libtpu")`. Where that is missing it is skipped, and the run ends with a count of
the skipped tests by command; with GQA_JAX_TESTS=all every skipped test fails. No test installs anything.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

# Pythons of environments with PyTorch, and with SkyPilot.
TORCH_PYTHON = Path(__file__).parents[1] / ".venv-torch" / "bin" / "python"
SKY_PYTHON = Path(os.environ.get("GQA_JAX_SKY_PYTHON") or Path(__file__).parents[1] / ".venv-sky" / "bin" / "python")


class Need(NamedTuple):
    command: str  # that brings it
    is_there: Callable[[], bool]


def program(name: str) -> str | None:
    """Where a program is: on the PATH, or where Debian has those of administrators, which others than root have not on it."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _modules(*names: str) -> Callable[[], bool]:
    return lambda: all(importlib.util.find_spec(name) for name in names)


def _programs(*names: str) -> Callable[[], bool]:
    return lambda: all(map(program, names))


NEEDS = {
    "libtpu": Need("make aot", _modules("libtpu")),
    "jax-cuda13-plugin": Need("make aot", _modules("jax_cuda13_plugin")),
    "tokamax": Need("make aot", _modules("tokamax")),
    "datasets": Need("make aot", _modules("datasets")),
    "mlx-lm": Need("make aot", _modules("mlx_lm")),
    "transformers": Need("make aot", _modules("transformers")),
    "chromium": Need("make debian", _programs("chromium", "chromedriver")),
    "slurm": Need(
        "make debian",
        _programs("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun", "setpriv"),
    ),
    "torch": Need("make torch", TORCH_PYTHON.exists),
    "skypilot": Need("make sky", SKY_PYTHON.exists),
}
_REASON = re.compile(r"needs .*: (make \w+(?: and make \w+)*)")


def reason(names: list[str]) -> str | None:
    """Why a test that needs all of `names` is skipped, for example "needs libtpu: make aot"; None where all are there."""
    missing = [name for name in names if not NEEDS[name].is_there()]
    commands = sorted({NEEDS[name].command for name in missing})
    return f"needs {', '.join(missing)}: {' and '.join(commands)}" if missing else None


def summary(reasons: list[str]) -> str:
    """One line that counts skipped tests by the command that brings what they need."""
    found = Counter(match[1] if (match := _REASON.search(reason)) else "" for reason in reasons)
    counts = [f"{n} need `{command}`" if command else f"{n} for other reasons" for command, n in found.most_common()]
    return f"{len(reasons)} tests skipped: {', '.join(counts)}"


# Hooks of pytest, which tests/conftest.py imports.


def pytest_configure(config):
    config.addinivalue_line("markers", f"needs(*names): skipped unless they are there: {', '.join(NEEDS)}")
    if (value := os.environ.get("GQA_JAX_TESTS", "")) not in ("", "all"):
        raise pytest.UsageError(f"GQA_JAX_TESTS={value}: must be empty or all (a test that would be skipped fails)")


def pytest_collection_modifyitems(items):
    for item in items:
        if unknown := {name for mark in item.iter_markers("needs") for name in mark.args} - {*NEEDS}:
            raise pytest.UsageError(f"{item.nodeid}: needs {', '.join(unknown)}: tests/needs.py has {', '.join(NEEDS)}")


@pytest.hookimpl(tryfirst=True)  # before fixtures begin what can't go on
def pytest_runtest_setup(item):
    if why := reason([name for mark in item.iter_markers("needs") for name in mark.args]):
        pytest.skip(why)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return _fail_if_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _fail_if_skipped((yield))


def _fail_if_skipped(report):
    if report.skipped and os.environ.get("GQA_JAX_TESTS") == "all" and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"GQA_JAX_TESTS=all, and this would be skipped: {report.longrepr[2]}"
    return report


def pytest_terminal_summary(terminalreporter):
    if skipped := terminalreporter.stats.get("skipped"):
        terminalreporter.write_line(summary([report.longrepr[2] for report in skipped]))
