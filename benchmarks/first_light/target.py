"""The device that first light's programs are for: here, interpreted here, or not here and only compiled for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from gqa_jax.attention import Case, interpreted

CUDNN_ASSUMED = 91_400  # the version that programs are traced for where cuDNN is not installed


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


class Target:
    """One device. With `compile_only`, its name ("h100"), arrays are shapes; `interpret`: Pallas kernels are interpreted."""

    def __init__(self, *, interpret: bool = False, compile_only: str | None = None):
        self.interpret, self.mesh = interpret, None
        if compile_only is not None:
            from gqa_jax.planning import topologies

            self.mesh = topologies.mesh(compile_only)
            _assume_cudnn()

    @property
    def untuned(self) -> dict[str, Any]:
        """Options of the compiler for programs that others are compared with, not timed: GPUs try no variants of products."""
        gpu = self.mesh is not None or jax.default_backend() == "gpu"
        return {"xla_gpu_autotune_level": 0} if gpu else {}

    def compile(self, lowered: Any, *, tuned: bool) -> Any:
        """A program compiled, as users have it or `untuned`."""
        return lowered.compile() if tuned else lowered.compile(self.untuned)

    @property
    def here(self) -> bool:
        """Whether programs can be run."""
        return self.mesh is None

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


def _assume_cudnn() -> None:
    """Attention by cuDNN can be traced from now on, also where it is not installed: JAX asks for its version alone."""
    from jax._src.cudnn import fused_attention_stablehlo

    try:
        fused_attention_stablehlo.check_cudnn_version()
    except Exception:  # of whichever kind this JAX raises
        fused_attention_stablehlo.check_cudnn_version = lambda: CUDNN_ASSUMED
