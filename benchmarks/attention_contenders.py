"""Who is measured: the implementations of `gqa_jax.attention`, the kernels that jax brings, and PyTorch in its own process.

All are called with (B, T, N, H) arrays, as the model has them.
"""

from __future__ import annotations

import functools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from benchmarks import timing
from gqa_jax.attention import Cache, Case, attention, decode, names, new_cache, unsupported_reason


class Work(NamedTuple):
    """One thing to measure: a pass over a case, from arrays that all contenders share."""

    case: Case
    direction: str  # "forward", "backward" (which is forward and backward) or "decode"
    arrays: tuple[jax.Array, ...]  # q, k, v; backward: and d_out
    iterations: int  # of a sample


class Prepared(NamedTuple):
    """Ready to run: seconds of one iteration, what it computed, bytes of temporary memory (None: not known), a remark."""

    run: Callable[[], float]
    outputs: tuple[Any, ...]
    temp_bytes: int | None
    remark: str = ""


class Contender(NamedTuple):
    """A function in JAX. attend(case) is a function of q, k, v; obstacle(case) is None where it can run, else why not.

    For `decode` q is (B, N, H) and k, v are a full cache (B, S, K, H), of which those of gqa_jax make theirs (`hold`).
    """

    name: str
    obstacle: Callable[[Case], str | None]
    attend: Callable[[Case], Callable[..., jax.Array]]
    hold: Callable[..., tuple] = lambda case, q, *rest: (q, *rest)  # arrays as `attend` takes them, arranged before it is timed

    def lower(self, work: Work) -> tuple:
        """Traced once by itself, for its results and its memory, and once in the loop that is timed."""
        attend, operands = self.attend(work.case), self.hold(work.case, *work.arrays)

        def step(q, *others):
            if work.direction != "backward":
                return (attend(q, *others),)
            out, pull = jax.vjp(attend, q, *others[:2])
            return out, *pull(others[2])

        stored = [x.format.layout for x in jax.tree.leaves(operands[1:])] if work.direction == "decode" else None
        loop = timing.repeated(step, work.iterations, stored=stored)
        return tuple(jax.jit(f).lower(*operands) for f in (step, loop))

    def compile(self, lowered: tuple) -> tuple:
        return tuple(x.compile() for x in lowered)

    def start(self, work: Work, compiled: tuple) -> Prepared:
        once, loop = compiled
        memory = once.memory_analysis()
        if memory is not None:
            _check_memory(memory.temp_size_in_bytes + memory.output_size_in_bytes)
        operands = self.hold(work.case, *work.arrays)
        outputs = jax.block_until_ready(once(*operands))
        jax.block_until_ready(loop(*operands))

        def run() -> float:
            begin = time.perf_counter()
            jax.block_until_ready(loop(*operands))
            return (time.perf_counter() - begin) / work.iterations

        return Prepared(run, outputs, None if memory is None else memory.temp_size_in_bytes)


def _check_memory(needed: int) -> None:
    """Raises MemoryError on what would not fit: a host without memory ends the process, with no error to catch."""
    device = jax.local_devices()[0]
    if stats := device.memory_stats():
        free = stats["bytes_limit"] - stats["bytes_in_use"]
    else:
        lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
        free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)
    if free is not None and needed > 0.9 * free:
        raise MemoryError(f"needs {needed / 2**30:,.1f} GiB of memory, {free / 2**30:,.1f} GiB are free")


def registered() -> list[Contender]:
    """Every implementation of gqa_jax, through its registry."""

    def contender(name: str) -> Contender:
        return Contender(
            name, functools.partial(unsupported_reason, name), lambda case: functools.partial(attention, implementation=name)
        )

    return [contender(name) for name in names()]


def peers() -> list[Contender]:
    """The attention that jax itself brings, where it is right."""
    return [
        Contender("jax_nn_xla", lambda case: None, _jax_nn_xla),
        Contender("splash", _needs("tpu", 512), functools.partial(_splash, fused=False)),
        Contender("splash_fused", _needs("tpu", 512), functools.partial(_splash, fused=True)),
        Contender("tpu_flash", _needs("tpu", 512, grouped=False), _tpu_flash),
        # it reads wrong keys without a word where there are fewer key/value heads than query heads
        Contender("triton_mha", _needs("gpu", 128, grouped=False), _triton_mha),
    ]


def _needs(platform: str, multiple: int, *, grouped: bool = True) -> Callable[[Case], str | None]:
    def obstacle(case: Case) -> str | None:
        if case.platform != platform:
            return f"runs on {platform.upper()}s only"
        if case.keys % multiple:
            return f"takes multiples of {multiple} tokens"
        if not grouped and case.n_heads != case.n_kv_heads:
            return "takes as many key/value heads as query heads"
        return None

    return obstacle


def _jax_nn_xla(case: Case):
    return functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")


