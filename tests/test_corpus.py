"""The embedded corpus is the published one, and damage is noticed."""

import pytest

from gqa_jax.data import corpus


def test_sotu_is_whole_and_in_order():
    texts = corpus.load_sotu()
    assert len(texts) == 233
    assert sum(len(text.encode()) for text in texts) == corpus.SOTU_BYTES
    assert texts[0].startswith("Fellow-Citizens of the Senate and House of Representatives: In meeting you again")
    assert "(Applause.)" in texts[-1]


def test_other_content_and_missing_file_are_errors():
    with pytest.raises(ValueError, match=r"sotu.jsonl.xz is damaged .*install gqa-jax again"):
        corpus.read_embedded(corpus.SOTU_FILE, "0" * 64)
    with pytest.raises(ValueError, match=r"nothing.xz can't be read"):
        corpus.read_embedded("nothing.xz", "0" * 64)
