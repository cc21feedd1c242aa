"""L(N, D) = E + A / N^alpha + B / D^beta: loss against parameters and training tokens, with its uncertainty.

Source: Hoffmann et al. 2022 (arXiv 2203.15556), Eq. 2 and Approach 3: Huber's loss of residuals of ln L, delta = 1e-3, summed.
How it goes wrong: averaged instead of summed it stops early (Besiroglu et al. 2024, arXiv 2404.10102, refitted their data).
With heads, A (and alpha, if asked) belong to H; B, beta and E to the data: the law behind equal training cost (`aligned.py`).

`loss_nd_fit.py` finds the minimum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from gqa_jax.laws import fitting, loss_nd_fit
from gqa_jax.laws import runs as run_table
from gqa_jax.laws.fitting import SharedError
from gqa_jax.laws.heads import Heads
from gqa_jax.laws.loss_nd_fit import LARGEST_RATE, SMALLEST_RATE, DrawsND, Problem
from gqa_jax.laws.runs import only
from gqa_jax.shapes import Aspect, paper_aspect

NARROW_SPREAD = 4.0


class Optimum(NamedTuple):
    """The model that reaches the least loss with a training budget of C = 6 N D FLOPs."""

    params: float  # N
    tokens: float  # D
    loss: float  # nats per token


@dataclass(frozen=True, eq=False)
class LossND:
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
        n = float(_optimal_params(compute_flops, np.log(self.A), np.log(self.B), self.alpha, self.beta))
        d = compute_flops / 6 / n
        return Optimum(n, d, float(self.predict(n, d)))

    def optimal_interval(self, compute_flops: float, level: float = 0.95) -> pd.DataFrame:
        """`optimal` with its interval from the draws: rows params, tokens, loss; columns value, low, high."""
        best, drawn = self.optimal(compute_flops), self.draws()
        log_a, alpha = drawn.log_a_SxH[:, self.index], drawn.alpha_SxH[:, self.index]
        n = _optimal_params(compute_flops, log_a, drawn.log_b, alpha, drawn.beta)
        d = compute_flops / 6 / n
        loss = drawn.predict(self.index, n[:, None], d[:, None])[:, 0]
        low, high = fitting.percentiles(np.stack([n, d, loss], axis=1), level)
        return pd.DataFrame({"value": list(best), "low": low, "high": high}, ["params", "tokens", "loss"])

    @property
    def status(self) -> str:
        """CONVERGED; EDGE: E at 0 or the lowest loss; BOUND_HIT: another bound; DISAGREE: the routes differ; SINGULAR."""
        return self.problem.status

    @property
    def sigma(self) -> float:
        """Standard deviation of a residual (of ln L, if `log`), pooled over H; nan without degrees of freedom."""
        return self.problem.fit.sigma

    @property
    def dof(self) -> int:
        """Runs minus fitted coefficients."""
        return self.problem.fit.dof

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

    def held_out(self) -> pd.DataFrame:
        """Extrapolation error to the largest N and to the most tokens, each left out: see `Problem.held_out`."""
        return self.problem.held_out()

    def draws(self, count: int = 1000, seed: int = 0, method: str | None = None) -> DrawsND:
        """Refits of the coefficients, `count` of them, kept: see `Problem.draws`."""
        return self.problem.draws(count, seed, method)


class LossNDByHeads(Mapping[Heads, LossND]):
    """One law per head configuration of one training context: A (or A and alpha) of each H, shared B, beta and E.

    Attributes:
      context: training context, tokens; head_dim, vocab_size: of the runs, or the paper's where the table has none.
      size_convention: what N counts (`gqa_jax.costs.CONVENTIONS`): "exact" with norms, as trained; "figures" without.
      aspect: d / L of models as a function of N: between the sizes that were trained, else the paper's.
      problem: what was fitted, all H at once.
      warnings: sentences that every answer from these laws must carry.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        context: int,
        head_dim: float,
        vocab_size: float,
        size_convention: str = "figures",
        aspect: Aspect | None = None,
        warnings: Sequence[str] = (),
    ):
        self.problem, self.context, self.head_dim, self.vocab_size = problem, context, head_dim, vocab_size
        self.size_convention, self.aspect = size_convention, aspect or paper_aspect()
        self.warnings = tuple(warnings)
        self._laws = {heads: _law(problem, i, self.warnings) for i, heads in enumerate(problem.heads)}

    def __getitem__(self, heads: Heads | tuple) -> LossND:
        return self._laws[heads]

    def __iter__(self) -> Iterator[Heads]:
        return iter(self._laws)

    def __len__(self) -> int:
        return len(self._laws)

    @property
    def status(self) -> str:
        """As `LossND.status`, of the one fit."""
        return self.problem.status

    @property
    def sigma(self) -> float:
        """Standard deviation of a residual of ln L (of L, if `log` was False), pooled over H."""
        return self.problem.fit.sigma

    @property
    def shared(self) -> SharedError:
        """As `LawsByHeads.shared`: in the intervals and draws of E."""
        return self.problem.shared

    @property
    def dof(self) -> int:
        """Runs minus fitted coefficients."""
        return self.problem.fit.dof

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

    def held_out(self) -> pd.DataFrame:
        """Extrapolation error to the largest N and to the most tokens, each left out: see `Problem.held_out`."""
        return self.problem.held_out()

    def draws(self, count: int = 1000, seed: int = 0, method: str | None = None) -> DrawsND:
        """Refits of all coefficients, in the order of the heads: see `Problem.draws`."""
        return self.problem.draws(count, seed, method)


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
    known = loss_nd_fit.restrictions(fixed, alpha_equals_beta, y.min(initial=np.inf))
    problem = loss_nd_fit.fit((None,), n, d, y, w, np.zeros(len(n), int), False, log, huber_delta, known)
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
    known = loss_nd_fit.restrictions(fixed, alpha_equals_beta, y.min(initial=np.inf))
    problem = loss_nd_fit.fit(heads, n, d, y, np.ones_like(y), group, alpha_by_heads, log, huber_delta, known)
    problem = dataclasses.replace(problem, shared=run_table.shared_error(rows))
    return LossNDByHeads(
        problem,
        context=int(rows["context"].iloc[0]),
        head_dim=only(rows, "head_dim", 64.0),
        vocab_size=only(rows, "vocab_size", 50_304.0),
        size_convention=run_table.size_convention(rows),
        aspect=run_table.aspect(rows),
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
    if both and (spread := loss_nd_fit.spread(problem.params, problem.tokens, problem.group)) < NARROW_SPREAD:
        found.append(f"tokens spread by a factor of {spread:.2g} about their trend in N only: A and B are hardly told apart")
    if "E" in known.free:
        own = stats.t.ppf(0.975, fit.dof) * np.sqrt(fit.covariance[0, 0])
        half = np.hypot(own, problem.shared.reach(0.95))  # linearised; nan where it is not known
        ends = max(fit.theta[0] - half, 0.0), fit.theta[0] + half
        words = ("larger models and more tokens", "the runs", "losses near it are guesses")
        found += fitting.floor(fit.theta[0], problem.loss.min(), ends, words)
    return found


def _optimal_params(compute_flops, log_a, log_b, alpha, beta):
    log_g = (np.log(alpha) + log_a - np.log(beta) - log_b) / (alpha + beta)
    return np.exp(log_g + beta / (alpha + beta) * np.log(compute_flops / 6))


def _with_heads(heads: Heads, frame: pd.DataFrame) -> pd.DataFrame:
    frame.insert(0, "n_heads", heads.n_heads)
    frame.insert(1, "n_kv_heads", heads.n_kv_heads)
    return frame.astype({"n_heads": "Int64"})
