"""Batches of a token store: a pure function of the step, so that the state of the data is the step and nothing else.

Each epoch shuffles blocks of `block_tokens` targets by (seed, epoch) and cuts every block into windows of T inputs with
stride T, window i giving inputs x[iT : iT + T] and targets x[iT + 1 : iT + T + 1]. Every token of a block is a target exactly
once, and tokens and targets come in the same order at every T that divides block_tokens, for any mesh, number of
processes and accumulation. The paper instead drops a remainder per 1,000 documents, so that its token set changes with T.

Legend: B sequences of the whole batch, R sequences of it that this process reads, T context length in tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np

from gqa_jax.config import WINDOWS, TrainConfig
from gqa_jax.data.catalog import BUILT_IN
from gqa_jax.data.store import TokenStore
from gqa_jax.errors import closest


class ReaderError(ValueError):
    """A store and a reading that don't fit. The message gives the numbers and the fix."""


class Batches:
    """Training batches: `batches(step)` is a dict of `tokens` and `targets`, int32 (R, T), and `segments` with a mask."""

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
        skip_tokens: int = 0,
        document_mask: bool = False,
    ):
        """Checks the reading before any of it.

        Args:
          context_length: T.
          batch_size: B, over all processes.
          block_tokens: unit of the shuffle, a multiple of T; the same in all runs that are compared.
          epochs: how often the split may be read; each has its own order.
          skip_tokens: of the shuffled order, passed over before step 0; a multiple of T.
          document_mask: whether batches have `segments`, int32 (R, T): the number of the document within the row.
        Raises:
          ReaderError: sizes that don't divide, a split shorter than a block.
        """
        _check_multiple("data.block_tokens", block_tokens, context_length)
        _check_multiple("data.skip_tokens", skip_tokens, context_length, least=0)
        n_tokens = store.n_tokens(split)
        self.n_blocks = (n_tokens - 1) // block_tokens  # the last target needs the token after its block
        if self.n_blocks == 0:
            fitting = (n_tokens - 1) // context_length * context_length
            fix = f"use data.block_tokens <= {fitting}" if fitting else "use a shorter context_length or prepare more text"
            raise ReaderError(
                f"the {split} split of {store.path} has {n_tokens:,} tokens, less than one block of "
                f"data.block_tokens + 1 = {block_tokens + 1:,}: {fix}"
            )
        self.context_length = context_length
        self.batch_size = batch_size
        self.block_tokens = block_tokens
        self.seed = seed
        self.epochs = epochs
        self.skip_tokens = skip_tokens
        self._vocab_size, self._source = store.vocab_size, f"{split} split of {store.path}"
        self._windows_per_epoch = self.n_blocks * (block_tokens // context_length)
        self._eos = store.eos_id if document_mask else None
        self._rows: np.ndarray | None = None  # None: all; a grid is checked whose batches no machine holds
        self._store, self._split = store, split

    @functools.cached_property
    def _windows(self) -> np.ndarray:
        """Row s is tokens s ... s + T: indexing it with starts copies whole windows, without an index for every token."""
        return np.lib.stride_tricks.sliding_window_view(self._store.tokens(self._split), self.context_length + 1)

    def for_rows(self, rows: Sequence[int]) -> Batches:
        """The same batches with rows `rows` only, in that order: those of a process, which may share some with another.

        Raises ReaderError for rows that a batch doesn't have.
        """
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.batch_size:
            raise ReaderError(f"rows {rows.min()} to {rows.max()}: a batch has rows 0 to {self.batch_size - 1}")
        part = copy.copy(self)
        part._rows = rows
        return part

    @property
    def targets_per_epoch(self) -> int:
        """Tokens that one epoch trains on: whole blocks."""
        return self.n_blocks * self.block_tokens

    @property
    def n_steps(self) -> int:
        """Whole batches in all epochs, after what is skipped."""
        return max(0, self._windows_per_epoch * self.epochs - self.skip_tokens // self.context_length) // self.batch_size

    def check_budget(self, steps: int) -> None:
        """Raises ReaderError, with the fix, when `steps` batches need more tokens than the epochs have."""
        if steps <= self.n_steps:
            return
        per_step = self.batch_size * self.context_length
        epochs = -(-(self.skip_tokens + steps * per_step) // self.targets_per_epoch)
        skipped = f" after data.skip_tokens = {self.skip_tokens:,}" if self.skip_tokens else ""
        raise ReaderError(
            f"{steps:,} steps of {per_step:,} tokens need {steps * per_step:,}{skipped}; the {self._source} has "
            f"{self.targets_per_epoch:,} ({self.n_blocks:,} blocks of {self.block_tokens:,}) and data.epochs = {self.epochs}: "
            f"allow data.epochs = {epochs}, train on fewer tokens, or prepare more text"
        )

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """`tokens`, `targets` (and `segments`) of a step, int32 (R, T).

        Raises ReaderError beyond the last epoch, and for an id that the vocabulary of the store doesn't have.
        """
        if not 0 <= step < self.n_steps:
            self.check_budget(step + 1)
            raise ReaderError(f"step {step}: must be at least 0")
        skipped = self.skip_tokens // self.context_length
        rows = np.arange(self.batch_size) if self._rows is None else self._rows
        windows = skipped + step * self.batch_size + rows  # numbers of the windows over all epochs
        epochs, windows = np.divmod(windows, self._windows_per_epoch)
        blocks, within = np.divmod(windows, self.block_tokens // self.context_length)
        for epoch in np.unique(epochs).tolist():  # more than one only in a batch across the border
            here = epochs == epoch
            blocks[here] = _block_order(self.n_blocks, self.seed, epoch)[blocks[here]]
        windows = self._windows[blocks * self.block_tokens + within * self.context_length]
        return _batch(windows, self._eos, self._vocab_size, self._source)


@dataclasses.dataclass(frozen=True)
class HeldOutDocuments:
    """The held-out documents that have targets of an evaluation, D of them in the order of the split, and what is of each."""

    numbers: np.ndarray  # int64 (D,): index in the split
    tokens: np.ndarray  # int64 (D,): its targets
    targets: np.ndarray  # uint64 (D,): hash of which of its tokens these are
    text_bytes: np.ndarray  # int64 (D,): bytes of UTF-8 that these targets decode to
    hashes: np.ndarray  # uint64 (D,): of all its ids, the same in any store made with the same tokenizer
    sources: np.ndarray  # int32 (D,): index in `source_names`; -1 where the store keeps none
    source_names: list[str]


class EvalBatches:
    """Held-out batches: `tokens` targets of a split, the same ones at every T that divides `tokens` and `block_tokens`.

    "spread": in units of u = gcd(tokens, block_tokens) targets, k = tokens / u of them. Of the n targets of the split, unit j
    begins with target j u + floor((2j + 1) (n - k u) / (2k)), so that the gaps between units are equal and half as large at
    both ends. "first": the first targets of the split. Both are cut into windows of T inputs with stride T.

    A sequence of dicts of `tokens`, `targets` (and, with a document mask, `segments`), int32 (B, T), and `mask`, bool (B, T):
    False in rows that only fill up the last batch. Every process reads them whole: there are few.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        tokens: int,
        context_length: int,
        batch_size: int,
        block_tokens: int,
        windows: str = "spread",
        split: str = "validation",
        document_mask: bool = False,
        prepared: bool = True,
    ):
        """Checks the reading; the rest as in `Batches`.

        Args:
          tokens: targets, a multiple of T.
          block_tokens: unit of the shuffle, a multiple of T; the same in all runs that are compared.
          windows: "spread" or "first".
          prepared: whether the store was made by `prepare`, so that more can be held out: said where it has too few tokens.
        Raises:
          ReaderError: sizes that don't divide, a split with too few tokens.
        """
        if windows not in WINDOWS:
            raise ReaderError(f"evaluation.windows = {windows!r}: {closest(windows, WINDOWS)}")
        _check_multiple("evaluation.tokens", tokens, context_length)
        if windows == "spread":
            _check_multiple("data.block_tokens", block_tokens, context_length)
        n_tokens = store.n_tokens(split)
        if n_tokens <= tokens:
            fitting = (n_tokens - 1) // context_length * context_length
            fix = f"use evaluation.tokens <= {fitting}" if fitting > 0 else "use a shorter context_length"
            if prepared:
                fix += ", or prepare the store with a smaller --holdout_every"
            raise ReaderError(
                f"evaluation.tokens = {tokens:,} needs {tokens + 1:,} held-out tokens; the {split} split of {store.path} has "
                f"{n_tokens:,}: {fix}"
            )
        self.tokens = tokens
        self.context_length = context_length
        self.batch_size = batch_size
        #: Targets that lie side by side.
        self.unit = tokens if windows == "first" else math.gcd(tokens, block_tokens)
        #: int64 (tokens / unit,): token of the split that each unit's inputs begin with.
        self.starts = _starts(tokens // self.unit, self.unit, 0 if windows == "first" else n_tokens - 1 - tokens)
        #: All tokens and documents of the split, evaluated or not.
        self.heldout_tokens, self.heldout_documents = n_tokens, store.header["splits"][split]["documents"]
        #: Rule by which documents were held out.
        self.holdout = store.holdout_rule
        self._store, self._split = store, split
        self._vocab_size, self._source = store.vocab_size, f"{split} split of {store.path}"
        self._eos = store.eos_id if document_mask else None

    @functools.cached_property
    def _windows(self) -> np.ndarray:
        """As in `Batches`."""
        return np.lib.stride_tricks.sliding_window_view(self._store.tokens(self._split), self.context_length + 1)

    @functools.cached_property
    def document_index(self) -> np.ndarray:
        """int64 (tokens,): index in `documents` of the document of each target, in the order of masked-in targets."""
        return np.cumsum(np.diff(self._numbers, prepend=self._numbers[0]) != 0)

    @functools.cached_property
    def documents(self) -> HeldOutDocuments:
        """What is known of the documents of the targets; read once, whole documents. The tokenizer is that of the store.

        Raises ReaderError: an id that the vocabulary doesn't have, or the tokenizer is gone.
        """
        tokens, index = np.asarray(self._store.tokens(self._split)), self.document_index
        numbers = self._numbers[np.diff(index, prepend=-1) != 0]
        # Targets side by side in one document are a stretch; a document that several units cut has several.
        begins = np.flatnonzero((np.diff(self._positions, prepend=-1) != 1) | (np.diff(index, prepend=-1) != 0))
        lasts = np.append(begins[1:], self.tokens) - 1
        stretches = np.stack([self._positions[begins], self._positions[lasts] + 1], axis=1)
        try:
            tokenizer = self._store.tokenizer()
        except (ValueError, OSError) as error:
            raise ReaderError(f"bits per byte need the tokenizer of {self._store.path}: {error}") from error
        text_bytes = np.empty(len(numbers), np.int64)
        hashes, targets = np.empty(len(numbers), np.uint64), np.empty(len(numbers), np.uint64)
        own = np.searchsorted(index[begins], np.arange(len(numbers) + 1))
        for i, number in enumerate(numbers.tolist()):
            start = int(self._ends[number - 1]) if number else 0
            ids = tokens[start : self._ends[number]]
            _check_ids(ids, self._vocab_size, self._source)
            within = (stretches[own[i] : own[i + 1]] - start).ravel()
            counted = tokenizer.bytes_at(ids, within)
            text_bytes[i] = (counted[1::2] - counted[0::2]).sum()
            hashes[i] = _hash(ids[ids != self._store.eos_id].astype("<u4"))
            targets[i] = _hash(within.astype("<i8"))
        names, sources = self._store.sources(self._split) or ([], np.full(len(self._ends), -1, np.int32))
        return HeldOutDocuments(numbers, np.bincount(index), targets, text_bytes, hashes, sources[numbers], names)

    @functools.cached_property
    def _positions(self) -> np.ndarray:
        """int64 (tokens,): where in the split each target is, in the order of masked-in targets."""
        return (self.starts[:, None] + np.arange(1, self.unit + 1)).ravel()

    @functools.cached_property
    def _numbers(self) -> np.ndarray:
        """int64 (tokens,): index in the split of the document of each target."""
        return np.searchsorted(self._ends, self._positions, side="right")

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """int64 (documents,): end of each document of the split in tokens."""
        return self._store.documents(self._split)[:, 0]

    def __len__(self) -> int:
        return -(-self.tokens // (self.batch_size * self.context_length))

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if not 0 <= i < len(self):
            raise IndexError(f"evaluation batch {i} of {len(self)}")
        windows = i * self.batch_size + np.arange(self.batch_size)
        mask = windows < self.tokens // self.context_length
        units, within = np.divmod(np.where(mask, windows, 0) * self.context_length, self.unit)
        batch = _batch(self._windows[self.starts[units] + within], self._eos, self._vocab_size, self._source)
        return batch | {"mask": np.repeat(mask[:, None], self.context_length, axis=1)}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[i] for i in range(len(self)))


def _hash(values: np.ndarray) -> int:
    """The first 8 bytes, big-endian, of the SHA-256 of an array."""
    return int.from_bytes(hashlib.sha256(values.tobytes()).digest()[:8], "big")


def _starts(n: int, unit: int, free: int) -> np.ndarray:
    """int64 (n,): where units of `unit` begin that lie in order with `free` tokens of gaps between and around them."""
    units = np.arange(n)
    return units * unit + (2 * units + 1) * free // (2 * n)


def check(config: TrainConfig, store: TokenStore) -> tuple[Batches, EvalBatches]:
    """Training and held-out batches of a run, all rows of them, after every check that needs no device.

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
        skip_tokens=config.data.skip_tokens,
        document_mask=config.data.document_mask,
    )
    train.check_budget(config.n_steps)
    held_out = EvalBatches(
        store,
        tokens=config.evaluation.tokens,
        context_length=config.context_length,
        batch_size=config.micro_batch,
        block_tokens=config.data.block_tokens,
        windows=config.evaluation.windows,
        document_mask=config.data.document_mask,
        prepared=config.data.store not in BUILT_IN,
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
    return np.argsort(np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n_blocks), kind="stable")


def _batch(windows: np.ndarray, eos: int | None, vocab_size: int, source: str) -> dict[str, np.ndarray]:
    """(R, T + 1) of the store's type to int32 inputs and targets (R, T), and document numbers unless `eos` is None.

    The EOS belongs to the document that it ends, the token after it begins the next.
    """
    _check_ids(windows, vocab_size, source)
    batch = {"tokens": windows[:, :-1].astype(np.int32), "targets": windows[:, 1:].astype(np.int32)}
    if eos is not None:
        ends = batch["tokens"] == eos
        batch["segments"] = np.cumsum(ends, axis=1, dtype=np.int32) - ends
    return batch


def _check_ids(ids: np.ndarray, vocab_size: int, source: str) -> None:
    """Raises ReaderError for an id that the vocabulary doesn't have: some would be read as others, some as no number."""
    if ids.size and (largest := int(ids.max())) >= vocab_size:
        raise ReaderError(
            f"the {source} holds the id {largest}, and its vocabulary has {vocab_size} entries: the file is damaged; copy the "
            "store again, or prepare it again"
        )


def _check_multiple(name: str, value: int, context_length: int, least: int = 1) -> None:
    """Raises ReaderError, with the nearest one, for what is no multiple of the context length, or no `least` of it."""
    if value % context_length or value < least * context_length:
        raise ReaderError(
            f"{name} = {value} is not a multiple of context_length = {context_length}: "
            f"use {max(least, round(value / context_length)) * context_length}"
        )
