"""Nonlinear least squares for laws: one fit that says whether it can be trusted, and thousands of refits at once.

`fit` polishes a start that some other route has found, and compares: an optimizer's own "success" proves nothing. `refit` is
Levenberg and Marquardt's method on arrays of problems, in float64. What every law needs of them is here too: `profile` and
`interval` (likelihood), `bootstrap`, `noise`, and what is said of a law that is not to be trusted (`poor`, `doubts`, `floor`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from scipy import optimize, stats

#: A law: coefficients (..., P) -> predictions (..., N) and their derivatives (..., N, P).
Model = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

STATUSES = ("CONVERGED", "EDGE", "BOUND_HIT", "DISAGREE", "SINGULAR")  # from the best to the worst
WIDE = 0.3  # nats per token: an interval of E beyond it decides the answers at low losses

_AGREE = 1e-6  # relative difference of the objectives of two routes to the same minimum
_NEAR_BOUND = 1e-9
POOR_R_SQUARED, POOR_RESIDUALS = 0.9, 0.01  # of ln L
_MOST_DAMPING = 1e12
_LAST_STEPS = 3  # whose effect a sum of squares does not show: each brings coefficients some ten times closer to their end
_PART = 100  # draws that are refitted at a time
_SINGULAR = 1e14  # condition number of the scaled Jacobian's square above which coefficients are not determined


@dataclasses.dataclass(frozen=True)
class Fit:
    """A minimum of sum(weights * rho(residuals)) and how well it is determined."""

    theta: np.ndarray  # (P,)
    status: str  # CONVERGED; DISAGREE: start and polish differ; BOUND_HIT: a coefficient is at a bound; SINGULAR
    objective: float  # of least squares: the weighted sum of squares
    inverse: np.ndarray  # (P, P) of the information: the covariance for sigma = 1; nan where SINGULAR, 0 at a bound
    sigma: float  # standard deviation of a residual of unit weight; nan without degrees of freedom
    dof: int
    weights: np.ndarray  # (N,) those of the last iteration, Huber's included
    bound: tuple[int, ...] = ()  # coefficients at a bound

    @property
    def covariance(self) -> np.ndarray:
        """(P, P) of the coefficients, linearised; nan without degrees of freedom."""
        return self.sigma**2 * self.inverse


def fit(
    model: Model,
    y: np.ndarray,
    start: np.ndarray,
    *,
    lower: np.ndarray | float = -np.inf,
    upper: np.ndarray | float = np.inf,
    weights: np.ndarray | None = None,
    huber_delta: float | None = None,
) -> Fit:
    """Polishes `start` with `scipy.optimize.least_squares` and says what kind of a minimum it is.

    Args:
      y: (N,) what is fitted. `weights`: (N,), default 1.
      start: (P,) from a global search; the result is DISAGREE when the polish finds a minimum that is not the same (relative
        difference of the objectives above 1e-6).
      huber_delta: residuals (times the root of their weight) beyond it count linearly (summed, not averaged).

    Raises:
      ValueError: data that are not finite.
    """
    y = np.asarray(y, np.float64)
    weights = np.ones_like(y) if weights is None else np.asarray(weights, np.float64)
    if not (np.isfinite(y).all() and np.isfinite(weights).all()):
        raise ValueError("losses and weights must be finite: leave out what is not")
    start = np.asarray(start, np.float64)
    lower, upper = np.broadcast_to(lower, start.shape), np.broadcast_to(upper, start.shape)
    root = np.sqrt(weights)
    gap = np.where(np.isfinite(lower) & np.isfinite(upper), upper - lower, 1.0)
    inside = np.clip(start, lower + 1e-12 * gap, upper - 1e-12 * gap)
    huber = {} if huber_delta is None else {"loss": "huber", "f_scale": huber_delta}
    found = optimize.least_squares(
        lambda theta: root * (model(theta)[0] - y),
        inside,
        jac=lambda theta: root[:, None] * model(theta)[1],
        bounds=(lower, upper),
        x_scale="jac",
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
        max_nfev=2000,
        **huber,
    )
    # It ends somewhere within 1e-7 of the minimum, by chance of the last bits: so the last steps are `refit`'s.
    same = model if huber_delta is None else huberised(model, y, huber_delta, weights)
    theta, _ = refit(same, y, found.x, lower=lower, upper=upper, weights=weights)
    value, jacobian = model(theta)
    residual = root * (value - y)
    final = weights if huber_delta is None else weights / np.maximum(np.abs(residual) / huber_delta, 1.0)
    free = ~((theta <= lower + _NEAR_BOUND * gap) | (theta >= upper - _NEAR_BOUND * gap))
    objective, begun = (float(np.sum(rho(root * (model(at)[0] - y), huber_delta))) for at in (theta, inside))
    inverse = _inverse(jacobian, final, free)
    dof = y.size - int(free.sum())
    sigma = float(np.sqrt(np.sum(final * (value - y) ** 2) / dof)) if dof > 0 else np.nan
    small = 1e-14 * float(np.sum(weights * y**2))  # an exact fit: rounding is all that is left
    status = "CONVERGED"
    if np.isnan(inverse).any():
        status = "SINGULAR"
    elif not free.all():
        status = "BOUND_HIT"
    elif abs(begun - objective) > _AGREE * max(objective, begun) + small:
        status = "DISAGREE"
    bound = tuple(int(i) for i in np.flatnonzero(~free))
    return Fit(theta, status, objective, inverse, sigma, dof, final, bound)


def worst(statuses: Iterable[str]) -> str:
    """The worst of `STATUSES` among them."""
    return max(statuses, key=STATUSES.index)


def require(lowest: float, entropy: float | None = None, huber_delta: float | None = None, symbol: str = "entropy") -> None:
    """Raises ValueError for a given E (or c: `symbol`) that is not below the lowest loss, and a delta out of its bounds."""
    if entropy is not None and not 0 <= entropy < lowest:
        raise ValueError(f"{symbol} = {entropy}: must be at least 0 and below the lowest loss, {lowest:.4f}")
    if huber_delta is not None and not 1e-9 <= huber_delta <= 1e9:  # squares of what is left are numbers still
        raise ValueError(f"huber_delta = {huber_delta}: must be above 0, 1e-9 to 1e9 nats (of ln L: 1e-3 is Chinchilla's)")


def rho(residual: np.ndarray, delta: float | None) -> np.ndarray:
    """Squares, or Huber's function on the same scale."""
    if delta is None:
        return residual**2
    size = np.abs(residual)
    return np.where(size <= delta, residual**2, 2 * delta * size - delta**2)


