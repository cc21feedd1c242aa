"""How a law may leave the power law: bends of ln(L - E) against ln N that all head configurations of a context share.

    ln(L - E) = b (ln a - ln N) - q(ln N)

drift   q = amount x^2, x = ln(N / center): the exponent changes evenly with ln N (log-quadratic), by 2 amount per e-fold.
        Beyond |x| = reach it stays as it is there: a parabola turns round.
break   q = amount / 2 ln(1 + exp(2 (x - place))): the exponent changes by `amount` over about two e-folds at `place` (the
        smoothly broken power law of Caballero et al. 2023, arXiv 2210.14891, Eq. 1, with one break and a width of 1/2).
"""

from __future__ import annotations

import dataclasses

import numpy as np

NONE, DRIFT, BREAK = 0, 1, 2
NAMES = ("none", "drift", "break")
_LEAST_SLOPE = 0.01  # of a law that falls everywhere
_STEPS = 60  # of Newton's method, which needs 5 or so


def shape(x: np.ndarray, kind: int, place: float, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """q of amount 1 and its derivative at x = ln(N / center); broadcasts over `x`."""
    x = np.asarray(x, np.float64)
    if kind == DRIFT:
        inside = np.clip(x, -reach, reach)
        return x**2 - (x - inside) ** 2, 2 * inside
    if kind == BREAK:
        return np.logaddexp(0.0, 2 * (x - place)) / 2, 1 / (1 + np.exp(np.clip(-2 * (x - place), -700, 700)))
    return np.zeros_like(x), np.zeros_like(x)


@dataclasses.dataclass(frozen=True)
class Bends:
    """A bend in each of S draws. Laws with them fall everywhere (`falls`), so that N* is one number."""

    center: float  # N0, parameters
    reach: float  # of x, where a drift ends
    kind_S: np.ndarray  # NONE, DRIFT or BREAK
    amount_S: np.ndarray
    place_S: np.ndarray  # of a break, as x

    def at(self, log_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """q and dq / d ln N at ln N (S, ...), or at one (...) for all draws: both (S, ...)."""
        x = np.asarray(log_n, np.float64) - np.log(self.center)
        tail = (1,) * (x.ndim - 1)
        x = np.broadcast_to(x, (len(self.kind_S), *x.shape[1:]))
        kind, amount, place = (v.reshape(-1, *tail) for v in (self.kind_S, self.amount_S, self.place_S))
        of_drift, of_break = shape(x, DRIFT, 0.0, self.reach), shape(x, BREAK, place, self.reach)
        return tuple(
            np.where(kind == DRIFT, amount * d, np.where(kind == BREAK, amount * k, 0.0))
            for d, k in zip(of_drift, of_break, strict=True)
        )

    @property
    def least_b_S(self) -> np.ndarray:
        """What the exponents b of a draw must be above, so that its laws fall with size everywhere."""
        less_S = np.where(self.kind_S == DRIFT, 2 * np.abs(self.amount_S) * self.reach, np.maximum(-self.amount_S, 0.0))
        return np.where(self.kind_S == NONE, 0.0, less_S) + _LEAST_SLOPE

    def falls(self, b_SxH: np.ndarray) -> np.ndarray:
        """Whether the laws of a draw (S,), with these exponents, fall with size everywhere."""
        return b_SxH.min(1) > self.least_b_S

    def log_size(self, log_n_SxH: np.ndarray, b_SxH: np.ndarray) -> np.ndarray:
        """ln N at which the bent laws reach what the unbent ones reach at `log_n_SxH`; infinite stays infinite.

        Newton's method: the laws fall everywhere and are convex or concave, so it converges from anywhere.
        """
        finite = np.isfinite(log_n_SxH)
        goal = np.where(finite, log_n_SxH, np.log(self.center))
        found = goal
        for _ in range(_STEPS):
            q, slope = self.at(found)
            step = (b_SxH * (goal - found) - q) / (b_SxH + slope)
            found = found + step
            if np.abs(step).max(initial=0.0) < 1e-12 * (1 + np.abs(found).max(initial=0.0)):
                break
        return np.where(finite, found, log_n_SxH)
