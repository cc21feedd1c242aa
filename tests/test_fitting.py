"""The least-squares core: every status provoked, and every number against a closed form or scipy."""

import dataclasses

import numpy as np
import pytest
from scipy import optimize, stats

from gqa_jax.laws import fitting

X = np.linspace(-1.5, 1.5, 8)


def exponential(x):
    """E + exp(alpha - b x) of coefficients (E, alpha, b)."""

    def model(theta):
        value = np.exp(theta[..., 1:2] - theta[..., 2:3] * x)
        return value + theta[..., :1], np.stack([np.ones_like(value), value, -x * value], axis=-1)

    return model


def linear(columns):
    def model(theta):
        return theta @ columns.T, np.broadcast_to(columns, (*theta.shape[:-1], *columns.shape))

    return model


def problem(seed, noise=0.003):
    rng = np.random.default_rng(seed)
    theta = np.array([rng.uniform(1.0, 2.0), rng.normal(-0.3, 0.3), rng.uniform(0.2, 1.0)])
    return theta, exponential(X)(theta)[0] + noise * rng.normal(size=8)


# fit


def test_converged_where_the_start_is_the_minimum():
    theta, y = problem(0)
    start, _ = fitting.refit(exponential(X), y, theta)
    fit = fitting.fit(exponential(X), y, start)
    assert fit.status == "CONVERGED"
    assert fit.objective == pytest.approx(np.sum((exponential(X)(fit.theta)[0] - y) ** 2), rel=1e-12)
    value, jacobian = exponential(X)(fit.theta)
    assert np.abs(jacobian.T @ (value - y)).max() < 1e-6 * np.sqrt(fit.objective)
    assert fit.dof == 5
    assert fit.bound == ()


def test_disagree_where_the_polish_finds_less_than_the_start():
    theta, y = problem(0)
    fit = fitting.fit(exponential(X), y, theta + np.array([0.1, 0, 0]))
    assert fit.status == "DISAGREE"


def test_an_exact_fit_agrees_though_its_start_is_not_exact():
    theta, y = problem(0, noise=0.0)
    assert fitting.fit(exponential(X), y, theta * (1 + 1e-9)).status == "CONVERGED"


@pytest.mark.parametrize(("side", "at"), [("lower", 1.9), ("upper", 1.0)])
def test_bound_hit_names_the_coefficient_and_gives_it_no_variance(side, at):
    theta, y = np.array([1.5, -0.3, 0.5]), exponential(X)(np.array([1.5, -0.3, 0.5]))[0]
    limit = np.full(3, -np.inf if side == "lower" else np.inf)
    limit[0] = at
    start, _ = fitting.refit(exponential(X), y, np.array([at, *theta[1:]]), **{side: limit})
    fit = fitting.fit(exponential(X), y, start, **{side: limit})
    assert fit.status == "BOUND_HIT"
    assert fit.bound == (0,)
    assert fit.theta[0] == pytest.approx(at, abs=1e-9)
    assert not fit.covariance[0].any()
    assert fit.covariance[1, 1] > 0
    assert fit.dof == 6  # a coefficient that is held costs no degree of freedom


def test_bound_hit_where_no_coefficient_is_left():
    fit = fitting.fit(linear(np.ones((4, 1))), np.arange(4.0), np.array([0.5]), upper=np.array([0.5]))
    assert fit.status == "BOUND_HIT"
    assert fit.bound == (0,)
    assert fit.covariance == 0.0


def test_singular_where_the_data_do_not_tell_two_coefficients_apart():
    columns = np.stack([np.ones(8), X, 2 * X], axis=1)
    fit = fitting.fit(linear(columns), X + 1.0, np.array([1.0, 0.5, 0.25]))
    assert fit.status == "SINGULAR"
    assert np.isnan(fit.covariance).all()


def test_singular_where_a_coefficient_does_nothing():
    columns = np.stack([np.ones(8), np.zeros(8)], axis=1)
    assert fitting.fit(linear(columns), X, np.array([0.0, 0.0])).status == "SINGULAR"


