"""What runs say against their law: one calibrated suite of tests per fit, and how much it could have seen.

R^2 says nothing, and residuals that look small may all lean one way. So every fit is asked, at its linearised least squares
(whitened residuals r of n runs, whitened derivatives J by p coefficients):

    outliers   does one run lie off the others' law? The largest externally studentised residual
    together   do runs of a size deviate together, does the law bend (a drift of the exponent, a break at one of some places),
               does the largest or the smallest size lie off what the others predict? One Bayes factor of all these against
               none, the noise integrated out; its parts name what it was
    repeats    do runs deviate from the law more than repeated runs from each other? F, where runs were repeated

Under the law r lives in the n - p directions that J leaves, evenly in all of them. Thousands of such r are drawn, each test is
made on each, and the suite fires where its least p-value (over the tests' shares of attention) is among the lowest 5% of
theirs: so the false alarms of the whole suite are 5%, whatever the tests have in common. Runs that lie off are named first, and
left out of the other tests. A Bayes factor has the highest power on average over its alternatives that a test of 5% can have;
what that is, and what a test would see that looked for one of them only, is in `docs/laws.md`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import linalg, stats

from gqa_jax.formatting import short
from gqa_jax.laws import bends
from gqa_jax.laws.block import curves

if TYPE_CHECKING:
    from gqa_jax.laws.by_heads import LawsByHeads

LEVEL = 0.05  # false alarms of the whole suite
_DRAWS = 8000
#: Shares of attention: a test's p-value is divided by its share. Outliers that matter are seen with little.
ATTENTION = {"outliers": 0.15, "together": 1.0, "repeats": 0.2}
SIZES, LARGEST, SMALLEST = "sizes", "largest", "smallest"  # alternatives beside the directions
_PRIOR = {SIZES: 0.48, LARGEST: 0.02, SMALLEST: 0.02}  # of the alternatives; the directions share the rest, the first has half
_KAPPAS = (0.3, 1.0, 3.0, 9.0, 30.0)  # variance of what a size shares over a run's own
_GAINS = (3.0, 10.0, 100.0)  # square of how far a direction is shifted, in standard errors: of its Normal prior
_CLEAR = 0.25  # share of the Bayes factor from which an alternative is named
_MOST_OUTLIERS = 0.1  # of the runs: more are no outliers
_HOPELESS = 0.3  # a drift of the exponent that is no drift: exponents are about 0.2
_BREAKS = (0.2, 0.4, 0.6, 0.8)  # of the way from the smallest to the largest size, in ln N
_POWER = 0.8  # of what could have been seen
_PART = 0.2  # of the largest singular value: directions of which J leaves less carry no test
_SMALL = 1e-9  # of the length of a direction: J leaves nothing of it


@dataclasses.dataclass(frozen=True)
class Direction:
    """A way in which losses may lie off the law together."""

    name: str
    shift: np.ndarray  # (n,) of the losses, nats per token, unwhitened, for an amount of 1


@dataclasses.dataclass(frozen=True)
class Outlier:
    """A run that lies off the law of the others."""

    run: int  # its row
    shift: float  # of its loss against the law of the others, nats per token
    z: float  # in standard errors (externally studentised)


@dataclasses.dataclass(frozen=True)
class Doubts:
    """What the suite found. Made by `suite`."""

    p_value: float  # of the whole suite: at most LEVEL where it fires; nan without degrees of freedom
    tests: pd.DataFrame  # a row per test: test, statistic, p_value (its own), fires
    outliers: tuple[Outlier, ...]
    shares: dict[str, float]  # of the alternatives in the Bayes factor of `together`: SIZES, LARGEST, SMALLEST, directions
    amounts: pd.DataFrame  # a row per direction: direction, amount, error, z, seen (what has a chance of 80% to be seen)
    size_means: pd.DataFrame  # a row per size: size (label), runs, mean residual (nats per token), error
    size_effect: float  # standard deviation of what a size shares that has a chance of 80% to be seen, nats per token

    @property
    def fires(self) -> bool:
        return bool(self.p_value <= LEVEL)

    def found(self, test: str) -> bool:
        """Whether one test is among what fired."""
        return self.fires and bool(self.tests.set_index("test")["fires"].get(test, False))

    @property
    def named(self) -> list[str]:
        """The alternatives that speak for what `together` found, the clearest first; none where it found nothing."""
        if not self.found("together"):
            return []
        order = sorted(self.shares, key=self.shares.get, reverse=True)
        return [name for i, name in enumerate(order) if i == 0 or self.shares[name] > _CLEAR]


_TESTS, _AMOUNTS = ["test", "statistic", "p_value", "fires"], ["direction", "amount", "error", "z", "seen"]
_MEANS = ["size", "runs", "mean", "error"]


def nothing() -> Doubts:
    """Where no degrees of freedom are left: nothing can be said."""
    tests, amounts, means = (pd.DataFrame(columns=names) for names in (_TESTS, _AMOUNTS, _MEANS))
    return Doubts(np.nan, tests, (), {}, amounts, means, np.nan)


def suite(
    jacobian: np.ndarray,
    residual: np.ndarray,
    weights: np.ndarray,
    sizes: np.ndarray,
    directions: Sequence[Direction] = (),
    repeats: np.ndarray | None = None,
    seed: int = 0,
) -> Doubts:
    """The tests of a fit.

    Args:
      jacobian: (n, p) derivatives of the fitted losses by the coefficients that are free.
      residual: (n,) measured minus fitted, nats per token. weights: (n,) of their squares, 1 on average.
      sizes: (n,) labels of the size of each run.
      directions: bends that are looked for.
      repeats: (n,) labels: runs with the same one repeat each other. None: none do.
    """
    root = np.sqrt(np.asarray(weights, np.float64))
    J, r = jacobian * root[:, None], residual * root
    generator = np.random.default_rng([seed, 14])
    found = _Space(J, r, root)
    if found.freedom < 2:
        return nothing()
    outliers: list[Outlier] = []
    p_outliers, statistic = 1.0, np.nan
    while len(outliers) < max(1, int(_MOST_OUTLIERS * len(r))) and found.freedom > 2:
        t = found.studentised()
        worst = int(np.argmax(np.abs(t)))
        null = np.abs(found.studentised(found.null(generator))).max(1)
        p = _rank(abs(t[worst]), null)
        if not outliers:
            p_outliers, statistic = p, abs(t[worst])
        if p > LEVEL * ATTENTION["outliers"] / 2:
            break
        outliers.append(Outlier(worst, float(found.shift(worst)), float(t[worst])))
        found = found.without(worst)
    labels = np.unique(sizes)
    inside, lengths = found.span(_indicators(sizes))
    if inside.shape[1] >= found.freedom - 1:
        inside, lengths = inside[:, :0], lengths[:0]
    null = found.null(generator)
    statistics: dict[str, tuple[float, np.ndarray | None, float]] = {"outliers": (statistic, None, p_outliers)}
    if repeats is not None and len(np.unique(repeats)) < len(repeats):
        basis, _ = found.span(_indicators(repeats))
        freedom = basis.shape[1], found.freedom - basis.shape[1]
        if min(freedom) > 0:
            value, of_null = (_f(w, basis) for w in (found.w[None], null))
            statistics["repeats"] = (float(value[0]), stats.f.sf(of_null, *freedom), float(stats.f.sf(value[0], *freedom)))
    bent = [found.project(d.shift * root) for d in directions]
    alternatives = {d.name: v for d, v in zip(directions, bent, strict=True)}
    if len(labels) > 2:
        alternatives |= {
            LARGEST: found.project((sizes == labels[-1]) * root),
            SMALLEST: found.project((sizes == labels[0]) * root),
        }
    together = _together(found.freedom, inside, lengths, alternatives)
    shares: dict[str, float] = {}
    if together:
        parts = {name: factor(found.w[None])[0] for name, factor in together.items()}
        value = np.logaddexp.reduce(list(parts.values()))
        of_null = np.logaddexp.reduce([factor(null) for factor in together.values()])
        shares = {name: float(np.exp(part - value)) for name, part in parts.items()}
        statistics["together"] = (float(value), _rank_all(of_null), _rank(float(value), of_null))
    of_outliers = _rank_all(np.abs(found.studentised(null)).max(1))
    least_null = np.min(
        [of_outliers / ATTENTION["outliers"], *(n / ATTENTION[k] for k, (_, n, _) in statistics.items() if n is not None)], 0
    )
    scores = {name: p / ATTENTION[name] for name, (_, _, p) in statistics.items()}
    limit = float(np.quantile(least_null, LEVEL))
    tests = pd.DataFrame(
        [(name, value, p, scores[name] <= limit) for name, (value, _, p) in statistics.items()], columns=_TESTS
    )
    p_value = float((1 + np.sum(least_null <= min(scores.values()))) / (1 + len(least_null)))
    sigma = found.sigma(inside)
    critical = np.sqrt(stats.f.isf(min(limit / 2, 0.5), 1, max(found.freedom - inside.shape[1], 1))) + stats.norm.ppf(_POWER)
    rows = []
    for direction, v in zip(directions, bent, strict=True):
        length = np.linalg.norm(v)
        if length <= _SMALL:
            continue
        amount, error = float(v @ found.w / length**2), float(sigma / length)
        rows.append((direction.name, amount, error, amount / error if error > 0 else np.nan, critical * error))
    kept = np.isin(np.arange(len(r)), [one.run for one in outliers], invert=True)
    means = [
        (label, int(at.sum()), float(np.mean(residual[at])), sigma / np.sqrt(at.sum()))
        for label in labels
        if (at := (sizes == label) & kept).any()
    ]
    return Doubts(
        p_value, tests, tuple(outliers), shares, pd.DataFrame(rows, columns=_AMOUNTS), pd.DataFrame(means, columns=_MEANS),
        _least_size_effect(found, inside, limit, sigma, len(r) / len(labels)),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Space:
    """Residuals in the directions that the coefficients leave open: under the law Normal, alike in all of them."""

    J: np.ndarray
    r: np.ndarray
    root: np.ndarray

    @functools.cached_property
    def Q(self) -> np.ndarray:
        """Orthonormal directions (n, freedom)."""
        lengths = np.linalg.norm(self.J, axis=0)
        u, s, _ = np.linalg.svd(self.J[:, lengths > 0] / lengths[lengths > 0], full_matrices=True)
        return u[:, int(np.sum(s > 1e-10 * s.max(initial=0.0))) :]

    @functools.cached_property
    def w(self) -> np.ndarray:
        """The residuals (freedom,)."""
        return self.Q.T @ self.r

    @property
    def freedom(self) -> int:
        return self.Q.shape[1]

    def null(self, generator: np.random.Generator) -> np.ndarray:
        return generator.normal(size=(_DRAWS, self.freedom))

    def project(self, vector: np.ndarray) -> np.ndarray:
        return self.Q.T @ vector

    def span(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Orthonormal directions in which a good part is left of some columns, whitened here; and how long that part is."""
        u, s, _ = np.linalg.svd(self.Q.T @ (columns * self.root[:, None]), full_matrices=False)
        keep = s > _PART * s.max(initial=0.0)
        return u[:, keep], s[keep]

    def studentised(self, w: np.ndarray | None = None) -> np.ndarray:
        """Of every run (n,), or of simulated residuals (S, freedom) of every run (S, n): the t of its being shifted alone."""
        w = self.w if w is None else w
        lengths = np.linalg.norm(self.Q, axis=1)
        open_ = lengths > 1e-6
        along = np.where(open_, w @ self.Q.T / np.where(open_, lengths, 1.0), 0.0)
        rest = np.maximum(np.sum(w**2, -1, keepdims=True) - along**2, 1e-300)
        return along / np.sqrt(rest / (self.freedom - 1))

    def shift(self, run: int) -> float:
        """How far a run lies off the law of the others, nats per token."""
        return self.r[run] / np.sum(self.Q[run] ** 2) / self.root[run]

    def without(self, run: int) -> _Space:
        """With a shift of that run among the coefficients."""
        return _Space(np.column_stack([self.J, np.eye(len(self.r))[run]]), self.r, self.root)

    def sigma(self, inside: np.ndarray) -> float:
        rest = max(float(np.sum(self.w**2) - np.sum((self.w @ inside) ** 2)), 0.0)
        return float(np.sqrt(rest / max(self.freedom - inside.shape[1], 1)))


