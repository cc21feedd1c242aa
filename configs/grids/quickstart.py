"""The whole method in a few minutes on a laptop: 3 sizes x 2 contexts x 3 head configurations on the State of the Union.

Byte-level models of 30K to 0.2M parameters: too small to say anything about large ones, large enough to see every step of
the search. Two CPU cores, two to three minutes, no download. Expected: 1.88 to 2.32 nats per byte, each on the same 131,072
targets from all 10 held-out documents, and within 0.003 of the loss on all of their text; README.md has the 18 losses.

    python -m launch run configs/grids/quickstart.py
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
