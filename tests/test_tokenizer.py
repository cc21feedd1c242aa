"""Tokenizers: golden ids, exact cutting of long documents, ends of documents, errors."""

import itertools
import json

import numpy as np
import pytest
import tokenizers as hf

from gqa_jax.data import tokenizer as tk
from gqa_jax.data.corpus import load_sotu
from gqa_jax.data.vocabulary import TokenizerError

# Ids by the published GPT-2 tokenizer (Hugging Face `tokenizers`); special tokens in text are text.
GPT2_GOLDEN = {
    "": [],
    "Hello, world!": [15496, 11, 995, 0],
    "  leading and   inner  spaces ": [220, 3756, 290, 220, 220, 8434, 220, 9029, 220],
    "tabs\tand\r\nlines\n\n\n end\n": [8658, 82, 197, 392, 201, 198, 6615, 628, 198, 886, 198],
    "it's we'll they've I'M don'T": [270, 338, 356, 1183, 484, 1053, 314, 6, 44, 836, 6, 51],
    "1234567890 3.14159 1,000,000": [10163, 2231, 30924, 3829, 513, 13, 1415, 19707, 352, 11, 830, 11, 830],
    "naïve café 漢字": [2616, 38776, 40304, 10545, 120, 95, 27764, 245],
    "😀👩\u200d👧 \u200b\u0301": [47249, 222, 41840, 102, 447, 235, 41840, 100, 20126, 136, 223],
    "a<|endoftext|>b": [64, 27, 91, 437, 1659, 5239, 91, 29, 65],
    "x\x1c y\x85z\xa0\u3000w\u2028v": [87, 216, 331, 126, 227, 89, 1849, 5099, 222, 86, 447, 101, 85],
    "antidisestablishmentarianism": [415, 29207, 44390, 3699, 1042],
    "=" * 70: [23926, 50155],
    "def f(x):\n    return x**2  # ok\n": [
        4299,
        277,
        7,
        87,
        2599,
        198,
        220,
        220,
        220,
        1441,
        2124,
        1174,
        17,
        220,
        1303,
        12876,
        198,
    ],
    "\x00\x7f\ufffd": [188, 221, 4210],
}


@pytest.fixture(scope="module")
def gpt2():
    return tk.load_tokenizer("gpt2", threads=2)


