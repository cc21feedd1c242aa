"""L(N) = (a / N)^b + E of one head configuration (arXiv 2503.09579v2, Eq. 7 and 8)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gqa_jax.formatting import short


class Laws[K, L](Mapping[K, L]):
    """Laws by what they are of, in `_laws`: what a mapping offers, and no more."""

    _laws: dict[K, L]

    def __getitem__(self, of: K) -> L:
        return self._laws[of]

    def __iter__(self) -> Iterator[K]:
        return iter(self._laws)

    def __len__(self) -> int:
        return len(self._laws)


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        points = f"R² {self.r_squared:.5f} of {len(self.loss)} points" if len(self.loss) else "no points"
        return f"<PowerLaw: L(N) = ({short(self.a)} / N)^{self.b:.4g} + {self.entropy:.4g}, {points}>"

    @property
    def residuals(self) -> np.ndarray:
        """Measured minus fitted loss of the points."""
        return self.loss - self.predict(self.params)


def closest(log_above_SxJ: np.ndarray, x_J: np.ndarray) -> np.ndarray:
    """(alpha, b)_2xS of the power laws alpha - b x closest to ln(L - E) at x = ln(N / N0)."""
    off = x_J - x_J.mean()
    slope = log_above_SxJ @ off / np.sum(off**2)
    return np.stack([log_above_SxJ.mean(1) - slope * x_J.mean(), -slope])
