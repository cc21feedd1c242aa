import numpy as np
import pandas as pd
import pytest

from gqa_jax import costs
from gqa_jax.laws.heads import LLAMA3, Heads
from gqa_jax.laws.loss_nd import fit_loss_nd_by_heads
from gqa_jax.search import equal_compute, objectives, ranking
from gqa_jax.search.equal_compute import SameAs, equal_training_cost, equal_training_curves

BY_HEADS = {(32, 8): 470.0, (8, 8): 482.0, (8, 1): 510.0, (1, 1): 580.0}
T = 131_072


def table(noise=0.0, seed=0, by_heads=BY_HEADS):
    rng = np.random.default_rng(seed)
    rows = []
    for (h, k), a in by_heads.items():
        for layers, d_model in [(6, 512), (12, 768), (12, 1024), (16, 1024), (24, 1280), (36, 1536)]:
            n = layers * (8 * d_model**2 + 128 * d_model * (h + k))
            for ratio in (5, 20, 80):
                tokens = ratio * 12 * layers * d_model**2
                loss = (1.82 + a / n**0.348 + 2085 / tokens**0.366) * np.exp(noise * rng.normal())
                rows.append(
                    {"n_heads": h, "n_kv_heads": k, "n_layers": layers, "d_model": d_model, "head_dim": 64}
                    | {"params_non_embedding": n, "tokens": tokens, "loss": loss, "context": 8192, "status": "done"}
                )
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def exact():
    return fit_loss_nd_by_heads(table())


@pytest.fixture(scope="module")
def noisy():
    return fit_loss_nd_by_heads(table(0.003))


def trained(laws, row, context):
    """Training FLOPs and loss of a row of the candidates."""
    heads = Heads(int(row["n_heads"]), int(row["n_kv_heads"]))
    shape = costs.solve_shape(row["n_params"], heads, laws.aspect, 64, 50_304, "figures")
    return costs.train_flops(shape, context, row["tokens"], "figures"), laws[heads].predict(row["n_params"], row["tokens"])


@pytest.mark.parametrize(("train_context", "cheapest"), [(None, Heads(8, 1)), (T, Heads(1, 1))])
def test_every_candidate_spends_the_budget_and_reaches_the_loss(exact, train_context, cheapest):
    answer = equal_training_cost(exact, 1e21, 2.7, T, train_context=train_context, draws=0)
    assert len(answer.candidates) == 4
    assert answer.train_context == (train_context or 8192)
    for _, row in answer.candidates.iterrows():
        flops, loss = trained(exact, row, answer.train_context)
        assert flops == pytest.approx(1e21)
        assert loss == pytest.approx(2.7, abs=1e-8)
    assert answer.candidates["cost"].is_monotonic_increasing
    assert answer.heads == cheapest
    assert np.isnan(answer.not_reached)


def test_the_size_is_the_least_that_reaches_the_loss(exact):
    """At fixed cost the loss falls with N, then rises again as tokens run out: both ends of the valley reach the loss."""
    row = equal_training_cost(exact, 3e20, 2.6, T, draws=0).candidates.iloc[0]
    sizes = row["n_params"] * np.array([0.9, 0.99, 1.01, 2, 1000])
    curve = equal_training_curves(exact, 3e20, sizes, draws=0)
    losses = curve[(curve["n_heads"] == row["n_heads"]) & (curve["n_kv_heads"] == row["n_kv_heads"])]["loss"].to_numpy()
    assert (losses[:2] > 2.6).all()
    assert (losses[2:4] < 2.6).all()
    assert losses[4] > 2.6


def test_the_same_cost_as_a_baseline_gives_it_its_tokens_and_fewer_heads_more(exact):
    curve = equal_training_curves(exact, SameAs(Heads(32, 8)), [1e8, 1e9], train_context=T, context_served=T, draws=0)
    ratio = curve.set_index(["n_heads", "n_kv_heads"])["tokens_per_param"].sort_index()
    assert ratio.loc[(32, 8)].to_numpy() == pytest.approx(20)
    assert (ratio.loc[(8, 8)] > 20).all()
    assert (ratio.loc[(1, 1)].to_numpy() > ratio.loc[(8, 1)].to_numpy()).all()
    assert (ratio.loc[(1, 1)] > 100).all()  # attention of 32 heads at 128K is most of the cost
    first = curve.iloc[0]
    shape = costs.solve_shape(first["n_params"], Heads(1, 1), exact.aspect, 64, 50_304, "figures")
    assert first["c_infer"] == pytest.approx(costs.infer_flops(shape, T, "figures"))
    assert first["m_infer"] == pytest.approx(costs.infer_memory(shape, T, "figures"))
    assert first["cost"] == pytest.approx(objectives.Z()(shape, T))


