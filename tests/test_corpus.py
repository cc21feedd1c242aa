"""The embedded corpus is the published one, and damage is noticed."""

import pytest

from gqa_jax.data import corpus


def test_sotu_is_whole_and_in_order():
    addresses = corpus.load_sotu()
    assert len(addresses) == 233
    assert addresses[0].name == "1790_george_washington_n"
    assert addresses[-1].name == "2021_joseph_r_biden_d"
    assert [address.name for address in addresses] == sorted(address.name for address in addresses)
    assert sum(len(address.text.encode()) for address in addresses) == corpus.SOTU_BYTES
    assert addresses[0].text.startswith("Fellow-Citizens of the Senate and House of Representatives: In meeting you again")


def test_other_content_and_missing_file_are_errors():
    with pytest.raises(ValueError, match=r"sotu.jsonl.xz is damaged .*install gqa-jax again"):
        corpus.read_embedded(corpus.SOTU_FILE, "0" * 64)
    with pytest.raises(ValueError, match=r"nothing.xz can't be read"):
        corpus.read_embedded("nothing.xz", "0" * 64)