def _f(w_SxF: np.ndarray, basis: np.ndarray) -> np.ndarray:
    along = np.sum((w_SxF @ basis) ** 2, 1)
    rest = np.maximum(np.sum(w_SxF**2, 1) - along, 1e-300)
    return along / basis.shape[1] / (rest / (w_SxF.shape[1] - basis.shape[1]))


def _together(
    freedom: int, inside: np.ndarray, lengths: np.ndarray, shifts: Mapping[str, np.ndarray]
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """ln of the Bayes factor of every alternative against none, times its prior: functions of residuals (S, freedom).

    `inside`, `lengths`: `_Space.span` of the sizes. `shifts`: of the other alternatives, (freedom,) each.

    The noise is integrated over 1 / sigma: with a covariance sigma^2 V the evidence is
    det(V)^(-1/2) (w' V^-1 w)^(-freedom / 2).
    """

    def factor(basis: np.ndarray, gains: Sequence[np.ndarray], prior: float) -> Callable[[np.ndarray], np.ndarray]:
        def of(w: np.ndarray) -> np.ndarray:
            whole, along = np.maximum(np.sum(w**2, 1), 1e-300), (w @ basis) ** 2
            found = [
                -0.5 * np.log1p(gain).sum()
                - freedom / 2 * np.log1p(-np.minimum(along @ (gain / (1 + gain)) / whole, 1 - 1e-12))
                for gain in gains
            ]
            return np.logaddexp.reduce(found) + np.log(prior / len(gains))

        return of

    result = {}
    if len(lengths):
        result[SIZES] = factor(inside, [kappa * lengths**2 for kappa in _KAPPAS], _PRIOR[SIZES])
    known = {name: v / np.linalg.norm(v) for name, v in shifts.items() if np.linalg.norm(v) > _SMALL}
    bent = [name for name in known if name not in _PRIOR]
    shares = [0.5, *[0.5 / (len(bent) - 1)] * (len(bent) - 1)] if len(bent) > 1 else [1.0] * len(bent)
    prior = _PRIOR | {name: (1 - sum(_PRIOR.values())) * share for name, share in zip(bent, shares, strict=True)}
    for name, v in known.items():
        result[name] = factor(v[:, None], [np.array([gain]) for gain in _GAINS], prior[name])
    return result


def _rank(value: float, null: np.ndarray) -> float:
    return float((1 + np.sum(null >= value)) / (1 + len(null)))


def _rank_all(null: np.ndarray) -> np.ndarray:
    return 1 - np.searchsorted(np.sort(null), null, "left") / len(null)


def _indicators(labels: np.ndarray) -> np.ndarray:
    return (np.asarray(labels)[:, None] == np.unique(labels)).astype(np.float64)


def _least_size_effect(space: _Space, basis: np.ndarray, limit: float, sigma: float, runs_of_a_size: float) -> float:
    """Standard deviation of a shared effect that the F test of sizes sees in `_POWER` of grids; inf where it has no test."""
    k, rest = basis.shape[1], space.freedom - basis.shape[1]
    if k == 0 or rest < 1:
        return np.inf
    ratio = stats.f.isf(min(limit, 0.5), k, rest) / stats.f.isf(_POWER, k, rest)  # of variances: 1 + m kappa
    return float(sigma * np.sqrt(max(ratio - 1, 0.0) / runs_of_a_size))


def sentences(found: Doubts, names: Sequence[str], sizes: Mapping[int, str]) -> list[str]:
    """What fired, and what could not have been seen, for a person.

    `names`: of the runs; `sizes`: label of a size -> its name.
    """
    said = [
        f"run {names[one.run]} lies {one.shift:+.4f} nats per token off the law of the others (z = {one.z:+.1f}): look at its "
        "training, or leave it out"
        for one in found.outliers
    ]
    rate = f"tests like these fire by chance on {_rate(found.p_value)} of good grids"
    for name in found.named:
        if name == SIZES:
            means = found.size_means
            row = means.loc[(means["mean"] / means["error"]).abs().idxmax()]
            said.append(
                f"runs of a size deviate together, most those of {sizes[row['size']]}, by {row['mean']:+.4f} nats per token on "
                f"average ({rate}): one learning rate or one seed for all heads of a size does that; the draws allow for it"
            )
        elif name in (LARGEST, SMALLEST):
            said.append(f"the {name} size lies off what the others predict ({rate})")
        else:
            row = found.amounts.set_index("direction").loc[name]
            said.append(
                f"the law bends: {name} {row['amount']:+.3f} (z = {row['z']:+.1f}; {rate}): what a power law says beyond the "
                "trained sizes is in doubt; the draws allow for it"
            )
    if found.found("repeats"):
        said.append(f"runs deviate from the law by more than repeated runs do from each other ({rate})")
    if not found.fires and len(found.amounts):
        drift = float(found.amounts["seen"].iloc[0])
        if drift > _HOPELESS:
            said.append("no doubt was found, but no bend could have been: the runs are too few, or too noisy")
        else:
            shared = np.isfinite(found.size_effect)
            effect = f", and deviations that sizes share of less than {found.size_effect:.4f} nats" if shared else ""
            said.append(
                f"no doubt was found, but a drift of the exponent by less than {drift:.3f} over the trained sizes{effect} "
                f"would have been missed in more than {1 - _POWER:.0%} of such grids"
            )
    return said


def of_laws(laws: LawsByHeads) -> Doubts:
    """The suite of laws by heads, all blocks at once; its rows are those of `LawsByHeads.runs`.

    Nothing where the noise is not the residuals' (a preset of computed curves), or no degrees of freedom are left.
    """
    blocks = laws.blocks
    if any(block.known_sigma is not None for block in blocks) or not laws.dof > 0:
        return nothing()
    parts, n_heads = [], 0
    for block in blocks:
        there = block.weight_GxM > 0
        fitted, jacobian = curves(block.x_GxM, there)(block.fit.theta)
        held = [*block.fit.bound, *([0] if block.given_entropy is not None else [])]
        x, loss, weights, sizes = (one[there] for one in (block.x_GxM, block.loss_GxM, block.weight_GxM, block.size_GxM))
        of_heads = n_heads + np.nonzero(there)[0]
        columns = (loss - fitted, weights, sizes, np.log(block.center) + x, fitted - block.entropy, of_heads)
        parts.append((np.delete(jacobian, held, 1), columns))
        n_heads += len(block.heads)
    residual, weights, sizes, x, above, heads = map(np.concatenate, zip(*(columns for _, columns in parts), strict=True))
    _, repeats = np.unique(np.stack([heads, x]), axis=1, return_inverse=True)
    jacobian, weights = linalg.block_diag(*(part for part, _ in parts)), weights / weights.mean()
    return suite(jacobian, residual, weights, sizes, bends_of(x, above), repeats.ravel())


def in_words(laws: LawsByHeads) -> list[str]:
    """`sentences` on the doubts of laws by heads."""
    runs = laws.runs
    names = [f"{heads} at N = {short(params)} (loss {loss:.4f})" for heads, params, loss in runs]
    labels = np.concatenate([one.size for block in laws.blocks for one in block.runs])
    params = np.array([params for _, params, _ in runs])
    sizes = {label: f"about {short(np.mean(params[labels == label]))} parameters" for label in labels}
    return sentences(laws.doubts, names, sizes)


def bends_of(log_n: np.ndarray, above: np.ndarray) -> list[Direction]:
    """A drift of the exponent over the sizes, and breaks at some of them: shifts of losses that lie `above` E by so much."""
    low, high = float(log_n.min()), float(log_n.max())
    x, half = log_n - (low + high) / 2, (high - low) / 2
    drift = bends.shape(x, bends.DRIFT, 0.0, half)[0]
    found = [Direction("over the trained sizes the exponent drifts by", -above * drift / (4 * half))]
    for share in _BREAKS:
        place = (2 * share - 1) * half
        q = bends.shape(x, bends.BREAK, place, half)[0]
        at = short(np.exp(place + (low + high) / 2))
        found.append(Direction(f"about {at} parameters the exponent changes by", -above * q))
    return found


def _rate(p: float) -> str:
    return f"{p:.1%}" if p >= 0.001 else "fewer than 0.1%"
