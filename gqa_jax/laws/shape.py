"""What depth against width costs in loss: L(N, r; H) = L(N; H) (1 + k ln^2(r / r0)), r = d / L the aspect ratio.

L(N; H) is the law of runs of one ratio r0, or of ratios about it. Away from r0 loss rises in proportion; how fast, k, is drawn
with the coefficients of the laws: from runs of one size at several ratios where there are some, else from a prior alone.

The prior is lognormal about .005. Kaplan et al. (arXiv 2001.08361, Section 3.1) find (L, d) = (6, 4288) within 3% of (48, 1600):
d / L = 715 and 33, of which the second is next to nothing from r0 = 64; so k = .03 / (ln^2(715 / 64) - ln^2(33 / 64)) = .0056 at
most. The spread of other sources about it is in docs/shape.md.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from gqa_jax.laws.by_heads import LawsByHeads

PRIOR_K = 0.005  # median of the prior
PRIOR_LOG_SD = 0.7  # standard deviation of ln k: 95% from .0013 to .02
PAPER_RATIO = 64.0  # d / L of the models of the paper's Figures 1 and 2
REACH = 2.0  # ratios from r0 / REACH to r0 REACH are looked at: beyond them neither runs nor the prior say anything
SAME_SIZE, OTHER_RATIO = np.log(1.1), np.log(1.2)  # runs of one size, and of different ratios
_NODES = np.linspace(-6.0, 6.0, 2401)  # standard deviations of the prior, at which its product with the runs is summed


@dataclasses.dataclass(frozen=True)
class Penalty:
    """k with its uncertainty, and the ratio r0 that the laws are of.

    `measured` and `sem`: what `runs` runs at other ratios say of k, with a standard error; nan of none.
    """

    center: float = PAPER_RATIO  # r0
    measured: float = np.nan
    sem: float = np.nan
    runs: int = 0

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and largest d / L that may be answered."""
        return self.center / REACH, self.center * REACH

    @functools.cached_property
    def _cumulated(self) -> tuple[np.ndarray, np.ndarray]:
        """ln k at the nodes, and the share of k below."""
        log_k = np.log(PRIOR_K) + PRIOR_LOG_SD * _NODES
        log_density = -0.5 * _NODES**2
        if self.runs:
            log_density = log_density - 0.5 * ((np.exp(log_k) - self.measured) / self.sem) ** 2
        density = np.exp(log_density - log_density.max())
        below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
        return log_k, below / below[-1]

    def at(self, share: Any) -> Any:
        """Quantiles of k."""
        log_k, below = self._cumulated
        return np.exp(np.interp(share, below, log_k))

    @property
    def median(self) -> float:
        return float(self.at(0.5))

    @property
    def interval(self) -> tuple[float, float]:
        """95% of k."""
        low, high = self.at([0.025, 0.975])
        return float(low), float(high)

    def draw(self, count: int, seed: int = 0) -> np.ndarray:
        """k_S, one from each of `count` equal parts of its distribution, in random order."""
        generator = np.random.default_rng([seed, 7])
        return self.at((generator.permutation(count) + generator.random(count)) / count)

    def factor(self, k: Any, ratio: Any) -> Any:
        """1 + k ln^2(ratio / r0): how many times the loss of r0 the loss at a ratio is; broadcasts."""
        return 1.0 + k * np.log(np.asarray(ratio, np.float64) / self.center) ** 2

    @property
    def source(self) -> str:
        """Where k is from, in words."""
        if not self.runs:
            return "a prior (Kaplan et al. 2020), no run of these laws"
        noun = "run" if self.runs == 1 else "runs"
        return f"{self.runs} {noun} at other d/L ({self.measured:.4f} +- {self.sem:.4f}) and a prior (Kaplan et al. 2020)"


def ratios(rows: pd.DataFrame) -> np.ndarray | None:
    """d / L of every row; None where the shapes are not known."""
    if not {"d_model", "n_layers"} <= {*rows.columns} or rows[["d_model", "n_layers"]].isna().any(axis=None):
        return None
    return rows["d_model"].to_numpy(np.float64) / rows["n_layers"].to_numpy(np.float64)


def split(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows that a law is of, rows that tell what the ratio costs).

    Where runs of one H and size, N within 10%, differ in d / L by more than 20%, the one closest to the middle of all runs'
    ratios (the median of their logarithms) belongs to the law and the others tell k.
    """
    known = ratios(rows)
    if known is None or not len(rows):
        return rows, rows.iloc[:0]
    log_n, log_r = np.log(rows["params_non_embedding"].to_numpy(np.float64)), np.log(known)
    away = np.abs(log_r - np.median(log_r))
    other = np.zeros(len(rows), bool)
    for at in rows.groupby(["n_heads", "n_kv_heads"], dropna=False).indices.values():
        same = np.abs(log_n[at][:, None] - log_n[at]) < SAME_SIZE
        closer = (np.abs(log_r[at][:, None] - log_r[at]) > OTHER_RATIO) & (away[at] < away[at][:, None] - 1e-9)
        other[at] = (same & closer).any(1)
    return rows[~other], rows[other]


def penalty(rows: pd.DataFrame, others: pd.DataFrame, laws: LawsByHeads) -> Penalty:
    """k from the two parts of `split`: ln(loss / law) of `others` against how far their ln^2(r / r0) is from the law's.

    A run and the law that it is compared with are both as uncertain as a run's noise. Without noise, or where no other ratio
    differs, the prior alone.
    """
    known = ratios(rows)
    if known is None or not len(known):
        return Penalty()
    center = float(np.exp(np.median(np.log(known))))
    x, y, sd = [], [], []
    for row in others.itertuples():
        heads = next((h for h in laws if h == (None if pd.isna(row.n_heads) else int(row.n_heads), int(row.n_kv_heads))), None)
        if heads is None:
            continue
        n = float(row.params_non_embedding)
        usual = np.log(float(laws.aspect(n)) / center) ** 2
        expected = float(laws[heads].predict(n))
        x.append(np.log(row.d_model / row.n_layers / center) ** 2 - usual)
        y.append(np.log(float(row.loss) / expected))
        sd.append(np.sqrt(2) * laws.sigma / expected)
    x, y, sd = np.array(x), np.array(y), np.array(sd)
    if not (len(x) and np.isfinite(sd).all() and (sd > 0).all() and (x**2).sum() > 1e-4):
        return Penalty(center)
    information = float(np.sum((x / sd) ** 2))
    return Penalty(center, float(np.sum(x * y / sd**2)) / information, information**-0.5, len(x))
