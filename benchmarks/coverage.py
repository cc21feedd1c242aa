"""How well the intervals and probabilities of the laws hold: on synthetic grids, whose truth is known.

    python -m benchmarks.coverage [--truths 1000] [--regimes clean,break_3x] [--method posterior] [--workers 2] [--out A.json]
    python -m benchmarks.coverage --power      # instead: on how many grids the doubts of a fit fire, and false alarms

A regime says what noise the runs have, how the true law leaves a power law, how many heads and sizes were trained, and how far
beyond them the loss is that is asked for. Of every truth a grid of losses is drawn, fitted as `fit` does, and asked what the
cheapest heads are at one of the paper's five contexts, drawn too: at each of them other heads win. Nothing is trained.

Every grid has random numbers of its own (seed, regime, number of the truth), so methods see the same grids, and results
depend neither on the number of processes nor on which regimes are asked for. Intervals of what is printed are 99%, by
resampling grids: what runs of one grid share is no independent evidence.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import platform
import shlex
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy
from scipy import stats

from gqa_jax import costs, formatting, objectives, optimum, shape_search
from gqa_jax.errors import closest
from gqa_jax.formatting import LARGEST_REGRET
from gqa_jax.laws import Heads, LawsByHeads, bends, evidence, fit_by_heads
from gqa_jax.shapes import Aspect

H7 = tuple(Heads(*h) for h in ((8, 8), (8, 4), (8, 2), (8, 1), (4, 1), (2, 1), (1, 1)))
H3 = tuple(Heads(*h) for h in ((8, 8), (8, 2), (4, 1)))
W6 = (768, 1024, 1280, 1536, 1792, 2048)  # hidden sizes; d / L is that of the paper's Figures 1 and 2
W4 = (768, 1024, 1536, 2048)
ASPECT = 64
SERVED = (8192, 16_384, 32_768, 65_536, 131_072)  # tokens; at the last one (8,1) wins nearly always, whatever the truth
DRAWS = 1000
LEVEL = 0.95
BINS = (0.0, 0.05, 0.2, 0.5, 0.8, 0.95, 1.0)  # of stated probabilities
RESAMPLES = 2000
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_N_REFERENCE = 1e9  # where a law's amplitude is given
_DRIFT_CENTER = 2.5e8
RULES = ("free E", "shared E", "two largest")


@dataclasses.dataclass(frozen=True)
class Noise:
    """How the losses of runs deviate from their law, nats per token."""

    own: float  # standard deviation of what is a run's own; the scale of a Student t
    shared: float = 0.0  # standard deviation of what all runs of a size share
    freedom: float = math.inf  # of a Student t
    outliers: float = 0.0  # share of the grids in which one run is off by `OUTLIER`

    OUTLIER = 0.05

    @property
    def shared_share(self) -> float:
        """Of the variance."""
        return self.shared**2 / (self.shared**2 + self.own**2)

    def draw(self, shape: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
        """Deviations_HxM of H heads at M sizes."""
        t = generator.standard_t(self.freedom, shape) if math.isfinite(self.freedom) else generator.normal(size=shape)
        found = self.own * t + self.shared * generator.normal(size=(1, shape[1]))
        if generator.random() < self.outliers:
            found[generator.integers(shape[0]), generator.integers(shape[1])] += self.OUTLIER
        return found

    @classmethod
    def of_variance(cls, total: float, shared_share: float) -> Noise:
        """Noise of a total standard deviation, of whose variance runs of a size share some."""
        return cls(total * math.sqrt(1 - shared_share), total * math.sqrt(shared_share))


@dataclasses.dataclass(frozen=True)
class Bend:
    """How a true law leaves the power law: what is subtracted from ln(L - E), by ln N.

    The formulas are written out here and not taken from `gqa_jax.laws.bends`, so that an error there would be seen.
    """

    kind: str = "none"  # "drift": amount ln(N / place)^2; "break": amount / 2 ln(1 + (N / place)^2)
    amount: float = 0.0
    place: float = _DRIFT_CENTER  # parameters
    reach: float = math.inf  # of |ln(N / place)|: beyond it a drift's exponent stays as it is there

    def at(self, params: np.ndarray) -> np.ndarray:
        """What is subtracted per unit of the amount."""
        x = np.log(np.asarray(params, np.float64) / self.place)
        if self.kind == "drift":
            return x**2 - np.maximum(np.abs(x) - self.reach, 0.0) ** 2
        return np.logaddexp(0.0, 2 * x) / 2 if self.kind == "break" else np.zeros_like(x)

    def slope(self, params: float) -> float:
        """Of `at` against ln N."""
        x = math.log(params / self.place)
        if self.kind == "drift":
            return 2 * min(max(x, -self.reach), self.reach)
        return 1 / (1 + math.exp(-2 * x)) if self.kind == "break" else 0.0


@dataclasses.dataclass(frozen=True)
class Truth:
    """Laws of some heads: L = E + A (N / 1e9)^-b exp(-amount (q(N) - q(1e9))), q the bend that they share."""

    heads: tuple[Heads, ...]
    entropy: float
    amplitude_H: np.ndarray
    b_H: np.ndarray
    bend: Bend = Bend()

    @classmethod
    def draw(cls, heads: Sequence[Heads], generator: np.random.Generator) -> Truth:
        """Power laws like those of the paper's runs, smooth in the heads but for 0.3% of L - E and 0.0008 of the exponent."""
        count = np.array(heads, np.float64)
        power = generator.uniform(0.3, 0.7)
        of_query, of_kv = count[:, 0] ** -power, count[:, 1] ** -power
        entropy = generator.uniform(1.6, 2.1)
        amplitude = generator.uniform(0.62, 0.75) * np.exp(
            generator.uniform(0.1, 0.25) * of_query
            + generator.uniform(0.03, 0.1) * of_kv
            + generator.normal(0, 0.003, len(count))
        )
        b = (
            generator.uniform(0.17, 0.2)
            - generator.uniform(0.01, 0.03) * of_query
            - generator.uniform(0.0, 0.01) * of_kv
            + generator.normal(0, 0.0008, len(count))
        )
        return cls(tuple(heads), float(entropy), amplitude, b)

    def loss(self, params: np.ndarray) -> np.ndarray:
        """Loss (H, ...) at N (H, ...)."""
        params = np.asarray(params, np.float64)
        tail = (-1, *(1,) * (params.ndim - 1))
        q = self.bend.amount * (self.bend.at(params) - self.bend.at(np.array(_N_REFERENCE)))
        above = np.log(self.amplitude_H).reshape(tail) - self.b_H.reshape(tail) * np.log(params / _N_REFERENCE) - q
        return self.entropy + np.exp(above)

    def log_size(self, loss: float) -> np.ndarray:
        """ln N*_H of a loss, by bisection from 1e3 to 1e30 parameters. ValueError where an H does not reach it there."""
        low, high = (np.full(len(self.heads), math.log(n)) for n in (1e3, 1e30))
        if not self.loss(np.exp(high)).max() < loss < self.loss(np.exp(low)).min():
            raise ValueError(f"a loss of {loss} is not reached by every H between 1e3 and 1e30 parameters")
        for _ in range(60):
            middle = (low + high) / 2
            above = self.loss(np.exp(middle)) > loss
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return (low + high) / 2

    def exponent(self, params: float) -> np.ndarray:
        """-d ln(L - E) / d ln N of every H at N."""
        return self.b_H + self.bend.amount * self.bend.slope(params)


