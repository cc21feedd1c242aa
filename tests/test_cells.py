"""A second kind of cells, which trains nothing: state, passes, engines and screens take it as they take the first."""

import dataclasses
import json
import sys
import time
from typing import ClassVar

import pytest

import gqa_jax
from gqa_jax import storage
from gqa_jax.config import ConfigError, hash_identity
from launch import __main__ as launch
from launch import commands, grid, grid_cells, screen, state, watch
from launch.cells import REPOSITORY, Cell, Layout
from launch.executors import local
from launch.training_cells import TrainingCell
from tests import executor_contract, grid_fakes

PROCESS = """
import json, pathlib, sys, time
folder, number = pathlib.Path(sys.argv[1]), int(sys.argv[2])
(folder / "attempts").mkdir(exist_ok=True)
(folder / "attempts" / "000.json").write_text(json.dumps({"time": time.time()}))
(folder / "heartbeat.json").write_text(json.dumps({"at": time.time(), "counted": number}))
if number > 9:
    end = {"class": "too_large", "reason": f"{number} is too large", "time": time.time()}
    (folder / "exit.json").write_text(json.dumps(end))
    sys.exit(1)
assert (folder.parent.parent / "result.json").exists(), "the parent is not done"
(folder / "result.json").write_text(json.dumps({"sum": number * (number + 1) // 2}))
"""


@dataclasses.dataclass(frozen=True)
class CountingCell:
    """Counts to a number, in a folder of its parent's."""

    kind: ClassVar[str] = "counting"
    listed: ClassVar[str] = "counts"
    inputs: ClassVar[dict] = {"data.store": "sotu-bytes"}

    parent: str
    steps: int
    size: str = "small"
    train_flops: float = 1.0
    missing: None = None

    @property
    def identity(self):
        return {"parent": self.parent, "steps": self.steps}

    @property
    def name(self):
        return f"count-{self.steps}-{hash_identity(self.identity, 8)}"

    @property
    def place(self):
        return f"cells/{self.parent}/counts/{self.steps}"

    def describe(self):
        return {"cell": self.name, "steps": self.steps}

    def stored(self):
        return {"steps": self.steps}

    def command(self, folder, python=sys.executable, code=REPOSITORY):
        return [python, "-c", PROCESS, str(folder), str(self.steps)]

    def edited(self, folder):
        return None if storage.read_json(folder / "config.json") == self.stored() else "it counts to another number"

    @staticmethod
    def waits_for(folder):
        return TrainingCell, folder.parent.parent

    @staticmethod
    def progress(folder):
        beat = json.loads((folder / "heartbeat.json").read_text())
        return {"time": beat["at"], "step": beat["counted"]}

    @staticmethod
    def finished(folder):
        result = storage.read_json(folder / "result.json")
        return result and {"status": "done", "loss": float(result["sum"])}


def counted_grid(*numbers):
    """A cell that trains, and one that counts to each of these numbers after it."""
    others = lambda cells: [CountingCell(cell.name, number) for cell in cells for number in numbers]  # noqa: E731
    return dataclasses.replace(grid_fakes.small_grid(), configs=grid_fakes.small_grid().configs[:1], others=others)


def made(cells, layout):
    for cell in cells:
        layout.cell(cell.name).mkdir(parents=True)
        (layout.cell(cell.name) / "config.json").write_text(json.dumps(cell.stored()))


@pytest.fixture
def trained(monkeypatch):
    monkeypatch.setattr(TrainingCell, "command", executor_contract.fake_command)
    return grid.cells(grid_fakes.small_grid())[0]


def run_all(cells, layout):
    with local.Executor(local.Options(slots=2), layout) as engine:
        return watch.repeat(cells, layout, engine, False, lambda now: None, 0.05)


@pytest.mark.parametrize("kind", [TrainingCell, CountingCell])
def test_a_kind_has_all_that_the_launcher_asks_for(kind):
    missing = [name for name in {*vars(Cell), *Cell.__annotations__} if not name.startswith("_") and not hasattr(kind, name)]
    assert set(missing) <= {field.name for field in dataclasses.fields(kind)}


