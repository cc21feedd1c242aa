"""The JAX side of first light: attention, decoding, ceilings and small kernels, prepared and measured when asked to.

    python -m benchmarks.first_light.jax_worker [--interpreted] [--compile_only h100]

One process, one device. `--interpreted` runs Pallas kernels in Pallas's interpreter, on any device; `--compile_only` compiles
every program for a device that is not here and runs none.
"""

from __future__ import annotations

import argparse
import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from benchmarks import timing, workers
from benchmarks.attention_contenders import Contender, Work
from benchmarks.attention_measure import TOLERANCE, decode_bytes, expected, flops, worst_error
from gqa_jax.attention import Case, attention, decode, implementations, interpreted, oracle
from gqa_jax.attention.decode import DECODERS
from gqa_jax.attention.masks import Mask
from gqa_jax.attention.reference import reference

NOMINAL = 3e14  # FLOP/s that choose how many passes a sample has
NOMINAL_BYTES = 1e12  # bytes/s, likewise, of decoding
SAMPLE_S = 0.02
RMS_FACTOR = 1.5  # of the error of `xla` in the same dtype
#: Relative error of results that are rounded to the dtype once, and no other error: no kernel is asked for less.
ROUNDING = {"bfloat16": 2**-9, "float16": 2**-12, "float32": 2**-20}
COMPILERS = 8  # threads that compile side by side


class Shape(NamedTuple):
    """Of a call, as requests have it."""

    batch: int
    length: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"

    def case(self) -> Case:
        return Case.planned(
            batch=self.batch, length=self.length, n_heads=self.n_heads, n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim, dtype=jnp.dtype(self.dtype),
        )  # fmt: skip


