"""The suite of doubts: false alarms, what it finds, what it names, and what answers say of it."""

import numpy as np
import pandas as pd
import pytest

from gqa_jax import laws
from gqa_jax.laws import Heads, doubt
from gqa_jax.search import optimum, presets
from tests import law_tables

HEADS = list(law_tables.TRACED)
SIZES = [(12, 768), (16, 1024), (20, 1280), (24, 1536), (28, 1792), (32, 2048)]
NOISE = 0.001  # relative


def grid(seed, change=lambda table: table, noise=NOISE):
    table = law_tables.table(*law_tables.truth(HEADS), SIZES, noise, np.random.default_rng(seed))
    return change(table)


def by_size(share, seed):
    """Deviations of which a share of the variance is common to the heads of a size."""

    def change(table):
        generator = np.random.default_rng(seed + 100)
        effects = dict(zip(SIZES, generator.normal(size=len(SIZES)), strict=True))
        common = np.array([effects[size] for size in zip(table["n_layers"], table["d_model"], strict=True)])
        own = generator.normal(size=len(table))
        return table.assign(loss=table["loss"] + 0.003 * (np.sqrt(share) * common + np.sqrt(1 - share) * own))

    return change


def drifting(table):
    """The exponent changes by 0.15 over the sizes."""
    x = np.log(table["params_non_embedding"] / 2.5e8)
    above = table["loss"] - law_tables.ENTROPY
    return table.assign(loss=law_tables.ENTROPY + above * np.exp(-0.15 * x**2 / (2 * np.ptp(x))))


def outlier(table):
    table = table.copy()
    table.loc[(table["n_heads"] == 4) & (table["d_model"] == 1280), "loss"] += 0.05
    return table


def test_false_alarms_are_a_twentieth():
    p = [laws.fit_by_heads(grid(seed)).doubts.p_value for seed in range(30)]
    assert np.mean(np.array(p) <= doubt.LEVEL) <= 0.15  # 1 or 2 expected, 4 allowed
    assert np.median(p) == pytest.approx(0.5, abs=0.25)


def test_what_sizes_share_is_found_and_named():
    found = [laws.fit_by_heads(grid(seed, by_size(0.9, seed), noise=0)).doubts for seed in range(10)]
    assert sum(one.fires for one in found) >= 9
    assert sum(doubt.SIZES in one.named for one in found) >= 8
    said = laws.fit_by_heads(grid(0, by_size(0.9, 0), noise=0)).doubted
    assert any("runs of a size deviate together, most those of about" in sentence for sentence in said)


def test_a_bend_is_found_and_measured():
    found = laws.fit_by_heads(grid(1, drifting)).doubts
    drift = found.amounts.iloc[0]
    assert found.fires
    assert found.named[0] in set(found.amounts["direction"])  # a drift, or a break amid the sizes, which looks like one
    assert drift["z"] > 4  # what E does not take up
    assert any("the law bends: " in text for text in laws.fit_by_heads(grid(1, drifting)).doubted)


def test_a_run_that_lies_off_is_named_with_the_answer_without_it():
    one = laws.fit_by_heads(grid(2, outlier))
    (named,) = one.doubts.outliers
    assert named.z > 10
    assert named.shift == pytest.approx(0.05, abs=0.01)
    assert "run (4,1) at N = 279M" in one.doubted[0]
    assert "z = +" in one.doubted[0]
    others = one.without_outliers
    assert others.dof == one.dof - 1
    assert others.sigma < 0.4 * one.sigma
    answer = optimum.search(one, 2.6, 131_072, draws=200)
    assert one.doubted[0] in answer.warnings
    without = next(text for text in answer.warnings if text.startswith("without that run the answer is "))
    clean = optimum.search(others, 2.6, 131_072, draws=200)
    assert str(clean.heads) in without
    assert laws.fit_by_heads(grid(2)).without_outliers is None


def test_two_runs_that_lie_off_do_not_hide_each_other():
    def change(table):
        table = outlier(table)
        table.loc[(table["n_heads"] == 1) & (table["d_model"] == 1792), "loss"] -= 0.06
        return table

    assert len(laws.fit_by_heads(grid(3, change)).doubts.outliers) == 2


def test_what_could_not_have_been_seen_is_said_and_shrinks_with_noise():
    loud, quiet = (laws.fit_by_heads(grid(4, noise=noise)) for noise in (0.004, 0.0005))
    assert not quiet.doubts.fires
    assert "no doubt was found, but a drift of the exponent by less than 0." in quiet.doubted[-1]
    assert quiet.doubts.amounts["seen"].iloc[0] < 0.2 * loud.doubts.amounts["seen"].iloc[0]
    assert quiet.doubts.size_effect < 0.2 * loud.doubts.size_effect


def test_laws_without_noise_to_judge_by_say_nothing():
    exact = laws.fit_by_heads(law_tables.synthetic(noise=0.003, heads=[(8, 1)], sizes=SIZES[:3]))
    assert exact.doubted == []
    assert presets.load("paper-table4").doubted == []


def test_an_e_of_their_own_is_no_obstacle():
    one = laws.fit_by_heads(grid(2, outlier), shared_entropy=False)
    assert len(one.doubts.outliers) == 1
    assert "(4,1)" in one.doubted[0]


def test_repeated_runs_are_compared_with_each_other():
    def change(table):
        wavy = 0.006 * np.cos(5 * np.log(table["params_non_embedding"]) + 2.0 * table["n_kv_heads"])
        twice = [table.assign(loss=table["loss"] + wavy + 0.0005 * np.random.default_rng(s).normal(size=len(table)), seed=s)
                 for s in (0, 1)]  # fmt: skip
        return pd.concat(twice, ignore_index=True)

    assert laws.fit_by_heads(grid(5, change, noise=0)).doubts.found("repeats")


def test_the_noise_model_and_the_price_of_doubt_stand_beside_the_intervals():
    one = laws.fit_by_heads(grid(6))
    wide, narrow = (optimum.search(one, 2.45, 131_072, draws=400, method=method) for method in ("posterior", "independent"))
    assert "noise that runs of a size share, and laws that may bend" in wide.noise_model
    assert wide.price_of_doubt > 1.2
    assert "independent noise and exact power laws" in narrow.noise_model
    assert np.isnan(narrow.price_of_doubt)
    assert wide.to_dict()["noise_model"] == wide.noise_model
    plain = {Heads(8, 1): one[8, 1]}
    assert optimum.search(plain, 2.6, 131_072).noise_model == ""
