"""What one more size would do to the intervals: against closed forms, and against fits with it (`benchmarks.next_runs`)."""

import numpy as np
import pandas as pd
import pytest

from benchmarks import next_runs as benchmark
from gqa_jax.laws import Draws, Heads, fit_by_heads, planning
from tests import law_tables

HEADS = [Heads(1, 1), Heads(2, 1), Heads(4, 1)]
B, SIGMA, TAU = 0.2, 0.003, 0.05
N = 1.0
S = B * TAU  # standard deviation of the loss at N that comes from ln a, which is Normal(0, TAU^2)


class OneNumber(dict):
    """Laws (a / N)^B of HEADS that leave ln a open, the same for all: intervals after runs are known in closed form."""

    def __init__(self, kappa=0.0, effect=None, reaches=True):
        super().__init__(dict.fromkeys(HEADS))
        self.kappa, self.effect, self.reaches = kappa, effect, reaches

    def draws(self, count, seed):
        z = np.random.default_rng(seed).normal(size=(count, 1))
        shape = (count, len(HEADS))
        full = np.broadcast_to
        return Draws(
            HEADS, np.zeros(shape) if self.reaches else np.ones(shape), full(TAU * z, shape), np.full(shape, B),
            np.full(shape, SIGMA), "posterior", kappa_S=np.full(count, self.kappa),
            effects_SxJ=None if self.effect is None else self.effect * z, sizes_J=np.array([5]),
        )  # fmt: skip


def after(noise_variance):
    return np.sqrt(noise_variance / (noise_variance + S**2))


@pytest.mark.parametrize(
    ("laws", "n_runs", "label", "noise_variance"),
    [
        (OneNumber(), 1, None, SIGMA**2),
        (OneNumber(), 3, None, SIGMA**2 / 3),
        (OneNumber(kappa=4.0), 1, None, 5 * SIGMA**2),
        (OneNumber(kappa=4.0), 3, None, (4 + 1 / 3) * SIGMA**2),
        (OneNumber(kappa=4.0, effect=0.0), 3, 5, SIGMA**2 / 3),  # of a trained size, whose deviation is known
        (OneNumber(kappa=4.0, effect=0.0), 3, 6, (4 + 1 / 3) * SIGMA**2),  # no run is of that one
    ],
)
def test_the_interval_after_runs_is_that_of_the_closed_form(laws, n_runs, label, noise_variance):
    found = planning.Intervals(laws, 0.01, draws=8192).ratio([(h, N) for h in HEADS[:n_runs]], label)
    assert found == pytest.approx(after(noise_variance), rel=0.04)


def test_a_repeat_tells_nothing_of_what_the_law_and_its_size_have_only_together():
    """Where law and deviation of a size add up to what was measured there, whatever each of them is."""
    laws = OneNumber(kappa=4.0, effect=-S)
    assert planning.Intervals(laws, 0.01).ratio([(HEADS[0], N)], 5) > 0.97
    assert planning.Intervals(laws, 0.01).ratio([(HEADS[0], N)]) < 0.75


def test_of_a_loss_that_draws_do_not_reach_nothing_is_said():
    intervals = planning.Intervals(OneNumber(reaches=False), 0.01)
    assert np.isinf(intervals.now_H).all()
    assert np.isnan(intervals.ratio([(HEADS[0], N)]))
    assert planning.sentence(pd.DataFrame([(N, 1, 1.0, np.nan)], columns=list(planning.COLUMNS)), 0.01) is None