def test_covariance_sigma_and_weights_are_those_of_linear_regression():
    rng = np.random.default_rng(1)
    columns, weights = np.stack([np.ones(20), rng.normal(size=20), rng.normal(size=20)], axis=1), rng.uniform(0.5, 2, 20)
    y = columns @ [1.0, 2.0, -1.0] + rng.normal(size=20) / np.sqrt(weights)
    inverse = np.linalg.inv(columns.T @ (weights[:, None] * columns))
    expected = inverse @ columns.T @ (weights * y)
    fit = fitting.fit(linear(columns), y, expected, weights=weights)
    sigma2 = np.sum(weights * (columns @ expected - y) ** 2) / 17
    assert fit.status == "CONVERGED"
    np.testing.assert_allclose(fit.theta, expected, rtol=1e-9)
    np.testing.assert_allclose(fit.covariance, sigma2 * inverse, rtol=1e-9)
    assert fit.sigma == pytest.approx(np.sqrt(sigma2), rel=1e-9)
    assert fit.dof == 17


def test_no_noise_is_known_without_degrees_of_freedom():
    _, y = problem(0)
    start, _ = fitting.refit(exponential(X[:3]), y[:3], np.array([1.0, 0.0, 0.5]))
    fit = fitting.fit(exponential(X[:3]), y[:3], start)
    assert fit.dof == 0
    assert np.isnan(fit.sigma)
    assert np.isnan(fit.covariance).all()


def test_huber_is_summed():
    """A mean instead of a sum would make the objective shrink with more points, and stop the search too early."""
    rng = np.random.default_rng(0)
    y = np.concatenate([rng.normal(size=40) * 0.01, [1.0, 1.5]])
    model, delta = linear(np.ones((42, 1))), 0.02

    def total(center):
        size = np.abs(y - center)
        return np.sum(np.where(size <= delta, size**2, 2 * delta * size - delta**2))

    fit = fitting.fit(model, y, np.array([0.01]), huber_delta=delta)
    best = optimize.minimize_scalar(total, bounds=(-0.1, 0.1), method="bounded", options={"xatol": 1e-12})
    assert fit.theta[0] == pytest.approx(best.x, abs=1e-7)
    assert fit.objective == pytest.approx(best.fun, rel=1e-12)
    twice = fitting.fit(linear(np.ones((84, 1))), np.tile(y, 2), np.array([0.01]), huber_delta=delta)
    assert twice.objective == pytest.approx(2 * fit.objective, rel=1e-9)
    assert abs(fit.theta[0]) < 0.01 < y.mean()  # outliers hardly matter
    np.testing.assert_allclose(fit.weights[-2:], delta / (y[-2:] - fit.theta[0]), rtol=1e-6)