class Session:
    """What the worker has prepared: functions by the name of their case, each of which runs once and returns its seconds."""

    def __init__(self, *, interpret: bool = False, compile_only: str | None = None):
        self.interpret, self.mesh = interpret, None
        if compile_only is not None:
            from gqa_jax import topologies

            self.mesh = topologies.mesh(compile_only)
        self.ready: dict[str, Callable[[], float]] = {}
        self.programs: dict[str, tuple] = {}

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Traces within are for the device that programs are compiled for."""
        with contextlib.ExitStack() as stack:
            if self.mesh is not None:
                stack.enter_context(jax.set_mesh(self.mesh))
            if self.interpret:
                stack.enter_context(interpreted())
            yield

    def array(self, seed: int, shape: Sequence[int], dtype: Any, scale: float = 1.0) -> Any:
        """Random normal numbers; of a device that is not here, their shape."""
        if self.mesh is not None:
            return self.abstract(shape, dtype)
        return (scale * jax.random.normal(jax.random.key(seed), shape, jnp.float32)).astype(dtype)

    def abstract(self, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        place = NamedSharding(self.mesh, PartitionSpec()) if self.mesh is not None else SingleDeviceSharding(jax.devices()[0])
        form = Format(Layout(tuple(range(len(shape)))), place)
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=form)

    def given(self, value: Any) -> Any:
        """An array that is known; of a device that is not here, its shape."""
        value = jnp.asarray(value)
        return value if self.mesh is None else self.abstract(value.shape, value.dtype)

    # what can be asked

    def environment(self, phase: Callable, **_: Any) -> dict[str, Any]:
        """Versions and the device; a kernel of a line in Mosaic and in Triton, which say whether their compilers work here."""
        found: dict[str, Any] = {"device": jax.devices()[0].device_kind, "platform": jax.default_backend()}
        found["versions"] = {
            name: _version(name) for name in ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "tokamax", "numpy")
        }
        found["tiny_kernels"] = {name: self._tiny(phase, kernel) for name, kernel in TINY.items()}
        found["memory_bytes"] = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        return found

    def _tiny(self, phase: Callable, kernel: Callable) -> str:
        """ "ok", or why not."""
        try:
            phase("compile")
            with self.tracing():
                compiled = jax.jit(kernel(self.interpret)).lower(self.array(0, (128, 128), jnp.float32)).compile()
            if self.mesh is not None:
                return "ok"
            phase("run")
            got = np.asarray(compiled(self.array(0, (128, 128), jnp.float32)))
            wanted = np.asarray(self.array(0, (128, 128), jnp.float32)) + 1
            return "ok" if np.array_equal(got, wanted) else f"wrong: off by {np.abs(got - wanted).max()}"
        except Exception as error:  # of any kind: whether this works is what is asked
            return workers.explain(error)

    def ceiling(self, phase: Callable, case: str, kind: str, size: int, **_: Any) -> dict[str, Any]:
        """Prepares a plain operation: "matmul" of size^3 in bfloat16, or "copy" of size bytes."""
        phase("compile")
        if self.mesh is not None:
            shape = (size, size) if kind == "matmul" else (size // 4,)
            abstract = self.abstract(shape, jnp.bfloat16 if kind == "matmul" else jnp.float32)
            jax.jit(lambda x: x @ x if kind == "matmul" else 0.999 * x + 0.001).lower(abstract).compile()
            return {}
        made = timing.matmul_ceiling(size, jnp.bfloat16, 4) if kind == "matmul" else timing.copy_ceiling(size, 8)
        phase("run")
        self.ready[case] = lambda: made.seconds() / made.rate(1.0)  # seconds a FLOP, or a byte
        made.seconds()
        return {"work": 1.0}

    def smoke(self, phase: Callable, implementation: str, part: str, shape: dict, seed: int = 0, **_: Any) -> dict[str, Any]:
        """One part of a kernel, "forward", "dq", "dkv" or "decode", by itself, against float64.

        XLA removes what a program does not need, so asking for dq alone runs the dq kernel alone.
        """
        s = Shape(**shape)
        if (reason := self._obstacle(implementation, s, decode=part == "decode")) is not None:
            return {"status": "refused", "reason": reason}
        arrays = _arrays(self, s, seed, decode_step=part == "decode")
        phase("lower")
        with self.tracing():
            lowered = {name: jax.jit(_part(name, part)).lower(*arrays) for name in (implementation, "xla")}
        phase("compile")
        compiled = {name: program.compile() for name, program in lowered.items()}
        if self.mesh is not None:
            return {"status": "compiled", "temp_bytes": compiled[implementation].memory_analysis().temp_size_in_bytes}
        phase("run")
        got = {name: [np.asarray(x, np.float64) for x in program(*arrays)] for name, program in compiled.items()}
        phase("check")
        return judged(got[implementation], got["xla"], _exact(part, arrays), s.dtype, names=PARTS[part])

    def prepare(
        self, phase: Callable, case: str, implementation: str, direction: str, shape: dict, form: str = "plain",
        documents: int | None = None, **_: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Compiles a pass for `measure`, after its results were compared with float32.

        Args:
          direction: "forward", "backward" (forward and backward) or "decode" (the length is that of the cache).
          form: "plain", or "scan": in a scan over two checkpointed layers, as in the training step.
          documents: of equal length, that fill the sequence; None: no segments.
        """
        s = Shape(**shape)
        decoding = direction == "decode"
        if (reason := self._obstacle(implementation, s, decode=decoding, segments=documents is not None)) is not None:
            return {"status": "refused", "reason": reason}
        with self.tracing():
            planned = s.case()
        b, t, n, k, h = s.batch, s.length, s.n_heads, s.n_kv_heads, s.head_dim
        q = (b, n, h) if decoding else (b, t, n, h)
        shapes = [q, (b, t, k, h), (b, t, k, h), *([q] if direction == "backward" else [])]
        arrays = tuple(self.array(i, shape, s.dtype) for i, shape in enumerate(shapes))
        amount = decode_bytes(planned) if decoding else flops(planned, direction)
        nominal = NOMINAL_BYTES if decoding else NOMINAL
        iterations = 1 if self.interpret or self.mesh is not None else int(np.clip(SAMPLE_S * nominal / amount, 1, 256))
        work = Work(planned, direction, arrays, iterations)
        attend = _attend(implementation, decoding, t, form, documents)
        contender = Contender(implementation, lambda case: None, lambda case: attend)
        phase("lower")
        with self.tracing():
            lowered = contender.lower(work)
        phase("compile")
        began = time.perf_counter()
        compiled = contender.compile(lowered)
        figures = {"seconds_compile": time.perf_counter() - began, "amount": amount, "iterations": iterations}
        memory = compiled[0].memory_analysis()
        figures["temp_bytes"] = None if memory is None else memory.temp_size_in_bytes
        if self.mesh is not None:
            return {"status": "compiled", **figures}
        wanted = None
        if form == "plain" and documents is None:
            phase("compile")
            wanted = expected(work)
        phase("run")
        prepared = contender.start(work, compiled)
        if wanted is not None:
            phase("check")
            error, where = worst_error(prepared.outputs, wanted)
            figures |= {"relative_error": error, "where": where}
            if not error <= TOLERANCE[s.dtype]:
                return {"status": "wrong", "reason": f"{where} is off by {error:.2g}, relatively", **figures}
        elif not all(bool(jnp.isfinite(x).all()) for x in prepared.outputs):
            return {"status": "wrong", "reason": "a result is not finite", **figures}
        self.ready[case] = prepared.run
        return {"status": "ok", **figures}

    def measure(self, phase: Callable, case: str, **_: Any) -> dict[str, Any]:
        """Seconds of one pass of a case that was prepared, the mean of its sample."""
        phase("run")
        return {"seconds": self.ready[case]()}

    def forget(self, phase: Callable, cases: Sequence[str], **_: Any) -> dict[str, Any]:
        """Gives back the memory of cases."""
        for case in cases:
            self.ready.pop(case, None)
            self.programs.pop(case, None)
        return {}

    def compile_correct(self, phase: Callable, implementation: str, cases: Sequence[dict], **_: Any) -> dict[str, Any]:
        """Compiles cases side by side: the implementation, `xla` in the same dtype, and `reference` in float64.

        A case has `case` (its name), `shape`, `kind` (KINDS) and a seed. Returns the names of those that are ready, and
        reasons of those that are not.
        """
        lowered, reasons = {}, {}
        for one in cases:
            phase("lower")
            s = Shape(**one["shape"])
            known = {"segments": "segments" in one["kind"], "lse": True, "aligned": one["kind"] not in SHIFTED}
            if (reason := self._obstacle(implementation, s, **known)) is not None:
                reasons[one["case"]] = reason
                continue
            problem = _problem(self, s, one["kind"], one["seed"])
            with self.tracing():
                lowered[one["case"]] = problem, {
                    "it": _lower(implementation, problem, poisoned=True), "xla": _lower("xla", problem),
                    "exact": _lower("float64", problem),
                }  # fmt: skip
        with ThreadPoolExecutor(COMPILERS) as pool:
            waiting = {
                name: (problem, {key: pool.submit(program.compile) for key, program in programs.items()})
                for name, (problem, programs) in lowered.items()
            }
            for name, (problem, futures) in waiting.items():
                for future in futures.values():
                    phase("compile")
                    future.exception()
                if (error := next((f.exception() for f in futures.values() if f.exception()), None)) is not None:
                    reasons[name] = workers.explain(error)
                    continue
                self.programs[name] = problem, {key: future.result() for key, future in futures.items()}
        return {"ready": [name for name in lowered if name in self.programs], "reasons": reasons}

    def correct(self, phase: Callable, case: str, **_: Any) -> dict[str, Any]:
        """Output, log-sum-exp and three gradients of a compiled case against float64; memory of results was NaN before."""
        problem, programs = self.programs.pop(case)
        phase("check")
        with jax.enable_x64(True):
            wide = [x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in problem.arrays]
            exact = [np.asarray(x) for x in programs["exact"](*wide)]
        usual = [np.asarray(x, np.float64) for x in programs["xla"](*problem.arrays)]
        phase("run")
        free = jnp.full(max(x.size for x in problem.arrays) * 4, jnp.nan, jnp.float32)  # what the temporaries will find
        jax.block_until_ready(free)
        free.delete()
        poison = [jnp.full(shape, jnp.nan, dtype) for shape, dtype in problem.results]
        jax.block_until_ready(poison)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of donated memory that a program had no use for
            got = [np.asarray(x, np.float64) for x in programs["it"](*problem.arrays, *poison)]
        phase("check")
        return judged(got, usual, exact, problem.dtype, names=RESULTS)

    def races(self, phase: Callable, implementation: str, shape: dict, runs: int, copy_bytes: int, **_: Any) -> dict[str, Any]:
        """Forward and backward pass `runs` times beside copies between host and device: are all bits equal?"""
        s = Shape(**shape)
        if (reason := self._obstacle(implementation, s)) is not None:
            return {"status": "refused", "reason": reason}
        b, t, n, k, h = s.batch, s.length, s.n_heads, s.n_kv_heads, s.head_dim
        arrays = [self.array(i, x, s.dtype) for i, x in enumerate(((b, t, n, h), (b, t, k, h), (b, t, k, h), (b, t, n, h)))]

        def both(q, k, v, d_out):
            out, pull = jax.vjp(lambda *x: attention(*x, implementation=implementation), q, k, v)
            return out, *pull(d_out)

        phase("lower")
        with self.tracing():
            lowered = jax.jit(both).lower(*arrays)
        phase("compile")
        compiled = lowered.compile()
        if self.mesh is not None:
            return {"status": "compiled"}
        phase("run")
        first = jax.block_until_ready(compiled(*arrays))
        different: dict[str, int] = {}
        with _copying(copy_bytes) as copies:
            for _run in range(runs):
                phase("run")
                for name, x, y in zip(("the output", "dq", "dk", "dv"), first, compiled(*arrays), strict=True):
                    if not bool(_same_bits(x, y)):
                        different[name] = different.get(name, 0) + 1
        status = "wrong" if different else "ok"
        reason = ", ".join(f"{name} differs in {count} of {runs} runs" for name, count in different.items())
        return {"status": status, "reason": reason, "runs": runs, "copies": copies(), "different": different}

    def _obstacle(self, implementation: str, s: Shape, *, decode: bool = False, segments: bool = False, lse: bool = False,
                  aligned: bool = True) -> str | None:  # fmt: skip
        """Why an implementation can't run a shape here."""
        with self.tracing():
            case = s.case()._replace(segments=segments, return_lse=lse, aligned=aligned)
            if decode:
                case = case._replace(length=1, keys=s.length, aligned=False)
            found = DECODERS.get(implementation) if decode else implementations.get(implementation)
            return f"there is no {implementation} for decoding" if found is None else found.obstacle(case)


