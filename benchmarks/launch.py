"""How long a launcher takes over a large grid: `status`, `plan`, `run --dry_run`, as whole processes.

    python -m benchmarks.launch [--cells N] [--turns N]

Machines differ more than launchers: beside it stands how long Python takes there for a loop of six million steps.

The grid lies in a temporary folder on local disk, with cells in every state; nothing is trained or submitted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gqa_jax import storage
from gqa_jax.hardware import host
from launch import grid
from launch.cells import Layout
from launch.training_cells import TrainingCell

GRID_FILE = """
from gqa_jax.config import default_config
from launch import grid

def get_grid():
    configs = []
    for seed in range({cells}):
        config = default_config()
        config.update(label="19M", context_length=1024, batch_tokens=8192, steps=100, seed=seed)
        config.model.update(n_layers=4, d_model=256, n_heads=4, n_kv_heads=1 + seed % 2, vocab_size=320)
        config.evaluation.tokens = 1024
        configs.append(config)
    return grid.Grid("large", configs, [131072])
"""
COMMANDS = {
    "status": ["status"],
    "status --json": ["status", "--json"],
    "plan": ["plan"],
    "run --dry_run": ["run", "--dry_run"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    where = f"{host.described()}, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}"
    print(f"{where}, {arguments.cells} cells")
    with tempfile.TemporaryDirectory() as folder:
        file, root = Path(folder, "large.py"), Path(folder, "root")
        file.write_text(GRID_FILE.format(cells=arguments.cells))
        populate(grid.cells(grid.load(str(file))), Layout(storage.path(root)))
        seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
        cpu: dict[str, list[float]] = {name: [] for name in COMMANDS}
        loops: list[float] = []
        for _ in range(arguments.turns):
            loops.append(loop_seconds())
            for name, (command, *options) in COMMANDS.items():
                argv = [sys.executable, "-m", "launch", command, str(file), "--root", str(root), *options]
                started, used = time.perf_counter(), sum(os.times()[2:4])
                done = subprocess.run(argv, capture_output=True, text=True, check=False)
                seconds[name].append(time.perf_counter() - started)
                cpu[name].append(sum(os.times()[2:4]) - used)
                if done.returncode not in (0, 1, 3):
                    sys.exit(f"{' '.join(argv)}: {done.stderr}")
        print(f"a loop of six million steps: {said(loops)} of a CPU")
        for name, those in seconds.items():
            print(f"{name:16s} {said(those)}, {said(cpu[name])} of a CPU")


def loop_seconds() -> float:
    """CPU time of a loop of Python."""
    began, total = time.process_time(), 0
    for i in range(6_000_000):
        total += i * i % 7
    return time.process_time() - began


def said(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):5.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def populate(cells: list[TrainingCell], layout: Layout) -> None:
    """Folders as a night on a cluster leaves them: done, failed, preempted, not started."""
    now = time.time()
    for number, cell in enumerate(cells):
        folder = Path(layout.cell(cell.name))
        for name in ("metrics", "attempts", "submissions", "checkpoints/50", "checkpoints/75"):
            (folder / name).mkdir(parents=True)
        write(folder / "config.json", cell.config.to_dict())
        if number % 4 == 3:
            continue
        beat = {"time": now - 5, "step": 80, "steps": 100, "tokens_per_second": 1e5, "eta_seconds": 60.0, "attempt": 1}
        write(folder / "heartbeat.json", beat | {"device": "TPU v5 lite", "n_devices": 16, "device_seconds": 3600.0})
        for attempt in range(2):
            (folder / "metrics" / f"attempt-{attempt:03d}.jsonl").touch()
            write(
                folder / "attempts" / f"{attempt:03d}.json", {"attempt": attempt, "time": now - 90, "first_step": 50 * attempt}
            )
            write(folder / "submissions" / f"{attempt}.json", {"time": now - 100, "engine": "tpu", "id": "x", "where": "z"})
        end = {"code": 1, "class": "out_of_memory", "reason": "out of memory", "attempt": 1, "time": now}
        if number % 4 == 0:
            write(folder / "result.json", {"status": "done", "loss": 2.0, "step": 100, "identity": "x"})
        elif number % 4 == 1:
            write(folder / "exit.json", end)
        else:
            write(folder / "exit.json", end | {"code": 75, "class": "preempted", "reason": "asked to end"})


def write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values))


if __name__ == "__main__":
    main()