#: What is drawn of a regime for each truth, by its generator: a bend and the noise of the runs.
Drawn = tuple[Bend, Noise]


@dataclasses.dataclass(frozen=True)
class Regime:
    """What is not known of a grid's law and noise, and what is asked."""

    about: str  # for the table
    noise: Noise = Noise(0.003)
    bend: Callable[[np.random.Generator, Sequence[Heads], Sequence[int]], Bend] | None = None
    far: float = 3.0  # times the largest N of the middle H: the loss reached there is asked for
    heads: tuple[Heads, ...] = H7
    widths: tuple[int, ...] = W6
    from_prior: bool = False  # noise and bend of the posterior's own prior


def params(heads: Sequence[Heads], widths: Sequence[int]) -> np.ndarray:
    """N_HxM without embeddings of runs with these hidden sizes, as the paper's figures count it."""
    width = np.array(widths, np.float64)
    count = np.array(heads, np.float64)[..., None]
    return costs.count_params(costs.Shape(width / ASPECT, width, count[:, 0], count[:, 1]), "figures").non_embedding


def drift(generator: np.random.Generator, heads: Sequence[Heads], widths: Sequence[int]) -> Bend:
    """The exponent changes by 0.05 over the sizes, either way."""
    n = params(heads, widths)
    amount = 0.05 / (2 * math.log(n.max() / n.min()))
    return Bend("drift", float(generator.choice([-1, 1])) * amount, reach=math.log(10 * n.max() / _DRIFT_CENTER))


def smooth_break(generator: np.random.Generator, heads: Sequence[Heads], widths: Sequence[int]) -> Bend:
    """The exponent changes by 0.03 to 0.07, either way, amid the sizes."""
    amount = float(generator.choice([-1, 1])) * generator.uniform(0.03, 0.07)
    return Bend("break", amount, generator.uniform(2e8, 6e8))


