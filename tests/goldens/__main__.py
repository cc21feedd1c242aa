"""`python -m tests.goldens`: what the code answers, compared with what is kept, or kept anew."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import tests.conftest  # noqa: F401 (8 simulated devices, set before jax is imported)
from tests import goldens


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: all as it is kept, or written; 1: something differs, and what."""
    parser = argparse.ArgumentParser(prog="python -m tests.goldens", description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep what the code answers now")
    parser.add_argument("--only", metavar="NAME,...", help="of these: " + ", ".join(one.name for one in goldens.GOLDENS))
    parser.add_argument("--quickstart", metavar="DIR", type=Path, help="a trained quickstart, to compare or to keep, alone")
    arguments = parser.parse_args(argv)
    if arguments.quickstart is not None:
        if arguments.write:
            goldens.keep_finished(arguments.quickstart)
            return 0
        return _say("quickstart", goldens.compare_quickstart(arguments.quickstart))
    names = {one.name for one in goldens.GOLDENS}
    chosen = set(arguments.only.split(",")) if arguments.only else names
    if unknown := sorted(chosen - names):
        parser.error(f"--only {','.join(unknown)}: there are {', '.join(sorted(names))}")
    code = 0
    for one in (golden for golden in goldens.GOLDENS if golden.name in chosen):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            text = one.make(Path(folder))
        if arguments.write:
            if one.name == "training.json":
                goldens.keep_bits()
            one.write(text)
            print(f"{one.name}: written, {time.monotonic() - started:.1f} s", flush=True)
        else:
            code |= _say(one.name, one.differences(text))
    return code


def _say(name: str, differences: Sequence[str]) -> int:
    print(f"{name}: {'as it is kept' if not differences else goldens.MEANING}", flush=True)
    for line in differences[:20]:
        print(f"  {line}")
    if len(differences) > 20:
        print(f"  and {len(differences) - 20} more")
    return bool(differences)


if __name__ == "__main__":
    sys.exit(main())
