import dataclasses
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gqa_jax import costs, next_runs, objectives, optimum, presets, shape_search
from gqa_jax.laws import Draws, Heads, fit_by_heads
from gqa_jax.next_runs import Candidate, Question, choose, gains
from gqa_jax.shapes import SIZES, Aspect

QUESTION = Question(loss=2.6, context_served=131_072)
TAU, MEAN = 0.01, -0.004  # of the one number that the laws of `OneNumber` leave open


class OneNumber(dict):
    """Laws that leave one number d ~ Normal(MEAN, TAU^2) open: every run has loss 3 + d and the noise of its heads.

    There are two answers, of regret max(d, 0) and max(-d, 0): what runs are worth is known in closed form.
    """

    def __init__(self, **sigma):
        self.sigma = {Heads(int(name[1:]), 1): value for name, value in sigma.items()}
        super().__init__(dict.fromkeys(self.sigma))

    def draws(self, count, seed):
        shape = (count, len(self.sigma))
        d = np.random.default_rng(seed).normal(MEAN, TAU, (count, 1))
        noise = np.broadcast_to(list(self.sigma.values()), shape)
        return Draws(list(self), 3 + np.broadcast_to(d, shape), np.full(shape, -99.0), np.ones(shape), noise, "posterior")


@pytest.fixture
def two_answers(monkeypatch):
    def regrets(laws, loss, context, objective=None, *, memory_limit, draws, seed):
        d = laws.draws(draws, seed).entropy_SxH[:, 0] - 3
        regret = np.stack([np.maximum(d, 0), np.maximum(-d, 0)], 1)
        return optimum.Regrets([Heads(1, 1), Heads(2, 1)], regret, np.ones(draws, bool))

    monkeypatch.setattr(next_runs.optimum, "regrets", regrets)


def worth(variance):
    """E max(0, m), m ~ Normal(MEAN, s^2) the mean of d after a run of that noise: what is saved where the answer changes."""
    s = np.sqrt(TAU**4 / (TAU**2 + variance))
    return s * stats.norm.pdf(MEAN / s) + MEAN * stats.norm.cdf(MEAN / s)


def run(heads, cost=1.0, name=None):
    return Candidate(name or f"h{heads}", Heads(heads, 1), 1e8, cost)


@pytest.mark.parametrize("ratio", [0.05, 0.5, 1.0, 3.0])
def test_the_gain_of_one_run_is_that_of_the_closed_form(two_answers, ratio):
    laws = OneNumber(h1=ratio * TAU)
    exact = worth((ratio * TAU) ** 2)
    frame = pd.concat([gains(laws, [QUESTION], [run(1)], seed=seed) for seed in range(20)])
    assert frame["gain"].mean() == pytest.approx(exact, rel=0.02)
    spread = frame["gain"].std()
    assert 0.6 * spread < frame["gain_error"].mean() < 1.6 * spread


def test_the_gain_of_a_set_is_that_of_the_closed_form(two_answers):
    laws = OneNumber(h1=TAU)
    simulation = next_runs._Simulation(laws, [QUESTION], 8192, 4096, 0)
    path = simulation.path([run(1, name=str(i)) for i in range(4)])
    assert path[0].gain == pytest.approx(0, abs=1e-12)
    for count, value in enumerate(path[1:], 1):
        assert abs(value.gain - worth(TAU**2 / count)) < 4 * value.gain_error
        assert value.gain_error < 0.05 * value.gain
    again = simulation.path([run(1)])[1]
    assert again.gain_K == pytest.approx(path[1].gain_K)  # the path left nothing behind


def test_the_next_run_is_worth_what_it_adds_to_those_before(two_answers):
    laws = OneNumber(h1=TAU)
    simulation = next_runs._Simulation(laws, [QUESTION], 8192, 1024, 0)
    simulation.add(run(1))
    added = simulation.values([run(1, name="next")])[0].gain_K - simulation.value().gain_K
    assert abs(added.mean() - (worth(TAU**2 / 2) - worth(TAU**2))) < 4 * next_runs._error(added)


