import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gqa_jax import model, optimizer
from gqa_jax.config import ModelConfig, OptimizerConfig


def rates(n_steps=100, **fields):
    schedule = optimizer.learning_rate(OptimizerConfig(learning_rate=2.0, **fields), n_steps)
    return np.array([schedule(i) for i in range(n_steps)])


def test_wsd_is_linear_constant_then_half_a_cosine_to_a_tenth():
    rate = rates()
    np.testing.assert_allclose(rate[:11], 0.2 * np.arange(11), rtol=1e-6)
    np.testing.assert_allclose(rate[10:80], 2.0)
    progress = np.arange(1, 21) / 20
    np.testing.assert_allclose(rate[80:], 2.0 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * progress))), rtol=1e-5)
    assert rate[-1] == pytest.approx(0.2)


def test_cosine_and_constant():
    cosine = rates(schedule="cosine")
    assert cosine[10] > cosine[50] > cosine[99] == pytest.approx(0.2)
    assert set(rates(schedule="constant")[10:]) == {2.0}


def test_schedule_without_warmup_starts_at_the_maximum():
    assert rates(warmup_fraction=0.0)[0] == 2.0


def test_weight_decay_reaches_matrices_only():
    """With zero gradients, AdamW only decays."""
    config = ModelConfig(n_layers=1, d_model=32, n_heads=2, n_kv_heads=1, head_dim=8, vocab_size=64)
    params = model.init_params(config, jax.random.key(0))
    tx = optimizer.adamw(OptimizerConfig(learning_rate=0.5, warmup_fraction=0.0, schedule="constant"), 10)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    flat, flat_new = jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(new)
    for (path, before), after in zip(flat, flat_new, strict=True):
        factor = 1.0 if "norm" in jax.tree_util.keystr(path) else 1 - 0.5 * 0.1
        np.testing.assert_allclose(after, factor * before, rtol=1e-6, err_msg=jax.tree_util.keystr(path))


def test_gradients_are_clipped_to_the_global_norm():
    """SGD-like check through the first moment: (1 - b1) * clipped gradient."""
    params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(3)}
    grads = {"a": jnp.full((2, 2), 3.0), "b": jnp.full(3, -4.0)}
    tx = optimizer.adamw(OptimizerConfig(clip_norm=1.0), 10)
    _, state = tx.update(grads, tx.init(params), params)
    moments = optax.tree.get(state, "mu")
    assert float(optax.tree.norm(moments)) == pytest.approx(0.1, rel=1e-5)
