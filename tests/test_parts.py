"""Parts: resumable, checked, and assembled by document."""

import hashlib

import numpy as np
import pytest

from gqa_jax.data import holdout, paragraphs, parts, roundtrip
from gqa_jax.data.documents import InputError
from gqa_jax.data.tokenizer import ByteTokenizer
from gqa_jax.data.vocabulary import TokenizerError


class Counting(ByteTokenizer):
    """Bytes, and how many texts were encoded."""

    def __init__(self):
        self.texts = 0

    def encode_batch(self, texts):
        self.texts += len(texts)
        return super().encode_batch(texts)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(parts, "CHUNK_CHARS", 20)


DOCUMENTS = [(f"text number {i}", i % 2) for i in range(9)]
TEXTS = [text for text, _ in DOCUMENTS]


def test_killed_at_any_document_and_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(roundtrip, "sample", lambda *_: roundtrip.Sample())  # encodes some texts twice
    whole = tmp_path / "whole"
    whole.mkdir()
    expected, _ = parts.encode_documents(DOCUMENTS, ByteTokenizer(), whole)
    assert len(expected) == 5
    for stop in range(len(DOCUMENTS)):
        folder = tmp_path / str(stop)
        folder.mkdir()

        def killed(stop=stop):
            yield from DOCUMENTS[:stop]
            raise RuntimeError("killed")

        with pytest.raises(RuntimeError, match="killed"):
            parts.encode_documents(killed(), ByteTokenizer(), folder)
        finished = stop // 2
        assert len(list(folder.iterdir())) == finished
        tokenizer = Counting()
        found, _ = parts.encode_documents(DOCUMENTS, tokenizer, folder)
        assert tokenizer.texts == len(DOCUMENTS) - 2 * finished
        assert [part.encoded for part in found] == [False] * finished + [True] * (5 - finished)
        assert [part.path.read_bytes() for part in found] == [part.path.read_bytes() for part in expected]


def test_changed_text_and_damaged_parts_are_encoded_again(tmp_path):
    first, _ = parts.encode_documents(DOCUMENTS, ByteTokenizer(), tmp_path)
    data = bytearray(first[1].path.read_bytes())
    data[200] ^= 1  # in the tokens
    first[1].path.write_bytes(data)
    first[2].path.write_bytes(first[2].path.read_bytes()[:100])
    changed = [*DOCUMENTS[:6], ("text number X", 0), *DOCUMENTS[7:]]
    again, _ = parts.encode_documents(changed, ByteTokenizer(), tmp_path)
    assert [part.encoded for part in again] == [False, True, True, True, False]

    class Other(ByteTokenizer):
        sha256 = "0" * 64

    others, _ = parts.encode_documents(changed, Other(), tmp_path)
    assert all(part.encoded for part in others)


def test_parts_of_the_first_version_are_not_taken(tmp_path):
    """Their names were of the same length, and they have neither hashes nor paragraphs."""
    prefix = f"1 {ByteTokenizer.sha256} {ByteTokenizer.eos_id} ".encode()
    lengths = np.array([13, 13], "<i8").tobytes()
    digest = hashlib.sha256(prefix + b"".join(text.encode() for text in TEXTS[:2]) + lengths).hexdigest()
    old = tmp_path / f"000000-{digest[:32]}.npz"
    np.savez(old, tokens=np.arange(28, dtype=np.uint16), counts=np.array([14, 14]), text_bytes=np.array([13, 13]))
    (part,), _ = parts.encode_documents(DOCUMENTS[:2], ByteTokenizer(), tmp_path)
    assert part.encoded
    assert part.path != old
    part.path.write_bytes(old.read_bytes())  # what if the name were the same: something is missing
    (again,), _ = parts.encode_documents(DOCUMENTS[:2], ByteTokenizer(), tmp_path)
    assert again.encoded


def test_empty_documents_are_counted_and_left_out(tmp_path):
    done, empty = parts.encode_documents([("a", 0), ("", 1), (" \n\t", 2), ("b", 3)], ByteTokenizer(), tmp_path)
    assert empty == 2
    assert [part.documents for part in done] == [2]
    assert done[0].index.sources.tolist() == [0, 3]
    assert parts.encode_documents([("", 0)], ByteTokenizer(), tmp_path) == ([], 1)


def test_half_surrogate_pairs_become_replacement_characters(tmp_path):
    (part,), _ = parts.encode_documents([("a\ud83d", 0), ("ok", 0)], ByteTokenizer(), tmp_path)
    with np.load(part.path) as arrays:
        assert arrays["tokens"].tolist() == [*"a\ufffd".encode(), 256, *b"ok", 256]
        assert arrays["text_bytes"].tolist() == [4, 2]
        assert arrays["hashes"].tolist() == [holdout.hash_of("a\ufffd".encode()), holdout.hash_of(b"ok")]


