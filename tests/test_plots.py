import matplotlib
import pytest

from gqa_jax import laws, plots, results
from launch import grid
from launch.grid import Layout
from tests import grid_fakes


@pytest.fixture
def table(tmp_path):
    layout = Layout(tmp_path)
    for cell in grid.cells(grid_fakes.small_grid()):
        grid_fakes.finish(cell, layout)
    return results.load_results(tmp_path)


def test_points_and_curves_are_where_the_data_are(table):
    backend = matplotlib.get_backend()
    fits = laws.fit_by_heads(table)
    ax = plots.loss_vs_params(fits, title="t")
    curves, points = ax.lines[0::2], ax.lines[1::2]
    assert len(points) == len(fits) == 2
    law = fits[laws.Heads(1, 1)]
    assert list(points[0].get_xdata()) == list(law.params)
    assert list(points[0].get_ydata()) == list(law.loss)
    assert curves[0].get_ydata()[0] == pytest.approx(law.predict(curves[0].get_xdata()[0]))
    assert len({line.get_marker() for line in points}) == 2  # readable without colour
    assert matplotlib.get_backend() == backend


def test_longer_contexts_move_points_by_their_cost_and_keep_the_loss(table):
    fits = laws.fit_by_heads(table)
    near, far = (plots.loss_vs_cost(table, fits, context).lines[0] for context in (1024, 131_072))
    assert list(near.get_ydata()) == list(far.get_ydata())
    assert all(a < b for a, b in zip(near.get_xdata(), far.get_xdata(), strict=True))


def test_pictures_are_the_same_bytes_every_time(table, tmp_path):
    fits = laws.fit_by_heads(table)
    pairs = [plots.save(plots.loss_vs_params(fits).figure, tmp_path / name) for name in ("a", "b")]
    assert [path.read_bytes() for path in pairs[0]] == [path.read_bytes() for path in pairs[1]]


def test_labels():
    assert [plots.context_label(t) for t in (8192, 131_072, 1000)] == ["8K", "128K", "1000"]
