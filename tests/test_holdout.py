"""The two rules by which documents are held out: what each promises, whatever the order of the inputs."""

import hashlib
import itertools

import numpy as np
import pytest

from gqa_jax.data import holdout
from gqa_jax.data.documents import InputError

LIMIT = 2**64 // 20


def split_of(hashes, sources, names=("a", "b", "c"), every=20):
    found = holdout.by_hash(np.array(hashes, np.uint64), np.array(sources), names, every)
    assert np.flatnonzero(found.held_out).tolist() == sorted(found.order.tolist())
    return found


def test_hash_and_limit():
    assert holdout.hash_of(b"text") == int(hashlib.sha256(b"text").hexdigest()[:16], 16)
    for every in (2, 3, 20, 2**31):
        assert holdout.limit(every) * every < 2**64 <= (holdout.limit(every) + 1) * every  # below 2^64 / every, and the largest
    found = split_of([LIMIT, LIMIT + 1, 2**63, 0], [0, 0, 0, 0], ["a"])
    assert found.order.tolist() == [3, 0]


def test_held_out_documents_are_kept_by_name_of_source_and_hash():
    found = split_of([9, 2**63, 7, 2**63 + 1, 5, 2**63 + 2, 3], [0, 0, 1, 1, 2, 2, 1], ["web", "books", "code"])
    assert found.order.tolist() == [6, 2, 4, 0]  # books 3 and 7, code 5, web 9
    assert found.doubts == []


def test_a_source_without_any_gives_all_documents_of_its_lowest_hash():
    high = 2**63
    found = split_of([5, high, high + 9, high + 2, high + 9, high + 2, high + 1], [0, 0, 1, 1, 1, 0, 2])
    # Source 1 has none: its lowest, high + 2, wherever it is; source 2 has one text and is left alone.
    assert np.flatnonzero(found.held_out).tolist() == [0, 3, 5]
    assert found.doubts == ["source c has 1 document: none of it is held out"]


def test_the_order_of_documents_and_sources_changes_nothing():
    generator = np.random.default_rng(0)
    documents = [(int(h), s) for h, s in zip(generator.integers(2**60, 2**64, 12, np.uint64), [0, 1, 2] * 4, strict=True)]
    expected = None
    for names in itertools.permutations(["a", "b", "c"]):
        shuffled = [documents[i] for i in generator.permutation(12)]
        sources = [names.index("abc"[s]) for _, s in shuffled]
        found = split_of([h for h, _ in shuffled], sources, names)
        kept = [(shuffled[i][0], names[sources[i]]) for i in found.order]
        assert kept == (expected or kept)
        expected = kept
    assert [name for _, name in expected] == ["a", "b", "c"]  # none is below the limit: the lowest of each


def test_sources_of_one_text_are_left_as_they_are_and_said():
    high = 2**63
    assert split_of([5, high, high + 1, high + 1, 6], [0, 0, 1, 1, 2]).doubts == [
        "source b has 2 copies of 1 document: none of it is held out",
        "source c has 1 document: none of it is trained on",
    ]
    many = split_of([5, *range(high, high + 9)], range(10), [f"s{i}" for i in range(10)]).doubts
    assert many == [
        "9 sources, most often of 1 document each (s1, s2, s3, ...): none of them is held out",
        "source s0 has 1 document: none of it is trained on",
    ]
    assert split_of([5, 6, high, high + 1], [0, 0, 1, 1], ["a", "b"]).doubts == [
        "source a has 2 documents: none of it is trained on"
    ]


def test_a_store_without_any_gives_its_lowest():
    high = 2**63
    assert split_of([high + 2, high, high + 1], [0, 1, 2]).order.tolist() == [1]


def test_texts_that_cannot_be_split():
    with pytest.raises(InputError, match="3 documents, all of them the same text: what is held out would be trained on too"):
        split_of([7, 7, 7], [0, 1, 1], ["a", "b"])
    hashes = [2**60, 2**61, 2**58]
    with pytest.raises(
        InputError, match=r"3 documents, all of them with hashes in the lowest 1/2: .* use --holdout_every=8 or more"
    ):
        split_of(hashes, [0, 0, 0], ["a"], every=2)
    assert split_of(hashes, [0, 0, 0], ["a"], every=8).held_out.tolist() == [True, False, True]
    with pytest.raises(InputError, match="use --holdout_every=8"):
        split_of(hashes, [0, 0, 0], ["a"], every=7)


def test_by_position():
    found = holdout.by_position(11, 5)
    assert found.order.tolist() == [2, 7]
    with pytest.raises(InputError, match="40 documents are too few to hold out every 100th: use --holdout_every=79 or less"):
        holdout.by_position(40, 100)
    assert holdout.by_position(40, 79).order.tolist() == [39]
    with pytest.raises(InputError, match=r"1 document: a store needs at least 2, .*--separator cuts a file into documents"):
        holdout.by_position(1, 2)


@pytest.mark.parametrize(
    ("tokens", "every", "expected"),
    [
        (2, 20, 1),
        (19, 20, 18),  # blocks of 1
        (40, 20, 38),  # of 2
        (100, 20, 92),  # of 4: 95 is within the 24th
        (10_000_000, 2, 38 * 131_072),  # never larger than 131,072
    ],
)
def test_the_end_of_one_document_is_cut_on_a_border_of_blocks(tokens, every, expected):
    assert holdout.tail_start(tokens, every) == expected


def test_one_document_of_one_token_has_no_end():
    with pytest.raises(InputError, match="1 document of 1 token: too short"):
        holdout.tail_start(1, 2)
