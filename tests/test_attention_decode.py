"""Decoding: numerics against float64, of kernels in interpret mode, and kernels compiled for chips that need not be there."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gqa_jax.attention import (
    attention,
    cache,
    cache_of,
    conformance,
    decode,
    decoding,
    interpreted,
    merge,
    new_cache,
    resolve,
    unsupported_reason,
)  # fmt: skip
from gqa_jax.attention.spec import Case
from gqa_jax.attention.tpu import decode as decode_tpu
from gqa_jax.attention.triton import decode as decode_triton
from tests import machines

IMPLEMENTATIONS = ["reference", "xla", "pallas_tpu", "pallas_triton"]
TPUS = ("v5e", "v5p", "v6e")
CACHES = ("bfloat16", "int8")


@pytest.fixture
def small(monkeypatch):
    """Blocks so small that a cache of hundreds has several, and two or three parts."""
    monkeypatch.setattr(decoding, "XLA_CHUNK", 64)
    monkeypatch.setattr(cache, "BLOCK", 64)
    monkeypatch.setattr(decode_triton, "choose", lambda case: decode_triton.Options(3, 32, 4, 2, case.interpreted))
    monkeypatch.setattr(decode_tpu, "choose", lambda case: decode_tpu.Options(2, 128, case.interpreted))
    program.cache_clear()
    yield
    program.cache_clear()


def problem(n_heads, n_kv, head_dim, keys, *, batch=2, dtype=jnp.bfloat16, size=1.0):
    rng = np.random.default_rng(0)
    shapes = (batch, n_heads, head_dim), (batch, keys, n_kv, head_dim), (batch, keys, n_kv, head_dim)
    q, k, v = (rng.normal(size=shape) for shape in shapes)
    return [x.astype(dtype) for x in (size * q, size * k, v)]


def expected(q, k, v, lengths):
    """Float64 output (B, N, H) and log-sum-exp (B, N)."""
    out, lse = [], []
    for b, length in enumerate(lengths):
        row = q[b].reshape(1, 1, k.shape[2], -1, q.shape[-1])
        o, e = conformance.exact(row, k[b : b + 1], v[b : b + 1], q_offset=int(length) - 1)
        out.append(o.reshape(q.shape[1:]))
        lse.append(e.reshape(-1))
    return np.stack(out), np.stack(lse)


@functools.cache
def program(implementation):
    return jax.jit(lambda q, k, v, n: decode(q, cache_of(k, v), n, implementation=implementation, return_lse=True))


def run(implementation, *arguments):
    with interpreted() if implementation.startswith("pallas") else contextlib.nullcontext():
        return program(implementation)(*arguments)


def error(found, exact):
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(np.isfinite(found), finite)
    return np.abs(np.where(finite, np.asarray(found, np.float64) - np.where(finite, exact, 0), 0)).max()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_is_the_last_row_of_attention(implementation):
    q, k, v = problem(8, 2, 64, 90, dtype=jnp.float32)
    rows = jnp.concatenate([jnp.ones_like(k[:, 1:, :1].repeat(8, axis=2)), q[:, None]], axis=1)  # q at the last position
    out, lse = attention(rows, k, v, implementation="reference", return_lse=True)
    found, found_lse = run(implementation, q, k, v, 90)
    np.testing.assert_allclose(found, out[:, -1], atol=2e-6)
    np.testing.assert_allclose(found_lse, lse[:, -1], atol=2e-6)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_halves_of_a_cache_merge_to_the_whole(implementation):
    q, k, v = problem(8, 2, 64, 160, dtype=jnp.float32)
    length = np.array([160, 50])  # the second sequence ends in the first half
    whole = run(implementation, q, k, v, length)
    halves = [
        run(implementation, q, k[:, s], v[:, s], jnp.clip(length - s.start, 0, 80)) for s in (slice(0, 80), slice(80, 160))
    ]
    out, lse = merge(*(jnp.stack(x).reshape(2, 2, 2, 4, *x[0].shape[2:]) for x in zip(*halves, strict=True)))
    np.testing.assert_allclose(out.reshape(q.shape), whole[0], atol=2e-6)
    np.testing.assert_allclose(lse.reshape(2, 8), whole[1], atol=2e-6)


def test_grouped_queries_are_the_same_ones():
    q, k, v = problem(8, 2, 64, 90, dtype=jnp.float32)
    for a, b in zip(run("xla", q, k, v, 90), run("xla", q.reshape(2, 2, 4, 64), k, v, 90), strict=True):
        np.testing.assert_array_equal(a.reshape(-1), b.reshape(-1))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[2:])
def test_two_runs_are_bit_equal(implementation):
    arguments = *problem(8, 1, 128, 200), np.array([200, 130])
    for a, b in zip(run(implementation, *arguments), run(implementation, *arguments), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_triton"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_blocks_as_they_are_chosen(implementation, head_dim):
    q, k, v = problem(8, 2, head_dim, 1000)
    exact_out, exact_lse = expected(q, k, v, (1000, 617))
    out, lse = run(implementation, q, k, v, np.array([1000, 617]))
    assert error(out, exact_out) < 2e-3
    assert error(lse, exact_lse) < 2e-6


def test_xla_reads_no_chunk_beyond_the_longest_sequence(monkeypatch):
    monkeypatch.setattr(decoding, "XLA_CHUNK", 64)
    q, k, v = problem(2, 1, 16, 640, dtype=jnp.float32)
    loops = str(jax.make_jaxpr(lambda n: decode(q, cache_of(k, v), n, implementation="xla"))(np.array([10, 20])))
    assert "while" in loops  # a bound that is known only when it runs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, n: (q[0], cache_of(k, v), n), r"takes q \(B, N, H\)"),
        (lambda q, k, v, n: (q[:, :3], cache_of(k, v), n), "multiple of key/value heads"),
        (lambda q, k, v, n: (q, cache_of(k[..., :8], v[..., :8]), n), "same batch and head size"),
        (lambda q, k, v, n: (q.astype(jnp.int32), cache_of(k, v), n), "floating dtype"),
        (lambda q, k, v, n: (q, cache_of(k, v.astype(jnp.bfloat16)), n), "of one dtype"),
        (lambda q, k, v, n: (q, cache_of(k.astype(jnp.int8), v.astype(jnp.int8)), n), "must be floating"),
        (lambda q, k, v, n: (q, cache_of(k[0], v[0]), n), r"takes k and v \(B, S, K, H\)"),
        (lambda q, k, v, n: (q, k, n), "use new_cache, or cache_of"),
        (lambda q, k, v, n: (q.reshape(2, 1, 4, 16), cache_of(k, v), n), "must have the K of the keys"),
        (lambda q, k, v, n: (q, cache_of(k[:, :0], v[:, :0]), n), "at least one"),
        (lambda q, k, v, n: (q, cache_of(k, v), 11), "within the cache, 0 to 10"),
        (lambda q, k, v, n: (q, cache_of(k, v), np.int32(11)), "within the cache, 0 to 10; got 11"),
        (lambda q, k, v, n: (q, cache_of(k, v), np.array([3, 11])), r"within the cache, 0 to 10; got \[ 3 11\]"),
        (lambda q, k, v, n: (q, cache_of(k, v), np.array([-1, 3])), "within the cache, 0 to 10"),
        (lambda q, k, v, n: (q, cache_of(k, v), 2**40), "within the cache, 0 to 10"),
        (lambda q, k, v, n: (q, cache_of(k, v), jnp.ones(3, jnp.int32)), r"integers \(2,\)"),
        (lambda q, k, v, n: (q, cache_of(k, v), 1.0), "must be an integer"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        decode(*change(*problem(4, 2, 16, 10, dtype=jnp.float32), 5))


def test_names_and_obstacles():
    q, k, v = problem(4, 2, 16, 10, dtype=jnp.float32)
    arguments = q, cache_of(k, v), 5
    with pytest.raises(ValueError, match="did you mean 'pallas_triton'"):
        decode(*arguments, implementation="pallas_tritn")
    with pytest.raises(ValueError, match=r"can't run here: pallas_tpu runs on TPUs, and this is cpu .*\. These can: ref"):
        decode(*arguments, implementation="pallas_tpu")
    case = Case("tpu", "TPU v5 lite", 1, 1, 1024, 8, 1, 128, jnp.dtype("bfloat16"), aligned=False, decode=True)
    assert resolve(None, case) == "pallas_tpu"
    assert resolve(None, case._replace(head_dim=256)) == "xla"
    assert resolve(None, case._replace(platform="gpu", chip="NVIDIA H200")) == "pallas_triton"
    assert resolve(None, case._replace(cache_dtype=jnp.dtype("int8"))) == "pallas_tpu"
    gpu = case._replace(platform="gpu", chip="NVIDIA H200", cache_dtype=jnp.dtype("int8"))
    for name in IMPLEMENTATIONS:
        assert unsupported_reason(name, gpu) is not None
    with pytest.raises(ValueError, match=r"reads no caches of int8 .* on NVIDIA H200; no GPU has run one"):
        resolve(None, gpu)
    with pytest.raises(ValueError, match="can't be of float64: use float32, bfloat16"):
        new_cache(1, 8, 2, 1, 16, jnp.float32, cache_dtype="float64")
    with pytest.raises(ValueError, match="pallas_tpu runs on TPUs"):
        new_cache(1, 8, 2, 1, 16, jnp.float32, implementation="pallas_tpu")


@pytest.mark.parametrize("layout", [cache.ROWS, cache.WITHIN_HEADS, cache.LANES, cache.BLOCKS])
@pytest.mark.parametrize(("dtype", "wide"), [("float32", False), ("bfloat16", False), ("int8", False), ("int8", True)])
def test_what_is_appended_is_read_in_every_layout(layout, dtype, wide, monkeypatch):
    """Several positions at once, across blocks, then one, then one at a place of its own for each sequence."""
    monkeypatch.setattr(cache, "BLOCK", 4)
    _, k, v = problem(4, 2, 16, 10, dtype=jnp.float32)
    with jax.enable_x64(wide):  # positions stay of 32 bits
        held = cache.empty(layout, 2, 12, 2, 16, jnp.dtype(dtype)).append(k[:, :6], v[:, :6], 0)
        held = held.append(k[:, 6:7], v[:, 6:7], jnp.int32(6))
        held = held.append(k[:, 7:8], v[:, 7:8], jnp.array([7, 9], jnp.int32))
    blocks = "C" in layout.k
    assert held.k.shape == tuple({"B": 2, "C": 3, "S": 4 if blocks else 12, "K": 2, "H": 16}[axis] for axis in layout.k)
    tolerance = {"float32": 0, "bfloat16": 2**-8, "int8": 1 / 127}[dtype]
    for found, given in zip(held.rows(jnp.float32), (k, v), strict=True):
        expected = np.zeros((2, 12, 2, 16), np.float32)
        expected[:, :7], expected[0, 7], expected[1, 9] = given[:, :7], given[0, 7], given[1, 7]
        np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("keys", [640, 1664, 2176, 1021, 100, 1])
def test_blocks_hold_what_was_asked_for(keys):
    """Multiples of 128, which are divided over devices, hold not one entry more; no block is small but of a small cache."""
    held = jax.eval_shape(lambda: cache.empty(cache.BLOCKS, 1, keys, 1, 8, jnp.float32))
    blocks, size = held.k.shape[2], held.k.shape[4]
    assert blocks * size == held.keys >= keys
    assert size <= cache.BLOCK
    assert size >= cache.BLOCK // 4 or blocks <= 2
    assert held.keys == keys if keys % 128 == 0 else held.keys < keys + blocks


@pytest.mark.parametrize("position", [0, 3, 5, 19])
@pytest.mark.parametrize("tokens", [1, 2, 5, 9])
def test_writes_into_blocks_move_back_and_stay_out(position, tokens, monkeypatch):
    """As in rows: of what would lie beyond, of sequences that are left as they are, and of tokens that span blocks."""
    monkeypatch.setattr(cache, "BLOCK", 4)
    rng = np.random.default_rng(0)
    before, new = (rng.normal(size=(2, count, 2, 8)).astype(np.float32) for count in (20, tokens))
    wheres = (None, jnp.array(True), jnp.array(False))
    places = [(jnp.int32(position), where) for where in wheres]
    if tokens == 1:
        places += [(jnp.array([position, 7]), None), (jnp.array([position, 7]), jnp.array([False, True]))]
    for at, where in places:
        rows, blocks = (
            cache.empty(layout, 2, 20, 2, 8, jnp.float32).append(before, before, 0).append(new, new, at, where)
            for layout in (cache.ROWS, cache.BLOCKS)
        )
        for found, expected in zip(blocks.rows(jnp.float32), rows.rows(jnp.float32), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("n_heads", "n_kv"), [(8, 1), (4, 2), (6, 6)])
@pytest.mark.parametrize("lengths", [(1, 600), (300, 640), (0, 65)])
def test_xla_on_a_cpu_meets_several_blocks_of_a_head(n_heads, n_kv, lengths, monkeypatch):
    """10 blocks, of which a step meets 4, 2 or 1 of each head: the last step is moved back."""
    monkeypatch.setattr(cache, "BLOCK", 64)
    q, k, v = problem(n_heads, n_kv, 16, 640, dtype=jnp.float32)
    held = new_cache(2, 640, n_heads, n_kv, 16, jnp.float32, implementation="xla")
    assert held.layout == cache.BLOCKS
    assert held.k.shape[2] == 10
    held = held.append(k, v, 0)
    out, lse = decode(q, held, np.array(lengths), implementation="xla", return_lse=True)
    exact_out, exact_lse = expected(q, k, v, lengths)
    seen = np.array(lengths) > 0
    assert error(out[seen], exact_out[seen]) < 1e-5
    assert error(lse[seen], exact_lse[seen]) < 1e-5
    assert (np.asarray(out[~seen]) == 0).all()
    assert (np.asarray(lse[~seen]) == -np.inf).all()


def test_integers_stay_within_seven_bits_and_half_a_step():
    x = jnp.concatenate([jnp.linspace(-3, 3, 64)[None] * s for s in (1e-6, 0.37, 1.0, 1.9999, 1e30)] + [jnp.zeros((1, 64))])
    held, scale = cache.quantized(x)
    wide = np.asarray(scale.astype(jnp.float32))
    assert np.abs(np.asarray(held, int)).max(axis=1).tolist()[:5] == pytest.approx([127] * 5, abs=1)
    assert (np.abs(np.asarray(held, np.float32) * wide - x) <= 0.5001 * wide).all()


def compiled_step(mesh, n_heads, n_kv, head_dim, keys, batch=1, cache_dtype=None, lengths=()):
    """A layer of a step of generation: a position is written into a cache that is given up, and the cache is read."""

    def placed(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())), tree
        )

    def step(held, q, k, v, length):
        held = held.append(k, v, length)
        return held, *decode(q, held, length + 1, return_lse=True)

    def shape(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype)

    with jax.set_mesh(mesh):
        held = jax.eval_shape(lambda: new_cache(batch, keys, n_heads, n_kv, head_dim, jnp.bfloat16, cache_dtype=cache_dtype))
        new = shape(batch, 1, n_kv, head_dim)
        arguments = held, shape(batch, n_heads, head_dim), new, new, shape(*lengths, dtype=jnp.int32)
        return jax.jit(step, donate_argnums=0).lower(*placed(arguments)).compile(), held


def held_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.needs("libtpu")
@pytest.mark.parametrize(
    ("chip", "n_heads", "n_kv", "head_dim", "keys", "cache_dtype", "lengths"),
    [
        ("v5e", 32, 8, 128, 128 * 1024, "bfloat16", (2,)),
        ("v6e", 8, 1, 64, 512 * 1024, "int8", ()),
        *(
            pytest.param(*rest, marks=pytest.mark.thorough)
            for rest in (
                *((chip, 8, 1, size, 512 * 1024, kind, ()) for chip in TPUS for size in (64, 128) for kind in CACHES),
                ("v5p", 32, 8, 64, 128 * 1024, "int8", (2,)),
                ("v6e", 32, 32, 128, 128 * 1024, "bfloat16", ()),
                ("v5e", 9, 3, 128, 128 * 1024, "int8", (2,)),
            )
        ),
    ],
)
def test_a_step_on_tpus_copies_and_pads_no_cache(chip, n_heads, n_kv, head_dim, keys, cache_dtype, lengths):
    batch = lengths[0] if lengths else 1
    compiled, held = compiled_step(machines.mesh(chip), n_heads, n_kv, head_dim, keys, batch, cache_dtype, lengths)
    assert "gqa_tpu_decode" in compiled.as_text()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 2**19
    assert memory.alias_size_in_bytes >= held_bytes(held)  # written in place
    assert memory.argument_size_in_bytes < 1.05 * held_bytes(held)  # as it lies there: scales of one head are padded to two


@pytest.mark.needs("jax-cuda13-plugin")
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("gpu", "n_heads", "n_kv", "head_dim", "keys"),
    [
        ("h200", 8, 1, 64, 512 * 1024),
        ("h200", 32, 8, 128, 100_001),
        ("l4", 8, 2, 128, 128 * 1024),
        ("a100", 32, 32, 64, 5000),
    ],
)
def test_a_step_on_gpus_copies_no_cache(gpu, n_heads, n_kv, head_dim, keys):
    compiled, held = compiled_step(machines.mesh(gpu), n_heads, n_kv, head_dim, keys)
    assert "gqa_triton_decode" in compiled.as_text()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= held_bytes(held)
    # the parts' outputs and log-sum-exps, once more for the weighted ones
    assert memory.temp_size_in_bytes < 3 * (decode_triton.PROGRAMS + n_kv) * n_heads // n_kv * head_dim * 4
