"""`python -m launch` from its command line: finished cells are written by hand, so that no test trains but the last."""

import csv
import io
import json

import pytest

from launch import __main__ as launch
from launch import grid, local
from launch.grid import Layout
from tests import grid_fakes


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(grid_fakes.GRID_FILE)
    return str(path), Layout(tmp_path / "root"), grid.cells(grid_fakes.small_grid())


def run(command, small, *rest):
    path, layout, _ = small
    return launch.main([command, path, *rest, "--root", str(layout.root)])


def rows_of(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_plan_as_csv_has_the_promised_columns_and_a_row_per_cell(small, capsys):
    assert run("plan", small, "--format", "csv", "--flops_per_second", "1e9") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    promised = (
        "cell,size,n_layers,d_model,n_heads,n_kv_heads,head_dim,context,params_non_embedding,params_total,tokens,train_flops"
    )
    assert set(promised.split(",")) <= set(rows[0])
    assert len(rows) == 6
    assert float(rows[0]["seconds"]) == pytest.approx(float(rows[0]["train_flops"]) / 1e9)
    assert rows[0]["tokens"] == "1024"
    assert not small[1].root.exists()  # nothing is written


def test_plan_on_screen_and_filtered(small, capsys):
    assert run("plan", small, "--where", "n_heads=2") == 0
    out = capsys.readouterr().out
    assert "3 cells" in out
    assert "not known before a cell has finished" in out


def test_status_exit_codes_and_json(small, capsys):
    _, layout, cells = small
    assert run("status", small) == launch.EXIT_UNFINISHED
    for cell in cells:
        grid_fakes.finish(cell, layout)
    assert run("status", small) == launch.EXIT_DONE
    capsys.readouterr()
    (layout.cell(cells[0].name) / "result.json").write_text("{")
    assert run("status", small, "--json") == launch.EXIT_FAILED
    rows = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in rows] == ["failed"] + ["done"] * 5


def test_failures_alike_are_one_paragraph_with_file_and_command(small, capsys):
    _, layout, cells = small
    from gqa_jax import run_folder

    for cell in cells:
        layout.cell(cell.name).mkdir(parents=True)
        run_folder.record_exit(layout.cell(cell.name), 1, "out_of_memory", "out of memory (x): raise accumulation_steps", 0)
    assert run("status", small) == launch.EXIT_FAILED
    out = capsys.readouterr().out
    assert out.count("raise accumulation_steps") == 1
    assert "and 5 more" in out
    assert f"{layout.cell(cells[0].name)}/log.txt" in out
    assert "-m gqa_jax.train" in out


def test_retry_keeps_what_was_there_and_makes_cells_runnable(small, capsys):
    _, layout, cells = small
    for cell in cells[1:]:
        grid_fakes.finish(cell, layout)
    grid_fakes.finish(cells[0], layout, "diverged")
    assert run("retry", small) == 0
    assert "1 cells can run again" in capsys.readouterr().out
    folder = layout.cell(cells[0].name)
    assert not (folder / "result.json").exists()
    assert len(list(folder.glob("before-retry-*/result.json"))) == 1
    assert run("retry", small, cells[1].name) == launch.EXIT_BAD_INPUT
    assert "is done" in capsys.readouterr().err


def test_export_writes_tables_fits_optimum_and_pictures(small, capsys):
    _, layout, cells = small
    assert run("export", small) == launch.EXIT_BAD_INPUT
    for cell in cells:
        grid_fakes.finish(cell, layout)
    assert run("export", small) == 0
    out = capsys.readouterr().out
    assert "Cheapest heads" in out
    assert "R²" in out
    for name in ("loss.csv", "loss.parquet", "cost.csv", "cost.parquet", "fits.csv", "optimum.csv"):
        assert (layout.tables / name).stat().st_size > 0
    pictures = {path.name for path in layout.figures.iterdir()}
    assert {"loss-params-t32.png", "loss-params-t32.svg", "loss-cost-t32-served8192.png"} <= pictures
    fits = rows_of(layout.tables / "fits.csv")
    assert [float(row["b"]) for row in fits] == pytest.approx([0.3, 0.3], rel=0.01)
    before = {path.name: path.read_bytes() for path in layout.figures.iterdir()}
    assert run("export", small) == 0
    assert before == {path.name: path.read_bytes() for path in layout.figures.iterdir()}


def test_run_trains_nothing_that_is_done_and_a_second_launcher_is_refused(small, capsys, monkeypatch):
    _, layout, cells = small
    for cell in cells:
        grid_fakes.finish(cell, layout)
    monkeypatch.setattr(local, "_start", lambda *_: pytest.fail("a finished cell was started"))
    assert run("run", small) == launch.EXIT_DONE
    with local.only_launcher(layout):
        assert run("run", small) == launch.EXIT_BAD_INPUT
    assert "another launcher runs in" in capsys.readouterr().err


def test_bad_input_is_a_sentence_and_exit_2(small, capsys):
    assert launch.main(["plan", "configs/grids/quickstrat.py"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert run("plan", small, "--where", "heads=2") == 2
    assert run("logs", small, "s99") == 2
    assert "no cell of the grid" in capsys.readouterr().err
    assert run("run", small, "--slots", "999") == 2


def test_a_grid_of_real_cells_from_run_to_tables(tmp_path, capsys):
    """Two cells, one of which can't start: the other is trained, and the failure is explained."""
    path = tmp_path / "two.py"
    path.write_text(
        "from launch.grid import Grid\nfrom tests.grid_fakes import config\n"
        "def get_grid(): return Grid('two', [config(), config(model={'attention': 'flash'})], [1024])\n"
    )
    layout = Layout(tmp_path / "root")
    assert launch.main(["run", str(path), "--root", str(layout.root)]) == 2  # same run, another kernel: one cell
    path.write_text(path.read_text().replace("'flash'}", "'flash'}, seed=1"))
    assert launch.main(["run", str(path), "--root", str(layout.root)]) == launch.EXIT_FAILED
    out = capsys.readouterr().out
    assert "attention implementation 'flash' is unknown" in out
    assert len(rows_of(layout.tables / "loss.csv")) == 1
