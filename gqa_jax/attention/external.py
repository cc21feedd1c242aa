"""The door for implementations from outside of this package: a name and callables, registered or found by their name.

A run's configuration (`execution.attention`) and every function here that takes the name of an implementation also take

  "module:attribute"  an import path of what `implementation` returns;
  an entry point      of the group "gqa_jax.attention", which an installed package has for what `implementation` returns.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from gqa_jax.attention import dispatch
from gqa_jax.attention.cache import ROWS
from gqa_jax.attention.dispatch import Implementation, Limits
from gqa_jax.attention.vjp import Kernel

ENTRY_POINTS = "gqa_jax.attention"
PLAIN = (Limits(),)  # causal attention of a sequence to itself, on any device


def implementation(
    forward: Callable[..., tuple[jax.Array, jax.Array | None]] | None = None,
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]] | None = None,
    decode: Callable[..., tuple[jax.Array, jax.Array]] | None = None,
    *,
    limits: Limits | Iterable[Limits] = PLAIN,
    decode_limits: Limits | Iterable[Limits] | None = None,
) -> Implementation:
    """An implementation made of callables; `register` gives it a name, "module:attribute" finds it.

    Shapes: q, out, d_out (B, T, K, G, H); k, v (B, S, K, H); lse, delta (B, K, G, T), float32. Logits are scale q k^T, and
    `mask` is a `gqa_jax.attention.Mask`; what of it can be other than plain causal, `limits` say.

    Args:
      forward: (q, k, v, mask, scale) -> out in q's dtype, and lse: natural, -inf where a query sees no key (out is 0 there);
        None in its place where `limits` have no lse.
      backward: (q, k, v, lse, delta, d_out, mask, scale) -> dq, dk, dv in the dtypes of q, k, v: see
        `gqa_jax.attention.vjp.Kernel`. None: JAX differentiates `forward`, and ring attention is not to be had.
      decode: (q (B, K, G, H), k, v (B, S, K, H), length (B,) int32, scale) -> out (B, K, G, H) and lse (B, K, G) over the
        first `length` keys of each sequence.
      limits: what it takes, a row for each kind of device; of masks, what is not said it does not take.
      decode_limits: the same of decode; None: those of `limits`.

    Raises:
      ValueError: neither forward nor decode, or a backward without what it needs of forward.
    """
    rows, decode_rows = ((one,) if isinstance(one, Limits) else tuple(one) for one in (limits, decode_limits or limits))
    if forward is None and decode is None:
        raise ValueError("an attention implementation needs forward or decode")
    if backward is not None and (forward is None or not all(row.lse for row in rows)):
        raise ValueError("backward needs the log-sum-exp of forward: give forward, and limits with lse=True")

    def passes(q, k, v, mask, scale, _):
        return _checked(forward(q, k, v, mask, scale), q, k)

    def gradients(*operands):
        return _checked_gradients(backward(*operands[:-1]), *operands[:3])

    def decoded(q, cache, length, scale, _):
        return decode(q, *cache.arrays(ROWS), length, scale)

    return Implementation(
        rows if forward else (),
        kernel=(lambda case, scale: Kernel(passes, gradients, scale, None)) if backward else None,
        forward=passes if forward and not backward else None,
        decode=decoded if decode else None,
        decode_limits=decode_rows if decode else (),
    )


def register(name: str, forward=None, backward=None, decode=None, **limits) -> Implementation:
    """Makes what `implementation` returns of the same arguments, and gives it a name in this process.

    Raises ValueError as `implementation` does, and on a name that is taken or has a colon, which import paths have.
    """
    if ":" in name or not name:
        raise ValueError(f"{name!r} can't be the name of an attention implementation: names with a colon are import paths")
    made = implementation(forward, backward, decode, **limits)
    dispatch.add(name, made)
    return made


def installed() -> list[str]:
    """Names that installed packages bring."""
    return sorted(importlib.metadata.entry_points(group=ENTRY_POINTS).names)


def find(name: str) -> Implementation | None:
    """What an import path or an entry point of this name leads to, None where there is neither.

    Raises ValueError where it leads to nothing, or to what is no `implementation`.
    """
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ModuleNotFoundError, AttributeError, ValueError) as error:
            raise ValueError(f"attention implementation {name!r} can't be imported: {error}") from error
    else:
        points = importlib.metadata.entry_points(group=ENTRY_POINTS, name=name)
        if not points:
            return None
        found = next(iter(points)).load()
    if not isinstance(found, Implementation):
        raise ValueError(
            f"attention implementation {name!r} leads to {found!r}, and must to what gqa_jax.attention.implementation returns"
        )
    return found


def _checked(results, q: jax.Array, k: jax.Array):
    """What `forward` returned. Raises ValueError where its shapes or dtypes are not those that it must have."""
    batch, length, n_kv, group, _ = q.shape
    lse = jax.ShapeDtypeStruct((batch, n_kv, group, length), jnp.promote_types(q.dtype, jnp.float32))
    if isinstance(results, tuple) and len(results) == 2 and results[1] is None:
        return _same("forward", results[:1], (q,))[0], None
    return _same("forward", results, (q, lse))


def _checked_gradients(results, *operands):
    return _same("backward", results, operands)


def _same(which: str, results, expected) -> tuple:
    got, wanted = ([f"{x.dtype.name} {x.shape}" for x in arrays] for arrays in (results, expected))
    if got != wanted:
        raise ValueError(f"{which} of an attention implementation returned {', '.join(got)}: must be {', '.join(wanted)}")
    return tuple(results)
