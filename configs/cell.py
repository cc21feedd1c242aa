"""One cell of a grid, from the config.json of its run folder: how the launcher starts cells, and how to repeat one by hand.

python -m gqa_jax.train --config=configs/cell.py:runs/quickstart/cells/CELL/config.json --workdir=DIR
"""

from gqa_jax import storage
from gqa_jax.config import TrainConfig, default_config
from gqa_jax.errors import ConfigError


def get_config(path):
    """The configuration in a config.json, on local disk or gs://."""
    values = storage.read_json(storage.path(path))
    if values is None:
        raise ConfigError(f"{path} is not there: give the config.json of a cell's folder, which `launch run` writes")
    config = default_config()
    config.update(TrainConfig.from_stored(values).to_dict())
    return config
