"""A model of 0.1M parameters on the State of the Union addresses, byte by byte: the first thing to run.

Needs nothing but this checkout; well under a minute on two CPU cores. Expected: 1.761 nats (2.540 bits) per byte, ± 0.042 over
10 of the 10 held-out documents; on all of their text 1.757.

    python -m gqa_jax.train --config=configs/train/tiny.py --workdir=runs/tiny
"""

from gqa_jax.config import default_config


def get_config():
    config = default_config()
    config.label = "tiny"
    config.context_length = 256
    config.batch_tokens = 2048
    config.steps = 250
    config.model.update(n_layers=2, d_model=64, n_heads=4, n_kv_heads=1, head_dim=16, vocab_size=320, dtype="float32")
    config.model.init_std = 0.06
    config.data.update(store="sotu-bytes", block_tokens=1024)
    config.optimizer.learning_rate = 4e-3
    config.evaluation.tokens = 65_536
    config.checkpoint.every_steps = 100
    return config