def test_ids_outside_the_vocabulary_are_an_error(tmp_path):
    class Wrong(ByteTokenizer):
        def encode_batch(self, texts):
            return [np.array([1, 70_000], np.uint32) for _ in texts]  # 4,464 after a cast to uint16

    with pytest.raises(TokenizerError, match="tokenizer bytes gave id 70000, outside its vocabulary of 257 entries"):
        parts.encode_documents(DOCUMENTS, Wrong(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_finished_parts(tmp_path, monkeypatch):
    save, calls = np.savez, []

    def full(file, **arrays):
        calls.append(0)
        file.write(b"half of it")
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        save(file, **arrays)

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        parts.encode_documents(DOCUMENTS, ByteTokenizer(), tmp_path)
    names = [path.suffix for path in tmp_path.iterdir()]
    assert names
    assert set(names) == {".npz"}


def _assembled(folder, documents, split, names=("b", "a")):
    tokenizer = ByteTokenizer()
    (folder / "parts").mkdir()
    done, _ = parts.encode_documents(documents, tokenizer, folder / "parts")
    return parts.assemble(done, parts.joined(done), split, names, folder, tokenizer)


@pytest.mark.parametrize("gathered", [1, 20, 1 << 24])  # tokens at once
@pytest.mark.parametrize("order", [[2, 5, 8], [8, 2, 5], [0, 8, 1, 7, 2, 6, 3, 5]])
def test_assembly_puts_documents_where_the_split_says(tmp_path, order, gathered, monkeypatch):
    monkeypatch.setattr(parts, "GATHER_TOKENS", gathered)
    held_out = np.isin(np.arange(9), order)
    facts, _ = _assembled(tmp_path, DOCUMENTS, holdout.Split(held_out, np.array(order), []))
    with np.load(tmp_path / "sources.npz") as arrays:
        sources = dict(arrays)
    assert sources["names"].tolist() == ["a", "b"]
    for split, chosen in (("validation", order), ("train", [i for i in range(9) if i not in order])):
        tokens = np.fromfile(tmp_path / f"{split}.bin", "<u2")
        assert ByteTokenizer().decode(tokens) == "".join(TEXTS[i] + "<|endoftext|>" for i in chosen)
        assert hashlib.sha256(tokens.tobytes()).hexdigest() == facts[split]["sha256"]
        index = np.load(tmp_path / f"{split}.docs.npy")
        assert (tokens[index[:, 0] - 1] == 256).all()
        assert facts[split]["tokens"] == len(tokens) == index[-1, 0]
        assert facts[split]["documents"] == len(index) == len(chosen)
        assert facts[split]["bytes"] == index[:, 1].sum() == len(tokens) - len(chosen)
        assert sources[split].tolist() == [1 - DOCUMENTS[i][1] for i in chosen]  # names are sorted
    assert sorted(path.suffix for path in (tmp_path / "parts").iterdir()) == [".npz"] * 5


def test_paragraphs_on_both_sides_are_counted_over_all_parts(tmp_path):
    shared, other = "These words are in both splits, and there are enough of them to be looked for at all. ", "x" * 100
    texts = [shared, other, f"{shared.upper()}\n\n{'y' * 80}\n\n{'z' * 80}", f"{'w' * 80}", f"{'v' * 80}\n\nshort\n\n{shared}"]
    held_out = np.array([False, False, True, True, True])
    split = holdout.Split(held_out, np.flatnonzero(held_out), [])
    _, found = _assembled(tmp_path, [(text, 0) for text in texts], split, ["a"])
    assert found == {"paragraphs": 6, "copied_paragraphs": 2, "documents": 3, "documents_with_copies": 2}
    assert paragraphs.MIN_CHARS == 64


def _cut(folder, text, tokenizer, every):
    (part,), _ = parts.encode_documents([(text, 0)], tokenizer, folder)
    part = parts.cut(part, tokenizer, every)
    facts, copied = parts.assemble([part], part.index, holdout.TAIL, ["a"], folder, tokenizer)
    assert copied["paragraphs"] == 0
    return facts


@pytest.mark.parametrize(
    ("text", "every", "start", "first_bytes"),
    [
        ("a" * 1000, 10, 896, 896),  # 100 tokens: blocks of 64; 900 is within the 15th
        ("a" * 1000, 2, 256, 256),  # 500 tokens: blocks of 256; 500 is within the 2nd
        ("ü" * 10, 4, 12, 12),  # 5 tokens: blocks of 4; 15 is within the 4th
        ("ab", 20, 1, 1),
    ],
)
def test_the_end_of_a_single_document(tmp_path, text, every, start, first_bytes):
    tokenizer = ByteTokenizer()
    facts = _cut(tmp_path, text, tokenizer, every)
    ids = [*text.encode()]
    for split, own in (("train", ids[:start]), ("validation", ids[start:])):
        assert np.fromfile(tmp_path / f"{split}.bin", "<u2").tolist() == [*own, 256]
        assert np.load(tmp_path / f"{split}.docs.npy").tolist() == [[len(own) + 1, facts[split]["bytes"]]]
        assert facts[split]["documents"] == 1
    assert facts["train"]["bytes"] == first_bytes
    assert facts["train"]["bytes"] + facts["validation"]["bytes"] == len(text.encode())
    with np.load(tmp_path / "sources.npz") as arrays:
        assert (arrays["names"].tolist(), arrays["train"].tolist(), arrays["validation"].tolist()) == (["a"], [0], [0])


def test_bytes_of_both_ends_are_in_proportion_to_what_they_decode_to(tmp_path):
    """Where the tokenizer writes more than there was, as spaces between its tokens, the first end must not take all bytes."""

    class Spaced(ByteTokenizer):
        def bytes_at(self, ids, ends):
            return 3 * super().bytes_at(ids, ends)

    facts = _cut(tmp_path, "a" * 1000, Spaced(), 10)
    assert [facts[split]["bytes"] for split in ("train", "validation")] == [896, 104]


def test_a_document_that_is_too_short_for_an_end(tmp_path):
    with pytest.raises(InputError, match="1 document of 1 token: too short to hold out its end"):
        _cut(tmp_path, "a", ByteTokenizer(), 20)


def test_samples_of_all_parts_are_joined(tmp_path):
    class Lower(ByteTokenizer):
        def encode_batch(self, texts):
            return super().encode_batch([text.lower() for text in texts])

    done, _ = parts.encode_documents([*DOCUMENTS, ("Text", 0)], Lower(), tmp_path)
    found = roundtrip.total([part.sample for part in done])
    assert found == roundtrip.Sample(10, 1, sum(map(len, TEXTS)) + 4, 1, ["Text", "text"])
