"""Causal grouped-query attention: one function, implementations by name.

Axes: B batch, T query position, S key position, N query heads, K key/value heads, G = N / K queries per group, H head size.
"""

from gqa_jax.attention.api import attention, check_name, resolve
from gqa_jax.attention.context import context_attention, planned_case, positions, zigzag
from gqa_jax.attention.decode import decode, merge
from gqa_jax.attention.gradient import results_saveable
from gqa_jax.attention.implementations import Case, interpreted

__all__ = [
    "Case", "attention", "check_name", "context_attention", "decode", "interpreted", "merge", "planned_case", "positions",
    "resolve", "results_saveable", "zigzag",
]  # fmt: skip
