"""Is a training step the same each time, and a run that goes on in another process? Asked of a device in first light.

    python -m benchmarks.first_light.resume_worker [--interpreted]

Flags of XLA (deterministic operations) are of a process, so each setting has processes of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import workers
from benchmarks.train_ours import Session
from gqa_jax import attention
from gqa_jax.training import program
from gqa_jax.training.checkpoint import Checkpoints, params_sha256

SAVED = {"identity": {}, "seconds_train": 0.0}  # what training notes beside a checkpoint


class Resume:
    """The cases of `benchmarks.train_ours`, whose parameters are compared bit for bit."""

    def __init__(self):
        self.session = Session()
        self.fresh: dict[str, program.TrainState] = {}  # drawn once: the drawing is a program to compile

    def prepare(self, phase: Callable, *, case: str, **fields: Any) -> dict[str, Any]:
        """As `benchmarks.train_ours` prepares one."""
        return self.session.prepare(phase, case=case, **fields)

    def repeat(self, phase: Callable, *, case: str, times: int) -> dict[str, Any]:
        """One step from the same state on the same tokens `times` times: the hashes of the parameters, and the seconds."""
        found = self.session.cases[case]
        self._restart(phase, case)
        tokens = found.tokens(1)[0]
        hashes, seconds = [], []
        for _time in range(times):
            phase("run")
            self._restart(phase, case)
            jax.block_until_ready(found.state)
            began = time.perf_counter()
            jax.block_until_ready((found.train(tokens), found.state))
            seconds.append(time.perf_counter() - began)
            hashes.append(params_sha256(found.state.params))
        return {"sha256": hashes, "distinct": len(set(hashes)), "seconds": seconds[1:] or seconds}

    def train(self, phase: Callable, *, case: str, folder: str, first: int, last: int) -> dict[str, Any]:
        """Steps `first` + 1 to `last`: from step 0 fresh, saved at the end; else from the checkpoint of `first` in `folder`.

        Returns the hash of the last parameters and the loss of the last step. Raises ValueError where there is no checkpoint.
        """
        found = self.session.cases[case]
        phase("compile")
        with Checkpoints(Path(folder), keep=10) as checkpoints:
            if first == 0:
                self._restart(phase, case)
            else:
                restored = checkpoints.restore_newest(program.abstract_state(found.config, found.mesh))
                if restored is None or restored.step != first:
                    raise ValueError(f"{folder} has no checkpoint of step {first}")
                found.state, found.done = restored.state, first
            for tokens in found.tokens(last - first):
                phase("run")
                metrics = jax.block_until_ready(found.train(tokens))
            if first == 0:
                phase("check")
                checkpoints.save(last, found.state, SAVED)
                checkpoints.wait()
        return {"sha256": params_sha256(found.state.params), "loss": float(metrics["loss"])}

    def _restart(self, phase: Callable, case: str) -> None:
        """The initial state again."""
        found = self.session.cases[case]
        if case not in self.fresh:
            phase("compile")
            found.restart()
            self.fresh[case] = found.state
        found.state, found.done = jax.tree.map(jnp.copy, self.fresh[case]), 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpreted", action="store_true", help="Pallas kernels in interpret mode, for tiny shapes")
    options = parser.parse_args()
    resume = Resume()
    with attention.interpreted() if options.interpreted else contextlib.nullcontext():
        workers.serve({"prepare": resume.prepare, "repeat": resume.repeat, "train": resume.train})


if __name__ == "__main__":
    main()
