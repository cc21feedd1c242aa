"""A trained or imported model to use: its logits, its losses, and text that it generates."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from functools import partial
from operator import index
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gqa_jax import model
from gqa_jax.config import ModelConfig
from gqa_jax.data import catalog, tokenizer
from gqa_jax.data.vocabulary import Tokenizer
from gqa_jax.errors import ConfigError
from gqa_jax.formatting import counted, gb
from gqa_jax.inference.engine import Engine, Plan
from gqa_jax.inference.sampling import Sampling
from gqa_jax.training import loss, start
from gqa_jax.training.checkpoint import restore_start
from gqa_jax.training.parameters import abstract
from gqa_jax.training.start import Start

MAX_NEW_TOKENS = 128
CACHE_DTYPES = ("float32", "bfloat16", "int8")
ROOM = 0.9  # of a device's free memory that weights and caches may take


@dataclasses.dataclass(frozen=True)
class Generation:
    """What follows a prompt."""

    tokens: list[int]  # without the stop token that ended it
    text: str | None  # None: the model has no tokenizer
    finish: str  # "stop": at a stop token; "length": after max_new_tokens
    n_prompt_tokens: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


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
    _engines: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def apply(self, tokens_BxT: jax.Array) -> jax.Array:
        """Logits (B, T, V), float32, of the token after each position; tokens are integers (B, T) below V."""
        return _logits(self.config, self.params, jnp.asarray(tokens_BxT, jnp.int32))

    def losses(self, tokens_BxT: jax.Array) -> jax.Array:
        """-log p of every token but the first, given those before it, (B, T - 1) float32 nats; logits are never all held."""
        return _losses(self.config, self.params, jnp.asarray(tokens_BxT, jnp.int32))

    @property
    def context(self) -> int | None:
        """Tokens of the context that it was trained at; None: not known, of an import."""
        return self.start.context

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int = MAX_NEW_TOKENS,
        **options: Any,
    ) -> Any:
        """What follows each prompt: a `Generation` for one text, a list of them for several. Prompts are read together.

        Args:
          prompts: texts, or lists of ids; at least one token each.
          max_new_tokens: most tokens of an answer.
          temperature, top_k, top_p, seed: see `gqa_jax.inference.sampling.Sampling`; the likeliest token by default.
          stop: ids that end an answer; None: those of an import, or the tokenizer's end of a document.
          context: most tokens of a prompt and its answer; None: of what it was trained at. More is allowed, and it was not
            trained for it.
          cache_dtype: float32, bfloat16 or int8; None: the dtype of the model.
          dtype: of the computation; None: that of the model. On CPUs float32 is faster than bfloat16.
          mesh: devices that share the model, as "tensor=4,context=2"; None: one.

        Raises:
          ConfigError: a prompt that is empty, too long, or has ids beyond the vocabulary; texts without a tokenizer; a batch
            that doesn't fit.
        """
        *_, last = self.stream(prompts, max_new_tokens, segment=None, **options)
        return last[0] if isinstance(prompts, str) else last

    def stream(
        self, prompts: str | Sequence[str] | Sequence[Sequence[int]], max_new_tokens: int = MAX_NEW_TOKENS, *,
        temperature: float = 0.0, top_k: int | None = None, top_p: float = 1.0, seed: int = 0,
        stop: Sequence[int] | None = None, context: int | None = None, cache_dtype: str | None = None,
        dtype: str | None = None, mesh: str | None = None, segment: int | None = 32,
    ) -> Iterator[list[Generation]]:  # fmt: skip
        """As `generate`, a list for what there is so far, again and again until it is whole."""
        rule = Sampling(temperature, top_k, top_p, seed)
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens = {max_new_tokens!r}: must be an integer of at least 1")
        ids = self._ids([prompts] if isinstance(prompts, str) else prompts)
        self._check_lengths(ids, max_new_tokens, context)
        if stop is None:
            stop = self.start.stop or ([] if self.tokenizer is None else [self.tokenizer.eos_id])
        self._check_ids("stop", stop)
        engine = self.engine(cache_dtype=cache_dtype, dtype=dtype, mesh=mesh)
        require_room(engine, engine.plan([len(one) for one in ids], max_new_tokens, rule.kind))
        for found in engine.stream(ids, max_new_tokens, rule, stop, segment):
            yield [self._generation(len(one), row, stop) for one, row in zip(ids, found, strict=True)]

    def engine(self, *, cache_dtype: str | None = None, dtype: str | None = None, mesh: str | None = None) -> Engine:
        """The programs that generate, kept; arguments as of `generate`."""
        if cache_dtype not in (None, *CACHE_DTYPES):
            raise ConfigError(f"cache_dtype = {cache_dtype!r}: use {', '.join(CACHE_DTYPES)}, or None for that of the model")
        key = cache_dtype, dtype, mesh
        if key not in self._engines:
            config = self.config if dtype is None else dataclasses.replace(self.config, dtype=dtype)
            n_ids = None if self.tokenizer is None else self.tokenizer.vocab_size
            try:
                self._engines[key] = Engine(config, self.params, n_ids=n_ids, cache_dtype=cache_dtype, mesh=mesh)
            except ValueError as error:
                raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error
        return self._engines[key]

    def _ids(self, prompts: Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]]:
        """Ids of each prompt, checked."""
        if not len(prompts):
            raise ConfigError("no prompts: give at least one")
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if texts and self.tokenizer is None:
            raise ConfigError(
                f"a prompt of text needs a tokenizer: {self.no_tokenizer}. Give the one that it was trained with "
                "(load_model(folder, tokenizer=...), --tokenizer), or ids"
            )
        encoded = iter(self.tokenizer.encode_batch(texts) if texts else [])
        try:
            found = [
                [*self.tokenizer.prefix, *map(int, next(encoded))] if isinstance(prompt, str) else list(map(index, prompt))
                for prompt in prompts
            ]
        except TypeError as error:
            raise ConfigError(f"prompts must be texts, or lists of integer ids, one for each prompt: {error}") from error
        for i, one in enumerate(found):
            if not one:
                raise ConfigError(
                    f"prompt {i} is empty: give it a token at least; the end of a document, after which texts begin, "
                    f"is id {'of the tokenizer' if self.tokenizer is None else self.tokenizer.eos_id}"
                )
            self._check_ids(f"prompt {i}", one)
        return found

    def _check_ids(self, name: str, ids: Sequence[int]) -> None:
        known = self.config.vocab_size if self.tokenizer is None else self.tokenizer.vocab_size
        odd = next((one for one in ids if not 0 <= one < known), None)
        if odd is not None:
            raise ConfigError(f"{name} has the id {odd}: ids of this model are 0 to {known - 1}")

    def _check_lengths(self, prompts: list[list[int]], max_new_tokens: int, context: int | None) -> None:
        most = self.context if context is None else context
        if context is not None and context < 2:
            raise ConfigError(f"context = {context}: must be at least 2 tokens, one of a prompt and one of an answer")
        i, longest = max(enumerate(map(len, prompts)), key=lambda one: one[1])
        if most is None or longest + max_new_tokens <= most:
            return
        trained = "" if self.context is None else f" (it was trained at {self.context:,})"
        raise ConfigError(
            f"prompt {i} has {counted(longest, 'token')}, with {max_new_tokens:,} new ones {longest + max_new_tokens:,}, and "
            f"the cache holds {most:,}{trained}: shorten it, ask for {max(1, most - longest):,} new tokens, or give "
            f"context={longest + max_new_tokens}"
        )

    def _generation(self, n_prompt: int, row: np.ndarray, stop: Sequence[int]) -> Generation:
        tokens = [int(one) for one in row if one >= 0]
        ended = bool(tokens) and tokens[-1] in stop
        tokens = tokens[:-1] if ended else tokens
        text = None if self.tokenizer is None else self.tokenizer.decode(tokens)
        return Generation(tokens, text, "stop" if ended else "length", n_prompt)


def load_model(folder: os.PathLike | str, tokenizer: str | Tokenizer | None = None) -> LoadedModel:
    """The model of a run that is done, or of imported parameters; the folder is local or on gs://.

    Runs of any version are read. Those that kept no tokenizer have that of their token store, while it is there.

    Args:
      tokenizer: of its vocabulary, or the name of one (`gqa_jax.data.tokenizer.load_tokenizer`); None: the one kept with it.

    Raises ConfigError: it is neither, that run is not done or diverged, or its last checkpoint is damaged; a tokenizer with
    more entries than the vocabulary.
    """
    source = start.of_folder(folder)
    vocabulary = why = None
    try:
        vocabulary = tokenizer_of(source, tokenizer)
    except (OSError, ValueError) as error:
        if tokenizer is not None:
            raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error
        why = str(error)
    check_tokenizer(vocabulary, source.model)
    params = restore_start(source, abstract(source.model))
    return LoadedModel(source.model, params, vocabulary, why, source)


def tokenizer_of(source: Start, given: str | Tokenizer | None = None) -> Tokenizer:
    """The tokenizer of the vocabulary of a start; `given`: another, or its name. Raises ValueError, OSError: there is none."""
    if given is not None:
        return tokenizer.load_tokenizer(given) if isinstance(given, str) else given
    if source.tokenizer is None and source.config is not None:
        return catalog.tokenizer_of(source.config.data.store, source.data_fingerprint)
    return tokenizer.of_run(source.folder)


def check_tokenizer(tokenizer: Tokenizer | None, config: ModelConfig) -> None:
    """Raises ConfigError where a tokenizer has more entries than the vocabulary of a model."""
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} entries, the model {config.vocab_size:,}: it is not the "
            "one that it was trained with"
        )


def require_room(engine: Engine, plan: Plan) -> None:
    """Raises ConfigError where caches of these sizes don't fit beside the weights, naming what would."""
    free = free_bytes()
    needed = engine.cache_bytes(plan.batch, plan.keys) + engine.working_bytes(plan)
    if free is None or needed <= ROOM * free:
        return
    fitting = int(ROOM * free // (needed / plan.batch))
    keys = int(ROOM * free // (needed / plan.keys))
    raise ConfigError(
        f"caches of {counted(plan.batch, 'sequence')} of {plan.keys:,} positions take {gb(needed)} of a device, and {gb(free)} "
        f"are free: {fitting} of them fit, or {keys:,} positions; or use cache_dtype=int8, or a mesh"
    )


def free_bytes() -> float | None:
    """Memory of the first device that is free; of a CPU that of the machine. None: not known."""
    device = jax.local_devices()[0]
    if stats := device.memory_stats():
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024.0 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return None


@partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: dict, tokens_BxT: jax.Array) -> jax.Array:
    return model.with_params(config, params)(tokens_BxT)


@partial(jax.jit, static_argnums=0)
def _losses(config: ModelConfig, params: dict, tokens_BxT: jax.Array) -> jax.Array:
    transformer = model.with_params(config, params)
    x_BxTxD = transformer.embed(tokens_BxT[:, :-1])
    hidden_BxTxD, _ = transformer.hidden(x_BxTxD, jnp.arange(x_BxTxD.shape[1]))
    return loss.token_losses(hidden_BxTxD, model.unembedding(params), tokens_BxT[:, 1:])
