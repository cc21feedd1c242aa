"""Parameters outside of a training run: importing some of elsewhere."""

from __future__ import annotations

import os
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from gqa_jax import model, storage
from gqa_jax.config import ModelConfig
from gqa_jax.data.vocabulary import Tokenizer, record_tokenizer
from gqa_jax.errors import ConfigError
from gqa_jax.training import start
from gqa_jax.training.checkpoint import Checkpoints, Parameters, described, params_sha256
from gqa_jax.training.start import Start


def write_import(
    folder: os.PathLike | str, config: ModelConfig, params: dict, *, provenance: str, tokenizer: Tokenizer | None = None
) -> Start:
    """Writes parameters into a new folder, local or on gs://, which `continue_from` and `gqa_jax.load_model` take.

    Args:
      params: nested dict of arrays, shapes and dtypes as of `gqa_jax.model.init_params(config, key)`.
      provenance: where they come from, for people; not part of the content hash.
      tokenizer: what their vocabulary means, kept with them; None: not known.
    Raises:
      ConfigError: the folder holds something, or the parameters are not those of `config`, naming the first that differs.
    """
    folder = storage.path(folder)
    if storage.names(folder):
        raise ConfigError(f"{folder} holds something: import into a new folder")
    params = jax.tree.map(jnp.asarray, params)
    ours, theirs = described(abstract(config)), described(params)
    for path in [*ours, *theirs]:
        if ours.get(path) != theirs.get(path):
            raise ConfigError(
                f"the parameters are not those of the configuration: {path} is {theirs.get(path, 'not there')}, must be "
                f"{ours.get(path, 'left out')}"
            )
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} entries, the model {config.vocab_size}")
    values = {"format": start.FORMAT, "version": start.VERSION, "model": config.identity()}
    values["params_sha256"] = params_sha256(params)
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(0, Parameters(jnp.int32(0), params), {"identity": dict(values)})
    if tokenizer is not None:
        record_tokenizer(folder, tokenizer)
    about = {"content": start.content_hash(values), "provenance": provenance}
    storage.write_json(folder / start.FILE, values | about)
    return start.of_folder(folder)


def abstract(config: ModelConfig) -> dict:
    """Shapes and dtypes of the parameters of a model, each whole on the first device."""
    here = SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(partial(model.init_params, config), jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)