def test_training_at_long_contexts_widens_the_gap(exact):
    """Section 5.6: with everything trained at 128K savings grow."""
    savings = [
        equal_training_cost(exact, SameAs(Heads(32, 8)), 2.6, T, train_context=t, draws=0).candidates.iloc[0]["saving"]
        for t in (1024, T)
    ]
    assert 0.3 < savings[0] < savings[1] < 0.9


def test_savings_are_against_the_baseline(exact):
    answer = equal_training_cost(exact, SameAs(Heads(32, 8)), 2.6, T, draws=0)
    frame = answer.candidates.set_index(["n_heads", "n_kv_heads"])
    assert answer.baseline == Heads(32, 8)
    assert frame.loc[(32, 8), "saving"] == 0
    assert frame["saving"].to_numpy() == pytest.approx((1 - frame["cost"] / frame.loc[(32, 8), "cost"]).to_numpy())
    without = equal_training_cost(exact, 3e20, 2.6, T, draws=0)
    assert without.baseline == LLAMA3
    assert without.candidates["saving"].isna().all()
    assert "no saving against (d/d_h,8): no law has these heads" in without.warnings
    other = equal_training_cost(exact, 3e20, 2.6, T, baseline=(8, 8), draws=0)
    assert other.candidates.set_index(["n_heads", "n_kv_heads"]).loc[(8, 8), "saving"] == 0


def test_heads_that_follow_the_width_are_candidates_too():
    data = table().astype({"n_heads": "Int64"})
    data.loc[data["n_heads"] == 32, "n_heads"] = pd.NA
    laws = fit_loss_nd_by_heads(data)
    answer = equal_training_cost(laws, 3e20, 2.6, T, draws=0)
    frame = answer.candidates
    assert frame["n_heads"].isna().sum() == 1
    assert frame.loc[frame["n_heads"].isna(), "saving"].item() == 0
    assert frame["saving"].iloc[0] > 0


def test_draws_give_probabilities_and_intervals(noisy):
    answer = equal_training_cost(noisy, SameAs(Heads(32, 8)), 2.6, T, draws=300)
    frame = answer.candidates
    assert frame["probability"].sum() == pytest.approx(1)
    assert frame["expected_regret"].is_monotonic_increasing
    assert frame["expected_regret"].iloc[0] < 0.01
    for name in ("n_params", "tokens", "cost", "saving"):
        assert (frame[f"{name}_low"] <= frame[name]).all()
        assert (frame[name] <= frame[f"{name}_high"]).all()
    assert answer.not_reached == 0
    again = equal_training_cost(noisy, SameAs(Heads(32, 8)), 2.6, T, draws=300)
    pd.testing.assert_frame_equal(again.candidates, frame)


@pytest.mark.parametrize("above_least", [0.002, 0.008, 0.014])
def test_regrets_are_those_of_the_search(above_least):
    """Near the least loss that the budget can reach, where one H is far dearer in some draws and can't reach it in others."""
    rng = np.random.default_rng(3)
    rows = [
        {"n_heads": 8, "n_kv_heads": k, "params_non_embedding": int(n), "tokens": int(ratio * n), "context": 8192}
        | {"loss": 1.7 + f * 400 / n**0.34 + 410 / (ratio * n) ** 0.28 + 0.01 * rng.normal(), "status": "done"}
        for k, f in ((8, 1.0), (1, 1.06))
        for n in (1e7, 3e7, 1e8, 3e8)
        for ratio in (10, 20, 40)
    ]
    laws, goal = fit_loss_nd_by_heads(pd.DataFrame(rows)), objectives.Memory("figures")
    plan = equal_compute._Plan.of(laws, 3e19, None, "figures", None)
    loss = plan.least_loss(equal_compute._fitted(laws)) + above_least
    n_SxH = plan.least_params(loss, laws.draws(300, 0))
    reached = np.isfinite(n_SxH)
    cost_SxH = np.where(reached, goal(plan.shape(np.where(reached, n_SxH, np.nan), plan.heads), T), np.inf)
    regret_SxH = ranking.regret(cost_SxH)
    assert (regret_SxH == 10).any()
    assert (regret_SxH[regret_SxH < 10] > 1).any()
    found = equal_training_cost(laws, 3e19, loss, T, goal, draws=300)
    frame = found.candidates.set_index(["n_heads", "n_kv_heads"])
    expected = [frame.loc[tuple(heads), "expected_regret"] for heads in plan.heads]
    np.testing.assert_allclose(expected, np.nanmean(regret_SxH, 0))