def prior(generator: np.random.Generator, heads: Sequence[Heads], widths: Sequence[int]) -> Drawn:
    """Bend and noise as the posterior's prior has them (`gqa_jax.laws.evidence`); a run's own noise is 0.0015 to 0.006 nats.

    E and the laws of the heads stay those of `Truth.draw`: the prior is flat in them.
    """
    own = float(np.exp(generator.uniform(np.log(0.0015), np.log(0.006))))
    share = generator.uniform(*evidence._SHARE) if generator.random() < evidence.SIZE_EFFECT else 0.0
    n = params(heads, widths)
    kind = generator.choice(list(evidence.BENDS), p=list(evidence.BENDS.values()))
    place = float(np.exp(generator.uniform(np.log(n.min()), np.log(evidence.BEYOND * n.max()))))
    middle = float(np.exp(np.log(n).mean()))
    reach = math.log(evidence.DRIFTS_ON) + max(math.log(n.max() / middle), math.log(middle / n.min()))
    found = {
        bends.NONE: Bend(),
        bends.DRIFT: Bend("drift", generator.normal(0, evidence.DRIFT_SD), middle, reach),
        bends.BREAK: Bend("break", generator.normal(0, evidence.BREAK_SD), place),
    }
    return found[int(kind)], Noise(own, own * math.sqrt(share / (1 - share)))


REGIMES = {
    "clean": Regime("noise 0.003"),
    "student_t": Regime("Student t, 3 degrees of freedom, scale 0.003", Noise(0.003, freedom=3.0), far=2.0),
    "half_by_size": Regime("half of the variance shared by size, total 0.004", Noise.of_variance(0.004, 0.5), far=2.0),
    "most_by_size": Regime("90% of the variance shared by size, total 0.0042", Noise.of_variance(0.0042, 0.9), far=2.0),
    "drift_1x": Regime("exponent drifts by 0.05 over the sizes", bend=drift, far=1.0),
    "drift_3x": Regime("exponent drifts by 0.05 over the sizes", bend=drift, far=3.0),
    "break_3x": Regime("smooth break amid the sizes, 0.03 to 0.07", bend=smooth_break, far=3.0),
    "small": Regime("3 H x 4 sizes", far=2.0, heads=H3, widths=W4),
    "loud": Regime("noise 0.025", Noise(0.025), far=1.0),
    "outlier": Regime("one run off by 0.05 in one grid of ten", Noise(0.003, outliers=0.1), far=2.0),
    "prior": Regime("noise and bends of the prior", far=2.0, from_prior=True),
}


@dataclasses.dataclass(frozen=True)
class Grid:
    """Losses of runs with a known truth, and what is asked of them."""

    truth: Truth
    widths: tuple[int, ...]
    params_HxM: np.ndarray
    loss_HxM: np.ndarray
    asked: float  # loss
    log_size_H: np.ndarray  # true ln N*
    served: int  # context of the costs, tokens

    @property
    def middle(self) -> float:
        """Geometric mean of the trained N."""
        return float(np.exp(np.log(self.params_HxM).mean()))

    def cost(self, size_H: np.ndarray) -> np.ndarray:
        """Z_H of models of N = size_H at the served context; inf where a size is."""
        shape = shape_search.solve_shape(size_H, self.truth.heads, Aspect.constant(ASPECT))
        with np.errstate(over="ignore"):  # sizes that are astronomical
            cost = objectives.Z()(shape, self.served)
        return np.where(np.isfinite(shape.n_layers), cost, np.inf)

    def table(self) -> pd.DataFrame:
        """As `gqa_jax.load_results` has it. Heads of a size saw the same tokens."""
        H, M = self.params_HxM.shape
        width = np.tile(np.array(self.widths), H)
        heads = np.repeat(np.array(self.truth.heads), M, axis=0)
        tokens = np.tile(np.round(20 * self.params_HxM.mean(0)).astype(np.int64), H)
        return pd.DataFrame(
            {
                "cell": [f"{d}-{n}-{kv}" for d, (n, kv) in zip(width, heads, strict=True)],
                "n_heads": heads[:, 0], "n_kv_heads": heads[:, 1], "n_layers": width // ASPECT, "d_model": width,
                "head_dim": 64, "params_non_embedding": self.params_HxM.ravel(), "tokens": tokens, "seed": 0,
                "loss": self.loss_HxM.ravel(), "status": "done", "context": 8192,
            }
        )  # fmt: skip


