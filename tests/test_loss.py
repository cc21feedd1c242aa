import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_jax import loss


def plain(hidden, embedding, targets):
    log_p = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, embedding), axis=-1)
    return -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]


def data(batch=3, length=11, d=8, vocab=50, scale=3.0):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(scale * rng.normal(size=(batch, length, d)), jnp.float32)
    embedding = jnp.asarray(rng.normal(size=(vocab, d)), jnp.float32)
    return hidden, embedding, jnp.asarray(rng.integers(vocab, size=(batch, length)))


@pytest.mark.parametrize("chunk_logits", [50 * 8, 50 * 16, 2**24])  # 33 tokens in chunks of 8 and 16 (padded) and at once
def test_losses_and_gradients_equal_the_plain_form(monkeypatch, chunk_logits):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk_logits)
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


def test_logits_of_all_tokens_are_never_held():
    hidden, embedding, targets = data(batch=8, length=1024, d=16, vocab=8192)
    step = jax.jit(jax.value_and_grad(loss.mean_loss, argnums=(0, 1))).lower(hidden, embedding, targets).compile()
    all_logits = targets.size * embedding.shape[0] * 4
    assert step.memory_analysis().temp_size_in_bytes < all_logits / 1.5
