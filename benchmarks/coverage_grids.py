"""Synthetic grids whose truth is known: laws that bend or not, noise of several kinds, and what is asked of them.

A regime says what noise the runs have, how the true law leaves a power law, how many heads and sizes were trained, and how far
beyond them the loss is that is asked for. Every grid has random numbers of its own (seed, regime, number of the truth).
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from gqa_jax import costs
from gqa_jax.laws import Heads, bends, evidence
from gqa_jax.search import objectives
from gqa_jax.shapes import Aspect

H7 = tuple(Heads(*h) for h in ((8, 8), (8, 4), (8, 2), (8, 1), (4, 1), (2, 1), (1, 1)))
H3 = tuple(Heads(*h) for h in ((8, 8), (8, 2), (4, 1)))
W6 = (768, 1024, 1280, 1536, 1792, 2048)  # hidden sizes; d / L is that of the paper's Figures 1 and 2
W4 = (768, 1024, 1536, 2048)
ASPECT = 64
SERVED = (8192, 16_384, 32_768, 65_536, 131_072)  # tokens; at the last one (8,1) wins nearly always, whatever the truth
_N_REFERENCE = 1e9  # where a law's amplitude is given
_DRIFT_CENTER = 2.5e8


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

    def falls(self, params: np.ndarray) -> bool:
        """Whether losses fall from a thousandth of the least N to 1,000 times the largest: bends may let them rise again."""
        return min(self.exponent(size).min() for size in (params.min() / 1e3, 1e3 * params.max())) > 0.01


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
    share = generator.uniform(*evidence.SHARE) if generator.random() < evidence.SIZE_EFFECT else 0.0
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
        shape = costs.solve_shape(size_H, self.truth.heads, Aspect.constant(ASPECT))
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
        if truth.falls(n):  # as every draw of the posterior
            break
    loss = truth.loss(n) + noise.draw(n.shape, generator)
    middle = len(regime.heads) // 2
    asked = float(truth.loss(np.full(len(regime.heads), regime.far * n[middle].max()))[middle])
    return Grid(truth, regime.widths, n, loss, asked, truth.log_size(asked), int(generator.choice(SERVED)))
