"""Reduce-scatter as compilers run it best."""

from __future__ import annotations

import jax
import jax.numpy as jnp

LARGEST_GROUP = 8


def reduce_scatter(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """The sum of x over the devices of `axes`, in float32 at least, each keeping its share of `dimension`.

    The order of shares is that of an array cut over `axes`. XLA's TPU compiler makes a reduce-scatter over more than 8
    devices an all-reduce of everything and a slice (libtpu 0.0.51), so that larger axes are summed in two steps of groups,
    which moves as little as one. A share is a leading index, not a slice of a tile.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    steps = [(axis, groups) for axis in axes for groups in rings(jax.lax.axis_size(axis))]
    sizes = [size for axis in axes for size in factors(jax.lax.axis_size(axis))]
    shares = x.reshape(*x.shape[:dimension], *sizes, -1, *x.shape[dimension + 1 :])
    for axis, groups in steps:
        shares = jax.lax.psum_scatter(jnp.moveaxis(shares, dimension, 0), axis, axis_index_groups=groups)
    return shares


def factors(size: int) -> tuple[int, ...]:
    """Sizes of the groups in which an axis is summed, outer first: two near the square root where `size` is above 8."""
    if size <= LARGEST_GROUP:
        return (size,)
    inner = min((i for i in range(1, size + 1) if size % i == 0), key=lambda i: (abs(i * i - size), i))
    return size // inner, inner


def rings(size: int) -> list[list[list[int]] | None]:
    """`axis_index_groups` of the steps in which an axis is summed: devices far apart first, neighbours last."""
    if len(factors(size)) == 1:
        return [None]
    outer, inner = factors(size)
    return [
        [[i + inner * j for j in range(outer)] for i in range(inner)],
        [[inner * j + i for i in range(inner)] for j in range(outer)],
    ]
