"""Decoding: numerics against float64, of kernels in interpret mode, and kernels compiled for chips that need not be there."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gqa_jax.attention import attention, conformance, decode, decoding, interpreted, merge, resolve, unsupported_reason
from gqa_jax.attention.spec import Case
from gqa_jax.attention.tpu import decode as decode_tpu
from gqa_jax.attention.triton import decode as decode_triton
from tests import machines

IMPLEMENTATIONS = ["reference", "xla", "pallas_tpu", "pallas_triton"]
TPUS = ("v5e", "v5p", "v6e")


@pytest.fixture
def small(monkeypatch):
    """Blocks so small that a cache of hundreds has several, and two or three parts."""
    monkeypatch.setattr(decoding, "XLA_CHUNK", 64)
    monkeypatch.setattr(decode_triton, "choose", lambda case: decode_triton.Options(3, 32, 4, 2, case.interpreted))
    blocks = {True: 64 * 32, False: 128}  # rows of positions and heads, 32 of them at most, or positions
    monkeypatch.setattr(
        decode_tpu, "choose", lambda case: decode_tpu.Options(2, blocks[case.head_dim == 128], case.interpreted)
    )
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
    return jax.jit(functools.partial(decode, implementation=implementation, return_lse=True))


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
    loops = str(jax.make_jaxpr(lambda n: decode(q, k, v, n, implementation="xla"))(np.array([10, 20])))
    assert "while" in loops  # a bound that is known only when it runs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, n: (q[0], k, v, n), r"takes q \(B, N, H\)"),
        (lambda q, k, v, n: (q[:, :3], k, v, n), "multiple of key/value heads"),
        (lambda q, k, v, n: (q, k[..., :8], v[..., :8], n), "same batch and head size"),
        (lambda q, k, v, n: (q.astype(jnp.bfloat16), k, v, n), "one floating dtype"),
        (lambda q, k, v, n: (q.reshape(2, 1, 4, 16), k, v, n), "must have the K of the keys"),
        (lambda q, k, v, n: (q, k[:, :0], v[:, :0], n), "at least one"),
        (lambda q, k, v, n: (q, k, v, 11), "within the cache, 0 to 10"),
        (lambda q, k, v, n: (q, k, v, np.int32(11)), "within the cache, 0 to 10; got 11"),
        (lambda q, k, v, n: (q, k, v, np.array([3, 11])), r"within the cache, 0 to 10; got \[ 3 11\]"),
        (lambda q, k, v, n: (q, k, v, np.array([-1, 3])), "within the cache, 0 to 10"),
        (lambda q, k, v, n: (q, k, v, 2**40), "within the cache, 0 to 10"),
        (lambda q, k, v, n: (q, k, v, jnp.ones(3, jnp.int32)), r"integers \(2,\)"),
        (lambda q, k, v, n: (q, k, v, 1.0), "must be an integer"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = change(*problem(4, 2, 16, 10, dtype=jnp.float32), 5)
    with pytest.raises(ValueError, match=message):
        decode(*arguments)


def test_names_and_obstacles():
    arguments = *problem(4, 2, 16, 10, dtype=jnp.float32), 5
    with pytest.raises(ValueError, match="did you mean 'pallas_triton'"):
        decode(*arguments, implementation="pallas_tritn")
    with pytest.raises(ValueError, match=r"can't run here: pallas_tpu runs on TPUs, and this is cpu .*\. These can: ref"):
        decode(*arguments, implementation="pallas_tpu")
    case = Case("tpu", "TPU v5 lite", 1, 1, 1024, 8, 1, 128, jnp.dtype("bfloat16"), aligned=False, decode=True)
    assert resolve(None, case) == "pallas_tpu"
    assert resolve(None, case._replace(head_dim=256)) == "xla"
    assert resolve(None, case._replace(platform="gpu", chip="NVIDIA H200")) == "pallas_triton"
    assert "would need a copy" in unsupported_reason("pallas_tpu", case._replace(n_heads=9, n_kv_heads=3))


def compiled_decode(mesh, n_heads, n_kv, head_dim, keys, batch=1):
    def shape(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    q, cache, length = shape(batch, n_heads, head_dim), shape(batch, keys, n_kv, head_dim), shape(batch, dtype=jnp.int32)
    with jax.set_mesh(mesh):
        return jax.jit(functools.partial(decode, return_lse=True)).lower(q, cache, cache, length).compile()


@pytest.mark.needs("libtpu")
@pytest.mark.parametrize(
    ("chip", "n_heads", "n_kv", "head_dim", "keys"),
    [
        ("v5e", 32, 8, 128, 128 * 1024),
        ("v6e", 8, 1, 64, 512 * 1024),
        *(
            pytest.param(*rest, marks=pytest.mark.thorough)
            for rest in (
                *((chip, 8, 1, head_dim, 512 * 1024) for chip in TPUS for head_dim in (64, 128)),
                ("v5p", 32, 8, 64, 128 * 1024),
                ("v6e", 32, 32, 128, 128 * 1024),
                ("v5p", 8, 2, 128, 100_001),
            )
        ),
    ],
)
def test_compiles_for_tpus_without_a_copy_of_the_cache(chip, n_heads, n_kv, head_dim, keys):
    compiled = compiled_decode(machines.mesh(chip), n_heads, n_kv, head_dim, keys)
    assert "gqa_tpu_decode" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**19


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
def test_compiles_for_gpus(gpu, n_heads, n_kv, head_dim, keys):
    compiled = compiled_decode(machines.mesh(gpu), n_heads, n_kv, head_dim, keys)
    assert "gqa_triton_decode" in compiled.as_text()
    # the parts' outputs and log-sum-exps, once more for the weighted ones
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * (decode_triton.PROGRAMS + n_kv) * n_heads // n_kv * head_dim * 4