def grid(name: str, index: int, seed: int = 0) -> Grid:
    """The grid of one truth of a regime; the same whoever asks."""
    regime = REGIMES[name]
    generator = np.random.default_rng([seed, zlib.crc32(name.encode()), index])
    n = params(regime.heads, regime.widths)
    while True:
        truth = Truth.draw(regime.heads, generator)
        bend, noise = regime.bend(generator, regime.heads, regime.widths) if regime.bend else Bend(), regime.noise
        if regime.from_prior:
            bend, noise = prior(generator, regime.heads, regime.widths)
        truth = dataclasses.replace(truth, bend=bend)
        # The prior has laws that rise again, which no draw of the posterior does.
        if min(truth.exponent(size).min() for size in (n.min() / 1e3, 1e3 * n.max())) > 0.01:
            break
    loss = truth.loss(n) + noise.draw(n.shape, generator)
    middle = len(regime.heads) // 2
    asked = float(truth.loss(np.full(len(regime.heads), regime.far * n[middle].max()))[middle])
    return Grid(truth, regime.widths, n, loss, asked, truth.log_size(asked), int(generator.choice(SERVED)))


@dataclasses.dataclass(frozen=True)
class Said:
    """What one method says of a grid, against the truth."""

    covers_size: float  # share of the H whose interval of N* has the truth
    covers_entropy: float
    covers_exponent: float  # share of the H; of the local exponent at the middle of the sizes
    width: float  # of ln N*, median over H
    unbounded: float  # share of the H whose N* has no upper end
    probability_H: np.ndarray  # that an H is the cheapest
    answer: int | None  # the H of least expected regret; None where no draw reaches the loss

    def regret(self, regret_H: np.ndarray) -> float:
        return LARGEST_REGRET if self.answer is None else float(regret_H[self.answer])


@dataclasses.dataclass(frozen=True)
class Record:
    """What came out for one truth."""

    regime: str
    index: int
    refused: str | None  # why there is no law or there are no draws
    said: dict[str, Said]  # by method
    best: int  # the H that is the cheapest in truth
    regret_H: np.ndarray  # true regret of choosing an H
    rules: dict[str, float]  # true regret of what a simple rule chooses
    seconds: dict[str, float]  # of the processor, by what was done


def measure(name: str, index: int, methods: Sequence[str], *, seed: int = 0, draws: int = DRAWS) -> Record:
    """Fits one grid and compares what each method says with the truth."""
    one = grid(name, index, seed)
    heads, seconds = one.truth.heads, {}
    cost_H = one.cost(np.exp(one.log_size_H))
    regret_H = optimum.regret(cost_H)
    said, refused, chosen = {}, None, {}

    def timed(what: str, function: Callable[[], Any]) -> Any:
        start = time.process_time()
        found = function()
        seconds[what] = time.process_time() - start
        return found

    try:
        laws = timed("fit", lambda: fit_by_heads(one.table()))
        for method in methods:
            timed(f"draws, {method}", lambda method=method: laws.draws(draws, index, method))
    except ValueError as error:  # losses that do not fall, or that no draw of a law fits
        laws, refused = None, str(error)
    if laws is not None:
        chosen["shared E"] = _choice(one, [_reached(laws[h], one.asked) for h in heads])
        said = {
            method: timed(f"answer, {method}", lambda method=method: say(laws, one, method, draws, index)) for method in methods
        }
    chosen["free E"] = _choice(one, free_entropy_sizes(one))
    chosen["two largest"] = _choice(one, two_largest_sizes(one))
    rules = {rule: LARGEST_REGRET if (i := chosen.get(rule)) is None else float(regret_H[i]) for rule in RULES}
    return Record(name, index, refused, said, int(cost_H.argmin()), regret_H, rules, seconds)


def say(laws: LawsByHeads, one: Grid, method: str, draws: int, seed: int) -> Said:
    """What a method's draws say of a grid, as `gqa_jax.optimum` reads them."""
    drawn = laws.draws(draws, seed, method).take(list(one.truth.heads))
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]

    def covers(values: np.ndarray, truth: np.ndarray) -> tuple[float, np.ndarray]:
        low, high = optimum.quantiles(values, tails)
        return float(np.mean((low <= truth) & (truth <= high))), high - low

    covers_size, width_H = covers(drawn.log_size(one.asked), one.log_size_H)
    exponent_SxH = drawn.b_SxH
    if drawn.bends is not None:
        exponent_SxH = exponent_SxH + drawn.bends.at(np.array([math.log(one.middle)]))[1][:, None]
    regrets = optimum.regrets(laws, one.asked, one.served, draws=draws, seed=seed, method=method)
    order = [regrets.heads.index(h) for h in one.truth.heads]
    regret_SxH = regrets.regret_SxH[regrets.reached_S][:, order]
    probability, answer = np.full(len(order), np.nan), None
    if len(regret_SxH):
        probability = np.bincount(regret_SxH.argmin(1), minlength=len(order)) / len(regret_SxH)
        answer = int(regret_SxH.mean(0).argmin())
    return Said(
        covers_size,
        covers(drawn.entropy_SxH[:, 0], np.array(one.truth.entropy))[0],
        covers(exponent_SxH, one.truth.exponent(one.middle))[0],
        float(np.median(width_H)),
        float(np.mean(np.isinf(width_H))),
        probability,
        answer,
    )