def test_a_run_that_says_nothing_does_not_seem_to_help(two_answers):
    laws = OneNumber(h1=100 * TAU)
    found = np.array([gains(laws, [QUESTION], [run(1)], draws=512, seed=seed)["gain"] for seed in range(40)])
    assert found.mean() < 1e-3 * worth(0)


def test_with_few_draws_that_carry_weight_the_gain_is_not_overstated(two_answers):
    laws = OneNumber(h1=TAU / 300)
    simulation = next_runs._Simulation(laws, [QUESTION], 512, 512, 0)
    value = simulation.path([run(1)])[1]
    assert value.effective < 5
    gain = np.mean([gains(laws, [QUESTION], [run(1)], draws=512, seed=seed)["gain"].iloc[0] for seed in range(40)])
    assert 0.9 * worth((TAU / 300) ** 2) < gain < 1.03 * worth((TAU / 300) ** 2)


def test_a_dear_run_is_taken_where_it_is_worth_more_than_the_cheap_ones_that_it_leaves_no_room_for(two_answers):
    laws = OneNumber(h1=3 * TAU, h2=0.1 * TAU)
    cheap, dear = run(1, cost=0.1), run(2, cost=1.0)
    assert list(gains(laws, [QUESTION], [dear, cheap])["name"]) == ["h1", "h2"]
    found = choose(laws, [QUESTION], [cheap, dear], budget=1.0, outcomes=512)
    assert found.names == ["h2"]
    assert found.cost == 1.0
    assert found.stopped == "any other run costs more than is left of the budget"
    both = choose(laws, [QUESTION], [cheap, dear], budget=1.1, outcomes=512)
    assert both.names[0] == "h1"


def test_what_a_choice_says_is_consistent(two_answers):
    laws = OneNumber(h1=TAU)
    candidates = [run(1, name=f"run{i}", cost=i + 1.0) for i in range(4)]
    found = choose(laws, [QUESTION], candidates, budget=6.0)
    assert list(found.steps.columns) == list(next_runs.STEPS)
    assert found.names == ["run0", "run1", "run2"]
    assert found.cost == 6.0 == found.steps["total_cost"].iloc[-1]
    assert found.regret_now - found.gain == pytest.approx(found.regret_after)
    assert found.regret_now == pytest.approx(TAU * stats.norm.pdf(MEAN / TAU) + MEAN * stats.norm.cdf(MEAN / TAU), rel=0.05)
    assert found.gain == pytest.approx(worth(TAU**2 / 3), abs=4 * found.gain_error)
    assert found.steps["regret_after"].is_monotonic_decreasing
    assert found.probability_now == pytest.approx(stats.norm.cdf(-MEAN / TAU), abs=0.02)
    assert found.probability_after > found.probability_now
    pd.testing.assert_frame_equal(found.steps, choose(laws, [QUESTION], candidates, budget=6.0).steps)


def test_runs_under_way_count_for_what_they_will_show(two_answers):
    laws = OneNumber(h1=TAU)
    found = choose(laws, [QUESTION], [run(1, name="new")], budget=1.0, pending=[run(1, name="old", cost=9.0)])
    assert found.names == ["new"]
    assert found.cost == 1.0
    everything = worth(0)
    assert found.regret_now == pytest.approx(everything - worth(TAU**2), rel=0.06)
    assert found.gain == pytest.approx(worth(TAU**2 / 2) - worth(TAU**2), abs=4 * found.gain_error)