def _splash(case: Case, *, fused: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    # blocks of 1,024 are about the largest that fit every chip; the default of 128 would be no fair baseline
    block = next(size for size in (1024, 512) if case.length % size == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=512, block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=512,
        block_q_dq=None if fused else block, block_kv_dq=None if fused else block, use_fused_bwd_kernel=fused,
    )  # fmt: skip
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((case.length,) * 2)] * case.n_heads)
    kernel = splash_attention_kernel.make_splash_mha_single_device(mask, block_sizes=sizes)

    def attend(q, k, v):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * case.head_dim**-0.5, k, v))
        return jnp.swapaxes(jax.vmap(kernel)(q, k, v), 1, 2)

    return attend


def _tpu_flash(case: Case):
    from jax.experimental.pallas.ops.tpu import flash_attention

    names = [field for field in flash_attention.BlockSizes.__dataclass_fields__ if field != "block_b"]
    sizes = flash_attention.BlockSizes(block_b=1, **dict.fromkeys(names, 512))

    def attend(q, k, v):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        out = flash_attention.flash_attention(q, k, v, causal=True, sm_scale=case.head_dim**-0.5, block_sizes=sizes)
        return jnp.swapaxes(out, 1, 2)

    return attend


def _triton_mha(case: Case):
    from jax.experimental.pallas.ops.gpu import attention as gpu_attention

    return lambda q, k, v: gpu_attention.mha(q, k, v, None, sm_scale=case.head_dim**-0.5, causal=True)


class Torch:
    """PyTorch in a process of its own, which waits while the others run and runs while they wait."""

    def __init__(self, python: str, platform: str):
        """Raises RuntimeError, with what the process said, where it can't start."""
        script = Path(__file__).with_name("attention_torch.py")
        self._process = subprocess.Popen(
            [python, str(script), platform], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            hello = self._read()
        except RuntimeError:
            self._end()
            raise
        self._folder = tempfile.TemporaryDirectory(prefix="attention-torch-")
        self.version: str = hello["version"]
        self.backends: list[str] = hello["backends"]
        self._loaded: tuple | None = None

    def contenders(self) -> list[TorchContender]:
        return [TorchContender(f"torch_{backend}", self, backend) for backend in self.backends]

    def load(self, arrays: tuple[jax.Array, ...]) -> None:
        """Sends the arrays, unless they are there already."""
        if self._loaded is not None and list(map(id, self._loaded)) == list(map(id, arrays)):
            return
        names = []
        for i, x in enumerate(arrays):
            names.append(str(Path(self._folder.name) / f"{i}.npy"))
            np.save(names[-1], np.asarray(x).view(f"i{x.dtype.itemsize}"))  # NumPy's files have no bfloat16
        self.ask(do="load", files=names, dtype=str(arrays[0].dtype))
        self._loaded = arrays

    def ask(self, **request) -> dict:
        self._process.stdin.write(json.dumps(request | {"folder": self._folder.name}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._end()
        self._folder.cleanup()

    def _end(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the torch process ended: see its message above")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


class TorchContender(NamedTuple):
    """`torch.nn.functional.scaled_dot_product_attention` by one of its backends."""

    name: str
    torch: Torch
    backend: str

    def obstacle(self, case: Case) -> str | None:
        return None

    def lower(self, work: Work) -> None:
        return None

    def compile(self, lowered: None) -> None:
        return None

    def start(self, work: Work, compiled: None) -> Prepared:
        self.torch.load(work.arrays)
        answer = self.torch.ask(
            do="prepare", name=self.name, backend=self.backend, direction=work.direction, iterations=work.iterations
        )
        outputs = tuple(np.load(name).view(ml_dtypes.bfloat16 if work.case.dtype == jnp.bfloat16 else work.case.dtype)
                        for name in answer["files"])  # fmt: skip

        def run() -> float:
            time.sleep(0.005)  # threads of the other framework go on spinning for a moment after their work
            seconds = self.torch.ask(do="run", name=self.name)["seconds"]
            time.sleep(0.005)
            return seconds

        return Prepared(run, outputs, answer["temp_bytes"], answer["remark"])


def decoders(torch: Torch | None) -> list[Contender | TorchContender]:
    """Who answers one query from a full cache."""
    return [
        *map(_registered_decoder, names(decode=True)),
        Contender("jax_nn_xla", lambda case: None, _jax_nn_xla_decode),
        Contender("triton_gqa", _needs("gpu", 16 * 128), _triton_gqa),
        *([] if torch is None else torch.contenders()),
    ]


def _registered_decoder(name: str) -> Contender:
    def attending(case: Case):
        return lambda q, held: decode(q, held, case.keys, implementation=name)

    def hold(case: Case, q, k, v):
        held = new_cache(case.batch, case.keys, case.n_heads, case.n_kv_heads, case.head_dim, case.dtype, implementation=name)
        return q, jax.jit(Cache.append, donate_argnums=0)(held, k, v, 0)

    return Contender(name, lambda case: unsupported_reason(name, case._replace(decode=True)), attending, hold)


def _jax_nn_xla_decode(case: Case):
    lengths = jnp.full(case.batch, case.keys, jnp.int32)

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q[:, None], k, v, key_value_seq_lengths=lengths, implementation="xla")[:, 0]

    return attend


def _triton_gqa(case: Case):
    from jax.experimental.pallas.ops.gpu import decode_attention

    return decode_attention.gqa
