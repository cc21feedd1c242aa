"""How sure an answer is: shares of draws, intervals, profiles, residuals."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from gqa_jax import plots
from gqa_jax.search import optimum, presets
from tests import plot_helpers


@pytest.fixture(scope="module")
def laws():
    return presets.load("paper")


@pytest.fixture(scope="module")
def answer(laws):
    return optimum.search(laws, 2.55, 65_536)


CANDIDATES = pd.DataFrame(
    {
        "n_heads": [8, 4, 8, 2, 1],
        "n_kv_heads": [1, 1, 2, 1, 1],
        "probability": [0.62, 0.3, 0.07, 0.006, 0.004],
        "expected_regret": [0.001, 0.02, 0.0005, 0.3, 0.5],
        "cost": [10.0, 11.0, 10.5, 15.0, np.nan],
        "cost_low": [9.0, 10.0, 9.5, 13.0, np.nan],
        "cost_high": [12.0, np.inf, 11.5, 17.0, np.nan],
    }
)


def bars(ax):
    return [bar for bar in ax.patches if bar.get_label() != "_answer"]


def answer_of(ax):
    """The name of the row with the yellow behind it, which is bold."""
    (yellow,) = (patch for patch in ax.patches if patch.get_label() == "_answer")
    bold = [tick.get_text() for tick in ax.get_yticklabels() if tick.get_fontweight() == "bold"]
    row = yellow.get_bbox().y0 + 0.5
    assert bold == [ax.get_yticklabels()[round(row)].get_text()]
    return bold[0]


def test_shares_of_draws():
    ax = plots.share_of_draws(CANDIDATES)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["(8,1)", "(4,1)", "(8,2)", "2 others"]
    assert [bar.get_width() for bar in bars(ax)] == pytest.approx([62, 30, 7, 1])
    assert answer_of(ax) == "(8,2)"
    assert plot_helpers.texts(ax)[:4] == ["62%   regret 0.10%", "30%   regret 2.00%", "7%   regret 0.05%", "1%"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # most probable on top


def test_the_answer_is_shown_however_improbable():
    improbable = CANDIDATES.assign(expected_regret=[0.2, 0.2, 0.2, 0.2, 0.1])
    ax = plots.share_of_draws(improbable)
    assert [tick.get_text() for tick in ax.get_yticklabels()][-2:] == ["(1,1)", "1 other"]
    assert answer_of(ax) == "(1,1)"


def test_shares_of_an_answer(answer):
    ax = plots.share_of_draws(answer.candidates)
    widths = dict(zip([tick.get_text() for tick in ax.get_yticklabels()], [bar.get_width() for bar in bars(ax)], strict=True))
    assert answer_of(ax) == plots.head_text(answer.heads)
    assert widths[plots.head_text(answer.heads)] == pytest.approx(100 * answer.probability)
    assert sum(widths.values()) == pytest.approx(100)


def test_draws_do_not_make_sure():
    """1,000 draws of which all say the same are no certainty."""
    ax = plots.share_of_draws(CANDIDATES.assign(probability=[1.0, 0, 0, 0, 0], expected_regret=[0.0, 0.1, 0.2, 0.3, 0.5]))
    assert plot_helpers.texts(ax)[:2] == [">99%   regret 0.00%", "<1%"]


def test_without_probabilities_there_is_nothing_to_draw():
    with pytest.raises(ValueError, match="probability is empty"):
        plots.share_of_draws(CANDIDATES.assign(probability=np.nan))


def test_intervals_of_costs():
    ax = plots.cost_intervals(CANDIDATES, label="Z")
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["(8,1)", "(8,2)", "(4,1)", "(2,1)"]
    assert {label: line.get_xdata()[0] for label, line in plot_helpers.points(ax).items()} == {
        "(8,1)": 10, "(8,2)": 10.5, "(4,1)": 11, "(2,1)": 15
    }  # fmt: skip
    assert answer_of(ax) == "(8,2)"  # not the cheapest by the fitted laws
    assert ax.get_xlabel() == "\u2190 cheaper      Z"
    said = plot_helpers.texts(ax)[-1].split("\n")
    assert said == ["yellow: the answer: the least expected regret", "bars: 95%; what is not known of E moves all alike"]
    known = plots.cost_intervals(CANDIDATES, laws=SimpleNamespace(method="bootstrap"))
    assert "bars: 95% with independent noise; what is not known" in plot_helpers.texts(known)[-1]
    without = plots.cost_intervals(CANDIDATES.assign(cost_low=np.nan, cost_high=np.nan, expected_regret=np.nan))
    assert not plot_helpers.texts(without)
    assert ax.get_xlim()[1] < 20  # an infinite end leaves the axes, it does not stretch them
    with pytest.raises(ValueError, match="cost holds no finite number"):
        plots.cost_intervals(CANDIDATES.assign(cost=np.nan))


def test_the_profile_of_the_papers_points_leaves_its_interval(laws):
    block = laws.blocks[0]
    ax = plots.profile(*block.entropy_profile(), dof=block.dof)
    low, high = block.entropy_interval()
    shaded = ax.patches[0].get_bbox()
    assert (shaded.x0, shaded.x1) == pytest.approx((low, high), abs=0.003)
    assert f"independent noise; least at {laws[(8, 1)].entropy:.2f}; 95%: {low:.2f} to {high:.2f}" in plot_helpers.texts(ax)


def test_a_profile_that_does_not_rise_says_so():
    entropy = np.linspace(1.5, 2.0, 50)
    note = plot_helpers.texts(plots.profile(entropy, np.maximum(entropy - 1.7, 0) ** 2 * 1000))
    assert any(text.endswith("95%: 1.76 or less") for text in note)
    note = plot_helpers.texts(plots.profile(entropy, np.full(50, 0.1)))
    assert any(text.endswith("95%: any E below the losses") for text in note)
    note = plot_helpers.texts(plots.profile(entropy, np.maximum(1.7 - entropy, 0) ** 2 * 1000))
    assert any(text.endswith("95%: 1.64 or more") for text in note)
    with pytest.raises(ValueError, match=r"two arrays of one length; got \(50,\) and \(3,\)"):
        plots.profile(entropy, np.ones(3))


def test_residuals_are_measured_minus_fitted(laws):
    ax = plots.residuals(laws)
    points = plot_helpers.points(ax)
    for law, line in zip(laws.values(), points.values(), strict=True):
        np.testing.assert_allclose(line.get_ydata(), 1e3 * (law.loss - law.predict(law.params)))
    assert ax.patches[0].get_bbox().height == pytest.approx(4e3 * laws.sigma)
    assert not plots.residuals(dict(laws)).patches  # the spread is not known
