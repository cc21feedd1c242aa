"""Parts: resumable, checked, and assembled by document."""

import numpy as np
import pytest

from gqa_jax.data import parts
from gqa_jax.data.tokenizer import ByteTokenizer, TokenizerError


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


DOCUMENTS = [f"text number {i}" for i in range(9)]


def test_killed_at_any_document_and_started_again(tmp_path):
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
    changed = [*DOCUMENTS[:6], "text number X", *DOCUMENTS[7:]]
    again, _ = parts.encode_documents(changed, ByteTokenizer(), tmp_path)
    assert [part.encoded for part in again] == [False, True, True, True, False]


def test_empty_documents_are_counted_and_left_out(tmp_path):
    done, empty = parts.encode_documents(["a", "", " \n\t", "b"], ByteTokenizer(), tmp_path)
    assert empty == 2
    assert [part.documents for part in done] == [2]
    assert parts.encode_documents([""], ByteTokenizer(), tmp_path) == ([], 1)


def test_half_surrogate_pairs_become_replacement_characters(tmp_path):
    (part,), _ = parts.encode_documents(["a\ud83d", "ok"], ByteTokenizer(), tmp_path)
    with np.load(part.path) as arrays:
        assert arrays["tokens"].tolist() == [*"a\ufffd".encode(), 256, *b"ok", 256]
        assert arrays["text_bytes"].tolist() == [4, 2]


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


@pytest.mark.parametrize("holdout_every", [2, 3, 5])
def test_assembly_holds_out_by_document(tmp_path, holdout_every):
    tokenizer = ByteTokenizer()
    done, _ = parts.encode_documents(DOCUMENTS, tokenizer, tmp_path)
    facts = parts.assemble(done, tmp_path, tokenizer, holdout_every)
    held_out = [i for i in range(9) if i % holdout_every == holdout_every // 2]
    for split, chosen in (("validation", held_out), ("train", sorted({*range(9)} - {*held_out}))):
        tokens = np.fromfile(tmp_path / f"{split}.bin", "<u2")
        assert tokenizer.decode(tokens) == "".join(DOCUMENTS[i] + "<|endoftext|>" for i in chosen)
        index = np.load(tmp_path / f"{split}.docs.npy")
        assert (tokens[index[:, 0] - 1] == 256).all()
        assert facts[split]["tokens"] == len(tokens) == index[-1, 0]
        assert facts[split]["documents"] == len(index) == len(chosen)
        assert facts[split]["bytes"] == index[:, 1].sum() == len(tokens) - len(chosen)
