"""What a call of attention is: the mask as the few numbers that every implementation computes it from, and the case that
decides who can run it: shapes, dtype, and the device that the program is for.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gqa_jax import hardware

HIDDEN = -1e30  # logit of a key that a query does not see: finite, so that differences of logits are never inf - inf
UNSEEN = -1e20  # running maximum before the first key: exp(HIDDEN - UNSEEN) is 0, so a row that sees nothing sums to 0


class Mask(NamedTuple):
    """Query t sees key s when q_offset + t >= kv_offset + s and, where there are segments, theirs are equal.

    Offsets are int32 scalars (Python ints, or traced: a shard computes its own). Segments are (B, T) and (B, S) int32.
    A mask can pass through `jax.jit`, `jax.custom_vjp` and other transformations: offsets that are Python ints stay so.
    """

    q_offset: jax.Array | int = 0
    kv_offset: jax.Array | int = 0
    q_segments_BxT: jax.Array | None = None
    kv_segments_BxS: jax.Array | None = None

    @property
    def static_shift(self) -> int | None:
        """q_offset - kv_offset where both are known while tracing, else None: query t sees keys up to t + shift."""
        known = isinstance(self.q_offset, int) and isinstance(self.kv_offset, int)
        return self.q_offset - self.kv_offset if known else None

    @property
    def aligned(self) -> bool:
        """Whether both offsets are known, while tracing, to be equal: the usual causal mask."""
        return self.static_shift == 0

    def visible_BxTxS(self, t: jax.Array, s: jax.Array) -> jax.Array:
        """Booleans for query positions t (T,) and key positions s (S,), counted in these arrays; B is 1 without segments."""
        seen = ((self.q_offset + t)[:, None] >= (self.kv_offset + s)[None, :])[None]
        if self.q_segments_BxT is not None:
            q, kv = jnp.take(self.q_segments_BxT, t, axis=1), jnp.take(self.kv_segments_BxS, s, axis=1)
            seen = seen & (q[:, :, None] == kv[:, None, :])
        return seen


def _flatten(mask: Mask):
    static = tuple(x if isinstance(x, int) else None for x in mask)
    return tuple(None if isinstance(x, int) else x for x in mask), static


# JAX would make leaves of Python ints too, and a transformation tracers of these. Then the kernels could not leave out what a
# causal mask hides: they decide while tracing.
jax.tree_util.register_pytree_node(
    Mask, _flatten, lambda static, arrays: Mask(*(array if x is None else x for x, array in zip(static, arrays, strict=True)))
)

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
    length: int  # T; 1 in decoding
    keys: int  # S; in decoding, entries of the cache
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
    decode: bool = False  # one query per sequence against a cache (`gqa_jax.attention.decode`)
    cache_dtype: Any = None  # of that cache; None: `dtype`

    @classmethod
    def of(cls, q_BxTxKxGxH, k_BxSxKxH, mask: Mask, *, return_lse: bool = False) -> Case:
        batch, length, n_kv, group, head_dim = q_BxTxKxGxH.shape
        return cls.planned(
            batch=batch, length=length, keys=k_BxSxKxH.shape[1], n_heads=n_kv * group, n_kv_heads=n_kv, head_dim=head_dim,
            dtype=q_BxTxKxGxH.dtype, aligned=mask.aligned, segments=mask.q_segments_BxT is not None,
        )._replace(return_lse=return_lse)  # fmt: skip

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


def compute_capability(chip: str) -> float | None:
    """Of an NVIDIA GPU by its name as JAX gives it ("NVIDIA H200" is 9.0); None for what is not one or is not known."""
    if (known := hardware.compute_capability(chip)) is not None:
        major, minor = known
        return major + minor / 10
    here = jax.local_devices()[0]  # a model that the tables have not
    return float(here.compute_capability) if here.device_kind == chip and hasattr(here, "compute_capability") else None


def in_32_bits[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """`function`, traced as without `jax_enable_x64`, with which the numbers of a kernel's text would be of 64 bits.

    A Pallas kernel's indices are int32 and its arithmetic float32: with 64-bit constants among them Pallas does not trace or
    compile it.
    """

    @functools.wraps(function)
    def traced(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return traced
