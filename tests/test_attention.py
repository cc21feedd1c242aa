import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from gqa_jax import attention
from gqa_jax.attention import conformance, xla
from gqa_jax.attention.spec import Mask
from tests import attention_cases as cases
from tests import llama_numpy

EVERYWHERE = ["reference", "xla"]
quick = hypothesis.settings(max_examples=10, deadline=None, derandomize=True)


def qkv(n_heads, n_kv, *, batch=2, length=7, keys=None, head_dim=8, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    lengths = (length, keys or length, keys or length)
    return [rng.normal(size=(batch, t, n, head_dim)).astype(dtype) for t, n in zip(lengths, (n_heads, n_kv, n_kv), strict=True)]


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize(
    ("n_heads", "n_kv", "length"),
    [(1, 1, 7), (4, 4, 140), (4, 2, 1100), (6, 1, 1), (6, 1, 140)],  # 140: blocks of 128 and 12 queries; 1100: chunks in a loop
)
def test_equals_independent_float64(implementation, n_heads, n_kv, length):
    q, k, v = qkv(n_heads, n_kv, length=length, batch=1)
    expected = llama_numpy.attention(q.astype(np.float64), k.astype(np.float64), v.astype(np.float64))
    out = jax.jit(functools.partial(attention.attention, implementation=implementation))(q, k, v)
    np.testing.assert_allclose(out, expected, rtol=5e-5, atol=5e-6)


def test_oracle_equals_independent_float64():
    q, k, v = qkv(4, 2, length=30, dtype=np.float64)
    out, _ = conformance.exact(q.reshape(2, 30, 2, 2, 8), k, v)
    np.testing.assert_allclose(out.reshape(q.shape), llama_numpy.attention(q, k, v), rtol=1e-12, atol=1e-14)


def test_oracle_gradients_are_finite_differences():
    rng = np.random.default_rng(1)
    shapes = [(2, 6, 2, 3, 4), (2, 9, 2, 4), (2, 9, 2, 4)]
    how = {"q_offset": 2, "kv_offset": 3, "q_segments": [[0] * 3 + [1] * 3, [1] * 6], "kv_segments": [[0] * 4 + [1] * 5] * 2}
    arrays, directions = ([rng.normal(size=s) for s in shapes] for _ in range(2))
    d_out, d_lse = rng.normal(size=shapes[0]), rng.normal(size=(2, 2, 3, 6))

    def value(step):
        out, lse = conformance.exact(*(x + step * d for x, d in zip(arrays, directions, strict=True)), **how)
        seen = np.isfinite(lse)
        return (out * d_out).sum() + (lse[seen] * d_lse[seen]).sum()

    seen = np.isfinite(conformance.exact(*arrays, **how)[1])
    gradients = conformance.exact_gradients(*arrays, d_out, np.where(seen, d_lse, 0), **how)
    along = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    np.testing.assert_allclose((value(1e-5) - value(-1e-5)) / 2e-5, along, rtol=1e-7)


def test_five_axes_are_four():
    q, k, v = qkv(6, 2, length=9)
    four, lse_four = attention.attention(q, k, v, return_lse=True)
    five, lse_five = attention.attention(q.reshape(2, 9, 2, 3, 8), k, v, return_lse=True)
    np.testing.assert_array_equal(four, five.reshape(four.shape))
    np.testing.assert_array_equal(lse_four, lse_five.reshape(lse_four.shape))
    assert lse_four.shape == (2, 9, 6)


@pytest.mark.parametrize("length", [140, 1100])
def test_blocks_save_matmul_flops(length):
    q, k, v = qkv(2, 1, length=length)
    programs = {
        name: jax.jit(lambda *x, name=name: attention.attention(*x, implementation=name)).lower(q, k, v) for name in EVERYWHERE
    }
    if length <= 1024:  # a loop's body is counted once
        flops = {name: program.cost_analysis()["flops"] for name, program in programs.items()}
        assert flops["xla"] < 0.85 * flops["reference"]
    memory = {name: program.compile().memory_analysis().temp_size_in_bytes for name, program in programs.items()}
    assert memory["xla"] < memory["reference"]


def test_memory_at_8k_is_under_300_mb():
    q, k, v = (jax.ShapeDtypeStruct((1, 8192, n, 64), jnp.float32) for n in (8, 1, 1))
    step = jax.jit(jax.grad(lambda q, k, v: attention.attention(q, k, v, implementation="xla").sum(), argnums=(0, 1, 2)))
    memory = step.lower(q, k, v).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes < 300e6


# Properties.

# Of few shapes: each is compiled, once.
attend = jax.jit(attention.attention, static_argnames=("implementation", "return_lse"))
shapes = st.tuples(st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]), st.sampled_from([2, 77, 129, 300]), st.integers(0, 2**31))


