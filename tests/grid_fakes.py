"""Grids and run folders for the launcher's tests: no training, no jax."""

import json
import textwrap
import time

from gqa_jax.config import default_config
from gqa_jax.training.metrics import write_json
from launch import grid, grid_cells
from launch.cells import Layout


def config(size=16, n_heads=2, context=32, **changes):
    values = default_config()
    values.label = f"{size}d"
    values.context_length = context
    values.batch_tokens = 256
    values.steps = 4
    values.model.update(n_layers=2, d_model=size, n_heads=n_heads, n_kv_heads=1, head_dim=8, vocab_size=320, dtype="float32")
    values.data.update(store="sotu-bytes", block_tokens=64)
    values.evaluation.tokens = 1024
    values.update(changes)
    return values


def small_grid(**changes):
    return grid.Grid(
        name="small",
        configs=list(grid.product(config, size=[16, 32, 64], n_heads=[1, 2])),
        contexts_served=[1024, 8192],
        **changes,
    )


GRID_FILE = textwrap.dedent(
    """
    from tests.grid_fakes import small_grid

    def get_grid():
        return small_grid()
    """
)


def result(cell, loss, status="done"):
    model = cell.config.model
    return {
        "status": status,
        "loss": loss,
        "loss_sem": None if loss is None else 0.002,
        "bits_per_byte": None,
        "eval_tokens": 1024,
        "step": 4,
        "tokens": 1024,
        "params_sha256": "00",
        "params_non_embedding": cell.describe()["params_non_embedding"],
        "params_total": cell.describe()["params_total"],
        "tokens_per_second": 1000.0 * model.d_model,
        "mfu": None,
        "seconds_train": 1.0,
        "seconds_total": 2.0,
        "peak_memory_bytes": 1,
        "attention": "xla",
        "device": "cpu",
        "n_devices": 1,
        "identity": "x",
        "attempts": 1,
        "versions": {"jax": "0.11.2", "flax": "0.12.12"},
        "commit": "abc",
        "data_fingerprint": cell.data_fingerprint,
    }


def finish(cell, layout, status="done"):
    """Writes what a run that fell on a power law leaves behind."""
    folder = layout.cell(cell.name)
    folder.mkdir(parents=True, exist_ok=True)
    about = cell.describe()
    loss = (2e3 / about["params_non_embedding"]) ** 0.3 / about["n_heads"] ** 0.05 + 1.5 if status == "done" else None
    write_json(folder / "config.json", cell.config.to_dict())
    write_json(folder / "result.json", result(cell, loss, status))


def finished_grid(folder):
    """The small grid, run to its end in `folder`: its file, its layout and its cells."""
    file, layout, cells = folder / "small.py", Layout(folder / "runs" / "small"), grid.cells(small_grid())
    file.write_text(GRID_FILE)
    for cell in cells:
        finish(cell, layout)
    layout.root.joinpath("grid.json").write_text(json.dumps(grid_cells.facts(small_grid(), cells)))
    return file, layout, cells


def beat(folder, age=0.0, step=2):
    folder.mkdir(parents=True, exist_ok=True)
    values = {"time": time.time() - age, "step": step, "steps": 4, "tokens_per_second": 10.0, "eta_seconds": 5.0}
    (folder / "heartbeat.json").write_text(json.dumps(values))
