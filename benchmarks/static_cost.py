"""What kernels of compiled training steps take by bytes and FLOPs, without the device: python -m benchmarks.static_cost

Compiles the step of every program of `CELLS` ahead of time (package extra aot; about 10 s each), counts its kernels
(`benchmarks.program_cost`) and writes benchmarks/results/static_cost.json, which the planner's calibration is fitted on
(`--fit`) and compared with (tests/test_planner.py). With --keep DIR the programs are kept, and counted again from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import importlib.metadata
import itertools
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from benchmarks import program_cost
from gqa_jax import hardware
from gqa_jax.config import Execution, TrainConfig
from gqa_jax.hardware import Chip
from gqa_jax.planning import planner, traffic
from gqa_jax.planning.share import Share
from gqa_jax.shapes import SIZES

RESULTS = Path(__file__).parent / "results" / "static_cost.json"
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt")
BATCH_TOKENS = 524_288


class Cell(NamedTuple):
    """A run on a slice, of which every policy (and, on several devices, every mesh named) is compiled."""

    topology: str
    size: str
    n_heads: int
    n_kv_heads: int
    context: int  # K tokens
    held_out: bool  # the calibration does not see it
    meshes: tuple[str, ...] = ("data=1",)
    finer: int = 1  # micro-batches for each of the fewest that fit


CELLS = (
    Cell("h100:1", "3M", 8, 1, 8, False),
    Cell("h100:1", "19M", 32, 8, 8, True),
    Cell("h100:1", "85M", 8, 1, 32, False),
    Cell("h100:1", "150M", 8, 1, 8, True),
    Cell("h100:1", "200M", 16, 4, 2, False),
    Cell("h100:1", "470M", 8, 1, 8, True),
    Cell("h100:1", "470M", 32, 8, 8, False),
    Cell("h100:1", "1.2B", 8, 1, 8, True),
    Cell("h100:1", "1.2B", 32, 8, 32, False),
    Cell("h100:1", "19M", 8, 1, 2, True, finer=4),
    Cell("h100:8", "1.2B", 8, 1, 8, False, ("fsdp=8", "data=8", "fsdp=4,tensor=2")),
    Cell("h100:8", "470M", 32, 8, 8, True, ("fsdp=8", "data=8", "data=2,fsdp=4")),
    Cell("h100:8", "85M", 8, 1, 128, True, ("fsdp=4,context=2", "data=4,context=2")),
    Cell("v5e:4x4", "470M", 8, 1, 8, False, ("fsdp=16",)),
    Cell("v6e:2x4", "1.2B", 32, 8, 8, True, ("fsdp=8",)),
    Cell("v5e:2x2", "19M", 8, 1, 2, True, ("data=4",)),
    Cell("v5e:4x4", "150M", 32, 8, 8, False, ("fsdp=16",)),
    Cell("v6e:2x2", "85M", 8, 1, 32, False, ("fsdp=4",)),
)


def config_of(cell: Cell, **execution) -> TrainConfig:
    """The run of a cell in batches of 512K tokens, open but for `execution`."""
    shape = SIZES[cell.size]
    context = cell.context * 1024
    values = TrainConfig(steps=10).to_dict()
    values |= {"context_length": context, "batch_tokens": BATCH_TOKENS}
    values["data"]["block_tokens"] = values["evaluation"]["tokens"] = max(131_072, context)
    heads = {"n_heads": cell.n_heads, "n_kv_heads": cell.n_kv_heads}
    values["model"] |= {"n_layers": shape.n_layers, "d_model": shape.d_model, "d_ff": None, **heads}
    values["execution"] |= execution
    return TrainConfig.from_dict(values)


def executions(cell: Cell) -> Iterator[Execution]:
    """What is compiled of a cell: of each mesh and policy the fewest micro-batches that fit, times `finer`."""
    where = hardware.find(cell.topology)
    for mesh in cell.meshes:
        for remat in planner.SEARCHED_REMAT:
            found = [e for e in planner.choose(config_of(cell, mesh=mesh, remat=remat), where.chip, where.n_chips) if e.fits]
            for method in sorted({e.execution.context_attention for e in found}):
                one = next(e.execution for e in found if e.execution.context_attention == method)
                yield dataclasses.replace(one, accumulation_steps=one.accumulation_steps * cell.finer)


def name_of(cell: Cell, one: Execution) -> str:
    """Of a program: the case and how it is carried out."""
    return "_".join(map(str, (*cell[:5], one.mesh, one.remat, one.accumulation_steps, one.context_attention)))


def compiled(cell: Cell, one: Execution) -> tuple[str, dict[str, float]]:
    """Optimized HLO of the step, and bytes of arguments, temporaries, what is offloaded.

    On GPUs attention is our Triton kernels', in the place of cuDNN's, which are not compiled ahead of time: both are counted at
    cuDNN's published rate.
    """
    import jax  # noqa: F401 (here, after the platform is set)

    from gqa_jax.planning import topologies
    from gqa_jax.training import program

    if not hardware.find(cell.topology).is_tpu:
        one = dataclasses.replace(one, attention="pallas_triton")
    config = dataclasses.replace(config_of(cell), execution=one)
    step = program.compile_step(config, topologies.mesh(cell.topology, one.mesh))
    memory = step.memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return step.as_text(), {"bytes_arguments": used, "bytes_temporary": memory.temp_size_in_bytes}


def row(cell: Cell, one: Execution, text: str, chip: Chip) -> dict[str, Any]:
    """What is kept of a program."""
    cost = program_cost.static_cost(text, chip, (one.context_attention, one.mesh.context))
    by_scope: dict[str, float] = defaultdict(float)
    for kernel, times in program_cost.kernels(program_cost.parse(text)):
        if kernel.part == "elementwise":
            by_scope[f"{kernel.phase} {kernel.scope or 'layers'}"] += times * kernel.bytes
        elif kernel.part == "stacking":
            by_scope[f"{kernel.phase} stacking"] += times * kernel.bytes
        elif kernel.part in ("loss", "optimizer"):
            by_scope[kernel.part] += times * kernel.bytes
    return {
        **cell._asdict(),
        "mesh": str(one.mesh),
        "remat": one.remat,
        "accumulation_steps": one.accumulation_steps,
        "context_attention": one.context_attention,
        "seconds": {part: float(f"{value:.5g}") for part, value in cost.seconds.items()},
        "flops": {part: float(f"{value:.5g}") for part, value in cost.flops.items() if value},
        "elementwise_bytes": {scope: float(f"{value:.5g}") for scope, value in sorted(by_scope.items())},
        "kernels": cost.kernels,
    }


def case_of(found: dict[str, Any]) -> tuple[TrainConfig, Execution, hardware.Slice]:
    """The configuration, resolved, how it is carried out, and where, of a row that was kept."""
    cell = Cell(*(tuple(found[name]) if name == "meshes" else found[name] for name in Cell._fields))
    given = {name: found[name] for name in ("mesh", "remat", "accumulation_steps", "context_attention")}
    config = config_of(cell, **given)
    return config, config.execution, hardware.find(cell.topology)


def fit(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[traffic.Traffic, traffic.Traffic]]:
    """Coefficients of `planning.traffic` by policy, forward and backward: non-negative least squares of relative errors.

    Of programs for GPUs that are not held out.
    """
    tables = {}
    for remat in planner.SEARCHED_REMAT:
        both = []
        for phase in ("forward", "backward"):
            values: dict[str, float] = {}
            for scope, names in traffic.SCOPES.items():
                features, found = [], []
                for one in rows:
                    config, execution, where = case_of(one)
                    if one["remat"] == remat and not where.is_tpu and not one["held_out"]:
                        counts = traffic.counts(Share(config, execution, tiled=False))
                        features.append([counts[name] for name in names])
                        found.append(one["elementwise_bytes"].get(f"{phase} {scope}", 0.0))
                x, y = np.array(features), np.array(found)
                weight = 1 / np.maximum(y, 1e9)  # a difference below a gigabyte is a third of a millisecond
                solved, _ = nnls(x * weight[:, None], y * weight)
                values |= {name: float(f"{value:.3g}") for name, value in zip(names, solved, strict=True)}
            both.append(traffic.Traffic(**values))
        tables[remat] = tuple(both)
    return tables


def fit_tpu(rows: Sequence[dict[str, Any]], name: str) -> tuple[hardware.Calibration, float]:
    """Shares of a TPU's peaks, and its passes over a GPU's, of the least largest error; and that error.

    Of programs that are not held out and offload nothing. Many are alike: the first of a coarse grid is taken.
    """
    cases = [(*case_of(one), sum(one["seconds"].values())) for one in rows if one["topology"].startswith(name)]
    seen = [one["held_out"] or one["remat"] == "offload" for one in rows if one["topology"].startswith(name)]
    cases = [case for case, skipped in zip(cases, seen, strict=True) if not skipped]
    before = hardware.CALIBRATED.get(name)
    best = None
    for products, bandwidth, passes in itertools.product(
        np.arange(0.5, 0.96, 0.03).round(2), np.arange(0.4, 1.0, 0.05).round(2), np.arange(0.3, 1.5, 0.1).round(2)
    ):
        tried = hardware.CALIBRATED["tpu"]._replace(products=products, bandwidth=bandwidth, passes=passes)
        hardware.CALIBRATED[name] = tried
        error = max(abs(planner.estimate(c, e, where.chip).seconds_expected / static - 1) for c, e, where, static in cases)
        if best is None or error < best[1]:
            best = tried, error
    if before is None:
        del hardware.CALIBRATED[name]
    else:
        hardware.CALIBRATED[name] = before
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", metavar="DIR", type=Path, help="programs are kept there, and read where they are")
    parser.add_argument("--only", default="", metavar="TEXT", help="cells whose program's name has it; the other rows stay")
    parser.add_argument("--fit", action="store_true", help="compile nothing: the coefficients of planning/traffic.py")
    parser.add_argument("--compare", action="store_true", help="compile nothing: the planner beside every row")
    arguments = parser.parse_args()
    known = json.loads(RESULTS.read_text())["programs"] if RESULTS.exists() else []
    if arguments.fit:
        for remat, both in fit(known).items():
            rows = (f"        Traffic({', '.join(f'{x:g}' for x in one)}),\n" for one in both)
            print(f'    "{remat}": (\n' + "".join(rows) + "    ),")
        for name in ("v5e", "v6e"):
            found, error = fit_tpu(known, name)
            print(f"{name}: {found.products:g}, {found.bandwidth:g}, {found.network:g}, {found.passes:g}: {error:.1%} at most")
        return
    if arguments.compare:
        compare(known)
        return
    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    rows = {name_of(Cell(*(one[f] for f in Cell._fields)), case_of(one)[1]): one for one in known}
    for cell in CELLS:
        for one in executions(cell):
            name = name_of(cell, one)
            if arguments.only not in name:
                continue
            started, kept = time.monotonic(), None if arguments.keep is None else arguments.keep / f"{name}.txt.gz"
            if kept is not None and kept.exists():
                head, _, text = gzip.decompress(kept.read_bytes()).decode().partition("\n")
                memory = json.loads(head)
            else:
                text, memory = compiled(cell, one)
                if kept is not None:
                    kept.write_bytes(gzip.compress(f"{json.dumps(memory)}\n{text}".encode(), 3))
            rows[name] = row(cell, one, text, hardware.find(cell.topology).chip) | memory
            print(
                f"{name}: {sum(rows[name]['seconds'].values()):.3f} s, {time.monotonic() - started:.0f} s to count", flush=True
            )
            write(list(rows.values()))


def write(rows: Sequence[dict[str, Any]]) -> None:
    """The rows, with the versions that compiled them."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    about = {"command": "python -m benchmarks.static_cost", "versions": versions, "batch_tokens": BATCH_TOKENS}
    lines = ",\n".join(json.dumps(one) for one in rows)
    RESULTS.write_text(json.dumps(about)[:-1] + f', "programs": [\n{lines}\n]}}\n')


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Prints every row beside the planner's expectation."""
    for one in rows:
        config, execution, where = case_of(one)
        e = planner.estimate(config, execution, where.chip)
        static = sum(one["seconds"].values())
        print(
            f"{one['topology']:7} {one['size']:>5} ({one['n_heads']},{one['n_kv_heads']}) {one['context']:3}K {one['mesh']:16}"
            f" {one['remat']:15} x {one['accumulation_steps']:<3} {'held out' if one['held_out'] else 'fitted':9}"
            f" static {static:8.4f} s, expected {e.seconds_expected:8.4f} s, {e.seconds_expected / static - 1:+6.1%},"
            f" bound {e.seconds_step:8.4f} s"
        )


if __name__ == "__main__":
    main()
