"""What depth against width costs in loss, with r = d / L the aspect ratio and c the best of them:

    L(N, r; H) = L(N; H) (1 + k ln^2(r / c)) / (1 + k ln^2(r0 / c))

L(N; H) is the law of runs of the ratio r0, which is a function of N where their sizes differ in it. How fast loss rises, k, and
where it is least, c, are drawn with the coefficients of the laws: from runs of one size at several ratios where there are some,
else from a prior alone.

The prior of k is lognormal about .005, that of c about 50. Kaplan et al. (arXiv 2001.08361, Section 3.1) find the loss of
(L, d) = (6, 4288) within 3% of that of (48, 1600), which is k = .006 at most; the 22 models of Gemstones (arXiv 2502.06857;
d / L from 3 to 320, one recipe) lie on this form with k = .004 and c = 45. docs/shape.md has both calculations.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from gqa_jax.laws.heads import Heads
from gqa_jax.laws.runs import have, ratios
from gqa_jax.shapes import Aspect

if TYPE_CHECKING:
    from gqa_jax.laws.by_heads import LawsByHeads

PRIOR_K, PRIOR_LOG_K_SD = 0.005, 0.5  # median, and standard deviation of ln k: 95% from .0019 to .013
PRIOR_C, PRIOR_LOG_C_SD = 50.0, 0.3  # the same of c: 95% from 28 to 90
PAPER_RATIO = 64.0  # d / L of the models of the paper's Figures 1 and 2
REACH = 2.0  # ratios from r0 / REACH to r0 REACH are looked at: beyond them neither runs nor the prior say anything
SAME_SIZE, OTHER_RATIO = np.log(1.1), np.log(1.2)  # runs of one size, and of different ratios
SAME_TOKENS = 1.05
_NODES_K, _NODES_C = np.linspace(-5.0, 5.0, 161), np.linspace(-4.0, 4.0, 65)  # standard deviations of the priors


class Price(NamedTuple):
    """k and c: numbers, or one for each draw."""

    k: Any
    best: Any


class OtherRatio(NamedTuple):
    """A run that tells what its ratio costs: ln(loss / law) there.

    sd: of the run's own noise. The law of its heads is as uncertain, and errs alike for all runs of a `group`.
    """

    ratio: float
    log_excess: float
    sd: float
    group: int = 0
    n_params: float | None = None  # its size, where r0 depends on it


@dataclasses.dataclass(frozen=True)
class Penalty:
    """k and c with their uncertainty, for laws of runs of the ratio r0."""

    ratio: float = PAPER_RATIO  # r0, or the usual one
    others: tuple[OtherRatio, ...] = ()
    by_size: Aspect | None = None  # r0 as a function of N, where the sizes of the laws differ in it

    @property
    def of_sizes(self) -> tuple[float, float]:
        """Least and largest r0."""
        return (self.ratio, self.ratio) if self.by_size is None else (min(self.by_size.ratio), max(self.by_size.ratio))

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and largest d / L that may be answered, at every size: half and twice the usual one of the runs."""
        return self.ratio / REACH, self.ratio * REACH

    @functools.cached_property
    def _weight_KxC(self) -> np.ndarray:
        """Posterior at the nodes."""
        log_weight = -0.5 * (_NODES_K[:, None] ** 2 + _NODES_C**2)
        price = Price(self._k_K[:, None], self._best_C)
        for group in {one.group for one in self.others}:
            own = [one for one in self.others if one.group == group]
            expected = [np.log(self.factor(price, one.ratio, one.n_params)) for one in own]
            z_KxCxO = np.stack([(log - one.log_excess) / one.sd for log, one in zip(expected, own, strict=True)], -1)
            common = z_KxCxO.sum(-1) ** 2 / (1 + len(own))  # what the law's own error explains
            log_weight = log_weight - 0.5 * ((z_KxCxO**2).sum(-1) - common)
        weight = np.exp(log_weight - log_weight.max())
        return weight / weight.sum()

    @property
    def _k_K(self) -> np.ndarray:
        return PRIOR_K * np.exp(PRIOR_LOG_K_SD * _NODES_K)

    @property
    def _best_C(self) -> np.ndarray:
        return PRIOR_C * np.exp(PRIOR_LOG_C_SD * _NODES_C)

    def quantiles(self, share: Any) -> Price:
        """Of k and of c, each by itself."""

        def of(weight: np.ndarray, values: np.ndarray) -> np.ndarray:
            return np.exp(np.interp(share, np.cumsum(weight) - weight / 2, np.log(values)))

        return Price(of(self._weight_KxC.sum(1), self._k_K), of(self._weight_KxC.sum(0), self._best_C))

    @property
    def typical(self) -> Price:
        """The medians."""
        return self.quantiles(0.5)

    def draw(self, count: int, seed: int = 0) -> Price:
        """`count` draws of both, one from each equal part of their distribution, in random order."""
        generator = np.random.default_rng([seed, 7])
        below = np.cumsum(self._weight_KxC)
        node = np.searchsorted(below, (generator.permutation(count) + generator.random(count)) / count * below[-1])
        node = np.minimum(node, below.size - 1)
        jitter = generator.random((2, count)) - 0.5  # within a cell of the grid
        k = _NODES_K[node // _NODES_C.size] + jitter[0] * (_NODES_K[1] - _NODES_K[0])
        best = _NODES_C[node % _NODES_C.size] + jitter[1] * (_NODES_C[1] - _NODES_C[0])
        return Price(PRIOR_K * np.exp(PRIOR_LOG_K_SD * k), PRIOR_C * np.exp(PRIOR_LOG_C_SD * best))

    def factor(self, price: Price, ratio: Any, n_params: Any = None) -> Any:
        """How many times the loss of r0 the loss at a ratio is; broadcasts. n_params: of the model (None: any)."""
        r0 = self.ratio if self.by_size is None or n_params is None else self.by_size(n_params)
        at, usual = np.log(np.asarray(ratio, np.float64) / price.best), np.log(r0 / price.best)
        return (1.0 + price.k * at**2) / (1.0 + price.k * usual**2)

    @property
    def source(self) -> str:
        """Where k and c are from, in words."""
        prior = "a prior (Kaplan et al. 2020, Gemstones 2025)"
        if not self.others:
            return f"{prior}, no run of these laws"
        return f"{len(self.others)} {'run' if len(self.others) == 1 else 'runs'} at other d/L and {prior}"


def usual(known: np.ndarray) -> float:
    """The middle of some ratios, one that a run has: of an even number the lower of the two in the middle."""
    return float(np.sort(known)[(len(known) - 1) // 2])


def split(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows that a law is of, rows that tell what the ratio costs).

    Where runs of one H and size, N within 10%, differ in d / L by more than 20%, the one closest to `usual` belongs to the law
    and the others tell k; of two that are as far, the deeper one belongs to the law.
    """
    known = ratios(rows)
    if known is None or not len(rows):
        return rows, rows.iloc[:0]
    log_n, log_r = np.log(rows["params_non_embedding"].to_numpy(np.float64)), np.log(known)
    away = np.abs(log_r - np.log(usual(known))) + 1e-6 * log_r  # the second decides between two that are as far
    other = np.zeros(len(rows), bool)
    for at in rows.groupby(["n_heads", "n_kv_heads"], dropna=False).indices.values():
        same = np.abs(log_n[at][:, None] - log_n[at]) < SAME_SIZE
        closer = (np.abs(log_r[at][:, None] - log_r[at]) > OTHER_RATIO) & (away[at] < away[at][:, None])
        other[at] = (same & closer).any(1)
    return rows[~other], rows[other]


def penalty(rows: pd.DataFrame, others: pd.DataFrame, laws: LawsByHeads) -> Penalty:
    """What the two parts of `split` say of k and c: ln(loss / law) of `others`.

    Only runs that saw as many tokens as the law's of about their size, or as many per parameter, within 5%: others differ in
    more than their shape. A run's noise is known from the residuals of the laws, and as well as their degrees of freedom allow:
    its standard deviation is widened as Student's t is against the normal distribution at 95%. Without noise: the prior alone.
    """
    known = ratios(rows)
    if known is None or not len(known):
        return Penalty()
    found = []
    wider = stats.t.ppf(0.975, laws.dof) / stats.norm.ppf(0.975) if laws.dof > 0 else np.nan
    for row in others.itertuples():
        heads = Heads.of(row.n_heads, row.n_kv_heads)
        if heads not in laws or not laws.sigma > 0 or not _as_many_tokens(row, rows):
            continue
        n_params = float(row.params_non_embedding)
        expected = float(laws[heads].predict(n_params))
        excess = float(np.log(float(row.loss) / expected))
        sd = float(wider * laws.sigma / expected)
        found.append(OtherRatio(float(row.d_model) / float(row.n_layers), excess, sd, list(laws).index(heads), n_params))
    by_size = laws.aspect if np.ptp(known) > 1e-9 * known.max() else None
    return Penalty(usual(known), tuple(found), by_size)


def _as_many_tokens(row: Any, rows: pd.DataFrame) -> bool:
    """Whether a run saw as many tokens, or as many per parameter, as the law's of its heads that is closest in size.

    True where that is not known.
    """
    rows = rows[have(rows, Heads.of(row.n_heads, row.n_kv_heads))]
    n = rows["params_non_embedding"].to_numpy(np.float64)
    near = rows.iloc[int(np.argmin(np.abs(np.log(n / float(row.params_non_embedding)))))]
    if "tokens" not in rows or pd.isna(row.tokens) or pd.isna(near["tokens"]):
        return True
    tokens = np.log(float(row.tokens) / float(near["tokens"]))
    per_parameter = tokens - np.log(float(row.params_non_embedding) / float(near["params_non_embedding"]))
    return bool(min(abs(tokens), abs(per_parameter)) <= np.log(SAME_TOKENS))