@quick
@hypothesis.given(shapes, st.floats(0, 1))
def test_causality_is_bit_exact(shape, where):
    (n_heads, n_kv), length, seed = shape
    q, k, v = qkv(n_heads, n_kv, length=length, seed=seed, batch=1)
    t = int(where * (length - 1))
    changed = [x.copy() for x in (q, k, v)]
    for x in changed:
        x[:, t:] += 1
    before, after = (attend(*x, implementation="xla") for x in ((q, k, v), changed))
    np.testing.assert_array_equal(before[:, :t], after[:, :t])
    assert not np.array_equal(before[:, t:], after[:, t:])


@quick
@hypothesis.given(shapes)
def test_grouped_equals_multi_head_with_repeated_keys(shape):
    (n_heads, n_kv), length, seed = shape
    q, k, v = qkv(n_heads, n_kv, length=length, seed=seed, batch=1)
    repeated = attend(q, *(np.repeat(x, n_heads // n_kv, axis=2) for x in (k, v)))
    np.testing.assert_allclose(attend(q, k, v), repeated, rtol=2e-6, atol=2e-6)


@quick
@hypothesis.given(shapes, st.lists(st.sampled_from([1, 76, 128, 299]), max_size=3))
def test_parts_of_the_keys_merge_to_the_whole(shape, cuts):
    (n_heads, n_kv), length, seed = shape
    q, k, v = qkv(n_heads, n_kv, length=length, seed=seed, batch=1)
    whole, whole_lse = attend(q, k, v, return_lse=True)
    edges = sorted({0, length, *(c for c in cuts if c < length)})
    parts = [attend(q, k[:, a:b], v[:, a:b], kv_offset=jnp.int32(a), return_lse=True) for a, b in itertools.pairwise(edges)]
    out, lse = attention.merge(*(jnp.stack([part[n] for part in parts]) for n in (0, 1)))
    np.testing.assert_allclose(out, whole, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(lse, whole_lse, rtol=2e-6, atol=2e-6)


@quick
@hypothesis.given(st.integers(1, 3), st.sampled_from([4, 33]), st.integers(0, 2**31))
def test_zigzag_pieces_equal_contiguous_queries(devices, piece, seed):
    """Device i holds query pieces i and 2 n - 1 - i, and knows where they lie only by traced offsets."""
    q, k, v = qkv(4, 2, length=2 * devices * piece, seed=seed, batch=1)
    whole = attend(q, k, v)
    for i in range(2 * devices):
        mine = slice(i * piece, (i + 1) * piece)
        part = attend(q[:, mine], k, v, q_offset=jnp.int32(i * piece))
        np.testing.assert_allclose(part, whole[:, mine], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_documents_equal_separate_documents(implementation):
    q, k, v = qkv(4, 2, length=150, batch=1)
    ids = np.repeat([5, 2, 9], [30, 100, 20])[None]
    packed = attention.attention(q, k, v, implementation=implementation, segment_ids=ids)
    for start, stop in ((0, 30), (30, 130), (130, 150)):
        alone = attention.attention(*(x[:, start:stop] for x in (q, k, v)), implementation=implementation)
        np.testing.assert_allclose(packed[:, start:stop], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_no_gradient_to_the_future(implementation):
    q, k, v = qkv(4, 2)
    gradient = jax.grad(lambda k, v: attention.attention(q, k, v, implementation=implementation)[:, 3].sum(), argnums=(0, 1))(
        k, v
    )
    for g in gradient:
        assert np.all(np.asarray(g)[:, 4:] == 0)
        assert np.any(np.asarray(g)[:, :4] != 0)


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_triton"])
def test_kernels_by_name_where_pallas_interprets(implementation):
    q, k, v = qkv(4, 2, length=150, head_dim=16)
    ids = cases.segments(150, batch=2)
    expected = attention.attention(q, k, v, implementation="xla", segment_ids=ids)
    with attention.interpreted():
        got = attention.attention(q, k, v, implementation=implementation, segment_ids=ids)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)
    assert not np.array_equal(got, expected)  # another program


# What is refused.

ids = np.zeros((2, 7), np.int32)


@pytest.mark.parametrize(
    ("change", "how", "message"),
    [
        (lambda q, k, v: (q[:, :, :3], k, v), {}, "multiple of key/value heads"),
        (lambda q, k, v: (q, k[:, :5], v[:, :5]), {}, r"as many keys as queries \(S = T\), or q_offset and kv_offset"),
        (lambda q, k, v: (q, k[..., :4], v[..., :4]), {}, "same batch and head size"),
        (lambda q, k, v: (q[0], k, v), {}, r"takes q \(B, T, N, H\)"),
        (lambda q, k, v: (q[:, :, :, None], k, v), {}, "must have the K of the keys"),
        (lambda q, k, v: (q[:, :0], k, v), {}, "at least one query"),
        (lambda q, k, v: (q.astype(np.float16), k, v), {}, "one floating dtype"),
        (lambda q, k, v: (q.astype(int), k.astype(int), v.astype(int)), {}, "one floating dtype"),
        (lambda q, k, v: (q, k, v), {"segment_ids": ids[:, :5]}, r"segment_ids must be integers of shape \(2, 7\)"),
        (lambda q, k, v: (q, k, v), {"segment_ids": ids.astype(np.float32)}, "segment_ids must be integers"),
        (lambda q, k, v: (q, k, v), {"segment_ids": (ids, None)}, "or a pair of arrays"),
        (lambda q, k, v: (q, k, v), {"segment_ids": ids + np.int64(2**32)}, "within int32; got 4294967296 to 4294967296"),
        (lambda q, k, v: (q, k[:, :5], v[:, :5]), {"segment_ids": ids, "q_offset": 2}, "must be a pair"),
        (lambda q, k, v: (q, k, v), {"q_offset": 1.5}, "q_offset must be an integer scalar"),
        (lambda q, k, v: (q, k, v), {"kv_offset": np.zeros(2, int)}, "kv_offset must be an integer scalar"),
        (lambda q, k, v: (q, k, v), {"scale": 0}, "scale must be a positive Python number"),
        (lambda q, k, v: (q, k, v), {"implementation": "referense"}, "did you mean 'reference'"),
        (lambda q, k, v: (q, k, v), {"implementation": "flash"}, "allowed: reference, xla"),
        (lambda q, k, v: (q, k, v), {"implementation": "pallas_gpu"}, "can't run here: .* These can: reference, xla"),
        (lambda q, k, v: (q, k, v), {"implementation": "cudnn"}, "can't run here: .*NVIDIA GPU"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_tracing(change, how, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *x: attention.attention(*x, **how), *change(*qkv(4, 2)))


def test_segment_ids_of_64_bits_are_refused_where_they_are_not_known():
    q, k, v = qkv(4, 2)
    with jax.enable_x64(True), pytest.raises(ValueError, match="integers of 32 bits; got int64: number the documents in int32"):
        jax.eval_shape(lambda ids: attention.attention(q, k, v, segment_ids=ids), jnp.zeros((2, 7), jnp.int64))


def test_offsets_of_numpy_are_known_ones():
    q, k, v = qkv(4, 2, length=9)
    shapes = [str(jax.make_jaxpr(lambda *x, n=n: attention.attention(*x, q_offset=n, kv_offset=n))(q, k, v))
              for n in (5, np.int32(5), np.array(5), jnp.int32(5))]  # fmt: skip
    assert shapes[0] == shapes[1] == shapes[2] != shapes[3]


@pytest.mark.parametrize(
    ("sizes", "options"),
    [((2, 512, 8), (128, None)), ((1, 8192, 8), (256, 256)), ((4, 8192, 8), (128, 256)), ((8, 8192, 32), (64, 256))],
)
def test_tiles_of_xla_are_of_4_mb_unless_they_would_be_thin(sizes, options):
    assert xla.choose(*sizes) == options


def test_none_takes_what_the_platform_does_best():
    case = attention.Case.planned(batch=1, length=4096, n_heads=8, n_kv_heads=1, head_dim=64, dtype=jnp.bfloat16)
    assert attention.resolve(None, case) == "xla"
    assert attention.resolve(None, case._replace(platform="tpu", chip="TPU v5 lite")) == "pallas_tpu"
    assert attention.resolve(None, case._replace(platform="tpu", chip="TPU v5 lite", head_dim=40)) == "xla"
    assert attention.resolve(None, case._replace(platform="gpu", chip="NVIDIA H200")) == "cudnn"
    assert attention.resolve(None, case._replace(platform="gpu", chip="NVIDIA H200", return_lse=True)) == "pallas_triton"
    assert attention.resolve(None, case._replace(platform="gpu", chip="NVIDIA A100", segments=True)) == "pallas_triton"


def test_masks_say_when_they_are_aligned():
    assert Mask().aligned
    assert Mask(3, 3).aligned
    assert not Mask(3, 0).aligned
    assert not Mask(jnp.int32(0), 0).aligned
