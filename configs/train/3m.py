"""The paper's smallest model (Table 9: 4 layers x 256, MHA) with its recipe, for a token store of GPT-2 ids.

60M tokens, 512K per step, 115 steps; T = 8K. The store needs that many tokens, for example

    python -m gqa_jax.data.prepare --help
    python -m gqa_jax.train --config=configs/train/3m.py --workdir=runs/3m --config.data.store=stores/mytext
"""

from gqa_jax.config import default_config
from gqa_jax.shapes import SIZES


def get_config():
    config = default_config()
    size = SIZES["3M"]
    config.label = "3M"
    config.tokens = size.tokens
    config.execution.accumulation_steps = 8
    config.model.update(n_layers=size.n_layers, d_model=size.d_model, n_heads=4, n_kv_heads=4)
    config.data.store = "stores/text-gpt2"
    config.optimizer.learning_rate = size.learning_rate
    return config
