"""Batches are a function of (seed, step): the same tokens and targets at every context length and number of hosts."""

import json
import subprocess
import sys

import numpy as np
import pytest

from gqa_jax.data.prepare import Recipe, prepare
from gqa_jax.data.reader import Batches, EvalBatches, ReaderError, _block_order, read

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
    held_out = EvalBatches(store, tokens=320, context_length=64, batch_size=2, document_mask=True)
    most = 0
    for batch in (reader(0), reader(reader.n_steps - 1), *held_out):
        for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True):
            expected = [sum(t == store.eos_id for t in tokens[:i]) for i in range(64)]
            np.testing.assert_array_equal(segments, expected)
            most = max(most, *expected)
        assert batch["segments"].dtype == np.int32
        assert batch["segments"].flags["C_CONTIGUOUS"]
    assert most > 1
    assert "segments" not in batches(store)(0)
    assert "segments" not in EvalBatches(store, tokens=320, context_length=64, batch_size=2)[0]


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


@pytest.mark.parametrize("context_length", [1, 4, 32])
def test_evaluation_covers_the_same_targets_at_every_context_length(store, context_length):
    reader = EvalBatches(store, tokens=320, context_length=context_length, batch_size=6)
    tokens, targets, masks = [], [], []
    for batch in reader:
        assert all(array.shape == (6, context_length) for array in batch.values())
        tokens.append(batch["tokens"][batch["mask"]])
        targets.append(batch["targets"][batch["mask"]])
        masks.append(batch["mask"])
    stored = store.tokens("validation")
    np.testing.assert_array_equal(np.concatenate(tokens), stored[:320])
    np.testing.assert_array_equal(np.concatenate(targets), stored[1:321])
    windows = 320 // context_length
    assert len(reader) == len(masks) == -(-windows // 6)
    assert (~masks[-1].all(axis=1)).sum() == -windows % 6  # rows that only fill up
    assert all(mask.all() for mask in masks[:-1])


def test_documents_and_bytes_of_evaluation(store):
    stored, documents = np.asarray(store.tokens("validation")), store.documents("validation")
    ends = documents[:, 0]
    for tokens in (1, 100, ends[0] - 1, ends[0], ends[2] - 1, len(stored) - 1):
        reader = EvalBatches(store, tokens=int(tokens), context_length=1, batch_size=8)
        is_eos = stored == store.eos_id
        np.testing.assert_array_equal(reader.document_ids, (np.cumsum(is_eos) - is_eos)[1 : tokens + 1])
        text = int((~is_eos[1 : tokens + 1]).sum())  # of a byte store: an id is a byte, but for the ends of documents
        assert abs(reader.bytes_of_text - text) <= 1  # prorating counts a cut document's end with its text
    whole = EvalBatches(store, tokens=len(stored) - 1, context_length=1, batch_size=8)
    first = documents[0, 1] / ends[0]  # the very first token is no target
    assert whole.bytes_of_text == pytest.approx(documents[:, 1].sum() - first)


def test_evaluation_that_does_not_fit(store):
    available = len(store.tokens("validation"))
    fitting = (available - 1) // 32 * 32
    EvalBatches(store, tokens=fitting, context_length=32, batch_size=1)
    with pytest.raises(
        ReaderError, match=rf"held-out tokens; the validation split .* has {available}: use evaluation.tokens <= {fitting}"
    ):
        EvalBatches(store, tokens=1024, context_length=32, batch_size=1)
    with pytest.raises(ReaderError, match="use a shorter context_length, or prepare the store with a smaller --holdout_every"):
        EvalBatches(store, tokens=1024, context_length=1024, batch_size=1)
    with pytest.raises(ReaderError, match=r"evaluation.tokens = 100 is not a multiple of context_length = 32: use 96"):
        EvalBatches(store, tokens=100, context_length=32, batch_size=1)
    reader = EvalBatches(store, tokens=64, context_length=32, batch_size=1)
    with pytest.raises(IndexError):
        reader[2]
