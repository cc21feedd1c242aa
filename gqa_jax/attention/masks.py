"""Which keys a query sees, as the few numbers that every implementation computes it from: no T x S table."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

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
