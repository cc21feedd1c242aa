"""Steps about the machine and the README's road. Imports no jax."""

from __future__ import annotations

import concurrent.futures
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.first_light.fleet import KERNELS, PEERS
from benchmarks.first_light.supervisor import Lab, median
from gqa_jax.results import load_results

LOSS_TOLERANCE = 0.02  # nats, between the quickstart's cells here and on the CPU
CELLS = "size=40k,context=128"


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
    about = lab.ask("jax", {"do": "about"})
    lab.record["environment"] = about.result
    lab.keep(about, case="environment")
    tiny = lab.ask("jax", {"do": "tiny_kernels"})
    lab.record["environment"] = about.result | {"tiny_kernels": tiny.result}
    lab.row(case="tiny kernels", status=tiny.status, reason=tiny.reason, **tiny.result)
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


GRID = "configs/grids/quickstart.py"
ROAD_S = 90.0  # for the cells of the quickstart, which one GPU trains one after the other


def begin_readme(lab: Lab) -> None:
    """Starts what a user with one GPU runs, and the same on the CPU. It goes on beside steps that time nothing."""
    if lab.mode == "compile_only":
        return
    here = lab.environment("jax")
    roots = {"here": (lab.scratch / "readme", here)}
    if lab.mode == "device":
        roots["cpu"] = lab.scratch / "readme-cpu", here | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    pool = concurrent.futures.ThreadPoolExecutor()
    lab.early["readme"] = {
        name: (root, pool.submit(lab.command, _run(root), f"readme-{name}.txt", env=env, seconds=ROAD_S))
        for name, (root, env) in roots.items()
    }
    pool.shutdown(wait=False)


def readme(lab: Lab) -> None:
    """The README's road on one GPU: cells of the quickstart, their tables, and a second run that trains nothing."""
    if lab.mode == "compile_only":
        plan = [sys.executable, "-m", "launch", "plan", GRID, "--where", CELLS, "--topology", f"{lab.record['target']}:1"]
        found = lab.command([*plan, "--format", "csv"], "readme-plan.txt", env=lab.environment("jax"))
        lab.row(case="plan", status="compiled" if found.ok else found.status, reason=found.reason)
        return
    if "readme" not in lab.early:
        begin_readme(lab)
    begun = lab.early.pop("readme")
    ran = {name: future.result() for name, (_, future) in begun.items()}
    losses = {name: _losses(root) for name, (root, _) in begun.items()}
    for cell, values in losses["here"].items():
        usual = losses.get("cpu", {}).get(cell)
        row = {"case": cell, "loss": values["loss"], "device": values["device"], "attention": values["attention"]}
        if usual is None:
            lab.row(**row, status="ok" if lab.mode == "rehearse" else "left out", reason="no loss of the CPU to compare with")
            continue
        off = abs(values["loss"] - usual["loss"])
        right = off <= LOSS_TOLERANCE
        reason = "" if right else f"off by {off:.3f} nats, allowed are {LOSS_TOLERANCE}"
        lab.row(**row, loss_cpu=usual["loss"], status="ok" if right else "wrong", reason=reason)
    root, first = begun["here"][0], ran["here"]
    table = root / "tables" / "loss.csv"
    told = table.exists() and all(values["attention"] in table.read_text() for values in losses["here"].values())
    status, reason = first.status, first.reason
    if first.ok and not told:
        status, reason = "wrong", "tables/loss.csv does not name the device and the attention of the cells"
    lab.row(case="run", status=status, reason=reason, cells=len(losses["here"]), seconds=first.seconds.get("run"))
    if first.ok:
        before = _checkpoints(root)
        again = lab.command(_run(root), "readme-again.txt", env=lab.environment("jax"))
        same = _checkpoints(root) == before
        reason = again.reason or ("" if same else "checkpoints changed: something was trained again")
        lab.row(case="run again", status=again.status if same else "wrong", reason=reason, seconds=again.seconds.get("run"))
    for root, _ in begun.values():
        shutil.rmtree(root, ignore_errors=True)  # the rows have what counts


def _run(root: Path) -> list[str]:
    return [sys.executable, "-m", "launch", "run", GRID, "--where", CELLS, "--root", str(root)]


def _losses(root: Path) -> dict[str, dict[str, Any]]:
    """Cell -> loss, device and attention of every cell that has finished, with or without tables."""
    try:
        found = load_results(root)
    except FileNotFoundError:
        return {}
    rows = found[found["loss"].notna()].to_dict("records")
    return {row["cell"]: {name: row[name] for name in ("loss", "device", "attention")} for row in rows}


def _checkpoints(root: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in sorted(root.glob("cells/*/checkpoints/*"))}
