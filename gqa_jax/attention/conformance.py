"""Whether an implementation of attention is right: a table of problems, each compared with float64 arithmetic in NumPy.

    python -m gqa_jax.attention.conformance pallas_tpu my_package.kernels:flash --interpret

takes names as a run's configuration does (`gqa_jax.attention.external`); `check` is the same from Python.
An implementation passes where the root-mean-square errors of output, log-sum-exp and gradients are at most `FACTOR` times those
of `xla` in the same dtype, in blocks or as it runs, whichever is larger. What it can't run is no failure: the reason is
said.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gqa_jax.attention import api, vjp, xla
from gqa_jax.attention.cache import quantized
from gqa_jax.attention.dispatch import unsupported_reason
from gqa_jax.attention.spec import Case, Mask, interpreted

FACTOR = 1.5  # of the error of `xla`
RESULTS = ("out", "lse", "dq", "dk", "dv")


class Problem(NamedTuple):
    """A call of `attention`, or with `lengths` one of `decode`. Offsets that are `traced` are known only when it runs."""

    heads: tuple[int, int]  # query heads, key/value heads
    head_dim: int
    length: int  # T; of decode S, the entries of a cache
    keys: int | None = None  # S; None: T
    batch: int = 1
    dtype: str = "bfloat16"
    kind: str = "normal"  # "large": logits of hundreds; "equal": all queries are one, and all keys
    scale: float | None = None
    q_offset: int = 0
    kv_offset: int = 0
    traced: bool = False
    segments: str | None = None  # "sorted": packed documents; "mixed": ids in no order
    lse: bool = True  # gradients go through the log-sum-exp too
    lengths: tuple[int, ...] | None = None  # entries of each sequence that are valid: those beyond are NaN
    cache: str | None = None  # dtype of it; None: `dtype`

    def case(self) -> Case:
        if self.lengths is not None:
            sizes = {"batch": len(self.lengths), "length": 1, "keys": self.length}
        else:
            sizes = {"batch": self.batch, "length": self.length, "keys": self.keys or self.length}
        aligned = self.lengths is None and not self.traced and self.q_offset == self.kv_offset
        return Case.planned(
            n_heads=self.heads[0], n_kv_heads=self.heads[1], head_dim=self.head_dim, dtype=self.dtype, aligned=aligned,
            segments=self.segments is not None, **sizes,
        )._replace(decode=self.lengths is not None, cache_dtype=self.cache)  # fmt: skip


PROBLEMS = {
    "one head": Problem((1, 1), 64, 64),
    "one query": Problem((8, 2), 64, 1),
    "heads of 128": Problem((1, 1), 128, 150),
    "heads of 16": Problem((6, 2), 16, 77),
    "heads of 80": Problem((6, 2), 80, 60),
    "a group": Problem((8, 1), 64, 200),
    "a group, heads of 128": Problem((8, 1), 128, 140),
    "groups": Problem((8, 2), 64, 300, scale=0.2),
    "groups, heads of 128": Problem((32, 8), 128, 40),
    "no groups": Problem((16, 16), 64, 65),
    "long": Problem((2, 1), 64, 1100),
    "a batch": Problem((4, 2), 64, 130, batch=2),
    "float32": Problem((4, 2), 64, 150, dtype="float32"),
    "float16": Problem((8, 2), 64, 70, dtype="float16"),
    "large logits": Problem((8, 1), 64, 200, kind="large"),
    "equal keys": Problem((8, 1), 64, 200, kind="equal"),
    "offset": Problem((4, 2), 64, 70, keys=230, q_offset=160),
    "offset, traced": Problem((4, 2), 64, 70, keys=230, q_offset=160, traced=True),
    "queries that see no key": Problem((4, 2), 64, 200, keys=150, q_offset=13, kv_offset=60),
    "queries that see no key, traced": Problem((4, 2), 64, 200, keys=150, q_offset=13, kv_offset=60, traced=True),
    "no query sees a key": Problem((2, 1), 64, 20, keys=40, kv_offset=1000),
    "documents": Problem((4, 2), 64, 260, batch=2, segments="sorted"),
    "documents in no order": Problem((2, 1), 64, 140, segments="mixed"),
    "documents and an offset": Problem((4, 1), 64, 70, keys=150, q_offset=80, segments="sorted", traced=True),
    "long, documents and offsets": Problem((2, 1), 64, 1100, keys=900, q_offset=7, kv_offset=100, segments="sorted"),
    "decode, one head": Problem((1, 1), 64, 64, lengths=(1, 64)),
    "decode, a group": Problem((8, 1), 64, 300, lengths=(299, 130)),
    "decode, an empty cache": Problem((8, 1), 128, 77, lengths=(0, 77)),
    "decode, short": Problem((8, 2), 64, 33, lengths=(33, 32)),
    "decode, heads of 128": Problem((8, 2), 128, 301, lengths=(301, 60)),
    "decode, groups": Problem((32, 8), 64, 200, lengths=(129, 7)),
    "decode, groups, heads of 128": Problem((32, 8), 128, 150, lengths=(150, 128)),
    "decode, no groups": Problem((32, 32), 128, 100, lengths=(64, 99)),
    "decode, heads of 80": Problem((6, 2), 80, 200, lengths=(200, 1)),
    "decode, long": Problem((8, 2), 64, 2500, lengths=(2500, 617)),
    "decode, float32": Problem((8, 2), 64, 150, dtype="float32", lengths=(150, 100)),
    "decode, int8": Problem((8, 2), 64, 300, lengths=(299, 130), cache="int8"),
    "decode, int8, one key/value head": Problem((4, 1), 128, 200, lengths=(200, 1), cache="int8"),
    "decode, int8, float32": Problem((8, 2), 32, 150, dtype="float32", lengths=(150, 0), cache="int8"),
    "decode, large logits": Problem((8, 2), 64, 150, kind="large", lengths=(150, 100)),
}


class Finding(NamedTuple):
    """What came of a problem: `status` is "right", "wrong", "failed" or "can't run"; `said` is why, "" where it is right."""

    status: str
    said: str
    errors: dict[str, float]  # root mean square, by result


def check(name: str, problem: Problem, *, interpret: bool = False, jit: bool | None = None) -> Finding:
    """Whether the implementation of a name is right: output, log-sum-exp where it has one, and the gradients through both.

    Args:
      interpret: run Pallas kernels in interpret mode.
      jit: as one program. None: unless `interpret`, for Mosaic GPU's interpreter calls back into JAX, which waits for ever
        within a jitted program on few cores.
    Raises:
      ValueError: an unknown name.
    """
    jit = not interpret if jit is None else jit
    with interpreted() if interpret else contextlib.nullcontext():
        case = problem.case()
        lse = unsupported_reason(name, case._replace(return_lse=True)) is None
        if not lse and (reason := unsupported_reason(name, case)) is not None:
            return Finding("can't run", reason, {})
        problem = problem._replace(lse=lse)

        def attend(q, k, v, mask: Mask, scale: float):
            segments = None if mask.q_segments_BxT is None else (mask.q_segments_BxT, mask.kv_segments_BxS)
            out = api.attention(
                q, k, v, implementation=name, segment_ids=segments, q_offset=mask.q_offset, kv_offset=mask.kv_offset,
                scale=scale, return_lse=lse,
            )  # fmt: skip
            return (out[0], jnp.moveaxis(out[1], 1, 3)) if lse else (out, None)

        try:
            got = _decoded(name, problem) if case.decode else _results(attend, problem, jit=jit)
        except Exception as error:  # of whichever kind a compiler raises
            return Finding("failed", f"{type(error).__name__}: {error}", {})
        return _judged(got, problem)


def _judged(results: tuple, problem: Problem) -> Finding:
    """The finding of results, None where there are none, beside those without rounding and those of `xla`."""
    wrong, errors = [], {}
    for name, got, truth, *usual in zip(RESULTS, results, _exact(problem), *_usual(problem), strict=False):
        if got is None:
            continue
        dtype = np.dtype("float32") if name == "lse" else jnp.dtype(problem.dtype)
        if got.dtype != dtype:
            wrong.append(f"{name} is {got.dtype}, not {dtype}")
        seen = np.isfinite(truth)
        if not np.array_equal(np.isfinite(np.asarray(got, np.float64)), seen):
            wrong.append(f"{name} is not finite, or -inf, where it must be")
            continue
        truth = truth[seen]
        errors[name], *usual_errors = (_root_mean_square(np.asarray(x, np.float64)[seen] - truth) for x in (got, *usual))
        rounding = max(float(jnp.finfo(dtype).eps), 4e-6)  # sums in float32 lose a few of its bits
        most = min(FACTOR * max(usual_errors), rounding * (2.5 * _root_mean_square(truth) + 0.25))
        most += 4 * np.finfo(np.float32).eps * max(1.0, np.abs(truth).max(initial=0))
        if not errors[name] <= most:
            wrong.append(f"{name} is off by {errors[name]:.2g}, allowed are {most:.2g}")
    return Finding("wrong" if wrong else "right", "; ".join(wrong), errors)


def _root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x * x))) if x.size else 0.0


def _normal(kind: str, seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Queries, keys and whatever else."""
    rng = np.random.default_rng(seed)
    q, k, *rest = (rng.normal(size=shape) for shape in shapes)
    if kind == "large":
        q, k = 6 * q, 6 * k
    if kind == "equal":
        q, k = (np.broadcast_to(x[:, :1], x.shape) for x in (q, k))
    return [q, k, *rest]


