"""What runs say against their law: one calibrated suite of tests per fit, and how much it could have seen.

R^2 says nothing and residuals that look small may all lean one way. So every fit is asked, at its linearised least squares
(whitened residuals r of n runs, whitened derivatives J by p coefficients):

    outliers   does one run lie off the others' law? Externally studentised residuals, the largest of them
    sizes      do runs of a size deviate together? F of the residuals' means by size
    bends      does the law bend? A drift of the exponent, or a break at one of some places: the largest t^2
    ends       do the largest or the smallest size lie off what the other sizes predict? The larger t^2
    repeats    do runs deviate from the law more than repeated runs from each other? F, where runs were repeated

Under the law r lives in the n - p directions that J leaves, evenly in all of them. Thousands of such r are drawn, each test is
made on each, and the suite fires where its least p-value (over the tests' shares of attention) is among the lowest 5% of
theirs: so the false alarms of the whole suite are 5%, whatever the tests have in common. Runs that lie off are named first, and
left out of the other tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import linalg, stats

from gqa_jax.formatting import short
from gqa_jax.laws import bends
from gqa_jax.laws.block import curves

if TYPE_CHECKING:
    from gqa_jax.laws.block import Block

LEVEL = 0.05  # false alarms of the whole suite
_DRAWS = 8000
#: Shares of attention: a test's p-value is divided by its share. Sizes and bends have most: answers turn on them.
ATTENTION = {"outliers": 0.15, "sizes": 1.0, "bends": 1.0, "ends": 0.15, "repeats": 0.3}
_MOST_OUTLIERS = 0.1  # of the runs: more are no outliers
_BREAKS = (0.2, 0.4, 0.6, 0.8)  # of the way from the smallest to the largest size, in ln N
_POWER = 0.8  # of what could have been seen
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
    amounts: pd.DataFrame  # a row per direction: direction, amount, error, z, seen (what has a chance of 80% to be seen)
    size_means: pd.DataFrame  # a row per size: size (label), runs, mean residual (nats per token), error
    size_effect: float  # standard deviation of what a size shares that has a chance of 80% to be seen, nats per token

    @property
    def fires(self) -> bool:
        return bool(self.p_value <= LEVEL)

    def found(self, test: str) -> bool:
        """Whether one test is among what fired."""
        return self.fires and bool(self.tests.set_index("test")["fires"].get(test, False))


_TESTS, _AMOUNTS = ["test", "statistic", "p_value", "fires"], ["direction", "amount", "error", "z", "seen"]
_MEANS = ["size", "runs", "mean", "error"]


def nothing() -> Doubts:
    """Where no degrees of freedom are left: nothing can be said."""
    empty = (pd.DataFrame(columns=names) for names in (_TESTS, _AMOUNTS, _MEANS))
    tests, amounts, means = empty
    return Doubts(np.nan, tests, (), amounts, means, np.nan)


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
    first = _Space(J, r, root)
    if first.freedom < 2:
        return nothing()
    found = first
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
    groups = {"sizes": found.span(_indicators(sizes))}
    if repeats is not None and len(np.unique(repeats)) < len(repeats):
        groups["repeats"] = found.span(_indicators(repeats))
    bent = [found.project(d.shift * root) for d in directions]
    labels = np.unique(sizes)
    ends = [found.project((sizes == label) * root) for label in (labels[-1], labels[0])] if len(labels) > 2 else []
    inside = groups["sizes"] if groups["sizes"].shape[1] < found.freedom - 1 else np.zeros((found.freedom, 0))
    null = found.null(generator)
    statistics = {"outliers": (statistic, None, p_outliers)}
    for name, basis in groups.items():
        if 0 < basis.shape[1] < found.freedom:
            value, of_null = (_f(w, basis) for w in (found.w[None], null))
            p = float(stats.f.sf(value[0], basis.shape[1], found.freedom - basis.shape[1]))
            statistics[name] = (float(value[0]), stats.f.sf(of_null, basis.shape[1], found.freedom - basis.shape[1]), p)
    for name, vectors in (("bends", bent), ("ends", ends)):
        known = [v / np.linalg.norm(v) for v in vectors if np.linalg.norm(v) > _SMALL]
        if known:
            value, of_null = (_t2(w, np.stack(known, 1), inside).max(1) for w in (found.w[None], null))
            order = np.sort(of_null)
            ranks = 1 - np.searchsorted(order, of_null, "left") / len(order)
            statistics[name] = (float(value[0]), ranks, _rank(float(value[0]), of_null))
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
    critical = np.sqrt(stats.f.isf(min(limit, 0.5), 1, max(found.freedom - inside.shape[1], 1))) + stats.norm.ppf(_POWER)
    rows = []
    for direction, v in zip(directions, bent, strict=True):
        length = np.linalg.norm(v)
        if length <= _SMALL:
            continue
        amount, error = float(v @ found.w / length**2), float(sigma / length)
        rows.append((direction.name, amount, error, amount / error if error > 0 else np.nan, critical * error))
    means = [
        (label, int((sizes == label).sum()), float(np.mean(residual[sizes == label])), sigma / np.sqrt((sizes == label).sum()))
        for label in labels
    ]
    return Doubts(
        p_value, tests, tuple(outliers), pd.DataFrame(rows, columns=_AMOUNTS), pd.DataFrame(means, columns=_MEANS),
        _least_size_effect(found, groups["sizes"], limit, sigma, len(r) / len(labels)),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Space:
    """Residuals in the directions that the coefficients leave open: under the law Normal, alike in all of them."""

    J: np.ndarray
    r: np.ndarray
    root: np.ndarray

    def __post_init__(self) -> None:
        lengths = np.linalg.norm(self.J, axis=0)
        used = self.J[:, lengths > 0] / lengths[lengths > 0]
        u, s, _ = np.linalg.svd(used, full_matrices=True)
        Q = u[:, int(np.sum(s > 1e-10 * s.max(initial=0.0))) :]
        object.__setattr__(self, "Q", Q)
        object.__setattr__(self, "w", Q.T @ self.r)

    @property
    def freedom(self) -> int:
        return self.Q.shape[1]

    def null(self, generator: np.random.Generator) -> np.ndarray:
        return generator.normal(size=(_DRAWS, self.freedom))

    def project(self, vector: np.ndarray) -> np.ndarray:
        return self.Q.T @ vector

    def span(self, columns: np.ndarray) -> np.ndarray:
        """An orthonormal basis of what is left of some columns, whitened here."""
        u, s, _ = np.linalg.svd(self.Q.T @ (columns * self.root[:, None]), full_matrices=False)
        return u[:, s > _SMALL * max(1.0, s.max(initial=0.0))]

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


def _t2(w_SxF: np.ndarray, directions: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """t^2 of every direction, by the noise that runs of a size do not share."""
    rest = np.maximum(np.sum(w_SxF**2, 1) - np.sum((w_SxF @ inside) ** 2, 1), 1e-300)
    return (w_SxF @ directions) ** 2 / (rest / max(w_SxF.shape[1] - inside.shape[1], 1))[:, None]


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
    if found.found("bends") and len(found.amounts):
        row = found.amounts.loc[found.amounts["z"].abs().idxmax()]
        said.append(
            f"the law bends: {row['direction']} {row['amount']:+.3f} (z = {row['z']:+.1f}; {rate}): what a power law says "
            "beyond the trained sizes is in doubt; the draws allow for it"
        )
    if found.found("sizes"):
        means = found.size_means
        row = means.loc[(means["mean"] / means["error"]).abs().idxmax()]
        said.append(
            f"runs of a size deviate together, most those of {sizes[row['size']]}, by {row['mean']:+.4f} nats per token on "
            f"average ({rate}): one learning rate or one seed for all heads of a size does that; the draws allow for it"
        )
    if found.found("ends") and not (found.found("bends") or found.found("sizes")):
        said.append(f"the largest or the smallest size lies off what the others predict ({rate})")
    if found.found("repeats"):
        said.append(f"runs deviate from the law by more than repeated runs do from each other ({rate})")
    if not found.fires and len(found.amounts):
        drift = float(found.amounts["seen"].iloc[0])
        effect = (
            f", and deviations that sizes share of less than {found.size_effect:.4f} nats"
            if np.isfinite(found.size_effect)
            else ""
        )
        said.append(
            f"no doubt was found, but a drift of the exponent by less than {drift:.3f} over the trained sizes{effect} would "
            f"have been missed in more than {1 - _POWER:.0%} of such grids"
        )
    return said


def of_blocks(blocks: Sequence[Block]) -> Doubts:
    """The suite of laws by heads, all blocks at once: rows in the order of blocks, heads and runs."""
    there = [block.weight_GxM > 0 for block in blocks]
    x = np.concatenate([np.log(block.center) + block.x_GxM[rows] for block, rows in zip(blocks, there, strict=True)])
    value = np.concatenate(
        [np.exp(b.alpha[:, None] - b.b[:, None] * b.x_GxM)[rows] for b, rows in zip(blocks, there, strict=True)]
    )
    parts, residual = [], []
    for block, rows in zip(blocks, there, strict=True):
        fitted, jacobian = curves(block.x_GxM, rows)(block.fit.theta)
        held = [*block.fit.bound, *([0] if block.given_entropy is not None else [])]
        parts.append(np.delete(jacobian, held, 1))
        residual.append(block.loss_GxM[rows] - fitted)
    weights, sizes = (
        np.concatenate([getattr(b, name)[rows] for b, rows in zip(blocks, there, strict=True)])
        for name in ("weight_GxM", "size_GxM")
    )
    n = len(x) * 1.0
    heads = np.concatenate([np.full(len(runs.loss), i) for i, runs in enumerate(r for b in blocks for r in b.runs)])
    _, repeats = np.unique(np.stack([heads, x]), axis=1, return_inverse=True)
    return suite(
        linalg.block_diag(*parts), np.concatenate(residual), weights * n / weights.sum(), sizes, bends_of(x, value),
        repeats.ravel(),
    )  # fmt: skip


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