def free_entropy_sizes(one: Grid) -> np.ndarray:
    """N*_H by a law of every H alone, E its own: log-linear least squares, weighted, for each E of a grid made finer thrice."""
    x, loss = np.log(one.params_HxM / one.middle)[:, None], one.loss_HxM[:, None]
    lowest = one.loss_HxM.min(1)
    low, high = np.zeros(len(lowest)), lowest - 1e-3
    rows = np.arange(len(lowest))
    for _ in range(4):
        entropy_HxE = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, 41)
        above = loss - entropy_HxE[..., None]
        offset, slope, squares = _weighted_line(x, np.log(above), above**2)
        best = squares.argmin(1)
        found = entropy_HxE[rows, best], offset[rows, best], slope[rows, best]
        low, high = entropy_HxE[rows, np.maximum(best - 1, 0)], entropy_HxE[rows, np.minimum(best + 1, 40)]
    entropy, offset, slope = found
    gap = one.asked - entropy
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        size = one.middle * np.exp((np.log(gap) - offset) / slope)
    return np.where((gap > 0) & (slope < 0), size, np.inf)


def two_largest_sizes(one: Grid) -> np.ndarray:
    """N*_H by the straight line of ln L against ln N through the two largest sizes of every H."""
    x, y = np.log(one.params_HxM[:, -2:]), np.log(one.loss_HxM[:, -2:])
    slope = (y[:, 1] - y[:, 0]) / (x[:, 1] - x[:, 0])
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(slope < 0, np.exp(x[:, 1] + (math.log(one.asked) - y[:, 1]) / slope), np.inf)


def _weighted_line(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(offset, slope, weighted sum of squares) of least squares along the last axis."""
    total = w.sum(-1)
    mean_x, mean_y = (w * x).sum(-1) / total, (w * y).sum(-1) / total
    dx, dy = x - mean_x[..., None], y - mean_y[..., None]
    slope = (w * dx * dy).sum(-1) / (w * dx**2).sum(-1)
    return mean_y - slope * mean_x, slope, (w * (dy - slope[..., None] * dx) ** 2).sum(-1)


def _reached(law: Any, loss: float) -> float:
    return law.solve(loss) if loss > law.entropy else np.inf


def _choice(one: Grid, size_H: Sequence[float]) -> int | None:
    """The cheapest H at these sizes; None where no H reaches the loss."""
    cost = one.cost(np.asarray(size_H, np.float64))
    return int(cost.argmin()) if np.isfinite(cost).any() else None


# What is said of many grids.


def summary(records: Sequence[Record], method: str, against: str | None = None) -> dict[str, Any]:
    """How well a method holds in one regime: numbers, and {"value", "low", "high"} with 99% intervals over grids.

    Args:
      records: of one regime; those that were refused count in `refused` and in the regret of the rules only.
      against: a method whose widths are compared with.
    """
    heard = [r for r in records if r.refused is None]
    result: dict[str, Any] = {
        "truths": len(records),
        "refused": len(records) - len(heard),
        "seconds": {k: float(np.mean([r.seconds[k] for r in heard])) for k in heard[0].seconds} if heard else {},
    }
    if not heard:
        return result
    said = [r.said[method] for r in heard]
    for name in ("covers_size", "covers_entropy", "covers_exponent", "unbounded"):
        result[name] = _mean([getattr(s, name) for s in said])
    result["width"] = _resampled(lambda rows: np.median(_column(said, "width")[rows], -1), len(said))
    if against is not None:
        base = _column([r.said[against] for r in heard], "width")
        own = _column(said, "width")
        result["width_ratio"] = _resampled(lambda rows: _ratio(np.median(own[rows], -1), np.median(base[rows], -1)), len(said))
    answered = [(r, s) for r, s in zip(heard, said, strict=True) if s.answer is not None]
    result["without_answer"] = len(heard) - len(answered)
    if answered:
        stated = np.array([s.probability_H[s.answer] for _, s in answered])
        hit = np.array([s.answer == r.best for r, s in answered], float)
        result |= {"stated": _mean(stated), "happened": _mean(hit), "overstated": _mean(stated - hit)}
        result["bins"] = bins(
            np.array([s.probability_H for _, s in answered]),
            np.array([np.arange(len(s.probability_H)) == r.best for r, s in answered]),
        )
    own = np.array([s.regret(r.regret_H) for r, s in zip(heard, said, strict=True)])
    result["regret"] = _points(own)
    result["rules"] = {
        rule: {"regret": _points(other := np.array([r.rules[rule] for r in heard])), "more": _points(own - other)}
        for rule in RULES
    }
    return result


def bins(stated_NxH: np.ndarray, happened_NxH: np.ndarray) -> list[dict[str, float]]:
    """Of all H of all grids by their stated probability: how many, the mean that was stated, and how often it happened."""
    place = np.clip(np.searchsorted(BINS, stated_NxH, "right") - 1, 0, len(BINS) - 2)
    return [
        {"from": BINS[i], "to": BINS[i + 1], "count": int((place == i).sum()),
         "stated": float(stated_NxH[place == i].mean()), "happened": float(happened_NxH[place == i].mean())}
        for i in range(len(BINS) - 1)
        if (place == i).any()
    ]  # fmt: skip


def _column(rows: Iterable[Any], name: str) -> np.ndarray:
    return np.array([getattr(row, name) for row in rows], np.float64)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b; 1 where both are infinite."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(a) & np.isinf(b), 1.0, a / b)


@functools.lru_cache(maxsize=4)
def _resamples(count: int) -> np.ndarray:
    """Rows of `count` grids drawn with replacement, the same for every column, so that differences are of the same grids."""
    return np.random.default_rng(count).integers(count, size=(RESAMPLES, count))


def _resampled(statistic: Callable[[np.ndarray], np.ndarray], count: int) -> dict[str, float]:
    """A statistic of indices (..., count) of grids, with its 99% interval; ends of infinite values may be infinite."""
    low, high = optimum.quantiles(np.asarray(statistic(_resamples(count))), [0.005, 0.995])
    return {"value": float(statistic(np.arange(count))), "low": float(low), "high": float(high)}


def _mean(values: Sequence[float]) -> dict[str, float]:
    values = np.asarray(values, np.float64)
    return _resampled(lambda rows: values[rows].mean(-1), len(values))


def _points(values: np.ndarray) -> dict[str, float]:
    """Mean and its standard error, in percent points."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": float(100 * values.mean()), "error": float(100 * error)}


