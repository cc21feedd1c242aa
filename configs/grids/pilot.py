"""What noise is: three seeds x three head configurations at two sizes and two lengths of training, on real text.

About 45 minutes of one CPU core.

How far runs of one recipe differ by their seed, and how far the heads of a size deviate together, sets the priors of the laws
(`gqa_jax.laws.posterior`). Byte-level models, d_h = 16, T = 512, batches of 2,048 tokens and init_std = 0.06: with batches of
8,192 and 0.02 such small runs stay on a plateau for hundreds of steps, and which heads are better is a matter of chance.

    python -m launch run configs/grids/pilot.py
    python -m benchmarks.pilot runs/pilot --out results/pilot     # the tables and what they say
"""

from gqa_jax.config import default_config
from launch.grid import Grid, product

SIZES = {"a": (2, 32), "b": (2, 48)}  # layers, hidden size
HEADS = [(1, 1), (8, 1), (8, 8)]
SEEDS = [0, 1, 2]
BATCH_TOKENS = 2048
LEAST_STEPS, LONG_STEPS = 400, 1500


def steps(size, long):
    n_layers, d_model = SIZES[size]
    return LONG_STEPS if long else max(LEAST_STEPS, round(20 * 12 * n_layers * d_model**2 / BATCH_TOKENS))  # 20 D / N


def cell(size, heads, seed, long):
    config = default_config()
    n_layers, d_model = SIZES[size]
    config.label, config.seed = f"{size}-long" if long else size, seed
    config.context_length = 512
    config.batch_tokens = BATCH_TOKENS
    config.tokens = steps(size, long) * BATCH_TOKENS
    config.model.update(n_layers=n_layers, d_model=d_model, n_heads=heads[0], n_kv_heads=heads[1], head_dim=16, vocab_size=320)
    config.model.update(dtype="float32", init_std=0.06)
    config.data.update(store="sotu-bytes", block_tokens=512)
    config.optimizer.learning_rate = 6e-3
    config.evaluation.tokens = 262_144
    config.checkpoint.every_steps = 1000
    return config


def get_grid():
    return Grid(
        name="pilot",
        configs=list(product(cell, long=[False, True], seed=SEEDS, size=SIZES, heads=HEADS)),
        contexts_served=[512, 8192, 131_072],
    )
