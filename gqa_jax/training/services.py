"""What shows a run while it trains: TensorBoard, Weights & Biases, whose outage stops no run, and a bar on a terminal."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from etils import epath

from gqa_jax import storage
from gqa_jax.config import TrainConfig
from gqa_jax.errors import ConfigError
from gqa_jax.training import run_folder

log = logging.getLogger(__name__)

EVENTS_SECONDS = 120.0  # between copies of TensorBoard's files to gs://


def start(config: TrainConfig, workdir: epath.Path, attempt: int) -> dict[str, Any]:
    """What a configuration asks for, by name, with `write(kind, step, values)` and `close()`. ConfigError: not installed."""
    found: dict[str, Any] = {}
    if config.logging.tensorboard:
        found["TensorBoard"] = _TensorBoard(workdir / "tensorboard")
    if project := config.logging.wandb_project:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"logging.wandb_project = {project!r} needs wandb: pip install wandb, or leave it empty"
            ) from error
        run_id = run_folder.run_id(workdir, attempt)
        try:
            run = wandb.init(
                project=project,
                name=workdir.name,
                id=run_id,
                resume="allow",
                dir=tempfile.mkdtemp(prefix="wandb-") if storage.is_remote(workdir) else str(workdir),
                config=config.to_dict(),
            )
        except Exception as error:  # an outage of a service must not stop a run
            log.warning("W&B is not reached (%s): going on without it", error)
        else:
            found["W&B"] = _WeightsAndBiases(run)
    return found


class _TensorBoard:
    """TensorBoard's event files. For gs:// they are copied from a local folder: tensorboardX itself would hang in an outage."""

    def __init__(self, folder: epath.Path):
        from tensorboardX import SummaryWriter

        self._folder = folder
        self._local = Path(tempfile.mkdtemp(prefix="tensorboard-")) if storage.is_remote(folder) else None
        self._writer = SummaryWriter(str(self._local or folder))
        self._copied = time.monotonic()
        self._copying: threading.Thread | None = None

    def write(self, kind, step, values):
        for key, value in values.items():
            self._writer.add_scalar(f"{kind}/{key}", value, step)
        idle = self._copying is None or not self._copying.is_alive()
        if self._local and idle and time.monotonic() - self._copied >= EVENTS_SECONDS:
            self._copied = time.monotonic()
            self._copying = threading.Thread(target=self._copy, daemon=True)
            self._copying.start()

    def _copy(self):
        try:
            self._writer.flush()
            storage.upload(self._local, self._folder)
        except Exception as error:  # an outage must not stop a run
            log.warning("TensorBoard's files can't be copied: %s", error)

    def close(self):
        self._writer.close()
        if self._local:
            if self._copying:
                self._copying.join()
            storage.upload(self._local, self._folder)
            shutil.rmtree(self._local)


class _WeightsAndBiases:
    def __init__(self, run):
        self._run = run

    def write(self, kind, step, values):
        self._run.log({f"{kind}/{key}": value for key, value in values.items()}, step=step)

    def close(self):
        self._run.finish()


class ProgressBar:
    """Of the steps, on a terminal."""

    def __init__(self, n_steps: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        phase, rate = TextColumn("{task.description}"), TextColumn("{task.fields[rate]}")
        columns = phase, BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn()
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task("train", total=n_steps, rate="")
        self._bar.start()

    def update(self, phase: str, step: int, tokens_per_second: float | None, mfu: float | None) -> None:
        rate = "" if tokens_per_second is None else f"{tokens_per_second:,.0f} tok/s"
        rate += "" if mfu is None else f" · MFU {mfu:.0%}"
        self._bar.update(self._task, description=phase, completed=step, rate=rate)

    def close(self) -> None:
        self._bar.stop()
