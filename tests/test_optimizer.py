import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gqa_jax import model
from gqa_jax.config import ModelConfig, OptimizerConfig
from gqa_jax.training import optimizer


def rates(n_steps=100, **fields):
    schedule = optimizer.learning_rate(OptimizerConfig(learning_rate=2.0, **fields), n_steps)
    return np.array([schedule(i) for i in range(n_steps)])


# Of the paper's own WSDScheduler (github.com/thunlp/cost-optimal-gqa, src/optim/lr_scheduler.py, with PyTorch 2.13) over the
# 120 steps of its 3M model: shares of the maximum that the steps are made with, 12 of warm-up and 24 of decay.
PAPER = [
    *(i / 12 for i in range(1, 13)),
    *[1.0] * 84,
    0.996150188, 0.984666622, 0.96574579, 0.939711432, 0.907009003, 0.868198052, 0.823942643, 0.775, 0.722207545, 0.66646857,
    0.608736786, 0.55, 0.491263214, 0.43353143, 0.377792455, 0.325, 0.276057357, 0.231801948, 0.192990997, 0.160288568,
    0.13425421, 0.115333378, 0.103849812, 0.1,
]  # fmt: skip


def test_every_rate_of_a_run_is_that_of_the_papers_scheduler():
    assert len(PAPER) == 120
    np.testing.assert_allclose(rates(120), 2.0 * np.array(PAPER), rtol=1e-6)
    assert rates(120).sum() == pytest.approx(2.0 * 103.25)


def test_a_warmup_from_zero_is_one_step_behind_and_all_else_as_it_was():
    """As runs of the first version were trained: their first batch changed nothing."""
    before = rates(120, warmup_from="zero")
    np.testing.assert_allclose(before[:13], 2.0 * np.arange(13) / 12, rtol=1e-6)
    np.testing.assert_array_equal(before[12:], rates(120)[12:])


def half_a_cosine(n):
    """From near 1 to a tenth at the last of n steps."""
    return 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * np.arange(1, n + 1) / n))


@pytest.mark.parametrize(("warmup_from", "warmup"), [("one", np.arange(1, 11)), ("zero", np.arange(10))])
def test_cosine_and_constant_have_the_same_warmup(warmup_from, warmup):
    cosine = rates(schedule="cosine", warmup_from=warmup_from)
    np.testing.assert_allclose(cosine, 2.0 * np.concatenate([warmup / 10, half_a_cosine(90)]), rtol=1e-5)
    constant = rates(schedule="constant", warmup_from=warmup_from)
    np.testing.assert_allclose(constant, 2.0 * np.concatenate([warmup / 10, np.ones(90)]), rtol=1e-6)


@pytest.mark.parametrize("warmup_from", ["one", "zero"])
def test_without_warmup_the_first_step_has_the_maximum(warmup_from):
    for fraction in (0.0, 0.004):  # of 100 steps: none
        rate = rates(warmup_fraction=fraction, warmup_from=warmup_from)
        np.testing.assert_allclose(rate, 2.0 * np.concatenate([np.ones(80), half_a_cosine(20)]), rtol=1e-5)


def test_a_warmup_of_one_step_is_none_unless_it_starts_from_zero():
    assert list(rates(warmup_fraction=0.01)[:2]) == [2.0, 2.0]
    assert list(rates(warmup_fraction=0.01, warmup_from="zero")[:2]) == [0.0, 2.0]


def test_weight_decay_reaches_matrices_only():
    """With zero gradients, AdamW only decays."""
    config = ModelConfig(n_layers=1, d_model=32, n_heads=2, n_kv_heads=1, head_dim=8, vocab_size=64, untied=True)
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


def test_wide_gradients_of_narrow_parameters_are_clipped_wide_and_applied_narrow():
    """The state is that of gradients in the parameters' dtype: checkpoints of before are read."""
    grads = {"a": jax.random.normal(jax.random.key(0), (64, 64)), "b": jnp.full(3, 0.5)}
    params = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.bfloat16), grads)
    config = OptimizerConfig(clip_norm=1.0)
    norm = np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in grads.values()))
    clipped, _ = optimizer._clip(config.clip_norm).update(grads, optax.EmptyState(), params)
    for name, grad in grads.items():
        expected = jnp.asarray(np.asarray(grad, np.float64) / norm).astype(jnp.bfloat16)
        assert np.mean(np.asarray(clipped[name]) == np.asarray(expected)) > 0.99  # rounded twice, a third of them differ

    tx = optimizer.adamw(config, 10)
    state = tx.init(params)
    updates, after = tx.update(grads, state, params)
    schedule = optimizer.learning_rate(config, 10)
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, mask=optimizer.decay_mask)).init(params)
    for found in (state, after):
        assert jax.tree.structure(found) == jax.tree.structure(plain)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(found)] == [(x.shape, x.dtype) for x in jax.tree.leaves(plain)]
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
