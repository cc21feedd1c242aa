"""Batches of a token store: a pure function of the step, so that the state of the data is the step and nothing else.

Each epoch shuffles blocks of `block_tokens` targets by (seed, epoch) and cuts every block into windows of T inputs with
stride T, window i giving inputs x[iT : iT + T] and targets x[iT + 1 : iT + T + 1]. Every token of a block is a target exactly
once, and tokens and targets come in the same order at every T that divides block_tokens, for any number of hosts and any
accumulation. The paper instead drops a remainder per 1,000 documents, so that its token set changes with T.

Legend: B sequences of the whole batch, R = B / hosts sequences of this host, T context length in tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from gqa_jax.config import TrainConfig
from gqa_jax.data.store import TokenStore


class ReaderError(ValueError):
    """A store and a reading that don't fit. The message gives the numbers and the fix."""


class Batches:
    """Training batches: `batches(step)` is a dict of `tokens` and `targets`, int32 (R, T), host-local rows."""

    def __init__(
        self,
        store: TokenStore,
        split: str = "train",
        *,
        context_length: int,
        batch_size: int,
        block_tokens: int,
        seed: int,
        epochs: int = 1,
        host: tuple[int, int] = (0, 1),
    ):
        """Checks the reading before any of it.

        Args:
          context_length: T.
          batch_size: B, over all hosts.
          block_tokens: unit of the shuffle, a multiple of T; the same in all runs that are compared.
          epochs: how often the split may be read; each has its own order.
          host: (index, count): this host reads rows index * R ... (index + 1) * R - 1 of each batch.
        Raises:
          ReaderError: sizes that don't divide, a split shorter than a block.
        """
        index, count = host
        if not 0 <= index < count:
            raise ReaderError(f"host {index} of {count}: the index must be from 0 to {count - 1}")
        if batch_size < 1 or batch_size % count:
            raise ReaderError(f"a batch of {batch_size} sequences can't be split over {count} hosts: use a multiple of {count}")
        if context_length < 1 or block_tokens % context_length:
            raise ReaderError(
                f"data.block_tokens = {block_tokens} is not a multiple of context_length = {context_length}: "
                f"use {max(1, round(block_tokens / context_length)) * context_length}"
            )
        tokens = store.tokens(split)
        self.n_blocks = (len(tokens) - 1) // block_tokens  # the last target needs the token after its block
        if self.n_blocks == 0:
            fitting = (len(tokens) - 1) // context_length * context_length
            fix = f"use data.block_tokens <= {fitting}" if fitting else "use a shorter context_length or prepare more text"
            raise ReaderError(
                f"the {split} split of {store.path} has {len(tokens):,} tokens, less than one block of "
                f"data.block_tokens + 1 = {block_tokens + 1:,}: {fix}"
            )
        self.context_length = context_length
        self.batch_size = batch_size
        self.block_tokens = block_tokens
        self.seed = seed
        self.epochs = epochs
        self._source = f"{split} split of {store.path}"
        self._windows_per_epoch = self.n_blocks * (block_tokens // context_length)
        rows = batch_size // count
        self._rows = np.arange(index * rows, (index + 1) * rows)
        # Row s is tokens s ... s + T: indexing it with starts copies whole windows, without an index for every token.
        self._windows = np.lib.stride_tricks.sliding_window_view(tokens, context_length + 1)

    @property
    def targets_per_epoch(self) -> int:
        """Tokens that one epoch trains on: whole blocks."""
        return self.n_blocks * self.block_tokens

    @property
    def n_steps(self) -> int:
        """Whole batches in all epochs."""
        return self._windows_per_epoch * self.epochs // self.batch_size

    def check_budget(self, steps: int) -> None:
        """Raises ReaderError, with the fix, when `steps` batches need more tokens than the epochs have."""
        if steps <= self.n_steps:
            return
        per_step = self.batch_size * self.context_length
        epochs = -(-steps * per_step // self.targets_per_epoch)
        raise ReaderError(
            f"{steps:,} steps of {per_step:,} tokens need {steps * per_step:,}; the {self._source} has "
            f"{self.targets_per_epoch:,} ({self.n_blocks:,} blocks of {self.block_tokens:,}) and data.epochs = {self.epochs}: "
            f"allow data.epochs = {epochs}, train on fewer tokens, or prepare more text"
        )

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """`tokens` and `targets` of a step, int32 (R, T). Raises ReaderError beyond the last epoch."""
        if not 0 <= step < self.n_steps:
            self.check_budget(step + 1)
            raise ReaderError(f"step {step}: must be at least 0")
        windows = step * self.batch_size + self._rows  # numbers of the windows over all epochs
        epochs, windows = np.divmod(windows, self._windows_per_epoch)
        blocks, within = np.divmod(windows, self.block_tokens // self.context_length)
        for epoch in range(epochs[0], epochs[-1] + 1):  # more than one only in a batch across the border
            here = epochs == epoch
            blocks[here] = _block_order(self.n_blocks, self.seed, epoch)[blocks[here]]
        return _inputs_and_targets(self._windows[blocks * self.block_tokens + within * self.context_length])


class EvalBatches:
    """Held-out batches: the first `tokens` targets of a split in order, stride T, the same targets at every T.

    A sequence of dicts of `tokens` and `targets`, int32 (R, T), and `mask`, bool (R, T): False in rows that only fill up the
    last batch.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        tokens: int,
        context_length: int,
        batch_size: int,
        split: str = "validation",
        host: tuple[int, int] = (0, 1),
    ):
        """`tokens` is a multiple of T; `batch_size` counts the sequences of all hosts. Raises ReaderError."""
        index, count = host
        if tokens < 1 or tokens % context_length:
            raise ReaderError(
                f"evaluation.tokens = {tokens} is not a multiple of context_length = {context_length}: "
                f"use {max(1, round(tokens / context_length)) * context_length}"
            )
        if not 0 <= index < count or batch_size < 1 or batch_size % count:
            raise ReaderError(f"a batch of {batch_size} sequences can't be split over {count} hosts: use a multiple of {count}")
        stored = store.tokens(split)
        if len(stored) <= tokens:
            fitting = (len(stored) - 1) // context_length * context_length
            fix = f"use evaluation.tokens <= {fitting}" if fitting > 0 else "use a shorter context_length"
            raise ReaderError(
                f"evaluation.tokens = {tokens:,} needs {tokens + 1:,} held-out tokens; the {split} split of {store.path} has "
                f"{len(stored):,}: {fix}, or prepare the store with a smaller --holdout_every"
            )
        self.tokens = tokens
        self.context_length = context_length
        self.batch_size = batch_size
        self._rows = index * (batch_size // count) + np.arange(batch_size // count)
        self._windows = np.lib.stride_tricks.sliding_window_view(stored, context_length + 1)
        documents = store.documents(split)
        ends, text_bytes = documents[:, 0], documents[:, 1]
        # Target i is token i + 1 of the split.
        self.document_ids = np.searchsorted(ends, np.arange(1, tokens + 1), side="right")
        covered = np.bincount(self.document_ids)
        lengths = np.diff(ends, prepend=0)[: len(covered)]
        self.bytes_of_text = float(np.sum(text_bytes[: len(covered)] * covered / lengths))

    #: int64 (tokens,): index in the split of the document that each target belongs to, in the order of masked-in targets.
    document_ids: np.ndarray
    #: Bytes of UTF-8 that the targets stand for: exact for whole documents, by tokens for one that is cut.
    bytes_of_text: float

    def __len__(self) -> int:
        return -(-self.tokens // (self.batch_size * self.context_length))

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if not 0 <= i < len(self):
            raise IndexError(f"evaluation batch {i} of {len(self)}")
        windows = i * self.batch_size + self._rows
        mask = windows < self.tokens // self.context_length
        batch = _inputs_and_targets(self._windows[np.where(mask, windows, 0) * self.context_length])
        return batch | {"mask": np.repeat(mask[:, None], self.context_length, axis=1)}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[i] for i in range(len(self)))


def check(config: TrainConfig, store: TokenStore) -> tuple[Batches, EvalBatches]:
    """Training and held-out batches of a run, after every check that needs no device.

    Raises ReaderError when the vocabulary doesn't fit the model, or the store has too few tokens for the run.
    """
    if store.vocab_size > config.model.vocab_size:
        raise ReaderError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the vocabulary of the token store "
            f"{config.data.store} ({store.vocab_size} entries): use {-(-store.vocab_size // 64) * 64}"
        )
    train = Batches(
        store,
        context_length=config.context_length,
        batch_size=config.batch_size,
        block_tokens=config.data.block_tokens,
        seed=config.seed,
        epochs=config.data.epochs,
    )
    train.check_budget(config.n_steps)
    held_out = EvalBatches(
        store,
        tokens=config.evaluation.tokens,
        context_length=config.context_length,
        batch_size=config.micro_batch,
    )
    return train, held_out


def read(batches: Batches, start_step: int, stop_step: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of steps start_step ... stop_step - 1, read ahead by a grain thread; to resume is to start later."""
    import grain  # imports jax

    # An element is a batch, and few are in flight: grain's defaults, 16 threads and 500 elements, are for single examples.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    steps = grain.MapDataset.range(start_step, stop_step)
    return iter(steps.map(batches).to_iter_dataset(options))


@functools.lru_cache(maxsize=4)
def _block_order(n_blocks: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of the blocks in an epoch, int64 (n_blocks,).

    By sorting raw Philox output, which numpy keeps the same in all versions; `Generator.permutation` may change (NEP 19).
    """
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(n_blocks), kind="stable")


def _inputs_and_targets(windows: np.ndarray) -> dict[str, np.ndarray]:
    """(R, T + 1) of the store's type to int32 inputs and targets (R, T)."""
    return {"tokens": windows[:, :-1].astype(np.int32), "targets": windows[:, 1:].astype(np.int32)}
