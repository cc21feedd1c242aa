"""AdamW and learning-rate schedules of the paper's recipe (arXiv 2503.09579v2, Appendix D)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from gqa_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, n_steps: int) -> optax.Schedule:
    """Learning rate of optimizer step 0 .. n_steps - 1.

    All schedules warm up linearly over the first W steps, `warmup_fraction` of all: step i has (i + 1) / W of the maximum as
    in the paper's own scheduler, or with `warmup_from` "zero" i / W, so that the first step trains nothing. Then "wsd" stays at
    the maximum and follows half a cosine over the last `decay_fraction` of the steps down to `final_lr_fraction` of it;
    "cosine" starts that half-cosine at the end of the warm-up; "constant" stays.
    """
    warmup = round(config.warmup_fraction * n_steps)
    ahead = {"one": 1, "zero": 0}[config.warmup_from]
    match config.schedule:
        case "wsd":
            decay = round(config.decay_fraction * n_steps)
        case "cosine":
            decay = n_steps - warmup
        case "constant":
            decay = 0
    decay_start = n_steps - decay

    def schedule(step):
        rising = jnp.minimum((step + ahead) / max(warmup, 1), 1.0) if warmup else 1.0
        progress = jnp.clip((step - decay_start + 1) / max(decay, 1), 0.0, 1.0)  # 1 at the last step
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress)) if decay else 1.0
        return config.learning_rate * rising * (config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine)

    return schedule


def adamw(config: OptimizerConfig, n_steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW with decoupled weight decay on matrices only.

    Gradients may be wider than the parameters (float32 for bfloat16): they are clipped as they are, and AdamW and its moments
    have the dtype of the parameters.
    """
    return optax.chain(
        _clip(config.clip_norm),
        optax.adamw(
            learning_rate(config, n_steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )


def _clip(max_norm: float) -> optax.GradientTransformation:
    """Clips by the global norm in the dtype of the gradients; what comes out has the dtype of the parameters. No state."""
    clip = optax.clip_by_global_norm(max_norm)

    def update(grads, state, params):
        clipped, state = clip.update(grads, state)
        return jax.tree.map(lambda grad, param: grad.astype(param.dtype), clipped, params), state

    return optax.GradientTransformation(clip.init, update)


def decay_mask(params: dict) -> dict:
    """True for matrices (embedding included), False for norm scales. By name: stacked scales have two axes as well."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith("_norm"), params)
