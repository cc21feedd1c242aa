"""Worker of `benchmarks.train` (protocol: `benchmarks.workers`): training steps of gqa_jax on one device.

    python -m benchmarks.train_ours [--compile_only TOPOLOGY] [--interpreted]

Requests, by "do":

    device                          platform, kind, versions
    prepare  case, model, ...       compiles the step and runs one (fields: `make_config`)
    weights  case, path             writes the initial weights and the recipe, from which `benchmarks.train_torch` prepares
    measure  case, steps, blocked   seconds of each step, waited for; blocked false: of a step, when all follow one another
    losses   case, steps            losses of the first steps from the initial state
    profile  case, folder           kernels of three steps by time
    forget   case                   frees its memory

With --compile_only nothing runs: `prepare` compiles for a device that is not here, "h100:1", and reports what it needs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import importlib.metadata
import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import train_case, workers
from gqa_jax import attention, costs, hardware
from gqa_jax.config import TrainConfig, default_config
from gqa_jax.planning import planner, topologies
from gqa_jax.shapes import SIZES
from gqa_jax.training import optimizer, program, sharding

#: Steps of the learning rate's schedule, warm-up and decay included; later ones have the last one's rate.
SCHEDULE_STEPS = 10
LARGEST_TRACE = 16 * 2**20  # bytes
TOP_KERNELS = 40
PACKAGES = ("gqa-jax", "jax", "jaxlib", "jax-cuda13-plugin", "tokamax")

Phase = Callable[[str], None]


def make_config(
    *,
    model: Mapping[str, Any],
    context_length: int,
    micro_batch: int,
    accumulation_steps: int = 1,
    attention: str | None = None,
    remat: str | None = None,
    dtype: str = "bfloat16",
    param_dtype: str = "float32",
    learning_rate: float | None = None,
    seed: int = 0,
    schedule_steps: int = SCHEDULE_STEPS,
) -> TrainConfig:
    """The configuration of a request to prepare, as `gqa_jax.train` would read it.

    Args:
      model: fields of `gqa_jax.config.ModelConfig`; "size", a row of the paper's table ("470M"), stands for layers and hidden
        size.
      micro_batch: sequences of a micro-batch; a step has `accumulation_steps` of them.
      learning_rate: maximum; None: the size's, or the default.

    Raises:
      ValueError: a size that is not in the table, or what the configuration refuses.
    """
    fields = dict(model)
    size = fields.pop("size", None)
    if size is not None and size not in SIZES:
        raise ValueError(f"size = {size!r}: there are {', '.join(SIZES)}; or give n_layers and d_model")
    if size is not None:
        fields = {"n_layers": SIZES[size].n_layers, "d_model": SIZES[size].d_model} | fields
        learning_rate = SIZES[size].learning_rate if learning_rate is None else learning_rate
    config = default_config().to_dict()
    config["model"] |= fields | {"dtype": dtype, "param_dtype": param_dtype}
    config["execution"] |= {"attention": attention, "remat": remat, "accumulation_steps": accumulation_steps}
    if learning_rate is not None:
        config["optimizer"]["learning_rate"] = learning_rate
    config |= {
        "context_length": context_length,
        "batch_tokens": context_length * micro_batch * accumulation_steps,
        "steps": schedule_steps,
        "seed": seed,
        "label": size or "",
    }
    # nothing of the store is read; these must be multiples of the context
    config["data"]["block_tokens"] = 2 * context_length
    config["evaluation"]["tokens"] = context_length
    return TrainConfig.from_dict(config)


@dataclasses.dataclass
class Case:
    """A step that is compiled, and the state that it is at."""

    config: TrainConfig
    mesh: jax.sharding.Mesh
    step: jax.stages.Compiled
    recipe: dict[str, Any]
    state: program.TrainState | None = None
    done: int = 0

    def restart(self) -> None:
        self.state = None  # freed first: two may not fit
        self.state, self.done = program.fresh_state(self.config, self.mesh), 0

    def train(self, tokens: np.ndarray) -> dict[str, jax.Array]:
        """Starts one step on tokens (A, B, T + 1); its metrics, not waited for."""
        config = self.config
        tokens = tokens.reshape(-1, tokens.shape[-1])
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        rows = np.arange(len(tokens))  # all of them: there is one device
        placed = program.place(config, self.mesh, batch, rows, config.execution.accumulation_steps)
        self.state, metrics = self.step(self.state, placed)
        self.done += 1
        return metrics

    def tokens(self, steps: int) -> list[np.ndarray]:
        """What the next steps train on."""
        return [train_case.tokens(self.recipe, self.done + i) for i in range(steps)]


def recipe(config: TrainConfig) -> dict[str, Any]:
    """All that another framework needs to train the same: shapes, constants, tokens, learning rate of each step."""
    rate = optimizer.learning_rate(config.optimizer, config.n_steps)
    names = (
        "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size", "rope_theta", "norm_eps",
    )  # fmt: skip
    return {
        **{name: getattr(config.model, name) for name in names},
        **{name: getattr(config.optimizer, name) for name in ("b1", "b2", "eps", "weight_decay", "clip_norm")},
        **{name: getattr(config, name) for name in ("context_length", "micro_batch", "seed")},
        "accumulation_steps": config.execution.accumulation_steps,
        "learning_rates": [float(rate(np.int32(step))) for step in range(config.n_steps)],
    }


class Session:
    """The cases of one process."""

    def __init__(self, topology: str | None = None):
        """With a topology, cases are compiled for its device. Raises ValueError: an unknown one, or no compiler for it."""
        self.topology = topology
        self._device = jax.local_devices()[0] if topology is None else topologies.devices(topology)[0]
        self.cases: dict[str, Case] = {}

    def handlers(self) -> dict[str, Callable[..., dict[str, Any]]]:
        names = ("device", "prepare", "weights", "measure", "losses", "profile", "forget")
        return {name: getattr(self, name) for name in names}

    def about(self) -> dict[str, Any]:
        versions = {}
        for name in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        platform = "gpu" if self._device.platform in ("cuda", "rocm") else self._device.platform
        return {"platform": platform, "device": self._device.device_kind, "versions": versions}

    def device(self, phase: Phase) -> dict[str, Any]:
        return self.about()

    def prepare(self, phase: Phase, *, case: str, **fields: Any) -> dict[str, Any]:
        """Bytes are the compiler's figures for the device, but `bytes_peak`: the allocator's, None where it has none or an
        earlier case of this process needed more."""
        phase("lower")
        self.forget(phase, case=case)
        before = self._peak()
        config = planner.resolve(make_config(**fields), self._device.device_kind, 1)
        mesh = sharding.make_mesh(config.execution.mesh, [self._device])
        with jax.set_mesh(mesh):
            name = program.attention_of(config)
        began = time.perf_counter()
        lowered, compiled_as = self._lower(config, mesh, name)
        seconds_lower = time.perf_counter() - began
        phase("compile")
        began = time.perf_counter()
        step = lowered.compile()
        seconds_compile = time.perf_counter() - began
        memory = step.memory_analysis()
        made = Case(config, mesh, step, recipe(config))
        if self.topology is None:
            made.restart()
            phase("run")
            jax.block_until_ready(made.train(made.tokens(1)[0]))
            self.cases[case] = made
        after = self._peak()
        return self.about() | {
            "compiled": compiled_as,
            "seconds_lower": seconds_lower,
            "seconds_compile": seconds_compile,
            "bytes_arguments": memory.argument_size_in_bytes,
            "bytes_output": memory.output_size_in_bytes,
            "bytes_alias": memory.alias_size_in_bytes,
            "bytes_temporary": memory.temp_size_in_bytes,
            "bytes_peak": after if after is not None and after > before else None,
            "attention": name,
            "remat": config.execution.remat,
            "parameters": costs.count_params(config.model, "exact").total,
            "tokens_per_step": config.batch_tokens,
            "flops_per_step": flops_per_step(config),
            "peak_flops": peak_flops(config, self._device.device_kind),
            "planner": self._planned(config),
        }

    def weights(self, phase: Phase, *, case: str, path: str) -> dict[str, Any]:
        found = self._find(case)
        phase("compile")  # the drawing of the weights
        found.restart()
        phase("check")
        train_case.save(Path(path), jax.device_get(found.state.params), found.recipe)
        return {"bytes": Path(path).stat().st_size}

    def measure(self, phase: Phase, *, case: str, steps: int, blocked: bool = True) -> dict[str, Any]:
        found = self._find(case)
        seconds, metrics, drawn = [], [], found.tokens(steps)
        jax.block_until_ready(found.state)
        began = time.perf_counter()
        for tokens in drawn:
            phase("run")
            metrics.append(found.train(tokens))
            if blocked:
                jax.block_until_ready(metrics[-1])
                now = time.perf_counter()
                seconds.append(now - began)
                began = now
        jax.block_until_ready((found.state, metrics))
        if not blocked:
            seconds = [(time.perf_counter() - began) / steps]
        return {"seconds": seconds, "losses": [float(x["loss"]) for x in metrics]}

    def losses(self, phase: Phase, *, case: str, steps: int = SCHEDULE_STEPS) -> dict[str, Any]:
        found = self._find(case)
        phase("compile")  # the drawing of the weights
        found.restart()
        losses = []
        for tokens in found.tokens(steps):
            phase("run")
            losses.append(float(found.train(tokens)["loss"]))
        return {"losses": losses, "tokens_sha256": train_case.tokens_sha256(found.recipe, steps)}

    def profile(self, phase: Phase, *, case: str, folder: str, steps: int = 3) -> dict[str, Any]:
        """Writes profile-CASE.json, and the trace beside it (`xprof` reads it unzipped) where it is not too large."""
        found = self._find(case)
        drawn = found.tokens(steps)
        phase("run")
        with tempfile.TemporaryDirectory() as raw:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            with jax.profiler.trace(raw, profiler_options=options):
                for tokens in drawn:
                    metrics = found.train(tokens)
                jax.block_until_ready((found.state, metrics))
            phase("check")
            (trace,) = Path(raw).rglob("*.xplane.pb")
            summary = summarised(jax.profiler.ProfileData.from_file(str(trace)), steps)
            zipped = gzip.compress(trace.read_bytes())
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        name = "profile-" + re.sub(r"[^\w.-]+", "-", case).strip("-")
        files = [f"{name}.json"]
        (out / files[0]).write_text(json.dumps(summary, indent=1) + "\n")
        if len(zipped) <= LARGEST_TRACE:
            files.append(f"{name}.xplane.pb.gz")
            (out / files[1]).write_bytes(zipped)
        return {"files": files, "bytes_trace": len(zipped)} | summary

    def forget(self, phase: Phase, *, case: str) -> dict[str, Any]:
        self.cases.pop(case, None)
        return {}

    def _find(self, case: str) -> Case:
        if self.topology is not None:
            raise ValueError(f"programs for {self.topology} are compiled, and nothing runs")
        if case not in self.cases:
            raise ValueError(f"case {case!r} is not prepared: there are {', '.join(self.cases) or 'none'}")
        return self.cases[case]

    def _lower(self, config: TrainConfig, mesh, name: str) -> tuple[jax.stages.Lowered, str]:
        """The step, and the attention that it was lowered with: where cuDNN is not installed `pallas_triton` stands in for it
        in a program that is compiled only, as `gqa_jax.planning.compile_check` does."""
        try:
            return program.lower_step(config, mesh), name
        except Exception as error:
            if self.topology is None or name != "cudnn" or "cudnn" not in str(error).lower():
                raise
        execution = dataclasses.replace(config.execution, attention="pallas_triton")
        return program.lower_step(dataclasses.replace(config, execution=execution), mesh), "pallas_triton for cudnn"

    def _planned(self, config: TrainConfig) -> dict[str, Any] | None:
        """The planner's estimate for the device; None where it has no data sheet, as of CPUs."""
        chip = hardware.chip_of(self._device.device_kind) if self.topology is None else hardware.find(self.topology).chip
        if chip is None:
            return None
        found = planner.estimate(config, config.execution, chip)
        names = ("seconds_step", "bytes_arguments", "bytes_temporary", "bytes_limit", "fits", "limited_by")
        return {name: getattr(found, name) for name in names}

    def _peak(self) -> int | None:
        if self.topology is not None:
            return None
        return (self._device.memory_stats() or {}).get("peak_bytes_in_use")


