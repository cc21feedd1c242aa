"""Held-out loss: its error by documents, its parts, bits per byte by what ids decode to, differences between runs."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf

from gqa_jax.data.prepare import Recipe, prepare
from gqa_jax.data.reader import EvalBatches
from gqa_jax.data.store import SOURCES
from gqa_jax.training import evaluation

FIVE_LETTERS = Path(__file__).parent / "data" / "five_letters.json"  # a tokenizer that knows h, e, l and o, and drops the rest


def test_clustered_error_is_the_ordinary_one_for_clusters_of_one():
    values = np.random.default_rng(0).normal(size=50)
    found = evaluation.estimate(values, np.ones(50, int))
    assert found.value == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(50))
    assert found.n_documents == 50
    half = 2.0095752 * found.standard_error  # Student's t of 49 degrees of freedom
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))


def clusters(rng, n, size, sigma=1.0):
    """Sums and counts of `n` clusters of `size` values with an error in common."""
    values = sigma * rng.normal(size=(n, 1)) + 0.5 * rng.normal(size=(n, size))
    return values.sum(axis=1), np.full(n, size), values


def test_clustered_error_covers_the_truth_where_values_of_a_cluster_depend_on_each_other():
    """Monte Carlo: the spread of the mean over draws equals the stated error; the naive error is far too small."""
    rng = np.random.default_rng(1)
    means, stated, naive = [], [], []
    for _ in range(400):
        sums, counts, values = clusters(rng, 30, 20)
        found = evaluation.estimate(sums, counts)
        means.append(found.value)
        stated.append(found.standard_error)
        naive.append(values.std() / np.sqrt(values.size))
    assert np.mean(stated) == pytest.approx(np.std(means), rel=0.1)
    assert np.mean(naive) < 0.4 * np.std(means)


def test_intervals_of_few_documents_cover_the_truth():
    """95% of them, and with 1.96 standard errors, as for many documents, far fewer."""
    rng = np.random.default_rng(2)
    found = [evaluation.estimate(*clusters(rng, 4, 10)[:2]) for _ in range(2000)]
    assert np.mean([one.low < 0 < one.high for one in found]) == pytest.approx(0.95, abs=0.015)
    assert np.mean([abs(one.value) < 1.96 * one.standard_error for one in found]) < 0.87


def test_an_interval_is_students_t():
    """Quantiles from a table (Abramowitz and Stegun, Table 26.10)."""
    for clusters_, quantile in ((2, 12.706), (3, 4.303), (11, 2.228), (121, 1.980)):
        assert evaluation.interval(1.0, 0.1, clusters_) == pytest.approx((1 - 0.1 * quantile, 1 + 0.1 * quantile), abs=1e-4)


def test_one_document_has_no_error_estimate():
    assert evaluation.estimate(np.array([4.0]), np.array([4])) == (1.0, None, None, None, 1)
    assert evaluation.plus_minus(None) == ""
    assert evaluation.plus_minus(0.03104) == " ± 0.0310"


def test_positions_are_ranges_that_double():
    assert evaluation.position_buckets(1) == ["0"]
    assert evaluation.position_buckets(2) == ["0", "1"]
    assert evaluation.position_buckets(8) == ["0", "1", "2-3", "4-7"]
    assert evaluation.position_buckets(9) == ["0", "1", "2-3", "4-7", "8"]
    assert evaluation.position_buckets(12) == ["0", "1", "2-3", "4-7", "8-11"]


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """An evaluation of 240 of some 600 held-out bytes of two sources and a third that has none of them; T = 12."""
    folder = tmp_path_factory.mktemp("store")
    texts = [f"document {i} " * (1 + i % 7) for i in range(60)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    store = prepare(Recipe((str(folder / "a.jsonl"),), tokenizer="bytes", holdout_every=4), folder / "store")
    splits = {split: np.arange(len(store.documents(split)), dtype=np.int32) % 2 for split in ("train", "validation")}
    np.savez(store.path / SOURCES, names=["web", "books", "none"], **splits)
    return EvalBatches(store, tokens=240, context_length=12, batch_size=7, block_tokens=48)


def losses_of(batch):
    """Losses that differ between ids and positions."""
    return batch["targets"] / 100 + np.arange(batch["targets"].shape[1]) / 7


def test_parts_of_an_evaluation_by_their_definition(batches):
    result = evaluation.evaluate(losses_of, batches)
    losses = np.concatenate([losses_of(batch)[batch["mask"]] for batch in batches])
    index, documents = batches.document_index, batches.documents
    position, source = np.tile(np.arange(12), 20), documents.sources[index]

    def expected(chosen):
        own, counts = np.unique(index[chosen], return_counts=True)
        sums = np.array([losses[chosen & (index == i)].sum() for i in own])
        mean, n = losses[chosen].mean(), len(own)
        error = math.sqrt(n / (n - 1) * np.sum((sums - mean * counts) ** 2)) / chosen.sum()
        return mean, error, int(chosen.sum()), n

    ranges = {"0": (0, 0), "1": (1, 1), "2-3": (2, 3), "4-7": (4, 7), "8-11": (8, 11)}
    wanted = {("", ""): np.ones(240, bool)}
    wanted |= {(name, ""): source == i for i, name in enumerate(("web", "books"))}
    wanted |= {("", name): (position >= first) & (position <= last) for name, (first, last) in ranges.items()}
    of_loss = {(part.source, part.position): part for part in result.parts if part.metric == "loss"}
    assert list(of_loss) == list(wanted)
    for key, chosen in wanted.items():
        part = of_loss[key]
        assert (part.value, part.standard_error, part.n, part.n_documents) == pytest.approx(expected(chosen))
        assert part.unit == "nats/token"
    bits = {part.source: part for part in result.parts if part.metric == "bits_per_byte"}
    assert list(bits) == ["", "web", "books"]
    for i, name in enumerate(("web", "books")):
        total = documents.text_bytes[documents.sources == i].sum()
        assert bits[name].value == pytest.approx(losses[source == i].sum() / math.log(2) / total)
        assert bits[name].unit == "bits/byte"
    assert (result.loss, result.loss_sem) == pytest.approx(expected(wanted["", ""])[:2])
    assert result.loss_low < result.loss < result.loss_high
    assert result.bits_per_byte == bits[""].value
    assert (result.tokens, result.documents) == (240, len(documents.numbers))
    assert result.documents < batches.heldout_documents

    by_document = result.by_document
    assert by_document.loss.sum() == pytest.approx(losses.sum())
    assert by_document.loss[2] == pytest.approx(losses[index == 2].sum())
    rows = evaluation.rows(result, step=9, context=12, rules="hash/spread/one")
    assert len(rows) == len(result.parts)
    assert rows[0] == {
        "step": 9, "task": "held-out", "source": "", "context": 12, "position": "", "metric": "loss", "value": result.loss,
        "standard_error": result.loss_sem, "n": 240, "n_documents": result.documents, "unit": "nats/token",
        "rules": "hash/spread/one",
    }  # fmt: skip


def test_a_loss_that_is_not_finite_is_an_answer(batches):
    for bad in (math.inf, math.nan):
        result = evaluation.evaluate(lambda batch, bad=bad: np.full(batch["targets"].shape, bad), batches)
        assert not math.isfinite(result.loss)


def norm_file(folder):
    """A tokenizer that folds case and accents, and writes bytes."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.normalizer = hf.normalizers.Sequence(
        [hf.normalizers.NFKD(), hf.normalizers.StripAccents(), hf.normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["hello"], hf.trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet))
    tokenizer.save(str(folder / "norm.json"))
    return folder / "norm.json"