LEAST_COVERAGE, PRIOR_COVERAGE = 0.92, (0.93, 0.97)
WIDEST = 1.9  # times the width of independent noise and exact power laws, on clean grids
FURTHEST_OFF = 0.05  # of stated probabilities
REGRET_MARGIN = 0.05  # percent points


def missed(summaries: dict[str, dict[str, Any]]) -> list[str]:
    """Sentences on the bounds that do not hold; a bound holds where the 99% interval over grids meets it."""
    found = []

    def check(name: str, what: str, measured: dict[str, float], low: float, high: float) -> None:
        if measured["high"] < low or measured["low"] > high:
            limits = (
                f"at least {low:g}" if math.isinf(high) else f"at most {high:g}" if math.isinf(low) else f"{low:g} to {high:g}"
            )
            found.append(
                f"{name}: {what} {measured['value']:.3f} ({measured['low']:.3f} to {measured['high']:.3f}), wanted {limits}"
            )

    for name, one in summaries.items():
        if one["refused"] == one["truths"]:
            found.append(f"{name}: every grid was refused")
            continue
        bounds = PRIOR_COVERAGE if REGIMES[name].from_prior else (LEAST_COVERAGE, math.inf)
        check(name, "coverage of N*", one["covers_size"], *bounds)
        if name == "clean" and "width_ratio" in one:
            check(name, "width against independent noise and power laws", one["width_ratio"], -math.inf, WIDEST)
        if "overstated" in one:
            check(name, "stated probability minus what happened", one["overstated"], -FURTHEST_OFF, FURTHEST_OFF)
        best = min(RULES, key=lambda rule: one["rules"][rule]["regret"]["mean"])
        more = one["rules"][best]["more"]
        if more["mean"] > REGRET_MARGIN + 2 * more["error"]:
            found.append(f"{name}: regret {more['mean']:.2f} ± {more['error']:.2f} points above that of {best}")
    return found


