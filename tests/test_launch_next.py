"""`python -m launch next`: candidates from a grid, and the grid file that is written, which `run` takes."""

import json
from pathlib import Path

import pandas as pd
import pytest

from gqa_jax import results
from gqa_jax.search import next_runs
from gqa_jax.training.metrics import write_json
from launch import grid, grid_cells, next_cells, studies
from launch.__main__ import main
from launch.cells import Layout
from tests import grid_fakes

FILE = """
from launch import grid
from tests import grid_fakes

def get_grid():
    configs = grid.product(grid_fakes.config, size=[16, 32, 64, 128, 192], n_heads=[1, 2, 4])
    return grid.Grid(name="wide", configs=list(configs), contexts_served=[1024, 8192])
"""
ASK = ["next", "wide.py", "--context", "256", "--loss", "1.9", "--budget", "1e12"]


@pytest.fixture
def wide(tmp_path, monkeypatch):
    """A grid whose largest cells are not trained: its cells and its folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wide.py").write_text(FILE)
    cells = grid.cells(grid.load("wide.py"))
    layout = Layout(tmp_path / "runs" / "wide")
    for number, cell in enumerate(cells):
        if cell.config.model.d_model < 192:
            finish(cell, layout, number)
    layout.root.joinpath("grid.json").write_text(json.dumps(grid_cells.facts(grid.load("wide.py"), cells)))
    return cells, layout


def finish(cell, layout, number, noise=0.04):
    """On a power law, but for some noise that is the same every time."""
    grid_fakes.finish(cell, layout)
    path = layout.cell(cell.name) / "result.json"
    result = json.loads(path.read_text())
    result["loss"] += noise * ((number * 0.618) % 1 - 0.5)
    write_json(path, result)


def test_writes_a_grid_file_that_run_takes(wide, capsys):
    cells, layout = wide
    assert main(ASK) == 0
    text = capsys.readouterr().out
    assert "12 runs; 15 could be trained" in text
    assert "python -m launch run wide-next.py --root" in text
    chosen = grid.cells(grid.load("wide-next.py"))
    names = {cell.name for cell in chosen}
    done = set(results.load_results(layout.root)["cell"])
    assert done < names  # what is finished stays in the tables
    new = [cell for cell in chosen if cell.name not in done]
    assert new
    assert sum(cell.train_flops for cell in new) <= 1e12
    for cell in new:
        assert cell.name in {c.name for c in cells} or cell.config.seed == 1
    assert main(["run", "wide-next.py", "--root", str(layout.root), "--dry_run"]) == 0
    assert f"{len(new)} of {len(chosen)} cells would be submitted" in capsys.readouterr().out
    assert main(ASK) == 2
    assert "wide-next.py is there: run it, remove it, or give another name with --out FILE" in capsys.readouterr().err


def test_candidates_are_of_the_size_that_their_shape_says(wide):
    cells, _ = wide
    source = studies.of_grid("wide.py")
    one = studies.fit(source).at(None)
    found = next_cells.candidates(one, cells, source).candidates
    labels = {c.size: one.laws.size_label(c.heads, 1.0, c.size) for c in found}
    assert labels == {"2x16": 0, "2x32": 1, "2x64": 2, "2x128": 3, "2x192": None}


def test_an_answer_that_is_sure_wants_no_runs(wide, capsys, tmp_path):
    cells, layout = wide
    for number, cell in enumerate(cells[:12]):
        finish(cell, layout, number, noise=0.0001)
    assert main(ASK) == 0
    assert "nothing to train for it" in capsys.readouterr().out
    assert not (tmp_path / "wide-next.py").exists()


def test_earlier_seeds_stay_and_later_ones_follow(wide, capsys):
    cells, layout = wide
    again = grid.part("wide.py", [], {cells[0].name: [1]})
    (extra,) = grid.cells(again)
    assert extra.config.seed == 1
    finish(extra, layout, 99)
    facts = json.loads(layout.root.joinpath("grid.json").read_text())
    layout.root.joinpath("grid.json").write_text(json.dumps(facts | {"cells": [*facts["cells"], extra.name]}))
    assert main([*ASK, "--out", "later.py"]) == 0
    text = Path("later.py").read_text()
    assert extra.name in {cell.name for cell in grid.cells(grid.load("later.py"))}
    assert f"'{cells[0].name}': [1" in text.replace('"', "'")


def test_failed_cells_are_no_candidates(wide, capsys):
    cells, layout = wide
    last = cells[-1]
    folder = layout.cell(last.name)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "exit.json", {"code": 1, "class": "error", "cause": "x", "time": 0.0})
    assert main(ASK) == 0
    assert last.name not in Path("wide-next.py").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--budget": "1"}, "the cheapest run, "),
        ({"--loss": "-1"}, "must be above 0 and at most 100"),
        ({"--train_context": "77"}, "no run was trained there; there are 32"),
        ({"--cost": "latency"}, "needs device"),
    ],
)
def test_bad_input_is_a_sentence_and_writes_nothing(wide, change, said, capsys, tmp_path):
    argv = list(ASK)
    for name, value in change.items():
        argv = [*argv, name, value] if name not in argv else [value if argv[i - 1] == name else x for i, x in enumerate(argv)]
    assert main(argv) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "wide-next.py").exists()


def test_without_laws_it_says_which_cells_would_make_them(wide, capsys):
    cells, layout = wide
    for cell in cells:
        if cell.config.model.d_model != 16 and (path := layout.cell(cell.name) / "result.json").exists():
            path.unlink()
    assert main(ASK) == 2
    error = capsys.readouterr().err
    assert "1 size has finished" in error
    assert "Cells that would make a fit possible: " in error
    assert cells[3].name in error or cells[1].name in error
    assert main(["next", str(layout.root), *ASK[2:]]) == 2
    assert "give the grid file" in capsys.readouterr().err


def test_a_part_of_a_grid_that_changed_since_is_refused(wide):
    cells, _ = wide
    with pytest.raises(grid.ConfigError, match=r"wide.py has no cell s16d-x \(any more\)"):
        grid.part("wide.py", ["s16d-x"])
    assert [cell.name for cell in grid.cells(grid.part("wide.py", [cells[2].name]))] == [cells[2].name]


@pytest.mark.parametrize("asked", [(), ("--rules", "old")])
def test_of_runs_of_the_first_version_it_chooses_cells_of_their_names(tmp_path, monkeypatch, capsys, asked):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wide.py").write_text(FILE)
    whole = grid.under_old_rules(grid.load("wide.py"))
    cells, layout = grid.cells(whole), Layout(tmp_path / "runs" / "wide")
    for number, cell in enumerate(cells):
        if cell.config.model.d_model < 192:
            finish(cell, layout, number)
    layout.root.joinpath("grid.json").write_text(json.dumps(grid_cells.facts(whole, cells)))
    monkeypatch.setattr(next_runs, "choose", two_of_them)
    assert main([*ASK, *asked]) == 0
    out = capsys.readouterr().out
    assert "12 runs; 15 could be trained" in out  # three sizes that are missing, and twelve seeds
    chosen = grid.cells(grid.load("wide-next.py"))
    done = set(results.load_results(layout.root)["cell"])
    new = [cell for cell in chosen if cell.name not in done]
    assert len(chosen) == len(done) + 2  # what is finished stays in the tables
    assert new[0].name in {cell.name for cell in cells}
    assert new[1].config.seed == 1
    assert all(cell.config.evaluation.windows == "first" for cell in chosen)
    command = next(line for line in out.splitlines() if line.startswith("wide-next.py: "))
    assert ("--rules old" in command) == bool(asked)
    assert main(["run", "wide-next.py", "--root", str(layout.root), "--dry_run"]) == 0  # nothing of it is in the way
    assert "2 of 14 cells would be submitted" in capsys.readouterr().out


def two_of_them(laws, questions, candidates, budget, **how):
    """As `next_runs.choose`, without a simulation: a cell that is missing, and a seed."""
    runs = [next(one for one in candidates if ("with seed" in one.name) == seed) for seed in (False, True)]
    row = dict.fromkeys(next_runs.STEPS, 0.0)
    steps = pd.DataFrame([row | {"name": run.name, "cost": run.cost} for run in runs])
    return next_runs.Choice(steps, 0.1, 0.05, 0.05, 0.01, 0.5, 0.6, 2.0, budget, "so it was asked", ())
