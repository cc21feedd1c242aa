"""What heads cost against others (Figures 1 and 4)."""

import numpy as np
import pandas as pd
import pytest

from gqa_jax import costs, plots
from gqa_jax.costs import solve_shape
from gqa_jax.laws import LLAMA3, Heads
from gqa_jax.search import objectives, optimum, presets
from gqa_jax.shapes import paper_aspect
from tests import plot_helpers

OURS = Heads(8, 1)
CONTEXTS = [8192, 32_768, 131_072]
ALL_COSTS = [objectives.make(name) for name in ("memory", "flops", "z")]


@pytest.fixture(scope="module")
def laws():
    return presets.load("paper")


def heights(ax):
    return [bar.get_height() for bar in ax.patches]


def test_bars_are_costs_of_one_model_at_the_same_loss(laws):
    """Of the answer under Z: its heads and, for the other costs too, its shape."""
    ax = plots.savings(laws, 2.615, 131_072)
    assert heights(ax)[::2] == [100, 100, 100]
    answer = optimum.search(laws, 2.615, 131_072)
    assert answer.heads == OURS
    for i, cost in enumerate(ALL_COSTS):
        same = optimum.search(laws, 2.615, 131_072, cost, heads=[OURS], aspect=answer.ratio)
        assert heights(ax)[2 * i + 1] == pytest.approx(100 * same.cost / same.baseline.cost)
        assert f"\u2212{100 * same.saving:.1f}%" in plot_helpers.texts(ax)
    assert heights(ax)[5] == pytest.approx(100 * (1 - answer.saving), rel=1e-3)  # between ratios costs are parabolas
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["memory", "FLOPs", "$Z$"]


def test_whiskers_are_intervals_of_the_draws(laws):
    ax = plots.savings(laws, 2.615, 131_072, heads=OURS, show=["memory"], aspect="trained")
    found = optimum.search(laws, 2.615, 131_072, objectives.make("memory"), heads=[OURS], aspect="trained")
    low, high = ax.collections[-1].get_segments()[0][:, 1]
    assert (100 - high, 100 - low) == pytest.approx([100 * end for end in found.saving_interval])
    assert low < heights(ax)[1] < high
    assert plot_helpers.texts(ax)[-1].endswith("\nwhiskers: 95% with shared noise and bends")


def test_a_law_without_draws_has_no_whiskers(laws):
    ax = plots.savings(dict(laws), 2.615, 131_072, heads=OURS)
    assert not ax.collections
    assert not any("95%" in text for text in plot_helpers.texts(ax))
    assert "by its law" in ax.get_legend().get_texts()[0].get_text()  # runs are not known


def test_figure_1_of_the_paper(laws):
    """-50.8% memory and -57.8% FLOPs: (8,1) in the paper's shapes, against the measured 32 layers x 2048."""
    ax = plots.savings(laws, 2.615, 131_072, heads=OURS, aspect="paper", show=["memory", "flops"])
    assert heights(ax)[1] - 100 == pytest.approx(-50.8, abs=0.5)
    assert heights(ax)[3] - 100 == pytest.approx(-57.8, abs=0.5)
    theirs = ax.get_legend().get_texts()[0].get_text()
    assert theirs == "($d/d_h$,8), measured: $N$ = 1.41B, 32 x 2048"
    assert "shapes: $d/L$ as in the paper's tables" in plot_helpers.texts(ax)[-1].replace("\n", " ")


def test_objectives_have_bars(laws):
    objective = objectives.make("latency", device="h200")
    ax = plots.savings(laws, 2.615, 131_072, heads=OURS, show=[objective])
    assert ax.get_xticklabels()[0].get_text() == objective.label


