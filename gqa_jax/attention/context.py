"""Attention of a sequence whose positions are spread over the devices of a mesh axis; for the inside of a `jax.shard_map`.

Device i of n holds blocks i and 2 n - 1 - i of the 2 n equal blocks of a sequence (zig-zag): one from the front, one from the
back, so that under the causal mask all devices have the same work (Llama 3, arXiv 2407.21783, Section 3.3.2).

  gather  All keys and values come to every device in one all-gather; their gradients go back in one reduce-scatter.
  ring    Keys and values visit the devices one after the other (Ring Attention, arXiv 2310.01889), each hop under the cover
          of the work on the visitors before, and results merge by their log-sum-exps. Memory is that of a device's own
          positions. More is moved: gradients travel beside the keys and values in the backward pass.

In both, sums over devices and over visits are float32.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gqa_jax.attention import dispatch
from gqa_jax.attention.api import attention, check, ids_of
from gqa_jax.attention.dispatch import resolve
from gqa_jax.attention.spec import Case, Mask
from gqa_jax.attention.vjp import Kernel, named, once, rows_of
from gqa_jax.collectives import reduce_scatter

METHODS = ("gather", "ring")


def zigzag(length: int, size: int) -> np.ndarray:
    """Global positions (T,) in the order in which contiguous shards over `size` devices hold their zig-zag blocks.

    Raises ValueError when there are not two blocks of equal length for each device.
    """
    if size == 1:
        return np.arange(length)
    if size < 1 or length % (2 * size):
        raise ValueError(f"{length} positions over {size} devices: {size} must be positive and divide half of {length}")
    blocks = np.arange(length).reshape(2 * size, -1)
    return np.stack([blocks[:size], blocks[: size - 1 : -1]], axis=1).reshape(-1)


def positions(local_length: int, axis: str, size: int) -> jax.Array:
    """Global positions (T_local,) int32 of this device's tokens."""
    if size == 1:
        return jnp.arange(local_length, dtype=jnp.int32)
    block = _block(local_length)
    return jnp.concatenate([start + jnp.arange(block, dtype=jnp.int32) for start in _starts(block, axis, size)])


def planned_case(
    *, batch: int, length: int, n_heads: int, n_kv_heads: int, head_dim: int, dtype: Any, size: int, method: str, segments: bool
) -> Case:
    """What `context_attention` asks of an implementation, before there is anything to attend to; `resolve` names it.

    All sizes are those of one device: `length` is T_local. Where `size` is 1, `method` does not matter.
    """
    sizes = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim, "dtype": dtype, "segments": segments}
    if size == 1:
        return Case.planned(batch=batch, length=length, **sizes)
    block = _block(length)
    if method == "gather":
        return Case.planned(batch=batch, length=block, keys=size * length, aligned=False, **sizes)
    if method == "ring":
        case = Case.planned(batch=2 * batch, length=block, keys=block, aligned=False, **sizes)
        return case._replace(return_lse=True, by_pass=True)
    raise ValueError(f"method {method!r} of attention over a context axis is unknown: there are {', '.join(METHODS)}")


def context_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis: str,
    size: int,
    method: str = "gather",
    implementation: str | None = None,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Causal attention of grouped queries (`gqa_jax.attention.attention`) over a sequence spread over a mesh axis.

    Args:
      q: (B, T_local, N, H) or (B, T_local, K, G, H), this device's positions in the order of `zigzag`.
      k, v: (B, T_local, K, H) of the same positions.
      axis: a manual axis of the `jax.shard_map` around this. size: its devices; 1 is plain `attention`.
      method: "gather" or "ring", as above.
      implementation: a name, or None for the best one that can run `planned_case`.
      segment_ids: (B, T_local) integers, or None.

    Returns:
      The output, in q's shape and dtype. Gradients taken inside the shard_map are those of the sum of all devices' losses,
      complete for this device's q, k and v.

    Raises:
      ValueError: as `attention` does; an unknown method; positions that are not two equal blocks.
    """
    check(q, k, v, segment_ids, 0, 0, scale)
    if isinstance(segment_ids, tuple):
        raise ValueError("segment_ids must be one array (B, T_local): queries and keys are of the same positions")
    batch, local_length, n_kv, head_dim = k.shape
    group = q.size // k.size
    case = planned_case(
        batch=batch, length=local_length, n_heads=n_kv * group, n_kv_heads=n_kv, head_dim=head_dim, dtype=q.dtype,
        size=size, method=method, segments=segment_ids is not None,
    )  # fmt: skip
    name = resolve(implementation, case)
    if size == 1:
        return attention(q, k, v, implementation=name, segment_ids=segment_ids, scale=scale)
    segment_ids = ids_of(segment_ids)
    if method == "gather":
        return _gather(q, k, v, segment_ids, axis, size, name, scale)
    kernel_of = functools.partial(dispatch.kernel, name, scale=head_dim**-0.5 if scale is None else float(scale))
    own = case._replace(batch=batch, length=local_length, keys=local_length, aligned=True)
    ring = _Ring(axis, size, _block(local_length), kernel_of(own), kernel_of(case))
    return _ring(ring, q.reshape(batch, local_length, n_kv, group, head_dim), k, v, segment_ids).reshape(q.shape)


def _block(local_length: int) -> int:
    if local_length % 2:
        raise ValueError(f"a device holds two blocks of equal length, and {local_length} positions are odd")
    return local_length // 2


def _starts(block: int, axis: str, size: int):
    """Global positions of the first tokens of this device's two blocks."""
    i = jax.lax.axis_index(axis)
    return i * block, (2 * size - 1 - i) * block


