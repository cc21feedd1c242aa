"""`convert-heads`: the model of a folder with other heads, in a new folder, and what that costs in loss at first."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from typing import Any

import jax
import numpy as np

from gqa_jax import costs, storage
from gqa_jax.config import HEAD_METHOD, DataConfig, EvaluationConfig, Execution, ModelConfig, TrainConfig
from gqa_jax.conversion import heads, hf_tokenizer
from gqa_jax.data import catalog, reader
from gqa_jax.data.store import TokenStore
from gqa_jax.data.vocabulary import RECORD
from gqa_jax.errors import ConfigError
from gqa_jax.formatting import short
from gqa_jax.inference.loaded import LoadedModel, load_model
from gqa_jax.planning import planner
from gqa_jax.training import evaluation, program, sharding, start
from gqa_jax.training.evaluation import Difference, Evaluation
from gqa_jax.training.parameters import require_new, write_import
from gqa_jax.training.start import Start

IMPORT_CONTEXT, IMPORT_TOKENS = 2048, 65_536  # of the loss of a model of elsewhere, where it is for longer contexts


@dataclasses.dataclass(frozen=True)
class Converted:
    """A model with other heads."""

    start: Start  # its folder
    source: Start  # whose it was
    method: str
    before: Evaluation | None  # None: no text to evaluate on is there
    after: Evaluation | None
    difference: Difference | None  # after - before, paired by documents
    no_loss: str | None  # why there is none

    def sentences(self) -> list[str]:
        """What became of the model: heads, parameters, cache, loss; and how it is trained on."""
        here, there = self.start.model, self.source.model
        how = _how(there, here, self.method)
        lines = [
            f"{self.start.folder}: {_heads(there)} heads to {_heads(here)} by {how}; {_params(there)} parameters to "
            f"{_params(here)}; cache {_cache(there)} to {_cache(here)} values a token",
        ]
        if self.before is None:
            lines.append(f"loss not known: {self.no_loss}")
        else:
            paired = "" if self.difference is None else f", {self.difference.estimate.value:+.4f}{_error(self.difference)}"
            lines.append(
                f"held-out loss {self.before.loss:.4f} before, {self.after.loss:.4f} after{paired} nats per token "
                f"({self.before.tokens:,} targets), before it is trained on"
            )
        return [
            *lines,
            f"train it on: --config.continue_from={self.start.folder}; in a grid: launch.grid.converted (docs/fewer-heads.md)",
        ]


def _heads(model: ModelConfig) -> str:
    return f"({model.n_heads},{model.n_kv_heads})"


def _how(there: ModelConfig, here: ModelConfig, method: str) -> str:
    if here.n_kv_heads == there.n_kv_heads:
        return "leaving query heads out"
    return method if here.n_kv_heads < there.n_kv_heads else "repetition"


def _params(model: ModelConfig) -> str:
    return short(costs.count_params(model, "exact").total)


def _cache(model: ModelConfig) -> str:
    return f"{2 * model.n_layers * model.n_kv_heads * model.head_dim:,}"


def _error(difference: Difference) -> str:
    error = difference.estimate.standard_error
    return "" if error is None else f" ± {error:.4f}"


def convert_heads(
    run: os.PathLike | str,
    out: os.PathLike | str,
    *,
    n_kv_heads: int | None = None,
    n_heads: int | None = None,
    method: str = HEAD_METHOD,
    store: str | None = None,
) -> Converted:
    """Writes the model of a run that is done, or of imported parameters, with other heads, as imported parameters.

    Args:
      run: a folder, local or on gs://. out: a new folder, likewise.
      n_kv_heads: key/value heads; fewer are pooled by `method`, more are repetitions. None: as many as there.
      n_heads: query heads, at most as many as there; those that write least are left out. None: all.
      method: of `gqa_jax.config.HEAD_METHODS`.
      store: token store whose held-out text the loss is of; None: that of the run.
    Raises:
      ConfigError: numbers of heads that can't be, the same ones; an unknown method; a folder that holds something.
    """
    require_new(out, "write into a new folder")
    heads.check_method(method)
    heads.target(start.of_folder(run).model, n_kv_heads, n_heads)  # before anything is read
    loaded = load_model(run)
    config = heads.target(loaded.config, n_kv_heads, n_heads)
    if config == loaded.config:
        raise ConfigError(f"n_kv_heads = {config.n_kv_heads}, n_heads = {config.n_heads}: the model has these heads already")
    params = jax.jit(partial(heads.convert, config=config, method=method))(loaded.params)
    losses, why = _evaluations(loaded, store, [(loaded.config, loaded.params), (config, params)])
    before, after = losses or (None, None)
    difference = losses and evaluation.difference(after.by_document, before.by_document)
    source = loaded.start
    said = f"of {source.identity}, {_heads(source.model)} heads to {_heads(config)} by {_how(source.model, config, method)}"
    said += f"; held-out loss {before.loss:.4f} before, {after.loss:.4f} after" if losses else ""
    kept = {name: storage.read_bytes(storage.path(source.folder) / RECORD / name) for name in hf_tokenizer.KEPT}
    found = write_import(
        out, config, params, provenance=said, tokenizer=loaded.tokenizer, context=source.context, stop=source.stop,
        files={name: content for name, content in kept.items() if content is not None},
    )  # fmt: skip
    return Converted(found, source, method, before, after, difference, why)


def _evaluations(
    loaded: LoadedModel, store: str | None, models: list[tuple[ModelConfig, dict[str, Any]]]
) -> tuple[list[Evaluation] | None, str | None]:
    """The loss of each model on the same held-out targets; or why there is none.

    Raises ConfigError where a store that was asked for can't be used.
    """
    config = loaded.start.config
    if config is None:
        if store is None:
            return None, "imported parameters have no text of their own: give a token store (--store)"
        context = min(loaded.context or IMPORT_CONTEXT, IMPORT_CONTEXT)
        tokens = max(1, IMPORT_TOKENS // context) * context
        config = TrainConfig(
            context_length=context, batch_tokens=8 * context, steps=1, model=loaded.config,
            data=DataConfig(store=store, block_tokens=context), evaluation=EvaluationConfig(tokens=tokens),
        )  # fmt: skip
    elif store is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, store=store))
    config = dataclasses.replace(
        config, steps=1, tokens=None, tokens_per_param=None, data=dataclasses.replace(config.data, skip_tokens=0),
        execution=Execution(),
    )  # fmt: skip
    try:
        text = catalog.open_store(config.data.store)
        reader.check(config, text)
    except ValueError as error:
        if store is not None:
            raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error
        return None, str(error)
    if loaded.start.tokenizer and loaded.start.tokenizer["sha256"] != text.vocabulary["sha256"]:
        raise ConfigError(
            f"--store {config.data.store} has another vocabulary than {loaded.start.folder}: prepare it with that one"
        )
    return [_evaluation(dataclasses.replace(config, model=model), params, text) for model, params in models], None


def _evaluation(config: TrainConfig, params: dict[str, Any], text: TokenStore) -> Evaluation:
    """As at the end of a run, on one device."""
    config = planner.resolve(config, jax.devices()[0].device_kind, 1, 1)
    _, held_out = reader.check(config, text)
    mesh = sharding.make_mesh(config.execution.mesh, jax.devices()[:1])
    losses_of, rows = program.evaluation_losses(config, mesh), np.arange(config.micro_batch)
    params = jax.device_put(
        params, jax.tree.map(lambda like: like.sharding, sharding.placed(params, mesh, config.model.n_kv_heads))
    )

    def token_losses(batch: dict[str, np.ndarray]) -> np.ndarray:
        inputs = {name: batch[name] for name in ("tokens", "targets", "segments") if name in batch}
        with jax.set_mesh(mesh):
            return np.asarray(losses_of(params, program.place(config, mesh, inputs, rows, 1)))

    return evaluation.evaluate(token_losses, held_out)
