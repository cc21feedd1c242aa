"""Loops of kernels visit what is visible, and mask what is partly so: the bounds against the table that no kernel makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_jax.attention import bounds


def both(function, *arguments):
    """What a function says of Python ints, having compared it with what it says of traced ones."""
    known = function(*arguments)
    position, *rest = arguments
    traced = jax.jit(lambda position: function(position, *rest))(jnp.int32(position))
    assert [int(x) for x in jax.tree.leaves(traced)] == jax.tree.leaves(known)
    return known


@pytest.mark.parametrize("shift", [-200, -64, -1, 0, 1, 63, 64, 500])
@pytest.mark.parametrize(("length", "keys"), [(64, 64), (200, 200), (100, 300), (300, 100)])
@pytest.mark.parametrize("block", [64, 128])
def test_blocks_of_keys(length, keys, shift, block):
    visible = np.arange(length)[:, None] + shift >= np.arange(keys)[None]
    visible = np.pad(visible, ((0, 0), (0, -keys % block)))  # of keys past the end none is seen
    for first in range(0, length, 64):
        last = min(first + 64, length) - 1
        span = bounds.key_blocks(first, last, shift, keys, block)
        tiles = [visible[first : last + 1, j * block : (j + 1) * block] for j in range(visible.shape[1] // block)]
        assert span.stop == sum(tile.any() for tile in tiles)
        assert span.whole == sum(tile.all() for tile in tiles)
    assert both(bounds.keys_seen, 70, shift, keys) == int((70 + shift >= np.arange(keys)).sum())


@pytest.mark.parametrize("shift", [-200, -64, -1, 0, 1, 63, 64, 500])
@pytest.mark.parametrize(("length", "keys"), [(64, 64), (200, 200), (100, 300), (300, 100)])
@pytest.mark.parametrize(("tile", "group"), [(64, 1), (96, 3), (64, 8)])
def test_tiles_of_queries(length, keys, shift, tile, group):
    rows = np.repeat(np.arange(length), group)
    visible = rows[:, None] + shift >= np.arange(keys)[None]
    for first in range(0, keys, 64):
        last = min(first + 64, keys) - 1
        span = bounds.query_tiles(first, last, shift, length, tile, group)
        tiles = [visible[i : i + tile, first : last + 1] for i in range(0, len(rows), tile)]
        assert span.start == next((i for i, x in enumerate(tiles) if x.any()), len(rows) // tile)
        assert all(x.all() == (i >= span.whole) for i, x in enumerate(tiles))
    assert both(bounds.queries_before, 70, shift, length) == int((np.arange(length) + shift < 70).sum())


@pytest.mark.parametrize("entries", [0, 1, 64, 65, 1000])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_of_a_cache_are_all_of_it_once(entries, parts):
    spans = [tuple(map(int, bounds.part_of_cache(part, parts, jnp.int32(entries), 64))) for part in range(parts)]
    assert [block for first, stop in spans for block in range(first, stop)] == list(range(-(-entries // 64)))


def test_blocks_that_may_share_a_segment():
    ids = jnp.asarray([[0, 0, 1, 1, 1, 1, 4, 4]], jnp.int32)
    low, high = np.split(np.asarray(bounds.segment_ranges(ids, 2)), 2)
    pairs = {(i, j): bounds.segments_meet((low[i], high[i]), (low[j], high[j])) for i in range(4) for j in range(4)}
    assert {pair for pair, (may, _) in pairs.items() if may} == {*((i, i) for i in range(4)), (1, 2), (2, 1)}
    assert {pair for pair, (_, one) in pairs.items() if one} == {*((i, i) for i in range(4)), (1, 2), (2, 1)}
    assert tuple(bounds.segments_meet((0, 1), (1, 1))) == (True, False)