def test_curves_against_the_context(laws):
    ax = plots.cost_by_context(laws, 2.615, CONTEXTS, [OURS, LLAMA3])
    of_memory = optimum.optimum_map(laws, [2.615], CONTEXTS, objectives.make("memory"), heads=[OURS, LLAMA3])
    for curve, heads in zip(plot_helpers.curves(ax), (OURS, LLAMA3), strict=True):
        rows = of_memory[of_memory["n_kv_heads"] == heads.n_kv_heads]
        assert [curve.get_ydata()[0], curve.get_ydata()[-1]] == pytest.approx(list(rows["cost"].iloc[[0, -1]]))
    assert ax.get_ylabel() == "\u2190 cheaper      inference memory (values)"
    assert plot_helpers.texts_of_ticks(ax.xaxis) == ["8K", "32K", "128K"]
    assert len(ax.collections) == 2  # bands
    marks = [line for line in ax.lines if line.get_label() == "_answer"]
    for mark in marks:  # Llama 3's heads at short contexts, then (8,1)
        context = mark.get_xdata()[len(mark.get_xdata()) // 2]
        best = optimum.search(laws, 2.615, int(context), objectives.make("memory"), heads=[OURS, LLAMA3])
        assert mark.get_ydata()[len(mark.get_xdata()) // 2] == pytest.approx(best.cost)
    assert len(marks) == 2
    assert [marks[0].get_xdata()[0], marks[1].get_xdata()[-1]] == [CONTEXTS[0], CONTEXTS[-1]]
    assert marks[0].get_xdata()[-1] == marks[1].get_xdata()[0]  # no gap
    title = ax.get_legend().get_title().get_text()
    assert title == "(query, key/value) heads\n$d/d_h$: as many as fill the width,\n$N$ at 128K"


def test_curves_of_a_shape_that_is_given(laws):
    ax = plots.cost_by_context(laws, 2.615, CONTEXTS, [OURS], aspect="paper")
    law = laws[OURS]
    typical = float(np.median(np.exp(laws.draws().take([OURS]).log_size(2.615))))
    assert typical == pytest.approx(law.solve(2.615), rel=0.05)
    shape = solve_shape(typical, OURS, paper_aspect(), 64, 50_304, laws.size_convention)
    assert plot_helpers.curves(ax)[0].get_ydata()[-1] == pytest.approx(costs.infer_memory(shape, 131_072, "figures"), rel=1e-3)
    assert not [line for line in ax.lines if line.get_label() == "_answer"]  # nothing to be compared with


def test_heads_without_a_law_and_losses_that_are_not_reached(laws):
    with pytest.raises(ValueError, match=r"heads \(5,1\) have no law here.*there are \(1,1\), \(2,1\)"):
        plots.savings(laws, 2.615, 131_072, heads=Heads(5, 1))
    with pytest.raises(ValueError, match=r"a loss of 1\.9 can't be reached: the fitted entropy E is"):
        plots.cost_by_context(laws, 1.9, CONTEXTS, [OURS])
    with pytest.raises(ValueError, match="cost 'x' is unknown"):
        plots.cost_by_context(laws, 2.615, CONTEXTS, [OURS], cost="x")
    with pytest.raises(ValueError, match=r"no saving against heads \(5,1\): they have no law here"):
        plots.savings(laws, 2.615, 131_072, heads=OURS, baseline=Heads(5, 1))


def test_savings_of_a_map(laws):
    frame = optimum.optimum_map(laws, [2.9, 2.7], CONTEXTS)
    ax = plots.savings_by_context(frame)
    best = frame[frame["rank"] == 1]
    points = plot_helpers.points(ax)
    assert list(points) == ["2.9", "2.7"]
    for loss, line, band in zip((2.9, 2.7), points.values(), ax.collections, strict=True):
        rows = best[best["loss"] == loss]
        assert list(line.get_xdata()) == CONTEXTS
        np.testing.assert_allclose(line.get_ydata(), 100 * rows["saving"].to_numpy(float))
        edge = band.get_paths()[0].vertices[:, 1]
        assert (edge.min(), edge.max()) == pytest.approx((100 * rows["saving_low"].min(), 100 * rows["saving_high"].max()))
    with pytest.raises(ValueError, match="saving is empty"):
        plots.savings_by_context(frame.assign(saving=np.nan))


def aligned():
    """As `gqa_jax.search.equal_compute.equal_training_curves` gives it."""
    n_params = np.array([1e7, 1e8, 1e9])
    frames = []
    for n, k, gain in ((8, 1, 0.02), (32, 8, 0.0)):
        frame = pd.DataFrame({"n_heads": n, "n_kv_heads": k, "n_params": n_params, "loss": 2 + gain + (1e8 / n_params) ** 0.3})
        frame["loss_low"], frame["loss_high"] = frame["loss"] - 0.01, frame["loss"] + 0.01
        frame["m_infer"], frame["c_infer"], frame["cost"] = n_params * k, 1e6 * n_params, n_params**0.5
        frames.append(frame)
    return pd.concat(frames)


def test_curves_of_the_same_training_cost():
    ax = plots.aligned_cost(aligned())
    ours, theirs = plot_helpers.curves(ax)
    assert list(ours.get_xdata()) == [1e7, 1e8, 1e9]
    assert list(theirs.get_xdata()) == [8e7, 8e8, 8e9]
    np.testing.assert_allclose(theirs.get_ydata(), 2 + np.array([10, 1, 0.1]) ** 0.3)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["(8,1)", "(32,8)", "least cost"]
    assert ax.get_xlabel() == "\u2190 cheaper      inference memory (values)"
    assert plots.aligned_cost(aligned(), cost="cost", label="Z").get_xlabel() == "\u2190 cheaper      Z"


def test_yellow_is_along_the_cheapest_of_each_loss():
    """(8,1) needs an eighth of the memory at a loss that is a little higher at the same size."""
    ax = plots.aligned_cost(aligned())
    (mark,) = (line for line in ax.lines if line.get_label() == "_answer")
    ours, theirs = plot_helpers.curves(ax)
    on_curve = np.interp(mark.get_ydata(), ours.get_ydata()[::-1], np.log(ours.get_xdata()[::-1]))
    np.testing.assert_allclose(np.log(mark.get_xdata()), on_curve)
    assert mark.get_ydata().max() == pytest.approx(min(ours.get_ydata()[0], theirs.get_ydata()[0]))
    assert mark.get_ydata().min() == pytest.approx(max(ours.get_ydata()[-1], theirs.get_ydata()[-1]))


def test_curves_of_the_same_training_cost_need_a_served_context():
    with pytest.raises(ValueError, match="no column m_infer: give equal_training_curves a context_served"):
        plots.aligned_cost(aligned().drop(columns="m_infer"))
    with pytest.raises(ValueError, match="cost 'z' is unknown here: use memory, flops, cost"):
        plots.aligned_cost(aligned(), cost="z")
