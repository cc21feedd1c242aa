"""Loss against the training context (Figures 5, 6 and 15)."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection

from gqa_jax import plots
from gqa_jax.laws import Heads
from gqa_jax.plots import style
from gqa_jax.search.invariance import context_invariance, pairs
from tests import plot_helpers

CONTEXTS = [2048, 4096, 8192, 16_384, 32_768, 65_536]
GAIN = {(8, 8): 0.0, (8, 1): 0.02, (1, 1): 0.06}  # loss above that of (8,8), from 8K on


def runs(drift=0.0, **also):
    """Heads lose more at short contexts; `drift` of the loss per doubling from 8K on, with a little noise."""
    draw = np.random.default_rng(0)
    rows = []
    for t in CONTEXTS:
        for (n, k), gain in GAIN.items():
            far = np.log2(t / 8192)
            relative = 1 + gain * (1 + (0.3 * far if far < 0 else 0)) + (gain > 0) * drift * max(far, 0)
            loss = (2.5 + 100 / t) * relative * (1 + 2e-4 * draw.normal())
            rows.append(
                {"cell": f"{n}-{k}-{t}", "n_heads": n, "n_kv_heads": k, "context": t, "loss": loss, "loss_sem": 0.001} | also
            )
    return plot_helpers.table(rows)


@pytest.fixture
def table():
    return runs(size="470M", params_non_embedding=4e8)


def verdicts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_differences_to_a_baseline(table):
    ax = plots.loss_vs_context(table, Heads(8, 8))
    points = plot_helpers.points(ax)
    assert set(points) == {"(8,1)", "(1,1)"}
    losses = {row.context: row.loss for row in table.itertuples() if (row.n_heads, row.n_kv_heads) == (8, 8)}
    own = {row.context: row.loss for row in table.itertuples() if (row.n_heads, row.n_kv_heads) == (8, 1)}
    np.testing.assert_allclose(points["(8,1)"].get_ydata(), [100 * (own[t] / losses[t] - 1) for t in CONTEXTS])
    assert verdicts(ax) == ["(1,1) flat", "(8,1) flat"]
    assert ax.get_ylabel() == "loss relative to (8,8) (%)"
    assert any("bands: 95% by the runs' scatter" in text for text in plot_helpers.texts(ax))
    assert plot_helpers.texts_of_ticks(ax.xaxis) == ["2K", "4K", "8K", "16K", "32K", "64K"]


def test_the_line_is_the_tests_own(table):
    found = context_invariance(table, Heads(8, 8))
    ax = plots.loss_vs_context(found)
    test = found.tests.set_index("model").loc["(8,1)"]
    line = next(
        line for line in ax.lines if line.get_label() == "_line" and line.get_color() == plots.head_look(Heads(8, 1)).color
    )
    assert list(line.get_xdata()) == CONTEXTS[2:]
    assert np.mean(line.get_ydata()) == pytest.approx(100 * test["mean"])
    assert np.diff(line.get_ydata()) == pytest.approx(100 * test["slope"])


def test_a_difference_that_grows_is_called_so():
    ax = plots.loss_vs_context(runs(0.01, size="470M", params_non_embedding=4e8), Heads(8, 8))
    assert "(8,1) not flat" in verdicts(ax)


def test_sizes(table):
    rows = table.assign(size=[f"{n}-{k}" for n, k in zip(table["n_heads"], table["n_kv_heads"], strict=True)])
    rows = rows.assign(n_heads=8, n_kv_heads=1, params_non_embedding=10**6 * table["n_heads"] * table["n_kv_heads"])
    ax = plots.loss_vs_context(rows, "8-8")
    assert set(plot_helpers.points(ax)) == {"8-1", "1-1"}
    assert ax.get_ylabel() == "loss relative to 8-8 (%)"


def test_a_table_needs_a_baseline(table):
    with pytest.raises(ValueError, match="a loss table needs a baseline"):
        plots.loss_vs_context(table)
    with pytest.raises(ValueError, match=r"\(4,4\)"):
        plots.loss_vs_context(table, Heads(4, 4))


def continued(**also):
    short = {"cell": "short", "size": "470M", "n_heads": 8, "n_kv_heads": 1, "context": 4096, "loss": 2.7, "tokens": 9e9}
    long = [
        short | {"cell": f"scratch{seed}", "context": 131_072, "seed": seed, "loss": 2.5 + 0.01 * seed, "loss_sem": 0.004}
        for seed in (0, 1)
    ]
    more = [
        short | {"cell": f"c{d}", "context": 131_072, "continue_from": "short", "tokens": d, "loss": 2.5 + 0.1 * 1e8 / d} | also
        for d in (10**9, 10**8)
    ]
    return [short, *long, *more]


def test_continued_runs_approach_the_ones_from_scratch():
    ax = plots.continued_training(plot_helpers.table(continued()))
    points = plot_helpers.points(ax)["470M"]
    assert list(points.get_xdata()) == [1e8, 1e9]
    np.testing.assert_allclose(points.get_ydata(), [2.6, 2.51])
    across = next(line for line in ax.lines if line.get_label() == "_scratch")
    assert across.get_ydata()[0] == pytest.approx(2.505)  # the mean of two seeds
    half = 1.96 * 0.004 / np.sqrt(2)
    assert ax.patches[0].get_bbox().height == pytest.approx(2 * half, rel=1e-3)
    assert ax.get_xlabel() == "tokens of the continuation at 128K"


def test_continued_runs_of_several_heads():
    other = [row | {"cell": f"{row['cell']}-32", "n_heads": 32, "n_kv_heads": 8} for row in continued()]
    ax = plots.continued_training(plot_helpers.table(continued() + other))
    assert set(plot_helpers.points(ax)) == {"(8,1)", "(32,8)"}
    assert ax.lines[0].get_color() == style.head_look(Heads(8, 1)).color


def bars(ax):
    """Error bars: collections of vertical lines."""
    return [each for each in ax.collections if isinstance(each, LineCollection) and np.isfinite(each.get_segments()).any()]


def test_runs_of_one_text_have_no_bars_of_their_own():
    rows = runs(size="470M", params_non_embedding=4e8)
    continued = rows.assign(continue_from="x", tokens=2e9, context=65_536).iloc[:4]
    continued["cell"] = ["a", "b", "c", "d"]
    own = plots.continued_training(continued)
    assert bars(own)
    shared = plots.continued_training(continued.assign(heldout="a/spread/1024"))
    assert not bars(shared)
    assert any("held-out text: ± 0.002 for all alike" in text for text in plot_helpers.texts(shared))
    with pytest.raises(ValueError, match="runs under 2 rules"):
        plots.continued_training(continued.assign(rules=["hash/spread/one", "position/first/zero"] * 2))


def test_differences_of_one_text_are_drawn_with_paired_errors(table):
    table = table.assign(heldout="a/spread/1024", loss_sem=0.03)
    known = pd.DataFrame(pairs(table, Heads(8, 8)), columns=["cell", "other"]).assign(standard_error=0.002)
    ax = plots.loss_vs_context(table, Heads(8, 8), differences=known)
    lengths = [np.ptp(segment[:, 1]) for each in bars(ax) for segment in each.get_segments()]
    losses = table.set_index("cell").loc[known["other"], "loss"].astype(float)
    np.testing.assert_allclose(sorted(lengths), sorted(2 * 1.96 * 100 * 0.002 / losses))


def test_what_can_not_be_drawn():
    with pytest.raises(ValueError, match="no finished run continues another"):
        plots.continued_training(plot_helpers.table(continued()[:3]))
    rows = [*continued(), continued()[-1] | {"cell": "z", "context": 65_536}]
    with pytest.raises(ValueError, match="one context at a time: the table has 65536, 131072"):
        plots.continued_training(plot_helpers.table(rows))
    rows = [*continued(), continued()[-1] | {"cell": "z", "n_heads": 4, "size": "1.2B"}]
    with pytest.raises(ValueError, match="one size at a time"):
        plots.continued_training(plot_helpers.table(rows))