def huberised(model: Model, y: np.ndarray, delta: float, weights: np.ndarray | float = 1.0) -> Model:
    """A law whose weighted sum of squares is Huber's loss of `model`'s: so `refit` minimises that, with these weights.

    A residual r (times the root of its weight) becomes sign(r) sqrt(rho(r)); those of `fit` are the same.
    """
    scale = np.sqrt(np.where(np.asarray(weights) > 0, weights, 1.0))  # padding of weight 0 counts for nothing anyway

    def robust(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, jacobian = model(theta)
        size = np.abs(value - y) * scale
        root = np.where(size <= delta, size, np.sqrt(np.maximum(2 * delta * size - delta**2, 0.0)))
        slope = np.where(size <= delta, 1.0, delta / np.maximum(root, delta))
        return y + np.sign(value - y) * root / scale, jacobian * slope[..., None]

    return robust


def r_squared(
    loss: np.ndarray, fitted: np.ndarray, group: np.ndarray | None = None, weights: np.ndarray | None = None
) -> float:
    """1 - squares of the residuals / squares about the mean, of its own group where there are groups; nan where losses are one.

    Args:
      loss, fitted: (M,). group: (M,) ints, which runs belong together. weights: (M,) of the squares, default 1.
    """
    weights, group = _of_all(loss, weights, group)
    mean = np.array([np.average(loss[group == g], weights=weights[group == g]) for g in group])
    spread = np.sum(weights * (loss - mean) ** 2)
    return float(1 - np.sum(weights * (loss - fitted) ** 2) / spread) if spread > 0 else np.nan


def _of_all(loss: np.ndarray, weights: np.ndarray | None, group: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Weights, by default 1, and groups, by default one."""
    return np.ones_like(loss) if weights is None else weights, np.zeros(len(loss), int) if group is None else group


def not_explained(share: float, of: str = "R^2") -> list[str]:
    """What is said of an R^2 below 0.9."""
    return [f"{of} is {share:.3f} (a law has {POOR_R_SQUARED:g} or more)"] if share < POOR_R_SQUARED else []


def poor(
    loss: np.ndarray,
    fitted: np.ndarray,
    largest: Mapping[str, np.ndarray],
    *,
    dof: int,
    group: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> list[str]:
    """A sentence where a law describes its own runs poorly: R^2 below 0.9, or residuals of ln L above 1% (root mean square).

    It says how far the runs with the largest N (and D, or n_h) are missed: what answers beyond them rest on.

    Args:
      loss, fitted, group, weights: as in `r_squared`; Huber's last weights, so that one run that is off makes no law poor.
      largest: what is largest there, (M,) each, by its symbol: the largest of each group.
      dof: runs minus coefficients.
    """
    weights, group = _of_all(loss, weights, group)
    weights = weights / np.mean(weights)
    share, relative = r_squared(loss, fitted, group, weights), np.sqrt(np.mean(weights * np.log(loss / fitted) ** 2))
    reasons = not_explained(share)
    if relative > POOR_RESIDUALS:
        reasons.append(f"residuals of ln L are {relative:.1%} (root mean square; a law has {POOR_RESIDUALS:.0%} or less)")
    if not reasons:
        return []
    residual, missed = loss - fitted, []
    sigma = np.sqrt(np.sum(weights * residual**2) / dof) if dof > 0 else np.nan
    for name, values in largest.items():
        at = values == np.array([values[group == g].max() for g in group])
        away = float(np.average(residual[at], weights=weights[at]))
        errors = f" ({away / sigma * np.sqrt(weights[at].sum()):+.1f} standard errors)" if sigma > 0 else ""
        missed.append(f"at the largest {name} by {away:+.4f} nats{errors}")
    return [f"poor law: {' and '.join(reasons)}; runs are off on average {', '.join(missed)}"]


def doubts(fit: Fit, runs: int = 1, free: int = 0, name: str = "the fit") -> list[str]:
    """Sentences on a law of no fewer coefficients than runs (by default nothing of that), and on a fit that failed."""
    exact = f"{runs} runs for {free} coefficients: the law passes through every point, and R^2 = 1 says nothing"
    failed = f"{name} is {fit.status}: its coefficients are not to be trusted"
    return [exact] * (runs <= free) + [failed] * (fit.status in ("DISAGREE", "SINGULAR"))


def floor(value: float, lowest: float, ends: tuple[float, float], words: tuple[str, str, str], symbol: str = "E") -> list[str]:
    """Sentences on an E (or c) at 0 or at the lowest loss, and on an interval of it (95%) that is wide; nan is none.

    words: which losses would show it, beyond what it can't be used, what rests on it.
    """
    found, width = [], ends[1] - ends[0]
    if value < 1e-3 * lowest:
        found.append(f"the fit puts {symbol} at 0, its lower bound: {words[0]} are needed to see it")
    if value > lowest * (1 - 2e-4):
        found.append(f"the fit puts {symbol} at the lowest loss: it can't be used beyond {words[1]}")
    if width > WIDE:
        found.append(f"{symbol} is known to {width:.2f} nats only ({ends[0]:.2f} to {ends[1]:.2f}, 95%): {words[2]}")
    return found


def _inverse(jacobian: np.ndarray, weights: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Inverse information of the free coefficients, 0 for the others; nan where the data do not tell them apart."""
    result = np.zeros((free.size, free.size))
    if not free.any():
        return result
    used = jacobian[:, free]
    information = (used * weights[:, None]).T @ used
    scale = np.sqrt(np.diag(information))
    if not (scale > 0).all():
        return np.full_like(result, np.nan)
    unit = information / np.outer(scale, scale)
    if np.linalg.cond(unit) > _SINGULAR:
        return np.full_like(result, np.nan)
    result[np.ix_(free, free)] = np.linalg.inv(unit) / np.outer(scale, scale)
    return result


def refit(
    model: Model,
    y: np.ndarray,
    start: np.ndarray,
    *,
    lower: np.ndarray | float = -np.inf,
    upper: np.ndarray | float = np.inf,
    weights: np.ndarray | float = 1.0,
    iterations: int = 100,
) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of many problems at once: (theta (..., P), weighted sums of squares (...,)).

    Each is damped separately, and stops some steps after its sum no longer falls. A coefficient at a bound that the step would
    cross stays there for that step. `start`: (..., P) or (P,), near the answer (the fit of the data that were resampled).

    Args:
      y: (..., N); N may include points of weight 0 (padding).
    """
    y = np.asarray(y, np.float64)
    theta = np.array(np.broadcast_to(start, (*y.shape[:-1], np.shape(start)[-1])), np.float64)
    lower, upper = np.broadcast_to(lower, theta.shape), np.broadcast_to(upper, theta.shape)
    theta = np.clip(theta, lower, upper)
    weights = np.broadcast_to(weights, y.shape)
    damping = np.full(theta.shape[:-1], 1e-4)
    value, jacobian = model(theta)
    total = np.sum(weights * (value - y) ** 2, axis=-1)
    floor = 1e-26 * np.sum(weights * y**2, axis=-1)
    left = np.full(total.shape, _LAST_STEPS)
    eye = np.eye(theta.shape[-1])
    for _ in range(iterations):
        weighted = jacobian * weights[..., None]
        information = np.swapaxes(weighted, -1, -2) @ jacobian
        gradient = (np.swapaxes(weighted, -1, -2) @ (value - y)[..., None])[..., 0]
        held = ((theta <= lower) & (gradient > 0)) | ((theta >= upper) & (gradient < 0))
        loose = ~held
        information = information * (loose[..., None] & loose[..., None, :])
        diagonal = np.einsum("...ii->...i", information)
        fill = np.where(loose, damping[..., None] * diagonal + 1e-300, 1.0)
        step = np.linalg.solve(information + fill[..., None] * eye, np.where(loose, gradient, 0.0)[..., None])[..., 0]
        trial = np.clip(theta - step, lower, upper)
        trial_value, trial_jacobian = model(trial)
        trial_total = np.sum(weights * (trial_value - y) ** 2, axis=-1)
        converged = np.abs(total - trial_total) <= 1e-13 * total + floor
        better = ((trial_total <= total) | converged) & (left > 0)  # False for nan
        theta = np.where(better[..., None], trial, theta)
        value = np.where(better[..., None], trial_value, value)
        jacobian = np.where(better[..., None, None], trial_jacobian, jacobian)
        total = np.where(better, trial_total, total)
        damping = np.where(better, np.maximum(damping / 10, 1e-12), np.minimum(damping * 10, _MOST_DAMPING))
        left = np.where(damping < _MOST_DAMPING, left - converged, 0)
        if not (left > 0).any():
            break
    return theta, total


def noise(sigma: float, dof: float, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Normal noise (S, ...) of a standard deviation known from `dof` degrees of freedom only: each draw has its own."""
    scale = sigma * np.sqrt(dof / generator.chisquare(dof, shape[0])) if np.isfinite(dof) else np.full(shape[0], sigma)
    return scale.reshape(-1, *[1] * (len(shape) - 1)) * generator.normal(size=shape)


def in_parts(refit: Callable[..., np.ndarray], *columns: np.ndarray) -> np.ndarray:
    """What `refit` makes of 100 draws at a time, (S, P): what fits a cache is twice as fast. `columns`: (S, ...) each."""
    parts = [slice(i, i + _PART) for i in range(0, len(columns[0]), _PART)]
    return np.concatenate([refit(*(column[part] for column in columns)) for part in parts])


def bootstrap(
    fitted: np.ndarray, fit: Fit, count: int, generator: np.random.Generator, refit: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """theta_SxP: every run drawn anew from the fitted law (M,) with the noise of a run, and all coefficients fitted again.

    `refit`: draws of y (S, M) -> theta (S, P).
    """
    return in_parts(refit, fitted + noise(fit.sigma, fit.dof, (count, fitted.size), generator))


def percentiles(draws: np.ndarray, level: float) -> np.ndarray:
    """(2, ...): the ends that hold that share of the draws (S, ...)."""
    return np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)


def pooled(parts: Iterable[tuple[float, int]]) -> float:
    """Standard deviation of a run by several fits, of (sigma, degrees of freedom); nan where none has any."""
    known = [(sigma, dof) for sigma, dof in parts if dof > 0]
    return float(np.sqrt(sum(s**2 * dof for s, dof in known) / sum(dof for _, dof in known))) if known else np.nan


def between_runs(squares: np.ndarray, variance: np.ndarray, dof: int) -> float:
    """tau^2 >= 0 with sum(squares / (tau^2 + variance)) = degrees of freedom (Paule and Mandel 1982), by bisection.

    squares: (M,) of residuals; variance: (M,) of each run by its own standard error.
    """
    low, high = 0.0, float(squares.sum())
    if np.sum(squares / variance) <= dof:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(squares / (middle + variance)) > dof else (low, middle)
    return high


def residual_columns(loss: np.ndarray, fitted: np.ndarray, scale: np.ndarray | float, of: np.ndarray | None = None) -> dict:
    """Columns loss, fitted, residual (measured minus fitted), and z: the residual, or `of`, in its standard deviations."""
    scale = np.where(np.asarray(scale) > 0, scale, np.nan)
    return {"loss": loss, "fitted": fitted, "residual": loss - fitted, "z": (loss - fitted if of is None else of) / scale}


def error_of(variance: float, otherwise: float) -> float:
    """A standard error; `otherwise` where the linearised fit knows none."""
    return float(np.sqrt(variance)) if np.isfinite(variance) and variance > 0 else otherwise


def threshold(sigma: float, dof: float, level: float) -> float:
    """How far the sum of squares may rise above its minimum inside a profile-likelihood interval: sigma^2 F(1, dof)."""
    return sigma**2 * float(stats.f.ppf(level, 1, dof) if np.isfinite(dof) else stats.chi2.ppf(level, 1))


def widened(center: float, ends: tuple[float, float], below: float, above: float) -> tuple[float, float]:
    """An interval with an independent error added in quadrature: `below` and `above` are how far that alone reaches."""
    return float(center - np.hypot(center - ends[0], below)), float(center + np.hypot(ends[1] - center, above))


@dataclasses.dataclass(frozen=True)
class SharedError:
    """The error that all losses have in common, being of one held-out text: Student's t by the number of its documents."""

    sem: float = 0.0  # standard error, nats per token; nan: not known
    freedom: float = np.inf  # documents - 1

    def reach(self, level: float) -> float:
        """How far it reaches to either side at that confidence; 0 where it is not known."""
        return float(stats.t.ppf((1 + level) / 2, self.freedom) * np.nan_to_num(self.sem))

    def widened(self, center: float, ends: tuple[float, float], level: float, lower: float = -np.inf) -> tuple[float, float]:
        """An interval with this error in quadrature, its low end not below `lower`."""
        if not self.sem > 0:
            return ends
        low, high = widened(center, ends, self.reach(level), self.reach(level))
        return max(low, lower), high

    def draws(self, count: int, seed: int) -> np.ndarray:
        """(count,) draws; from numbers of their own, so that nothing else changes."""
        generator = np.random.default_rng([seed, 2])
        t_S = generator.standard_t(self.freedom, count) if np.isfinite(self.freedom) else generator.normal(size=count)
        return np.nan_to_num(self.sem) * t_S


def crossings(statistic: Callable[[np.ndarray], np.ndarray], center: float, scale: float, limit: float) -> tuple[float, float]:
    """Where `statistic`, least and 0 at `center`, rises through `limit` on both sides; -inf or inf where it never does.

    Evaluated on whole arrays: outwards in steps of about `scale` (a standard error), then twice between the two neighbours of
    the crossing, whose last step is linear in the root of the statistic. A statistic of inf or nan counts as above.
    """

    def side(sign: float) -> float:
        distances = scale * np.array([0.0, *np.arange(0.5, 4.0, 0.5), 4, 5, 7, 10, 15, 25, 50, 100, 400, 2000])
        for _ in range(3):
            height = np.sqrt(np.maximum(np.nan_to_num(statistic(center + sign * distances), nan=np.inf), 0.0))
            above = np.flatnonzero(height > np.sqrt(limit))
            if not above.size:
                return sign * np.inf
            if above[0] == 0:
                return center
            near, far = distances[above[0] - 1], distances[above[0]]
            low, high = height[above[0] - 1], height[above[0]]
            distances = np.linspace(near, far, 9)
        share = (np.sqrt(limit) - low) / (high - low) if np.isfinite(high) else 0.5
        return center + sign * float(near + share * (far - near))

    return side(-1.0), side(1.0)


def interval(
    rise: Callable[[np.ndarray], np.ndarray],
    center: float,
    error: float,
    limit: float,
    lower: float = -np.inf,
    upper: float = np.inf,
) -> tuple[float, float]:
    """Profile-likelihood interval of a scalar: where `rise` of the sum of squares reaches `limit` (`threshold`), or a bound.

    `rise`: values (V,) within the bounds -> (V,); error: about a standard error, the scale of the search.
    """

    def bounded(values: np.ndarray) -> np.ndarray:
        inside = np.clip(values, lower, upper)
        return np.where(inside == values, rise(inside), np.inf)

    low, high = crossings(bounded, center, error, limit)
    return max(low, lower), min(high, upper)


def profile(
    model: Model, y: np.ndarray, fit: Fit, place: int, level: float, lower: np.ndarray, upper: np.ndarray
) -> tuple[float, float]:
    """Profile-likelihood interval of the coefficient at `place` of a least-squares fit: it is held, and all others follow.

    The others start on the tangent that the covariance of the fit has at its minimum.
    """
    theta, covariance = fit.theta, fit.covariance
    with np.errstate(invalid="ignore", divide="ignore"):
        tangent = covariance[:, place] / covariance[place, place]
    tangent = np.where(np.isfinite(tangent), tangent, np.arange(len(tangent)) == place)

    def rise(values: np.ndarray) -> np.ndarray:
        low, high = np.tile(lower, (len(values), 1)), np.tile(upper, (len(values), 1))
        low[:, place] = high[:, place] = values
        many = np.broadcast_to(y, (len(values), len(y)))
        start = theta + (values - theta[place])[:, None] * tangent
        return refit(model, many, start, lower=low, upper=high)[1] - fit.objective

    limit = threshold(fit.sigma, fit.dof, level)
    error = error_of(covariance[place, place], 0.01 * max(abs(theta[place]), 0.1))
    return interval(rise, theta[place], error, limit, lower[place], upper[place])
