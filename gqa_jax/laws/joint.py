"""One law for all heads, L(N, n_h, n_kv) = E + A(H) (N / N0)^-b(H), for heads that were not trained too.

ln A and b are compact functions of the heads. With u = log2 n_h, v = log2 n_kv, and f_p(n) = (1 - n^-p) / p, which is ln n
for p = 0, so that `power` is a power plus a constant in n_h and in n_kv:

    quadratic   ln A = c0 + c1 u + c2 v + c3 u^2 + c4 v^2               b = d0 + d1 u + d2 v
    power       ln A = c0 + c1 f_p(n_h) + c2 f_p(n_kv)                  b = d0 + d1 f_p(n_h) + d2 f_p(n_kv)

The runs of a head configuration may deviate from a compact law together, by u_H ~ Normal(0, tau^2) in ln(L - E); an interval
that took them for independent would be too narrow. tau is found by restricted maximum likelihood (Patterson and
Thompson 1971), the coefficients then by least squares with that covariance: plain least squares where tau = 0.

Which functions was measured (docs/laws.md, "Laws for all heads"): b differs between heads, and `quadratic` predicts heads that
were left out the best. It turns beyond the trained heads (on the paper's points at n_h = 35); `power` does not, and is there
for those.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize

from gqa_jax import costs
from gqa_jax.laws import confounding, fitting
from gqa_jax.laws import runs as run_table
from gqa_jax.laws.block import SMALLEST_B
from gqa_jax.laws.fitting import SharedError
from gqa_jax.laws.heads import Heads
from gqa_jax.laws.law import PowerLaw, closest
from gqa_jax.laws.posterior import Draws
from gqa_jax.shapes import Aspect

MIN_HEADS = {"quadratic": 3, "power": 5}  # head configurations; with them runs are more than coefficients
_RULE_SIZES = 8
LEAST_P, MOST_P = -1.0, 4.0
#: (n_h, n_kv, x) of points, x = ln(N / N0): three arrays (N,).
Where = tuple[np.ndarray, np.ndarray, np.ndarray]
_NAMES = {"quadratic": ("1", "log2 n_h", "log2 n_kv", "log2^2 n_h", "log2^2 n_kv"), "power": ("1", "f_p(n_h)", "f_p(n_kv)")}
#: In which order they are taken up, as far as the trained heads tell them apart: (of ln A?, which function).
_ORDER = {
    "quadratic": ((True, 0), (False, 0), (True, 1), (True, 2), (False, 1), (False, 2), (True, 3), (True, 4)),
    "power": ((True, 0), (False, 0), (True, 1), (True, 2), (False, 1), (False, 2)),
}
_EXPONENTS = (-0.5, 0.0, 0.5, 1.0, 2.0)  # p to start from
_GRID_E, _STARTS = 24, 8


@dataclass(frozen=True)
class Terms:
    """The coefficients of a joint law and what they multiply: theta = (E, p, those of ln A, those of b).

    E is missing where it is given (`entropy`), p in the quadratic form. alpha, b: which functions of the heads are used.
    """

    form: str
    alpha: tuple[int, ...]
    b: tuple[int, ...]
    entropy: float | None = None

    @property
    def names(self) -> list[str]:
        """Of the coefficients."""
        functions = _NAMES[self.form]
        return [
            *(["E"] if self.entropy is None else []),
            *(["p"] if self.form == "power" else []),
            *(f"ln A: {functions[k]}" for k in self.alpha),
            *(f"b: {functions[k]}" for k in self.b),
        ]

    def entropy_of(self, theta: np.ndarray) -> np.ndarray:
        """E (...,) of coefficients (..., P)."""
        return theta[..., 0] if self.entropy is None else np.full(theta.shape[:-1], self.entropy)

    def bounds(self, lowest_loss: float) -> tuple[np.ndarray, np.ndarray]:
        """Of the coefficients: E between 0 and the lowest loss, p where it can be told."""
        ends = {"E": (0.0, lowest_loss * (1 - 1e-4)), "p": (LEAST_P, MOST_P)}
        return tuple(np.array([ends.get(name, (-np.inf, np.inf))[i] for name in self.names]) for i in (0, 1))

    def log_above(self, theta: np.ndarray, where: Where) -> tuple[np.ndarray, np.ndarray]:
        """ln(L - E) (..., N) of coefficients (..., P), and its derivatives (..., N, P); E has no part in it."""
        n_heads, n_kv_heads, x = where
        first = len(self.names) - len(self.alpha) - len(self.b)
        of_alpha, of_b = theta[..., first : first + len(self.alpha)], theta[..., first + len(self.alpha) :]
        p = theta[..., first - 1] if self.form == "power" else np.zeros(theta.shape[:-1])
        functions, by_p = heads_functions(self.form, n_heads, n_kv_heads, p)
        in_alpha, in_b = functions[..., list(self.alpha)], -x[:, None] * functions[..., list(self.b)]
        value = _times(in_alpha, of_alpha) + _times(in_b, of_b)
        gradient = np.concatenate([np.zeros((*value.shape, first)), in_alpha, in_b], axis=-1)
        if self.form == "power":
            gradient[..., first - 1] = _times(by_p[..., list(self.alpha)], of_alpha) - x * _times(by_p[..., list(self.b)], of_b)
        return value, gradient

    def loss(self, theta: np.ndarray, where: Where) -> tuple[np.ndarray, np.ndarray]:
        """The losses (..., N), and their derivatives (..., N, P)."""
        above, gradient = self.log_above(theta, where)
        value = np.exp(np.clip(above, -50, 50))  # far steps of a search
        gradient *= value[..., None]
        if self.entropy is None:
            gradient[..., 0] = 1.0
        return value + self.entropy_of(theta)[..., None], gradient


def choose(form: str, where: Where, trained: int, several_sizes: int, entropy: float | None = None) -> Terms:
    """Those functions of the heads that runs with these heads and sizes tell apart, with a head configuration to spare.

    trained: head configurations; several_sizes: those with two sizes or more, which tell the functions in b apart.
    """
    n_heads, n_kv_heads, x = where
    functions, _ = heads_functions(form, n_heads, n_kv_heads, np.array(0.5))
    most = {True: trained - 1, False: max(1, several_sizes - 1)}
    kept, columns = {True: [], False: []}, []
    for of_alpha, k in _ORDER[form]:
        column = functions[:, k] * (1.0 if of_alpha else x)
        trial = np.stack([*columns, column / max(np.linalg.norm(column), 1e-300)], axis=1)
        if len(kept[of_alpha]) < most[of_alpha] and np.linalg.matrix_rank(trial, tol=1e-6) == trial.shape[1]:
            kept[of_alpha].append(k)
            columns = list(trial.T)
    return Terms(form, tuple(kept[True]), tuple(kept[False]), entropy)


def heads_functions(form: str, n_heads: np.ndarray, n_kv_heads: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The functions (..., N, K) of heads (N,) for exponents p (...,), and their derivatives by p."""
    shape = (*np.shape(p), len(n_heads))
    if form == "quadratic":
        u, v = np.log2(n_heads), np.log2(n_kv_heads)
        functions = np.stack([np.ones_like(u), u, v, u * u, v * v], axis=-1)
        return np.broadcast_to(functions, (*shape, 5)), np.zeros((*shape, 5))
    (f, f_p), (g, g_p) = (_bend(np.log(n), np.asarray(p)[..., None]) for n in (n_heads, n_kv_heads))
    return np.stack([np.ones(shape), f, g], axis=-1), np.stack([np.zeros(shape), f_p, g_p], axis=-1)