@pytest.fixture
def file(tmp_path):
    """A function that saves a word-level tokenizer with the given special tokens."""

    def save(*special, **settings):
        tokenizer = hf.Tokenizer(hf.models.WordLevel({"a": 0, "b": 1, "[UNK]": 7}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
        tokenizer.add_special_tokens(list(special))
        for name, value in settings.items():
            getattr(tokenizer, name)(**value)
        path = tmp_path / "tokenizer.json"
        tokenizer.save(str(path))
        return str(path)

    return save


def test_gpt2_ids_are_the_published_ones(gpt2):
    for text, ids in zip(GPT2_GOLDEN, gpt2.encode_batch(list(GPT2_GOLDEN)), strict=True):
        assert ids.tolist() == GPT2_GOLDEN[text], repr(text)
        assert ids.dtype == np.uint32
        assert gpt2.decode(ids) == text
    assert (gpt2.vocab_size, gpt2.eos_id) == (50_257, 50_256)
    assert gpt2.decode([50_256]) == "<|endoftext|>"


def test_gpt2_token_count_of_the_corpus(gpt2):
    texts = load_sotu()[:20]
    together = gpt2.encode_batch(texts)
    assert sum(map(len, together)) == 51_323
    for text, ids in zip(texts[:3], together, strict=False):
        np.testing.assert_array_equal(gpt2.encode_batch([text])[0], ids)


def test_pieces_have_the_ids_of_the_whole(gpt2):
    parts = ["a", "'ll", " ", "  ", "\n", "\r\n", "\t", "\x1c", "\x85", "\xa0", "漢", "9", ".", "<|endoftext|>"]
    texts = [
        "".join(parts[i] for i in order) for order in itertools.product(range(0, 14, 2), range(14), range(1, 14, 2), (0, 2))
    ]
    for text, whole in zip(texts, gpt2.encode_batch(texts), strict=True):
        pieces = list(tk._pieces(text, piece=1))
        assert "".join(pieces) == text
        np.testing.assert_array_equal(np.concatenate(gpt2.encode_batch(pieces)), whole, err_msg=repr(pieces))
    assert len(list(tk._pieces("one two  three\nfour", piece=1))) == 4


def test_long_documents_are_cut_and_joined(gpt2):
    text = " ".join(load_sotu()[:30])
    assert len(list(tk._pieces(text))) > 1
    short, long, empty = gpt2.encode_batch(["a b", text, ""])
    np.testing.assert_array_equal(long, gpt2.encoding.encode_ordinary(text))
    assert short.tolist() == [64, 275]
    assert empty.size == 0


def test_words_above_a_million_characters_are_cut():
    word = "ab " + "x" * 2_500_000
    pieces = list(tk._pieces(word))
    assert "".join(pieces) == word
    assert [len(piece) for piece in pieces] == [2, 1_000_000, 1_000_000, 500_001]
    assert [len(piece) for piece in tk._pieces("y" * 1_000_000)] == [1_000_000]


def test_bytes_round_trip():
    tokenizer = tk.load_tokenizer("bytes")
    a, b = tokenizer.encode_batch(["é<|endoftext|>", "x"])
    assert a.tolist() == list("é<|endoftext|>".encode())
    assert tokenizer.decode([*a, 256, *b, 256]) == "é<|endoftext|><|endoftext|>x<|endoftext|>"
    assert tokenizer.vocab_size == 257


def test_hugging_face_file(file):
    tokenizer = tk.load_tokenizer(file("</s>"))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (8, 3)  # ids have a gap: one more than the largest
    assert [ids.tolist() for ids in tokenizer.encode_batch(["a b", "b"])] == [[0, 1], [1]]
    assert tokenizer.decode([0, 3]) == "a </s>"
    assert 3 not in tokenizer.encode_batch(["a</s>b"])[0]


def test_settings_of_a_file_do_not_cut_or_pad(file):
    path = file("</s>", enable_truncation={"max_length": 2}, enable_padding={"length": 5})
    assert tk.load_tokenizer(path).encode_batch(["a b a b", "a"])[1].tolist() == [0]
    assert len(tk.load_tokenizer(path).encode_batch(["a b a b"])[0]) == 4


def test_end_of_document_is_found_or_asked_for(file):
    assert tk.load_tokenizer(file("<x>"), eos="<x>").eos_id == 3
    with pytest.raises(TokenizerError, match=r"no known end of a document: choose with --eos TOKEN.*\['<x>'\]"):
        tk.load_tokenizer(file("<x>"))
    with pytest.raises(TokenizerError, match=r"several ends of a document, \['</s>', '<eos>'\]"):
        tk.load_tokenizer(file("<eos>", "</s>"))
    with pytest.raises(TokenizerError, match=r"--eos '<y>' is no entry"):
        tk.load_tokenizer(file("<x>"), eos="<y>")
    with pytest.raises(TokenizerError, match="leave --eos out"):
        tk.load_tokenizer("bytes", eos="</s>")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt3", r"no file gpt3, and no name of a tokenizer; use bytes, gpt2"),
        ("bpe:512", "is trained on the input"),
        ("hub:no such name", r"tokenizer hub:no such name: Repo id must"),
    ],
)
def test_unknown_tokenizers(spec, message):
    with pytest.raises(TokenizerError, match=message):
        tk.load_tokenizer(spec)


def test_hub_without_a_connection(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(TokenizerError, match=r"hub:gpt2: the hub can't be reached and the local cache has no copy"):
        tk.load_tokenizer("hub:gpt2")


def test_hub_name_is_read_from_the_cache(file, monkeypatch):
    asked = []
    path = file("</s>")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, revision: asked.append((*args, revision)) or path)
    tokenizer = tk.load_tokenizer("hub:some/model@v2")
    assert asked == [("some/model", "tokenizer.json", "v2")]
    assert (tokenizer.name, tokenizer.eos_id) == ("hub:some/model@v2", 3)


def test_file_that_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"is no Hugging Face tokenizer.json"):
        tk.load_tokenizer(str(tmp_path))


def test_bpe_is_trained_the_same_each_time():
    texts = load_sotu()[:5]
    tokenizer, again = tk.train_bpe(texts, 400), tk.train_bpe(texts, 400)
    assert tokenizer.sha256 == again.sha256
    assert (tokenizer.vocab_size, tokenizer.name) == (400, "bpe:400")
    text = "unseen: 漢字 <|endoftext|>\n"
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert json.loads(tokenizer.json)["model"]["type"] == "BPE"


def test_bpe_errors():
    with pytest.raises(TokenizerError, match=r"yields only 26\d entries; use bpe:26\d"):
        tk.train_bpe(["abc abc"], 1000)
    for spec in ("bpe:256", "bpe:x", "bpe:"):
        with pytest.raises(TokenizerError, match="at least 257"):
            tk.bpe_size(spec)
    assert tk.bpe_size("bpe:4_096") == 4096
    assert tk.bpe_size("gpt2") is None


