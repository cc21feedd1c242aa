"""Batches are a function of (seed, step): the same tokens and targets at every context length and number of hosts."""

import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from gqa_jax.config import TrainConfig, default_config
from gqa_jax.data.prepare import Recipe, prepare
from gqa_jax.data.reader import Batches, EvalBatches, ReaderError, _block_order, _starts, check, read
from gqa_jax.data.store import SOURCES, TokenStore

BLOCK = 64


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Byte store with documents of very different lengths; train 5,000 to 6,000 tokens, validation about 500."""
    folder = tmp_path_factory.mktemp("store")
    random = np.random.Generator(np.random.Philox(0))
    texts = ["".join(map(chr, random.integers(32, 400, size))) for size in random.integers(1, 100, 100)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepare(Recipe((str(folder / "a.jsonl"),), tokenizer="bytes", holdout_every=10), folder / "store")


def batches(store, context_length=16, batch_tokens=128, **settings):
    settings = {"block_tokens": BLOCK, "seed": 3, "epochs": 3} | settings
    return Batches(store, context_length=context_length, batch_size=batch_tokens // context_length, **settings)


def held_out(store, tokens=320, context_length=32, batch_size=6, **settings):
    settings = {"block_tokens": BLOCK} | settings
    return EvalBatches(store, tokens=tokens, context_length=context_length, batch_size=batch_size, **settings)


def stream(reader, steps, name):
    return np.concatenate([reader(step)[name].ravel() for step in steps])


@pytest.mark.parametrize("context_length", [1, 2, 4, 8, 32, 64])
def test_streams_are_the_same_at_every_context_length(store, context_length):
    reference, other = batches(store), batches(store, context_length)
    assert reference.n_steps == other.n_steps > 2 * reference.targets_per_epoch // 128
    for name in ("tokens", "targets"):
        steps = range(reference.n_steps)
        np.testing.assert_array_equal(stream(other, steps, name), stream(reference, steps, name))


def test_windows_by_definition(store):
    """Against the definition, written as loops."""
    reader, tokens = batches(store, 16), store.tokens("train")
    expected_tokens, expected_targets = [], []
    for epoch in range(3):
        for block in _block_order(reader.n_blocks, 3, epoch):
            for start in range(block * BLOCK, (block + 1) * BLOCK, 16):
                expected_tokens.append(tokens[start : start + 16])
                expected_targets.append(tokens[start + 1 : start + 17])
    for step in range(reader.n_steps):
        batch, rows = reader(step), slice(step * 8, step * 8 + 8)
        np.testing.assert_array_equal(batch["tokens"], expected_tokens[rows])
        np.testing.assert_array_equal(batch["targets"], expected_targets[rows])
        assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
        assert batch["tokens"].shape == (8, 16)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [4, 5, 6, 7], [6, 1, 1], [3], []])
def test_a_process_reads_its_rows_of_a_batch(store, rows):
    whole = batches(store, document_mask=True)
    part = whole.for_rows(rows)
    for step in range(whole.n_steps):
        batch = whole(step)
        assert batch.keys() == {"tokens", "targets", "segments"}
        for name, found in part(step).items():
            np.testing.assert_array_equal(found, batch[name][rows])
    assert len(whole(0)["tokens"]) == 8  # `for_rows` left it as it was


@pytest.mark.parametrize("context_length", [4, 16, 64])
def test_skipped_tokens_are_those_that_the_steps_before_would_read(store, context_length):
    whole = batches(store)
    for steps in (3, whole.n_steps - 2):  # the second is in the last epoch
        reader = batches(store, context_length, skip_tokens=128 * steps)
        assert reader.n_steps == whole.n_steps - steps
        for name in ("tokens", "targets"):
            expected = stream(whole, range(steps, whole.n_steps), name)
            np.testing.assert_array_equal(stream(reader, range(reader.n_steps), name), expected)


def test_segments_count_the_ends_of_documents_before_a_position(store):
    reader = batches(store, 64, document_mask=True)
    most = 0
    steps = range(0, reader.n_steps, 7)
    for batch in (*map(reader, steps), *held_out(store, context_length=64, document_mask=True)):
        for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True):
            expected = [sum(t == store.eos_id for t in tokens[:i]) for i in range(64)]
            np.testing.assert_array_equal(segments, expected)
            most = max(most, *expected)
        assert batch["segments"].dtype == np.int32
        assert batch["segments"].flags["C_CONTIGUOUS"]
    assert most > 1
    assert "segments" not in batches(store)(0)
    assert "segments" not in held_out(store)[0]


def test_every_target_once_an_epoch_and_every_epoch_in_another_order(store):
    reader = batches(store, 1, batch_tokens=BLOCK)
    n = reader.n_blocks
    epochs = [stream(reader, range(epoch * n, (epoch + 1) * n), "targets").reshape(n, BLOCK) for epoch in range(3)]
    blocks = np.asarray(store.tokens("train")[1 : n * BLOCK + 1]).reshape(n, BLOCK)
    for targets in epochs:
        np.testing.assert_array_equal(np.unique(targets, axis=0), np.unique(blocks, axis=0))
    assert not any((epochs[i] == epochs[j]).all() for i, j in ((0, 1), (0, 2), (1, 2)))
    assert not (stream(batches(store, seed=4), [0], "tokens") == stream(batches(store), [0], "tokens")).all()


def test_order_of_blocks_is_golden():
    """A change means that everybody's runs read other tokens: a new seed would be needed to tell them apart."""
    assert _block_order(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert _block_order(8, 1, 2).tolist() == [4, 2, 0, 6, 1, 5, 7, 3]
    assert _block_order(8, 2**32 + 1, 2).tolist() == [1, 6, 0, 3, 2, 4, 5, 7]
    assert _block_order(8, 2**63 - 1, 2).tolist() == [2, 4, 3, 1, 7, 5, 0, 6]
    np.testing.assert_array_equal(np.sort(_block_order(1000, 5, 7)), np.arange(1000))


@pytest.mark.parametrize("start", [0, 1, 17, 40, 119])
def test_reading_ahead_and_resuming_at_any_step(store, start):
    reader = batches(store)
    found = list(read(reader, start, 120))
    assert len(found) == 120 - start
    for step, batch in enumerate(found, start):
        for name, expected in reader(step).items():
            np.testing.assert_array_equal(batch[name], expected)


def test_a_program_that_stops_reading_early_ends(store):
    code = (
        "import sys; from gqa_jax.data import reader, store\n"
        "b = reader.Batches(store.TokenStore.open(sys.argv[1]), context_length=8, batch_size=4, block_tokens=64, seed=0)\n"
        "print(next(iter(reader.read(b, 0, b.n_steps)))['tokens'].shape)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, store.path], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "(4, 8)\n"), done.stderr


def test_budget(store):
    reader = batches(store, epochs=1)
    reader.check_budget(reader.n_steps)
    assert reader.n_steps == reader.targets_per_epoch // 128
    available = f"{reader.targets_per_epoch:,}"
    with pytest.raises(ReaderError, match=rf"need .*; the train split of .* has {available} .* allow data.epochs = 2"):
        reader.check_budget(reader.n_steps + 1)
    steps = 5 * reader.n_steps
    with pytest.raises(ReaderError, match=r"allow data.epochs = 5"):
        reader.check_budget(steps)
    batches(store, epochs=5).check_budget(steps)
    with pytest.raises(ReaderError, match=r"need 128 after data\.skip_tokens = .* allow data.epochs = 2"):
        batches(store, epochs=1, skip_tokens=128 * reader.n_steps).check_budget(1)
    assert batches(store, epochs=1, skip_tokens=128 * 10**6).n_steps == 0
    with pytest.raises(ReaderError, match=r"allow data\.epochs"):
        reader(reader.n_steps)
    with pytest.raises(ReaderError, match="step -1: must be at least 0"):
        reader(-1)


def test_sizes_that_do_not_fit(store):
    with pytest.raises(ReaderError, match=r"block_tokens = 64 is not a multiple of context_length = 24: use 72"):
        batches(store, 24)
    fitting = (len(store.tokens("train")) - 1) // 16 * 16
    with pytest.raises(ReaderError, match=rf"less than one block .* use data.block_tokens <= {fitting}$"):
        batches(store, block_tokens=1 << 20)
    assert batches(store, block_tokens=fitting).n_blocks == 1
    n = len(store.tokens("train"))  # a block of them all lacks its last target
    with pytest.raises(ReaderError, match=rf"use data.block_tokens <= {n - 1}$"):
        batches(store, 1, block_tokens=n)
    with pytest.raises(ReaderError, match="use a shorter context_length or prepare more text"):
        batches(store, 1 << 20, batch_tokens=1 << 20, block_tokens=1 << 20)
    with pytest.raises(ReaderError, match="rows 2 to 8: a batch has rows 0 to 7"):
        batches(store).for_rows([2, 8])
    with pytest.raises(ReaderError, match=r"data\.skip_tokens = 24 is not a multiple of context_length = 16: use 32"):
        batches(store, skip_tokens=24)


def evaluated(reader):
    """Tokens and targets of an evaluation, one after the other."""
    return (np.concatenate([batch[name][batch["mask"]] for batch in reader]) for name in ("tokens", "targets"))


@pytest.mark.parametrize(
    ("tokens", "block", "unit"),
    [
        (320, 64, 64),  # five blocks
        (32, 64, 32),  # below a block
        (96, 64, 32),  # no multiple of the block
        (224, 56, 56),
        (319, 64, 1),
        ("all", "all", "all"),  # everything, at once
        ("all", 1, 1),  # everything, in pieces
    ],
)
def test_targets_of_an_evaluation_are_spread_and_the_same_at_every_context_length(store, tokens, block, unit):
    stored = np.asarray(store.tokens("validation"))
    n = len(stored) - 1
    tokens, block, unit = (n if value == "all" else value for value in (tokens, block, unit))
    lengths = [t for t in range(1, unit + 1) if unit % t == 0]
    first, *others = (held_out(store, tokens, t, block_tokens=block) for t in lengths)
    starts = first.starts
    assert (first.unit, len(starts)) == (unit, tokens // unit)
    gaps = np.diff([0, *np.stack([starts, starts + unit], axis=1).ravel(), n])[::2]
    assert gaps.min() >= 0
    assert gaps.sum() == n - tokens
    free = gaps.sum() / len(starts)  # at both ends half of it
    assert abs(gaps - [free / 2, *[free] * (len(starts) - 1), free / 2]).max() <= 1
    places = (starts[:, None] + np.arange(unit)).ravel()
    for reader in (first, *others):
        found = evaluated(reader)
        np.testing.assert_array_equal(next(found), stored[places])
        np.testing.assert_array_equal(next(found), stored[places + 1])
        np.testing.assert_array_equal(reader.starts, starts)
        np.testing.assert_array_equal(reader.document_index, first.document_index)


def test_places_of_units_are_golden():
    """A change means that everybody's losses are of other text."""
    assert _starts(4, 10, 17).tolist() == [2, 16, 30, 44]
    assert _starts(3, 5, 1).tolist() == [0, 5, 10]
    assert _starts(1, 7, 9).tolist() == [4]
    assert _starts(2, 8, 0).tolist() == [0, 8]


@pytest.mark.parametrize("windows", ["spread", "first"])
@pytest.mark.parametrize("context_length", [1, 4, 32])
def test_batches_of_an_evaluation_are_filled_up(store, context_length, windows):
    reader = held_out(store, context_length=context_length, windows=windows)
    n_windows = 320 // context_length
    masks = [batch["mask"] for batch in reader]
    assert all(array.shape == (6, context_length) for batch in reader for array in batch.values())
    assert len(reader) == len(masks) == -(-n_windows // 6)
    assert (~masks[-1].all(axis=1)).sum() == -n_windows % 6  # rows that only fill up
    assert all(mask.all() for mask in masks[:-1])


def test_windows_of_the_first_version_are_the_first_targets(store):
    stored = store.tokens("validation")
    for context_length in (1, 4, 32):
        tokens, targets = evaluated(held_out(store, context_length=context_length, windows="first", block_tokens=7))
        np.testing.assert_array_equal(tokens, stored[:320])
        np.testing.assert_array_equal(targets, stored[1:321])


@pytest.mark.parametrize("windows", ["spread", "first"])
@pytest.mark.parametrize("tokens", [1, 64, 96, 320, "all"])
def test_documents_and_bytes_of_evaluation(store, tokens, windows):
    """By counting: of a byte store an id is a byte, but for the ends of documents."""
    stored = np.asarray(store.tokens("validation"))
    is_eos = stored == store.eos_id
    number = np.cumsum(is_eos) - is_eos
    tokens = len(stored) - 1 if tokens == "all" else tokens
    reader = held_out(store, tokens, 1, windows=windows, block_tokens=16)
    places = (reader.starts[:, None] + np.arange(1, reader.unit + 1)).ravel()
    documents = reader.documents
    np.testing.assert_array_equal(documents.numbers, np.unique(number[places]))
    np.testing.assert_array_equal(documents.numbers[reader.document_index], number[places])
    for i, own in enumerate(documents.numbers):
        assert documents.tokens[i] == (number[places] == own).sum()
        assert documents.text_bytes[i] == ((number[places] == own) & ~is_eos[places]).sum()
        ids = stored[(number == own) & ~is_eos].astype("<u4").tobytes()
        assert documents.hashes[i] == int.from_bytes(hashlib.sha256(ids).digest()[:8], "big")
        inside = places[number[places] == own] - np.flatnonzero(number == own)[0]
        breaks = np.flatnonzero(np.diff(inside) > 1)
        ends = np.sort([inside[0], *inside[breaks] + 1, *inside[breaks + 1], inside[-1] + 1])
        assert documents.targets[i] == int.from_bytes(hashlib.sha256(ends.astype("<i8").tobytes()).digest()[:8], "big")
    assert documents.sources.tolist() == [0] * len(documents.numbers)
    assert documents.source_names == ["a.jsonl"]
    assert (reader.heldout_tokens, reader.heldout_documents) == (len(stored), is_eos.sum())
    assert reader.holdout == store.holdout_rule


def test_sources_of_evaluated_documents(store, tmp_path):
    shutil.copytree(store.path, tmp_path / "store")
    of_train = np.zeros(store.header["splits"]["train"]["documents"], np.int32)
    of_validation = np.arange(len(store.documents("validation")), dtype=np.int32) % 3
    np.savez(tmp_path / "store" / SOURCES, names=["web", "books", "code"], train=of_train, validation=of_validation)
    documents = held_out(TokenStore.open(tmp_path / "store"), 4, 2, block_tokens=2).documents
    assert documents.source_names == ["web", "books", "code"]
    np.testing.assert_array_equal(documents.sources, of_validation[documents.numbers])
    assert documents.sources.tolist() != of_validation[: len(documents.numbers)].tolist()
    (tmp_path / "store" / SOURCES).unlink()  # as in a store of the first version
    documents = held_out(TokenStore.open(tmp_path / "store")).documents
    assert documents.sources.tolist() == [-1] * len(documents.numbers)
    assert documents.source_names == []


def test_ids_that_the_vocabulary_lacks_are_no_text(store, tmp_path):
    """Of a store whose files were overwritten with as many bytes."""
    shutil.copytree(store.path, tmp_path / "store")
    damaged = TokenStore.open(tmp_path / "store")
    for split, place in (("train", 100), ("validation", 40)):
        tokens = np.memmap(tmp_path / "store" / f"{split}.bin", dtype="<u2", mode="r+")
        tokens[place] = damaged.vocab_size
        tokens.flush()
    reader = batches(damaged)
    message = r"the train split of .*store holds the id 257, and its vocabulary has 257 entries: .* copy the store again"
    with pytest.raises(ReaderError, match=message):
        [reader(step) for step in range(reader.targets_per_epoch // 128)]
    of_evaluation = held_out(damaged, windows="first")
    with pytest.raises(ReaderError, match=r"the validation split of .* holds the id 257"):
        list(of_evaluation)
    with pytest.raises(ReaderError, match=r"the validation split of .* holds the id 257"):
        _ = of_evaluation.documents


def test_a_tokenizer_that_is_gone_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"hello {i} " * 9}) + "\n" for i in range(40)))
    made = prepare(Recipe((str(tmp_path / "a.jsonl"),), tokenizer="bpe:260", holdout_every=4), tmp_path / "store")
    (made.path / "tokenizer.json").unlink()
    with pytest.raises(ReaderError, match=r"bits per byte need the tokenizer of .*store: "):
        _ = held_out(made, 64).documents


@pytest.mark.parametrize("name", ["sotu-bytes", "sotu-bytes@position", "data"])
def test_a_built_in_store_is_not_to_be_prepared_otherwise(store, name):
    changes = {"context_length": 32, "batch_tokens": 64, "tokens": 64, "evaluation.tokens": 32_000}
    changes |= {"data.store": name, "data.block_tokens": BLOCK, "model.vocab_size": 320}
    config = default_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ReaderError, match=r"held-out tokens; .*: use evaluation\.tokens <= \d+") as raised:
        check(TrainConfig.from_dict(config.to_dict()), store)
    assert str(raised.value).endswith(", or prepare the store with a smaller --holdout_every") == (name == "data")


def test_evaluation_that_does_not_fit(store):
    available = len(store.tokens("validation"))
    fitting = (available - 1) // 32 * 32
    held_out(store, fitting)
    for windows in ("spread", "first"):
        with pytest.raises(
            ReaderError,
            match=rf"held-out tokens; the validation split .* has {available:,}: use evaluation.tokens <= {fitting}",
        ):
            held_out(store, fitting + 32, windows=windows)
        with pytest.raises(ReaderError, match=rf"{available:,} needs {available + 1:,} held-out tokens"):
            held_out(store, available, 1, windows=windows)
        with pytest.raises(ReaderError, match=r"use a shorter context_length, or prepare .* with a smaller --holdout_every"):
            held_out(store, 8192, 8192, windows=windows, block_tokens=8192)
        with pytest.raises(ReaderError, match=r"evaluation.tokens = 100 is not a multiple of context_length = 32: use 96"):
            held_out(store, 100, windows=windows)
    with pytest.raises(ReaderError, match=r"data.block_tokens = 80 is not a multiple of context_length = 32: use 64"):
        held_out(store, 96, block_tokens=80)
    with pytest.raises(ReaderError, match=r"evaluation.windows = 'sprea': did you mean 'spread'"):
        held_out(store, windows="sprea")
    reader = held_out(store, 64, batch_size=1)
    with pytest.raises(IndexError):
        reader[2]
