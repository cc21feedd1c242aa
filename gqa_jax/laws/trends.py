"""Trends y = a x^b with confidence, such as the optimal number of heads against T, or N* against the loss that is left.

ln y = ln a + b ln x + noise, ordinary least squares: the textbook's intervals are exact there, if runs scatter by a factor
(Draper and Smith, Applied Regression Analysis, chapter 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from gqa_jax.laws import fitting

MIN_POINTS = 3


@dataclass(frozen=True)
class PowerTrend:
    """y = a x^b. Made by `fit_power`."""

    a: float  # in units of y / x^b
    b: float
    r_squared: float  # of ln y
    sigma: float  # standard deviation of ln y about the line: 0.01 is 1 percent
    dof: int
    covariance: np.ndarray  # (2, 2) of (ln a, b)
    p_value: float  # of b = 0, two-sided: how often noise alone would show such a slope
    x: np.ndarray  # of the points
    y: np.ndarray  # of the points
    warnings: tuple[str, ...] = ()

    def predict(self, x: float | np.ndarray) -> float | np.ndarray:
        """y at x."""
        return self.a * np.asarray(x, np.float64)[()] ** self.b

    @property
    def residuals(self) -> np.ndarray:
        """ln of measured over fitted y of the points."""
        return np.log(self.y) - np.log(self.predict(self.x))

    def intervals(self, level: float = 0.95) -> pd.DataFrame:
        """Confidence intervals by Student's t: rows a and b, columns value, low, high."""
        reach = self._quantile(level) * np.sqrt(np.diag(self.covariance))
        return pd.DataFrame(
            {
                "value": [self.a, self.b],
                "low": [self.a * np.exp(-reach[0]), self.b - reach[1]],
                "high": [self.a * np.exp(reach[0]), self.b + reach[1]],
            },
            index=["a", "b"],
        )

    def band(self, x: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Confidence interval of the curve at each x."""
        x = np.atleast_1d(np.asarray(x, np.float64))
        row_Xx2 = np.stack([np.ones_like(x), np.log(x)], axis=-1)
        error = np.sqrt(np.einsum("xi,ij,xj->x", row_Xx2, self.covariance, row_Xx2))
        factor = np.exp(self._quantile(level) * error)
        return self.predict(x) / factor, self.predict(x) * factor

    def _quantile(self, level: float) -> float:
        return float(stats.t.ppf((1 + level) / 2, self.dof))


def fit_power(x: np.ndarray, y: np.ndarray) -> PowerTrend:
    """y = a x^b by ordinary least squares of ln y on ln x.

    Args:
      x, y: (M,), above 0; points that are nan are left out, and said in `warnings`.

    Raises:
      ValueError: fewer than three points, one x only, values that are not above 0 or not finite, arrays of different lengths.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"x and y have shapes {x.shape} and {y.shape}: give two lists of one length")
    known = ~(np.isnan(x) | np.isnan(y))
    warnings = [] if known.all() else [f"{int((~known).sum())} of {known.size} points left out: they are nan"]
    x, y = x[known], y[known]
    for name, values in (("x", x), ("y", y)):
        if (bad := values[~((values > 0) & np.isfinite(values))]).size:
            raise ValueError(f"{name} = {bad[0]:g}: a power law is of numbers above 0, finite ones")
    if x.size < MIN_POINTS:
        raise ValueError(f"{x.size} points: a power law with confidence needs {MIN_POINTS} or more")
    if np.ptp(np.log(x)) < 1e-9:
        raise ValueError(f"every x is {x[0]:g}: a power law needs two or more")
    if x.size < 5:
        warnings.append(
            f"{x.size} points: the intervals are wide because the noise is known from {x.size - 2} degrees of freedom"
        )
    middle = np.mean(np.log(x))
    u, v = np.log(x) - middle, np.log(y)
    b = float(u @ v / (u @ u))
    height = float(np.mean(v))
    dof = x.size - 2
    fitted = height + b * u
    sigma = np.sqrt(float(np.sum((v - fitted) ** 2)) / dof)
    share = fitting.r_squared(v, fitted)
    warnings += [f"poor law: {reason}" for reason in fitting.not_explained(share, "R^2 of ln y")]
    variance_b = sigma**2 / (u @ u)
    covariance = np.array(
        [[sigma**2 / x.size + middle**2 * variance_b, -middle * variance_b], [-middle * variance_b, variance_b]]
    )
    p_value = float(2 * stats.t.sf(abs(b) / np.sqrt(variance_b), dof)) if variance_b > 0 else float(b == 0)
    return PowerTrend(
        a=float(np.exp(height - b * middle)),
        b=b,
        r_squared=share,
        sigma=float(sigma),
        dof=dof,
        covariance=covariance,
        p_value=p_value,
        x=x,
        y=y,
        warnings=tuple(warnings),
    )
