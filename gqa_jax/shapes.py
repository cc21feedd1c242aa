"""Model shapes: the paper's tables of sizes, and what follows from (layers, hidden size, heads).

Source: arXiv 2503.09579v2, Tables 7 and 9, Appendices B.1 and D. Configurations are read without numpy, so
only what computes on arrays imports it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

HEAD_DIM = 64  # d_h of every model in the paper
VOCAB_SIZE = 50_304  # GPT-2's 50,257 ids, padded to a multiple of 64
FFN_RATIO = 8 / 3  # hidden size of the feed-forward network over d (Section 5.1)
HEAD_COUNTS = (1, 2, 4, 8, 16, 32)  # candidates for n_h and n_kv (Section 4.1)


class Size(NamedTuple):
    """One row of Table 9: a trained size, its recipe's peak learning rate and token budget."""

    n_layers: int
    d_model: int
    learning_rate: float
    tokens: int


#: Table 9 (layers, hidden size, maximum learning rate) with Appendix D's training tokens.
SIZES: dict[str, Size] = {
    "3M": Size(4, 256, 1e-3, 60_000_000),
    "19M": Size(6, 512, 1e-3, 380_000_000),
    "85M": Size(12, 768, 1e-3, 1_500_000_000),
    "150M": Size(12, 1024, 1e-3, 3_000_000_000),
    "200M": Size(16, 1024, 5e-4, 4_000_000_000),
    "470M": Size(24, 1280, 5e-4, 9_400_000_000),
    "680M": Size(24, 1536, 2e-4, 13_600_000_000),
    "1.2B": Size(36, 1536, 2e-4, 24_000_000_000),
}

#: Table 7 (layers, hidden size): larger shapes, known for their aspect ratio only.
LARGE_SHAPES: dict[str, tuple[int, int]] = {
    "1.2B": (36, 1536),
    "1.8B": (36, 2048),
    "4B": (48, 2560),
    "6B": (54, 3072),
    "13B": (64, 4096),
    "33B": (72, 6144),
    "64B": (80, 8192),
}


def ffn_width(d_model: int, ratio: float = FFN_RATIO) -> int:
    """Hidden size F of the feed-forward network: the multiple of 32 closest to `ratio` d, 8 d / 3 (Section 5.1)."""
    return max(32, 32 * round(ratio * d_model / 32))


def head_configurations(counts: tuple[int, ...] = HEAD_COUNTS) -> list[tuple[int, int]]:
    """Every (n_h, n_kv) with n_kv <= n_h from `counts`: 21 configurations for the paper's six counts (Section 4.1)."""
    return [(n_heads, n_kv) for n_heads in counts for n_kv in counts if n_kv <= n_heads]


@dataclass(frozen=True)
class Aspect:
    """Aspect ratio d / L as a function of N: linear between knots (params, ratio), constant outside them (Appendix B.1).

    Called with an array of N it returns an array. Raises ValueError: no knots, or knots that are not increasing or positive.
    """

    params: tuple[float, ...]  # N, increasing
    ratio: tuple[float, ...]  # d / L at each

    def __post_init__(self):
        if not self.params or len(self.params) != len(self.ratio):
            raise ValueError(
                f"aspect: {len(self.params)} sizes and {len(self.ratio)} ratios: give one ratio d / L per size, and one or more"
            )
        for name in ("params", "ratio"):
            values = tuple(map(float, getattr(self, name)))
            object.__setattr__(self, name, values)
            wrong = [value for value in values if not 0 < value < math.inf]
            if wrong:
                raise ValueError(f"aspect {name} = {wrong[0]}: must be above 0 and finite")
        for before, after in zip(self.params, self.params[1:], strict=False):
            if not before < after:
                raise ValueError(f"aspect params {before:g}, {after:g}: sizes must increase, with one ratio d / L each")

    def __call__(self, n_params: Any) -> Any:
        import numpy as np

        return np.interp(n_params, self.params, self.ratio)

    @classmethod
    def between(cls, sizes: Iterable[tuple[float, float, float]]) -> Aspect:
        """Knots at known (N, layers, hidden size), in any order."""
        known = sorted({(float(n), d / layers) for n, layers, d in sizes})
        return cls(tuple(n for n, _ in known), tuple(ratio for _, ratio in known))

    @classmethod
    def constant(cls, ratio: float) -> Aspect:
        """The same d / L for every N; 64 in the paper's Figures 1 and 2."""
        return cls((1.0,), (ratio,))


def paper_aspect() -> Aspect:
    """The paper's: Table 9 below 1.2B, Table 7 from there on, N counted as in its figures with MHA: 12 L d^2."""
    known = [(size.n_layers, size.d_model) for name, size in SIZES.items() if name != "1.2B"] + list(LARGE_SHAPES.values())
    return Aspect.between((12 * layers * d**2, layers, d) for layers, d in known)
