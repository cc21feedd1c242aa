"""From costs in draws to an answer: probability, expected regret, quantiles and savings, one rule for every view.

A cost is that of a head configuration H in a joint draw s of the laws' coefficients, cost_SxH; it is infinite where the H does
not reach the loss, or can't be served, in that draw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gqa_jax import formatting

LEVEL = 0.95  # of intervals
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


@dataclasses.dataclass(frozen=True)
class Ranking:
    """How the H compare over the draws."""

    probability_H: np.ndarray  # share of the draws in which it is the cheapest, of those in which some H has a cost
    expected_regret_H: np.ndarray  # mean of `regret` over the same draws
    reached_S: np.ndarray  # whether some H has a cost

    @property
    def not_reached(self) -> float:
        """Share of the draws in which none has."""
        return float(1 - self.reached_S.mean())


def rank(cost_SxH: np.ndarray) -> Ranking:
    """Probabilities and expected regrets of the H; nan where no draw has a cost."""
    reached_S = np.isfinite(cost_SxH.min(1))
    count = cost_SxH.shape[1]
    if not reached_S.any():
        return Ranking(np.full(count, np.nan), np.full(count, np.nan), reached_S)
    own = cost_SxH[reached_S]
    return Ranking(np.bincount(own.argmin(1), minlength=count) / len(own), regret(own).mean(0), reached_S)


def regret(cost_H: np.ndarray) -> np.ndarray:
    """What each H costs above the cheapest, relative: cost_(...)xH / the least of them - 1, 10 at most.

    A cost is infinite where the H does not reach the loss or keep the limit of memory. Next to an H that does, its regret is 10
    too: otherwise the few draws in which a size is astronomical would decide, and one far dearer would count for more than one
    that is not possible. nan where no H is possible.
    """
    cost_H = np.asarray(cost_H, np.float64)
    least = cost_H.min(-1, keepdims=True)
    ratio = np.divide(cost_H, least, out=np.full(cost_H.shape, np.nan), where=np.isfinite(least))
    return np.minimum(ratio - 1, formatting.LARGEST_REGRET)


def above(regret_H: Any, best: float) -> Any:
    """What H cost above the answer, on average: expected regrets less that of the answer; infinite where the cap decides it."""
    regret_H = np.asarray(regret_H, np.float64)
    return np.where(regret_H >= formatting.LARGEST_REGRET - 5e-5, np.inf, regret_H - best)[()]


def savings(cost_SxH: np.ndarray, baseline: np.ndarray | float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(low_H, middle_H, high_H): 95% and the middle of 1 - cost / baseline over the draws.

    baseline: a cost (S,), or one that no draw changes. Draws in which neither has a cost say nothing; nan of none.
    """
    with np.errstate(invalid="ignore"):
        saving_SxH = 1 - cost_SxH / np.reshape(np.broadcast_to(baseline, len(cost_SxH)), (-1, 1))
    ends = [quantiles(column[~np.isnan(column)], [TAILS[0], 0.5, TAILS[1]]) for column in saving_SxH.T]
    return tuple(np.array(ends, np.float64).reshape(-1, 3).T)


def quantiles(values: np.ndarray, at: Sequence[float]) -> list[np.ndarray]:
    """Quantiles along the first axis by NumPy's linear rule, which between infinite values would give nan; nan of nothing."""
    if not len(values):
        return [np.full(values.shape[1:], np.nan)] * len(at)
    ordered = np.sort(values, 0)
    found = []
    for share in at:
        position = share * (len(ordered) - 1)
        low = ordered[int(np.floor(position))]
        high = ordered[int(np.ceil(position))]
        with np.errstate(invalid="ignore"):
            between = low + (high - low) * (position - np.floor(position))
        found.append(np.where((low == high) | np.isneginf(low), low, between))
    return found


def pareto(flops: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """Whether no other H needs less of one without more of the other."""
    worse = (flops[None] <= flops[:, None]) & (memory[None] <= memory[:, None])
    strictly = (flops[None] < flops[:, None]) | (memory[None] < memory[:, None])
    return ~(worse & strictly).any(1) & np.isfinite(flops)