def markdown(summaries: dict[str, dict[str, Any]]) -> str:
    """Tables for a page of documentation."""
    rows = [
        "| regime | asked at | 95% of N* hold | E | exponent | width of ln N* | x independent | unbounded | P of the answer | "
        "it was the best |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    regrets = [
        "| regime | regret | " + " | ".join(f"against {rule}" for rule in RULES) + " | no law | no answer |",
        "|---|---|" + "---|" * len(RULES) + "---|---|",
    ]
    for name, one in summaries.items():
        about = f"{name}: {REGIMES[name].about}"
        if "covers_size" not in one:
            rows.append(f"| {about} | {REGIMES[name].far:g}x |" + " |" * 8)
            regrets.append(f"| {name} |" + " |" * (1 + len(RULES)) + f" {one['refused']} of {one['truths']} | |")
            continue
        cells = [
            about, f"{REGIMES[name].far:g}x", _percent(one["covers_size"], spread=True), _percent(one["covers_entropy"]),
            _percent(one["covers_exponent"]), f"{one['width']['value']:.2f}",
            f"{one['width_ratio']['value']:.2f}" if "width_ratio" in one else "", _percent(one["unbounded"]),
        ]  # fmt: skip
        cells += [_percent(one["stated"]), _percent(one["happened"], spread=True)] if "stated" in one else ["", ""]
        rows.append(f"| {' | '.join(cells)} |")
        cells = [name, _said(one["regret"]), *(_said(one["rules"][r]["more"], sign=True) for r in RULES)]
        cells += [f"{one['refused']} of {one['truths']}", f"{one['without_answer']}"]
        regrets.append(f"| {' | '.join(cells)} |")
    binned = ["| stated | " + " | ".join(summaries) + " |", "|---|" + "---|" * len(summaries)]
    for low, high in itertools.pairwise(BINS):
        cells = []
        for one in summaries.values():
            row = next((b for b in one.get("bins", ()) if b["from"] == low), None)
            cells.append(f"{row['stated']:.2f} / {row['happened']:.2f} ({row['count']})" if row else "")
        binned.append(f"| {low:g} to {high:g} | {' | '.join(cells)} |")
    parts = [
        "\n".join(rows),
        "True regret of the answer in percent, mean ± standard error, and how much more it is than that of simple rules:",
        "\n".join(regrets),
        "Stated probability of an H being the cheapest / how often it was (how many):",
        "\n".join(binned),
    ]
    return "\n\n".join(parts)


def _percent(one: dict[str, float], *, spread: bool = False) -> str:
    text = f"{100 * one['value']:.1f}%"
    return f"{text} ({100 * one['low']:.1f} to {100 * one['high']:.1f})" if spread else text


def _said(one: dict[str, float], *, sign: bool = False) -> str:
    return f"{one['mean']:+.2f} ± {one['error']:.2f}" if sign else f"{one['mean']:.2f} ± {one['error']:.2f}"


# How often doubts fire.


@dataclasses.dataclass(frozen=True)
class Alarm:
    """Whether one grid was doubted."""

    regime: str
    index: int
    refused: str | None
    fired: bool
    knows: bool | None  # whether the F test that knows the form of the bend rejects at 5%; None without a bend


def doubts_fire(laws: LawsByHeads) -> bool:
    """Whether the whole suite of doubts rejects these laws at 5%."""
    return laws.doubts.p_value < 0.05


def alarm(name: str, index: int, *, seed: int = 0, fires: Callable[[LawsByHeads], bool] = doubts_fire) -> Alarm:
    """Fits one grid and asks whether its law is doubted, and whether it could be by whoever knows how it bends."""
    one = grid(name, index, seed)
    try:
        laws = fit_by_heads(one.table())
    except ValueError as error:  # losses that do not fall
        return Alarm(name, index, str(error), False, None)
    return Alarm(name, index, None, bool(fires(laws)), knows_the_form(laws, one))


def knows_the_form(laws: LawsByHeads, one: Grid, level: float = 0.05) -> bool | None:
    """F test of the true bend's amount against 0, its form and place given: 1 degree of freedom, at the linearised fit."""
    if one.truth.bend.kind == "none":
        return None
    H, M = one.params_HxM.shape
    x = np.log(one.params_HxM / one.middle)
    value = np.stack([laws[h].predict(n) - laws[h].entropy for h, n in zip(one.truth.heads, one.params_HxM, strict=True)])
    own = np.eye(H)[:, None, :] * np.ones((H, M, 1))
    J = np.concatenate([np.ones((H, M, 1)), value[..., None] * own, (x * value)[..., None] * own], -1).reshape(H * M, -1)
    residual = (
        one.loss_HxM - np.stack([laws[h].predict(n) for h, n in zip(one.truth.heads, one.params_HxM, strict=True)])
    ).ravel()
    basis = np.linalg.qr(J)[0]
    bend = (value * one.truth.bend.at(one.params_HxM)).ravel()
    bend, residual = (v - basis @ (basis.T @ v) for v in (bend, residual))
    explained = float(bend @ residual) ** 2 / float(bend @ bend)
    freedom = H * M - J.shape[1] - 1
    return bool(explained / ((float(residual @ residual) - explained) / freedom) > stats.f.ppf(1 - level, 1, freedom))


def power(alarms: Sequence[Alarm]) -> dict[str, Any]:
    """How often one regime's grids are doubted, with 99% intervals; of bends also how often by the test that knows the form."""
    heard = [a for a in alarms if a.refused is None]
    result: dict[str, Any] = {"truths": len(alarms), "refused": len(alarms) - len(heard)}
    if not heard:
        return result
    fired = _column(heard, "fired")
    result["fired"] = _mean(fired)
    bent = np.array([a.knows is not None for a in heard])
    if bent.any():
        knows = np.array([bool(a.knows) for a in heard], float)[bent]
        fired = fired[bent]
        result["knows"] = _mean(knows)

        def relative(rows: np.ndarray) -> np.ndarray:
            return fired[rows].mean(-1) / np.maximum(knows[rows].mean(-1), 1 / len(knows))

        result["relative"] = _resampled(relative, len(knows))
    return result


