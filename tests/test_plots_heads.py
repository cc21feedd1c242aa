"""Loss against query heads (Figures 3, 12, 13 and 14)."""

import numpy as np
import pytest

from gqa_jax import plots
from gqa_jax.laws.query_heads import fit_query_heads
from tests import plot_helpers

# The paper's printed fits: a, b, c at T = 1K, and 470M with one c at three contexts (Figures 3 and 13).
SIZES = {"470M": (0.579, -0.124, 2.473), "680M": (0.398, -0.177, 2.583), "1.2B": (0.301, -0.227, 2.622)}
CONTEXTS = {1024: (1.513, -0.039, 1.53), 2048: (1.436, -0.041, 1.53), 8192: (1.356, -0.044, 1.53)}


def runs(a, b, c, noise=0.0, seed=0, **also):
    draw = np.random.default_rng(seed)
    return [
        {"cell": f"{also}{n}", "n_heads": n, "n_kv_heads": 1, "loss": a * n**b + c + noise * draw.normal(), "loss_sem": 0.002}
        | also
        for n in (1, 2, 4, 8, 16, 32)
    ]


def by_size(noise=0.0):
    rows = [
        row
        for i, (size, law) in enumerate(SIZES.items())
        for row in runs(*law, noise, i, size=size, context=1024, params_non_embedding=10 ** (8 + i))
    ]
    return plot_helpers.table(rows)


def test_a_curve_per_size_through_the_papers_points():
    ax = plots.loss_vs_query_heads(fit_query_heads(by_size(), constant="per_curve"))
    assert list(plot_helpers.points(ax)) == ["470M", "680M", "1.2B"]
    said = "trained at $T$ = 1K, $n_{kv}$ = 1\nbars and bands: 95% with independent noise"
    assert said in plot_helpers.texts(ax)
    assert ax.get_legend().get_title().get_text() == "size"
    for curve, (a, b, c) in zip(plot_helpers.curves(ax), SIZES.values(), strict=True):
        np.testing.assert_allclose(curve.get_ydata(), a * curve.get_xdata() ** b + c, rtol=1e-5)
    assert plot_helpers.texts_of_ticks(ax.xaxis) == ["1", "2", "4", "8", "16", "32"]


def test_a_curve_per_context():
    rows = [row for t, law in CONTEXTS.items() for row in runs(*law, size="470M", context=t, params_non_embedding=10**8)]
    ax = plots.loss_vs_query_heads(plot_helpers.table(rows))
    assert list(plot_helpers.points(ax)) == ["1K", "2K", "8K"]
    assert ax.get_legend().get_title().get_text() == "trained at (tokens)"
    assert any(text.startswith("470M, ") for text in plot_helpers.texts(ax))


def test_sizes_and_contexts():
    rows = [
        row
        for size, context in (("470M", 1024), ("470M", 2048), ("680M", 1024))
        for row in runs(*CONTEXTS[context], size=size, context=context, params_non_embedding=int(size[:3]) * 10**6)
    ]
    assert set(plot_helpers.points(plots.loss_vs_query_heads(plot_helpers.table(rows)))) == {"470M, 1K", "470M, 2K", "680M, 1K"}


def test_bars_and_bands():
    found = fit_query_heads(by_size(noise=0.002))
    ax = plots.loss_vs_query_heads(found)
    bars, band = ax.collections[1], ax.collections[0]  # of the first curve: its band, then its bars
    assert bars.get_segments()[0][:, 1] == pytest.approx(found["470M", 1024].loss[0] + 1.96 * 0.002 * np.array([-1, 1]))
    low, high = found.band(("470M", 1024), np.array([4.0]))
    at = band.get_paths()[0].vertices
    at = at[np.isclose(at[:, 0], 4.0, rtol=0.05), 1]
    assert at.min() == pytest.approx(low[0], abs=2e-3)
    assert at.max() == pytest.approx(high[0], abs=2e-3)
    assert at.max() - at.min() == pytest.approx(high[0] - low[0], rel=0.5, abs=5e-3)


def test_several_numbers_of_key_value_heads_are_refused():
    table = by_size()
    table.loc[table.index[-1], "n_kv_heads"] = 2
    with pytest.raises(ValueError, match="one n_kv at a time"):
        plots.loss_vs_query_heads(table)
