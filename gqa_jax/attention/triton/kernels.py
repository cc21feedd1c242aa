"""Attention in Pallas-Triton, for NVIDIA GPUs from Ampere on: FlashAttention-2's two passes with the group packed into rows.

A tile's rows are (token, query of the group) pairs of one key/value head, token major, so that keys and values are read once
for the whole group and the diagonal crosses few tiles. Each tile loops over the keys that all its tokens see, unmasked, then
over those that some see. The backward pass is two kernels without atomics, so bit-equal from run to run: one for dq, one in
which a tile of keys loops over the group's rows and dk, dv are summed over the group in float32.

Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gqa_jax.attention import bounds
from gqa_jax.attention.spec import HIDDEN, UNSEEN, Mask, in_32_bits
from gqa_jax.attention.triton import Options, Tile, padded
from gqa_jax.attention.vjp import UNSEEN_LSE

LOG2_E = math.log2(math.e)


@in_32_bits
def forward(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, mask: Mask, scale: float, options: Options):
    """See `gqa_jax.attention.vjp.Kernel`."""
    problem = _Problem(q_BxTxKxGxH, k_BxSxKxH, mask, scale, options.forward, options.interpret)
    return pl.pallas_call(
        functools.partial(_forward_kernel, problem=problem),
        grid=(problem.row_tiles, problem.n_kv, problem.batch),
        in_specs=[*problem.mask_specs, problem.query_spec, problem.key_spec, problem.key_spec],
        out_specs=[problem.query_spec, problem.column_spec],
        out_shape=[problem.like_q, problem.column],
        compiler_params=problem.compiler_params,
        interpret=options.interpret,
        name="gqa_triton_forward",
    )(*problem.mask_operands, q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH)


@in_32_bits
def backward(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, lse_BxKxGxT, delta_BxKxGxT, d_out_BxTxKxGxH, mask, scale, options: Options):
    """See `gqa_jax.attention.vjp.Kernel`."""
    operands = (q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, lse_BxKxGxT, delta_BxKxGxT, d_out_BxTxKxGxH.astype(q_BxTxKxGxH.dtype))

    def call(kernel, name: str, problem: _Problem, tiles: int, out_specs, out_shape):
        columns = [problem.column_spec, problem.column_spec]
        return pl.pallas_call(
            functools.partial(kernel, problem=problem),
            grid=(tiles, problem.n_kv, problem.batch),
            in_specs=[
                *problem.mask_specs, problem.query_spec, problem.key_spec, problem.key_spec, *columns, problem.query_spec
            ],
            out_specs=out_specs,
            out_shape=out_shape,
            compiler_params=problem.compiler_params,
            interpret=options.interpret,
            name=name,
        )(*problem.mask_operands, *operands)  # fmt: skip

    rows = _Problem(q_BxTxKxGxH, k_BxSxKxH, mask, scale, options.dq, options.interpret)
    dq = call(_dq_kernel, "gqa_triton_dq", rows, rows.row_tiles, rows.query_spec, rows.like_q)
    keys = _Problem(q_BxTxKxGxH, k_BxSxKxH, mask, scale, options.dkv, options.interpret)
    both = [keys.key_spec] * 2, [keys.like_k] * 2
    dk, dv = call(_dkv_kernel, "gqa_triton_dkv", keys, keys.key_tiles, *both)
    return dq, dk, dv


class _Problem:
    """Sizes, operands and block specifications of one call, and the loads that its kernels share.

    A program's references are one sequence's, one key/value head's: q (T, G, H), k (S, H), lse (G, T), segments (T,), (S,).
    Loads outside of an array are masked and give 0, those of log-sum-exps `UNSEEN_LSE`, by which a row adds nothing.
    """

    def __init__(self, q_BxTxKxGxH, k_BxSxKxH, mask: Mask, scale: float, tile: Tile, interpret: bool):
        self.batch, self.length, self.n_kv, self.group, self.head_dim = q_BxTxKxGxH.shape
        self.keys = k_BxSxKxH.shape[1]
        self.dtype = q_BxTxKxGxH.dtype
        self.tile, self.interpret = tile, interpret
        self.width = padded(self.head_dim)
        self.scale = scale
        self.shift = mask.static_shift
        self.segmented = mask.q_segments_BxT is not None
        self.rows = self.length * self.group
        self.row_tiles, self.key_tiles = -(-self.rows // tile.rows), -(-self.keys // tile.keys)
        self.compiler_params = plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)

        self.query_spec = pl.BlockSpec((None, self.length, None, self.group, self.head_dim), lambda i, k, b: (b, 0, k, 0, 0))
        self.key_spec = pl.BlockSpec((None, self.keys, None, self.head_dim), lambda i, k, b: (b, 0, k, 0))
        self.column_spec = pl.BlockSpec((None, None, self.group, self.length), lambda i, k, b: (b, k, 0, 0))
        self.like_q = jax.ShapeDtypeStruct(q_BxTxKxGxH.shape, self.dtype)
        self.like_k = jax.ShapeDtypeStruct(k_BxSxKxH.shape, k_BxSxKxH.dtype)
        self.column = jax.ShapeDtypeStruct((self.batch, self.n_kv, self.group, self.length), jnp.float32)

        self.mask_operands, self.mask_specs = [], []
        if self.shift is None:
            self.mask_operands.append(jnp.asarray(mask.q_offset - mask.kv_offset, jnp.int32).reshape(1))
            self.mask_specs.append(pl.BlockSpec((1,), lambda i, k, b: (0,)))
        if self.segmented:
            for ids in (mask.q_segments_BxT, mask.kv_segments_BxS):
                self.mask_operands.append(ids.astype(jnp.int32))
                self.mask_specs.append(pl.BlockSpec((None, ids.shape[1]), lambda i, k, b: (b, 0)))

    def dot(self, a, b, *, trans_b: bool = False):
        # Triton's default for float32 is TF32, 10 bits; three of its products restore float32's. A CPU has no such product.
        full = lax.Precision.HIGHEST if self.interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        return plgpu.dot(a, b, trans_b=trans_b, precision=full if a.dtype == jnp.float32 else None)

    def split(self, refs):
        """(shift, segments of queries, of keys), each as it is present, and the references of the pass itself."""
        refs = list(refs)
        shift = refs.pop(0)[0] if self.shift is None else self.shift
        segments = (refs.pop(0), refs.pop(0)) if self.segmented else (None, None)
        return shift, *segments, refs

    def rows_at(self, i):
        return _Rows(i * self.tile.rows + jnp.arange(self.tile.rows, dtype=jnp.int32), self)

    def keys_at(self, j):
        return _Keys(j * self.tile.keys + jnp.arange(self.tile.keys, dtype=jnp.int32), self)

    def tiles_of_keys(self, i, shift):
        """The row tile i sees all keys of the tiles before the first number, and none from the second on."""
        first = lax.div(i * self.tile.rows, jnp.int32(self.group))
        last = jnp.minimum(lax.div((i + 1) * self.tile.rows - 1, jnp.int32(self.group)), self.length - 1)
        whole, stop = bounds.key_blocks(first, last, shift, self.keys, self.tile.keys)
        return jnp.zeros_like(whole) if self.segmented else whole, stop

    def tiles_of_rows(self, j, shift):
        """The keys of tile j are seen by no row before the first row tile, and by all from the second on."""
        first = j * self.tile.keys
        last = jnp.minimum(first + self.tile.keys, self.keys) - 1
        start, whole = bounds.query_tiles(first, last, shift, self.length, self.tile.rows, self.group)
        return start, jnp.full_like(whole, self.row_tiles) if self.segmented else whole

    def visible(self, rows: _Rows, keys: _Keys, shift, row_segments, key_segments_ref):
        """(rows, keys)"""
        seen = (rows.token[:, None] + shift >= keys.key[None, :]) & keys.inside[None, :]
        if self.segmented:
            seen = seen & (row_segments[:, None] == keys.load_segments(key_segments_ref)[None, :])
        return seen

    def in_head(self, tile_rows: int):
        """Whether elements of a (tile_rows, width) tile are within the head, and the column of each."""
        column = jnp.arange(self.width, dtype=jnp.int32)[None, :]
        return jnp.broadcast_to(column < self.head_dim, (tile_rows, self.width)), column


class _Rows:
    """Packed rows: row r is query r % G of the group at token r // G."""

    def __init__(self, row, problem: _Problem):
        self.problem = problem
        self.inside = row < problem.rows
        self.token = lax.div(row, jnp.full_like(row, problem.group))
        self.query = row - self.token * problem.group

    def _place(self):
        in_head, column = self.problem.in_head(self.problem.tile.rows)
        return (self.token[:, None], self.query[:, None], column), in_head & self.inside[:, None]

    def load(self, ref_TxGxH):
        index, mask = self._place()
        return plgpu.load(ref_TxGxH.at[index], mask=mask, other=0.0)

    def store(self, ref_TxGxH, value):
        index, mask = self._place()
        plgpu.store(ref_TxGxH.at[index], value.astype(ref_TxGxH.dtype), mask=mask)

    def load_column(self, ref_GxT, outside: float):
        return plgpu.load(ref_GxT.at[self.query, self.token], mask=self.inside, other=outside)

    def store_column(self, ref_GxT, value):
        plgpu.store(ref_GxT.at[self.query, self.token], value, mask=self.inside)

    def load_segments(self, ref_T):
        return plgpu.load(ref_T.at[self.token], mask=self.inside, other=0) if self.problem.segmented else None


