"""One cell of a grid, from the config.json of its run folder: how the launcher starts cells, and how to repeat one by hand.

python -m gqa_jax.train --config=configs/cell.py:runs/quickstart/cells/CELL/config.json --workdir=DIR
"""

import json

from gqa_jax.config import default_config


def get_config(path):
    config = default_config()
    with open(path) as file:
        config.update(json.load(file))
    return config