def _bend(log_n: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f_p(n) = (1 - n^-p) / p, ln n for p = 0, and its derivative by p."""
    z = p * log_n
    near = np.abs(z) < 1e-3  # where the quotients lose digits: their series
    safe = np.where(near, 1.0, z)
    value = np.where(near, 1 - z / 2 + z**2 / 6 - z**3 / 24, -np.expm1(-safe) / safe)
    slope = np.where(near, -0.5 + z / 3 - z**2 / 8 + z**3 / 30, (np.exp(-safe) * (1 + safe) - 1) / safe**2)
    return log_n * value, log_n**2 * slope


def _times(columns: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    return (columns @ coefficients[..., None])[..., 0]


@dataclass(frozen=True)
class JointLaw:
    """The law of all heads trained at one context, and how sure it is. Made by `fit_joint`."""

    terms: Terms  # the functions of the heads
    fit: fitting.Fit  # of their coefficients, in units where runs are independent
    center: float  # N0
    tau: float  # standard deviation of a head configuration's own offset from the law, in ln(L - E)
    heads_dof: int  # degrees of freedom that it is known from
    #: One row per run: n_heads, n_kv_heads as in the table, query_heads (a number also for d / d_h), params, x, loss, weight,
    #: and above, L - E by plain least squares, which scales the heads' offset.
    runs: pd.DataFrame
    context: int  # as the next four in `LawsByHeads`
    head_dim: float
    vocab_size: float
    size_convention: str
    aspect: Aspect
    warnings: tuple[str, ...] = ()
    shared: SharedError = SharedError()  # noqa: RUF009 (frozen)

    @property
    def coefficients(self) -> pd.Series:
        """E and p where they are fitted, then those of ln A, then those of b."""
        return pd.Series(self.fit.theta, self.terms.names)

    @property
    def covariance(self) -> pd.DataFrame:
        """Of the coefficients, linearised; 0 for one at a bound, nan where they are not determined."""
        return pd.DataFrame(self.fit.covariance, self.terms.names, self.terms.names)

    @property
    def entropy(self) -> float:
        """E, nats per token."""
        return float(self.terms.entropy_of(self.fit.theta))

    @property
    def status(self) -> str:
        """CONVERGED, EDGE (E at 0 or at the lowest loss), BOUND_HIT, DISAGREE or SINGULAR."""
        return "EDGE" if self.terms.entropy is None and 0 in self.fit.bound else self.fit.status

    @property
    def sigma(self) -> float:
        """Standard deviation of a run's loss about the curve of its own heads, nats per token."""
        return self.fit.sigma

    @property
    def dof(self) -> int:
        """Runs minus coefficients."""
        return self.fit.dof

    @property
    def heads(self) -> list[Heads]:
        """The head configurations that were trained."""
        return list(dict.fromkeys(heads_of(self.runs)))

    @property
    def residuals(self) -> pd.DataFrame:
        """One row per run: n_heads, n_kv_heads, params, loss, fitted, residual, and z, the residual in standard deviations.

        These are of a run of any heads, whose own offset (tau) is not known.
        """
        fitted = self.terms.loss(self.fit.theta, at(self.runs))[0]
        scale = np.hypot(self.sigma / np.sqrt(self.runs["weight"]), self.tau * (fitted - self.entropy))
        columns = fitting.residual_columns(self.runs["loss"].to_numpy(), fitted, scale)
        return self.runs[["n_heads", "n_kv_heads", "params"]].assign(**columns)

    @property
    def r_squared(self) -> float:
        return fitting.r_squared(*(self.residuals[name].to_numpy() for name in ("loss", "fitted")))

    def predict(self, n_heads: Any, n_kv_heads: Any, params: Any) -> Any:
        """Loss of models with n_h query heads (real-valued if need be), n_kv key/value heads and N parameters; broadcasts.

        Raises ValueError for heads that the trained ones say nothing of.
        """
        where, shape = self._where(n_heads, n_kv_heads, params)
        return self.terms.loss(self.fit.theta, where)[0].reshape(shape)[()]

    def standard_error(self, n_heads: Any, n_kv_heads: Any, params: Any) -> Any:
        """Of `predict` for heads that were not trained: linearised, their own offset (tau) included, the noise of a run not.

        On the held-out text of the runs: the error that all losses have in common is not in it.
        """
        where, shape = self._where(n_heads, n_kv_heads, params)
        value, jacobian = self.terms.loss(self.fit.theta, where)
        variance = np.einsum("np,pq,nq->n", jacobian, self.fit.covariance, jacobian)
        return np.sqrt(variance + (self.tau * (value - self.entropy)) ** 2).reshape(shape)[()]

    def law(self, heads: Heads | tuple, aspect: Aspect | None = None) -> PowerLaw:
        """L(N) of any heads, also of untrained ones, as (a / N)^b + E; its points are the runs that have these heads, if any.

        A rule like Llama 3's, d / d_h, follows no exact power law: its own is the closest one over the trained range of N, with
        d / L from `aspect` (default: that of the runs).

        Raises ValueError for heads that the trained ones say nothing of, or whose loss would not fall with size.
        """
        heads = Heads(*heads)
        n_heads, x = self._sizes(heads, aspect)
        log_above = self._log_above(self.fit.theta[None], n_heads, heads.n_kv_heads, x)
        alpha, b = closest(log_above, x)[:, 0]
        if not b >= SMALLEST_B:
            raise ValueError(
                f"heads {heads}: by the joint law their loss does not fall with size (b = {b:.4f}): train heads nearer"
            )
        said = list(self.warnings)
        if (miss := np.max(np.abs(np.exp(alpha - b * x) - np.exp(log_above[0])))) > self.sigma:
            said.append(f"heads {heads}: a power law misses the joint law by up to {miss:.4f} nats per token")
        n_known, kv_known, _ = at(self.runs)
        for name, asked, known in (("n_h", n_heads, n_known), ("n_kv", heads.n_kv_heads, kv_known)):
            if np.max(asked) > known.max() * (1 + 1e-9) or np.min(asked) < known.min() * (1 - 1e-9):
                said.append(f"heads {heads}: {name} is outside the trained {known.min():g} to {known.max():g}")
        own = self.runs[[one == heads for one in heads_of(self.runs)]]
        params, loss = own["params"].to_numpy(), own["loss"].to_numpy()
        law = PowerLaw(float(self.center * np.exp(alpha / b)), float(b), self.entropy, np.nan, params, loss, tuple(said))
        return dataclasses.replace(law, r_squared=fitting.r_squared(loss, law.predict(params)))

    def draws(
        self, count: int = 1000, seed: int = 0, heads: Sequence[Heads | tuple] | None = None, aspect: Aspect | None = None
    ) -> Draws:
        """Laws of any heads (default: the trained ones) by parametric bootstrap: every run drawn anew, and all fitted again.

        Each H has an offset of its own (tau) in each draw, as one that was not trained has. Of a trained H its own runs say
        more: `LawsByHeads.draws`.
        """
        if count < 2:
            raise ValueError(f"count = {count}: draw 2 or more")
        heads = self.heads if heads is None else [Heads(*one) for one in heads]
        theta, generator = self._refitted(count, seed), np.random.default_rng([seed, 1])
        own_SxH = fitting.noise(self.tau, self.heads_dof, (count, len(heads)), generator)
        alpha_SxH, b_SxH, notes = np.empty_like(own_SxH), np.empty_like(own_SxH), []
        for i, one in enumerate(heads):
            n_heads, x = self._sizes(one, aspect)
            alpha_SxH[:, i], b_SxH[:, i] = closest(self._log_above(theta, n_heads, one.n_kv_heads, x), x)
            if one.n_heads is None:
                notes.append(f"heads {one}: the power law closest to the joint law over the trained sizes")
        b_SxH = np.maximum(b_SxH, SMALLEST_B)
        log_a_SxH = np.log(self.center) + (alpha_SxH + own_SxH) / b_SxH
        entropy_SxH = np.repeat(self.terms.entropy_of(theta)[:, None], len(heads), axis=1)
        sigma_SxH = np.full(b_SxH.shape, self.sigma)
        shift_S = self.shared.draws(count, seed)
        entropy_SxH = entropy_SxH + shift_S[:, None]
        return Draws(heads, entropy_SxH, log_a_SxH, b_SxH, sigma_SxH, "bootstrap", tuple(notes), shift_S)

    def size_interval(self, heads: Heads | tuple, loss: float, level: float = 0.95) -> tuple[float, float]:
        """Interval of N*, the size that reaches `loss` with H, from 1,000 draws; inf above where they do not bound it.

        Raises ValueError for a loss at or below E.
        """
        self.law(heads).solve(loss)
        log_size = np.sort(self.draws(heads=[heads]).log_size(loss)[:, 0])
        low, high = (log_size[round(q * (len(log_size) - 1))] for q in ((1 - level) / 2, (1 + level) / 2))
        return float(np.exp(low)), float(np.exp(high))

    def band(self, heads: Heads | tuple, params: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Interval of the curve of H at each N, on the held-out text of the runs, from 1,000 draws."""
        params, drawn = np.atleast_1d(np.asarray(params, np.float64)), self.draws(heads=[heads])
        loss_SxN = drawn.loss(heads, params, on_this_text=True)
        return tuple(fitting.percentiles(loss_SxN, level))

    def intervals(self, level: float = 0.95) -> pd.DataFrame:
        """Profile-likelihood intervals, one row per coefficient: value, low, high.

        An end is inf where the data do not bound it, the bound of E or p where they reach it, nan for a coefficient at one.
        """
        rows = [(value, *self._interval(i, level)) for i, value in enumerate(self.fit.theta)]
        return pd.DataFrame(rows, self.terms.names, ["value", "low", "high"])

    def _interval(self, i: int, level: float = 0.95) -> tuple[float, float]:
        """Profile-likelihood interval of coefficient i; that of E has the error that all losses have in common."""
        if not self.fit.covariance[i, i] > 0:
            return np.nan, np.nan
        (model, y), (lower, upper) = self._independent, self._bounds
        ends = fitting.profile(model, y, self.fit, i, level, lower, upper)
        if i > 0 or self.terms.entropy is not None:
            return ends
        return self.shared.widened(self.fit.theta[0], ends, level, lower[0])

    def _refitted(self, count: int, seed: int) -> np.ndarray:
        """theta_SxP of losses drawn anew; kept, so that asking again costs nothing."""
        if (count, seed) not in self._kept:
            (model, _), (lower, upper) = self._independent, self._bounds
            self._kept[count, seed] = fitting.bootstrap(
                model(self.fit.theta)[0],
                self.fit,
                count,
                np.random.default_rng([seed, 0]),
                lambda y: fitting.refit(model, y, self.fit.theta, lower=lower, upper=upper)[0],
            )
        return self._kept[count, seed]

    @functools.cached_property
    def _kept(self) -> dict[tuple[int, int], np.ndarray]:
        return {}

    @functools.cached_property
    def _independent(self) -> tuple[fitting.Model, np.ndarray]:
        return independent(self.terms, self.runs, (self.tau / self.sigma) ** 2 if self.sigma > 0 else 0.0)

    @property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return self.terms.bounds(float(self.runs["loss"].min()))

    def _where(self, n_heads: Any, n_kv_heads: Any, params: Any) -> tuple[Where, tuple[int, ...]]:
        arrays = np.broadcast_arrays(*(np.asarray(a, np.float64) for a in (n_heads, n_kv_heads, params)))
        n_heads, n_kv_heads, params = (a.ravel() for a in arrays)
        self._require(n_heads, n_kv_heads)
        return (n_heads, n_kv_heads, np.log(params / self.center)), arrays[0].shape

    def _log_above(self, theta_SxP: np.ndarray, n_heads_J: np.ndarray, n_kv_heads: int, x_J: np.ndarray) -> np.ndarray:
        """ln(L - E)_SxJ."""
        n_kv_heads_J = np.full(n_heads_J.shape, float(n_kv_heads))
        self._require(n_heads_J, n_kv_heads_J)
        return self.terms.log_above(theta_SxP, (n_heads_J, n_kv_heads_J, x_J))[0]

    def _sizes(self, heads: Heads, aspect: Aspect | None) -> tuple[np.ndarray, np.ndarray]:
        """(n_h, x) of models with these heads over the trained range of N: two, or some where n_h follows from the width."""
        least, most = self.runs["params"].min(), self.runs["params"].max()
        if heads.n_heads is not None:
            return np.full(2, float(heads.n_heads)), np.log(np.array([least, most]) / self.center)
        n = np.geomspace(least, most, _RULE_SIZES)
        shape = costs.solve_shape(n, heads, aspect or self.aspect, self.head_dim, self.vocab_size, self.size_convention)
        return np.asarray(shape.n_heads, np.float64), np.log(n / self.center)

    def _require(self, n_heads: np.ndarray, n_kv_heads: np.ndarray) -> None:
        """Raises ValueError for heads that differ from the trained ones where those do not differ from each other."""
        known, asked = (_logs(*pair) for pair in (at(self.runs)[:2], (n_heads, n_kv_heads)))
        away = np.abs(asked - asked @ np.linalg.pinv(known, rcond=1e-9) @ known).max(1, initial=0.0)
        if away.max(initial=0.0) > 1e-6:
            first = int(away.argmax())
            raise ValueError(
                f"heads ({n_heads[first]:g},{n_kv_heads[first]:g}): the trained ones, {', '.join(map(str, self.heads))}, say "
                "nothing of them: n_h or n_kv is the same in all, or both vary only together. Train heads that differ so"
            )


def fit_joint(
    table: pd.DataFrame,
    form: str = "quadratic",
    *,
    entropy: float | None = None,
    log: bool = False,
    huber_delta: float | None = None,
    allow_confounded: bool = False,
) -> JointLaw:
    """One law for all head configurations of a loss table of ONE training context, those with a single run included.

    Args:
      table, entropy, log, huber_delta, allow_confounded, and the weights of runs: as in `fit_by_heads`; intervals and draws of
        a Huber fit are of least squares with the weights that it ends with.
      form: "quadratic" or "power". Functions of the heads that the trained ones can't tell apart are left out (`terms`).

    Raises:
      ValueError: an unknown form, too few head configurations (3; 5 for "power"), none with three sizes over a factor of 4,
        d / d_h query heads without d_model, losses that don't fall with size, or as in `fit_by_heads`.
    """
    rows, said = run_table.usable(table)
    design = confounding.require(rows, allow_confounded)
    law = fit_rows(rows, form, entropy=entropy, log=log, huber_delta=huber_delta)
    params, loss, weight, query_heads = (law.runs[name].to_numpy() for name in ("params", "loss", "weight", "query_heads"))
    all_runs = {Heads(None, 0): run_table.Runs(params, loss, weight, query_heads, run_table.labels_by_count(params))}
    return dataclasses.replace(law, warnings=(*said, *run_table.warnings(all_runs, rows), *design.warnings, *_warnings(law)))


def fit_rows(
    rows: pd.DataFrame,
    form: str = "quadratic",
    *,
    entropy: float | None = None,
    log: bool = False,
    huber_delta: float | None = None,
) -> JointLaw:
    """`fit_joint` of rows of `run_table.usable`, without its warnings."""
    if form not in MIN_HEADS:
        raise ValueError(f"form {form!r} is unknown: use {' or '.join(MIN_HEADS)}")
    common = run_table.common(rows)
    groups = run_table.by_heads(rows)
    runs = _runs(groups, common["head_dim"])
    fitting.require(runs["loss"].min(), entropy, huber_delta)
    center = float(np.exp(np.mean(np.log(runs["params"]))))
    runs = runs.assign(x=np.log(runs["params"] / center))
    terms = _terms(form, groups, runs, entropy)
    runs, plain = fit_independent(terms, runs, log, huber_delta)
    ratio = between_heads(terms, runs, plain.theta)
    fit = polish(terms, runs, *independent(terms, runs, ratio), plain.theta[None])
    if plain.status == "DISAGREE":  # what the heads' offsets and Huber's weights come from
        fit = dataclasses.replace(fit, status=plain.status)
    _falls(terms, fit, runs)
    return JointLaw(
        terms,
        fit,
        center,
        float(fit.sigma * np.sqrt(ratio)),
        len(groups) - len(terms.alpha),
        runs,
        **common,
        shared=run_table.shared_error(rows),
    )


def _runs(groups: dict[Heads, run_table.Runs], head_dim: float) -> pd.DataFrame:
    """One row per run, by heads."""
    frames = []
    for heads, runs in groups.items():
        if heads.group is not None:
            raise ValueError(f"heads {heads}: a joint law needs numbers of key/value heads, give the rows with their own heads")
        if heads.n_heads is None and not np.isfinite(runs.d_model).all():
            raise ValueError(f"heads {heads}: the table needs d_model, for the number of query heads of each size")
        frame = pd.DataFrame({"params": runs.params, "loss": runs.loss, "sem": runs.sem})
        frame.insert(0, "n_heads", pd.array([heads.n_heads] * len(frame), dtype="Int64"))
        frame.insert(1, "n_kv_heads", heads.n_kv_heads)
        frame.insert(
            2, "query_heads", np.broadcast_to(heads.query_heads(runs.d_model, head_dim), len(frame)).astype(np.float64)
        )
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _terms(form: str, groups: dict[Heads, run_table.Runs], runs: pd.DataFrame, entropy: float | None) -> Terms:
    """The functions of the heads that these runs tell apart."""
    if len(groups) < MIN_HEADS[form]:
        raise ValueError(f"{len(groups)} head configurations: a {form} joint law needs {MIN_HEADS[form]} or more")
    if not any(one.n_sizes >= run_table.MIN_SIZES and one.span >= run_table.MIN_SPAN for one in groups.values()):
        raise ValueError(
            f"a joint law needs a head configuration with {run_table.MIN_SIZES} sizes over a factor of "
            f"{run_table.MIN_SPAN:g} or more: train smaller or larger ones"
        )
    several_sizes = sum(one.n_sizes > 1 for one in groups.values())
    return choose(form, at(runs), len(groups), several_sizes, entropy)


def _falls(terms: Terms, fit: fitting.Fit, runs: pd.DataFrame) -> None:
    """Raises ValueError where b of trained heads is not above 0."""
    n_heads, n_kv_heads, _ = at(runs)
    at_0, at_1 = (terms.log_above(fit.theta, (n_heads, n_kv_heads, np.full(len(runs), x)))[0] for x in (0.0, 1.0))
    if (b := at_0 - at_1).min() < SMALLEST_B:
        heads = heads_of(runs)[int(b.argmin())]
        raise ValueError(f"heads {heads}: by the joint law the losses do not fall with size (b = {b.min():.4f}): no power law")


def _warnings(law: JointLaw) -> list[str]:
    found = fitting.doubts(law.fit, len(law.runs), len(law.fit.theta), "the joint fit")
    n_heads, n_kv_heads, _ = at(law.runs)
    loss, fitted = (law.residuals[name].to_numpy() for name in ("loss", "fitted"))
    names = heads_of(law.runs)
    group, weights = np.array([names.index(one) for one in names]), law.runs["weight"].to_numpy()
    found += fitting.poor(loss, fitted, {"N": law.runs["params"].to_numpy()}, dof=law.dof, group=group, weights=weights)
    for axis, counts, line in (("query", n_heads, 1), ("key/value", n_kv_heads, 2)):
        if np.ptp(counts) > 0 and line not in law.terms.alpha:
            found.append(
                f"the trained heads are too few, or too alike, to show an effect of {axis} heads: none of their own is assumed"
            )
        elif np.ptp(counts) > 0 and law.terms.form == "quadratic" and line + 2 not in law.terms.alpha:
            found.append(
                f"the trained heads are too few to show a curvature in {axis} heads: ln A is linear in their logarithm"
            )
    typical = law.tau * float(law.runs["above"].mean())
    if typical > law.sigma:
        found.append(
            f"heads deviate from the joint law by {typical:.4f} nats per token, runs from the curve of their heads by "
            f"{law.sigma:.4f}: of heads that were trained the laws by heads say more"
        )
    if law.terms.entropy is None:
        ends = (np.nan, np.nan) if law.status in ("EDGE", "SINGULAR") else law._interval(0)
        rests = "answers at low losses rest on it; train smaller and larger sizes"
        words = ("losses of larger models", "the sizes that were trained", rests)
        found += fitting.floor(law.entropy, law.runs["loss"].min(), ends, words)
    return found


def _logs(n_heads: np.ndarray, n_kv_heads: np.ndarray) -> np.ndarray:
    if not (np.min(n_heads, initial=1) > 0 and np.min(n_kv_heads, initial=1) > 0):
        raise ValueError("numbers of heads must be above 0")
    return np.stack([np.ones_like(n_heads), np.log2(n_heads), np.log2(n_kv_heads)], axis=1)


def fit_independent(terms: Terms, runs: pd.DataFrame, log: bool, huber_delta: float | None) -> tuple[pd.DataFrame, fitting.Fit]:
    """The fit that takes all runs for independent; and the runs with their weights and L - E, instead of sem."""
    loss, sem = runs["loss"].to_numpy(), runs["sem"].to_numpy()
    base = 1 / loss**2 if log else np.ones_like(loss)
    runs = runs.drop(columns="sem").assign(weight=base / base.mean(), above=1.0)  # L - E, as soon as a fit knows it
    weighted = np.isfinite(sem).all() and np.ptp(sem) > 1e-3 * sem.mean()
    for _ in range(4 if weighted else 1):
        model, y = independent(terms, runs, 0.0)
        fit = polish(terms, runs, model, y, global_starts(terms, runs), huber_delta)
        if weighted:
            residual = terms.loss(fit.theta, at(runs))[0] - loss
            weight = base / (fitting.between_runs(residual**2, sem**2, fit.dof) + sem**2)
            runs = runs.assign(weight=weight / weight.mean())
    if huber_delta is not None:
        runs = runs.assign(weight=runs["weight"] * fit.weights)
    return runs.assign(above=terms.loss(fit.theta, at(runs))[0] - terms.entropy_of(fit.theta)), fit


def global_starts(terms: Terms, runs: pd.DataFrame) -> np.ndarray:
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
    linear = terms.log_above(theta, at(runs))[1][..., first:]  # columns of a linear model of ln(L - E)
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


def independent(terms: Terms, runs: pd.DataFrame, ratio: float) -> tuple[fitting.Model, np.ndarray]:
    """The law and the losses in units where the noise of all runs is independent, of standard deviation sigma (`_turning`)."""
    where, turn = at(runs), _turning(runs)

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


def between_heads(terms: Terms, runs: pd.DataFrame, theta: np.ndarray) -> float:
    """tau^2 / sigma^2 of greatest restricted likelihood, for the law linearised at the plain fit; 0 where that is greatest."""
    turn = _turning(runs)
    size = (runs["weight"].to_numpy() * runs["above"].to_numpy() ** 2) @ _members(runs)
    value, jacobian = terms.loss(theta, at(runs))
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


def at(runs: pd.DataFrame) -> Where:
    """(n_h, n_kv, x) of the runs; n_h a number also for d / d_h."""
    return tuple(runs[name].to_numpy(np.float64) for name in ("query_heads", "n_kv_heads", "x"))


def heads_of(runs: pd.DataFrame) -> list[Heads]:
    return [Heads.of(n, k) for n, k in zip(runs["n_heads"], runs["n_kv_heads"], strict=True)]


def _members(runs: pd.DataFrame) -> np.ndarray:
    """1 where run N has heads G."""
    names = heads_of(runs)
    number = {name: g for g, name in enumerate(dict.fromkeys(names))}
    return np.eye(len(number))[[number[name] for name in names]]
