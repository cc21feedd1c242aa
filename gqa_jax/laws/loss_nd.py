"""L(N, D) = E + A / N^alpha + B / D^beta: loss against parameters and training tokens, with its uncertainty.

Source: Hoffmann et al. 2022 (arXiv 2203.15556), Eq. 2 and Approach 3: Huber's loss of residuals of ln L, delta = 1e-3, summed.
How it goes wrong: averaged instead of summed it stops early (Besiroglu et al. 2024, arXiv 2404.10102, refitted their data).
With heads, A (and alpha, if asked) belong to H; B, beta and E to the data: the law behind equal training cost
(`search/equal_compute.py`).

Two routes to the minimum, which must agree: a grid over (alpha, beta), where E, A and B are linear and not negative
(variable projection), refined by Levenberg and Marquardt's method; and scipy's `least_squares` (`fitting.fit`).
The coefficients inside are E, v = ln(B / D0^beta), beta, u_H = ln(A_H / N0^alpha), alpha, with N0 and D0 amid the data. What is
fixed, and the tie alpha = beta, are linear in them: so what is searched are those that are free, and the others follow.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, stats

from gqa_jax.errors import closest
from gqa_jax.laws import fitting
from gqa_jax.laws import runs as run_table
from gqa_jax.laws.fitting import SharedError
from gqa_jax.laws.heads import Heads
from gqa_jax.laws.law import Laws
from gqa_jax.shapes import Aspect

NAMES = ("A", "B", "E", "alpha", "beta")
_NUMBERS = ("no", "one", "two", "three", "four", "five")
MIN_SPREAD = 1.1  # of D about its trend in N: below it the terms of N and of D are one
SMALLEST_RATE, LARGEST_RATE = _RATES = 0.01, 3.0  # exponents
_GRID = np.geomspace(0.02, 2.0, 24)
_FLOOR = -30.0  # of u and v
_VANISHED = np.log(1e-4)  # u or v of a term that is no part of the loss
NARROW_SPREAD = 4.0


class Optimum(NamedTuple):
    """The model that reaches the least loss with a training budget of C = 6 N D FLOPs."""

    params: float  # N
    tokens: float  # D
    loss: float  # nats per token


class _OfProblem:
    """What a law says of the problem that it solves, `problem`."""

    problem: Problem

    @property
    def status(self) -> str:
        """CONVERGED; EDGE: E at 0 or the lowest loss; BOUND_HIT: another bound; DISAGREE: the routes differ; SINGULAR."""
        return "EDGE" if 0 in self.problem.fit.bound else self.problem.fit.status

    @property
    def sigma(self) -> float:
        """Standard deviation of a residual (of ln L, if `log`), pooled over H; nan without degrees of freedom."""
        return self.problem.fit.sigma

    @property
    def dof(self) -> int:
        """Runs minus fitted coefficients."""
        return self.problem.fit.dof

    @property
    def shared(self) -> SharedError:
        """As `LawsByHeads.shared`: in the intervals and draws of E."""
        return self.problem.shared

    def draws(self, count: int = 1000, seed: int = 0, method: str | None = None) -> DrawsND:
        """Refits of all coefficients, in the order of the heads: see `Problem.draws`."""
        return self.problem.draws(count, seed, method)


@dataclass(frozen=True, eq=False)
class LossND(_OfProblem):
    """L(N, D) = E + A / N^alpha + B / D^beta, with what it was fitted to: by `fit_loss_nd`, or an H of `LossNDByHeads`."""

    A: float
    B: float
    E: float  # nats per token
    alpha: float
    beta: float
    r_squared: float  # of the loss
    params: np.ndarray  # N of the points
    tokens: np.ndarray  # D of the points
    loss: np.ndarray  # of the points
    problem: Problem = dataclasses.field(repr=False)
    index: int = 0  # of its A in the problem
    warnings: tuple[str, ...] = ()

    def predict(self, params: float | np.ndarray, tokens: float | np.ndarray) -> float | np.ndarray:
        """Loss of N parameters after D tokens; broadcasts."""
        n, d = np.asarray(params, np.float64)[()], np.asarray(tokens, np.float64)[()]
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    def solve(self, loss: float, tokens: float) -> float:
        """N* that reaches `loss` after D tokens. Raises ValueError for a loss that no size reaches with so few tokens."""
        least = self.E + self.B * tokens**-self.beta
        if not loss > least:
            raise ValueError(f"a loss of {loss} can't be reached with {tokens:g} tokens: no size is below {least:.4f}")
        return float((self.A / (loss - least)) ** (1 / self.alpha))

    def optimal(self, compute_flops: float) -> Optimum:
        """N and D of least loss with C = 6 N D (Hoffmann et al., Eq. 4).

        N = G (C / 6)^(beta / (alpha + beta)), D = (C / 6) / N, G = (alpha A / (beta B))^(1 / (alpha + beta)).
        Raises ValueError for a budget that is not above 0.
        """
        if not (np.isfinite(compute_flops) and compute_flops > 0):
            raise ValueError(f"compute_flops = {compute_flops}: must be above 0")
        log_g = (np.log(self.alpha * self.A) - np.log(self.beta * self.B)) / (self.alpha + self.beta)
        n = float(np.exp(log_g + self.beta / (self.alpha + self.beta) * np.log(compute_flops / 6)))
        d = compute_flops / 6 / n
        return Optimum(n, d, float(self.predict(n, d)))

    @property
    def residuals(self) -> pd.DataFrame:
        """One row per run: params, tokens, loss, fitted, residual (measured minus fitted), and z in standard deviations."""
        fitted = self.predict(self.params, self.tokens)
        on_scale = np.log(self.loss / fitted) if self.problem.log else None
        columns = fitting.residual_columns(self.loss, fitted, self.sigma, on_scale)
        return pd.DataFrame({"params": self.params, "tokens": self.tokens} | columns)

    @property
    def covariance(self) -> pd.DataFrame:
        """Of (E, log_B, beta, log_A, alpha) by the linearised fit; 0 for what is at a bound or fixed, nan where SINGULAR."""
        names, rows = ["E", "log_B", "beta", "log_A", "alpha"], self.problem.rows(self.index)
        free = np.array([name.removeprefix("log_") not in self.problem.restrictions.fixed for name in names])
        covariance = rows @ self.problem.fit.covariance @ rows.T
        return pd.DataFrame(np.where(np.outer(free, free), covariance, 0.0), names, names)

    def intervals(self, level: float = 0.95) -> pd.DataFrame:
        """Intervals: rows A, B, E, alpha, beta, columns value, low, high.

        Least squares: profile likelihood; 0 or inf where the data do not bound a coefficient. Huber: percentiles of the
        bootstrap over runs, as its likelihood is none. nan without degrees of freedom. A fixed coefficient is itself.
        """
        value = pd.Series({"A": self.A, "B": self.B, "E": self.E, "alpha": self.alpha, "beta": self.beta})
        if not np.isfinite(self.sigma):
            ends = np.full((5, 2), np.nan)
        elif self.problem.huber_delta is None:
            ends = np.array([self.problem.interval(name, self.index, level) for name in value.index])
        else:
            drawn, i = self.draws(), self.index
            columns = [np.exp(drawn.log_a_SxH[:, i]), np.exp(drawn.log_b), drawn.entropy, drawn.alpha_SxH[:, i], drawn.beta]
            ends = fitting.percentiles(np.stack(columns, axis=1), level).T
        frame = pd.DataFrame({"value": value, "low": ends[:, 0], "high": ends[:, 1]})
        for name, known in self.problem.restrictions.fixed.items():
            frame.loc[name, ["low", "high"]] = known
        return frame


@dataclass(eq=False, repr=False)
class LossNDByHeads(_OfProblem, Laws[Heads, LossND]):
    """One law per head configuration of one training context: A (or A and alpha) of each H, shared B, beta and E."""

    problem: Problem  # what was fitted, all H at once
    _: dataclasses.KW_ONLY
    context: int  # of training, tokens; head_dim to aspect: as in `LawsByHeads`
    head_dim: float
    vocab_size: float
    size_convention: str
    aspect: Aspect
    warnings: Sequence[str]  # sentences that every answer from these laws must carry

    def __post_init__(self) -> None:
        self.warnings = tuple(self.warnings)
        self._laws = {heads: _law(self.problem, i, self.warnings) for i, heads in enumerate(self.problem.heads)}

    @property
    def residuals(self) -> pd.DataFrame:
        """`LossND.residuals` of every H, with n_heads and n_kv_heads."""
        return pd.concat([_with_heads(heads, law.residuals) for heads, law in self.items()], ignore_index=True)

    def intervals(self, level: float = 0.95) -> pd.DataFrame:
        """`LossND.intervals` of every H: columns n_heads, n_kv_heads, coefficient, value, low, high."""
        frames = [
            _with_heads(heads, law.intervals(level).rename_axis("coefficient").reset_index()) for heads, law in self.items()
        ]
        return pd.concat(frames, ignore_index=True)


def fit_loss_nd(
    params: np.ndarray,
    tokens: np.ndarray,
    loss: np.ndarray,
    huber_delta: float | None = None,
    *,
    log: bool = True,
    weights: np.ndarray | None = None,
    alpha_equals_beta: bool = False,
    fixed: Mapping[str, float] | None = None,
) -> LossND:
    """L(N, D) = E + A / N^alpha + B / D^beta, least squares of ln L, or Huber's loss of it.

    Args:
      params, tokens, loss: (M,) N without embeddings (or with: say which), D, nats per token. Runs with a nan are left out, and
        said in `warnings`.
      huber_delta: residuals beyond it count linearly, summed; 1e-3 is Chinchilla's. None: least squares.
      log: residuals of ln L (default, Chinchilla's), or of L.
      weights: (M,) of the squared residuals; default 1.
      alpha_equals_beta: one exponent for both terms.
      fixed: coefficients that are known, of A, B, E, alpha, beta: {"E": 1.69, "alpha": 0.34}. What is free needs fewer runs.

    Raises:
      ValueError: too few runs, or different N or D, for what is free (six and three where all is), tokens that follow size
        (both terms are one then), values that can't be, losses that don't fall.
    """
    arrays = [np.asarray(x, np.float64) for x in (params, tokens, loss)]
    arrays.append(np.ones_like(arrays[2]) if weights is None else np.asarray(weights, np.float64))
    if any(x.ndim != 1 or x.shape != arrays[0].shape for x in arrays):
        raise ValueError(
            f"params, tokens, loss, weights have shapes {', '.join(str(x.shape) for x in arrays)}: give lists of one length"
        )
    known = ~np.isnan(arrays).any(axis=0)
    said = [] if known.all() else [f"{int((~known).sum())} of {known.size} runs left out: they have no number"]
    n, d, y, w = (x[known] for x in arrays)
    known = restrictions(fixed, alpha_equals_beta, y.min(initial=np.inf))
    problem = solved(Problem((None,), n, d, y, w, np.zeros(len(n), int), False, log, huber_delta, known))
    return _law(problem, 0, (*said, *_doubts(problem)))


def fit_loss_nd_by_heads(
    table: pd.DataFrame,
    *,
    alpha_by_heads: bool = False,
    huber_delta: float | None = None,
    log: bool = True,
    alpha_equals_beta: bool = False,
    fixed: Mapping[str, float] | None = None,
) -> LossNDByHeads:
    """L(N, D; H) = E + A_H / N^alpha + B / D^beta of a loss table (`gqa_jax.load_results`) of ONE training context.

    Args:
      table: columns n_heads (empty: d / d_h), n_kv_heads, params_non_embedding, tokens, loss, status, context. Rows that are
        not done, not finite, or that continue others are left out, and said in `warnings`.
      alpha_by_heads: an exponent of N for each H, too.
      huber_delta, log, alpha_equals_beta, fixed: as in `fit_loss_nd`; but for A, which each H has for itself.

    Raises:
      ValueError: as `fit_loss_nd`, for all H together; two sizes of an H are needed with `alpha_by_heads`, which can't be where
        alpha is fixed, or tied to the one beta.
    """
    if "A" in (fixed or {}):
        raise ValueError(f"fixed['A'] = {fixed['A']}: each head configuration has an A of its own; fix B, E, alpha or beta")
    if alpha_by_heads and (alpha_equals_beta or "alpha" in (fixed or {})):
        raise ValueError("alpha_by_heads, but alpha is fixed or tied to beta, which all heads share: leave out one of the two")
    if "tokens" not in table.columns:
        raise ValueError("the table has no column tokens: D of each run; give the loss table of gqa_jax.load_results")
    rows, said = run_table.usable(table)
    if (unknown := rows["tokens"].isna()).any():
        said.append(f"{int(unknown.sum())} of {len(rows)} runs left out: their tokens are not known")
        rows = rows[~unknown]
    names = [Heads.of(h, k) for h, k in zip(rows["n_heads"], rows["n_kv_heads"], strict=True)]
    heads = tuple(sorted(set(names), key=lambda h: (h.n_heads is None, h.n_heads, h.n_kv_heads)))
    n, d, y = (rows[name].to_numpy(np.float64) for name in ("params_non_embedding", "tokens", "loss"))
    group = np.array([heads.index(name) for name in names], int)
    for i, name in enumerate(heads):
        if alpha_by_heads and len(np.unique(n[group == i])) < 2:
            raise ValueError(
                f"heads {name}: one size has finished, an alpha of its own needs 2 or more; or alpha_by_heads=False"
            )
    known = restrictions(fixed, alpha_equals_beta, y.min(initial=np.inf))
    shared = run_table.shared_error(rows)
    problem = solved(Problem(heads, n, d, y, np.ones_like(y), group, alpha_by_heads, log, huber_delta, known, shared))
    return LossNDByHeads(
        problem,
        **run_table.common(rows),
        warnings=[*said, *run_table.about_text(rows), *_doubts(problem)],
    )


def _law(problem: Problem, index: int, warnings: Sequence[str]) -> LossND:
    entropy, log_b, beta, log_a, alpha = problem.rows(index) @ problem.fit.theta
    found = {"A": np.exp(log_a), "B": np.exp(log_b), "E": entropy, "alpha": alpha, "beta": beta} | problem.restrictions.fixed
    mine = problem.group == index
    n, d, loss = problem.params[mine], problem.tokens[mine], problem.loss[mine]
    law = LossND(
        **{name: float(value) for name, value in found.items()}, r_squared=np.nan,
        params=n, tokens=d, loss=loss, problem=problem, index=index, warnings=tuple(warnings),
    )  # fmt: skip
    return dataclasses.replace(law, r_squared=fitting.r_squared(loss, law.predict(n, d)))


def _doubts(problem: Problem) -> list[str]:
    fit, known = problem.fit, problem.restrictions
    found = fitting.doubts(fit, len(problem.loss), len(problem.free))
    largest, weights = {"N": problem.params, "D": problem.tokens}, problem.weight * fit.weights
    found += fitting.poor(problem.loss, problem.fitted, largest, dof=fit.dof, group=problem.group, weights=weights)
    if any(i > 0 for i in fit.bound):
        found.append(f"an exponent is at its bound, {SMALLEST_RATE} or {LARGEST_RATE}: its term is no power law here")
    both = known.of("A", "alpha") and known.of("B", "beta")
    if both and (factor := spread(problem)) < NARROW_SPREAD:
        found.append(f"tokens spread by a factor of {factor:.2g} about their trend in N only: A and B are hardly told apart")
    if "E" in known.free:
        own = stats.t.ppf(0.975, fit.dof) * np.sqrt(fit.covariance[0, 0])
        half = np.hypot(own, problem.shared.reach(0.95))  # linearised; nan where it is not known
        ends = max(fit.theta[0] - half, 0.0), fit.theta[0] + half
        words = ("larger models and more tokens", "the runs", "losses near it are guesses")
        found += fitting.floor(fit.theta[0], problem.loss.min(), ends, words)
    return found


def _with_heads(heads: Heads, frame: pd.DataFrame) -> pd.DataFrame:
    frame.insert(0, "n_heads", heads.n_heads)
    frame.insert(1, "n_kv_heads", heads.n_kv_heads)
    return frame.astype({"n_heads": "Int64"})


@dataclass(frozen=True)
class DrawsND:
    """Joint draws of the coefficients: S draws, H head configurations (one without heads)."""

    entropy: np.ndarray  # (S,)
    log_b: np.ndarray  # (S,) ln B
    beta: np.ndarray  # (S,)
    log_a_SxH: np.ndarray  # ln A
    alpha_SxH: np.ndarray
    shift: np.ndarray | float = 0.0  # (S,) of E: the error that all losses have in common, which is in entropy

    def predict(self, index: int, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """loss_SxM of the H at `index`, for params and tokens of shape (M,), or (S, M) where each draw has its own."""
        by_size = np.exp(self.log_a_SxH[:, [index]] - self.alpha_SxH[:, [index]] * np.log(params))
        return self.entropy[:, None] + by_size + np.exp(self.log_b[:, None] - self.beta[:, None] * np.log(tokens))


@dataclass(frozen=True)
class Restrictions:
    """Which of A, B, E, alpha, beta are not free: fixed, or alpha tied to beta."""

    fixed: Mapping[str, float] = dataclasses.field(default_factory=dict)
    tied: bool = False  # alpha = beta, both free

    @property
    def free(self) -> list[str]:
        """What is fitted; alpha stands for both exponents where they are tied."""
        return [name for name in NAMES if name not in self.fixed and not (self.tied and name == "beta")]

    def of(self, amplitude: str, exponent: str) -> list[str]:
        """What is free in the term of N, or of D, and in no other."""
        return [name for name in (amplitude, exponent) if name not in self.fixed and not (self.tied and name == exponent)]


def restrictions(fixed: Mapping[str, float] | None, alpha_equals_beta: bool, lowest: float) -> Restrictions:
    """The same, checked. `lowest`: the lowest loss. Raises ValueError for names, values or ties that can't be."""
    fixed = {} if fixed is None else dict(fixed)
    for name, value in fixed.items():
        if name not in NAMES:
            raise ValueError(f"fixed[{name!r}]: L(N, D) has no such coefficient, {closest(str(name), NAMES)}")
        low, high = {"E": (0.0, lowest), "alpha": _RATES, "beta": _RATES}.get(name, (0.0, np.inf))
        inside = low <= value <= high if name in ("alpha", "beta") else low <= value < high and (name == "E" or value > 0)
        if not inside:
            allowed = {"E": f"at least 0 and below the lowest loss, {lowest:.4f}", "A": "above 0 and finite"}
            allowed |= {"B": allowed["A"]}
            raise ValueError(f"fixed[{name!r}] = {value}: must be {allowed.get(name, f'between {low} and {high}')}")
    if alpha_equals_beta and (rates := {fixed[name] for name in ("alpha", "beta") if name in fixed}):
        if len(rates) > 1:
            raise ValueError(
                f"fixed alpha = {fixed['alpha']} and beta = {fixed['beta']} differ, alpha_equals_beta says that they do not: "
                "leave out one of the three"
            )
        fixed |= dict.fromkeys(("alpha", "beta"), rates.pop())
    found = Restrictions({name: float(value) for name, value in fixed.items()}, alpha_equals_beta and "alpha" not in fixed)
    if not found.free:
        raise ValueError("fixed has all of A, B, E, alpha, beta: nothing is left to fit; leave out what the runs shall tell")
    return found


@dataclass(frozen=True, eq=False)
class Problem:
    """The runs, what is minimised, and its minimum. H head configurations, M runs.

    The P coefficients theta are E, v, beta, u_1..u_H, then one alpha or one per H (see the module). F of them are free, the
    others follow: `fit` has all P, without variance of their own.
    """

    heads: tuple[Heads | None, ...]
    params: np.ndarray  # (M,) N
    tokens: np.ndarray  # (M,) D
    loss: np.ndarray  # (M,)
    weight: np.ndarray  # (M,)
    group: np.ndarray  # (M,) index into heads
    alpha_by_heads: bool
    log: bool
    huber_delta: float | None
    restrictions: Restrictions
    shared: SharedError = SharedError()  # noqa: RUF009 (frozen): the error that all losses have in common
    fit: fitting.Fit = fitting.Fit(np.zeros(0), "", 0.0, np.zeros((0, 0)), np.nan, 0, np.ones(1))  # noqa: RUF009 (none)
    _kept: dict = dataclasses.field(default_factory=dict, repr=False)

    @property
    def center(self) -> tuple[float, float]:
        """ln N0, ln D0."""
        return float(np.mean(np.log(self.params))), float(np.mean(np.log(self.tokens)))

    @property
    def y(self) -> np.ndarray:
        """(M,) what is fitted, times the root of its weight."""
        return np.sqrt(self.weight) * (np.log(self.loss) if self.log else self.loss)

    @property
    def fitted(self) -> np.ndarray:
        """(M,) losses of the law."""
        value = self.model(self.fit.theta)[0] / np.sqrt(self.weight)
        return np.exp(value) if self.log else value

    @functools.cached_property
    def uncentred(self) -> np.ndarray:
        """(P, P): the matrix that turns v into ln B and u into ln A."""
        log_n0, log_d0 = self.center
        matrix = np.eye(3 + len(self.heads) + (len(self.heads) if self.alpha_by_heads else 1))
        matrix[1, 2] = log_d0
        for i in range(len(self.heads)):
            matrix[3 + i, self._alpha(i)] = log_n0
        return matrix

    @functools.cached_property
    def free(self) -> list[int]:
        """(F,) places in theta of what is fitted."""
        fixed, first, count = self.restrictions.fixed, 3 + len(self.heads), len(self.uncentred)
        rates = [] if self.restrictions.tied else range(first, count)
        places = {"E": [0], "B": [1], "beta": [2], "A": range(3, first), "alpha": rates}
        return [place for name, all_of_it in places.items() if name not in fixed for place in all_of_it]

    @functools.cached_property
    def from_free(self) -> tuple[np.ndarray, np.ndarray]:
        """(offset (P,), matrix (P, F)): theta = offset + matrix @ what is free."""
        fixed, count, (log_n0, log_d0) = self.restrictions.fixed, len(self.uncentred), self.center
        offset, matrix = np.zeros(count), np.eye(count)[:, self.free]
        rates = range(3 + len(self.heads), count)
        offset[0], offset[2] = fixed.get("E", 0.0), fixed.get("beta", 0.0)
        offset[rates] = fixed.get("alpha", 0.0)
        if self.restrictions.tied:
            matrix[rates] = matrix[2]
        of_size = [("A", 3 + i, self._alpha(i), log_n0) for i in range(len(self.heads))]
        for name, of, by, log_0 in [("B", 1, 2, log_d0), *of_size]:
            if name in fixed:
                offset[of], matrix[of] = np.log(fixed[name]) - log_0 * offset[by], -log_0 * matrix[by]
        return offset, matrix

    def of_free(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`model` of what is free (..., F): its derivatives are (..., M, F)."""
        offset, matrix = self.from_free
        value, jacobian = self.model(offset + theta @ matrix.T)
        return value, jacobian @ matrix

    def rows(self, index: int) -> np.ndarray:
        """(5, P): theta -> (E, ln B, beta, ln A, alpha) of the H at `index`."""
        return self.uncentred[[0, 1, 2, 3 + index, self._alpha(index)]]

    def model(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients (..., P) -> predictions of `y` (..., M) and their derivatives (..., M, P)."""
        log_n0, log_d0 = self.center
        x, z, root = np.log(self.params) - log_n0, np.log(self.tokens) - log_d0, np.sqrt(self.weight)
        size, rate = 3 + self.group, self._alpha(self.group)
        runs = np.arange(len(x))
        with np.errstate(over="ignore", invalid="ignore"):  # of trial steps, which are rejected then
            by_size = np.exp(theta[..., size] - theta[..., rate] * x)
            by_data = np.exp(theta[..., 1:2] - theta[..., 2:3] * z)
            value = theta[..., :1] + by_size + by_data
            scale = root / value if self.log else np.broadcast_to(root, value.shape)
            jacobian = np.zeros((*value.shape, theta.shape[-1]))
            jacobian[..., 0] = scale
            jacobian[..., 1] = scale * by_data
            jacobian[..., 2] = -z * jacobian[..., 1]
            jacobian[..., runs, size] = scale * by_size
            jacobian[..., runs, rate] = -x * scale * by_size
            return root * (np.log(value) if self.log else value), jacobian

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """(P,) and (P,): lower and upper ends of theta."""
        count = len(self.uncentred)
        lower, upper = np.full(count, _FLOOR), np.full(count, -_FLOOR)
        rates = [2, *range(3 + len(self.heads), count)]
        lower[rates], upper[rates] = SMALLEST_RATE, LARGEST_RATE
        lower[0], upper[0] = 0.0, self.loss.min() * (1 - 1e-6)
        return lower, upper

    def refit(self, start: np.ndarray, y: np.ndarray | None = None, *, weights: np.ndarray | float = 1.0, **options) -> tuple:
        """`fitting.refit` of what is free in this law, (..., F); of Huber's loss, where it is of that."""
        y = self.y if y is None else y
        lower, upper = (ends[self.free] for ends in self.bounds())
        y = np.broadcast_to(y, np.broadcast_shapes(y.shape, (*start.shape[:-1], 1), np.shape(weights)))
        model = self.of_free if self.huber_delta is None else fitting.huberised(self.of_free, y, self.huber_delta)
        return fitting.refit(model, y, start, weights=weights, lower=lower, upper=upper, **options)

    def interval(self, name: str, index: int, level: float) -> tuple[float, float]:
        """Profile-likelihood interval of A, B, E, alpha or beta; an end at a bound of E is the bound, else 0 or inf.

        That of E has the error that all losses have in common; that of a fixed one is its value.
        """
        if name in self.restrictions.fixed:
            return (self.restrictions.fixed[name],) * 2
        if self.restrictions.tied and name == "alpha":
            name = "beta"
        place = {"E": 0, "B": 1, "beta": 2, "A": 3 + index, "alpha": self._alpha(index)}[name]
        if (place, level) not in self._kept:
            self._kept[place, level] = self._profile(place, level)
        low, high = self._kept[place, level]
        return (float(np.exp(low)), float(np.exp(high))) if name in ("A", "B") else (low, high)

    def _profile(self, place: int, level: float) -> tuple[float, float]:
        offset, matrix = self.from_free
        turn, shift = (self.uncentred @ matrix)[self.free], (self.uncentred @ offset)[self.free]
        back, place = np.linalg.inv(turn), self.free.index(place)
        inverse = turn @ self.fit.inverse[np.ix_(self.free, self.free)] @ turn.T
        turned = dataclasses.replace(self.fit, theta=turn @ self.fit.theta[self.free] + shift, inverse=inverse)
        lower, upper = self.bounds()
        amplitudes = [1, *range(3, 3 + len(self.heads))]  # ln A and ln B are not bounded as u and v are
        lower[amplitudes], upper[amplitudes] = -np.inf, np.inf
        lower, upper = lower[self.free], upper[self.free]

        def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            value, jacobian = self.of_free((theta - shift) @ back.T)
            return value, jacobian @ back

        ends = fitting.profile(model, self.y, turned, place, level, lower, upper)
        return ends if self.free[place] > 0 else self.shared.widened(turned.theta[0], ends, level, lower[0])

    def draws(self, count: int, seed: int, method: str | None) -> DrawsND:
        """Refits of data drawn anew; kept, so that asking again costs nothing. E has the error that all losses have in common.

        method: "noise": the fitted law and normal noise of the residuals' spread, itself uncertain (default of least squares);
        "runs": runs drawn with replacement within each H (default of Huber's loss, whose noise is not normal).

        Raises ValueError for another method, or noise without degrees of freedom.
        """
        method = method or ("noise" if self.huber_delta is None else "runs")
        if method not in ("noise", "runs"):
            raise ValueError(f'method = {method!r}: allowed are "noise" and "runs"')
        if not self.fit.dof > 0:
            count = len(self.free)
            raise ValueError(f"{len(self.loss)} runs for {count} coefficients leave no residuals to draw from: add runs")
        if (key := (count, seed, method)) not in self._kept:
            generator = np.random.default_rng(seed)
            start, (offset, matrix) = self.fit.theta[self.free], self.from_free
            if method == "noise":
                fitted = self.model(self.fit.theta)[0]
                free = fitting.bootstrap(fitted, self.fit, count, generator, lambda y: self.refit(start, y)[0])
            else:
                times = self._resampled(count, generator)
                free = fitting.in_parts(lambda times: self.refit(start, self.y, weights=times)[0], times)
            full = (offset + free @ matrix.T) @ self.uncentred.T
            rates = full[:, self._alpha(np.arange(len(self.heads)))]
            shift = self.shared.draws(count, seed)
            self._kept[key] = DrawsND(
                full[:, 0] + shift, full[:, 1], full[:, 2], full[:, 3 : 3 + len(self.heads)], rates, shift
            )
        return self._kept[key]

    def _resampled(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """How often each run is drawn: (S, M)."""
        times = np.zeros((count, len(self.loss)))
        for i in range(len(self.heads)):
            mine = np.flatnonzero(self.group == i)
            times[:, mine] = generator.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), count)
        return times

    def _alpha(self, index):
        """Place of alpha of the H at `index` in theta."""
        return 3 + len(self.heads) + (index if self.alpha_by_heads else 0 * index)


def solved(problem: Problem) -> Problem:
    """The problem with its minimum. Raises ValueError for runs that no L(N, D) can be fitted to."""
    _check(problem)
    free, (offset, matrix) = problem.free, problem.from_free
    theta, total = problem.refit(_starts(problem)[:, free])
    lower, upper = (ends[free] for ends in problem.bounds())
    start = theta[np.argmin(total)]
    if problem.huber_delta is not None:  # where most residuals count linearly, the steps are many
        start = problem.refit(start[None], iterations=1000)[0][0]
    found = fitting.fit(problem.of_free, problem.y, start, lower=lower, upper=upper, huber_delta=problem.huber_delta)
    theta, inverse = offset + matrix @ found.theta, matrix @ found.inverse @ matrix.T
    fixed = problem.restrictions.fixed
    if "A" not in fixed and (theta[3 : 3 + len(problem.heads)] < _VANISHED).any():
        raise ValueError("the losses do not fall with size: the fit puts A at 0; L(N, D) needs runs that differ in N alone")
    if "B" not in fixed and theta[1] < _VANISHED:
        raise ValueError("the losses do not fall with tokens: the fit puts B at 0; L(N, D) needs runs that differ in D alone")
    bound = tuple(free[i] for i in found.bound)
    return dataclasses.replace(problem, fit=dataclasses.replace(found, theta=theta, inverse=inverse, bound=bound))


def _starts(problem: Problem) -> np.ndarray:
    """theta_KxP at the best valleys of a grid over (alpha, beta): for each, E, B and A_H are linear and not negative."""
    log_n0, log_d0 = problem.center
    x, z = np.log(problem.params) - log_n0, np.log(problem.tokens) - log_d0
    root = np.sqrt(problem.weight) / (problem.loss if problem.log else 1.0)
    mine = problem.group[:, None] == np.arange(len(problem.heads))
    fixed, tied = problem.restrictions.fixed, problem.restrictions.tied
    alphas, betas = (np.array([fixed[name]]) if name in fixed else _GRID for name in ("alpha", "beta"))
    squares, linear = np.full((len(alphas), len(betas)), np.inf), {}
    names = ["E", "B", *["A"] * len(problem.heads)]
    known = np.array([name in fixed for name in names])
    for i, alpha in enumerate(alphas):
        for j, beta in enumerate(betas):
            if tied and i != j:
                continue
            shrunk = {"E": 1.0, "B": np.exp(-beta * log_d0), "A": np.exp(-alpha * log_n0)}
            amplitudes = np.array([fixed.get(name, 0.0) * shrunk[name] for name in names])
            design = np.column_stack([np.ones_like(x), np.exp(-beta * z), mine * np.exp(-alpha * x)[:, None]])
            target = root * (problem.loss - design @ amplitudes)
            if known.all():
                rest = np.linalg.norm(target)
            else:
                amplitudes[~known], rest = optimize.nnls(root[:, None] * design[:, ~known], target)
            linear[i, j], squares[i, j] = amplitudes, rest**2
    around = np.pad(squares, 1, constant_values=np.inf)
    shifts = [(i, j) for i in range(3) for j in range(3)]
    valleys = squares <= np.min([around[i : i + len(alphas), j : j + len(betas)] for i, j in shifts], axis=0)
    valleys &= np.isfinite(squares)
    found = sorted(np.argwhere(valleys).tolist(), key=lambda place: squares[tuple(place)])[:8]
    lower, upper = problem.bounds()
    starts = []
    for i, j in found:
        entropy, b, *a = linear[i, j]
        rates = [alphas[i]] * (len(problem.heads) if problem.alpha_by_heads else 1)
        logs = np.log(np.maximum([b, *a], 1e-3 * problem.loss.min()))
        starts.append([entropy, logs[0], betas[j], *logs[1:], *rates])
    return np.clip(np.array(starts), lower, upper)


def _check(problem: Problem) -> None:
    """Raises ValueError for runs that no L(N, D) can be fitted to: what is free must be told apart, with a run to spare."""
    params, tokens, loss, restrictions = problem.params, problem.tokens, problem.loss, problem.restrictions
    for name, values in (("params", params), ("tokens", tokens), ("loss", loss), ("weights", problem.weight)):
        if (bad := values[~((values > 0) & np.isfinite(values))]).size:
            raise ValueError(f"{name} = {bad[0]:g}: must be above 0 and finite")
    fitting.require(loss.min(initial=np.inf), huber_delta=problem.huber_delta)
    free, of_size, of_data = restrictions.free, restrictions.of("A", "alpha"), restrictions.of("B", "beta")
    said = f"{_NUMBERS[len(free)]}{'' if len(free) == len(NAMES) else ' free'} coefficient{'s' * (len(free) > 1)}"
    if len(loss) <= len(free):
        raise ValueError(f"{len(loss)} runs: L(N, D) has {said}, it needs {len(free) + 1} runs or more")
    level = ["E"] if "E" in free else []
    counts = len(np.unique(params)), len(np.unique(tokens))
    for name, own, count in (("sizes", of_size, counts[0]), ("token counts", of_data, counts[1])):
        if own and count < len([*level, *own]):
            raise ValueError(
                f"{count} different {name}: to fit {', '.join([*level, *own])} takes {len([*level, *own])} or more"
            )
    if sum(counts) - 1 < len(free):
        raise ValueError(
            f"{counts[0]} different sizes and {counts[1]} token counts: to fit {', '.join(free)} takes {len(free) + 1} of both "
            "together"
        )
    if of_size and of_data and (factor := spread(problem)) < MIN_SPREAD:
        raise ValueError(
            f"tokens follow size in all runs (D = k N^p within a factor of {factor:.3f}): the terms of N and of D "
            "can't be told apart; train some sizes on fewer or more tokens"
        )


def spread(problem: Problem) -> float:
    """By which factor tokens spread about their trend in N, within an H."""
    x, z = np.log(problem.params), np.log(problem.tokens)
    design = np.column_stack([x, problem.group[:, None] == np.unique(problem.group)])
    rest = z - design @ np.linalg.lstsq(design, z)[0]
    return float(np.exp(np.ptp(rest)))
