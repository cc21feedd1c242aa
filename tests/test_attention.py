import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_jax import attention
from tests import llama_numpy


def qkv(n_heads, n_kv, *, batch=2, length=7, head_dim=8, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = [(batch, length, n, head_dim) for n in (n_heads, n_kv, n_kv)]
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(("n_heads", "n_kv"), [(1, 1), (4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("length", [1, 7, 140])  # 140: blocks of 128 and 12 queries
def test_equals_independent_float64(implementation, n_heads, n_kv, length):
    q, k, v = qkv(n_heads, n_kv, length=length)
    expected = llama_numpy.attention(q.astype(np.float64), k.astype(np.float64), v.astype(np.float64))
    out = attention.attention(q, k, v, implementation=implementation)
    np.testing.assert_allclose(out, expected, rtol=5e-5, atol=5e-6)


@pytest.mark.parametrize("length", [140, 1100])  # 1100: eight blocks of 138
def test_gradients_of_the_implementations_agree(length):
    q, k, v = qkv(4, 2, length=length)
    gradients = [
        jax.grad(lambda *x, name=name: (attention.attention(*x, implementation=name) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)
        for name in ("reference", "xla")
    ]
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_blocks_save_matmul_flops():
    q, k, v = qkv(2, 1, length=512)
    flops = {
        name: jax.jit(lambda *x, name=name: attention.attention(*x, implementation=name))
        .lower(q, k, v)
        .cost_analysis()["flops"]
        for name in ("reference", "xla")
    }
    assert flops["xla"] < 0.65 * flops["reference"]


def test_grouped_equals_multi_head_with_repeated_keys():
    q, k, v = qkv(6, 2)
    repeated = attention.attention(q, np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2))
    np.testing.assert_allclose(attention.attention(q, k, v), repeated, rtol=1e-6, atol=1e-6)


def test_large_logits_stay_finite_and_pick_the_largest():
    q, k, v = qkv(2, 1)
    q, k = 300 * q, 300 * k
    out = attention.attention(q, k, v)
    expected = llama_numpy.attention(q.astype(np.float64), k.astype(np.float64), v.astype(np.float64))
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)


def test_bfloat16_keeps_its_dtype_and_softmax_in_float32():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(4, 2, length=64))
    out = attention.attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    exact = llama_numpy.attention(*(np.asarray(x, np.float64) for x in (q, k, v)))
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=2e-2)


def test_no_gradient_to_the_future():
    q, k, v = qkv(4, 2)
    gradient = jax.grad(lambda k, v: attention.attention(q, k, v)[:, 3].sum(), argnums=(0, 1))(k, v)
    for g in gradient:
        assert np.all(np.asarray(g)[:, 4:] == 0)
        assert np.any(np.asarray(g)[:, :4] != 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[:, :, :3], k, v), "multiple of key/value heads"),
        (lambda q, k, v: (q, k[:, :5], v[:, :5]), "as many keys as queries"),
        (lambda q, k, v: (q, k[..., :4], v[..., :4]), "same batch and head size"),
        (lambda q, k, v: (q[0], k, v), r"takes q \(B, T, N, H\)"),
        (lambda q, k, v: (q.astype(np.float16), k, v), "one floating dtype"),
    ],
)
def test_bad_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        attention.attention(*change(*qkv(4, 2)))


def test_unknown_implementation_names_the_closest():
    with pytest.raises(ValueError, match="did you mean 'reference'"):
        attention.attention(*qkv(4, 2), implementation="referense")