class _Keys:
    def __init__(self, key, problem: _Problem):
        self.problem = problem
        self.key = key
        self.inside = key < problem.keys

    def load(self, ref_SxH, *, whole: bool = False):
        """`whole`: all of these keys exist, so that only the head's padding needs a mask."""
        in_head, column = self.problem.in_head(self.problem.tile.keys)
        index = (self.key[:, None], column)
        if whole and self.problem.width == self.problem.head_dim:
            return plgpu.load(ref_SxH.at[index])
        mask = in_head if whole else in_head & self.inside[:, None]
        return plgpu.load(ref_SxH.at[index], mask=mask, other=0.0)

    def store(self, ref_SxH, value):
        in_head, column = self.problem.in_head(self.problem.tile.keys)
        mask = in_head & self.inside[:, None]
        plgpu.store(ref_SxH.at[self.key[:, None], column], value.astype(ref_SxH.dtype), mask=mask)

    def load_segments(self, ref_S):
        return plgpu.load(ref_S.at[self.key], mask=self.inside, other=0)


def _forward_kernel(*refs, problem: _Problem):
    shift, q_segments_ref, kv_segments_ref, (q_ref, k_ref, v_ref, out_ref, lse_ref) = problem.split(refs)
    i = problem.row_tiles - 1 - pl.program_id(0)  # those with most keys first
    rows = problem.rows_at(i)
    q = rows.load(q_ref)
    row_segments = rows.load_segments(q_segments_ref)

    to_base_2 = problem.scale * LOG2_E  # in one multiply-add with the subtraction of the maximum

    def absorb(j, state, *, masked: bool):
        largest, total, weighted = state
        keys = problem.keys_at(j)
        products = problem.dot(q, keys.load(k_ref, whole=not masked), trans_b=True)
        if masked:
            products = jnp.where(problem.visible(rows, keys, shift, row_segments, kv_segments_ref), products, HIDDEN)
        now = jnp.maximum(largest, products.max(axis=1))
        weights = jnp.exp2(products * to_base_2 - (now * to_base_2)[:, None])
        fade = jnp.exp2((largest - now) * to_base_2)
        v = keys.load(v_ref, whole=not masked)
        return now, total * fade + weights.sum(axis=1), weighted * fade[:, None] + problem.dot(weights.astype(v.dtype), v)

    size = problem.tile.rows
    state = (
        jnp.full((size,), UNSEEN, jnp.float32),
        jnp.zeros((size,), jnp.float32),
        jnp.zeros((size, problem.width), jnp.float32),
    )
    unmasked, stop = problem.tiles_of_keys(i, shift)
    state = lax.fori_loop(0, unmasked, functools.partial(absorb, masked=False), state)
    largest, total, weighted = lax.fori_loop(unmasked, stop, functools.partial(absorb, masked=True), state)
    seen = total > 0
    safe_total = jnp.where(seen, total, 1.0)
    rows.store(out_ref, weighted / safe_total[:, None])
    rows.store_column(lse_ref, jnp.where(seen, largest * problem.scale + jnp.log(safe_total), -jnp.inf))