@pytest.mark.parametrize("name", ["bytes", "gpt2", "bpe:300", "norm", "five_letters"])
def test_bits_per_byte_are_by_the_bytes_that_ids_decode_to(name, tmp_path):
    """Of a uniform model, log2(V) an id, also where documents are cut and where the tokenizer loses text."""
    texts = [("Hello, wörld of ÀCCENTS " * 8 + "汉字语言模型训练数据" * 12 + "hello") + str(i) for i in range(24)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tokenizer = {"norm": norm_file, "five_letters": lambda _: FIVE_LETTERS}.get(name, lambda _: name)(tmp_path)
    store = prepare(Recipe((str(tmp_path / "a.jsonl"),), tokenizer=str(tokenizer), holdout_every=2), tmp_path / "s", threads=1)
    stored, ends = np.asarray(store.tokens("validation")), store.documents("validation")[:, 0]
    own = store.tokenizer()

    def text_bytes(start, stop):
        """Bytes of the text of tokens start ... stop - 1: for each document what is decoded to its end and to its begin."""
        total, first = 0, 0
        for end in ends:
            whole = stored[first : end - 1]  # without the end of the document
            before, after = (min(max(place - first, 0), len(whole)) for place in (start, stop))
            total += decoded(whole[:after]) - decoded(whole[:before])
            first = end
        return total

    def decoded(ids):
        if name == "bytes":
            return len(ids)
        if name == "gpt2":
            return len(b"".join(own.encoding.decode_tokens_bytes(ids.tolist())))
        if name == "five_letters":
            return len(own.decode(ids))  # "h e l l o"
        return sum(len(own._tokenizer.id_to_token(int(i))) for i in ids)  # a character of an entry is a byte

    n = len(stored) - 1
    for tokens, block in ((n, n), (n // 3 // 8 * 8, 8), (1, 1), (16, 16)):
        batches = EvalBatches(store, tokens=tokens, context_length=1, batch_size=64, block_tokens=block)
        result = evaluation.evaluate(lambda batch: np.full(batch["targets"].shape, math.log(store.vocab_size)), batches)
        expected = sum(text_bytes(start + 1, start + 1 + batches.unit) for start in batches.starts.tolist())
        if expected:
            assert result.bits_per_byte == pytest.approx(tokens * math.log2(store.vocab_size) / expected)
        assert batches.documents.text_bytes.sum() == expected
    if name == "five_letters":  # of the text it would be below 0.2
        assert (
            1.1
            < evaluation.evaluate(
                lambda batch: np.full(batch["targets"].shape, math.log(5)),
                EvalBatches(store, tokens=n, context_length=1, batch_size=64, block_tokens=n),
            ).bits_per_byte
            < 1.4
        )


def test_text_of_no_bytes_has_no_bits_per_byte(batches):
    """As where a tokenizer gives nothing but the end of documents."""
    bytes_before = batches.documents.text_bytes.copy()
    batches.documents.text_bytes[:] = 0
    try:
        result = evaluation.evaluate(losses_of, batches)
    finally:
        batches.documents.text_bytes[:] = bytes_before
    assert result.bits_per_byte is None
    assert {part.metric for part in result.parts} == {"loss"}


def documents(hashes, tokens, loss, targets=0):
    n = len(hashes)
    return evaluation.Documents(
        document=np.array(hashes, np.uint64), source=np.full(n, -1, np.int32), sources=np.array([], np.str_),
        tokens=np.array(tokens), targets=np.broadcast_to(np.array(targets, np.uint64), n), text_bytes=np.array(tokens),
        loss=np.array(loss, float),
    )  # fmt: skip


def test_a_difference_is_paired_by_documents():
    """What documents share cancels: runs whose difference is the same on each have hardly an error, whatever the losses are."""
    rng = np.random.default_rng(3)
    hashes, tokens = rng.integers(0, 2**64, 40, np.uint64), rng.integers(10, 500, 40)
    loss = tokens * rng.normal(3, 1, 40)
    ours = documents(hashes, tokens, loss + tokens * (0.02 + 0.001 * rng.normal(size=40)))
    theirs = documents(hashes, tokens, loss)
    found = evaluation.difference(ours, theirs)
    assert found.estimate.value == pytest.approx(0.02, abs=0.001)
    assert 0.0001 < found.estimate.standard_error < 0.0005 < 0.01 < evaluation.estimate(loss, tokens).standard_error
    assert (found.estimate.n_documents, found.tokens, found.left_out) == (40, tokens.sum(), 0)
    expected = ours.loss - theirs.loss - found.estimate.value * tokens
    assert found.estimate.standard_error == pytest.approx(math.sqrt(40 / 39 * np.sum(expected**2)) / tokens.sum())

    other_way = evaluation.difference(theirs, ours)
    assert other_way.estimate.value == pytest.approx(-found.estimate.value)
    order = rng.permutation(40)
    shuffled = documents(hashes[order], tokens[order], loss[order])
    assert evaluation.difference(ours, shuffled).estimate == pytest.approx(found.estimate)


def test_a_difference_between_stores_is_of_the_documents_that_both_have():
    """Equal texts are as many documents; one of which more was counted there is another."""
    ours = documents([7, 7, 9, 2**63, 5], [10, 10, 10, 20, 10], [1, 3, 5, 7, 100])
    theirs = documents([2**63, 7, 8, 7, 7, 5], [20, 10, 10, 10, 10, 11], [1, 2, 50, 6, 60, 0])
    found = evaluation.difference(ours, theirs)
    assert found.estimate.n_documents == 3
    assert found.estimate.value == pytest.approx(((1 - 2) + (3 - 6) + (7 - 1)) / 40)
    assert (found.tokens, found.left_out) == (40, 5)
    one = evaluation.difference(documents([1], [4], [2.0]), documents([1], [4], [1.0])).estimate
    assert (one.value, one.standard_error) == (0.25, None)
    assert evaluation.difference(ours, documents([1], [4], [2.0])) is None


def test_documents_are_compared_where_the_same_of_their_targets_were_counted(tmp_path):
    """Not where only as many were: units twice as long read other parts of a document, here as long in all."""
    texts = [f"{i:02d} of the addresses " * 23 for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    store = prepare(Recipe((str(tmp_path / "a.jsonl"),), tokenizer="bytes", holdout_every=4), tmp_path / "store")

    def evaluated(**changes):
        settings = {"tokens": 768, "context_length": 8, "batch_size": 7, "block_tokens": 16} | changes
        return evaluation.evaluate(losses_of, EvalBatches(store, **settings)).by_document

    ours = evaluated()
    same = evaluation.difference(ours, evaluated(context_length=16))
    assert (same.tokens, same.left_out, same.estimate.n_documents) == (768, 0, len(ours.document))
    others = evaluated(block_tokens=32)
    counts = [set(zip(one.document.tolist(), one.tokens.tolist(), strict=True)) for one in (ours, others)]
    assert counts[0] == counts[1]
    assert evaluation.difference(ours, others) is None

    found = evaluation.difference(documents([1, 2], [4, 5], [2.0, 3.0], [7, 8]), documents([2, 1], [5, 4], [1.0, 1.0], [9, 7]))
    assert (found.estimate.value, found.tokens, found.left_out) == (0.25, 4, 2)


def test_documents_of_a_run_are_read_as_they_were_written(batches):
    found = evaluation.evaluate(losses_of, batches).by_document
    content = evaluation.to_bytes(found)
    assert content == evaluation.to_bytes(found)
    for name, column in evaluation.from_bytes(content)._asdict().items():
        np.testing.assert_array_equal(column, getattr(found, name))
        assert column.dtype == getattr(found, name).dtype
    without = io.BytesIO()  # as files of before there were `targets`
    np.savez(without, **{name: column for name, column in found._asdict().items() if name != "targets"})
    with pytest.raises(ValueError, match="it has no targets"):
        evaluation.from_bytes(without.getvalue())
    flipped = bytearray(content)
    flipped[len(flipped) // 2] ^= 1
    short = evaluation.to_bytes(found._replace(loss=found.loss[1:]))
    for damaged in (b"", content[:100], bytes(flipped), short, evaluation.to_bytes(found._replace(loss=found.loss * math.nan))):
        with pytest.raises(ValueError, match=r"."):
            evaluation.from_bytes(damaged)