def test_it_stops_where_nothing_more_is_to_be_known(two_answers):
    laws = OneNumber(h1=TAU / 20)
    found = choose(laws, [QUESTION], [run(1, name=str(i)) for i in range(6)], budget=100.0, outcomes=512)
    assert 1 <= len(found.names) < 6
    assert found.stopped == "no other run within the budget is sure to improve the answer"
    nothing = choose(OneNumber(h1=1000 * TAU), [QUESTION], [run(1)], budget=1.0, outcomes=512)
    assert nothing.names == []
    assert nothing.cost == 0 == nothing.gain
    assert list(nothing.steps.columns) == list(next_runs.STEPS)


def test_more_draws_are_made_where_few_carry_the_answer_and_else_it_says_so(two_answers, monkeypatch):
    laws = OneNumber(h1=TAU / 1000)
    counts = []
    draws = OneNumber.draws
    monkeypatch.setattr(OneNumber, "draws", lambda self, count, seed: counts.append(count) or draws(self, count, seed))
    candidates = [run(1, name=str(i)) for i in range(3)]
    choose(laws, [QUESTION], candidates, budget=3.0, draws=1024, outcomes=64)
    assert max(counts) == next_runs.MOST_DRAWS
    monkeypatch.setattr(next_runs, "MOST_DRAWS", 1024)
    found = choose(laws, [QUESTION], candidates, budget=3.0, draws=1024, outcomes=64)
    assert found.stopped == "what further runs would add depends on what these will show: train these, then ask again"
    assert "they gain this at least" in found.warnings[0]


def test_questions_count_by_their_weights(two_answers, monkeypatch):
    laws = OneNumber(h1=TAU)
    single = gains(laws, [QUESTION], [run(1)])
    twice = gains(laws, [QUESTION, dataclasses.replace(QUESTION, weight=3.0)], [run(1)])
    pd.testing.assert_frame_equal(single, twice, rtol=1e-4)
    known = optimum.regrets

    def sure_at_3(laws, loss, *given, **options):
        found = known(laws, loss, *given, **options)
        return found if loss != 3.0 else dataclasses.replace(found, regret_SxH=np.array([[0.0, 1.0]] * len(found.reached_S)))

    monkeypatch.setattr(next_runs.optimum, "regrets", sure_at_3)
    sure = Question(3.0, 131_072, weight=3.0)
    assert gains(laws, [QUESTION, sure], [run(1)])["gain"][0] == pytest.approx(single["gain"][0] / 4, rel=1e-3)


def test_draws_that_do_not_reach_the_loss_are_left_out_of_the_regret(two_answers, monkeypatch):
    laws = OneNumber(h1=TAU)
    known = optimum.regrets

    def half(laws, *given, draws, **options):
        found = known(laws, *given, draws=draws, **options)
        reached = np.arange(draws) % 2 == 0
        return optimum.Regrets(found.heads, np.where(reached[:, None], found.regret_SxH, np.nan), reached)

    whole = gains(laws, [QUESTION], [run(1)])["gain"][0]
    monkeypatch.setattr(next_runs.optimum, "regrets", half)
    assert gains(laws, [QUESTION], [run(1)])["gain"][0] == pytest.approx(whole, rel=0.1)
    monkeypatch.setattr(
        next_runs.optimum,
        "regrets",
        lambda *a, draws, **b: optimum.Regrets([Heads(1, 1)], np.full((draws, 1), np.nan), np.zeros(draws, bool)),
    )
    with pytest.raises(ValueError, match=r"loss = 2\.6: no heads reach it"):
        gains(laws, [QUESTION], [run(1)])


def size_of(size, heads):
    s = SIZES[size]
    shape = costs.Shape(s.n_layers, s.d_model, heads.n_heads, heads.n_kv_heads, 64)
    return costs.count_params(shape, "figures").non_embedding


