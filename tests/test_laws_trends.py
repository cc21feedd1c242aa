import numpy as np
import pytest

from gqa_jax.laws.trends import fit_power

X = np.array([8192.0, 16384, 32768, 65536, 131072])


def noisy(seed, sigma=0.05, a=300.0, b=-0.4):
    return a * X**b * np.exp(sigma * np.random.default_rng(seed).normal(size=X.size))


def test_an_exact_power_law_is_recovered():
    trend = fit_power(X, 300 * X**-0.4)
    assert trend.a == pytest.approx(300, rel=1e-10)
    assert trend.b == pytest.approx(-0.4, rel=1e-12)
    assert trend.r_squared == pytest.approx(1)
    assert trend.sigma < 1e-12
    assert trend.predict(10_000) == pytest.approx(300 * 10_000**-0.4)


def test_agrees_with_numpys_least_squares_and_covariance():
    y = noisy(1)
    trend = fit_power(X, y)
    coefficients, covariance = np.polyfit(np.log(X), np.log(y), 1, cov=True)
    assert [trend.b, np.log(trend.a)] == pytest.approx(coefficients, rel=1e-9)
    assert trend.covariance[::-1, ::-1] == pytest.approx(covariance, rel=1e-9)
    assert trend.dof == 3
    assert trend.residuals == pytest.approx(np.log(y) - np.polyval(coefficients, np.log(X)), abs=1e-9)


def test_intervals_and_bands_cover_as_often_as_they_say():
    """400 seeded tables: the standard error of a coverage of 95% is 1.1%."""
    inside = np.zeros(3)
    for seed in range(400):
        trend = fit_power(X, noisy(seed))
        intervals = trend.intervals()
        low, high = trend.band(np.array([200_000.0]))
        inside += [
            intervals.low["a"] <= 300 <= intervals.high["a"],
            intervals.low["b"] <= -0.4 <= intervals.high["b"],
            low[0] <= 300 * 200_000**-0.4 <= high[0],
        ]
    assert inside / 400 == pytest.approx(0.95, abs=0.035)


def test_p_value_is_that_of_a_correlation():
    from scipy import stats

    y = noisy(3, sigma=1.0)
    assert fit_power(X, y).p_value == pytest.approx(stats.linregress(np.log(X), np.log(y)).pvalue, rel=1e-9)


def test_a_wider_level_gives_wider_intervals():
    trend = fit_power(X, noisy(2))
    assert (trend.intervals(0.99).high > trend.intervals(0.9).high).all()


def test_nan_points_are_left_out_and_said():
    trend = fit_power([*X, 1.0], [*noisy(0), np.nan])
    assert "1 of 6 points left out" in trend.warnings[0]
    assert trend.b == fit_power(X, noisy(0)).b
    assert "1 degrees of freedom" in fit_power(X[:3], noisy(0)[:3]).warnings[0]


@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        ([1, 2], [1, 2], "2 points: a power law with confidence needs 3"),
        ([1, 2, 3], [1, 0, 2], "y = 0: a power law is of numbers above 0"),
        ([1, -2, 3], [1, 1, 2], "x = -2"),
        ([1, 2, 3], [1, np.inf, 2], "y = inf"),
        ([2, 2, 2], [1, 3, 2], "every x is 2"),
        ([1, 2, 3], [1, 2], "one length"),
    ],
)
def test_errors(x, y, sentence):
    with pytest.raises(ValueError, match=sentence):
        fit_power(x, y)
