"""The quickstart's grid as the first version had it: runs of it (tests/goldens/quickstart-first-version.json.xz) must be found
for ever, whatever configs/grids/quickstart.py has become.
"""

from gqa_jax.config import default_config
from launch.grid import Grid, product

SIZES = {"30k": (2, 32), "90k": (3, 48), "190k": (4, 64)}  # layers, hidden size: one aspect ratio
CONTEXTS = [128, 512]
HEADS = [(4, 4), (4, 1), (1, 1)]
TOKENS = 200_000


def cell(size, context, heads):
    config = default_config()
    n_layers, d_model = SIZES[size]
    config.label = size
    config.context_length = context
    config.batch_tokens = 1024
    config.tokens = TOKENS
    config.model.update(n_layers=n_layers, d_model=d_model, n_heads=heads[0], n_kv_heads=heads[1], head_dim=16, vocab_size=320)
    config.model.update(dtype="float32", init_std=0.06)  # at these widths 0.02 leaves the first hundred steps on a plateau
    config.data.update(store="sotu-bytes", block_tokens=max(CONTEXTS))
    config.optimizer.learning_rate = 4e-3
    config.evaluation.tokens = 131_072
    config.checkpoint.every_steps = 100
    return config


def get_grid():
    return Grid(
        name="quickstart",
        configs=list(product(cell, size=SIZES, context=CONTEXTS, heads=HEADS)),
        contexts_served=[1024, 8192, 32_768, 131_072],
    )
