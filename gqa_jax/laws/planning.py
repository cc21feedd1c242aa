"""By how much one more size would narrow the intervals of N*: before it is trained, from the draws of the laws.

Were draw s the truth, runs y of some H at a size would be Normal(L_s(N; H), sigma_s^2). At a new size they also share a
deviation, Normal(0, kappa_s sigma_s^2), which is integrated over; another seed at a trained size has what that size shares in
the draw. For the N* of every H the losses are summed to one number, z = beta_H y, the linear predictor of N* (its normal scores
over the draws) by the covariances of the draws: so a draw's likelihood is that of one Gaussian number, and many draws carry the
interval after it however many runs there are. z takes OUTCOMES values of equal probability.

What the runs tell beside z is left out, by which intervals turn out narrower; and so is that with a larger size the prior of
`evidence` has breaks further out, by which they turn out wider.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import stats

from gqa_jax.formatting import short
from gqa_jax.laws.heads import Heads

if TYPE_CHECKING:
    from gqa_jax.laws.by_heads import LawsByHeads

OUTCOMES = 24  # losses that a size may show
BEYOND = 8.0  # times the trained sizes, at both ends: how far sizes are looked at
STEP = 2.0  # of these sizes
HALF = 0.5
LITTLE = 0.05  # by which an interval must get narrower to be worth a sentence
COLUMNS = ("n_params", "n_runs", "cost", "ratio")


class Intervals:
    """The 95% intervals of ln N*_H that reach a loss, today and after further runs.

    Raises ValueError where nothing is known of the noise of a run.
    """

    def __init__(self, laws: LawsByHeads, loss: float, *, draws: int = 2000, seed: int = 0, level: float = 0.95):
        self.draws, self.level = laws.draws(draws, seed), level
        log_n_SxH = self.draws.log_size(loss)[:, : len(laws)]
        order = np.argsort(log_n_SxH, axis=0, kind="stable")
        self.order_HxS = order.T
        self.sorted_HxS = np.take_along_axis(log_n_SxH, order, 0).T
        scores_S = stats.norm.ppf((np.arange(draws) + 0.5) / draws)
        self.scores_SxH = np.empty(log_n_SxH.shape)
        np.put_along_axis(self.scores_SxH, order, scores_S[:, None], 0)
        self.noise_S = np.random.default_rng([seed, 3]).permutation(scores_S)
        self.now_H = np.array([self._width(h, np.ones((1, draws)))[0] for h in range(len(laws))])

    def ratio(self, runs: Sequence[tuple[Heads, float]], label: int | None = None) -> float:
        """The width after runs (H, N) of one size over today's: the median of outcomes, and of these that of H.

        nan where the interval of no H is bounded today.

        Args:
          label: of the trained size that the runs repeat (`LawsByHeads.size_label`); None: a new size.
        """
        if not (bounded := np.flatnonzero(np.isfinite(self.now_H))).size:
            return np.nan
        columns = [self.draws.heads.index(heads) for heads, _ in runs]
        sigma_SxR = self.draws.sigma_SxH[:, columns]
        shared_S = self.draws.shared_at(label)
        shared_variance_S = np.zeros(len(sigma_SxR)) if shared_S is not None else self.draws.kappa_S * sigma_SxR[:, 0] ** 2
        loss_SxR = np.concatenate([self.draws.loss(heads, n, on_this_text=True) for heads, n in runs], 1)
        loss_SxR = loss_SxR if shared_S is None else loss_SxR + shared_S[:, None]
        loss_SxR = loss_SxR - loss_SxR.mean(0)
        covariance = loss_SxR.T @ loss_SxR / len(loss_SxR) + np.diag(np.mean(sigma_SxR**2, 0)) + np.mean(shared_variance_S)
        beta_RxH = np.linalg.solve(covariance, loss_SxR.T @ self.scores_SxH / len(loss_SxR))
        mean_SxH = loss_SxR @ beta_RxH
        sd_SxH = np.sqrt(sigma_SxR**2 @ beta_RxH**2 + np.outer(shared_variance_S, beta_RxH.sum(0) ** 2))
        ratios = []
        for h in bounded:
            mean_S, sd_S = (values[:, h].astype(np.float32) for values in (mean_SxH, sd_SxH))  # enough for weights
            z_J = np.quantile(mean_S + sd_S * self.noise_S, (np.arange(OUTCOMES) + 0.5) / OUTCOMES).astype(np.float32)
            weight_JxS = np.exp(np.float32(-0.5) * ((z_J[:, None] - mean_S) / sd_S) ** 2) / sd_S
            ratios.append(np.median(self._width(h, weight_JxS)) / self.now_H[h])
        return float(np.median(ratios))

    def _width(self, h: int, weight_JxS: np.ndarray) -> np.ndarray:
        """Of the interval of H by weighted draws (J,); inf where an end is."""
        sums_JxS = np.cumsum(weight_JxS[:, self.order_HxS[h]], 1)
        low, high = (
            self.sorted_HxS[h][np.sum(sums_JxS < share * sums_JxS[:, -1:], 1)]
            for share in ((1 - self.level) / 2, (1 + self.level) / 2)
        )
        return np.where(np.isfinite(high), high, np.inf) - np.where(np.isfinite(low), low, 0.0)


def one_more_size(
    laws: LawsByHeads,
    loss: float,
    *,
    heads: Sequence[Heads] | None = None,
    n_params: Sequence[float] | None = None,
    trained: tuple[np.ndarray, np.ndarray] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """What a further size would do to the 95% intervals of ln N* at a loss: COLUMNS, a row per size, the smallest first.

    ratio: the interval after it over today's, the median of what it may show and of H (`Intervals.ratio`). cost: training FLOPs
    of its runs, 6 N D; nan without `trained`.

    Args:
      heads: that are trained there; default: all of the laws.
      n_params: sizes N, of all these heads; default: about STEP apart from 1/BEYOND of the smallest to BEYOND times the largest
        that was trained, but for those within 1% of a trained one.
      trained: N and tokens D of the runs that are there: tokens of a new size are by a power of N.

    Raises:
      ValueError: heads without a law, sizes that are not above 0, or nothing is known of the noise of a run.
    """
    chosen = list(laws if heads is None else heads)
    if missing := [h for h in chosen if h not in laws]:
        raise ValueError(f"no law for heads {missing[0]}: there are {', '.join(map(str, laws))}")
    if not chosen:
        raise ValueError("heads = []: give at least one that is trained at the size, or none for all")
    sizes = _sizes(laws) if n_params is None else [float(n) for n in n_params]
    if bad := [n for n in sizes if not 0 < n < np.inf]:
        raise ValueError(f"n_params = {bad[0]}: must be a number above 0")
    tokens = [np.nan] * len(sizes)
    if trained is not None:
        log_n, log_d = np.log(trained[0]), np.log(trained[1])
        tokens = np.exp(np.polyval(np.polyfit(log_n, log_d, 1), np.log(sizes)))
    intervals = Intervals(laws, loss, draws=draws, seed=seed)
    rows = [
        (n, len(chosen), 6 * n * d * len(chosen), intervals.ratio([(h, n) for h in chosen]))
        for n, d in sorted(zip(sizes, tokens, strict=True))
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def sentence(frame: pd.DataFrame, loss: float) -> str | None:
    """Of `one_more_size`: the cheapest size that halves the interval, else the one that narrows it most; None: not known."""
    frame = frame[np.isfinite(frame["ratio"])]
    if frame.empty:
        return None
    order = frame.sort_values(["cost", "n_params"], kind="stable")
    halving = order[order["ratio"] <= HALF]
    one = order.loc[order["ratio"].idxmin()] if halving.empty else halving.iloc[0]
    what = f"the interval of N* at a loss of {loss:g}"
    least, most = (short(n) for n in (frame["n_params"].min(), frame["n_params"].max()))
    if one["ratio"] > 1 - LITTLE:
        return f"no one more size from N = {least} to {most} would make {what} narrower by more than {LITTLE:.0%}"
    runs = "1 run" if one["n_runs"] == 1 else f"{one['n_runs']:.0f} runs, one of each H"
    size = f"one more size at N = {short(one['n_params'])} ({runs})"
    by = f"narrower by {1 - one['ratio']:.0%}"
    if halving.empty:
        return f"{size} would make {what} {by}; none from {least} to {most} would halve it"
    return f"{size} would halve {what}: {by}"


def _sizes(laws: LawsByHeads) -> list[float]:
    there = np.concatenate([law.params for law in laws.values()])
    low, high = np.log(there.min() / BEYOND), np.log(there.max() * BEYOND)
    count = 1 + int(np.ceil((high - low) / np.log(STEP)))
    return [n for n in np.exp(np.linspace(low, high, count)) if np.abs(np.log(there / n)).min() > np.log(1.01)]
