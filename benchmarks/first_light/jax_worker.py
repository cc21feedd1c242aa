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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing, workers
from benchmarks.attention_contenders import Contender, Work
from benchmarks.attention_measure import TOLERANCE, decode_bytes, expected, flops, worst_error
from benchmarks.first_light.calls import PARTS, RESULTS, SHIFTED, arrays_of, exact_part, judged, lower, part_of, problem_of
from benchmarks.first_light.target import Shape, Target
from gqa_jax.attention import Cache, attention, decode, results_saveable, unsupported_reason
from gqa_jax.attention.cache import WITHIN_HEADS

NOMINAL = 3e14  # FLOP/s that choose how many passes a sample has
NOMINAL_BYTES = 1e12  # bytes/s, likewise, of decoding
SAMPLE_S = 0.02
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "tokamax", "numpy")
COMPILERS = 8  # threads that compile side by side


class Session:
    """What the worker has prepared: functions by the name of their case, each of which runs once and returns its seconds."""

    def __init__(self, target: Target):
        self.target = target
        self.ready: dict[str, Callable[[], float]] = {}
        self.programs: dict[str, tuple] = {}

    def about(self, phase: Callable, **_: Any) -> dict[str, Any]:
        """The device and the versions."""
        return {
            "device": jax.devices()[0].device_kind,
            "platform": jax.default_backend(),
            "versions": {name: _version(name) for name in PACKAGES},
            "memory_bytes": (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"),
        }

    def tiny_kernels(self, phase: Callable, **_: Any) -> dict[str, Any]:
        """A kernel of a line in Triton and in Mosaic, which say whether their compilers work here: "ok", or why not."""
        return {name: self._tiny(phase, kernel) for name, kernel in TINY.items()}

    def _tiny(self, phase: Callable, kernel: Callable) -> str:
        """ "ok", or why not."""
        try:
            phase("compile")
            with self.target.tracing():
                compiled = jax.jit(kernel(self.target.interpret)).lower(self.target.array(0, (128, 128), jnp.float32)).compile()
            if not self.target.here:
                return "ok"
            phase("run")
            got = np.asarray(compiled(self.target.array(0, (128, 128), jnp.float32)))
            wanted = np.asarray(self.target.array(0, (128, 128), jnp.float32)) + 1
            return "ok" if np.array_equal(got, wanted) else f"wrong: off by {np.abs(got - wanted).max()}"
        except Exception as error:  # of any kind: whether this works is what is asked
            return workers.explain(error)

    def ceiling(self, phase: Callable, case: str, kind: str, size: int, **_: Any) -> dict[str, Any]:
        """Prepares a plain operation: "matmul" of size^3 in bfloat16, or "copy" of size bytes."""
        phase("compile")
        if not self.target.here:
            shape = (size, size) if kind == "matmul" else (size // 4,)
            abstract = self.target.abstract(shape, jnp.bfloat16 if kind == "matmul" else jnp.float32)
            jax.jit(lambda x: x @ x if kind == "matmul" else 0.999 * x + 0.001).lower(abstract).compile()
            return {}
        made = timing.matmul_ceiling(size, jnp.bfloat16, 4) if kind == "matmul" else timing.copy_ceiling(size, 8)
        phase("run")
        self.ready[case] = lambda: made.seconds() / made.rate(1.0)  # seconds a FLOP, or a byte
        made.seconds()
        return {}

    def smoke(self, phase: Callable, implementation: str, part: str, shape: dict, seed: int = 0, **_: Any) -> dict[str, Any]:
        """One part of a kernel, "forward", "dq", "dkv" or "decode", by itself, against float64.

        XLA removes what a program does not need: asking for dq alone runs the forward kernel and that of dq.
        """
        s = Shape(**shape)
        if (reason := self._obstacle(implementation, s, decode=part == "decode")) is not None:
            return {"status": "refused", "reason": reason}
        arrays = arrays_of(self.target, s, seed, decode_step=part == "decode")
        phase("lower")
        with self.target.tracing():
            lowered = {name: jax.jit(part_of(name, part)).lower(*arrays) for name in (implementation, "xla")}
        phase("compile")
        compiled = {name: self.target.compile(program, tuned=name != "xla") for name, program in lowered.items()}
        if not self.target.here:
            return {"status": "compiled", "temp_bytes": compiled[implementation].memory_analysis().temp_size_in_bytes}
        phase("run")
        got = {name: [np.asarray(x, np.float64) for x in program(*arrays)] for name, program in compiled.items()}
        phase("check")
        return judged(got[implementation], got["xla"], exact_part(part, arrays), s.dtype, names=PARTS[part])

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
        if implementation == "tokamax" and not self.target.here:
            return {"status": "refused", "reason": "tokamax asks the device that is here, not the one that is compiled for"}
        if form == "scan" and implementation == "pallas_gpu" and self.target.interpret:
            return {"status": "refused", "reason": "jax.checkpoint takes no effects, which the interpreter of Mosaic GPU has"}
        with self.target.tracing():
            planned = s.case()
        b, t, n, k, h = s.batch, s.length, s.n_heads, s.n_kv_heads, s.head_dim
        q = (b, n, h) if decoding else (b, t, n, h)
        shapes = [q, (b, t, k, h), (b, t, k, h), *([q] if direction == "backward" else [])]
        arrays = tuple(self.target.array(i, shape, s.dtype) for i, shape in enumerate(shapes))
        amount = decode_bytes(planned) if decoding else flops(planned, direction)
        nominal = NOMINAL_BYTES if decoding else NOMINAL
        iterations = 1 if self.target.interpret or not self.target.here else int(np.clip(SAMPLE_S * nominal / amount, 1, 256))
        work = Work(planned, direction, arrays, iterations)
        attend = _attend(implementation, decoding, t, form, documents)
        contender = Contender(implementation, lambda case: None, lambda case: attend)
        phase("lower")
        with self.target.tracing():
            lowered = contender.lower(work)
        phase("compile")
        began = time.perf_counter()
        compiled = contender.compile(lowered)
        figures = {"seconds_compile": time.perf_counter() - began, "amount": amount, "iterations": iterations}
        memory = compiled[0].memory_analysis()
        figures["temp_bytes"] = None if memory is None else memory.temp_size_in_bytes
        if not self.target.here:
            return {"status": "compiled", **figures}
        wanted = None
        if form == "plain" and documents is None:
            phase("compile")
            wanted = expected(work, self.target.untuned)
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

    def compile_correct(
        self, phase: Callable, implementation: str, cases: Sequence[dict], passes: str = "backward", **_: Any
    ) -> dict[str, Any]:
        """Compiles cases side by side: the implementation, `xla` in the same dtype, and `reference` in float64.

        A case has `case` (its name), `shape`, `kind` ("plain", or one of `sizes.KINDS`) and a seed; `passes` "forward" leaves
        the gradients out. Returns the names of those that are ready; reasons of those that can't run here, and of those that
        failed.
        """
        lowered, refused, reasons = {}, {}, {}
        for one in cases:
            phase("lower")
            s = Shape(**one["shape"])
            known = {"segments": "segments" in one["kind"], "lse": True, "aligned": one["kind"] not in SHIFTED}
            if (reason := self._obstacle(implementation, s, **known)) is not None:
                refused[one["case"]] = reason
                continue
            problem = problem_of(self.target, s, one["kind"], one["seed"], passes)
            with self.target.tracing():
                lowered[one["case"]] = problem, {
                    "it": lower(implementation, problem, poisoned=True), "xla": lower("xla", problem),
                    "exact": lower("float64", problem),
                }  # fmt: skip
        with ThreadPoolExecutor(COMPILERS) as pool:
            waiting = {
                name: (
                    problem,
                    {key: pool.submit(self.target.compile, program, tuned=key == "it") for key, program in programs.items()},
                )
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
        return {"ready": [name for name in lowered if name in self.programs], "refused": refused, "reasons": reasons}

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
        return judged(got, usual, exact, problem.dtype, names=RESULTS[: len(problem.results)])

    def races(self, phase: Callable, implementation: str, shape: dict, runs: int, copy_bytes: int, **_: Any) -> dict[str, Any]:
        """Forward and backward pass `runs` times beside copies between host and device: are all bits equal?"""
        s = Shape(**shape)
        if (reason := self._obstacle(implementation, s)) is not None:
            return {"status": "refused", "reason": reason}
        b, t, n, k, h = s.batch, s.length, s.n_heads, s.n_kv_heads, s.head_dim
        arrays = [
            self.target.array(i, x, s.dtype) for i, x in enumerate(((b, t, n, h), (b, t, k, h), (b, t, k, h), (b, t, n, h)))
        ]

        def both(q, k, v, d_out):
            out, pull = jax.vjp(lambda *x: attention(*x, implementation=implementation), q, k, v)
            return out, *pull(d_out)

        phase("lower")
        with self.target.tracing():
            lowered = jax.jit(both).lower(*arrays)
        phase("compile")
        compiled = lowered.compile()
        if not self.target.here:
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
        with self.target.tracing():
            case = s.case()._replace(segments=segments, return_lse=lse, aligned=aligned)
            if decode:
                case = case._replace(length=1, keys=s.length, aligned=False, decode=True)
            return unsupported_reason(implementation, case)


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


TINY = {"triton": _triton, "mosaic": _mosaic}


def _attend(implementation: str, decoding: bool, length: int, form: str, documents: int | None) -> Callable:
    """What is timed, a function of q, k and v."""
    if decoding:
        # the same bytes, as a cache of that layout lies on a GPU: normal numbers, whose order no time depends on
        return lambda q, k, v: decode(
            q, Cache(*(x.reshape(x.shape[0], x.shape[2], x.shape[1], -1) for x in (k, v)), None, None, WITHIN_HEADS), length,
            implementation=implementation,
        )  # fmt: skip
    ids = None if documents is None else np.arange(length, dtype=np.int32) * documents // length

    def attend(q, k, v):
        segments = None if ids is None else jnp.broadcast_to(jnp.asarray(ids), q.shape[:2])
        return attention(q, k, v, implementation=implementation, segment_ids=segments)

    if form == "plain":
        return attend

    def scanned(q, k, v):
        """Two layers, the output of one the queries of the next, as in the training step."""
        layer = jax.checkpoint(lambda x, _: (attend(x, k, v), None), prevent_cse=False, policy=results_saveable)
        return jax.lax.scan(layer, q, None, length=2)[0]

    return scanned


@contextlib.contextmanager
def _copying(nbytes: int) -> Iterator[Callable[[], int]]:
    """Copies from host to device and back within, on their own streams; the function says how many there were."""
    host, stop, count = np.ones(nbytes // 4, np.float32), threading.Event(), [0]

    def copy() -> None:
        while not stop.is_set():
            np.asarray(jax.device_put(host))
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
    session = Session(Target(interpret=options.interpreted, compile_only=options.compile_only))
    names = ("about", "tiny_kernels", "ceiling", "smoke", "prepare", "measure", "forget", "compile_correct", "correct", "races")
    workers.serve({name: getattr(session, name) for name in names})


if __name__ == "__main__":
    main()
