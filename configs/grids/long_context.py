"""Pretrain at 4K, continue at 128K (arXiv 2503.09579v2, Appendix J and Table 5): Llama-3's heads at 1.2B against (8,1) at 1.8B.

Both models train on 20B tokens at T = 4K and then, from those parameters with fresh optimizer state and a learning rate of
1e-5, on 1B tokens at T = 128K. The paper's claims: the loss approaches that of training at 128K from scratch (Figure 15), and
served at 128K the larger model with fewer heads reaches the loss of the smaller one with half of its memory and 42% of its
FLOPs (Figure 1), trains 1.7 times and infers 1.6 times as fast (Table 5). The learning rate of the first phase is that of 1.2B
(Table 9); of the second the paper says no more than 1e-5: here constant after 10% of warm-up, for the fresh moments. A second
phase starts when its first is done, and reads the tokens after those. Needs a pod; `plan` needs a laptop.

    python -m gqa_jax.data.prepare --out stores/slimpajama-gpt2 --tokenizer gpt2 SlimPajama/
    python -m launch plan configs/grids/long_context.py
    python -m launch run configs/grids/long_context.py
"""

from gqa_jax.config import default_config
from gqa_jax.shapes import LARGE_SHAPES, SIZES
from launch.grid import Grid, continued

MODELS = {"1.2B": (32, 8), "1.8B": (8, 1)}  # size: heads (Table 5)
CONTEXTS = 4096, 131_072
TOKENS = 20_000_000_000, 1_000_000_000


def pretraining(size, heads):
    config = default_config()
    n_layers, d_model = LARGE_SHAPES[size]
    config.label = size
    config.context_length = CONTEXTS[0]
    config.batch_tokens = 524_288
    config.tokens = TOKENS[0]
    config.model.update(n_layers=n_layers, d_model=d_model, n_heads=heads[0], n_kv_heads=heads[1])
    config.data.update(store="stores/slimpajama-gpt2", block_tokens=CONTEXTS[1])
    config.optimizer.learning_rate = SIZES["1.2B"].learning_rate
    return config


def get_grid():
    first = [pretraining(size, heads) for size, heads in MODELS.items()]
    second = [continued(c, context_length=CONTEXTS[1], learning_rate=1e-5, tokens=TOKENS[1]) for c in first]
    return Grid(name="long-context", configs=[*first, *second], contexts_served=[4096, 131_072])
