"""What the Hopper kernels share: who computes what, which keys a tile sees, and their few register operations.

The work of one key/value head is cut into units of `ROWS` consecutive queries of one query head: the rows of one `wgmma` by
one warpgroup. Units are numbered token block first, query head of the group second, so that the warpgroups of a thread
block (a CTA), which take consecutive units, are different query heads of the same tokens wherever the group is large
enough: they walk over the same keys, load each once for all, and q, k, v and the output are read and written as they lie.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from gqa_jax.attention.spec import HIDDEN, Mask

ROWS = 64  # M of wgmma: queries of a unit, and keys of a unit where keys are the rows
LOG2E = math.log2(math.e)


class Problem(NamedTuple):
    """Sizes while tracing: T queries and S keys before padding, and what pads them."""

    batch: int
    length: int
    keys: int
    n_kv: int
    group: int
    head_dim: int
    shift: int | None  # q_offset - kv_offset; None: it is an input of the kernel
    segments: bool  # they are inputs too

    @classmethod
    def of(cls, q_BxTxKxGxH, k_BxSxKxH, mask: Mask) -> Problem:
        batch, length, n_kv, group, head_dim = q_BxTxKxGxH.shape
        return cls(batch, length, k_BxSxKxH.shape[1], n_kv, group, head_dim, mask.static_shift,
                   mask.q_segments_BxT is not None)  # fmt: skip

    @property
    def token_blocks(self) -> int:
        return -(-self.length // ROWS)

    @property
    def units(self) -> int:
        return self.token_blocks * self.group

    def place(self, program):
        """Of a CTA's number: its place along the sequence, which changes slowest, batch and key/value head."""
        of_head = lax.rem(program, self.batch * self.n_kv)
        return lax.div(program, self.batch * self.n_kv), lax.div(of_head, self.n_kv), lax.rem(of_head, self.n_kv)

    def unit(self, number):
        """First token and query head of a unit, and whether it exists: the last CTA's surplus repeats the last one."""
        last = self.units - 1
        u = jnp.minimum(number, last)
        return lax.div(u, self.group) * ROWS, lax.rem(u, self.group), number <= last

    def last_key(self, token, shift):
        """The last key that query `token` sees; it sees none where this is negative."""
        return jnp.minimum(token + shift, self.keys - 1)


def pad(x: jax.Array, axis: int, multiple: int, value=0) -> jax.Array:
    short = -x.shape[axis] % multiple
    if not short:
        return x
    return jnp.pad(x, [(0, short if i == axis else 0) for i in range(x.ndim)], constant_values=value)


class Masking(NamedTuple):
    """What the kernels take of a mask, as arrays or as references to them; what is not needed is None."""

    shift: jax.Array | None  # (1,) q_offset - kv_offset, where it isn't known while tracing
    q_segments_BxT: jax.Array | None
    kv_segments_BxS: jax.Array | None

    @classmethod
    def of(cls, mask: Mask, key_multiple: int) -> Masking:
        shift = None
        if mask.static_shift is None:
            shift = jnp.reshape(jnp.asarray(mask.q_offset - mask.kv_offset, jnp.int32), (1,))
        if mask.q_segments_BxT is None:
            return cls(shift, None, None)
        q, kv = (jnp.asarray(x, jnp.int32) for x in (mask.q_segments_BxT, mask.kv_segments_BxS))
        return cls(shift, pad(q, 1, ROWS), pad(kv, 1, key_multiple))


def segment_rows(segments_ref, batch, start, size: int) -> jax.Array | None:
    """Segments of the rows of a tile of logits, None without segments."""
    return _segments(segments_ref, batch, start, size, plgpu.Layout.WGMMA.reduce(1))


def segment_columns(segments_ref, batch, start, size: int) -> jax.Array | None:
    return _segments(segments_ref, batch, start, size, plgpu.Layout.WGMMA.reduce(0))


def _segments(segments_ref, batch, start, size, layout):
    return (
        None if segments_ref is None else plgpu.load(segments_ref.at[batch, pl.ds(start, size)], layout=layout, optimized=False)
    )


def hide_others(logits, rows_segments, columns_segments):
    """Logits with HIDDEN where query and key are of different segments; unchanged without segments."""
    if rows_segments is None:
        return logits
    same = rows(rows_segments, logits.shape) == columns(columns_segments, logits.shape)
    return jnp.where(same, logits, HIDDEN)


