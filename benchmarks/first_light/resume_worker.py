"""Is a training step the same each time, and a run that goes on in another process? Asked of a device in first light.

    python -m benchmarks.first_light.resume_worker [--interpreted] [--compile_only h100:1]

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
import numpy as np

from benchmarks import workers
from gqa_jax import attention, planner, program, sharding
from gqa_jax.checkpoint import Checkpoints, params_sha256
from gqa_jax.config import TrainConfig, default_config


class Run:
    """One training step, compiled, and the state that it changes."""

    def __init__(self, *, interpret: bool, compile_only: str | None):
        self.interpret, self.compile_only = interpret, compile_only

    def prepare(
        self, phase: Callable, attention_name: str | None, model: dict, context_length: int, batch: int, **_: Any
    ) -> dict[str, Any]:  # fmt: skip
        """Compiles the step of a model (fields of config.model), batches of `batch` sequences."""
        config = default_config()
        config.model.update(model | {"attention": attention_name, "remat": "attention_only"})
        config.context_length, config.batch_tokens, config.steps = context_length, batch * context_length, 1000
        config.accumulation_steps, config.evaluation.tokens = 1, context_length
        config.data.block_tokens = context_length
        config = TrainConfig.from_dict(config.to_dict())
        if self.compile_only is None:
            self.config = planner.resolve(config, jax.devices()[0].device_kind, 1)
            self.mesh = sharding.make_mesh(self.config.mesh_shape, jax.devices()[:1])
        else:
            from gqa_jax import topologies

            found = topologies.devices(self.compile_only)
            self.config = planner.resolve(config, found[0].device_kind, 1)
            self.mesh = sharding.make_mesh(self.config.mesh_shape, found[:1])
        phase("compile")
        with attention.interpreted() if self.interpret else contextlib.nullcontext():
            self.step = program.compile_step(self.config, self.mesh)
        return {"status": "compiled" if self.compile_only else "ok"}

    def repeat(self, phase: Callable, times: int, **_: Any) -> dict[str, Any]:
        """One step from the same state and batch `times` times: how many different parameters come out, and the seconds."""
        phase("run")
        fresh = program.fresh_state(self.config, self.mesh)
        batch = self._batch(0)
        hashes, seconds = [], []
        for _time in range(times):
            phase("run")
            state = jax.block_until_ready(jax.tree.map(jnp.copy, fresh))
            began = time.perf_counter()
            state, metrics = self.step(state, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - began)
            hashes.append(params_sha256(state.params))
        return {"sha256": hashes, "distinct": len(set(hashes)), "seconds": seconds[1:] or seconds}

    def train(self, phase: Callable, folder: str, first: int, last: int, **_: Any) -> dict[str, Any]:
        """Steps `first` + 1 to `last`; from step 0 fresh, otherwise from the checkpoint in `folder`. Saves at the end.

        The result is the hash of the last parameters, and with it the loss of the last step.
        """
        phase("run")
        with Checkpoints(Path(folder), keep=10) as checkpoints:
            if first == 0:
                state = program.fresh_state(self.config, self.mesh)
            else:
                restored = checkpoints.restore_newest(program.abstract_state(self.config, self.mesh))
                if restored is None or restored.step != first:
                    raise ValueError(f"{folder} has no checkpoint of step {first}")
                state = restored.state
            for step in range(first, last):
                phase("run")
                state, metrics = self.step(state, self._batch(step))
                jax.block_until_ready(metrics)
            if first == 0:
                phase("run")
                checkpoints.save(last, state, {"identity": {}, "seconds_train": 0.0})
                checkpoints.wait()
        return {"sha256": params_sha256(state.params), "loss": float(metrics["loss"])}

    def _batch(self, step: int) -> dict[str, jax.Array]:
        """Random tokens, a function of the step."""
        config = self.config
        rng = np.random.default_rng(step)
        tokens = rng.integers(config.model.vocab_size, size=(config.batch_size, config.context_length + 1), dtype=np.int32)
        rows = program.local_rows(config, self.mesh, config.accumulation_steps)
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        return program.place(config, self.mesh, batch, rows, config.accumulation_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpreted", action="store_true")
    parser.add_argument("--compile_only")
    options = parser.parse_args()
    run = Run(interpret=options.interpreted, compile_only=options.compile_only)
    workers.serve({"prepare": run.prepare, "repeat": run.repeat, "train": run.train})


if __name__ == "__main__":
    main()