TEXT = "naïve  café 漢字, it's 9\n\t😀\u200d\ufffd!"


def with_byte_fallback():
    """As Llama 2's: a few entries, and one for every byte; a space before the first word that decoding takes away."""
    words = {"\u2581": 256, "\u2581caf": 257, "it": 258, "</s>": 259, "<unk>": 260, "\ufffd": 261}
    tokenizer = hf.Tokenizer(
        hf.models.BPE({f"<0x{i:02X}>": i for i in range(256)} | words, [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = hf.decoders
    tokenizer.decoder = steps.Sequence(
        [steps.Replace("\u2581", " "), steps.ByteFallback(), steps.Fuse(), steps.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tk.HuggingFaceTokenizer(tokenizer.to_str().encode(), "fallback")


@pytest.mark.parametrize("name", ["bytes", "gpt2", "bpe", "fallback"])
def test_bytes_of_a_prefix_are_those_that_it_decodes_to(name, gpt2):
    """Also where a token ends within a character; what stands before a border of characters decodes to those bytes."""
    made = {
        "bytes": tk.ByteTokenizer,
        "gpt2": lambda: gpt2,
        "bpe": lambda: tk.train_bpe([load_sotu()[0]], 300),
        "fallback": with_byte_fallback,
    }
    tokenizer = made[name]()
    (ids,) = tokenizer.encode_batch([TEXT])
    document = np.array([*ids, tokenizer.eos_id], np.uint16)
    ends = np.arange(len(document) + 1)
    found = tokenizer.bytes_at(document, ends)
    assert (found.dtype, found[0], found[-2], found[-1]) == (np.int64, 0, len(TEXT.encode()), len(TEXT.encode()))
    borders = {len(TEXT[:i].encode()) for i in range(len(TEXT) + 1)}
    assert len(borders & {*found.tolist()}) > 12
    for end in ends[:-1]:
        if found[end] in borders:
            assert tokenizer.decode(document[:end]).encode() == TEXT.encode()[: found[end]]
    assert (np.diff(found) >= 0).all()
    if name == "fallback":
        single = document[:-1] < 256
        assert (np.diff(found)[:-1][single] == 1).all()
        assert 20 < single.sum() < len(single)
    np.testing.assert_array_equal(tokenizer.bytes_at(document, [5, 2, 5]), found[[5, 2, 5]])


def test_bytes_of_gpt2_are_exact_at_every_token(gpt2):
    (ids,) = gpt2.encode_batch([TEXT])
    expected = np.cumsum([len(gpt2.encoding.decode_single_token_bytes(id_)) for id_ in ids.tolist()])
    np.testing.assert_array_equal(gpt2.bytes_at(ids, np.arange(len(ids)) + 1), expected)
    assert gpt2.bytes_at(ids, [len(ids)]) == len(TEXT.encode())


def test_bytes_of_entries_that_are_not_written_in_bytes(tmp_path):
    """Entries added to a byte-level tokenizer: special ones stand for nothing, others for their own text."""
    tokenizer = hf.Tokenizer.from_str(tk.train_bpe([load_sotu()[0]], 300).json.decode())
    tokenizer.add_tokens(["two words", "漢字"])
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tk.load_tokenizer(str(tmp_path))
    (ids,) = tokenizer.encode_batch(["two wordsé漢字."])
    assert {300, 301} < set(ids.tolist())
    mask = tokenizer._tokenizer.token_to_id("<mask>")
    ids = np.array([*ids, mask, tokenizer.eos_id])
    assert tokenizer.bytes_at(ids, [1, len(ids) - 3, len(ids)]).tolist() == [9, 17, 18]
    assert tokenizer.decode(ids[:-2]) == "two wordsé漢字."


def test_bytes_of_a_tokenizer_that_loses_text_are_those_of_what_is_left(file):
    """Without a decoder Hugging Face writes spaces between entries; they count, as they are in what is decoded."""
    tokenizer = tk.load_tokenizer(file("</s>", "[UNK]"))
    (ids,) = tokenizer.encode_batch(["a zzz b"])
    ids = [*ids, tokenizer.eos_id]
    assert ids == [0, 7, 1, 3]
    assert tokenizer.bytes_at(np.array(ids), np.arange(5)).tolist() == [0, 1, 1, 3, 3]
    ordinary = tk.load_tokenizer(file("[UNK]"), eos="b")  # no special token ends a document
    assert ordinary.bytes_at(np.array([0, 0, 1]), [2, 3]).tolist() == [3, 3]