def tiled(shape: tuple[int, ...], dtype) -> plgpu.SMEM:
    """Shared memory in the layout that both the TMA and wgmma take: 8 x 128-byte tiles, swizzled over 128 bytes."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))


def rows(x_R: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """One number per row, for all columns."""
    return lax.broadcast_in_dim(x_R, shape, [0])


def columns(x_C: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """One number per column, for all rows."""
    return lax.broadcast_in_dim(x_C, shape, [1])


def numbered(shape: tuple[int, int], axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def numbered_rows(n: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (n,), 0, layout=plgpu.Layout.WGMMA.reduce(1))


def zeros_R(value: float = 0.0) -> jax.Array:
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def hide(logits_RxC, last_seen_R, first_key):
    """Logits with HIDDEN for the keys after each query's last."""
    key = numbered(logits_RxC.shape, 1) + first_key
    return jnp.where(key <= rows(last_seen_R, logits_RxC.shape), logits_RxC, HIDDEN)


def hide_transposed(logits_RxC, first_seen_by_R, first_query):
    """Logits of keys (rows) and queries, with HIDDEN for the queries before the first that sees a key."""
    query = numbered(logits_RxC.shape, 1) + first_query
    return jnp.where(query >= rows(first_seen_by_R, logits_RxC.shape), logits_RxC, HIDDEN)


def softmax_step(logits_RxC, largest_R, total_R, scale2: float):
    """One step of the online softmax in base 2: weights, running maximum and sum, and the factor for older sums.

    largest_R is of scale2 * logits, scale2 = scale * log2(e): the scale is applied in float32, within one FMA per weight.
    """
    now_R = jnp.maximum(largest_R, logits_RxC.max(axis=1) * scale2)
    fade_R = jnp.exp2(largest_R - now_R)
    weights_RxC = jnp.exp2(logits_RxC * scale2 - rows(now_R, logits_RxC.shape))
    return weights_RxC, now_R, total_R * fade_R + weights_RxC.sum(axis=1), fade_R


def fill_rings(tile, steps, *rings) -> None:
    """The loading warpgroup's work: step i copies what copies(i) names, (source, ring, barrier), into a slot of each ring.

    A ring is (free, copies): the consumers arrive at `free` when they have read a slot. All of them are read in the end.
    """
    plgpu.set_max_registers(tile.loader_registers, action="decrease")

    @pl.loop(0, steps)
    def _(i):
        slot = lax.rem(i, tile.stages)
        for free, copies in rings:
            pl.when(i >= tile.stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            for source, smem, loaded in copies(i):
                plgpu.copy_gmem_to_smem(source, smem.at[slot], loaded.at[slot])

    @pl.loop(jnp.maximum(steps - tile.stages, 0), steps)
    def _(i):
        for free, _ in rings:
            plgpu.barrier_wait(free.at[lax.rem(i, tile.stages)])


def multiply(accumulator, a, b, interpret: bool) -> None:
    """accumulator += a @ b, issued and not awaited; b in shared memory, a there or in registers.

    The interpreter multiplies only what lies in memory, and checks what it reads for races only when it is loaded.
    """
    if not interpret:
        plgpu.wgmma(accumulator, a, b)
        return
    a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
    plgpu.commit_smem()  # wgmma reads as the TMA writes, without need of a fence in between
    put(accumulator, plgpu.wgmma_accumulator_load(accumulator) + jnp.dot(a, b, preferred_element_type=jnp.float32), interpret)


def pinned(x: jax.Array) -> jax.Array:
    """x, computed by here: the compiler would convert weights to bfloat16 only where they are multiplied, which keeps twice the
    registers alive and, between two products in flight, makes ptxas run them one after the other."""
    return lax.optimization_barrier(x)


def put(accumulator, value, interpret: bool) -> None:
    """accumulator = value; nothing may be in flight to it."""
    if interpret:
        jax.ref.set(accumulator, ..., value)
    else:
        accumulator[...] = value


def launch(kernel, *, programs: int, warpgroups: int, out_type, scratch: dict, name: str, interpret: bool):
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(programs,),
        grid_names=("program",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
