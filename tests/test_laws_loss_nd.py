import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from gqa_jax.laws.heads import Heads
from gqa_jax.laws.loss_nd import fit_loss_nd, fit_loss_nd_by_heads

#: The refit of Chinchilla's data by Besiroglu et al. 2024 (arXiv 2404.10102).
TRUTH = {"E": 1.82, "A": 482.0, "B": 2085.0, "alpha": 0.348, "beta": 0.366}
BY_HEADS = {(8, 8): 482.0, (8, 1): 510.0, (1, 1): 560.0}


def law(n, d, A=TRUTH["A"], **other):
    t = TRUTH | other
    return t["E"] + A / n ** t["alpha"] + t["B"] / d ** t["beta"]


def chinchilla(noise=0.0, seed=0):
    """74 runs between 6e18 and 3e22 FLOPs, 44M to 16B parameters; noise of ln L."""
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(44e6, 16e9, 10), np.geomspace(1e9, 1e12, 9)))
    keep = (6 * n * d > 6e18) & (6 * n * d < 3e22)
    n, d = n[keep], d[keep]
    return n, d, law(n, d) * np.exp(noise * np.random.default_rng(seed).normal(size=n.size))


def table(noise=0.0, seed=0, by_heads=BY_HEADS, tokens_per_param=(5, 20, 80)):
    rng = np.random.default_rng(seed)
    rows = []
    for (h, k), a in by_heads.items():
        for layers, d_model in [(4, 256), (6, 512), (12, 768), (12, 1024), (16, 1024), (24, 1280)]:
            n = layers * (8 * d_model**2 + 128 * d_model * (h + k))
            for ratio in tokens_per_param:
                tokens = ratio * 12 * layers * d_model**2
                loss = law(n, tokens, A=a) * np.exp(noise * rng.normal())
                rows.append(
                    {
                        "n_heads": h,
                        "n_kv_heads": k,
                        "n_layers": layers,
                        "d_model": d_model,
                        "head_dim": 64,
                        "vocab_size": 50_304,
                    }
                    | {"params_non_embedding": n, "tokens": tokens, "loss": loss, "status": "done", "context": 8192}
                )
    return pd.DataFrame(rows)


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("huber_delta", [None, 1e-3])
def test_recovers_chinchillas_law_without_a_start_value(huber_delta, log):
    fit = fit_loss_nd(*chinchilla(), huber_delta, log=log)
    for name, value in TRUTH.items():
        assert getattr(fit, name) == pytest.approx(value, rel=1e-6)
    assert fit.status == "CONVERGED"
    assert fit.r_squared == pytest.approx(1)
    assert fit.dof == 74 - 5
    assert fit.warnings == ()


@pytest.mark.parametrize("huber_delta", [None, 1e-3, 3e-3])
def test_no_minimum_of_many_starts_is_deeper(huber_delta):
    """Summed Huber (or squares) of residuals of ln L, by a simplex from a grid of starts and from beside our minimum."""
    n, d, y = chinchilla(0.003, seed=5)
    fit = fit_loss_nd(n, d, y, huber_delta)

    def objective(x):
        a, b, e, alpha, beta = x
        r = np.log(np.exp(a - alpha * np.log(n)) + np.exp(b - beta * np.log(d)) + np.exp(e)) - np.log(y)
        if huber_delta is None:
            return np.sum(r**2)
        return np.sum(np.where(np.abs(r) <= huber_delta, r**2, 2 * huber_delta * np.abs(r) - huber_delta**2))

    best = np.array([np.log(fit.A), np.log(fit.B), np.log(fit.E), fit.alpha, fit.beta])
    ours = objective(best)
    starts = [(a, b, 0.5, alpha, beta) for a in (4, 8) for b in (5, 10) for alpha in (0.3, 0.6) for beta in (0.3, 0.6)]
    starts += [best * (1 + 0.01 * np.random.default_rng(i).normal(size=5)) for i in range(4)]
    found = [optimize.minimize(objective, x, method="Nelder-Mead", options={"maxfev": 2000}).fun for x in starts]
    assert ours <= min(found) * (1 + 1e-9)
    assert ours == pytest.approx(fit.problem.fit.objective, rel=1e-9)