# One-line kernels: whether the two compilers of Pallas work on the device at all.


def _mosaic(interpret: bool) -> Callable:
    import jax.experimental.pallas.mosaic_gpu as plgpu

    def kernel(x_ref, out_ref, shared_ref, barrier):
        plgpu.copy_gmem_to_smem(x_ref, shared_ref, barrier)
        plgpu.barrier_wait(barrier)
        shared_ref[...] = shared_ref[...] + 1
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared_ref, out_ref)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((128, 128), jnp.float32),
        scratch_types=[plgpu.SMEM((128, 128), jnp.float32), plgpu.Barrier()],
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )


def _triton(interpret: bool) -> Callable:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] + 1

    shape = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    return pl.pallas_call(kernel, out_shape=shape, compiler_params=triton.CompilerParams(), interpret=interpret)


TINY = {"mosaic": _mosaic, "triton": _triton}


# Smoke: a part of a kernel by itself.

PARTS = {"forward": ("out", "lse"), "dq": ("dq",), "dkv": ("dk", "dv"), "decode": ("out", "lse")}


def _arrays(session: Session, s: Shape, seed: int, *, decode_step: bool) -> tuple:
    q = (s.batch, s.n_heads, s.head_dim) if decode_step else (s.batch, s.length, s.n_heads, s.head_dim)
    k = (s.batch, s.length, s.n_kv_heads, s.head_dim)
    return tuple(session.array(10 * seed + i, shape, s.dtype) for i, shape in enumerate((q, k, k, q)))