def test_where_runs_of_a_size_deviate_together_another_size_narrows_more_than_a_repeat():
    sizes, heads = law_tables.SIZES[1:7], [Heads(*h) for h in law_tables.TRACED]
    shape = law_tables.SIZES[7]
    gained = {"posterior": [], "independent": []}
    for seed in range(4):
        generator = np.random.default_rng(seed)
        table = law_tables.synthetic(seed=seed, sizes=sizes)
        table["loss"] += table["d_model"].map({d: x for (_, d), x in zip(sizes, generator.normal(0, 0.005, 6), strict=True)})
        laws = fit_by_heads(table.assign(loss=table["loss"] + generator.normal(0, 0.002, len(table))))
        for laws.method in gained:
            intervals = planning.Intervals(laws, 2.5)
            repeat, another = (
                intervals.ratio([(h, law_tables.params(h, [one])[0]) for h in heads], label)
                for one, label in ((sizes[-1], 5), (shape, None))
            )
            gained[laws.method].append([1 - repeat, 1 - another])
    repeat, another = np.mean(gained["posterior"], 0)
    repeat_if_independent, another_if_independent = np.mean(gained["independent"], 0)
    assert repeat_if_independent > 0.1
    assert another / repeat > 3 * another_if_independent / repeat_if_independent


def test_further_sizes_with_their_costs():
    table = law_tables.synthetic(noise=0.002, seed=1)
    laws = fit_by_heads(table)
    there = table["params_non_embedding"].to_numpy()
    frame = planning.one_more_size(laws, 2.5, trained=(there, 20 * there))
    assert list(frame.columns) == list(planning.COLUMNS)
    assert frame["n_params"].is_monotonic_increasing
    assert frame["n_params"].iloc[[0, -1]].tolist() == pytest.approx([there.min() / 8, there.max() * 8])
    assert (frame["n_runs"] == 7).all()
    assert frame["cost"].to_numpy() == pytest.approx(7 * 120 * frame["n_params"].to_numpy() ** 2)
    assert frame["ratio"].between(0.05, 1.1).all()
    assert frame["ratio"].iloc[-2] < 0.7 < frame["ratio"].iloc[3]  # a loss beyond the sizes: it is a larger one that tells
    one = planning.one_more_size(laws, 2.5, heads=[Heads(8, 1)], n_params=[2e9])
    assert one["n_runs"].tolist() == [1]
    assert one["cost"].isna().all()
    assert one["ratio"].item() > frame["ratio"].iloc[-2]
    pd.testing.assert_frame_equal(one, planning.one_more_size(laws, 2.5, heads=[Heads(8, 1)], n_params=[2e9]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": [Heads(3, 1)]}, r"no law for heads \(3,1\): there are \(1,1\)"),
        ({"heads": []}, "give at least one"),
        ({"n_params": [1e9, 0.0]}, r"n_params = 0\.0: must be a number above 0"),
    ],
)
def test_bad_input_is_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        planning.one_more_size(OneNumber(), 0.01, **options)


def said(*rows):
    return planning.sentence(pd.DataFrame(rows, columns=list(planning.COLUMNS)), 2.6)


def test_the_cheapest_size_that_halves_is_named_else_the_best():
    assert said((1e8, 7, 3.0, 0.9), (2.4e9, 7, 4.0, 0.48), (5e9, 7, 5.0, 0.3)) == (
        "one more size at N = 2.4B (7 runs, one of each H) would halve the interval of N* at a loss of 2.6: narrower by 52%"
    )
    assert "N = 5B" in said((2.4e9, 7, np.nan, 0.7), (5e9, 7, np.nan, 0.5), (9e9, 7, np.nan, 0.3))  # no costs: the smallest
    assert "N = 5B" in said((2.4e9, 7, 6.0, 0.4), (5e9, 7, 5.0, 0.5))
    assert said((1e8, 1, 3.0, 0.9), (2.4e9, 1, 4.0, 0.6), (5e9, 1, 5.0, 0.7)) == (
        "one more size at N = 2.4B (1 run) would make the interval of N* at a loss of 2.6 narrower by 40%; none from "
        "100M to 5B would halve it"
    )
    assert said((1e8, 7, 3.0, 0.97), (5e9, 7, 5.0, 1.01)) == (
        "no one more size from N = 100M to 5B would make the interval of N* at a loss of 2.6 narrower by more than 5%"
    )


@pytest.mark.thorough
def test_intervals_after_one_more_size_are_as_foretold():
    frame = benchmark.foretold(range(12))
    print(frame.to_string())
    assert (np.abs(np.log(frame["found"] / frame["foretold"])) < 0.35).all()
    assert frame["found"].iloc[1] < 0.65 < frame["found"].iloc[0]
