"""Model shapes: the paper's tables of sizes, and what follows from (layers, hidden size, heads).

Source: arXiv 2503.09579v2, Tables 7 and 9 and Appendix D. Imports no jax.
"""

from __future__ import annotations

from typing import NamedTuple

HEAD_DIM = 64  # d_h of every model in the paper
VOCAB_SIZE = 50_304  # GPT-2's 50,257 ids, padded to a multiple of 64
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


def ffn_width(d_model: int) -> int:
    """Hidden size F of the feed-forward network: the multiple of 32 closest to 8 d / 3 (Section 5.1)."""
    return max(32, 32 * round(8 * d_model / 3 / 32))


def head_configurations(counts: tuple[int, ...] = HEAD_COUNTS) -> list[tuple[int, int]]:
    """Every (n_h, n_kv) with n_kv <= n_h from `counts`: 21 configurations for the paper's six counts (Section 4.1)."""
    return [(n_heads, n_kv) for n_heads in counts for n_kv in counts if n_kv <= n_heads]