def test_it_runs_after_its_parent_in_a_folder_of_that_one(tmp_path, trained):
    cells = grid.cells(counted_grid(3))
    assert cells == [trained, CountingCell(trained.name, 3)]
    layout = Layout(tmp_path).holding(cells)
    assert layout.cell(cells[1].name) == tmp_path / "cells" / trained.name / "counts" / "3"
    executor_contract.behave(layout, trained, "finish")
    made(cells[1:], layout)
    waiting = state.of(cells[1], layout.cell(cells[1].name), time.time())
    assert (waiting.state, waiting.runnable, waiting.cause) == ("planned", True, f"waits for {trained.name}")
    last = run_all(cells, layout)
    assert [now.state for now in last.states] == ["done", "done"]
    counted = last.states[1]
    assert (counted.loss, counted.attempts) == (6.0, 1)
    assert 0 <= counted.heartbeat_age < 60
    assert [row["state"] for row in commands.Status(None, None, last, {}).rows()] == ["done", "done"]
    assert screen.table(cells, last.states, "both kinds", {}).row_count == 2
    (layout.cell(cells[1].name) / "config.json").write_text('{"steps": 4}')
    edited = state.of(cells[1], layout.cell(cells[1].name), time.time())
    assert (edited.state, edited.failure, edited.cause) == ("failed", "edited", "it counts to another number")


def test_its_failures_hold_back_its_kind_alone(tmp_path, trained):
    """Though cells that train have the same size."""
    counting = [CountingCell(trained.name, steps, size=trained.size) for steps in (11, 12, 13, 4)]
    cells = [*counting, trained]
    layout = Layout(tmp_path).holding(cells)
    made(counting, layout)
    grid_fakes.finish(trained, layout)
    assert [now.state for now in run_all(counting[:3], layout).states] == ["failed"] * 3
    (layout.cell(trained.name) / "result.json").unlink()
    executor_contract.behave(layout, trained, "finish")
    held = state.held_back(cells, state.of_all(cells, layout, time.time(), {}))
    assert held == {counting[3].name: f"held back: 3 cells of its size failed alike (too_large), like {counting[0].name}"}
    last = run_all(cells, layout)
    assert list(last.held) == [counting[3].name]
    assert last.states[-1].state == "done"


def test_a_name_is_of_one_cell_alone():
    with pytest.raises(ConfigError, match="two cells of grid 'small' are the same run, count-3-"):
        grid.cells(counted_grid(3, 4, 3))


def test_its_names_are_listed_apart(trained):
    count = CountingCell(trained.name, 3)
    facts = grid_cells.facts(grid_fakes.small_grid(), [trained, count])
    assert (facts["cells"], facts["counts"]) == ([trained.name], [count.name])
    assert grid_cells.select([trained, count], "steps=3") == [count]
    assert grid_cells.select([trained, count], "n_heads=1") == [trained]


def test_commands_take_it(tmp_path, capsys):
    """The cell that trains is done; `run` counts after it, and nothing that is about training sees the other."""
    file, root = tmp_path / "small.py", tmp_path / "root"
    file.write_text("from tests.test_cells import counted_grid\ndef get_grid(): return counted_grid(3, 11)\n")
    trained, three, eleven = grid.cells(counted_grid(3, 11))
    grid_fakes.finish(trained, Layout(root))
    about = [str(file), "--root", str(root)]
    assert launch.main(["run", *about, "--where", "steps=3"]) == launch.EXIT_DONE
    assert (Layout(root).cell(trained.name) / "counts" / "3" / "config.json").exists()
    facts = storage.read_json(root / "grid.json")
    assert (facts["cells"], facts["counts"]) == ([trained.name], [three.name, eleven.name])
    assert len(gqa_jax.load_results(root)) == 1
    assert launch.main(["run", *about]) == launch.EXIT_FAILED
    assert f"failed (too_large): {eleven.name}: 11 is too large" in capsys.readouterr().out
    assert launch.main(["status", *about, "--json"]) == launch.EXIT_FAILED
    rows = json.loads(capsys.readouterr().out)
    assert [(row["cell"], row["state"]) for row in rows] == [
        (trained.name, "done"), (three.name, "done"), (eleven.name, "failed"),
    ]  # fmt: skip
    assert launch.main(["retry", about[0], eleven.name, *about[1:]]) == launch.EXIT_DONE
    assert launch.main(["status", *about]) == launch.EXIT_UNFINISHED
    shown = capsys.readouterr().out
    assert [name for name in (trained.name, three.name, eleven.name) if name in shown] == [
        trained.name,
        three.name,
        eleven.name,
    ]
    assert launch.main(["plan", *about, "--format", "json"]) == launch.EXIT_DONE
    assert [row["cell"] for row in json.loads(capsys.readouterr().out)] == [trained.name]
