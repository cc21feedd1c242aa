import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_jax.planning import topologies
from gqa_jax.training import loss


def plain(hidden, embedding, targets):
    log_p = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, embedding), axis=-1)
    return -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]


def data(batch=3, length=11, d=8, vocab=50, scale=3.0):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(scale * rng.normal(size=(batch, length, d)), jnp.float32)
    embedding = jnp.asarray(rng.normal(size=(vocab, d)), jnp.float32)
    return hidden, embedding, jnp.asarray(rng.integers(vocab, size=(batch, length)))


@pytest.mark.parametrize("chunk_logits", [50 * 8, 50 * 16, 2**24])  # 33 tokens in chunks of 8 and 16 (they overlap), at once
def test_losses_and_gradients_equal_the_plain_form(monkeypatch, chunk_logits):
    monkeypatch.setattr(loss, "CHUNK_LOGITS_CPU", chunk_logits)
    hidden, embedding, targets = data()
    np.testing.assert_allclose(
        loss.token_losses(hidden, embedding, targets), plain(hidden, embedding, targets), rtol=1e-5, atol=1e-5
    )
    ours, ours_gradient = jax.value_and_grad(lambda h, e: 7 * loss.mean_loss(h, e, targets), argnums=(0, 1))(hidden, embedding)
    theirs, theirs_gradient = jax.value_and_grad(lambda h, e: 7 * plain(h, e, targets).mean(), argnums=(0, 1))(
        hidden, embedding
    )
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    for a, b in zip(ours_gradient, theirs_gradient, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_large_logits_stay_finite():
    hidden, embedding, targets = data(scale=1e4)
    value, gradient = jax.value_and_grad(loss.mean_loss)(hidden, embedding, targets)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_gradient_of_a_bfloat16_embedding_is_summed_in_float32(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS_CPU", 50 * 8)
    hidden, embedding, targets = data(batch=8, length=64, scale=1.0)
    narrow = hidden.astype(jnp.bfloat16), embedding.astype(jnp.bfloat16)
    _, d_hidden, d_embedding = loss.loss_and_gradients(*narrow, targets)
    assert (d_hidden.dtype, d_embedding.dtype) == (jnp.bfloat16, jnp.float32)
    exact = jax.grad(lambda h, e: plain(h, e, targets).mean(), argnums=1)(*(x.astype(jnp.float32) for x in narrow))
    rounded = jax.grad(loss.mean_loss, argnums=1)(*narrow, targets)
    assert rounded.dtype == jnp.bfloat16
    wrong, more_wrong = (float(jnp.linalg.norm(x.astype(jnp.float32) - exact)) for x in (d_embedding, rounded))
    assert wrong < 0.7 * more_wrong


def memory(function, tokens, d, vocab, dtype, mesh=None, donate=()):
    """memory_analysis of `function` of hidden states, embedding and targets."""
    sharding = mesh and jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = ((1, tokens, d), dtype), ((vocab, d), dtype), ((1, tokens), jnp.int32)
    arrays = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        # a function of its own: jax would give back the trace for another mesh
        compiled = jax.jit(lambda *arrays: function(*arrays), donate_argnums=donate).lower(*arrays).compile()
    return compiled.memory_analysis()


value_and_grad = jax.value_and_grad(loss.mean_loss, argnums=(0, 1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("function", "donate"), [(value_and_grad, 0), (loss.loss_and_gradients, 0), (value_and_grad, ()), (loss.token_losses, ())]
)
def test_temporary_memory_does_not_grow_with_the_tokens(function, donate, dtype):
    few, many = (memory(function, tokens, 64, 8192, dtype, donate=donate).temp_size_in_bytes for tokens in (2**13, 2**16))
    assert many == few
    assert few < 2**13 * 8192 * 4  # the logits of the few


@pytest.mark.parametrize(
    "device",
    [
        None,
        pytest.param("v5e", marks=pytest.mark.needs("libtpu")),
        pytest.param("h200", marks=pytest.mark.needs("jax-cuda13-plugin")),
    ],
)
def test_peak_memory_at_128k_tokens_is_under_1_gb_above_the_inputs(device):
    """The gradient of the hidden states, 0.8 GB, takes their place where they are given up; that of the embedding is 0.3 GB."""
    mesh = device and topologies.mesh(device)
    used = memory(value_and_grad, 131_072, 1536, 50_304, jnp.float32, mesh, donate=0)
    assert used.alias_size_in_bytes == 131_072 * 1536 * 4
    assert used.temp_size_in_bytes < 0.4e9
    assert used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes < 0.7e9
    forward = memory(loss.mean_loss, 131_072, 1536, 50_304, jnp.float32, mesh)
    assert forward.temp_size_in_bytes < 0.8e9


def test_chunks_on_a_cpu():
    assert loss._chunks(131_072, 50_304) == (512, 256)


@pytest.mark.needs("libtpu")
def test_chunks_are_larger_where_matmuls_are_fast():
    with jax.set_mesh(topologies.mesh("v5e")):
        assert loss._chunks(131_072, 50_304) == (128, 1024)
        assert loss._chunks(1000, 50_304) == (1, 1000)