def _dq_kernel(*refs, problem: _Problem):
    shift, q_segments_ref, kv_segments_ref, passed = problem.split(refs)
    q_ref, k_ref, v_ref, lse_ref, delta_ref, d_out_ref, dq_ref = passed
    i = problem.row_tiles - 1 - pl.program_id(0)
    rows = problem.rows_at(i)
    q, d_out = rows.load(q_ref), rows.load(d_out_ref)
    lse = rows.load_column(lse_ref, UNSEEN_LSE) * LOG2_E
    delta = rows.load_column(delta_ref, 0.0)
    row_segments = rows.load_segments(q_segments_ref)

    def contribute(j, dq, *, masked: bool):
        keys = problem.keys_at(j)
        k, v = keys.load(k_ref, whole=not masked), keys.load(v_ref, whole=not masked)
        logits = problem.dot(q, k, trans_b=True) * (problem.scale * LOG2_E)
        if masked:
            logits = jnp.where(problem.visible(rows, keys, shift, row_segments, kv_segments_ref), logits, HIDDEN)
        p = jnp.exp2(logits - lse[:, None])
        ds = p * (problem.dot(d_out, v, trans_b=True) - delta[:, None])
        return dq + problem.dot(ds.astype(k.dtype), k)

    unmasked, stop = problem.tiles_of_keys(i, shift)
    dq = jnp.zeros((problem.tile.rows, problem.width), jnp.float32)
    dq = lax.fori_loop(0, unmasked, functools.partial(contribute, masked=False), dq)
    dq = lax.fori_loop(unmasked, stop, functools.partial(contribute, masked=True), dq)
    rows.store(dq_ref, dq * problem.scale)


