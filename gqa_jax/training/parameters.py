"""Parameters outside of a training run: importing some of elsewhere, and a model to use."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from gqa_jax import model, storage
from gqa_jax.config import ModelConfig
from gqa_jax.data import catalog, tokenizer
from gqa_jax.data.vocabulary import Tokenizer, record_tokenizer
from gqa_jax.errors import ConfigError
from gqa_jax.training import loss, start
from gqa_jax.training.checkpoint import Checkpoints, Parameters, described, params_sha256, restore_start
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


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained or imported model, its parameters whole on the first device.

    Windows are one text each: where the model was trained with document masks, give it one document at a time.
    """

    config: ModelConfig
    params: dict[str, Any]  # as of gqa_jax.model.init_params
    tokenizer: Tokenizer | None  # of its vocabulary
    no_tokenizer: str | None  # why there is none
    start: Start  # the folder that it was read from

    def apply(self, tokens_BxT: jax.Array) -> jax.Array:
        """Logits (B, T, V), float32, of the token after each position; tokens are integers (B, T) below V."""
        return _logits(self.config, self.params, jnp.asarray(tokens_BxT, jnp.int32))

    def losses(self, tokens_BxT: jax.Array) -> jax.Array:
        """-log p of every token but the first, given those before it, (B, T - 1) float32 nats; logits are never all held."""
        return _losses(self.config, self.params, jnp.asarray(tokens_BxT, jnp.int32))


def load_model(folder: os.PathLike | str) -> LoadedModel:
    """The model of a run that is done, or of imported parameters; the folder is local or on gs://.

    Runs of any version are read. Those that kept no tokenizer have that of their token store, while it is there.

    Raises ConfigError: it is neither, that run is not done or diverged, or its last checkpoint is damaged.
    """
    source = start.of_folder(folder)
    params = restore_start(source, abstract(source.model))
    vocabulary = why = None
    try:
        if source.tokenizer is None and source.config is not None:
            vocabulary = catalog.tokenizer_of(source.config.data.store, source.data_fingerprint)
        else:
            vocabulary = tokenizer.of_run(folder)
    except (OSError, ValueError) as error:
        why = str(error)
    return LoadedModel(source.model, params, vocabulary, why, source)


@partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: dict, tokens_BxT: jax.Array) -> jax.Array:
    return model.with_params(config, params)(tokens_BxT)


@partial(jax.jit, static_argnums=0)
def _losses(config: ModelConfig, params: dict, tokens_BxT: jax.Array) -> jax.Array:
    transformer = model.with_params(config, params)
    x_BxTxD = transformer.embed(tokens_BxT[:, :-1])
    hidden_BxTxD, _ = transformer.hidden(x_BxTxD, jnp.arange(x_BxTxD.shape[1]))
    return loss.token_losses(hidden_BxTxD, model.unembedding(params), tokens_BxT[:, 1:])
