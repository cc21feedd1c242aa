"""The style of pictures, names of curves, files."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from gqa_jax import formatting, plots
from gqa_jax.laws import LLAMA3, Heads
from gqa_jax.plots import labels, style, tables
from gqa_jax.shapes import head_configurations
from tests import plot_helpers

ALL = [Heads(*heads) for heads in head_configurations()] + [LLAMA3]


def test_every_head_configuration_can_be_told_without_colour():
    looks = [plots.head_look(heads) for heads in ALL]
    assert len({(look.marker, str(look.line)) for look in looks}) == len(ALL)
    assert len({look.color for look in looks}) == len(ALL)


def test_more_query_heads_are_darker():
    shades = [plot_helpers.luma(plots.head_look(Heads(n, 1)).color) for n in (1, 2, 4, 8, 16, 32)]
    assert all(a - b > 0.04 for a, b in itertools.pairwise(shades))


def test_heads_that_are_no_power_of_two():
    three, six, forty = (plots.head_look(Heads(n, 1)) for n in (3, 6, 40))
    assert len({three.marker, six.marker, forty.marker}) == 3
    assert plot_helpers.luma(plots.head_look(Heads(2, 1)).color) > plot_helpers.luma(three.color)
    assert plots.head_look(Heads(64, 8)).color == plots.head_look(Heads(32, 8)).color  # the darkest there is


@pytest.mark.parametrize("heads", ALL, ids=str)
def test_names_are_legible(heads):
    assert plot_helpers.luma(style.darker(plots.head_look(heads).color)) <= 0.451


@pytest.mark.parametrize("heads", ALL, ids=str)
def test_heads_are_found_by_their_name(heads):
    assert tables.heads_named(str(heads)) == heads
    assert (
        tables.heads_of({"n_heads": pd.NA if heads.n_heads is None else heads.n_heads, "n_kv_heads": heads.n_kv_heads}) == heads
    )


def test_other_names_are_no_heads():
    assert [tables.heads_named(name) for name in ("470M", "(8,1", "(a,1)", "12x768")] == [None] * 4


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8).map(sorted), st.floats(0.1, 20))
def test_names_are_moved_apart_and_no_more(heights, gap):
    placed = labels.spread(heights, gap)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(placed))
    assert np.mean(placed) == pytest.approx(np.mean(heights), abs=1e-9)
    if all(b - a >= gap for a, b in itertools.pairwise(heights)):
        assert placed == pytest.approx(heights)


@given(st.lists(st.floats(-100, 200), min_size=1, max_size=8).map(sorted))
def test_names_stay_inside_the_axes_where_they_fit(heights):
    placed = labels.spread(heights, 10.0, 0.0, 100.0)
    assert min(placed) >= -1e-9
    assert max(placed) <= 100 + 1e-9
    assert all(b - a >= 10 - 1e-9 for a, b in itertools.pairwise(placed))


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_names_do_not_overlap_and_are_inside_the_figure(scale):
    ax = style.new_axes()
    ends = [labels.End(10.0, 2.0 + 0.01 * i, f"curve {i}", "#D22C50") for i in range(6)] + [
        labels.End(9.8, 2.02, "other", "#000000")
    ]
    for end in ends:
        ax.plot([1, end.x], [3, end.y], color=end.color)
    ax.set(xscale=scale, yscale=scale)
    labels.label_ends(ax, ends)
    style.finish(ax, "x", "y")
    for limits in (None, (1.9, 10)):  # also after somebody has changed the limits
        if limits:
            ax.set_ylim(limits)
        ax.figure.draw_without_rendering()
        names = [text for text in ax.texts if text.get_text() != ""]
        assert len(names) == len(ends)
        assert all(
            ax.figure.bbox.x0 <= name.get_window_extent().x0 < name.get_window_extent().x1 <= ax.figure.bbox.x1
            for name in names
        )
        boxes = [Text.get_window_extent(name) for name in names]  # without the lines
        assert not any(a.overlaps(b) for a, b in itertools.combinations([box.padded(-1.5) for box in boxes], 2))


@pytest.mark.parametrize(("low", "high"), [(5e7, 1.4e9), (5.4e4, 8.9e4), (1.8e4, 1.6e5), (1.0, 1.3), (3.0, 4e9), (1e-5, 1e-3)])
def test_ticks_of_a_logarithmic_axis(low, high):
    ax = style.new_axes()
    ax.plot([low, high], [1, 2])
    ax.set_xlim(low, high)
    style.log_axis(ax.xaxis, text=formatting.short)
    ticks = plot_helpers.texts_of_ticks(ax.xaxis)
    assert 3 <= len(ticks) <= 8
    assert len(set(ticks)) == len(ticks)


def _picture():
    ax = style.new_axes()
    style.points(ax, [1, 2], [3, 4], plots.head_look(Heads(8, 1)), error=[0.1, np.nan], label="a")
    labels.label_ends(ax, [labels.End(2, 4, "a", "#000000")])
    return style.finish(ax, "x", "y", "title", "note").figure


def test_files_are_the_same_bytes_every_time(tmp_path):
    formats = ("png", "svg", "pdf")
    first, second = (plots.save(_picture(), tmp_path / name, formats) for name in ("a", "b"))
    assert [path.name for path in first] == ["a.png", "a.svg", "a.pdf"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_names_of_files(tmp_path):
    """A dot in a name is not taken for a suffix; one of a format is."""
    figure = Figure(figsize=(1, 1))
    assert [path.name for path in plots.save(figure, tmp_path / "loss-2.6")] == ["loss-2.6.png", "loss-2.6.svg"]
    assert [path.name for path in plots.save(figure, tmp_path / "new" / "c.png")] == ["c.png", "c.svg"]


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"format gif is unknown here: use png, svg, pdf"):
        plots.save(_picture(), tmp_path / "a", ("png", "gif"))
    assert not list(tmp_path.iterdir())


def test_tables_that_can_not_be_drawn():
    with pytest.raises(ValueError, match="columns loss and status are missing among a"):
        tables.loss_table(pd.DataFrame({"a": [1]}))
    rows = plot_helpers.table([{"status": "diverged", "loss": None, "context": 1024}])
    with pytest.raises(ValueError, match="none of 1 runs is done"):
        tables.loss_table(rows)
    rows = plot_helpers.table([{"loss": 3.0, "context": 1024}, {"loss": 3.0, "context": 2048}])
    with pytest.raises(ValueError, match=r"one context at a time: the table has 1024, 2048"):
        tables.the_only(rows, "context")


def test_missing_numbers_are_nan():
    frame = pd.DataFrame({"a": pd.array([1, None], dtype="Int64")})
    np.testing.assert_array_equal(tables.numbers(frame, "a"), [1.0, np.nan])
    np.testing.assert_array_equal(tables.numbers(frame, "b"), [np.nan, np.nan])
