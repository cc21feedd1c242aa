"""What heads cost against others (Figures 1 and 4)."""

import numpy as np
import pandas as pd
import pytest

from gqa_jax import costs, plots, presets
from gqa_jax.laws import LLAMA3, Heads
from gqa_jax.search import objectives, optimum
from gqa_jax.shape_search import solve_shape
from gqa_jax.shapes import Aspect
from tests import plot_helpers

OURS = Heads(8, 1)
CONTEXTS = [8192, 32_768, 131_072]


@pytest.fixture(scope="module")
def laws():
    return presets.load("paper")


def memory(laws, heads, loss, context):
    shape = solve_shape(laws[heads].solve(loss), heads, laws.aspect, 64, 50_304, laws.size_convention)
    return costs.infer_memory(shape, context, "figures")


def heights(ax):
    return [bar.get_height() for bar in ax.patches]


def test_bars_are_costs_at_the_same_loss(laws):
    ax = plots.savings(laws, 2.615, 131_072)
    assert heights(ax)[::2] == [100, 100, 100]
    ratio = memory(laws, OURS, 2.615, 131_072) / memory(laws, LLAMA3, 2.615, 131_072)
    assert heights(ax)[1] == pytest.approx(100 * ratio)
    assert f"\u2212{100 * (1 - ratio):.1f}%" in plot_helpers.texts(ax)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["memory", "FLOPs", "$Z$"]
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names[1].startswith("(8,1), $N$ = 2.0")  # the answer under Z
    assert optimum.search(laws, 2.615, 131_072).heads == OURS


def test_whiskers_are_intervals_of_the_draws(laws):
    ax = plots.savings(laws, 2.615, 131_072, heads=OURS, show=["memory"])
    low, high = ax.collections[0].get_segments()[0][:, 1]
    assert low < heights(ax)[1] < high
    about = (laws.aspect, 64, 50_304, laws.size_convention)
    drawn = laws.draws().take([OURS, LLAMA3])
    n_SxH = np.exp(drawn.log_size(2.615))
    ours, theirs = (
        costs.infer_memory(solve_shape(n_SxH[:, i], heads, *about), 131_072, "figures")
        for i, heads in enumerate((OURS, LLAMA3))
    )
    assert np.mean((100 * ours / theirs >= low) & (100 * ours / theirs <= high)) == pytest.approx(0.95, abs=0.005)
    assert plot_helpers.texts(ax)[-1].endswith("\nwhiskers: 95% with shared noise and bends")


def test_a_law_without_draws_has_no_whiskers(laws):
    ax = plots.savings(dict(laws), 2.615, 131_072, heads=OURS, aspect=laws.aspect)
    assert not ax.collections
    assert not any("95%" in text for text in plot_helpers.texts(ax))


def test_figure_1_of_the_paper(laws):
    """-50.8% memory and -57.8% FLOPs: (8,1) at N = 2.087e9 and Table 7's aspect against 32 layers x 2048 with (32, 8)."""
    fixed = {OURS: _At(2.087e9), Heads(32, 8): _At(1_409_286_144)}
    ratio = Aspect((1.4e9, 1.5e9, 2.0e9, 2.1e9), (64, 64, 56.4, 56.4))
    ax = plots.savings(fixed, 2.615, 131_072, heads=OURS, baseline=Heads(32, 8), aspect=ratio, show=["memory", "flops"])
    assert heights(ax)[1] - 100 == pytest.approx(-50.8, abs=0.3)
    assert heights(ax)[3] - 100 == pytest.approx(-57.8, abs=0.3)


class _At:
    """A law that is at N, whatever the loss."""

    def __init__(self, n_params):
        self.n_params = n_params

    def solve(self, loss):
        return self.n_params


def test_objectives_have_bars(laws):
    objective = objectives.make("latency", device="h200")
    ax = plots.savings(laws, 2.615, 131_072, heads=OURS, show=[objective])
    assert ax.get_xticklabels()[0].get_text() == objective.label


def test_curves_against_the_context(laws):
    ax = plots.cost_by_context(laws, 2.615, CONTEXTS, [OURS, LLAMA3])
    for curve, heads in zip(plot_helpers.curves(ax), (OURS, LLAMA3), strict=True):
        for i in (0, -1):
            assert curve.get_ydata()[i] == pytest.approx(memory(laws, heads, 2.615, CONTEXTS[i]))
    assert ax.get_ylabel() == "inference memory (billion values)"
    assert plot_helpers.texts_of_ticks(ax.xaxis) == ["8K", "32K", "128K"]
    assert len(ax.collections) == 2  # bands


def test_heads_without_a_law_and_losses_that_are_not_reached(laws):
    with pytest.raises(ValueError, match=r"heads \(5,1\): no law; there are \(1,1\), \(2,1\)"):
        plots.savings(laws, 2.615, 131_072, heads=Heads(5, 1))
    with pytest.raises(ValueError, match=r"a loss of 1\.9 can't be reached"):
        plots.cost_by_context(laws, 1.9, CONTEXTS, [OURS])
    with pytest.raises(ValueError, match="cost 'x' is unknown"):
        plots.cost_by_context(laws, 2.615, CONTEXTS, [OURS], cost="x")


def test_savings_of_a_map(laws):
    frame = optimum.optimum_map(laws, [2.9, 2.7], CONTEXTS)
    ax = plots.savings_by_context(frame)
    best = frame[frame["rank"] == 1]
    points = plot_helpers.points(ax)
    assert list(points) == ["2.9", "2.7"]
    for loss, line in zip((2.9, 2.7), points.values(), strict=True):
        assert list(line.get_xdata()) == CONTEXTS
        np.testing.assert_allclose(line.get_ydata(), 100 * best[best["loss"] == loss]["saving_vs_llama3"].to_numpy(float))
    with pytest.raises(ValueError, match="saving_vs_llama3 is empty"):
        plots.savings_by_context(frame.assign(saving_vs_llama3=np.nan))


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
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["(8,1)", "(32,8)"]
    assert ax.get_xlabel() == "inference memory (million values)"
    assert plots.aligned_cost(aligned(), cost="cost", label="Z").get_xlabel() == "Z"


def test_curves_of_the_same_training_cost_need_a_served_context():
    with pytest.raises(ValueError, match="no column m_infer: give equal_training_curves a context_served"):
        plots.aligned_cost(aligned().drop(columns="m_infer"))
    with pytest.raises(ValueError, match="cost 'z' is unknown here: use memory, flops, cost"):
        plots.aligned_cost(aligned(), cost="z")
