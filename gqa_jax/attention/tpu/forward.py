"""The forward pass on TPUs: online softmax over transposed scores (`gqa_jax.attention.tpu.layout` has the tiles)."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gqa_jax.attention.spec import UNSEEN, Mask, in_32_bits
from gqa_jax.attention.tpu import layout
from gqa_jax.attention.tpu.layout import LOG2_E, PART, Options, Problem, Share, Steps, Visibility, dot, strip_of

SUBLANES = 8


@in_32_bits
def forward(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, mask: Mask, scale: float, options: Options):
    """See `gqa_jax.attention.vjp.Kernel`."""
    cut = layout.cut(q_BxTxKxGxH, k_BxSxKxH, options.forward, Share())
    problem = Problem(cut, mask)
    steps = Steps(
        cut.query_tiles, problem.bounds(()).key_blocks_seen if problem.folded else None,
        longest=cut.key_blocks, folded=problem.folded,
    )  # fmt: skip

    def at(r, s, scalars):
        return steps.at(r, s, problem.bounds(scalars).key_blocks_seen)

    def queries(*middle):
        return lambda x, r, s, *scalars: (x, *middle, at(r, s, scalars)[0])

    def kv(x):
        return lax.div(x, cut.head_groups)

    def batch(x):
        return lax.div(x, cut.n_kv * cut.head_groups)

    tile, block = cut.tokens, cut.tiles.keys
    operands = [layout.queries_minor(q_BxTxKxGxH, cut), layout.keys_major(k_BxSxKxH, cut), layout.keys_minor(v_BxSxKxH, cut)]
    in_specs = [
        pl.BlockSpec((None, cut.heads, cut.head_dim, tile), queries(0, 0)),
        pl.BlockSpec((None, block, cut.head_dim), lambda x, r, s, *c: (kv(x), at(r, s, c)[1], 0)),
        pl.BlockSpec((None, cut.head_dim, block), lambda x, r, s, *c: (kv(x), 0, at(r, s, c)[1])),
    ]
    if problem.segments is not None:
        operands += problem.segments
        in_specs += [
            pl.BlockSpec((None, 1, tile), lambda x, r, s, *c: (batch(x), 0, at(r, s, c)[0])),
            pl.BlockSpec((None, 1, block), lambda x, r, s, *c: (batch(x), 0, at(r, s, c)[1])),
        ]
    x_tiles = cut.batch * cut.n_kv * cut.head_groups
    out_XxhxHxT, lse_XxhxT = pl.pallas_call(
        functools.partial(_kernel, problem=problem, steps=steps, factor=scale * LOG2_E),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(problem.scalars),
            grid=(x_tiles, steps.rows, steps.steps),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((None, cut.heads, cut.head_dim, tile), queries(0, 0)),
                pl.BlockSpec((None, cut.heads, tile), queries(0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((1, cut.tiles.rows), jnp.float32),
                pltpu.VMEM((SUBLANES, cut.tiles.rows), jnp.float32),
                pltpu.VMEM((cut.head_dim, cut.tiles.rows), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((x_tiles, cut.heads, cut.head_dim, cut.padded_length), q_BxTxKxGxH.dtype),
            jax.ShapeDtypeStruct((x_tiles, cut.heads, cut.padded_length), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=layout.cost(problem, q_BxTxKxGxH.dtype, products=2),
        interpret=options.interpret,
        name="gqa_forward",
    )(*problem.scalars, *operands)
    lse_BxKxGxT = lse_XxhxT[..., : cut.length].reshape(cut.batch, cut.n_kv, cut.group, cut.length)
    return layout.queries_back(out_XxhxHxT, cut), lse_BxKxGxT


def _kernel(*refs, problem: Problem, steps: Steps, factor: float):
    """One step: a tile of queries meets a block of keys. Logits are in units of log 2: exp2 takes them."""
    cut = problem.cut
    tiles = cut.tiles
    scalars, refs = refs[: len(problem.scalars)], refs[len(problem.scalars) :]
    q_ref, k_ref, v_ref, *refs = refs
    segment_refs, (out_ref, lse_ref, largest_ref, total_ref, weighted_ref) = refs[:-5], refs[-5:]
    bounds = problem.bounds(scalars)
    i, j, active, first, last = steps.at(pl.program_id(1), pl.program_id(2), bounds.key_blocks_seen)
    b = lax.div(pl.program_id(0), cut.n_kv * cut.head_groups)
    may_meet, in_one = problem.segment_facts(scalars, b, i, j)
    active &= may_meet

    @pl.when(first)
    def _():
        largest_ref[...] = jnp.full_like(largest_ref, UNSEEN)
        total_ref[...] = jnp.zeros_like(total_ref)
        weighted_ref[...] = jnp.zeros_like(weighted_ref)

    def chunk_at(key):
        return pl.ds(key, tiles.chunk)

    def absorb(first_key, n_keys: int, visibility: Visibility | None):
        pieces = _order(cut, range(0, n_keys, tiles.chunk))
        scores, state = {}, {}
        for n in range(len(pieces) + tiles.ahead):
            if n < len(pieces):
                s, key = pieces[n]
                scores[n] = dot(k_ref[chunk_at(first_key + key), :], strip_of(q_ref, s, cut), 1, 0)
            if n < tiles.ahead:
                continue
            s, key = pieces[n - tiles.ahead]
            lanes = slice(s * tiles.strip, (s + 1) * tiles.strip)
            logits = factor * scores.pop(n - tiles.ahead)
            if visibility is not None:
                logits = visibility.hide(logits, s, key)
            if s not in state:
                state[s] = largest_ref[:, lanes], total_ref[:, lanes], weighted_ref[:, lanes]
            largest, total, weighted = state[s]
            now = jnp.maximum(largest, logits.max(axis=0, keepdims=True))
            weights = jnp.exp2(logits - now)
            fade = jnp.exp2(largest - now)
            total = fade * total + weights.reshape(-1, SUBLANES, tiles.strip).sum(axis=0)
            product = dot(v_ref[:, chunk_at(first_key + key)], weights.astype(v_ref.dtype), 1, 0)
            state[s] = now, total, fade * weighted + product
            if key + tiles.chunk == n_keys:
                largest_ref[:, lanes], total_ref[:, lanes], weighted_ref[:, lanes] = state.pop(s)

    all_visible = bounds.all_visible(i, j) & in_one

    @pl.when(active & all_visible)
    def _():
        absorb(0, tiles.keys, None)

    @pl.when(active & ~all_visible)
    def _():
        part = math.gcd(PART, tiles.keys)

        def one_part(n, _):
            first_key = pl.multiple_of(n * part, part)
            absorb(first_key, part, Visibility(cut, i, j, bounds.shift, first_key, *segment_refs))

        lax.fori_loop(0, bounds.parts_seen(i, j, part), one_part, None)

    @pl.when(last)
    def _():
        total = total_ref[...].sum(axis=0, keepdims=True)
        seen = total > 0
        out = weighted_ref[...] / jnp.where(seen, total, 1.0)
        lse = jnp.where(seen, (largest_ref[...] + jnp.log2(jnp.where(seen, total, 1.0))) / LOG2_E, -math.inf)
        for head in range(cut.heads):
            lanes = slice(head * cut.tokens, (head + 1) * cut.tokens)
            out_ref[head] = out[:, lanes].astype(out_ref.dtype)
            lse_ref[head : head + 1, :] = lse[:, lanes]


def _order(cut, keys):
    """Pieces (strip, first key of a chunk): `together` strips take turns chunk by chunk."""
    together = cut.tiles.together
    strips = range(cut.tiles.rows // cut.tiles.strip)
    groups = [strips[n : n + together] for n in range(0, len(strips), together)]
    return [(s, key) for group in groups for key in keys for s in group]