# All at once. P devices, C = 2: keys and values.


def _gather(q, k, v, segments_BxT, axis: str, size: int, name: str, scale: float | None):
    block = _block(q.shape[1])
    if segments_BxT is not None:
        segments_BxS = _in_order(jax.lax.all_gather(segments_BxT, axis), 1)
    out = []
    for n, (start, (k_seen, v_seen)) in enumerate(zip(_starts(block, axis, size), _collect(axis, k, v), strict=True)):
        mine = slice(n * block, (n + 1) * block)
        segment_ids = None if segments_BxT is None else (segments_BxT[:, mine], segments_BxS[:, : k_seen.shape[1]])
        out.append(
            attention(q[:, mine], k_seen, v_seen, implementation=name, segment_ids=segment_ids, q_offset=start, scale=scale)
        )
    return jnp.concatenate(out, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _collect(axis: str, k_BxTxKxH, v_BxTxKxH):
    """Keys and values that the front blocks of queries may see, the first half of the sequence, and those of the whole.

    Two results, so that in the backward pass their gradients, which a kernel rounds to the dtype of the keys, are added in
    float32 from there on: over the two blocks of queries, and over devices.
    """
    kv_PxCxBxTxKxH = jax.lax.all_gather(jnp.stack([k_BxTxKxH, v_BxTxKxH]), axis)
    k_BxSxKxH, v_BxSxKxH = _in_order(kv_PxCxBxTxKxH, 2)
    half = k_BxSxKxH.shape[1] // 2
    return (k_BxSxKxH[:, :half], v_BxSxKxH[:, :half]), (k_BxSxKxH, v_BxSxKxH)


def _collect_forward(axis, k, v):
    return _collect(axis, k, v), None


def _collect_backward(axis, _, cotangents):
    d_half, d_whole = (jnp.stack(x) for x in cotangents)
    dtype, accumulate = d_whole.dtype, jnp.promote_types(d_whole.dtype, jnp.float32)

    def of_devices(x_CxBxSxKxH):
        c, b, s, *rest = x_CxBxSxKxH.shape
        size = jax.lax.axis_size(axis)
        return jnp.moveaxis(x_CxBxSxKxH.reshape(c, b, size, s // size, *rest), 2, 0)

    # reordered first, in the narrow dtype: only what is sent is float32 of the whole sequence
    front, back = (of_devices(x) for x in jnp.split(d_whole, 2, axis=2))
    front = front.astype(accumulate) + of_devices(d_half).astype(accumulate)
    parts_PxCxBxTxKxH = jnp.concatenate([front, back[::-1].astype(accumulate)], axis=3)
    return tuple(reduce_scatter(parts_PxCxBxTxKxH, (axis,), 0)[0].astype(dtype))


_collect.defvjp(_collect_forward, _collect_backward)


def _in_order(x_PxT, axis: int):
    """(P, ..., T_local, ...) of all devices as (..., T, ...) in the order of the sequence; `axis` is T's in the result."""

    def joined(x):
        x = jnp.moveaxis(x, 0, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    front, back = jnp.split(x_PxT, 2, axis=axis + 1)
    return jnp.concatenate([joined(front), joined(back[::-1])], axis=axis)


# One after the other. Positions increase along a device's two blocks, so with its own keys it is ordinary causal attention.
# Visitors from a device before it are seen by all its queries in their front block, and by none in their back block; those
# from one after it by its back block of queries, wholly. Of the four pairs of blocks it is always two that count, without a
# causal mask: back queries with front keys, and either fronts or backs with their like. Both go in one call, side by side in
# the batch: no branch, no pair in vain, and a kernel that the scheduler sees it can hide a hop behind.


class _Ring(NamedTuple):
    axis: str
    size: int
    block: int
    own: Kernel  # causal, over the device's own keys
    visit: Kernel  # over two pairs of blocks, all visible

    def hop(self, x):
        """Every device's arrays to the next one."""
        return jax.tree.map(lambda a: jax.lax.ppermute(a, self.axis, [(i, (i + 1) % self.size) for i in range(self.size)]), x)

    def travel(self, step, state, visitors):
        """step(state, visitors, alike) -> state for each of the others' `visitors`, the next under way meanwhile.

        `alike` is the first position here of the blocks that meet their like: front blocks, or back blocks.
        """

        def arrived(s, state, visitors):
            return step(state, visitors, jnp.where(s <= jax.lax.axis_index(self.axis), 0, self.block))

        def body(s, carry):
            state, visitors = carry
            return arrived(s, state, visitors), self.hop(visitors)

        carry = state, self.hop(visitors)
        if self.size > 2:
            carry = jax.lax.fori_loop(1, self.size - 1, body, carry)
        return arrived(self.size - 1, *carry)  # peeled: the last visitors don't travel on

    def block_at(self, x, start, axis: int = 1):
        return jax.lax.dynamic_slice_in_dim(x, start, self.block, axis)

    def pair(self, x, start: int, alike, axis: int = 1):
        """The blocks of x at both positions, side by side in the batch."""
        return jnp.concatenate([self.block_at(x, start, axis), self.block_at(x, alike, axis)])

    def mask(self, segments_BxT, visiting_BxT, alike) -> Mask:
        if segments_BxT is None:
            return Mask(self.block, 0)
        return Mask(self.block, 0, self.pair(segments_BxT, self.block, alike), self.pair(visiting_BxT, 0, alike))

    def add(self, total, pair, start: int, alike):
        """Adds the two blocks of `pair` to those of `total` from which `pair` took them."""
        for at, part in zip((start, alike), jnp.split(pair.astype(total.dtype), 2), strict=True):
            total = jax.lax.dynamic_update_slice_in_dim(total, self.block_at(total, at) + part, at, axis=1)
        return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(ring: _Ring, q_BxTxKxGxH, k_BxTxKxH, v_BxTxKxH, segments_BxT):
    return _ring_forward(ring, q_BxTxKxGxH, k_BxTxKxH, v_BxTxKxH, segments_BxT)[0]


def _ring_forward(ring: _Ring, *operands):
    q, k, v = once(ring.own, *operands[:3])
    segments = operands[3]
    accumulate = jnp.promote_types(q.dtype, jnp.float32)

    def step(state, visitors, alike):
        kv, visiting_segments = visitors
        paired = ring.pair(q, ring.block, alike), *(ring.pair(x, 0, alike) for x in kv)
        mask = ring.mask(segments, visiting_segments, alike)
        parts = ring.visit.forward(*paired, mask, ring.visit.scale, ring.visit.options)
        for at, out, lse in zip((ring.block, alike), *(jnp.split(x, 2) for x in parts), strict=True):
            total_out, total_lse = state
            here = ring.block_at(total_out, at), ring.block_at(total_lse, at, axis=3)
            merged_out, merged_lse = _merge(here, (out, lse))
            state = (
                jax.lax.dynamic_update_slice_in_dim(total_out, merged_out, at, axis=1),
                jax.lax.dynamic_update_slice_in_dim(total_lse, merged_lse, at, axis=3),
            )
        return state

    out, lse = ring.own.forward(q, k, v, Mask(0, 0, segments, segments), ring.own.scale, ring.own.options)
    out, lse = ring.travel(step, (out.astype(accumulate), lse), (jnp.stack([k, v]), segments))
    out, lse = named(out.astype(q.dtype), lse)
    return out, (*operands, out, lse)


def _ring_backward(ring: _Ring, kept, d_out):
    q, k, v, segments, out, lse = kept
    q, k, v, out, lse, d_out = once(ring.own, q, k, v, out, lse, d_out)
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    lse, delta = rows_of(out, lse, d_out)

    def step(state, visitors, alike):
        dq, dkv = state
        kv, visiting_segments = visitors
        paired_q, paired_d_out = (ring.pair(x, ring.block, alike) for x in (q, d_out))
        paired_lse, paired_delta = (ring.pair(x, ring.block, alike, axis=3) for x in (lse, delta))
        paired_kv = (ring.pair(x, 0, alike) for x in kv)
        mask = ring.mask(segments, visiting_segments, alike)
        more_dq, *more_dkv = ring.visit.backward(
            paired_q, *paired_kv, paired_lse, paired_delta, paired_d_out, mask, ring.visit.scale, ring.visit.options
        )
        # these sums are of the visitors, and arrive while they are worked on
        dkv = (ring.add(x, more, 0, alike) for x, more in zip(ring.hop(dkv), more_dkv, strict=True))
        return ring.add(dq, more_dq, ring.block, alike), jnp.stack(list(dkv))

    mask = Mask(0, 0, segments, segments)
    dq, *dkv = ring.own.backward(q, k, v, lse, delta, d_out, mask, ring.own.scale, ring.own.options)
    state = dq.astype(accumulate), jnp.stack(dkv).astype(accumulate)
    dq, dkv = ring.travel(step, state, (jnp.stack([k, v]), segments))
    dk, dv = ring.hop(dkv)  # home
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(_ring_forward, _ring_backward)


def _merge(a, b):
    """Output (B, T, K, G, H), in the first one's dtype, and log-sum-exp (B, K, G, T) over the keys of both."""
    (out, lse), (more, more_lse) = a, b
    merged_lse = jnp.logaddexp(lse, more_lse)
    finite = jnp.where(merged_lse == -jnp.inf, 0, merged_lse)  # where neither saw a key

    def share(lse_BxKxGxT):
        return jnp.transpose(jnp.exp(lse_BxKxGxT - finite), (0, 3, 1, 2))[..., None]

    return out * share(lse) + more.astype(out.dtype) * share(more_lse), merged_lse
