"""What a tokenizer loses is seen in a sample, wherever in the text it is."""

import json

import pytest

from gqa_jax.data import roundtrip
from gqa_jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer

#: A tokenizer with entries for h, e, l and o only, and none for what is unknown.
FEW_LETTERS = {
    "version": "1.0",
    "decoder": {"type": "Fuse"},
    "added_tokens": [
        {"id": 0, "content": "</s>", "special": True} | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ],
    "model": {"type": "BPE", "vocab": {"</s>": 0, "h": 1, "e": 2, "l": 3, "o": 4}, "merges": []},
}


@pytest.mark.parametrize("spec", ["bytes", "gpt2"])
def test_byte_level_tokenizers_lose_nothing(spec):
    texts = ["Grüße, 汉字 and a <|endoftext|>", " \n\t  two  spaces", "\u2028 e\u0301 é"]
    found = roundtrip.sample(texts, load_tokenizer(spec))
    assert found == roundtrip.Sample(3, 0, sum(len(text.encode()) for text in texts), 0, None)


def test_a_tokenizer_that_drops_characters():
    tokenizer = HuggingFaceTokenizer(json.dumps(FEW_LETTERS).encode(), "few")
    found = roundtrip.sample(["hello", "hello wörld"], tokenizer)
    assert found.pieces == 2
    assert found.changed == 1
    assert found.text_bytes == 5 + 12
    assert found.lost_bytes == 6  # the space, w, ö of two bytes, r, d
    before, after = found.example
    assert "wörld" in before
    assert "w" not in after


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_a_tokenizer_that_marks_words_by_their_space_loses_nothing(scheme):
    """A piece that began with a space would come back without it."""
    words = [f"word{i}" for i in range(4000)]
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": True}
    alphabet = sorted({"\u2581", *"".join(words)})
    model = {"type": "BPE", "vocab": {"</s>": 0} | {letter: i for i, letter in enumerate(alphabet, 1)}, "merges": []}
    content = FEW_LETTERS | {"decoder": metaspace, "pre_tokenizer": metaspace, "model": model}
    found = roundtrip.sample([" ".join(words)], HuggingFaceTokenizer(json.dumps(content).encode(), "words"))
    assert (found.pieces > 8, found.changed, found.example) == (True, 0, None)


def test_pieces_are_taken_from_all_over_the_text():
    class Failing(ByteTokenizer):
        def encode_batch(self, texts):
            return super().encode_batch([text.replace("é", "e") for text in texts])

    long = "a" * 500_000 + "é" * 50_000 + "a" * 500_000
    many = [f"text {i}" for i in range(5000)] + ["é"] * 5000 + ["text"] * 5000
    for texts in ([long], many, ["b", long, "c"]):
        found = roundtrip.sample(texts, Failing())
        assert 0 < found.changed < found.pieces <= roundtrip.PIECES
        assert found.lost_bytes > 0
        assert len(found.example[0]) <= 24
    assert roundtrip.sample(["é" * 3], Failing()).pieces == 1
