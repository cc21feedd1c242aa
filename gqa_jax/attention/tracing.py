"""How Pallas kernels are traced, whatever JAX is set to."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax


def in_32_bits[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """`function`, traced as without `jax_enable_x64`, with which the numbers of a kernel's text would be of 64 bits.

    Its indices are int32 and its arithmetic float32: with 64-bit constants among them Pallas does not trace or compile it.
    """

    @functools.wraps(function)
    def traced(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return traced
