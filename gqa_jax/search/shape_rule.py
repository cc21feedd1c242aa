"""Which aspect ratios d / L an answer may have: the best of every draw, one, or those of a table of models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from gqa_jax.laws.shape import Penalty, Price
from gqa_jax.shapes import Aspect, paper_aspect

BEST, PAPER, TRAINED = "best", "paper", "trained"
WORDS = {PAPER: "as in the paper's tables", TRAINED: "as between the trained sizes", "given": "as given"}
STEPS, CLOSE = 100, 1e-5  # at most, to a size whose r0 depends on it, and how close in ln N
RATIOS = 9  # that are looked at, evenly in ln r from one bound to the other; between them costs are parabolas of ln r


@dataclasses.dataclass(frozen=True)
class ShapeRule:
    """How N becomes depth and width.

    `ratios_R`: the d / L that are looked at; loss rises away from the laws' own by `penalty`. None: `aspect` says d / L as a
    function of N, and the laws hold as they are: models of that size have that shape.
    """

    name: str  # best, paper, trained, given, or the ratio
    penalty: Penalty
    ratios_R: np.ndarray | None = None
    aspect: Aspect | None = None

    @classmethod
    def of(cls, asked: str | float | Aspect | None, penalty: Penalty, trained: Aspect) -> ShapeRule:
        """The rule that was asked for; None: the best.

        Args:
          asked: best, paper (the tables of the paper), trained (between the sizes that were trained), a ratio d / L, or an
            `Aspect`.
          trained: that of the laws.

        Raises ValueError for another word, and for a ratio that neither runs nor the prior say anything about.
        """
        if asked is None or asked == BEST:
            return cls(BEST, penalty, np.geomspace(*penalty.bounds, RATIOS))
        if asked == PAPER:
            return cls(PAPER, penalty, aspect=paper_aspect())
        if asked == TRAINED:
            return cls(TRAINED, penalty, aspect=trained)
        if isinstance(asked, Aspect):
            if len(asked.ratio) > 1:
                return cls("given", penalty, aspect=asked)
            asked = asked.ratio[0]
        try:
            ratio = float(asked)
        except (TypeError, ValueError):
            raise ValueError(f"aspect {asked}: give best, paper, trained, or the ratio d / L as a number, like 64") from None
        low, high = penalty.bounds
        if not low * (1 - 1e-9) <= ratio <= high * (1 + 1e-9):
            raise ValueError(_unknown("", ratio, penalty))
        return cls(f"{ratio:g}", penalty, np.array([ratio]))

    def require(self, ratio: float) -> None:
        """Raises ValueError for a ratio of a table of others' models that neither runs nor the prior say anything about."""
        low, high = self.penalty.bounds
        if self.aspect is not None and self.name != TRAINED and not low * (1 - 1e-9) <= ratio <= high * (1 + 1e-9):
            raise ValueError(_unknown(self.name, ratio, self.penalty))

    @property
    def is_free(self) -> bool:
        return self.ratios_R is not None and len(self.ratios_R) > 1

    @property
    def n_ratios(self) -> int:
        return 1 if self.ratios_R is None else len(self.ratios_R)

    def __call__(self, n_RxX: np.ndarray) -> np.ndarray:
        """d / L of models of N parameters, at every ratio along the first axis: what `costs.solve_shape` asks."""
        return self.aspect(n_RxX) if self.ratios_R is None else self._along(np.ndim(n_RxX))

    def sizes(self, price: Price, loss: Any, size_of: Callable[[Any], np.ndarray]) -> np.ndarray:
        """N that reaches a loss at each ratio: R x what `size_of` returns of a loss, by the laws as they are.

        k, c and the loss: numbers, or arrays that broadcast to it. Where r0 depends on N it is that of the N found.
        """
        if self.ratios_R is None:
            return size_of(loss)[None]
        found = []
        for ratio in self.ratios_R:
            n = size_of(loss / self.penalty.factor(price, ratio))
            for _ in range(0 if self.penalty.by_size is None else STEPS):
                before, n = n, size_of(loss / self.penalty.factor(price, ratio, n))
                if np.all(~np.isfinite(n) | (n >= (1 - CLOSE) * before) & (n <= (1 + CLOSE) * before)):
                    break
            found.append(n)
        return np.stack(found)

    def _along(self, n_axes: int) -> np.ndarray:
        return self.ratios_R.reshape(-1, *[1] * (n_axes - 1))

    @property
    def usual(self) -> int:
        """Index of the ratio that is closest to that of the laws."""
        return 0 if self.ratios_R is None else int(np.argmin(np.abs(np.log(self.ratios_R / self.penalty.ratio))))


def _unknown(name: str, ratio: float, penalty: Penalty) -> str:
    low, high = penalty.bounds
    return (
        f"aspect {name and f'{name}, here '}{ratio:.4g}: what a d / L outside {low:.3g} to {high:.3g} does to loss is known "
        f"from no run and no prior (the runs have {penalty.ratio:.3g})"
    )


@dataclasses.dataclass(frozen=True)
class Least:
    """Where along the ratios a cost is least, element by element: weights of the three ratios about it."""

    cost: np.ndarray
    log_ratio: np.ndarray
    index: np.ndarray  # of the middle one of the three
    weights: np.ndarray  # 3 x ...: of a parabola through them at the least

    @property
    def ratio(self) -> np.ndarray:
        """d / L, without the last digits of a logarithm: a bound is that bound."""
        return np.round(np.exp(self.log_ratio), 9)

    def of(self, log_values_R: np.ndarray) -> np.ndarray:
        """Another quantity at the least, from its logarithms at the ratios (first axis)."""
        last = len(log_values_R) - 1
        total = np.zeros(self.index.shape)
        for step, weight in zip((-1, 0, 1), self.weights, strict=True):
            part = np.take_along_axis(log_values_R, np.clip(self.index + step, 0, last)[None], 0)[0]
            total += np.multiply(
                weight, part, out=np.zeros(total.shape), where=weight != 0
            )  # what has no weight may be infinite
        return total


def least(cost_R: np.ndarray, log_ratios_R: np.ndarray) -> Least:
    """The least of costs along the first axis, between ratios by parabolas in ln cost against ln ratio.

    At either end, or next to a ratio without a cost, it is the least of the ratios.
    """
    index = np.argmin(np.where(np.isnan(cost_R), np.inf, cost_R), 0)
    here = np.take_along_axis(cost_R, index[None], 0)[0]
    weights = np.zeros((3, *here.shape))
    weights[1] = 1.0
    if len(cost_R) < 3:
        return Least(here, log_ratios_R[index], index, weights)
    last = len(cost_R) - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        before, middle, after = (
            np.log(np.take_along_axis(cost_R, np.clip(index + step, 0, last)[None], 0)[0]) for step in (-1, 0, 1)
        )
        bend = before - 2 * middle + after
        inside = (index > 0) & (index < last) & np.isfinite(bend) & (bend > 0)
        x = np.where(inside, np.clip((before - after) / (2 * np.where(inside, bend, 1.0)), -0.5, 0.5), 0.0)
        weights = np.stack([x * (x - 1) / 2, 1 - x * x, x * (x + 1) / 2])
        log_cost = middle + np.where(inside, x * (after - before) / 2 + x * x * bend / 2, 0.0)
    step = log_ratios_R[1] - log_ratios_R[0]
    return Least(np.where(inside, np.exp(log_cost), here), log_ratios_R[index] + x * step, index, weights)