def test_huber_resists_runs_that_went_wrong():
    n, d, y = chinchilla(0.001, seed=2)
    y[::15] *= 1.05
    squares, huber = fit_loss_nd(n, d, y), fit_loss_nd(n, d, y, 1e-3)
    assert pytest.approx(1.82, abs=0.01) == huber.E
    assert abs(squares.E - 1.82) > 3 * abs(huber.E - 1.82)


def test_profiles_agree_with_a_search_over_all_other_coefficients():
    n, d, y = chinchilla(0.003, seed=7)
    fit = fit_loss_nd(n, d, y)
    intervals = fit.intervals()
    limit = fit.sigma**2 * 3.979807  # F(1, 69) at 95%
    names = ["E", "log_A", "log_B", "alpha", "beta"]
    best = np.array([fit.E, np.log(fit.A), np.log(fit.B), fit.alpha, fit.beta])

    def squares(x):
        return np.log(x[0] + np.exp(x[1] - x[3] * np.log(n)) + np.exp(x[2] - x[4] * np.log(d))) - np.log(y)

    for name, at in (("E", 0), ("A", 1), ("alpha", 3), ("beta", 4)):
        for end in ("low", "high"):
            value = np.log(intervals[end][name]) if name == "A" else intervals[end][name]
            covariance = fit.covariance.loc[names, names].to_numpy()
            start = best + covariance[:, at] / covariance[at, at] * (value - best[at])
            others = [i for i in range(5) if i != at]

            def held(free, at=at, value=value, others=others):
                x = np.empty(5)
                x[at], x[others] = value, free
                return squares(x)

            found = optimize.least_squares(held, start[others], x_scale="jac", xtol=1e-15, ftol=1e-15, gtol=1e-15)
            assert 2 * found.cost - fit.problem.fit.objective == pytest.approx(limit, rel=2e-3)


def test_intervals_cover():
    """20 seeded tables, five intervals of 95% each."""
    inside = []
    for seed in range(20):
        found = fit_loss_nd(*chinchilla(0.003, seed)).intervals()
        inside += [found.low[name] <= value <= found.high[name] for name, value in TRUTH.items()]
    assert np.mean(inside) >= 0.87


def test_draws_agree_with_profiles_and_repeat():
    fit = fit_loss_nd(*chinchilla(0.003, seed=1))
    intervals = fit.intervals()
    for method in ("noise", "runs"):
        drawn = fit.draws(400, seed=3, method=method)
        low, high = np.quantile(drawn.entropy, [0.025, 0.975])
        assert [low, high] == pytest.approx([intervals.low["E"], intervals.high["E"]], abs=0.35 * (high - low))
    assert fit.draws(50, seed=3).entropy.tolist() == fit_loss_nd(*chinchilla(0.003, seed=1)).draws(50, seed=3).entropy.tolist()
    assert fit.draws(50, seed=4).entropy[0] != fit.draws(50, seed=3).entropy[0]
    one = drawn.predict(0, np.array([1e9, 2e9]), np.array([2e10, 4e10]))
    assert one.shape == (400, 2)
    assert one.mean(0) == pytest.approx(fit.predict([1e9, 2e9], [2e10, 4e10]), rel=1e-2)
    with pytest.raises(ValueError, match="method = 'jackknife'"):
        fit.draws(method="jackknife")


def test_a_bootstrap_over_runs_refits_the_runs_that_were_drawn():
    n, d, y = chinchilla(0.003, seed=4)
    fit = fit_loss_nd(n, d, y)
    times = np.random.default_rng(8).multinomial(n.size, np.full(n.size, 1 / n.size), 20)
    drawn = fit.draws(20, seed=8, method="runs")
    for i in (0, 19):
        again = np.repeat(np.arange(n.size), times[i])
        own = fit_loss_nd(n[again], d[again], y[again])
        assert drawn.entropy[i] == pytest.approx(own.E, rel=1e-6)
        assert drawn.log_a_SxH[i, 0] == pytest.approx(np.log(own.A), rel=1e-6)


