"""Steps about the machine and the README's road. Imports no jax."""

from __future__ import annotations

import concurrent.futures
import csv
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.first_light.fleet import KERNELS, PEERS
from benchmarks.first_light.supervisor import Lab, median

LOSS_TOLERANCE = 0.02  # nats, between the quickstart's cells here and on the CPU
CELLS = "size=30k,context=128"


def environment(lab: Lab) -> None:
    """What is here, whether Pallas's compilers work, and what a matrix product and a copy reach."""
    sizes = lab.sizes
    lab.start("jax", *KERNELS, *PEERS, *(["torch attention"] if lab.has("torch attention") else []))
    if lab.mode == "device":
        query = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
        found = lab.command(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], "nvidia-smi.txt", seconds=10)
        text = found.result.get("output", "").strip()
        fields = dict(zip(query.split(","), (part.strip() for part in text.split(",")), strict=False)) if found.ok else {}
        lab.record["card"] = fields or {"error": found.reason}
        for compiler in ("ptxas", "nvcc"):
            if (path := shutil.which(compiler)) is not None:
                version = lab.command([path, "--version"], f"{compiler}.txt", seconds=10)
                release = re.search(r"release [\d.]+, V([\d.]+)", version.result.get("output", ""))
                lab.record[compiler] = release[1] if release else version.reason
    found = lab.ask("jax", {"do": "environment"}, needs=["tiny kernels"])
    lab.record["environment"] = found.result
    tiny = found.result.get("tiny_kernels", {})
    lab.row(case="tiny kernels", status=found.status, reason=found.reason, **tiny)
    for compiler, kernel in zip(("mosaic", "triton"), KERNELS, strict=True):
        if tiny.get(compiler, "ok") != "ok":
            for part in ("forward", "dq", "dkv", "backward", "decode"):
                lab.mark_bad(f"{kernel} {part}", f"a {compiler} kernel of one line: {tiny[compiler]}")
    asked = {}
    for name, kind, size in (("matmul", "matmul", sizes.matmul), ("copy", "copy", sizes.copy_bytes)):
        made = lab.ask("jax", {"do": "ceiling", "case": name, "kind": kind, "size": size})
        if made.ok:
            asked[name] = ("jax", {"do": "measure", "case": name}, [])
        else:
            lab.row(case=name, status=made.status, reason=made.reason)
    for name, seconds in lab.turns(asked).items():
        if seconds:
            lab.row(case=name, status="ok", size=getattr(sizes, "matmul" if name == "matmul" else "copy_bytes"),
                    rate=1 / median(seconds), rates=[1 / s for s in seconds])  # fmt: skip


def readme(lab: Lab) -> None:
    """The README's road on one GPU: cells of the quickstart, their tables, and a second run that trains nothing."""
    grid = "configs/grids/quickstart.py"
    if lab.mode == "compile_only":
        plan = [sys.executable, "-m", "launch", "plan", grid, "--where", CELLS, "--topology", f"{lab.record['target']}:1"]
        found = lab.command([*plan, "--format", "csv"], "readme-plan.txt", env=lab.environment("jax"))
        lab.row(case="plan", status="compiled" if found.ok else found.status, reason=found.reason)
        return
    run = [sys.executable, "-m", "launch", "run", grid, "--where", CELLS, "--root"]
    roots = {"here": lab.scratch / "readme"} | ({"cpu": lab.scratch / "readme-cpu"} if lab.mode == "device" else {})
    env = {"here": lab.environment("jax"), "cpu": lab.environment("jax") | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        futures = {
            name: pool.submit(lab.command, [*run, str(root)], f"readme-{name}.txt", env=env[name])
            for name, root in roots.items()
        }
        found = {name: future.result() for name, future in futures.items()}
    tables = {name: _losses(root) for name, root in roots.items()}
    for cell, values in tables["here"].items():
        usual = tables.get("cpu", {}).get(cell)
        row = {"case": cell, "loss": values["loss"], "device": values["device"], "attention": values["attention"]}
        if usual is None:
            lab.row(**row, status="ok" if lab.mode == "rehearse" else "no loss of the CPU to compare with")
            continue
        off = abs(values["loss"] - usual["loss"])
        right = off <= LOSS_TOLERANCE
        reason = "" if right else f"off by {off:.3f} nats, allowed are {LOSS_TOLERANCE}"
        lab.row(**row, loss_cpu=usual["loss"], status="ok" if right else "wrong", reason=reason)
    lab.row(
        case="run",
        status=found["here"].status,
        reason=found["here"].reason,
        cells=len(tables["here"]),
        seconds=found["here"].seconds,
    )
    if found["here"].ok:
        before = _checkpoints(roots["here"])
        again = lab.command([*run, str(roots["here"])], "readme-again.txt", env=env["here"])
        same = _checkpoints(roots["here"]) == before
        reason = again.reason or ("" if same else "checkpoints changed: something was trained again")
        lab.row(case="run again", status=again.status if same else "wrong", reason=reason, seconds=again.seconds)
    for root in roots.values():
        shutil.rmtree(root, ignore_errors=True)  # the rows have what counts


def _losses(root: Path) -> dict[str, dict[str, Any]]:
    """Cell -> loss, device and attention, by the loss table of a grid; empty where there is none."""
    try:
        with (root / "tables" / "loss.csv").open(newline="") as file:
            return {
                row["cell"]: {"loss": float(row["loss"]), "device": row["device"], "attention": row["attention"]}
                for row in csv.DictReader(file)
                if row["loss"]
            }
    except OSError:
        return {}


def _checkpoints(root: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in sorted(root.glob("cells/*/checkpoints/*"))}
