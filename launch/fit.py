"""Which cells fit which slices, by arithmetic or by compiling them; and whether they fit this machine."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from gqa_jax import costs, hardware
from gqa_jax.config import Execution
from gqa_jax.errors import ConfigError
from gqa_jax.formatting import gb, gib
from gqa_jax.hardware import Slice
from gqa_jax.planning import planner
from gqa_jax.planning.compile_check import CompileCheck, Compilers
from gqa_jax.planning.planner import Estimate
from launch.cells import Cell

ATTEMPTS = 3  # executions that are compiled for a cell before it is said not to fit
HOPELESS = 1.5  # an estimate of so many times the memory is not compiled
PLANNED = ("mesh", "remat", "accumulation_steps", "context_attention")  # fields of Execution that the planner fills in
STATE_BYTES = 16  # of a parameter in training: itself, its gradient and two moments, in float32


@dataclasses.dataclass
class Fit:
    """A cell on a slice: how it would be carried out, and whether it fits."""

    cell: Cell
    slice: Slice
    ranked: list[Estimate]  # best first; empty where no mesh suits
    chosen: Estimate | None = None
    check: CompileCheck | None = None  # of the one chosen, when it was compiled
    tried: list[tuple[Execution, CompileCheck]] = dataclasses.field(default_factory=list)  # in vain
    unsupported_reason: str | None = None  # why there is nothing to choose from

    @property
    def fits(self) -> bool:
        if self.check is None:
            return self.chosen is not None and self.chosen.fits
        # Of a whole chip, which several cells may share, or of which JAX takes less here.
        return self.check.fits and (self.check.bytes_used or 0) <= self.slice.chip.memory_bytes


def estimate(cell: Cell, where: Slice) -> Fit:
    """The cell on the slice by arithmetic."""
    try:
        ranked = planner.choose(cell.config, where.chip, where.n_chips)
    except ConfigError as error:
        return Fit(cell, where, [], unsupported_reason=str(error))
    return Fit(cell, where, ranked, ranked[0])


def compile_checks(fits: Sequence[Fit], workers: int, on_change: Callable[[Fit, int, int], None], exact: bool = False) -> None:
    """Compiles what the estimates chose, and what they rank next where the compiler says no; fills in `chosen` and `check`.

    `on_change(fit, done, all)` is called for each cell and slice that is settled. What was compiled is kept when this is
    interrupted. Raises ValueError where a compiler is not installed.
    """
    done = 0

    def submit(fit: Fit) -> bool:
        if fit.chosen is None or (used(fit.chosen) > HOPELESS * fit.chosen.bytes_limit):
            return False
        future = compilers.submit(dataclasses.replace(fit.cell.config, execution=fit.chosen.execution), fit.slice.name, exact)
        waiting[future] = fit
        return True

    waiting: dict[concurrent.futures.Future[CompileCheck], Fit] = {}
    with Compilers(workers) as compilers:
        for fit in fits:
            if not submit(fit):
                done += 1
                on_change(fit, done, len(fits))
        while waiting:
            ready, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ready:
                fit = waiting.pop(future)
                fit.check = future.result()
                if not fit.fits and len(fit.tried) + 1 < ATTEMPTS and (smaller := _smaller(fit)) is not None:
                    fit.tried.append((fit.chosen.execution, fit.check))
                    fit.chosen, fit.check = smaller, None
                    if submit(fit):
                        continue
                done += 1
                on_change(fit, done, len(fits))


def _smaller(fit: Fit) -> Estimate | None:
    """The best ranked estimate of clearly less memory than the one that did not fit."""
    seen = {execution for execution, _ in fit.tried} | {fit.chosen.execution}
    return next((e for e in fit.ranked if e.execution not in seen and used(e) < 0.9 * used(fit.chosen)), None)


def settings(fit: Fit) -> tuple[str, ...]:
    """Flags by which training carries a cell out as its compile check found to fit, and not as it would choose by itself."""
    if fit.check is None or not fit.check.fits:
        return ()
    chosen = {name: getattr(fit.chosen.execution, name) for name in PLANNED}
    return tuple(f"--config.execution.{name}={value}" for name, value in chosen.items() if value is not None)


def used(e: Estimate) -> float:
    """Bytes that a device needs."""
    return e.bytes_arguments + e.bytes_temporary


def advice(fit: Fit) -> str:
    """What would fit, by arithmetic: other settings on this slice, else the smallest larger slice of its chips."""
    free = dataclasses.replace(fit.cell.config, execution=Execution(attention=fit.cell.config.execution.attention))
    whole = hardware.SLICES.get(fit.slice.name, fit.slice)  # of which cells that share it, or JAX here, may have a part
    for where in dict.fromkeys((fit.slice, whole, *hardware.larger(fit.slice))):
        for config in (fit.cell.config, free):
            if config == fit.cell.config and where == fit.slice:
                continue
            try:
                best = planner.choose(config, where.chip, where.n_chips)[0]
            except ConfigError:
                continue
            if best.fits:
                settings = _differing(fit.cell.config.execution, best.execution) if config == free else ""
                name = "" if where == fit.slice else f"all of {where.name}" if where == whole else where.name
                return " with ".join(filter(None, (name, settings)))
    return f"no listed slice of {fit.slice.chip.name}"


def _differing(given: Execution, found: Execution) -> str:
    """The settings of `found` that contradict what was given."""
    pairs = [(name, getattr(given, name), getattr(found, name)) for name in PLANNED]
    return " ".join(f"execution.{name}={new}" for name, old, new in pairs if old is not None and old != new)


def expected_seconds(fit: Fit, efficiency: float | None = None) -> float:
    """Seconds of the whole run of a cell that has a mesh there.

    By the share of the roofline that is given, else the one measured on the chip, else as kernels add up.
    """
    chosen, chip = fit.chosen, fit.slice.chip
    if efficiency is not None:
        step = chosen.seconds_step / efficiency
    else:
        step = chosen.seconds_expected if chip.measured is None else chosen.seconds_step / chip.measured.training
    return fit.cell.config.n_steps * step


def require(fits: Sequence[Fit]) -> None:
    """Raises ConfigError naming the cells that don't fit, why, and what would."""
    failing = [fit for fit in fits if not fit.fits]
    if failing:
        lines = [
            f"{fit.cell.name} does not fit {fit.slice.name}: {reason(fit)}; would fit: {advice(fit)}" for fit in failing[:5]
        ]
        more = [f"and {len(failing) - 5} more"] if len(failing) > 5 else []
        raise ConfigError("\n".join([f"{len(failing)} of {len(fits)} cells don't fit, nothing was started", *lines, *more]))


