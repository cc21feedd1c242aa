"""What depth against width costs: priors, runs at other ratios, and that laws are of one ratio."""

import numpy as np
import pandas as pd
import pytest

from gqa_jax import laws
from gqa_jax.laws import Heads
from gqa_jax.laws.shape import OtherRatio, Penalty, Price, split, usual
from gqa_jax.search import optimum, presets
from gqa_jax.search.shape_rule import ShapeRule
from tests.law_tables import synthetic

SIZES = [(6, 512), (12, 768), (16, 1024), (24, 1536)]


def with_other_ratios(k, c, *, noise=0.0, seed=0):
    """A synthetic table at its own ratios, and wider and deeper models of about the same sizes whose loss follows k and c."""
    table = synthetic(noise=noise, seed=seed, heads=[(8, 8), (8, 1)], sizes=SIZES)
    law = laws.fit_by_heads(synthetic(noise=0.0, seed=seed, heads=[(8, 8), (8, 1)], sizes=SIZES))
    usual = law.penalty.ratio
    rows = []
    for row in table.to_dict("records"):
        if row["d_model"] not in (768, 1024):
            continue
        for ratio in (usual / 2, usual * 2):
            dearer = Penalty(usual).factor(Price(k, c), ratio)
            d = 64 * round((row["d_model"] ** 3 * ratio / (row["d_model"] / row["n_layers"]) / 64**3) ** (1 / 3))
            loss = float(law[Heads(row["n_heads"], row["n_kv_heads"])].predict(row["params_non_embedding"])) * dearer
            generator = np.random.default_rng([seed, len(rows)])
            rows.append(row | {"d_model": d, "n_layers": d / ratio, "loss": loss + noise * generator.normal()})
    return pd.concat([table, pd.DataFrame(rows)], ignore_index=True)


def test_the_usual_ratio_is_one_that_a_run_has():
    assert [usual(np.array(ratios)) for ratios in ([3.0], [2.0, 1.0], [3.0, 1.0, 2.0], [4.0, 1.0, 2.0, 3.0])] == [3, 1, 2, 2]


def test_ratios_are_answered_up_to_half_and_twice_the_usual_one():
    penalty = Penalty(64.0)
    assert penalty.bounds == (32, 128)
    for ratio in penalty.bounds:
        assert ShapeRule.of(str(ratio), penalty, None).ratios_R.tolist() == [ratio]
    for ratio in (31.9, 128.1):
        with pytest.raises(ValueError, match="known from no run and no prior"):
            ShapeRule.of(ratio, penalty, None)


def test_the_prior_is_what_its_sources_say():
    penalty = Penalty()
    assert penalty.typical == pytest.approx((0.005, 50), rel=1e-3)
    assert penalty.quantiles([0.025, 0.975]).k == pytest.approx([0.0019, 0.0133], rel=0.02)
    assert penalty.quantiles([0.025, 0.975]).best == pytest.approx([27.8, 90], rel=0.02)
    kaplan = penalty.factor(Price(0.0056, 64), [4288 / 6, 1600 / 48])  # within 3%
    assert kaplan[0] / kaplan[1] == pytest.approx(1.03, abs=0.001)
    assert penalty.bounds == (32, 128)
    assert "no run of these laws" in penalty.source


def test_the_runs_own_ratio_costs_nothing_and_the_best_one_is_the_best():
    penalty, price = Penalty(64), Price(np.array([0.002, 0.01]), np.array([40.0, 90.0]))
    np.testing.assert_array_equal(penalty.factor(price, 64), 1)
    grid = np.geomspace(20, 200, 400)
    found = penalty.factor(Price(0.01, 90), grid)
    assert grid[found.argmin()] == pytest.approx(90, rel=0.01)
    assert found.min() < 1


def test_draws_follow_the_quantiles_and_the_seed():
    penalty = Penalty(64, (OtherRatio(128, 0.004, 0.001), OtherRatio(32, 0.001, 0.001)))
    draw = penalty.draw(4000, 3)
    for shares in (0.1, 0.5, 0.9):
        known = penalty.quantiles(shares)
        assert np.quantile(draw.k, shares) == pytest.approx(known.k, rel=0.03)
        assert np.quantile(draw.best, shares) == pytest.approx(known.best, rel=0.03)
    np.testing.assert_array_equal(draw.k, penalty.draw(4000, 3).k)
    assert (draw.k != penalty.draw(4000, 4).k).any()


@pytest.mark.parametrize(("k", "c"), [(0.003, 50), (0.012, 70)])
def test_runs_at_other_ratios_tell_k_and_c(k, c):
    found = laws.fit_by_heads(with_other_ratios(k, c, noise=0.0005)).penalty
    ends = found.quantiles([0.025, 0.975])
    assert ends.k[0] < k < ends.k[1]
    assert ends.best[0] < c < ends.best[1]
    prior = Penalty().quantiles([0.025, 0.975])
    assert ends.k[1] / ends.k[0] < 0.6 * prior.k[1] / prior.k[0]
    assert found.source.startswith("8 runs at other d/L and a prior")


