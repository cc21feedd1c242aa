"""Timing side by side: device time free of dispatch, and turns in which every variant runs once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

FEWEST_TURNS = 3
TOUCH = 1e-6  # too little to change what is computed; the compiler can't know


def repeated(step: Callable, n: int, *, stored: Sequence[Layout] | None = None) -> Callable[..., jax.Array]:
    """A function of step's arrays that runs step n times in a loop on the device; returns one number made of all outputs.

    Each pass changes one element of the first array by the outputs of the pass before: no pass can be left out or moved out
    of the loop. What depends on the other arrays alone can't either: the barrier ties them to the first one. Their layout in
    memory is the compiler's choice, as within a model, where a matmul writes what attention reads. With `stored`, layouts of
    the arrays after the first, leaf by leaf, they are found so at each pass, as a cache is, and another order costs its time.
    """

    def loop(first, *others):
        def body(_, carry):
            first, _ = carry
            leaves, tree = jax.tree.flatten(others)
            rest = tree.unflatten(leaves if stored is None else map(with_layout_constraint, leaves, stored))
            first, *rest = lax.optimization_barrier((first, *rest))
            outputs = lax.optimization_barrier(tuple(step(first, *rest)))
            sample = sum(x[(0,) * x.ndim].astype(jnp.float32) for x in outputs)
            corner = (0,) * first.ndim
            return first.at[corner].add((TOUCH * sample).astype(first.dtype)), sample

        return lax.fori_loop(0, n, body, (first, jnp.float32(0)))[1]

    return loop


def interleaved(
    runs: Mapping[str, Callable[[], float]], turns: int, *, longest_s: float, deadline: float
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Seconds that each run reports in each turn: all run once in a turn, in order, so that a busy neighbour slows all alike.

    Args:
      longest_s: a run that has taken this long in all sits out the turns after the third.
      deadline: of `time.perf_counter`; past it no turn begins, but for the first.

    Returns:
      The seconds, in turn order (a slow run's list is shorter), and the errors of runs that failed.
    """
    seconds = {name: [] for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    failures = {}
    for turn in range(turns):
        if turn and time.perf_counter() > deadline:
            break
        for name, run in runs.items():
            if name in failures or (turn >= FEWEST_TURNS and spent[name] > longest_s):
                continue
            begin = time.perf_counter()
            try:
                seconds[name].append(run())
            except Exception as error:  # of any kind, out of memory for one: the others go on
                failures[name] = error
            spent[name] += time.perf_counter() - begin
    return seconds, failures


class Ceiling:
    """A plain operation, measured in the same turns as what it bounds."""

    def __init__(self, compiled, arrays: tuple[jax.Array, ...], work: float):
        self._compiled, self._arrays, self._work = compiled, arrays, work
        jax.block_until_ready(compiled(*arrays))

    def seconds(self) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(self._compiled(*self._arrays))
        return time.perf_counter() - begin

    def rate(self, seconds: float) -> float:
        """FLOP/s or bytes/s."""
        return self._work / seconds


def matmul_ceiling(size: int, dtype, n: int) -> Ceiling:
    """size^3 matrix products of random data, n of them in a sample."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    compiled = jax.jit(repeated(lambda a, b: (a @ b,), n)).lower(a, b).compile()
    return Ceiling(compiled, (a, b), 2.0 * size**3 * n)


def copy_ceiling(nbytes: int, n: int) -> Ceiling:
    """Reading and writing an array of float32, n times in a sample; counts both."""
    x = jax.random.normal(jax.random.key(0), (nbytes // 4,), jnp.float32)
    compiled = jax.jit(lambda x: lax.fori_loop(0, n, lambda _, x: 0.999 * x + 0.001, x)).lower(x).compile()
    return Ceiling(compiled, (x,), 2.0 * nbytes * n)
