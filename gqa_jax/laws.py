"""Scaling laws: loss against model size, L(N; H) = (a / N)^b + E (arXiv 2503.09579v2, Eq. 7). Imports no jax.

E, the entropy of the language, is shared by all head configurations H of a context by default: it belongs to the text. A
power law with its own E per H needs more sizes than small grids have, and its E is poorly determined (R^2 says nothing of it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize

MIN_SIZES = 3
_GRID_E, _GRID_B = 400, 400  # of the variable projection that finds where to start
_SMALLEST_B, _LARGEST_B = 0.005, 2.0


class Heads(NamedTuple):
    """A head configuration H."""

    n_heads: int
    n_kv_heads: int

    def __str__(self) -> str:
        return f"({self.n_heads},{self.n_kv_heads})"


@dataclass(frozen=True)
class PowerLaw:
    """L(N) = (a / N)^b + E, N without embeddings, with what it was fitted to."""

    a: float
    b: float
    entropy: float  # E, nats per token
    r_squared: float
    params: np.ndarray  # N of the points
    loss: np.ndarray  # of the points
    warnings: tuple[str, ...] = ()

    def predict(self, params: float | np.ndarray) -> float | np.ndarray:
        """Loss at N parameters."""
        return (self.a / np.asarray(params, np.float64)) ** self.b + self.entropy

    def solve(self, loss: float) -> float:
        """N* that reaches `loss`: a / (L - E)^(1/b) (Eq. 8). Raises ValueError for a loss at or below E."""
        if not loss > self.entropy:
            raise ValueError(f"a loss of {loss} can't be reached: the fitted entropy E is {self.entropy:.4f}")
        return float(self.a / (loss - self.entropy) ** (1 / self.b))

    def warn(self, *sentences: str) -> PowerLaw:
        return dataclasses.replace(self, warnings=self.warnings + sentences)


def fit_by_heads(table: pd.DataFrame, shared_entropy: bool = True) -> dict[Heads, PowerLaw]:
    """One law per head configuration of a loss table (`gqa_jax.load_results`) of ONE training context.

    Args:
      table: columns n_heads, n_kv_heads, params_non_embedding, loss, status, context; rows that are not done are left out.
        Several seeds of a size are points of equal weight.
      shared_entropy: one E for all H (default), or one per H.

    Least squares on the loss. For given (E, b) the best amplitude is linear, so a grid over both finds the basin without a
    start value (variable projection), and `scipy.optimize.least_squares` finishes in float64.

    Raises:
      ValueError: no finished run, more than one context, fewer than three sizes for an H, or losses that don't fall with size.
    """
    done = table[(table["status"] == "done") & table["loss"].notna()]
    if done.empty:
        raise ValueError("no finished run to fit: every row is diverged or missing")
    if len(done["context"].unique()) > 1:
        raise ValueError(f"one training context at a time: the table has {sorted(done['context'].unique())}")
    groups = {
        Heads(*map(int, key)): (rows["params_non_embedding"].to_numpy(np.float64), rows["loss"].to_numpy(np.float64))
        for key, rows in done.sort_values("params_non_embedding").groupby(["n_heads", "n_kv_heads"])
    }
    for heads, (params, _) in groups.items():
        if len(set(params)) < MIN_SIZES:
            raise ValueError(f"heads {heads}: {len(set(params))} sizes have finished, a law needs {MIN_SIZES} or more")
    if shared_entropy:
        return _fit(groups)
    return {heads: law for key, points in groups.items() for heads, law in _fit({key: points}).items()}


def _fit(groups: Mapping[Heads, tuple[np.ndarray, np.ndarray]]) -> dict[Heads, PowerLaw]:
    """Laws with one E. Parameters of the polish: E, then (ln A, b) per H with A = (a / N0)^b at a size N0 inside the data."""
    points = list(groups.values())
    center = float(np.exp(np.mean(np.log(np.concatenate([params for params, _ in points])))))
    logs = [np.log(params / center) for params, _ in points]
    losses = [loss for _, loss in points]
    lowest = min(loss.min() for loss in losses)
    start = _project(logs, losses, lowest)

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [
                np.exp(x[1 + 2 * i] - x[2 + 2 * i] * log) + x[0] - loss
                for i, (log, loss) in enumerate(zip(logs, losses, strict=True))
            ]
        )

    lower = np.array([0.0] + [-np.inf, 0.0] * len(points))
    upper = np.array([lowest] + [np.inf, np.inf] * len(points))
    start = np.clip(start, lower + 1e-12, upper - 1e-9)
    best = optimize.least_squares(residuals, start, bounds=(lower, upper), x_scale="jac", xtol=1e-15, ftol=1e-15, gtol=1e-15)
    entropy = float(best.x[0])
    free = 1 + 2 * len(points)
    count = sum(len(loss) for loss in losses)
    common = _warnings(entropy, lowest, count, free, points)
    laws = {}
    for i, (heads, (params, loss)) in enumerate(groups.items()):
        log_amplitude, b = best.x[1 + 2 * i : 3 + 2 * i]
        if b < _SMALLEST_B:
            raise ValueError(
                f"heads {heads}: the losses do not fall with size ({', '.join(f'{x:.4f}' for x in loss)}): no power law"
            )
        law = PowerLaw(float(center * np.exp(log_amplitude / b)), float(b), entropy, np.nan, params, loss, tuple(common))
        rest, spread = np.sum((law.predict(params) - loss) ** 2), np.sum((loss - loss.mean()) ** 2)
        laws[heads] = dataclasses.replace(law, r_squared=float(1 - rest / spread) if spread > 0 else np.nan)
    return laws


def _project(logs: Sequence[np.ndarray], losses: Sequence[np.ndarray], lowest: float) -> np.ndarray:
    """Start of the polish: for every E of a grid the best b and A of each H, then the E with the least sum of squares."""
    entropies = lowest * (1 - np.geomspace(1e-4, 1.0, _GRID_E))  # from just below the lowest loss down to 0
    slopes = np.geomspace(_SMALLEST_B, _LARGEST_B, _GRID_B)
    total = np.zeros(_GRID_E)
    choices = []
    for log, loss in zip(logs, losses, strict=True):
        basis_bxn = np.exp(-slopes[:, None] * log)
        above_Exn = loss - entropies[:, None]
        amplitude_Exb = above_Exn @ basis_bxn.T / np.sum(basis_bxn**2, axis=1)
        squares_Exb = np.sum(above_Exn**2, axis=1)[:, None] - amplitude_Exb**2 * np.sum(basis_bxn**2, axis=1)
        chosen = np.argmin(squares_Exb, axis=1)
        rows = np.arange(_GRID_E)
        total += squares_Exb[rows, chosen]
        choices.append((amplitude_Exb[rows, chosen], slopes[chosen]))
    best = int(np.argmin(total))
    return np.array([entropies[best]] + [x for a, b in choices for x in (np.log(max(a[best], 1e-12)), b[best])])


def _warnings(
    entropy: float, lowest: float, count: int, free: int, points: Sequence[tuple[np.ndarray, np.ndarray]]
) -> list[str]:
    found = []
    if count <= free:
        found.append(f"{count} runs for {free} coefficients: the curve passes through every point, and R^2 = 1 says nothing")
    if entropy < 1e-3 * lowest:
        found.append("the fit puts E at 0, its lower bound: losses of larger models are needed to see it")
    if entropy > lowest * (1 - 1e-4):
        found.append("the fit puts E at the lowest loss: it can't be used beyond the sizes that were trained")
    span = min(params.max() / params.min() for params, _ in points)
    if span < 16:
        found.append(f"sizes span a factor of {span:.1f} only: extrapolation beyond them is a guess")
    return found