def test_on_the_papers_data_runs_of_the_heads_in_question_are_worth_most():
    laws = presets.load("paper-table4")
    question = Question(2.615, 131_072)
    candidates = [
        Candidate(f"{size} {heads}", heads, size_of(size, heads), 120 * size_of(size, heads) ** 2)
        for size in ("85M", "470M", "1.2B")
        for heads in laws
    ]
    frame = gains(laws, [question], candidates, seed=3)
    assert list(frame.columns) == list(next_runs.GAINS)
    assert len(frame) == 63
    answer = optimum.search(laws, 2.615, 131_072, draws=4096, seed=3)
    assert (frame["regret_after"] + frame["gain"]).to_numpy() == pytest.approx(answer.expected_regret, rel=1e-4)
    best = frame.sort_values("gain", ascending=False)
    in_question = {tuple(answer.heads), tuple(answer.runner_up)}
    assert {(row.n_heads, row.n_kv_heads) for row in best.head(3).itertuples()} <= in_question
    other = frame[(frame["n_heads"] == 1) | (frame["n_kv_heads"] == 32)]
    assert other["gain"].max() < 0.02 * best["gain"].iloc[0]
    sure = frame["gain"] > next_runs.SURE * frame["gain_error"]
    assert sure.is_monotonic_decreasing
    assert frame[sure]["gain_per_cost"].is_monotonic_decreasing


@pytest.mark.parametrize(
    ("questions", "candidates", "budget", "message"),
    [
        ([], [run(1)], 1, "no question"),
        ([QUESTION], [], 1, "no candidate: every run is there, or under way"),
        ([QUESTION], [run(1, cost=5.0)], 1, r"budget = 1: the cheapest run, h1, costs 5"),
        ([QUESTION], [run(1)], float("nan"), "budget = nan"),
        ([QUESTION], [run(7)], 1, r"h7: no law for heads \(7,1\); there are \(1,1\)"),
        ([QUESTION], [run(1, cost=0.0)], 1, "cost = 0.0 of h1: must be a number above 0"),
        ([QUESTION], [run(1), run(1)], 1, "two candidates are called h1"),
        ([dataclasses.replace(QUESTION, loss=-1.0)], [run(1)], 1, r"loss = -1\.0: must be a number above 0"),
        ([dataclasses.replace(QUESTION, context_served=0)], [run(1)], 1, "context_served = 0: must be at least 1 token"),
        ([dataclasses.replace(QUESTION, weight=0.0)], [run(1)], 1, r"weight = 0\.0 of a question"),
    ],
)
def test_bad_input_is_a_sentence(two_answers, questions, candidates, budget, message):
    with pytest.raises(ValueError, match=message):
        choose(OneNumber(h1=TAU), questions, candidates, budget)


def test_too_few_draws_or_runs_are_said():
    with pytest.raises(ValueError, match="draws = 100, outcomes = 8: use 512 and 8, or more"):
        gains(OneNumber(h1=TAU), [QUESTION], [run(1)], draws=100)
    heads = Heads(8, 1)
    table = pd.DataFrame(
        {"n_heads": 8, "n_kv_heads": 1, "params_non_embedding": [1e7, 1e8, 1e9], "context": 8192, "status": "done",
         "loss": [4.0, 3.2, 2.8]}
    )  # fmt: skip
    with pytest.raises(ValueError, match="as many coefficients as runs"):
        gains(fit_by_heads(table), [QUESTION], [Candidate("x", heads, 1e8, 1.0)])


def test_it_does_without_jax():
    code = "import sys, gqa_jax.next_runs; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


HEADS = [Heads(4, 1), Heads(8, 1), Heads(16, 1), Heads(8, 2)]
TRAINED, ALL_SIZES, NOISE = 4, ["19M", "85M", "150M", "200M", "470M", "680M", "1.2B"], 0.005


