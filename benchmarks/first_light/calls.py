"""Calls of attention that first light checks: parts of a kernel, kinds of calls, exact results, and when one is right."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention_measure import TOLERANCE
from benchmarks.first_light.target import Shape, Target
from gqa_jax.attention import attention, cache_of, conformance, decode, reference
from gqa_jax.attention.spec import Mask

RMS_FACTOR = 1.5  # of the error of `xla` in the same dtype
#: Relative error of results that are rounded to the dtype once, and no other error: no kernel is asked for less.
ROUNDING = {"bfloat16": 2**-9, "float16": 2**-12, "float32": 2**-20}

# Smoke: a part of a kernel by itself.

PARTS = {"forward": ("out", "lse"), "dq": ("dq",), "dkv": ("dk", "dv"), "decode": ("out", "lse")}


def arrays_of(target: Target, s: Shape, seed: int, *, decode_step: bool) -> tuple:
    q = (s.batch, s.n_heads, s.head_dim) if decode_step else (s.batch, s.length, s.n_heads, s.head_dim)
    k = (s.batch, s.length, s.n_kv_heads, s.head_dim)
    return tuple(target.array(10 * seed + i, shape, s.dtype) for i, shape in enumerate((q, k, k, q)))


def part_of(implementation: str, part: str) -> Callable:
    def run(q, k, v, d_out):
        if part == "decode":
            return decode(q, cache_of(k, v), k.shape[1], implementation=implementation, return_lse=True)
        if part == "forward":
            return attention(q, k, v, implementation=implementation, return_lse=True)
        _, pull = jax.vjp(lambda *x: attention(*x, implementation=implementation), q, k, v)
        dq, dk, dv = pull(d_out)
        return (dq,) if part == "dq" else (dk, dv)

    return run


def exact_part(part: str, arrays: Sequence[jax.Array]) -> list[np.ndarray]:
    """By `gqa_jax.attention.conformance`, in the shapes of `_part`."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in arrays)
    if part == "decode":
        q = q[:, None]
    grouped = (*q.shape[:2], k.shape[2], -1, q.shape[3])
    offsets = {"q_offset": k.shape[1] - 1} if part == "decode" else {}
    if part in ("forward", "decode"):
        out, lse = conformance.exact(q.reshape(grouped), k, v, **offsets)
        out, lse = out.reshape(q.shape), lse.transpose(0, 3, 1, 2).reshape(q.shape[:3])
        return [out[:, 0], lse[:, 0]] if part == "decode" else [out, lse]
    dq, dk, dv = conformance.exact_gradients(q.reshape(grouped), k, v, d_out.reshape(grouped))
    return [dq.reshape(q.shape)] if part == "dq" else [dk, dv]


# Correctness: what kinds of calls there are.

RESULTS = ("out", "lse", "dq", "dk", "dv")
SHIFTED = ("offset", "unseen")


class Problem(NamedTuple):
    """Arrays q, k, v, d_out, d_lse, q_offset, kv_offset, q and key segments; and what comes out."""

    arrays: tuple
    kind: str
    dtype: str
    results: tuple[tuple[tuple[int, ...], Any], ...]