def _dkv_kernel(*refs, problem: _Problem):
    shift, q_segments_ref, kv_segments_ref, passed = problem.split(refs)
    q_ref, k_ref, v_ref, lse_ref, delta_ref, d_out_ref, dk_ref, dv_ref = passed
    j = pl.program_id(0)  # the first keys are seen by most rows
    keys = problem.keys_at(j)
    k, v = keys.load(k_ref), keys.load(v_ref)

    def contribute(i, state, *, masked: bool):
        dk, dv = state
        rows = problem.rows_at(i)
        q, d_out = rows.load(q_ref), rows.load(d_out_ref)
        lse = rows.load_column(lse_ref, UNSEEN_LSE) * LOG2_E
        delta = rows.load_column(delta_ref, 0.0)
        logits = problem.dot(k, q, trans_b=True) * (problem.scale * LOG2_E)  # (keys, rows): no operand of dk, dv is transposed
        if masked:
            row_segments = rows.load_segments(q_segments_ref)
            visible = problem.visible(rows, keys, shift, row_segments, kv_segments_ref)
            logits = jnp.where(visible.T, logits, HIDDEN)
        p = jnp.exp2(logits - lse[None, :])
        dv = dv + problem.dot(p.astype(d_out.dtype), d_out)
        ds = p * (problem.dot(v, d_out, trans_b=True) - delta[None, :])
        return dk + problem.dot(ds.astype(q.dtype), q), dv

    start, unmasked = problem.tiles_of_rows(j, shift)
    zeros = jnp.zeros((problem.tile.keys, problem.width), jnp.float32)
    state = lax.fori_loop(start, unmasked, functools.partial(contribute, masked=True), (zeros, zeros))
    dk, dv = lax.fori_loop(unmasked, problem.row_tiles, functools.partial(contribute, masked=False), state)
    keys.store(dk_ref, dk * problem.scale)
    keys.store(dv_ref, dv)