def reason(fit: Fit) -> str:
    """Why a cell does not fit a slice, in a few words."""
    if fit.unsupported_reason:
        return fit.unsupported_reason
    limit = gib(fit.chosen.bytes_limit)
    if fit.check is None:
        return f"at least {gib(used(fit.chosen))} estimated, {limit} there"
    if fit.check.bytes_arguments is not None:
        return f"{gib(fit.check.bytes_used)} compiled, {limit} there"
    if fit.check.bytes_needed:
        return f"the compiler needs {gib(fit.check.bytes_needed)}, {limit} are there"
    return f"the compiler says: {' '.join(str(fit.check.error).split())[:300]}"


def require_memory(cells: Sequence[Cell], slots: int) -> None:
    """Raises ConfigError when a cell's training state alone is larger than a CPU slot's share of this machine's memory."""
    share = memory_bytes() / slots
    for cell in cells:
        needed = STATE_BYTES * costs.count_params(cell.config.model, "exact").total
        if needed > share:
            fewer = f"use --slots {int(slots * share // needed)}, or " if needed <= slots * share else ""
            raise ConfigError(
                f"{cell.name} does not fit: {STATE_BYTES} bytes a parameter are {gb(needed)}, and each of "
                f"{slots} slots has {gb(share)}; {fewer}find a slice for it: "
                f"python -m launch plan GRID --topology v5e:4x4 --estimate"
            )


def memory_bytes() -> float:
    """Memory of this machine, or of the container that this process is in."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        return min(total, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total