def problem_of(target: Target, s: Shape, kind: str, seed: int, passes: str = "backward") -> Problem:
    """ "offset": keys before the first query; "unseen": the first fifth of the queries see no key."""
    keys = s.length + 64 if kind == "offset" else s.length
    q, k = (s.batch, s.length, s.n_heads, s.head_dim), (s.batch, keys, s.n_kv_heads, s.head_dim)
    shapes = (q, k, k, q)
    large = 30**0.5 if kind == "large logits" else 1.0
    arrays = [target.array(10 * seed + i, x, s.dtype, large if i < 2 else 1.0) for i, x in enumerate(shapes)]
    d_lse = target.array(10 * seed + 4, (s.batch, s.length, s.n_heads), jnp.float32)
    offsets = {"offset": (64, 0), "unseen": (0, s.length // 5)}.get(kind, (0, 0))
    position = np.arange(s.length, dtype=np.int32)
    ids = {
        "segments, sorted": position * 4 // s.length,
        "segments of one token": position,
        "segments, unsorted": np.random.default_rng(seed).integers(0, 4, s.length).astype(np.int32),
    }.get(kind, np.zeros(s.length, np.int32))
    ids = np.broadcast_to(ids, (s.batch, s.length))
    given = [target.given(np.asarray(x, np.int32)) for x in (*offsets, ids)]
    results = ((q, s.dtype), (q[:3], jnp.float32), (q, s.dtype), (k, s.dtype), (k, s.dtype))
    if passes == "forward":
        results = results[:2]
    return Problem((*arrays, d_lse, *given), kind, s.dtype, results)


def lower(implementation: str, problem: Problem, *, poisoned: bool = False) -> Any:
    """Lowered: (out, lse, dq, dk, dv) of a problem. `poisoned`: the results take the place of NaN that is given up."""
    segments = problem.kind.startswith("segments")
    shifted = problem.kind in SHIFTED

    def results(q, k, v, d_out, d_lse, q_offset, kv_offset, ids, *poison):
        options = {"q_offset": q_offset, "kv_offset": kv_offset} if shifted else {}
        options |= {"segment_ids": ids} if segments else {}

        def attend(q, k, v):
            if implementation == "float64":
                return _float64(q, k, v, **options)
            return attention(q, k, v, implementation=implementation, return_lse=True, **options)

        if len(problem.results) == 2:
            return attend(q, k, v)
        (out, lse), pull = jax.vjp(attend, q, k, v)
        return out, lse, *pull((d_out, d_lse.astype(lse.dtype)))

    if implementation == "float64":
        with jax.enable_x64(True):
            kinds = [jnp.float64 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype for x in problem.arrays]
            arrays = zip(problem.arrays, kinds, strict=True)
            wide = [jax.ShapeDtypeStruct(x.shape, kind, sharding=x.sharding) for x, kind in arrays]
            return jax.jit(results).lower(*wide)
    arrays = problem.arrays
    if not poisoned:
        return jax.jit(results).lower(*arrays)
    place = arrays[0].sharding
    poison = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in problem.results]
    donated = tuple(range(len(arrays), len(arrays) + len(poison)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory that a program has no use for
        return jax.jit(results, donate_argnums=donated, keep_unused=True).lower(*arrays, *poison)


def _float64(q, k, v, *, q_offset=0, kv_offset=0, segment_ids=None):
    batch, length, n_heads, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
    out, lse = reference.attend(grouped, k, v, Mask(q_offset, kv_offset, segment_ids, segment_ids), head_dim**-0.5)
    return out.reshape(q.shape), jnp.transpose(lse, (0, 3, 1, 2)).reshape(batch, length, n_heads)


def judged(got: Sequence, usual: Sequence, exact: Sequence, dtype: str, *, names: Sequence[str]) -> dict[str, Any]:
    """Whether results are right: the error of a block of positions at most `TOLERANCE`, that of all at most 1.5 times `xla`'s.

    Where the exact result is not finite (rows that see nothing: -inf), the other must be the same there. All float64 arrays
    (B, T, ...); relative errors are |got - exact| / |exact|.
    """
    figures: dict[str, Any] = {}
    wrong = []
    for name, x, y, z in zip(names, got, usual, exact, strict=True):
        finite = np.isfinite(z)
        if not np.array_equal(np.where(finite, 0, x), np.where(finite, 0, z)):
            wrong.append(f"{name} is not {z[~finite][0]} where it must be")
        x, y, z = (np.where(finite, array, 0.0) for array in (x, y, z))
        block, error, error_usual = _largest_block_error(x, z), _relative(x, z), _relative(y, z)
        figures |= {f"block_{name}": block, f"rms_{name}": error, f"rms_xla_{name}": error_usual}
        most = max(RMS_FACTOR * error_usual, ROUNDING[dtype])
        if not (block <= TOLERANCE[dtype] or name == "lse"):
            wrong.append(f"{name}: a block is off by {block:.2g}")
        if not error <= most:
            wrong.append(f"{name} is off by {error:.2g}, allowed are {most:.2g}")
    return {"status": "wrong" if wrong else "ok", "reason": "; ".join(wrong), **figures}


def _relative(x: np.ndarray, z: np.ndarray) -> float:
    size = np.sqrt((z * z).sum())
    return float(np.sqrt(((x - z) ** 2).sum()) / size) if size else float(np.abs(x).max(initial=0.0))


def _largest_block_error(x: np.ndarray, z: np.ndarray, block: int = 128) -> float:
    """Relative to the block; a block whose exact values are 0 counts what is there instead of 0."""
    if x.ndim < 3:  # of one query: no positions
        return _relative(x, z)
    return max(_relative(x[:, i : i + block], z[:, i : i + block]) for i in range(0, x.shape[1], block))