def power_markdown(summaries: dict[str, dict[str, Any]]) -> str:
    """A table for a page of documentation."""
    rows = [
        "| regime | doubted | F test that knows the form | power against that | no law |",
        "|---|---|---|---|---|",
    ]
    for name, one in summaries.items():
        cells = [f"{name}: {REGIMES[name].about}", _percent(one["fired"], spread=True) if "fired" in one else ""]
        cells += [_percent(one["knows"]), f"{one['relative']['value']:.2f}"] if "knows" in one else ["", ""]
        rows.append(f"| {' | '.join(cells)} | {one['refused']} of {one['truths']} |")
    return "\n".join(rows)


# All of them.


def run(
    task: Callable[[str, int], Any], regimes: Sequence[str], truths: int, workers: int, say: Callable[[str], None]
) -> dict[str, list]:
    """`task(regime, index)` of every truth, in `workers` processes with one thread each; results in the order of the truths.

    `task` must pickle, and its results must have `regime` and `index`.
    """
    jobs = [(name, i) for i in range(truths) for name in regimes]
    found: dict[str, list] = {name: [None] * truths for name in regimes}
    start = told = time.perf_counter()
    for done, record in enumerate(_each(functools.partial(_apply, task), jobs, workers), 1):
        found[record.regime][record.index] = record
        now = time.perf_counter()
        if now - told > 15 or done == len(jobs):
            told = now
            rate = done / (now - start)
            say(f"{done} of {len(jobs)} grids, {rate:.2f} per second, {formatting.duration((len(jobs) - done) / rate)} left")
    return found


def _apply(task: Callable[[str, int], Any], job: tuple[str, int]) -> Any:
    return task(*job)


def _each(function: Callable, jobs: Sequence, workers: int) -> Iterator:
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))  # read by the processes when they load numpy
    try:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            yield from pool.imap_unordered(function, jobs, chunksize=1)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def document(arguments: Sequence[str], about: dict[str, Any], summaries: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What is written as JSON: results with what they were made by. Infinite numbers become null."""
    return {
        "command": shlex.join(["python", "-m", "benchmarks.coverage", *arguments]),
        **about,
        "seconds": seconds,
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "regimes": _plain(summaries),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def chosen_regimes(text: str | None) -> list[str]:
    """Names from a comma-separated list; all where there is none. ValueError for an unknown one."""
    names = list(REGIMES) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in REGIMES:
            raise ValueError(f"regime {name!r} is unknown: {closest(name, REGIMES)}")
    return list(dict.fromkeys(names))


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truths", type=int, default=1000, help="per regime")
    parser.add_argument("--regimes", help=f"some of {', '.join(REGIMES)}; default all")
    parser.add_argument("--method", default="posterior", choices=["posterior", "independent", "bootstrap"])
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--power", action="store_true", help="how often the doubts of a fit fire, instead")
    parser.add_argument("--out", type=Path, help="writes the numbers as JSON")
    options = parser.parse_args(arguments)
    for name, least in (("truths", 1), ("workers", 1), ("draws", 2)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)}: must be at least {least}")
    try:
        regimes = chosen_regimes(options.regimes)
    except ValueError as error:
        parser.error(str(error))
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.parent}")
    start = time.perf_counter()
    about = {"truths": options.truths, "seed": options.seed}
    if options.power:
        task = functools.partial(alarm, seed=options.seed)
        alarms = run(task, regimes, options.truths, options.workers, _tell)
        summaries = {name: power(found) for name, found in alarms.items()}
        print(power_markdown(summaries))
    else:
        against = "independent" if options.method != "independent" else None
        methods = [options.method, *([against] if against else [])]
        about |= {"method": options.method, "draws": options.draws}
        task = functools.partial(measure, methods=methods, seed=options.seed, draws=options.draws)
        records = run(task, regimes, options.truths, options.workers, _tell)
        summaries = {name: summary(found, options.method, against) for name, found in records.items()}
        print(markdown(summaries))
        for sentence in missed(summaries):
            print(f"\nmissed: {sentence}")
    seconds = time.perf_counter() - start
    print(f"\n{options.truths} truths per regime, {seconds:.0f} s with {options.workers} workers")
    if options.out is not None:
        options.out.write_text(json.dumps(document(arguments, about, summaries, seconds), indent=1, allow_nan=False) + "\n")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