def flops_per_step(config: TrainConfig) -> dict[str, float]:
    """Forward and backward FLOPs of a step, recomputation not counted: "causal" with T/2 keys a token, "full" with T."""
    shape, context, tokens = config.model, config.context_length, config.batch_tokens
    return {
        "causal": float(costs.train_flops(shape, context, tokens, "exact")),
        "full": float(3 * tokens * costs.forward_flops(shape, context, "exact").total),
    }


def peak_flops(config: TrainConfig, device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of the device; None where no data sheet is recorded, and for another dtype."""
    chip = hardware.chip_of(device_kind)
    return chip.peak_flops if chip is not None and config.model.dtype == "bfloat16" else None


def summarised(data: jax.profiler.ProfileData, steps: int) -> dict[str, Any]:
    """Kernels of a trace by time in all: of the device's streams, or without a device, operations of the host's threads.

    Loops are among a host's operations, and what they run as well.
    """
    planes = [plane for plane in data.planes if plane.name.startswith("/device:")]
    lines = [(plane, line) for plane in planes for line in plane.lines]
    streams = [pair for pair in lines if pair[1].name.startswith("Stream")] or lines
    on_device = bool(streams)
    if not on_device:
        streams = [(plane, line) for plane in data.planes if plane.name.startswith("/host:CPU") for line in plane.lines]
    seconds, counts = defaultdict(float), defaultdict(int)
    first, last = float("inf"), 0.0
    for _, line in streams:
        for event in line.events:
            if not on_device and ":" in event.name:  # "end: ...", "ThunkExecutor::Execute": not what the program computes
                continue
            seconds[event.name] += event.duration_ns / 1e9
            counts[event.name] += 1
            first, last = min(first, event.start_ns), max(last, event.end_ns)
    top = sorted(seconds, key=seconds.__getitem__, reverse=True)[:TOP_KERNELS]
    return {
        "steps": steps,
        "lines": sorted({f"{plane.name} {line.name}" for plane, line in streams}),
        "seconds_span": max(0.0, last - first) / 1e9,
        "seconds_events": sum(seconds.values()),
        "kernels": [{"name": name[:200], "seconds": seconds[name], "count": counts[name]} for name in top],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_ours", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile_only", metavar="TOPOLOGY", help="compile for this device, run nothing: h100:1, h200:1")
    parser.add_argument("--interpreted", action="store_true", help="Pallas kernels in interpret mode, for tiny shapes")
    options = parser.parse_args(arguments)
    if options.compile_only is not None:
        jax.config.update("jax_platforms", "cpu")
    with attention.interpreted() if options.interpreted else contextlib.nullcontext():
        workers.serve(Session(options.compile_only).handlers())


if __name__ == "__main__":
    main()