def study(seed, budget=1.5, **how):
    """Half a grid from known laws near the paper's; a budget (in the largest cells of (8,1)) spent in three ways; realised regrets."""
    generator = np.random.default_rng([seed, 11])
    preset, shift = presets.load("paper-table4"), generator.normal(0, 0.03)
    truth = {
        heads: (
            (preset[heads].a / 1e9) ** preset[heads].b * np.exp(generator.normal(0, 0.008)),
            preset[heads].b + generator.normal(0, 0.004),
            preset[heads].entropy + shift,
        )
        for heads in HEADS
    }
    target, context, aspect = 2.6 + shift, 131_072, Aspect.constant(64)

    def row(number, heads, run_seed):
        size = size_of(ALL_SIZES[number], heads)
        above, b, entropy = truth[heads]
        loss = above * (size / 1e9) ** -b + entropy + NOISE * generator.normal()
        return {"cell": f"{ALL_SIZES[number]} {heads} {run_seed}", **heads._asdict(), "params_non_embedding": size, "loss": loss,
                "context": 8192, "status": "done", "seed": run_seed, "trained": run_seed == 0 and number < TRAINED}  # fmt: skip

    runs = pd.DataFrame([row(n, heads, s) for s in (0, 1) for n in range(len(ALL_SIZES)) for heads in HEADS])
    runs = runs.set_index("cell", drop=False)
    sizes = np.array([1e9 * ((target - e) / above) ** (-1 / b) for above, b, e in truth.values()])
    cost = objectives.Z()(shape_search.solve_shape(sizes, HEADS, aspect), context)
    regret = dict(zip(HEADS, cost / cost.min() - 1, strict=True))

    def decide(names):
        laws = fit_by_heads(runs[runs["trained"] | runs["cell"].isin(names)])
        laws.aspect = aspect
        return laws, regret[optimum.search(laws, target, context, draws=1000).heads]

    laws, now = decide([])
    new = runs[~runs["trained"] & ((runs["seed"] == 0) | runs["params_non_embedding"].lt(size_of("470M", HEADS[0])))]
    candidates = [
        Candidate(r.cell, Heads(r.n_heads, r.n_kv_heads), r.params_non_embedding, 120 * r.params_non_embedding**2)
        for r in new.itertuples()
    ]
    budget = budget * 120 * size_of("1.2B", Heads(8, 1)) ** 2
    chosen = choose(laws, [Question(target, context)], candidates, budget, seed=seed, **how)

    def spend(order):
        names, left = [], budget
        for one in order:
            if one.cost <= left:
                names.append(one.name)
                left -= one.cost
        return names

    mixed = [candidates[i] for i in generator.permutation(len(candidates))]
    largest = sorted((one for one in mixed if one.name.endswith("0")), key=lambda one: -ALL_SIZES.index(one.name.split()[0]))
    return {
        "now": now, "predicted_now": chosen.regret_now, "predicted_gain": chosen.gain, "chosen": decide(chosen.names)[1],
        "random": decide(spend(mixed))[1], "largest": decide(spend(largest))[1], "spent": chosen.cost / budget,
    }  # fmt: skip


@pytest.mark.slow
def test_runs_chosen_so_beat_random_and_largest_first_and_their_gain_is_as_predicted():
    found = pd.DataFrame([study(seed) for seed in range(40)])
    error = found.std() / np.sqrt(len(found))
    print(pd.DataFrame({"mean": found.mean(), "error": error}))
    for other in ("random", "largest"):
        better = found[other] - found["chosen"]
        assert better.mean() > better.std() / np.sqrt(len(found))
    surprise = found["now"] - found["chosen"] - found["predicted_gain"]
    assert abs(surprise.mean()) < 2 * surprise.std() / np.sqrt(len(found))
    assert (found["spent"] <= 1).all()


def test_a_few_simulated_grids():
    found = pd.DataFrame([study(seed, budget=0.5, draws=1024, outcomes=128) for seed in range(4)])
    assert found["chosen"].mean() <= min(found["random"].mean(), found["largest"].mean())
    assert found["chosen"].mean() < 0.5 * found["now"].mean()
    assert (found["predicted_gain"] > 0).all()
    assert (found["spent"] <= 1).all()