def test_huber_intervals_are_those_of_the_bootstrap():
    fit = fit_loss_nd(*chinchilla(0.003, seed=1), 1e-3)
    low, high = np.quantile(fit.draws().beta, [0.025, 0.975])
    assert fit.intervals().loc["beta", ["low", "high"]].tolist() == pytest.approx([low, high], rel=1e-12)


def test_compute_optimal_model():
    fit = fit_loss_nd(*chinchilla())
    best = fit.optimal(5.76e23)
    sizes = np.geomspace(1e9, 1e12, 200_001)
    losses = fit.predict(sizes, 5.76e23 / 6 / sizes)
    assert best.params == pytest.approx(sizes[np.argmin(losses)], rel=1e-3)
    assert best.loss == pytest.approx(losses.min(), rel=1e-9)
    assert 6 * best.params * best.tokens == pytest.approx(5.76e23)
    assert 15 < best.tokens / best.params < 30  # Chinchilla's rule, as Besiroglu et al. find it: about 20
    with pytest.raises(ValueError, match="compute_flops = 0"):
        fit.optimal(0)


def test_solving_for_a_size():
    fit = fit_loss_nd(*chinchilla())
    n = fit.solve(2.5, 1e11)
    assert fit.predict(n, 1e11) == pytest.approx(2.5)
    with pytest.raises(ValueError, match=r"no size is below 2\.0"):
        fit.solve(1.9, 1e11)


def test_residuals_are_measured_minus_fitted():
    fit = fit_loss_nd(*chinchilla(0.003))
    frame = fit.residuals
    assert frame["residual"].to_numpy() == pytest.approx(
        (frame["loss"] - fit.predict(frame["params"], frame["tokens"])).to_numpy()
    )
    assert np.sum(frame["z"] ** 2) == pytest.approx(fit.dof)
    assert fit.sigma == pytest.approx(0.003, rel=0.25)


# Coefficients that are fixed, exponents that are tied

TIED = {"alpha": 0.3, "beta": 0.3, "A": 230.0, "B": 690.0}


def five(noise=0.0, seed=0):
    """Four sizes at 20 tokens per parameter and the smallest at 320, as mlfoundations/scaling (arXiv 2403.08540) fits them."""
    n = np.array([11e6, 79e6, 154e6, 411e6, 11e6])
    d = n * [20, 20, 20, 20, 320]
    return n, d, law(n, d, **TIED) * np.exp(noise * np.random.default_rng(seed).normal(size=5))


@pytest.mark.parametrize("huber_delta", [None, 1e-3])
def test_five_runs_suffice_for_tied_exponents(huber_delta):
    fit = fit_loss_nd(*five(), huber_delta, alpha_equals_beta=True)
    assert fit.status == "CONVERGED"
    for name, value in (TRUTH | TIED).items():
        assert getattr(fit, name) == pytest.approx(value, rel=1e-5)
    assert fit.alpha == fit.beta
    assert fit.dof == 1
    with pytest.raises(ValueError, match=r"5 runs: L.N, D. has five coefficients, it needs 6"):
        fit_loss_nd(*five())


RESTRICTED = [
    {"alpha_equals_beta": True},
    {"fixed": {"alpha": 0.34, "E": 1.69}},
    {"fixed": {"A": 450.0}},
    {"fixed": {"B": 2000.0, "E": 1.8}},
    {"fixed": {"A": 450.0, "B": 2000.0}, "alpha_equals_beta": True},
    {"fixed": {"beta": 0.35}, "alpha_equals_beta": True},
    {"fixed": {"A": 482.0, "B": 2085.0, "alpha": 0.348, "beta": 0.366}},
    {"fixed": {"A": 482.0, "B": 2085.0, "E": 1.82, "beta": 0.366}},
]


