"""The numerical half of `joint`: a global start, weights, and least squares with runs that err together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy import optimize

from gqa_jax.laws import fitting
from gqa_jax.laws.heads import Heads
from gqa_jax.laws.joint_terms import Terms, Where

_EXPONENTS = (-0.5, 0.0, 0.5, 1.0, 2.0)  # p to start from
_GRID_E, _STARTS = 24, 8


def plain(
    terms: Terms, runs: pd.DataFrame, center: float, log: bool, huber_delta: float | None
) -> tuple[pd.DataFrame, fitting.Fit]:
    """The fit that takes all runs for independent; and the runs with their weights and L - E, instead of sem."""
    loss, sem = runs["loss"].to_numpy(), runs["sem"].to_numpy()
    base = 1 / loss**2 if log else np.ones_like(loss)
    runs = runs.drop(columns="sem").assign(weight=base / base.mean(), above=1.0)  # L - E, as soon as a fit knows it
    weighted = np.isfinite(sem).all() and np.ptp(sem) > 1e-3 * sem.mean()
    for _ in range(4 if weighted else 1):
        model, y = independent(terms, runs, center, 0.0)
        fit = polish(terms, runs, model, y, global_starts(terms, runs, center), huber_delta)
        if weighted:
            residual = terms.loss(fit.theta, at(runs, center))[0] - loss
            weight = base / (fitting.between_runs(residual**2, sem**2, fit.dof) + sem**2)
            runs = runs.assign(weight=weight / weight.mean())
    if huber_delta is not None:
        runs = runs.assign(weight=runs["weight"] * fit.weights)
    return runs.assign(above=terms.loss(fit.theta, at(runs, center))[0] - terms.entropy_of(fit.theta)), fit


def global_starts(terms: Terms, runs: pd.DataFrame, center: float) -> np.ndarray:
    """Coefficients_SxP to start from: given E and p, ln(L - E) is linear in all others, so a grid over these two is global."""
    loss = runs["loss"].to_numpy()
    entropies = loss.min() * (1 - np.geomspace(1e-3, 1, _GRID_E)) if terms.entropy is None else np.array([terms.entropy])
    exponents = np.array(_EXPONENTS if "p" in terms.names else [0.0])
    entropy, p = (grid.ravel() for grid in np.meshgrid(entropies, exponents, indexing="ij"))
    first = len(terms.names) - len(terms.alpha) - len(terms.b)
    theta = np.zeros((len(entropy), len(terms.names)))
    if terms.entropy is None:
        theta[:, 0] = entropy
    if "p" in terms.names:
        theta[:, first - 1] = p
    linear = terms.log_above(theta, at(runs, center))[1][..., first:]  # columns of a linear model of ln(L - E)
    above = loss - entropy[:, None]
    weights = np.sqrt(runs["weight"].to_numpy()) * above
    left, right = linear * weights[..., None], np.log(above) * weights
    theta[:, first:] = (np.linalg.pinv(left) @ right[..., None])[..., 0]
    missed = np.sum((np.einsum("snk,sk->sn", left, theta[:, first:]) - right) ** 2, axis=1)
    return theta[np.argsort(missed, kind="stable")[:_STARTS]]


def polish(
    terms: Terms,
    runs: pd.DataFrame,
    model: fitting.Model,
    y: np.ndarray,
    starts: np.ndarray,
    huber_delta: float | None = None,
) -> fitting.Fit:
    """The best of the minima that `fitting.refit` reaches from all starts, checked by `fitting.fit`."""
    lower, upper = terms.bounds(float(runs["loss"].min()))
    many = np.broadcast_to(y, (len(starts), len(y)))
    same = model if huber_delta is None else fitting.huberised(model, y, huber_delta)
    iterations = 200 if huber_delta is None else 1000  # where most residuals count linearly, the steps are many
    theta, squares = fitting.refit(same, many, starts, lower=lower, upper=upper, iterations=iterations)
    return fitting.fit(model, y, theta[np.nanargmin(squares)], lower=lower, upper=upper, huber_delta=huber_delta)


def independent(terms: Terms, runs: pd.DataFrame, center: float, ratio: float) -> tuple[fitting.Model, np.ndarray]:
    """The law and the losses in units where the noise of all runs is independent, of standard deviation sigma (`_turning`)."""
    where, turn = at(runs, center), _turning(runs)

    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, jacobian = terms.loss(theta, where)
        both = turn(np.concatenate([value[..., None], jacobian], axis=-1), ratio)
        return both[..., 0], both[..., 1:]

    return model, turn(runs["loss"].to_numpy()[:, None], ratio)[:, 0]


def _turning(runs: pd.DataFrame) -> Callable[[np.ndarray, float], np.ndarray]:
    """turn(columns (..., N, K), ratio): a root of the inverse covariance times the columns.

    The covariance of the runs of an H is sigma^2 (diag(1 / weight) + ratio a a^T), a = L - E, ratio = tau^2 / sigma^2. With
    s = a sqrt(weight) that root is (1 - (1 - 1 / sqrt(1 + ratio |s|^2)) s s^T / |s|^2) diag(sqrt(weight)) / sigma.
    """
    root, member_NxG = np.sqrt(runs["weight"].to_numpy()), _members(runs)
    s = root * runs["above"].to_numpy()
    size = (s**2) @ member_NxG
    unit_NxG = s[:, None] * member_NxG / np.sqrt(size)

    def turn(columns: np.ndarray, ratio: float) -> np.ndarray:
        columns = columns * root[:, None]
        if ratio == 0:
            return columns
        return columns - (unit_NxG * (1 - 1 / np.sqrt(1 + ratio * size))) @ (unit_NxG.T @ columns)

    return turn


def between_heads(terms: Terms, runs: pd.DataFrame, center: float, theta: np.ndarray) -> float:
    """tau^2 / sigma^2 of greatest restricted likelihood, for the law linearised at the plain fit; 0 where that is greatest."""
    turn = _turning(runs)
    size = (runs["weight"].to_numpy() * runs["above"].to_numpy() ** 2) @ _members(runs)
    value, jacobian = terms.loss(theta, at(runs, center))
    both = np.column_stack([runs["loss"].to_numpy() - value, jacobian])
    floor = 1e-24 * np.sum(runs["weight"] * runs["loss"] ** 2)  # an exact fit: rounding is all that is left

    def deviance(ratio: float) -> float:
        turned = turn(both, ratio)
        q, r = np.linalg.qr(turned[:, 1:])
        rest = turned[:, 0] - q @ (q.T @ turned[:, 0])
        spread = 2 * np.sum(np.log(np.maximum(np.abs(np.diag(r)), 1e-300)))
        return float(np.sum(np.log1p(ratio * size)) + spread + (len(q) - len(theta)) * np.log(max(rest @ rest, floor)))

    ratios = np.concatenate([[0.0], np.geomspace(1e-3, 1e4, 36)]) / np.mean(size)
    heights = [deviance(ratio) for ratio in ratios]
    best = int(np.argmin(heights))
    if best == 0:
        return 0.0
    low, high = ratios[best - 1], ratios[min(best + 1, len(ratios) - 1)]
    return float(optimize.minimize_scalar(deviance, bounds=(low, high), method="bounded", options={"xatol": 1e-6 * high}).x)


def columns(runs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n_h, n_kv, N) of the runs; n_h a number also for d / d_h."""
    return tuple(runs[name].to_numpy(np.float64) for name in ("query_heads", "n_kv_heads", "params"))


def at(runs: pd.DataFrame, center: float) -> Where:
    """(n_h, n_kv, x) of the runs."""
    n_heads, n_kv_heads, params = columns(runs)
    return n_heads, n_kv_heads, np.log(params / center)


def heads_of(runs: pd.DataFrame) -> list[Heads]:
    return [Heads.of(n, k) for n, k in zip(runs["n_heads"], runs["n_kv_heads"], strict=True)]


def _members(runs: pd.DataFrame) -> np.ndarray:
    """1 where run N has heads G."""
    names = heads_of(runs)
    number = {name: g for g, name in enumerate(dict.fromkeys(names))}
    return np.eye(len(number))[[number[name] for name in names]]