def _part(implementation: str, part: str) -> Callable:
    def run(q, k, v, d_out):
        if part == "decode":
            return decode(q, k, v, k.shape[1], implementation=implementation, return_lse=True)
        if part == "forward":
            return attention(q, k, v, implementation=implementation, return_lse=True)
        _, pull = jax.vjp(lambda *x: attention(*x, implementation=implementation), q, k, v)
        dq, dk, dv = pull(d_out)
        return (dq,) if part == "dq" else (dk, dv)

    return run


def _exact(part: str, arrays: Sequence[jax.Array]) -> list[np.ndarray]:
    """By `gqa_jax.attention.oracle`, in the shapes of `_part`."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in arrays)
    if part == "decode":
        q = q[:, None]
    grouped = (*q.shape[:2], k.shape[2], -1, q.shape[3])
    offsets = {"q_offset": k.shape[1] - 1} if part == "decode" else {}
    if part in ("forward", "decode"):
        out, lse = oracle.forward(q.reshape(grouped), k, v, **offsets)
        out, lse = out.reshape(q.shape), lse.transpose(0, 3, 1, 2).reshape(q.shape[:3])
        return [out[:, 0], lse[:, 0]] if part == "decode" else [out, lse]
    dq, dk, dv = oracle.gradients(q.reshape(grouped), k, v, d_out.reshape(grouped))
    return [dq.reshape(q.shape)] if part == "dq" else [dk, dv]


# Correctness: what kinds of calls there are.

RESULTS = ("out", "lse", "dq", "dk", "dv")
SHIFTED = ("offset", "unseen")
KINDS = ("plain", *SHIFTED, "segments, sorted", "segments of one token", "segments, unsorted", "large logits")


class Problem(NamedTuple):
    """Arrays q, k, v, d_out, d_lse, q_offset, kv_offset, q and key segments; and what comes out."""

    arrays: tuple
    kind: str
    dtype: str
    results: tuple[tuple[tuple[int, ...], Any], ...]


def _problem(session: Session, s: Shape, kind: str, seed: int) -> Problem:
    """ "offset": keys before the first query; "unseen": the first fifth of the queries see no key."""
    keys = s.length + 64 if kind == "offset" else s.length
    q, k = (s.batch, s.length, s.n_heads, s.head_dim), (s.batch, keys, s.n_kv_heads, s.head_dim)
    shapes = (q, k, k, q)
    large = 30**0.5 if kind == "large logits" else 1.0
    arrays = [session.array(10 * seed + i, x, s.dtype, large if i < 2 else 1.0) for i, x in enumerate(shapes)]
    d_lse = session.array(10 * seed + 4, (s.batch, s.length, s.n_heads), jnp.float32)
    offsets = {"offset": (64, 0), "unseen": (0, s.length // 5)}.get(kind, (0, 0))
    position = np.arange(s.length, dtype=np.int32)
    ids = {
        "segments, sorted": position * 4 // s.length,
        "segments of one token": position,
        "segments, unsorted": np.random.default_rng(seed).integers(0, 4, s.length).astype(np.int32),
    }.get(kind, np.zeros(s.length, np.int32))
    ids = np.broadcast_to(ids, (s.batch, s.length))
    given = [session.given(np.asarray(x, np.int32)) for x in (*offsets, ids)]
    results = ((q, s.dtype), (q[:3], jnp.float32), (q, s.dtype), (k, s.dtype), (k, s.dtype))
    return Problem((*arrays, d_lse, *given), kind, s.dtype, results)


def _lower(implementation: str, problem: Problem, *, poisoned: bool = False) -> Any:
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
    out, lse = reference(grouped, k, v, Mask(q_offset, kv_offset, segment_ids, segment_ids), head_dim**-0.5)
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


def _attend(implementation: str, decoding: bool, length: int, form: str, documents: int | None) -> Callable:
    """What is timed, a function of q, k and v."""
    if decoding:
        return lambda q, k, v: decode(q, k, v, length, implementation=implementation)
    ids = None if documents is None else np.arange(length, dtype=np.int32) * documents // length

    def attend(q, k, v):
        segments = None if ids is None else jnp.broadcast_to(jnp.asarray(ids), q.shape[:2])
        return attention(q, k, v, implementation=implementation, segment_ids=segments)

    if form == "plain":
        return attend

    def scanned(q, k, v):
        """Two layers, the output of one the queries of the next, as in the training step."""
        names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
        layer = jax.checkpoint(lambda x, _: (attend(x, k, v), None), prevent_cse=False, policy=names)
        return jax.lax.scan(layer, q, None, length=2)[0]

    return scanned


@contextlib.contextmanager
def _copying(nbytes: int) -> Iterator[Callable[[], int]]:
    """Copies from host to device and back within, on their own streams; the function says how many there were."""
    host, stop, count = np.ones(nbytes // 4, np.float32), threading.Event(), [0]

    def copy() -> None:
        while not stop.is_set():
            np.asarray(jax.device_put(host) * 1)
            count[0] += 1

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield lambda: count[0]
    finally:
        stop.set()
        thread.join()


@jax.jit
def _same_bits(x: jax.Array, y: jax.Array) -> jax.Array:
    bits = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return (jax.lax.bitcast_convert_type(x, bits) == jax.lax.bitcast_convert_type(y, bits)).all()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpreted", action="store_true")
    parser.add_argument("--compile_only")
    options = parser.parse_args()
    session = Session(interpret=options.interpreted, compile_only=options.compile_only)
    names = ("environment", "ceiling", "smoke", "prepare", "measure", "forget", "compile_correct", "correct", "races")
    workers.serve({name: getattr(session, name) for name in names})


if __name__ == "__main__":
    main()
