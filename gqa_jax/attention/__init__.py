"""Causal grouped-query attention: one function, implementations by name (docs/attention.md).

Axes: B batch, T query position, S key position, N query heads, K key/value heads, G = N / K queries per group, H head size.
"""

from gqa_jax.attention.api import attention, cache_of, decode, new_cache
from gqa_jax.attention.cache import Cache
from gqa_jax.attention.context import context_attention, planned_case, positions, zigzag
from gqa_jax.attention.decoding import merge
from gqa_jax.attention.dispatch import Limits, clear_traced, names, resolve, traced, unsupported_reason
from gqa_jax.attention.external import implementation, register
from gqa_jax.attention.spec import Case, Mask, interpreted
from gqa_jax.attention.vjp import results_saveable

__all__ = [
    "Cache", "Case", "Limits", "Mask", "attention", "cache_of", "clear_traced", "context_attention", "decode",
    "implementation", "interpreted", "merge", "names", "new_cache", "planned_case", "positions", "register", "resolve",
    "results_saveable", "traced", "unsupported_reason", "zigzag",
]  # fmt: skip
