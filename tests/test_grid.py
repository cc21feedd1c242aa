import dataclasses
import re

import pytest

from gqa_jax.config import ConfigError
from launch import grid
from tests import grid_fakes


def test_names_are_readable_unique_and_valid_for_every_engine():
    for path in ("configs/grids/quickstart.py", "configs/grids/paper.py"):
        names = [cell.name for cell in grid.cells(grid.load(path))]
        assert len(names) == len(set(names))
        assert all(re.fullmatch(r"[a-z][a-z0-9-]{0,48}", name) for name in names)
    assert re.fullmatch(r"s1p2b-t131072-h32-1-[0-9a-f]{8}", names[-1])


def test_the_papers_grid_is_8_sizes_by_21_heads_at_8k_and_the_contexts_of_its_figures():
    cells = grid.cells(grid.load("configs/grids/paper.py"))
    rows = [cell.describe() for cell in cells]
    at_8k = [row for row in rows if row["context"] == 8192]
    assert len(at_8k) == 168
    assert len({(row["n_heads"], row["n_kv_heads"]) for row in at_8k}) == 21
    assert {row["batch_tokens"] for row in rows} == {524_288}
    assert {row["context"] for row in rows} == {1024, 2048, 8192, 32_768, 131_072}
    tokens = {row["size"]: row["tokens"] for row in rows}
    assert tokens["1.2B"] == pytest.approx(24e9, rel=1e-4)


def test_the_quickstart_has_what_it_promises():
    rows = [cell.describe() for cell in grid.cells(grid.load("configs/grids/quickstart.py"))]
    assert len(rows) == 18
    assert [len({row[key] for row in rows}) for key in ("size", "context")] == [3, 2]
    assert len({(row["n_heads"], row["n_kv_heads"]) for row in rows}) == 3


def test_product_with_a_skip_rule():
    points = list(grid.product(lambda **point: point, skip=lambda a, b: a == b, a=[1, 2], b=[1, 2, 3]))
    assert points == [{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 2, "b": 1}, {"a": 2, "b": 3}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1", r"defines no get_grid\(\)"),
        ("def get_grid(): return 3", "returns a int"),
        ("import nothing_like_this", "ModuleNotFoundError"),
        ("from launch.grid import Grid\ndef get_grid(): return Grid('g', [], [1024])", "the grid has no cells"),
    ],
)
def test_bad_grid_files_are_one_sentence(tmp_path, content, message):
    path = tmp_path / "g.py"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        grid.load(str(path))


def test_a_missing_file_names_the_closest():
    with pytest.raises(ConfigError, match=r"did you mean 'configs/grids/quickstart.py'"):
        grid.load("configs/grids/quickstrat.py")


def test_bad_cells_are_found_before_anything_starts():
    def of(**changes):
        return grid.Grid("g", [grid_fakes.config(**changes)], [1024])

    with pytest.raises(ConfigError, match=r"cell 0 of grid 'g': model.n_heads = 2 is not a multiple"):
        grid.cells(of(model={"n_kv_heads": 4}))
    with pytest.raises(ConfigError, match=r"data\.epochs"):
        grid.cells(of(steps=10**7))
    with pytest.raises(ConfigError, match="less than one block"):
        grid.cells(of(context=2**25, batch_tokens=2**25, data={"block_tokens": 2**25}, evaluation={"tokens": 2**25}))
    twice = grid.Grid("g", [grid_fakes.config(), grid_fakes.config(label="other")], [1024])
    with pytest.raises(ConfigError, match="the same run"):
        grid.cells(dataclasses.replace(twice, configs=[grid_fakes.config()] * 2))


def test_where_selects_by_any_field_and_names_the_closest():
    cells = grid.cells(grid_fakes.small_grid())
    assert [c.describe()["d_model"] for c in grid.select(cells, "n_heads=2,size=32d")] == [32]
    with pytest.raises(ConfigError, match="did you mean 'n_heads'"):
        grid.select(cells, "n_head=2")
    with pytest.raises(ConfigError, match="no cell matches"):
        grid.select(cells, "n_heads=3")


def test_a_store_that_is_not_there_yet_leaves_the_plan_possible():
    (cell,) = grid.cells(grid.Grid("g", [grid_fakes.config(data={"store": "stores/not-yet"})], [1024]))
    assert cell.data_fingerprint is None