def test_they_are_in_no_law():
    both, alone = with_other_ratios(0.02, 64), synthetic(noise=0.0, seed=0, heads=[(8, 8), (8, 1)], sizes=SIZES)
    with_them, without = laws.fit_by_heads(both), laws.fit_by_heads(alone)
    assert with_them[Heads(8, 1)].solve(2.9) == pytest.approx(without[Heads(8, 1)].solve(2.9), rel=1e-9)
    have = "8 runs have another d/L than those of their size that the law is of: they are in no law"
    assert f"{have}; 8 of them tell what the shape costs" in with_them.warnings
    kept, others = split(both)
    assert (len(kept), len(others)) == (8, 8)


def test_tables_of_one_ratio_for_each_size_stay_whole():
    """Sizes of several ratios, as the paper's Table 9, and seeds of one size: nothing tells what a ratio costs."""
    table = synthetic(noise=0.001, heads=[(8, 8), (8, 1)])
    assert len(split(table)[1]) == 0
    assert len(split(presets.paper_losses())[1]) == 0
    assert len(split(table.drop(columns="n_layers"))[1]) == 0
    assert presets.load("paper").penalty == Penalty(64)
    assert presets.load("paper-table4").penalty == Penalty(64)


def test_laws_of_sizes_of_several_ratios_hold_in_the_ratio_of_each_size():
    """A model is one model: shaped as the trained sizes are at its N, it has the law's loss, however it is asked for."""
    table = synthetic(noise=0.001, heads=[(8, 8), (8, 1)])
    fitted = laws.fit_by_heads(table)
    assert len(set(fitted.aspect.ratio)) > 1
    assert fitted.penalty.by_size == fitted.aspect
    for draws in (0, 200):
        for loss in (2.7, 2.9, 3.1):
            trained = optimum.search(fitted, loss, 8192, aspect="trained", heads=[(8, 1)], draws=draws)
            same = optimum.search(fitted, loss, 8192, aspect=trained.ratio, heads=[(8, 1)], draws=draws)
            assert same.n_params == pytest.approx(trained.n_params, rel=1e-3)
        built = optimum.search(fitted, 2.9, 8192, aspect="trained", heads=[(8, 1)], draws=draws).buildable
        again = optimum.search(fitted, 2.9, 8192, heads=[(8, 1)], draws=draws).buildable
        both = built.merge(again, on=["n_layers", "d_model"])
        assert len(built) > 0
        assert both["loss_x"].tolist() == pytest.approx(both["loss_y"].tolist(), abs=1e-4)


def ladder(ratios, *, tokens=None):
    """One H, four widths at each of some ratios, all on one law but for what the shape costs (k = .01, c = 50)."""
    rows = []
    for d in (2048, 3072, 4096, 6144):
        for ratio in ratios:
            layers = round(d * (ratio / ratios[0]) ** (1 / 3) / ratio)  # of about as many parameters
            n = 8.0 * (ratio * layers) ** 2 * layers
            loss = (1.95 + 0.75 * (n / 1e9) ** -0.17) * (1 + 0.01 * np.log(ratio / 50) ** 2)
            rows.append(
                {"n_heads": 8, "n_kv_heads": 1, "head_dim": 64, "context": 8192, "status": "done", "tokens": 1e9,
                 "n_layers": layers, "d_model": ratio * layers, "params_non_embedding": n, "loss": loss}
            )  # fmt: skip
    table = pd.DataFrame(rows)
    generator = np.random.default_rng(0)
    table["loss"] += 5e-4 * generator.normal(size=len(table))
    if tokens is not None:
        table.loc[table["d_model"] / table["n_layers"] > 1.5 * ratios[0], "tokens"] *= tokens
    return table


@pytest.mark.parametrize("ratios", [(32, 128), (64, 128), (32, 64, 128)])
def test_balanced_ratios_tell_it_too(ratios):
    """As many runs of each: the law is of one ratio that runs have, alike at every size."""
    kept, others = split(ladder(ratios))
    assert len(set((kept["d_model"] / kept["n_layers"]).round(6))) == 1
    assert len(others) == 4 * (len(ratios) - 1)
    found = laws.fit_by_heads(ladder(ratios)).penalty
    assert found.ratio in ratios
    assert len(found.others) == len(others)


def test_tokens_are_compared_with_those_of_the_same_heads():
    """Other heads of about the size, that saw others, say nothing of it."""
    table = ladder((64, 128))
    wide = (table["d_model"] / table["n_layers"] > 100).to_numpy()
    sizes = table.loc[wide, "params_non_embedding"].to_numpy()
    nearer = table[~wide].assign(n_heads=16, tokens=1e10, params_non_embedding=sizes)
    found = laws.fit_by_heads(pd.concat([table, nearer]), allow_confounded=True)
    assert len(found.penalty.others) == 4


def test_runs_that_saw_more_tokens_tell_nothing_of_their_shape():
    found = laws.fit_by_heads(ladder((64, 128), tokens=10))
    assert found.penalty == Penalty(64)
    have = "4 runs have another d/L than those of their size that the law is of: they are in no law"
    assert f"{have}; none of them tells what the shape costs" in found.warnings
