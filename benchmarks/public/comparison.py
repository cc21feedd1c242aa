"""What comparisons with public measurements share: two halves, least squares of logarithms, how far off, Markdown."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize


class Errors(NamedTuple):
    """How far expectations are off, as factors of at least 1."""

    count: int
    median: float
    percentile_95: float
    largest: float

    @classmethod
    def of(cls, ratios: np.ndarray) -> Errors:
        """Of expected over measured seconds."""
        off = np.exp(np.abs(np.log(ratios)))
        return cls(len(off), float(np.median(off)), float(np.quantile(off, 0.95)), float(off.max()))

    def __str__(self) -> str:
        return f"{self.count}: {self.median - 1:.1%}, x {self.percentile_95:.2f}"


def every_other[Case](cases: Iterable[Case], key: Callable[[Case], Hashable]) -> tuple[list[Case], list[Case]]:
    """Two halves: of each key every other case, in their order."""
    found, seen = ([], []), {}
    for case in cases:
        group = key(case)
        found[seen.get(group, 0) % 2].append(case)
        seen[group] = seen.get(group, 0) + 1
    return found


def fit(
    names: Sequence[str],
    free: Mapping[str, tuple[float, float, float]],
    ratios: Callable[[dict[str, float]], np.ndarray],
    weights: np.ndarray | float = 1.0,
) -> dict[str, float]:
    """Numbers `names` that bring ratios nearest to 1: least squares of logarithms, soft from 10% on.

    free: where each number starts, and its limits, all above 0. ratios: expected over measured seconds with such numbers.
    """
    start, low, high = np.log([free[name] for name in names]).T

    def of(logs: np.ndarray) -> dict[str, float]:
        return dict(zip(names, map(float, np.exp(logs)), strict=True))

    found = optimize.least_squares(
        lambda logs: weights * np.log(ratios(of(logs))), start, bounds=(low, high), loss="soft_l1", f_scale=0.1
    )
    return of(found.x)


def markdown(header: str, lines: Iterable[tuple]) -> str:
    """A table; `header` has its columns, separated by " | "."""
    columns = header.split(" | ")
    return "\n".join(
        ["| " + header + " |", "|" + "---|" * len(columns), *("| " + " | ".join(map(str, line)) + " |" for line in lines)]
    )
