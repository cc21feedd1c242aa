"""A test that needs what is missing is skipped and counted, and fails where everything must be there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import needs

SUITE = """
import pytest

@pytest.mark.needs("libtpu")
def test_first():
    pass

@pytest.mark.needs("libtpu", "tokamax")
def test_second():
    pass

@pytest.mark.needs("chromium")
@pytest.mark.needs("libtpu")
def test_both():
    pass

def test_nothing():
    pass

def test_other():
    pytest.skip("it rains")
"""
CONFTEST = """
from tests import needs
from tests.needs import *
for name in needs.NEEDS:
    needs.NEEDS[name] = needs.NEEDS[name]._replace(is_there=lambda: False)
"""


def suite(folder, text=SUITE, **environment):
    """What pytest says at the end of a run of `text` on a machine that has nothing, and its exit code."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(text)
    options = ["-q", "-c", os.devnull, "--rootdir", str(folder), "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(folder)],
        cwd=Path(__file__).parents[1],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr, done.returncode


def test_what_is_skipped_is_counted_by_command(tmp_path):
    said, code = suite(tmp_path, GQA_JAX_TESTS="")
    assert "4 tests skipped: 2 need `make aot`, 1 need `make aot and make debian`, 1 for other reasons" in said
    assert "1 passed, 4 skipped" in said
    assert code == 0


def test_where_all_must_run_a_skip_is_a_failure(tmp_path):
    said, code = suite(tmp_path, GQA_JAX_TESTS="all")
    assert "would be skipped: Skipped: needs libtpu, tokamax: make aot" in said
    assert "would be skipped: Skipped: it rains" in said
    assert "1 failed, 1 passed, 3 errors" in said
    assert code == 1


def test_so_is_a_module_that_skips_itself(tmp_path):
    said, code = suite(tmp_path, 'import pytest\npytest.importorskip("no_such_module")\n', GQA_JAX_TESTS="all")
    assert "would be skipped: Skipped: could not import 'no_such_module'" in said
    assert code != 0


@pytest.mark.parametrize(
    ("text", "value", "words"),
    [
        ("import pytest\n@pytest.mark.needs('libtup')\ndef test(): pass", "", "needs libtup: tests/needs.py has libtpu, "),
        (SUITE, "yes", "GQA_JAX_TESTS=yes: must be empty or all"),
    ],
)
def test_what_is_not_understood(tmp_path, text, value, words):
    said, code = suite(tmp_path, text, GQA_JAX_TESTS=value)
    assert words in said
    assert code != 0


def test_nothing_is_missing_where_all_is_there(monkeypatch):
    monkeypatch.setitem(needs.NEEDS, "libtpu", needs.Need("make aot", lambda: True))
    assert needs.reason(["libtpu"]) is None
    assert needs.reason([]) is None