def test_weights_count_in_hubers_residuals():
    y = np.array([0.0, 0.1, -0.1, 1.0])
    fit = fitting.fit(linear(np.ones((4, 1))), y, np.array([0.0]), weights=np.array([1.0, 1, 1, 0.01]), huber_delta=0.2)
    # The root of the weight makes the last residual 0.1: inside delta, so this is plain weighted least squares.
    assert fit.theta[0] == pytest.approx(0.01 / 3.01, abs=1e-8)
    assert fit.weights[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_data_that_are_not_finite_are_refused(wrong):
    theta, y = problem(0)
    with pytest.raises(ValueError, match="must be finite"):
        fitting.fit(exponential(X), np.where(X < -1, wrong, y), theta)
    with pytest.raises(ValueError, match="must be finite"):
        fitting.fit(exponential(X), y, theta, weights=np.where(X < -1, wrong, 1.0))


# refit


def test_refit_reaches_scipys_minimum_on_fifty_problems_at_once():
    pairs = [problem(seed, noise=0.01) for seed in range(50)]
    y = np.stack([y for _, y in pairs])
    weights = np.random.default_rng(9).uniform(0.3, 3, y.shape)
    theta, squares = fitting.refit(exponential(X), y, np.array([1.0, 0.0, 0.5]), weights=weights)
    for found, total, losses, w in zip(theta, squares, y, weights, strict=True):
        root, model = np.sqrt(w), exponential(X)
        best = optimize.least_squares(
            lambda t: root * (model(t)[0] - losses),  # noqa: B023
            found + 0.02,
            jac=lambda t: root[:, None] * model(t)[1],  # noqa: B023
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
        )
        assert total == pytest.approx(2 * best.cost, rel=1e-9)
        np.testing.assert_allclose(model(found)[0], model(best.x)[0], atol=1e-7)


def test_refit_reaches_scipys_minimum_at_bounds():
    """E may not be above 1.2 nor b below 0.4: about half of the problems end at one or both."""
    lower, upper = np.array([0.0, -np.inf, 0.4]), np.array([1.2, np.inf, 3.0])
    y = np.stack([problem(seed, noise=0.01)[1] for seed in range(50)])
    theta, squares = fitting.refit(exponential(X), y, np.array([1.0, 0.0, 0.6]), lower=lower, upper=upper)
    assert (theta >= lower).all()
    assert (theta <= upper).all()
    at_bound = (theta[:, 0] == 1.2) | (theta[:, 2] == 0.4)
    assert 10 < at_bound.sum() < 50
    for found, total, losses in zip(theta, squares, y, strict=True):
        best = optimize.least_squares(
            lambda t: exponential(X)(t)[0] - losses,  # noqa: B023
            np.clip(found, lower + 0.01, upper - 0.01),
            jac=lambda t: exponential(X)(t)[1],
            bounds=(lower, upper),
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
            max_nfev=5000,
        )
        assert total <= 2 * best.cost * (1 + 1e-9)
        assert total == pytest.approx(2 * best.cost, rel=1e-5)  # scipy's keeps inside the bounds


def test_padding_of_weight_zero_changes_nothing():
    theta, y = problem(3)
    padded = np.append(y, 99.0)
    plain, squares = fitting.refit(exponential(X), y, theta)
    with_padding, same = fitting.refit(exponential(np.append(X, 0.0)), padded, theta, weights=np.append(np.ones(8), 0.0))
    np.testing.assert_allclose(with_padding, plain, rtol=1e-7)
    assert same == pytest.approx(squares, rel=1e-10)


def test_refits_do_not_depend_on_each_other():
    y = np.stack([problem(seed, noise=0.02)[1] for seed in range(6)])
    start = np.array([1.0, 0.0, 0.5])
    together, _ = fitting.refit(exponential(X), y, start)
    alone = np.stack([fitting.refit(exponential(X), one, start)[0] for one in y])
    np.testing.assert_allclose(together, alone, rtol=1e-6)


def test_a_problem_at_its_minimum_stops_at_once():
    """After its last steps, whose sums change by rounding only: damping that climbed for it made draws three times slower."""
    calls = []
    model = exponential(X)
    theta, y = problem(5)
    best, _ = fitting.refit(model, y, theta)

    def counted(coefficients):
        calls.append(1)
        return model(coefficients)

    fitting.refit(counted, np.tile(y, (20, 1)), best)
    assert len(calls) <= 6


def test_the_end_does_not_depend_on_the_start():
    """To 1e-9, also where sums of squares show less: so answers are the same on every machine."""
    model = exponential(X)
    theta, y = problem(5, noise=0.1)
    starts = theta * (1 + np.array([[0.0], [1e-3], [-3e-3], [0.01]]))
    ends, _ = fitting.refit(model, np.tile(y, (4, 1)), starts)
    np.testing.assert_allclose(ends, np.tile(ends[0], (4, 1)), rtol=1e-9)
    np.testing.assert_allclose(fitting.fit(model, y, starts[2]).theta, ends[0], rtol=1e-9)


@pytest.mark.parametrize("delta", [0.002, 0.02])
def test_refit_of_a_huberised_law_reaches_the_minimum_of_fit(delta):
    theta, y = problem(2, noise=0.01)
    y[3] += 0.3
    weights = np.append(np.random.default_rng(1).uniform(0.3, 3, 8), 0.0)  # the last is padding
    model, losses = exponential(np.append(X, 0.0)), np.append(y, 99.0)
    robust = fitting.huberised(model, losses, delta, weights)
    start, total = fitting.refit(robust, losses, theta, weights=weights, iterations=1000)
    fit = fitting.fit(exponential(X), y, start, weights=weights[:8], huber_delta=delta)
    assert fit.status == "CONVERGED"
    assert total == pytest.approx(fit.objective, rel=1e-8)
    step = 1e-6
    numeric = [(robust(theta + step * e)[0] - robust(theta - step * e)[0]) / (2 * step) for e in np.eye(3)]
    np.testing.assert_allclose(robust(theta)[1], np.transpose(numeric), atol=1e-5)


# r_squared, poor


def test_r_squared_is_about_the_mean_of_each_group():
    loss, group = np.array([3.0, 2.0, 13.0, 12.0]), np.array([0, 0, 1, 1])
    fitted = loss + np.array([0.1, -0.1, 0.3, -0.3])
    assert fitting.r_squared(loss, fitted) == pytest.approx(1 - 0.2 / 101)
    assert fitting.r_squared(loss, fitted, group) == pytest.approx(1 - 0.2)
    assert fitting.r_squared(loss, fitted, group, np.array([1.0, 1, 0.1, 0.1])) == pytest.approx(1 - 0.038 / 0.55)
    assert np.isnan(fitting.r_squared(np.ones(3), np.ones(3)))


def test_a_poor_law_says_what_is_poor_and_how_far_the_largest_runs_are_missed():
    size, loss = np.tile(np.arange(1.0, 6), 4), 3 - 0.2 * np.tile(np.arange(5), 4)
    off = np.where(size == 5, 0.07, 0.0) + 0.03 * np.tile([1.0, -1], 10)
    (said,) = fitting.poor(loss + off, loss, {"N": size}, dof=18)
    sigma = np.sqrt(np.sum(off**2) / 18)
    assert said.startswith(f"poor law: residuals of ln L are {np.sqrt(np.mean(np.log1p(off / loss) ** 2)):.1%} (root mean")
    assert said.endswith(f"at the largest N by +0.0700 nats ({0.07 / sigma * 2:+.1f} standard errors)")
    assert fitting.poor(loss + off / 3, loss, {"N": size}, dof=18) == []
    (said,) = fitting.poor(2.7 + (loss - 2.7) / 50 + off / 10, 2.7 + (loss - 2.7) / 50, {"N": size, "D": size}, dof=18)
    assert said.startswith("poor law: R^2 is 0.")
    assert " ln L are" not in said
    assert "at the largest D by +0.0070 nats" in said
    weights = np.where(size == 5, 1e-9, 1.0)
    assert fitting.poor(loss + 20 * off * (size == 5), loss, {"N": size}, dof=18, weights=weights) == []


# noise, threshold, crossings


def test_noise_of_a_known_sigma_is_normal():
    drawn = fitting.noise(0.5, np.inf, (20_000, 3), np.random.default_rng(0))
    assert drawn.std() == pytest.approx(0.5, rel=0.01)
    assert stats.kurtosis(drawn.ravel()) == pytest.approx(0.0, abs=0.1)


def test_noise_of_few_degrees_of_freedom_is_students_and_common_to_a_draw():
    drawn = fitting.noise(0.5, 5, (20_000, 4), np.random.default_rng(0))
    assert stats.kstest(drawn[:, 0] / 0.5, stats.t(5).cdf).pvalue > 0.01
    size = np.log(np.abs(drawn))
    assert np.corrcoef(size[:, 0], size[:, 1])[0, 1] > 0.05  # each draw has a scale of its own
    again = fitting.noise(0.5, 5, (20_000, 4), np.random.default_rng(0))
    np.testing.assert_array_equal(drawn, again)


def test_threshold_is_fs_or_chi_squares():
    assert fitting.threshold(0.1, 10, 0.95) == pytest.approx(0.01 * stats.t.ppf(0.975, 10) ** 2)
    assert fitting.threshold(0.1, np.inf, 0.95) == pytest.approx(0.01 * stats.norm.ppf(0.975) ** 2)


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_crossings_of_a_parabola_are_exact_on_both_sides(scale):
    low, high = fitting.crossings(lambda v: (v - 2.0) ** 2 / 0.25, 2.0, scale, 3.84)
    np.testing.assert_allclose([low, high], 2.0 + np.array([-1, 1]) * 0.5 * np.sqrt(3.84), rtol=1e-9)


def test_crossings_of_a_lopsided_profile():
    low, high = fitting.crossings(lambda v: np.expm1(np.minimum(v, 50.0)) ** 2, 0.0, 0.3, 0.25)
    assert low == pytest.approx(np.log(0.5), abs=2e-3)
    assert high == pytest.approx(np.log(1.5), abs=2e-3)


def test_crossings_that_never_come_are_infinite():
    low, high = fitting.crossings(lambda v: np.where(v > 0, 0.0, v**2), 0.0, 0.5, 1.0)
    assert low == pytest.approx(-1.0, abs=1e-9)
    assert high == np.inf
    assert fitting.crossings(lambda v: 1.0 - np.exp(-(v**2)), 0.0, 0.5, 1.5) == (-np.inf, np.inf)


def test_crossings_into_what_is_not_possible_end_there():
    """A statistic of inf or nan counts as above: an interval ends where the quantity can't be."""
    for wall in (np.inf, np.nan):
        low, high = fitting.crossings(lambda v: np.where(v > 0.3, wall, v**2), 0.0, 0.5, 1.0)  # noqa: B023
        assert low == pytest.approx(-1.0, abs=1e-9)
        assert high == pytest.approx(0.3, abs=0.01)


# What all families of laws ask of the engine


def regression(seed=0, n=20):
    rng = np.random.default_rng(seed)
    columns = np.stack([np.ones(n), rng.normal(size=n), rng.normal(size=n)], axis=1)
    y = columns @ [1.0, 2.0, -1.0] + 0.1 * rng.normal(size=n)
    return linear(columns), y, fitting.fit(linear(columns), y, np.linalg.lstsq(columns, y)[0])


def test_profiles_of_a_linear_law_are_students_intervals():
    model, y, fit = regression()
    free = np.full(3, np.inf)
    for i in range(3):
        low, high = fitting.profile(model, y, fit, i, 0.95, -free, free)
        half = stats.t.ppf(0.975, 17) * np.sqrt(fit.covariance[i, i])
        np.testing.assert_allclose([low, high], fit.theta[i] + np.array([-half, half]), rtol=1e-6)
    upper = np.array([np.inf, fit.theta[1] + 1e-3, np.inf])
    _, high = fitting.profile(model, y, fit, 1, 0.95, -free, upper)
    assert upper[1] - 2e-4 < high <= upper[1]


def test_a_profile_starts_without_a_covariance_too():
    model, y, fit = regression()
    free = np.full(3, np.inf)
    for unknown in (np.full((3, 3), np.nan), np.zeros((3, 3))):
        low, high = fitting.profile(model, y, dataclasses.replace(fit, inverse=unknown), 2, 0.95, -free, free)
        half = stats.t.ppf(0.975, 17) * np.sqrt(fit.covariance[2, 2])
        np.testing.assert_allclose([low, high], fit.theta[2] + np.array([-half, half]), rtol=1e-3)


def test_an_interval_asks_for_nothing_beyond_its_bounds():
    asked = []

    def rise(values):
        asked.extend(values)
        return values**2

    assert fitting.interval(rise, 0.0, 0.3, 1.0, -0.5, 4.0) == pytest.approx((-0.5, 1.0), rel=2e-3)
    assert (min(asked), max(asked)) == (-0.5, 4.0)
    assert fitting.interval(np.zeros_like, 0.0, 0.3, 1.0, -1e6, 1e6) == (-1e6, 1e6)  # where nothing rises


def test_a_bootstrap_scatters_as_the_coefficients_do():
    model, _, fit = regression()
    sizes = []

    def again(y):
        sizes.append(len(y))
        return fitting.refit(model, y, fit.theta)[0]

    drawn = fitting.bootstrap(model(fit.theta)[0], dataclasses.replace(fit, dof=np.inf), 2050, np.random.default_rng(0), again)
    assert sizes == [100] * 20 + [50]
    np.testing.assert_allclose(drawn.mean(0), fit.theta, atol=4 * np.sqrt(np.diag(fit.covariance).max() / 2050))
    np.testing.assert_allclose(np.diag(np.cov(drawn.T)), np.diag(fit.covariance), rtol=0.15)
    low, high = fitting.percentiles(drawn, 0.95)
    np.testing.assert_allclose(high - low, 2 * 1.96 * np.sqrt(np.diag(fit.covariance)), rtol=0.1)


def test_the_spread_of_runs_beside_their_standard_errors_is_found():
    rng = np.random.default_rng(0)
    sem = rng.uniform(0.5, 3, 4000)
    squares = (np.hypot(2.0, sem) * rng.normal(size=4000)) ** 2
    tau2 = fitting.between_runs(squares, sem**2, 4000)
    assert tau2 == pytest.approx(4.0, rel=0.1)
    assert np.sum(squares / (tau2 + sem**2)) == pytest.approx(4000, rel=1e-9)
    assert fitting.between_runs(0.9 * sem**2, sem**2, 4000) == 0.0


def test_statuses_sigmas_and_residuals_of_several_fits():
    assert fitting.worst(["CONVERGED", "BOUND_HIT", "EDGE"]) == "BOUND_HIT"
    assert fitting.worst(fitting.STATUSES) == "SINGULAR"
    assert fitting.pooled([(0.1, 3), (np.nan, 0), (0.3, 1)]) == pytest.approx(np.sqrt((3 * 0.01 + 0.09) / 4))
    assert np.isnan(fitting.pooled([(np.nan, 0)]))
    columns = fitting.residual_columns(np.array([3.0, 2.0]), np.array([2.9, 2.2]), np.array([0.1, 0.0]))
    np.testing.assert_allclose(columns["residual"], [0.1, -0.2])
    np.testing.assert_allclose(columns["z"], [1.0, np.nan])


def test_what_all_losses_have_in_common_widens_an_interval_down_to_its_bound():
    shared = fitting.SharedError(0.3, np.inf)
    low, high = shared.widened(1.0, (0.6, 1.2), 0.95)
    reach = 1.959964 * 0.3
    assert (low, high) == pytest.approx((1 - np.hypot(0.4, reach), 1 + np.hypot(0.2, reach)), rel=1e-6)
    assert shared.widened(1.0, (0.6, 1.2), 0.95, 0.5) == (0.5, high)
    assert fitting.SharedError(np.nan).widened(1.0, (0.6, 1.2), 0.95) == (0.6, 1.2)


def test_what_is_said_of_a_floor():
    words = ("larger models", "the sizes", "answers rest on it")
    assert fitting.floor(1.9, 2.5, (1.8, 2.0), words) == []
    assert fitting.floor(1.9, 2.5, (np.nan, np.nan), words) == []
    assert fitting.floor(1e-4, 2.5, (0, 0.1), words) == [
        "the fit puts E at 0, its lower bound: larger models are needed to see it"
    ]
    assert fitting.floor(2.4999, 2.5, (2.4, 2.5), words, "c") == [
        "the fit puts c at the lowest loss: it can't be used beyond the sizes"
    ]
    (said,) = fitting.floor(1.9, 2.5, (1.5, 2.1), words)
    assert said == "E is known to 0.60 nats only (1.50 to 2.10, 95%): answers rest on it"


def test_what_is_given_is_checked():
    fitting.require(2.5, 0.0, 1e-3)
    for given, sentence in ((2.5, "entropy = 2.5: must be at least 0 and below the lowest loss, 2.5000"), (-1, "entropy = -1")):
        with pytest.raises(ValueError, match=sentence):
            fitting.require(2.5, given)
    for delta in (0, 1e-300, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"huber_delta = {delta}: must be above 0"):
            fitting.require(2.5, huber_delta=delta)