def test_intervals_hold_the_truth_and_shrink_with_noise(exact, noisy):
    truth = equal_training_cost(exact, 3e20, 2.6, T, draws=0).candidates.set_index(["n_heads", "n_kv_heads"])
    widths = []
    for laws in (noisy, fit_loss_nd_by_heads(table(0.0003))):
        frame = (
            equal_training_cost(laws, 3e20, 2.6, T, draws=300).candidates.set_index(["n_heads", "n_kv_heads"]).loc[truth.index]
        )
        slack = frame["n_params_high"] - frame["n_params_low"]
        assert (truth["n_params"] > frame["n_params_low"] - slack / 2).all()
        assert (truth["n_params"] < frame["n_params_high"] + slack / 2).all()
        widths.append(slack)
    assert (widths[1] < 0.2 * widths[0]).all()


def test_a_loss_that_only_some_draws_reach_is_said(noisy):
    least = equal_training_curves(noisy, 3e20, np.geomspace(1e8, 1e11, 300), draws=0)["loss"].min()
    answer = equal_training_cost(noisy, 3e20, least + 2e-4, T, draws=300)
    assert 0.05 < answer.not_reached < 0.95
    assert "of the draws no heads reach the loss" in " ".join(answer.warnings)
    missing = answer.candidates["n_params"].isna()
    assert missing.any()
    assert answer.candidates.loc[missing, "note"].str.contains("does not reach the loss").all()
    assert not missing.iloc[0]
    assert np.isinf(answer.candidates["n_params_high"]).any()


def test_answers_beyond_the_runs_say_so(exact):
    answer = equal_training_cost(exact, 1e24, 2.0, T, draws=0)
    assert "extrapolated: N* is" in " ".join(answer.warnings)
    assert "above the trained ones" in answer.candidates["note"].iloc[0]
    assert (
        equal_training_cost(exact, SameAs(Heads(8, 8)), 2.6, T, draws=0).candidates.set_index("n_kv_heads")["note"].isna().any()
    )


def test_laws_without_noise_to_draw_from_give_no_probabilities():
    data = table(by_heads={(8, 8): 482.0, (8, 1): 510.0})
    laws = fit_loss_nd_by_heads(data.iloc[[0, 8, 17, 19, 27, 34]])
    assert laws.dof == 0
    answer = equal_training_cost(laws, 3e20, 3.0, T)
    assert answer.candidates["probability"].isna().all()
    assert "no probabilities: 6 runs for 6 coefficients" in " ".join(answer.warnings)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0, 2.6, T), "budget = 0: training FLOPs must be above 0"),
        ((np.nan, 2.6, T), "budget = nan"),
        ((1e18, 2.0, T), r"no heads reach a loss of 2 with this training budget: the least is 3\.\d+"),
        ((3e20, 1.8, T), "no heads reach a loss of 1.8"),
        ((3e20, np.nan, T), "loss = nan"),
        ((3e20, 2.6, 0), "context_served = 0"),
    ],
)
def test_errors(exact, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        equal_training_cost(exact, *arguments)


def test_errors_of_options(exact):
    with pytest.raises(ValueError, match="tokens_per_param = 0"):
        SameAs(Heads(8, 8), 0)
    with pytest.raises(ValueError, match="train_context = 0"):
        equal_training_cost(exact, 3e20, 2.6, T, train_context=0)
    with pytest.raises(ValueError, match="convention 'mine' is unknown"):
        equal_training_cost(exact, 3e20, 2.6, T, convention="mine")
    with pytest.raises(ValueError, match="params must be finite numbers above 0"):
        equal_training_curves(exact, 3e20, [1e8, -1])
