"""The paper's grid (arXiv 2503.09579v2): 8 sizes x 21 head configurations at T = 8K, with its recipe (Section 5.1, Appendix D).

Beside these 168 cells, the contexts of its figures: 3M to 1.2B are not all trained at every T there. Here, for Figures 3 and
12 to 14 (loss against n_h at T = 1K, 2K, 8K, 32K and 128K, n_kv = 1) and Figures 5 and 6 (loss against T), the sizes 470M, 680M
and 1.2B with n_h = 1 ... 32 and n_kv = 1. Tokens are the paper's per size, whatever H and T are. Needs a pod;
`plan` needs a laptop.

    python -m gqa_jax.data.prepare --out stores/slimpajama-gpt2 --tokenizer gpt2 SlimPajama/
    python -m launch plan configs/grids/paper.py
"""

from gqa_jax.config import default_config
from gqa_jax.shapes import HEAD_COUNTS, SIZES, head_configurations
from launch.grid import Grid, product

CONTEXT = 8192
FIGURE_CONTEXTS = [1024, 2048, 32_768, 131_072]
FIGURE_SIZES = ["470M", "680M", "1.2B"]


def cell(size, context, heads):
    config = default_config()
    shape = SIZES[size]
    config.label = size
    config.context_length = context
    config.batch_tokens = 524_288
    config.tokens = shape.tokens
    config.model.update(n_layers=shape.n_layers, d_model=shape.d_model, n_heads=heads[0], n_kv_heads=heads[1])
    config.data.update(store="stores/slimpajama-gpt2", block_tokens=131_072)
    config.optimizer.learning_rate = shape.learning_rate
    return config


def get_grid():
    figure_heads = [(n_heads, 1) for n_heads in HEAD_COUNTS]
    return Grid(
        name="paper",
        configs=[
            *product(cell, size=SIZES, context=[CONTEXT], heads=head_configurations()),
            *product(cell, size=FIGURE_SIZES, context=FIGURE_CONTEXTS, heads=figure_heads),
        ],
        contexts_served=[8192, 16_384, 32_768, 65_536, 131_072],
        losses=[3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4, 2.35],
    )