@pytest.mark.parametrize("huber_delta", [None, 2e-3])
@pytest.mark.parametrize("options", RESTRICTED)
def test_a_restricted_law_is_that_of_an_independent_search(options, huber_delta):
    n, d, y = chinchilla(0.003, seed=6)
    fit = fit_loss_nd(n, d, y, huber_delta, **options)
    assert fit.status == "CONVERGED"
    fixed = dict(options.get("fixed", {}))
    if tied := options.get("alpha_equals_beta", False):
        fixed |= {"alpha": fixed["beta"]} if "beta" in fixed else {}
    free = [name for name in TRUTH if name not in fixed and not (tied and name == "beta")]

    def residual(x):
        now = fixed | dict(zip(free, x, strict=True))
        now |= {name: np.exp(now[name]) for name in free if name in ("A", "B")}
        now["beta"] = now.get("beta", now["alpha"])
        return np.log(np.maximum(law(n, d, **now), 1e-3) / y)

    def start(seed):
        near = {"A": 5.0, "B": 6.5, "E": 1.5, "alpha": 0.3, "beta": 0.3}
        return np.array([near[name] for name in free]) * (1 + 0.1 * np.random.default_rng(seed).normal(size=len(free)))

    loss = {} if huber_delta is None else {"loss": "huber", "f_scale": huber_delta}
    found = [optimize.least_squares(residual, start(i), x_scale="jac", xtol=1e-15, ftol=1e-15, **loss) for i in range(5)]
    best = min(found, key=lambda one: one.cost)
    ours = residual(np.array([np.log(getattr(fit, name)) if name in ("A", "B") else getattr(fit, name) for name in free]))
    assert fit.problem.fit.objective <= 2 * best.cost * (1 + 1e-9)
    assert fit.problem.fit.objective == pytest.approx(2 * best.cost, rel=1e-6)
    assert fit.dof == n.size - len(free)
    if huber_delta is None:
        assert np.sum(ours**2) == pytest.approx(fit.problem.fit.objective, rel=1e-9)
        names = ["log_" * (name in "AB") + name for name in free]
        inverse = np.linalg.inv(best.jac.T @ best.jac) * fit.sigma**2
        np.testing.assert_allclose(fit.covariance.loc[names, names], inverse, rtol=1e-2)


def test_what_is_fixed_has_no_uncertainty_and_what_is_tied_stays_tied():
    n, d, y = chinchilla(0.003, seed=2)
    for huber_delta in (None, 1e-3):
        fit = fit_loss_nd(n, d, y, huber_delta, fixed={"A": 480.0, "E": 1.8})
        assert (fit.A, fit.E) == (480.0, 1.8)
        frame = fit.intervals()
        assert frame.loc["A"].tolist() == [480.0] * 3
        assert frame.loc["E"].tolist() == [1.8] * 3
        assert not fit.covariance.loc[["log_A", "E"]].to_numpy().any()
        assert (np.diag(fit.covariance.loc[["log_B", "alpha", "beta"], ["log_B", "alpha", "beta"]]) > 0).all()
        drawn = fit.draws(50)
        assert np.ptp(drawn.entropy) == 0
        assert np.exp(drawn.log_a_SxH) == pytest.approx(480.0)
        assert drawn.alpha_SxH.std() > 0
        tied = fit_loss_nd(n, d, y, huber_delta, alpha_equals_beta=True)
        for method in ("noise", "runs"):
            drawn = tied.draws(50, method=method)
            np.testing.assert_array_equal(drawn.alpha_SxH[:, 0], drawn.beta)
            assert drawn.beta.std() > 0
        frame = tied.intervals()
        assert frame.loc["alpha"].tolist() == frame.loc["beta"].tolist()
        assert tied.covariance.loc["alpha", "beta"] == tied.covariance.loc["beta", "beta"] > 0
    rises = [fit_loss_nd(n, d, y, fixed={"beta": end}, alpha_equals_beta=True) for end in fit_loss_nd(
        n, d, y, alpha_equals_beta=True).intervals().loc["beta", ["low", "high"]]]  # fmt: skip
    tied = fit_loss_nd(n, d, y, alpha_equals_beta=True)
    for end in rises:  # the profile is what fits with the exponent fixed say
        limit = tied.sigma**2 * stats.f.ppf(0.95, 1, tied.dof)
        assert end.problem.fit.objective - tied.problem.fit.objective == pytest.approx(limit, rel=2e-3)