@functools.cache
def _arrays(problem: Problem) -> tuple[list[jax.Array], np.ndarray, Mask]:
    """q, k, v and the output's cotangent; that of the log-sum-exp (B, K, G, T); the mask, its offsets ints."""
    (n_heads, n_kv), length, keys = problem.heads, problem.length, problem.keys or problem.length
    q = (problem.batch, length, n_kv, n_heads // n_kv, problem.head_dim)
    k = (problem.batch, keys, n_kv, problem.head_dim)
    *arrays, d_lse = _normal(problem.kind, 0, q, k, k, q, (q[0], n_kv, q[3], length))
    ids = [np.random.default_rng(n).integers(0, 5, size=(problem.batch, n)).astype(np.int32) for n in (length, keys)]
    if keys == length:
        ids[1] = ids[0]
    if problem.segments == "sorted":
        ids = [np.sort(x, axis=1) for x in ids]
    segments = [None, None] if problem.segments is None else ids
    mask = Mask(problem.q_offset, problem.kv_offset, *segments)
    return [jnp.asarray(x, problem.dtype) for x in arrays], problem.lse * d_lse.astype(np.float32), mask


def _results(attend: Callable, problem: Problem, *, jit: bool = True) -> tuple:
    """Output, log-sum-exp and gradients of attend(q, k, v, mask, scale) -> out, lse or None."""
    (q, k, v, d_out), d_lse, mask = _arrays(problem)
    scale = problem.scale or problem.head_dim**-0.5
    # of a row that sees no key the log-sum-exp of -inf has any cotangent, and none may matter
    d_lse = np.where(np.isfinite(_exact(problem)[1]), d_lse, np.nan)

    def step(q, k, v, offsets):
        (out, lse), pull = jax.vjp(lambda q, k, v: attend(q, k, v, mask._replace(**offsets), scale), q, k, v)
        return out, lse, *pull((d_out, None if lse is None else jnp.asarray(d_lse, lse.dtype)))

    known = {"q_offset": mask.q_offset, "kv_offset": mask.kv_offset}
    step = jax.jit(step) if jit else step
    return step(q, k, v, {name: jnp.int32(x) for name, x in known.items()} if problem.traced else {})


@functools.cache
def _usual(problem: Problem) -> tuple[tuple, ...]:
    """What `xla` gives: as it runs, and its kernel in blocks and chunks whatever the length; in decoding, in one form alone."""
    if problem.lengths is not None:
        return (_decoded("xla", problem),)

    def in_blocks(q, k, v, mask: Mask, scale: float):
        return vjp.attend(vjp.Kernel(xla.forward, xla.backward, scale, xla.Options(block=128, chunk=256)), q, k, v, mask)

    def as_it_runs(q, k, v, mask: Mask, scale: float):
        return xla.attend(q, k, v, mask, scale, problem.case())

    return _results(in_blocks, problem), _results(as_it_runs, problem)


@functools.cache
def _exact(problem: Problem) -> tuple[np.ndarray, ...]:
    if problem.lengths is not None:
        return _exact_decode(problem)
    (q, k, v, d_out), d_lse, mask = _arrays(problem)
    how = {name.partition("_B")[0]: value for name, value in mask._asdict().items()} | {"scale": problem.scale}
    out, lse = exact(q, k, v, **how)
    return out, lse, *exact_gradients(q, k, v, d_out, np.where(np.isfinite(lse), d_lse, 0), **how)


@functools.cache
def _decode_arrays(problem: Problem) -> list[jax.Array]:
    """q (B, N, H), both caches, NaN beyond the lengths, and the lengths."""
    (n_heads, n_kv), batch, lengths = problem.heads, len(problem.lengths), np.array(problem.lengths, np.int32)
    cache = (batch, problem.length, n_kv, problem.head_dim)
    q, *caches = _normal(problem.kind, 0, (batch, n_heads, problem.head_dim), cache, cache)
    beyond = (np.arange(problem.length) >= lengths[:, None])[:, :, None, None]
    return [*(jnp.asarray(x, problem.dtype) for x in (q, *(np.where(beyond, np.nan, x) for x in caches))), jnp.asarray(lengths)]


def _decoded(name: str, problem: Problem) -> tuple:
    q, k, v, lengths = _decode_arrays(problem)
    cache = api.cache_of(k, v)
    if problem.cache == "int8":
        cache = api.new_cache(*k.shape[:2], q.shape[1], *k.shape[2:], q.dtype, cache_dtype="int8", implementation=name)
        cache = cache.append(k, v, 0)
    return jax.jit(functools.partial(api.decode, implementation=name, return_lse=True))(q, cache, lengths)


def _exact_decode(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    arrays = list(_decode_arrays(problem))
    if problem.cache == "int8":  # without rounding but that of the cache
        arrays[1:3] = (held.astype(jnp.float32) * scale.astype(jnp.float32) for held, scale in map(quantized, arrays[1:3]))
    q, k, v, lengths = (np.nan_to_num(np.asarray(x, np.float64)) for x in arrays)
    grouped = (1, 1, k.shape[2], -1, q.shape[-1])
    pairs = [
        exact(q[b].reshape(grouped), k[b : b + 1, : max(n, 1)], v[b : b + 1, : max(n, 1)], q_offset=n - 1)
        for b, n in enumerate(map(int, lengths))
    ]
    return tuple(np.stack([pair[i].reshape(q.shape[1 : 3 - i]) for pair in pairs]) for i in (0, 1))


# Attention in NumPy.


def exact(q, k, v, *, q_offset=0, kv_offset=0, q_segments=None, kv_segments=None, scale=None):
    """Output and log-sum-exp of causal grouped-query attention in float64.

    Args:
      q: (B, T, K, G, H) array of any dtype, taken as float64. k, v: (B, S, K, H).
      q_segments, kv_segments: (B, T) and (B, S) integers, or None.
      scale: of the logits; None is H ** -0.5.

    Returns:
      (B, T, K, G, H) and (B, K, G, T), float64. A row that sees no key is 0, its log-sum-exp -inf.
    """
    weights, total, largest, v = _weights(q, k, v, q_offset, kv_offset, q_segments, kv_segments, scale)
    out = np.einsum("bkgts,bskh->btkgh", weights / np.where(total > 0, total, 1), v)
    with np.errstate(divide="ignore"):
        return out, np.where(total > 0, largest + np.log(total), -np.inf)[..., 0]


def exact_gradients(q, k, v, d_out, d_lse=None, *, q_offset=0, kv_offset=0, q_segments=None, kv_segments=None, scale=None):
    """Gradients of sum(out * d_out) + sum(lse * d_lse) to q, k and v; arguments as in `exact`, d_lse (B, K, G, T) or None."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights, total, _, v = _weights(q, k, v, q_offset, kv_offset, q_segments, kv_segments, scale)
    q, k, d_out = (np.asarray(x, np.float64) for x in (q, k, d_out))
    p = weights / np.where(total > 0, total, 1)
    d_p = np.einsum("btkgh,bskh->bkgts", d_out, v)
    inner = (p * d_p).sum(-1, keepdims=True)
    if d_lse is not None:
        inner = inner - np.asarray(d_lse, np.float64)[..., None]
    d_s = scale * p * (d_p - inner)
    return (
        np.einsum("bkgts,bskh->btkgh", d_s, k),
        np.einsum("bkgts,btkgh->bskh", d_s, q),
        np.einsum("bkgts,btkgh->bskh", p, d_out),
    )


def _weights(q, k, v, q_offset, kv_offset, q_segments, kv_segments, scale):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * np.einsum("btkgh,bskh->bkgts", q, k)
    seen = (q_offset + np.arange(q.shape[1]))[:, None] >= (kv_offset + np.arange(k.shape[1]))[None, :]
    seen = np.broadcast_to(seen, (q.shape[0], *seen.shape))
    if q_segments is not None:
        seen = seen & (np.asarray(q_segments)[:, :, None] == np.asarray(kv_segments)[:, None, :])
    logits = np.where(seen[:, None, None], logits, -np.inf)
    largest = logits.max(-1, keepdims=True)
    largest = np.where(np.isfinite(largest), largest, 0.0)
    weights = np.exp(logits - largest)
    return weights, weights.sum(-1, keepdims=True), largest, v


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m gqa_jax.attention.conformance", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help="of an implementation, or where it is: module:attribute")
    parser.add_argument("--interpret", action="store_true", help="run Pallas kernels in interpret mode, on any device")
    options = parser.parse_args(arguments)
    statuses = []
    for name, (title, problem) in itertools.product(options.names, PROBLEMS.items()):
        try:
            found = check(name, problem, interpret=options.interpret)
        except ValueError as error:
            parser.error(str(error))
        statuses.append(found.status)
        print(f"{name}  {title:32} {found.status}{found.said and ': '}{found.said}", flush=True)
    print(", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)))
    return 0 if set(statuses) <= {"right", "can't run"} and "right" in statuses else 1


if __name__ == "__main__":
    sys.exit(main())
