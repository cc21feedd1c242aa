"""The style of pictures, names of curves, files."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from gqa_jax import formatting, plots
from gqa_jax.laws import LLAMA3, Heads
from gqa_jax.plots import labels, style, tables
from gqa_jax.search.answer import heads_of
from gqa_jax.shapes import head_configurations
from tests import plot_helpers

ALL = [Heads(*heads) for heads in head_configurations()] + [LLAMA3]


def test_every_head_configuration_can_be_told_without_colour():
    looks = [plots.head_look(heads) for heads in ALL]
    assert len({(look.marker, str(look.line)) for look in looks}) == len(ALL)


# Linear RGB as people without the cones for red and for green see it (Machado, Oliveira and Fernandes 2009, severity 1).
PROTANOPIA = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
DEUTERANOPIA = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]


def oklab(linear_Cx3):
    """Where colours lie in OKLab, in which equal distances look equal."""
    to_cones = [[0.4122215, 0.5363325, 0.0514460], [0.2119035, 0.6806995, 0.1073970], [0.0883025, 0.2817188, 0.6299787]]
    to_lab = [[0.2104543, 0.7936178, -0.0040720], [1.9779985, -2.4285922, 0.4505937], [0.0259040, 0.7827718, -0.8086758]]
    return np.cbrt(np.clip(linear_Cx3, 0, 1) @ np.transpose(to_cones)) @ np.transpose(to_lab)


@pytest.mark.parametrize(("eye", "least"), [(np.eye(3), 0.055), (PROTANOPIA, 0.033), (DEUTERANOPIA, 0.033)])
def test_no_two_head_configurations_share_a_colour(eye, least):
    """Also for the colour-blind; 0.02 is about what can just be told apart."""
    srgb_Cx3 = np.array([to_rgb(plots.head_look(heads).color) for heads in ALL])
    linear_Cx3 = np.where(srgb_Cx3 <= 0.04045, srgb_Cx3 / 12.92, ((srgb_Cx3 + 0.055) / 1.055) ** 2.4)
    lab_Cx3 = oklab(linear_Cx3 @ np.transpose(eye))
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab_Cx3, 2)) > least


def test_more_query_heads_are_darker():
    for kv in (1, 2, 4, 8, 16):
        shades = [plot_helpers.luma(plots.head_look(Heads(n, kv)).color) for n in (1, 2, 4, 8, 16, 32) if n >= kv]
        assert all(a - b > 0.03 for a, b in itertools.pairwise(shades))
    assert plot_helpers.luma(plots.head_look(Heads(1, 1)).color) < 0.65  # is seen on white


def test_other_numbers_of_heads_have_colours_of_their_own():
    others = [
        Heads(n, k) for n, k in ((3, 1), (6, 1), (6, 2), (6, 3), (12, 3), (40, 8), (64, 8), (64, 64), (128, 8), (128, 128))
    ]
    rules = [Heads(None, k) for k in (1, 2, 4, 8, 16, 32, -1, -2, -4, -8)]
    looks = [plots.head_look(heads) for heads in (*ALL, *others, *rules) if heads != LLAMA3]
    assert len({look.color for look in looks}) == len(ALL) - 1 + len(others) + len(rules) - 1
    assert plots.head_look(LLAMA3)[:2] == ("#000000", "*")
    assert len({plots.head_look(Heads(n, 1)).marker for n in (3, 6, 40)}) == 3
    shades = [plot_helpers.luma(plots.head_look(Heads(n, 1)).color) for n in (2, 3, 4, 32, 64, 128)]
    assert shades == sorted(shades, reverse=True)


@pytest.mark.parametrize("heads", ALL, ids=str)
def test_heads_are_found_by_their_name(heads):
    assert tables.heads_named(str(heads)) == heads
    assert heads_of({"n_heads": pd.NA if heads.n_heads is None else heads.n_heads, "n_kv_heads": heads.n_kv_heads}) == heads


def test_other_names_are_no_heads():
    assert [tables.heads_named(name) for name in ("470M", "(8,1", "(a,1)", "12x768")] == [None] * 4


def test_a_legend_is_in_the_order_in_which_the_curves_end():
    ax = style.new_axes()
    ends = {"low": 1.0, "high": 3.0, "middle": 2.0}
    for i, end in enumerate(ends.values()):
        style.curve(ax, [1, 2], [2, end], style.step_look(i, 3))
    entries = [labels.Entry(name, style.step_look(i, 3), end) for i, (name, end) in enumerate(ends.items())]
    labels.legend(ax, entries, "series", answer="the answer")
    legend = ax.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["high", "middle", "low", "the answer"]
    assert [line.get_color() for line in legend.get_lines()][::3] == [style.step_look(1, 3).color, style.HALO]
    assert legend.get_title().get_text() == "series"


@pytest.mark.parametrize(
    ("low", "high"), [(5e7, 1.4e9), (5.4e4, 8.9e4), (1.8e4, 1.6e5), (1.0, 1.3), (6.2e4, 1.15e5), (3.0, 4e9), (1e-5, 1e-3)]
)
def test_ticks_of_a_logarithmic_axis(low, high):
    ax = style.new_axes()
    ax.plot([low, high], [1, 2])
    ax.set_xlim(low, high)
    style.log_axis(ax.xaxis, text=formatting.short)
    ticks = plot_helpers.texts_of_ticks(ax.xaxis)
    assert 3 <= len(ticks) <= 9
    assert len(set(ticks)) == len(ticks)


def _picture():
    ax = style.new_axes()
    style.points(ax, [1, 2], [3, 4], plots.head_look(Heads(8, 1)), error=[0.1, np.nan], label="a")
    labels.legend(ax, [labels.Entry("a", plots.head_look(Heads(8, 1)))])
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


def test_notes_are_as_wide_as_the_figure():
    for width in (3.0, 6.4):
        ax = style.finish(style.new_axes(width), "x", "y", "title", "word " * 40)
        ax.figure.draw_without_rendering()
        box = ax.texts[0].get_window_extent()
        assert 0.6 * ax.figure.bbox.width < box.x1 < ax.figure.bbox.width
