import json

import pandas as pd
import pytest

import gqa_jax
from gqa_jax import costs, results, storage
from gqa_jax.metrics import write_json
from launch import answer, grid
from launch.grid import Layout
from tests import grid_fakes
from tests.test_grid import two_phases


@pytest.fixture
def folder(tmp_path):
    the_grid = grid_fakes.small_grid()
    cells = grid.cells(the_grid)
    layout = Layout(tmp_path)
    for i, cell in enumerate(cells):
        if i < 5:
            grid_fakes.finish(cell, layout, "diverged" if i == 4 else "done")
        else:
            layout.cell(cell.name).mkdir(parents=True)
            write_json(layout.cell(cell.name) / "config.json", cell.config.to_dict())
    write_json(tmp_path / "grid.json", grid.facts(the_grid, cells))
    return tmp_path


def test_loss_table_obeys_its_schema(folder):
    table = gqa_jax.load_results(folder)
    assert list(table.columns) == [c.name for c in results.LOSS_COLUMNS]
    assert {name: str(dtype) for name, dtype in table.dtypes.items()} == {c.name: c.dtype for c in results.LOSS_COLUMNS}
    assert len(table) == 5
    assert table["continue_from"].isna().all()
    assert all(c.meaning for c in (*results.LOSS_COLUMNS, *results.COST_COLUMNS))
    assert {"cell", "size", "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "context", "params_non_embedding",
            "params_total", "tokens", "train_flops", "seed", "status", "loss", "loss_sem", "tokens_per_second", "attention",
            "device"} <= set(table.columns)  # fmt: skip


def test_missing_numbers_are_empty_and_never_zero(folder):
    table = gqa_jax.load_results(folder)
    assert table["mfu"].isna().all()
    assert table["bits_per_byte"].isna().all()
    diverged = table[table["status"] == "diverged"]
    assert len(diverged) == 1
    assert diverged["loss"].isna().all()
    answer.write_tables(Layout(folder), Layout(folder))
    raw = pd.read_csv(folder / "tables" / "loss.csv", dtype=str, keep_default_na=False)
    assert set(raw["mfu"]) == {""}


def test_cost_table_has_a_row_per_cell_context_and_convention(folder):
    table = gqa_jax.load_costs(folder)
    assert list(table.columns) == [c.name for c in results.COST_COLUMNS]
    assert len(table) == 6 * 2 * len(costs.CONVENTIONS)
    assert not table.isna().any().any()


def test_exported_tables_read_back_the_same(folder, tmp_path_factory):
    loss = answer.write_tables(Layout(folder), Layout(folder))
    cost = results.load_costs(folder)
    alone = tmp_path_factory.mktemp("alone")
    (folder / "tables").rename(alone / "tables")
    pd.testing.assert_frame_equal(gqa_jax.load_results(alone), loss)
    pd.testing.assert_frame_equal(gqa_jax.load_costs(alone), cost)
    assert len(pd.read_csv(alone / "tables" / "loss.csv")) == len(loss)


def test_broken_results_are_named_with_the_fix(folder):
    (path, *_) = sorted(folder.glob("cells/*/result.json"))
    for content in (
        "{",
        "[]",
        json.dumps({"status": "done"}),
        json.dumps({"status": "?", "loss": 1, "step": 1, "identity": ""}),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"{path.name}.*move it away"):
            gqa_jax.load_results(folder)


def test_a_folder_without_a_grid_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no grid folder"):
        gqa_jax.load_results(tmp_path)


def test_a_grid_on_a_bucket_reads_the_same(folder, gcs_root):
    storage.upload(folder, gcs_root)
    pd.testing.assert_frame_equal(gqa_jax.load_results(gcs_root), gqa_jax.load_results(folder))
    pd.testing.assert_frame_equal(results.load_costs(gcs_root), results.load_costs(folder))
    with pytest.raises(FileNotFoundError, match=r"gs://.*/none is no grid folder"):
        gqa_jax.load_results(f"{gcs_root}/none")


def test_a_run_that_continues_another_names_it(tmp_path):
    first, second, third = cells = grid.cells(two_phases())
    for cell in cells:
        grid_fakes.finish(cell, Layout(tmp_path))
    write_json(tmp_path / "grid.json", grid.facts(two_phases(), cells))
    answer.write_tables(Layout(tmp_path), Layout(tmp_path))
    rows = pd.read_csv(tmp_path / "tables" / "loss.csv", dtype=str, keep_default_na=False)
    assert dict(zip(rows["cell"], rows["continue_from"], strict=True)) == {
        first.name: "", second.name: first.name, third.name: second.name,
    }  # fmt: skip
