"""The implementations by name: what each can run, and which is best where."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gqa_jax.attention import pallas_tpu, pallas_triton, peers, xla
from gqa_jax.attention.gradient import Kernel, attend
from gqa_jax.attention.masks import Mask
from gqa_jax.attention.reference import reference

_interpreted = contextvars.ContextVar("interpreted", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Pallas kernels traced within run in Pallas's interpret mode, on any platform: right, and thousands of times slower."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


class Case(NamedTuple):
    """What decides who can run: the platform, and all of a call's static properties."""

    platform: str  # "cpu", "gpu", "tpu": where the program under trace will run
    chip: str  # device kind as JAX names it: "TPU v5 lite", "NVIDIA H200", "cpu"
    batch: int
    length: int  # T
    keys: int  # S
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dtype: Any
    aligned: bool = True  # equal offsets, known while tracing
    segments: bool = False
    return_lse: bool = False
    by_pass: bool = False  # forward and backward pass are called by themselves, as ring attention does
    cores: int = 1  # of the chip: the two of a v4 or v5p are one device
    interpreted: bool = False  # Pallas kernels run in interpret mode, on any platform

    @classmethod
    def of(cls, q_BxTxKxGxH, k_BxSxKxH, mask: Mask, *, return_lse: bool = False) -> Case:
        batch, length, n_kv, group, head_dim = q_BxTxKxGxH.shape
        platform, chip, cores = target()
        return cls(
            platform, chip, batch, length, k_BxSxKxH.shape[1], n_kv * group, n_kv, head_dim, jnp.dtype(q_BxTxKxGxH.dtype),
            aligned=mask.aligned, segments=mask.q_segments_BxT is not None, return_lse=return_lse, cores=cores,
            interpreted=_interpreted.get(),
        )  # fmt: skip

    @classmethod
    def planned(
        cls, *, batch: int, length: int, n_heads: int, n_kv_heads: int, head_dim: int, dtype: Any,
        keys: int | None = None, aligned: bool = True, segments: bool = False,
    ) -> Case:  # fmt: skip
        """The case of a call, before there is anything to attend to; `keys` None is causal attention of T with itself."""
        platform, chip, cores = target()
        return cls(
            platform, chip, batch, length, length if keys is None else keys, n_heads, n_kv_heads, head_dim, jnp.dtype(dtype),
            aligned=aligned, segments=segments, cores=cores, interpreted=_interpreted.get(),
        )  # fmt: skip

    @property
    def group(self) -> int:
        return self.n_heads // self.n_kv_heads


def target() -> tuple[str, str, int]:
    """Platform, kind and cores of a device that a trace is for: of the mesh in use (`jax.set_mesh`), else the default one."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.local_devices()[0]
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return platform, device.device_kind, (getattr(device, "num_cores", None) or 1) if platform == "tpu" else 1


class Implementation(NamedTuple):
    """How a name is run. limits(case) is None where it can run, else why not; run(q, k, v, mask, scale, case) -> out, lse (or
    None); kernel(case, scale) is the pair of passes that `run` is made of, None where they are not to be had."""

    limits: Callable[[Case], str | None]
    run: Callable[..., tuple[jax.Array, jax.Array | None]]
    kernel: Callable[[Case, float], Kernel] | None = None

    @classmethod
    def of(cls, limits: Callable[[Case], str | None], kernel: Callable[[Case, float], Kernel]) -> Implementation:
        """Run by its kernel, whatever the case."""
        return cls(limits, lambda q, k, v, mask, scale, case: attend(kernel(case, scale), q, k, v, mask), kernel)

    def obstacle(self, case: Case) -> str | None:
        """Why this case can't run here, or None."""
        if case.by_pass and self.kernel is None:
            return "ring attention calls a kernel's passes one by one, and here there are none to call"
        return self.limits(case)


def _run_xla(q, k, v, mask, scale, case: Case):
    kernel = xla.kernel(case, scale)
    if kernel.options.chunk is None and mask.aligned:  # short: JAX's own gradient keeps the probabilities, which is faster
        return xla.forward(q, k, v, mask, scale, kernel.options)
    return attend(kernel, q, k, v, mask)


def _hopper():
    """Imported where it is used: Mosaic GPU is a tenth of the time that a training process takes to start."""
    from gqa_jax.attention import hopper

    return hopper


_ALL: dict[str, Implementation] = {
    "reference": Implementation(lambda case: None, lambda q, k, v, mask, scale, case: reference(q, k, v, mask, scale)),
    "xla": Implementation(lambda case: None, _run_xla, xla.kernel),
    "pallas_tpu": Implementation.of(pallas_tpu.obstacle, pallas_tpu.kernel),
    "pallas_gpu": Implementation.of(lambda case: _hopper().obstacle(case), lambda case, scale: _hopper().kernel(case, scale)),
    "pallas_triton": Implementation.of(pallas_triton.obstacle, pallas_triton.kernel),
    "cudnn": Implementation(peers.cudnn_obstacle, peers.cudnn),
    "tokamax": Implementation(peers.tokamax_obstacle, peers.tokamax),
}


def names() -> list[str]:
    return list(_ALL)


def get(name: str) -> Implementation:
    return _ALL[name]


class Row(NamedTuple):
    """A row of the table of defaults: in which cases, and the implementations, best first."""

    platform: str
    preferred: tuple[str, ...]
    head_dims: range = range(1, 1 << 30)
    lengths: range = range(1, 1 << 30)
    groups: range = range(1, 1 << 30)

    def covers(self, case: Case) -> bool:
        return (
            case.platform == self.platform
            and case.head_dim in self.head_dims
            and case.length in self.lengths
            and case.group in self.groups
        )


# The first row that covers a case decides, by the first of its implementations that can run it. TPU: by cycles of compiled
# schedules (benchmarks/tpu_cycles.py). GPU: cuDNN until benchmarks/attention.py has shown ours faster on one; it has neither
# segments nor offsets nor a log-sum-exp. `pallas_gpu` runs by name alone until it has run on a GPU. CPU: by
# benchmarks/attention.py.
BEST = (
    Row("tpu", ("pallas_tpu", "xla")),
    Row("gpu", ("cudnn", "pallas_triton", "xla")),
    Row("cpu", ("xla",)),
)


def best(case: Case) -> str:
    """The best implementation for the case on its platform; `xla` runs everywhere."""
    row = next((row for row in BEST if row.covers(case)), Row(case.platform, ("xla",)))
    return next(name for name in row.preferred if _ALL[name].obstacle(case) is None)