def test_restrictions_with_heads():
    rows = table(0.002)
    tied = fit_loss_nd_by_heads(rows, alpha_equals_beta=True)
    assert tied.status == "CONVERGED"
    assert len({*(law.alpha for law in tied.values()), *(law.beta for law in tied.values())}) == 1
    known = fit_loss_nd_by_heads(table(), fixed={"alpha": 0.348, "E": 1.82})
    assert known.dof == 54 - 5
    for heads, a in BY_HEADS.items():
        assert pytest.approx(a, rel=1e-6) == known[heads].A
        assert (known[heads].alpha, known[heads].E) == (0.348, 1.82)
    drawn = fit_loss_nd_by_heads(rows, fixed={"alpha": 0.348}).draws(40)
    assert (drawn.alpha_SxH == 0.348).all()
    for options in ({"alpha_equals_beta": True}, {"fixed": {"alpha": 0.3}}):
        with pytest.raises(ValueError, match="alpha_by_heads, but alpha is fixed or tied"):
            fit_loss_nd_by_heads(rows, alpha_by_heads=True, **options)
    with pytest.raises(ValueError, match=r"fixed\['A'\] = 400: each head configuration has an A of its own"):
        fit_loss_nd_by_heads(rows, fixed={"A": 400})


def test_what_is_fixed_takes_fewer_runs_and_values():
    n, d = np.array([1e8, 1e8, 4e8, 4e8]), np.array([2e9, 8e9, 2e9, 8e9])
    fit = fit_loss_nd(n, d, law(n, d), fixed={"alpha": TRUTH["alpha"], "beta": TRUTH["beta"]})
    assert pytest.approx([482.0, 2085.0, 1.82], rel=1e-6) == [fit.A, fit.B, fit.E]
    by_size = {"B": 2085.0, "beta": 0.366}
    n, d = np.array([1e8, 2e8, 4e8, 8e8]), 20 * np.array([1e8, 2e8, 4e8, 8e8])  # tokens may follow size then
    assert fit_loss_nd(n, d, law(n, d), fixed=by_size).alpha == pytest.approx(0.348, rel=1e-5)
    with pytest.raises(ValueError, match="2 different sizes: to fit E, A, alpha takes 3"):
        fit_loss_nd(np.resize(n[:2], 4), d, law(np.resize(n[:2], 4), d), fixed=by_size)
    with pytest.raises(ValueError, match=r"4 runs: L.N, D. has four free coefficients, it needs 5 runs"):
        fit_loss_nd(n, d, law(n, d), alpha_equals_beta=True)
    n, d = np.repeat([1e8, 4e8], 3), np.resize([2e9, 8e9], 6)
    with pytest.raises(ValueError, match="2 different sizes and 2 token counts: to fit A, B, E, alpha takes 5 of both"):
        fit_loss_nd(n, d, law(n, d), alpha_equals_beta=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"fixed": {"alhpa": 0.3}}, r"fixed\['alhpa'\]: L.N, D. has no such coefficient, did you mean 'alpha'"),
        ({"fixed": {"E": -0.1}}, r"fixed\['E'\] = -0.1: must be at least 0 and below the lowest loss, 2\."),
        ({"fixed": {"E": 9.0}}, "must be at least 0 and below the lowest loss"),
        ({"fixed": {"A": 0.0}}, r"fixed\['A'\] = 0.0: must be above 0 and finite"),
        ({"fixed": {"B": np.inf}}, r"fixed\['B'\] = inf: must be above 0 and finite"),
        ({"fixed": {"beta": 3.5}}, r"fixed\['beta'\] = 3.5: must be between 0.01 and 3.0"),
        ({"fixed": {"alpha": np.nan}}, r"fixed\['alpha'\] = nan"),
        ({"fixed": {"alpha": 0.3, "beta": 0.4}, "alpha_equals_beta": True}, "fixed alpha = 0.3 and beta = 0.4 differ"),
        ({"fixed": {"A": 4e2, "B": 2e3, "E": 1.8, "beta": 0.3}, "alpha_equals_beta": True}, "nothing is left to fit"),
    ],
)
def test_restrictions_that_cannot_be(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        fit_loss_nd(*chinchilla(), **options)


def test_with_heads_a_is_their_own():
    laws = fit_loss_nd_by_heads(table())
    assert list(laws) == [Heads(1, 1), Heads(8, 1), Heads(8, 8)]
    assert (laws.context, laws.head_dim, laws.vocab_size) == (8192, 64, 50_304)
    for heads, a in BY_HEADS.items():
        assert pytest.approx(a, rel=1e-6) == laws[heads].A
        for name in ("B", "E", "alpha", "beta"):
            assert getattr(laws[heads], name) == pytest.approx(TRUTH[name], rel=1e-6)
    own = fit_loss_nd_by_heads(table(), alpha_by_heads=True)
    assert own.dof == laws.dof - 2
    assert own[8, 1].alpha == pytest.approx(TRUTH["alpha"], rel=1e-6)


def test_with_heads_intervals_and_draws_hold_the_truth():
    laws = fit_loss_nd_by_heads(table(0.003, seed=1))
    frame = laws.intervals().set_index(["n_heads", "n_kv_heads", "coefficient"])
    for heads, a in BY_HEADS.items():
        for name, value in (TRUTH | {"A": a}).items():
            row = frame.loc[(*heads, name)]
            spread = row["high"] - row["low"]
            assert row["low"] - spread / 2 < value < row["high"] + spread / 2
    drawn = laws.draws(200)
    assert drawn.log_a_SxH.shape == (200, 3)
    difference = drawn.log_a_SxH[:, 0] - drawn.log_a_SxH[:, 2]  # what a comparison of heads rests on is known far better
    assert difference.std() < 0.3 * drawn.log_a_SxH[:, 0].std()
    assert difference.mean() == pytest.approx(np.log(560 / 482), abs=4 * difference.std())
    assert len(laws.residuals) == 54
    assert np.sum(laws.residuals["z"] ** 2) == pytest.approx(laws.dof)


def test_heads_that_follow_the_width_have_a_law_too():
    data = table().astype({"n_heads": "Int64"})
    data.loc[data["n_kv_heads"] == 8, "n_heads"] = pd.NA
    laws = fit_loss_nd_by_heads(data)
    assert pytest.approx(482, rel=1e-6) == laws[Heads(None, 8)].A
    assert laws.intervals()["n_heads"].isna().sum() == 5


def test_rows_that_are_no_results_are_left_out_and_said():
    n, d, y = chinchilla()
    fit = fit_loss_nd([*n, 1e9], [*d, 1e9], [*y, np.nan])
    assert fit.warnings == ("1 of 75 runs left out: they have no number",)
    assert pytest.approx(482, rel=1e-6) == fit.A
    data = table()
    bad = data.iloc[:3].assign(loss=[9.0, np.nan, 3.0], status=["diverged", "done", "done"], tokens=[1, 1, np.nan])
    laws = fit_loss_nd_by_heads(pd.concat([data, bad], ignore_index=True))
    assert pytest.approx(482, rel=1e-6) == laws[8, 8].A
    text = " ".join(laws.warnings)
    assert "their loss diverged" in text
    assert "their loss is no number" in text
    assert "1 of 55 runs left out: their tokens are not known" in text


def test_doubts_are_said():
    n, d, y = chinchilla(0.003)
    follow = 20 * n * np.random.default_rng(0).uniform(0.7, 1.4, n.size)
    text = " ".join(fit_loss_nd(n, follow, law(n, follow) * (y / law(n, d))).warnings)
    assert "A and B are hardly told apart" in text
    steep = fit_loss_nd(n, d, law(n, d, E=0.0))
    assert steep.status == "EDGE"
    assert "E at 0, its lower bound" in " ".join(steep.warnings)
    few = np.array([0, 12, 25, 40, 55, 70])
    assert any("E is known to" in w and "losses near it are guesses" in w for w in fit_loss_nd(n[few], d[few], y[few]).warnings)


def test_a_law_of_runs_at_all_learning_rates_is_called_poor():
    """A loss that depends on the learning rate more than on N and D."""
    n, d, y = (np.repeat(x, 12) for x in chinchilla(0.002))
    rates = np.tile(np.linspace(-2.5, 2.5, 12), len(n) // 12)
    fit = fit_loss_nd(n, d, y + 0.5 * rates**2 + 0.2 * rates)
    assert fit.r_squared < 0.4
    (said,) = (w for w in fit.warnings if w.startswith("poor law"))
    assert f"R^2 is {fit.r_squared:.3f}" in said
    assert "residuals of ln L are" in said
    assert "at the largest N by" in said
    assert "at the largest D by" in said


@pytest.mark.parametrize("scatter", [0.018, 0.004])
def test_raw_points_of_isoflop_profiles_are_called_poor_and_clean_ones_are_not(scatter):
    """They scatter by 1.6 to 2.2 percent: R^2 alone does not see it."""
    for seed in range(5):
        fit, laws = fit_loss_nd(*chinchilla(scatter, seed)), fit_loss_nd_by_heads(table(scatter, seed))
        assert fit.r_squared > 0.9
        for warnings in (fit.warnings, laws.warnings):
            assert any("poor law: residuals of ln L are" in w for w in warnings) == (scatter > 0.01)


def test_a_robust_fit_is_not_poor_for_one_run_that_is_off():
    n, d, y = chinchilla(0.001)
    y[5] *= 1.3
    assert any("poor law" in w for w in fit_loss_nd(n, d, y).warnings)
    assert not any("poor law" in w for w in fit_loss_nd(n, d, y, 1e-3).warnings)


def six(n=(1e8, 2e8, 4e8, 1e8, 2e8, 4e8), d=(2e9, 2e9, 3e9, 9e9, 8e9, 9e9)):
    n, d = np.array(n), np.array(d)
    return n, d, law(n, d)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([x[:5] for x in six()], "5 runs: L.N, D. has five coefficients, it needs 6"),
        (six(n=[1e8, 2e8] * 3), "2 different sizes: to fit E, A, alpha takes 3 or more"),
        (six(d=[1e9, 2e9] * 3), "2 different token counts: to fit E, B, beta takes 3 or more"),
        (six(n=[1e8, 2e8, 3e8, 4e8, 5e8, 6e8], d=[2e9, 4e9, 6e9, 8e9, 1e10, 1.2e10]), "tokens follow size in all runs"),
        ((*six()[:2], -six()[2]), "loss = -"),
        ((*six()[:2], np.full(6, np.inf)), "loss = inf: must be above 0 and finite"),
        ((six()[0], np.zeros(6), six()[2]), "tokens = 0"),
        ((*six()[:2], six()[2][:5]), "give lists of one length"),
        ((*six(), -1.0), "huber_delta = -1.0"),
        ((*chinchilla()[:2], 3.0 + 0 * chinchilla()[0]), "do not fall with"),
        ((*chinchilla()[:2], 1.8 + 2085 / chinchilla()[1] ** 0.366), "do not fall with size: the fit puts A at 0"),
        ((*chinchilla()[:2], 1.8 + 482 / chinchilla()[0] ** 0.348), "do not fall with tokens: the fit puts B at 0"),
    ],
)
def test_errors(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        fit_loss_nd(*arguments)


def test_errors_with_heads():
    data = table()
    with pytest.raises(ValueError, match="no column tokens"):
        fit_loss_nd_by_heads(data.drop(columns="tokens"))
    with pytest.raises(ValueError, match="one training context at a time"):
        fit_loss_nd_by_heads(pd.concat([data, data.assign(context=1024)]))
    one = pd.concat([data[data["n_heads"] == 8], data[(data["n_heads"] == 1) & (data["n_layers"] == 6)]])
    assert pytest.approx(560, rel=1e-5) == fit_loss_nd_by_heads(one)[1, 1].A
    with pytest.raises(ValueError, match=r"heads \(1,1\): one size has finished"):
        fit_loss_nd_by_heads(one, alpha_by_heads=True)
