"""Which method makes one key/value head of several: 3 seeds x 2 sizes of (4,4), made (4,2) and (4,1), trained on for 5 and 20%.

Cells of the quickstart at T = 512, and what `convert-heads` calls mean, scaled_mean and first (`gqa_jax.conversion.heads`).
About 25 minutes of two CPU cores; results/fewer-heads has what came out.

    python -m launch run configs/grids/head_methods.py
    python -m benchmarks.fewer_heads methods runs/head-methods
"""

from configs.grids.quickstart import cell
from gqa_jax.config import HEAD_METHODS
from launch.grid import Grid, converted, product

CONTEXT, HEADS = 512, (4, 4)
SIZES, SEEDS = ("90k", "190k"), (0, 1, 2)
FEWER, SHARES = (2, 1), (0.05, 0.2)


def first(size, seed):
    config = cell(size, CONTEXT, HEADS)
    config.seed = seed
    return config


def get_grid():
    firsts = list(product(first, size=SIZES, seed=SEEDS))
    children = [
        converted(one, n_kv_heads, share, method=method)
        for one in firsts
        for n_kv_heads in FEWER
        for method in HEAD_METHODS
        for share in SHARES
    ]
    return Grid(name="head-methods", configs=[*firsts, *children], contexts_served=[8192, 131_072])
