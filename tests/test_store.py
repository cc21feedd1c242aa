"""The store: what `open` accepts, and a sentence for everything that isn't a store."""

import json
import multiprocessing
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from gqa_jax import gcs, storage
from gqa_jax.config import OLD_STORES, ConfigError
from gqa_jax.data import catalog
from gqa_jax.data import store as token_store
from gqa_jax.data.catalog import open_store
from gqa_jax.data.documents import Format
from gqa_jax.data.prepare import Recipe, prepare
from gqa_jax.data.store import StoreError, TokenStore


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"document {i} ü"}) + "\n" for i in range(10)))
    recipe = Recipe(inputs=(str(folder / "a.jsonl"),), tokenizer="bytes", holdout_every=5, holdout_rule="position")
    return prepare(recipe, folder / "store")


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made.path, tmp_path / "store")


def test_content(made):
    train, validation = made.tokens("train"), made.tokens("validation")
    assert train.dtype == np.dtype("<u2")
    assert not train.flags.writeable
    texts = made.tokenizer().decode(train).split("<|endoftext|>")
    assert texts == [f"document {i} ü" for i in (0, 1, 3, 4, 5, 6, 8, 9)] + [""]
    assert made.tokenizer().decode(validation) == "document 2 ü<|endoftext|>document 7 ü<|endoftext|>"
    np.testing.assert_array_equal(made.documents("validation"), [[14, 13], [28, 13]])
    assert made.header["splits"]["train"]["tokens"] == len(train) == 8 * 14
    assert (made.vocab_size, made.eos_id) == (257, 256)
    assert not (made.path / "parts").exists()


@pytest.mark.parametrize(
    ("rule", "fingerprint"),
    [
        ("position", "54c73f88db0a3019a88c1bcaa1015ebe76a30025acde84651ed4d593af8bcb8d"),
        ("hash", "4e55632291e6245747e9d7d90315c1ca55da0646174cc6766427f2bf730f5a84"),
    ],
)
def test_fingerprint_is_of_the_content(tmp_path, rule, fingerprint):
    """Golden values: a change means that stores, cells' names and documented losses of others no longer match."""
    texts = [f"document {i} ü" for i in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "b.txt").write_text("|".join(texts))
    for name in ("a.jsonl", "b.txt"):
        recipe = Recipe((str(tmp_path / name),), "bytes", holdout_every=5, form=Format(separator="|"), holdout_rule=rule)
        assert prepare(recipe, tmp_path / f"store-{name}").fingerprint == fingerprint


def test_rules_are_in_the_header_and_unknown_ones_are_refused(made, tmp_path):
    assert made.holdout_rule == "position"
    assert "holdout" not in made.header
    (tmp_path / "a.txt").write_text("one two three|four five six|seven eight nine|ten")
    hashed = prepare(Recipe((str(tmp_path / "a.txt"),), "bytes", form=Format(separator="|")), tmp_path / "store")
    assert hashed.holdout_rule == "hash"
    assert hashed.header["holdout"] == {"rule": "hash", "every": 20}
    header = dict(hashed.header)
    del header["fingerprint"]
    token_store.write_header(hashed.path, header | {"holdout": {"rule": "moon", "every": 20}})
    with pytest.raises(StoreError, match="held out by the rule 'moon', and this program knows hash and position: use"):
        TokenStore.open(hashed.path)
    (hashed.path / "header.json").write_text(json.dumps(hashed.header | {"holdout": {"rule": "hash", "every": 10}}))
    with pytest.raises(StoreError, match=r"header.json was changed"):
        TokenStore.open(hashed.path)


def test_sources_that_are_damaged_or_do_not_match(copy):
    names, sources = TokenStore.open(copy).sources("train")
    assert names == ["a.jsonl"]
    assert sources.tolist() == [0] * 8
    content = (copy / "sources.npz").read_bytes()
    for change in (content[:-30], content[:60] + bytes([content[60] ^ 1]) + content[61:]):
        (copy / "sources.npz").write_bytes(change)
        with pytest.raises(StoreError, match=r"sources\.npz is damaged"):
            TokenStore.open(copy).sources("train")
    np.savez(copy / "sources.npz", names=np.array(["a"]), train=np.zeros(7, np.int32), validation=np.array([0, 1]))
    for split in token_store.SPLITS:
        with pytest.raises(StoreError, match=r"sources\.npz doesn't match the header"):
            TokenStore.open(copy).sources(split)
    (copy / "sources.npz").unlink()
    assert TokenStore.open(copy).sources("train") is None
    with pytest.raises(StoreError, match="split 'test': a store has train and validation"):
        TokenStore.open(copy).sources("test")


def test_open_checks_and_verifies(copy):
    assert TokenStore.open(copy, verify=True).fingerprint
    data = bytearray((copy / "train.bin").read_bytes())
    data[7] ^= 1
    (copy / "train.bin").write_bytes(data)
    TokenStore.open(copy)
    with pytest.raises(StoreError, match=r"train.bin is damaged \(its SHA-256"):
        TokenStore.open(copy, verify=True)


def test_unusable_folders(copy, tmp_path):
    with pytest.raises(StoreError, match=r"none: no such folder; make one with python -m gqa_jax.data.prepare --out"):
        TokenStore.open(tmp_path / "none")
    with pytest.raises(StoreError, match=r"this folder has no header.json"):
        TokenStore.open(tmp_path)
    (tmp_path / "parts").mkdir()
    with pytest.raises(StoreError, match="is unfinished: run the prepare command that began it again"):
        TokenStore.open(tmp_path)
    with pytest.raises(StoreError, match="must be on a local disk"):
        TokenStore.open("gs://bucket/store")
    with pytest.raises(StoreError, match="split 'test': a store has train and validation"):
        TokenStore.open(copy).tokens("test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: "{", r"header.json can't be read"),
        (lambda header: "[]", r"is no header of a token store"),
        (lambda header: json.dumps(header | {"version": 99}), r"format version 99; this program reads 1"),
        (lambda header: json.dumps(header | {"splits": {}}), r"lacks or garbles 'train'"),
        (lambda header: json.dumps(header | {"dtype": "uint17"}), r"lacks or garbles"),
        (lambda header: json.dumps(header | {"eos_id": 3}), r"header.json was changed"),
    ],
)
def test_broken_headers(copy, change, message):
    header = json.loads((copy / "header.json").read_text())
    (copy / "header.json").write_text(change(header))
    with pytest.raises(StoreError, match=message):
        TokenStore.open(copy)


def test_files_that_do_not_match(copy):
    index = (copy / "train.docs.npy").read_bytes()
    np.save(copy / "train.docs.npy", np.zeros((8, 2), np.int64))
    with pytest.raises(StoreError, match=r"train.docs.npy doesn't match the header"):
        TokenStore.open(copy)
    (copy / "train.docs.npy").write_bytes(index[:40])
    with pytest.raises(StoreError, match=r"train.docs.npy: unreadable"):
        TokenStore.open(copy)
    (copy / "validation.bin").write_bytes(b"123")
    (copy / "train.docs.npy").write_bytes(index)
    with pytest.raises(StoreError, match=r"validation.bin has 3 bytes; its header says 56 bytes"):
        TokenStore.open(copy)
    (copy / "train.bin").unlink()
    with pytest.raises(StoreError, match=r"train.bin is missing"):
        TokenStore.open(copy)


def _bpe_recipe(folder):
    return Recipe((str(folder / "a.txt"),), "bpe:260", holdout_every=2, form=Format(separator="|"), holdout_rule="position")


def test_another_tokenizer_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one two three|four five six|seven eight nine|ten")
    recipe = _bpe_recipe(tmp_path)
    made = prepare(recipe, tmp_path / "store")
    assert made.tokenizer().decode(made.tokens("validation")) == "four five six<|endoftext|>ten<|endoftext|>"
    (made.path / "tokenizer.json").write_text((made.path / "tokenizer.json").read_text() + "\n")
    with pytest.raises(StoreError, match=r"tokenizer.json isn't the tokenizer that was recorded"):
        made.tokenizer()


def test_dtype_boundary():
    assert token_store.token_dtype(65_536) == "uint16"
    assert token_store.token_dtype(65_537) == "uint32"


def _open_built_in(folder, results):
    results.put(open_store("sotu-bytes", folder).fingerprint)


def test_built_in_stores(tmp_path, monkeypatch):
    """Two processes at once get one store; the golden fingerprints are those of documented losses, by both rules."""
    monkeypatch.setenv("GQA_JAX_CACHE", str(tmp_path))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    cache = tmp_path / "stores"
    processes = [context.Process(target=_open_built_in, args=(cache, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    assert found == ["6ca46a422137f3432736016655f101e6cf7dc8815976235576e9c8d8d7ffc8a1"] * 2
    assert [path.name for path in cache.iterdir()] == ["sotu-bytes-hash-1-02db5c5d"]
    assert open_store("sotu-bytes").header["splits"]["validation"]["documents"] == 10
    first = open_store("sotu-bytes@position")
    assert first.fingerprint == "dad34ccdb04341333c075f22deaa85dab4772e6499cb06b6117942a8900cf1e3"
    assert first.path.name == "sotu-bytes-1-02db5c5d"
    assert first.header["splits"]["validation"]["documents"] == 12
    assert {name.partition("@")[0] for name in catalog.BUILT_IN} == {"sotu-bytes", "sotu-gpt2"}


@pytest.fixture
def reads(monkeypatch, tmp_path):
    """Folders of which every byte is read, and a cache of its own."""
    monkeypatch.setenv("GQA_JAX_CACHE", str(tmp_path / "verification"))
    found, real = [], TokenStore._check_contents
    monkeypatch.setattr(TokenStore, "_check_contents", lambda self: found.append(self.path) or real(self))
    return found


def test_a_store_is_verified_once_until_its_files_are_written(copy, reads):
    for _ in range(2):
        assert open_store(copy).path == copy
    assert reads == [copy]
    data = bytearray((copy / "train.bin").read_bytes())
    data[0] ^= 1
    (copy / "train.bin").write_bytes(data)  # the same size
    for _ in range(2):
        with pytest.raises(StoreError, match=r"train.bin is damaged \(its SHA-256"):
            open_store(copy)
    data[0] ^= 1
    (copy / "train.bin").write_bytes(data)
    assert open_store(copy)
    assert len(reads) == 4


def test_a_store_that_was_just_made_is_not_read_again(tmp_path, reads, monkeypatch):
    (tmp_path / "a.txt").write_text("one two three|four five six|seven eight nine|ten")
    made = prepare(Recipe((str(tmp_path / "a.txt"),), "bytes", form=Format(separator="|")), tmp_path / "store")
    assert open_store(made.path)
    assert not reads
    shutil.rmtree(tmp_path / "verification")
    (tmp_path / "verification").write_text("")  # a cache that can't be written
    for _ in range(2):
        assert open_store(made.path)
    assert len(reads) == 2

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GQA_JAX_CACHE")
    monkeypatch.setattr(Path, "home", no_home)
    assert open_store(made.path)
    assert len(reads) == 3


def test_a_damaged_built_in_store_says_how_to_get_another(tmp_path, monkeypatch):
    monkeypatch.setenv("GQA_JAX_CACHE", str(tmp_path))
    folder = open_store("sotu-bytes").path
    tokens = np.memmap(folder / "train.bin", dtype="<u2", mode="r+")
    tokens[:1_000_000] = 300
    tokens.flush()
    with pytest.raises(StoreError, match=rf"train.bin is damaged .*; delete {folder}, and it is made again"):
        open_store("sotu-bytes")
    copy = shutil.copytree(folder, tmp_path / "copy")  # with times of modification
    with pytest.raises(StoreError, match=r"train\.bin is damaged"):
        open_store(copy)


def _open_slowly(folder, results):
    real = TokenStore._check_contents

    def check(self):
        results.put("read")
        time.sleep(0.5)
        real(self)

    TokenStore._check_contents = check
    results.put(open_store(folder).fingerprint)


def test_processes_that_open_a_store_at_once_wait_for_one_of_them(copy, made, tmp_path, monkeypatch):
    monkeypatch.setenv("GQA_JAX_CACHE", str(tmp_path / "verification"))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_open_slowly, args=(copy, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in range(4)]
    for process in processes:
        process.join()
    assert sorted(found) == sorted(["read", *[made.fingerprint] * 3])
    assert results.empty()


def test_stores_of_the_first_version_are_built_in_too():
    assert {*OLD_STORES, *OLD_STORES.values()} == {*catalog.BUILT_IN}
    assert {catalog.BUILT_IN[name][1] for name in OLD_STORES.values()} == {"position"}


def test_unknown_names(tmp_path, made, monkeypatch):
    with pytest.raises(StoreError, match=r"'sotu-gpt': no such folder, and no built-in name; did you mean 'sotu-gpt2'\?"):
        open_store("sotu-gpt")
    with pytest.raises(StoreError, match="no such folder; make one"):
        open_store(tmp_path / "none")
    assert open_store(made.path).fingerprint == made.fingerprint
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"Not a directory; GQA_JAX_CACHE=FOLDER chooses another place"):
        open_store("sotu-bytes", tmp_path / "file")


@pytest.fixture
def remote(made, gcs_root, tmp_path, monkeypatch):
    """A copy of `made` on gs://, and nothing in the cache."""
    monkeypatch.setenv("GQA_JAX_CACHE", str(tmp_path / "cache"))
    for name in (*token_store.FILES, token_store.SOURCES, token_store.INPUTS, "header.json"):
        storage.upload(made.path / name, f"{gcs_root}/store/{name}")
    return f"{gcs_root}/store"


def test_a_store_on_a_bucket_is_copied_once(remote, made, tmp_path, monkeypatch):
    assert catalog.exists(remote)
    opened = open_store(remote)
    assert opened.path == tmp_path / "cache" / "stores" / made.fingerprint
    assert opened.header == made.header
    for split in token_store.SPLITS:
        np.testing.assert_array_equal(opened.tokens(split), made.tokens(split))
        np.testing.assert_array_equal(opened.documents(split), made.documents(split))
        np.testing.assert_array_equal(opened.sources(split)[1], made.sources(split)[1])
    assert (opened.path / "inputs.json").read_bytes() == (made.path / "inputs.json").read_bytes()
    assert sorted(path.name for path in opened.path.parent.iterdir()) == [".lock", made.fingerprint]

    read = []
    real = gcs.system().cat_file
    monkeypatch.setattr(gcs.system(), "cat_file", lambda path, **_: read.append(path) or real(path))
    monkeypatch.setattr(storage, "download", None)
    assert open_store(remote).path == opened.path
    assert read == [f"{remote}/header.json"]


def test_a_copy_that_was_interrupted_is_begun_again(remote, tmp_path, monkeypatch):
    real = storage.download

    def download(source, target):
        if target.name == "train.docs.npy":
            raise KeyboardInterrupt
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "download", download)
        with pytest.raises(KeyboardInterrupt):
            open_store(remote)
    assert TokenStore.open(open_store(remote).path, verify=True)


def test_a_store_on_a_bucket_brings_its_tokenizer(gcs_root, tmp_path, monkeypatch):
    monkeypatch.setenv("GQA_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("one two three|four five six|seven eight nine|ten")
    recipe = _bpe_recipe(tmp_path)
    made = prepare(recipe, tmp_path / "store")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    storage.upload(made.path, gcs_root)
    assert open_store(gcs_root).tokenizer().decode(made.tokens("validation")) == "four five six<|endoftext|>ten<|endoftext|>"
    storage.write_bytes(f"{gcs_root}/tokenizer.json", (made.path / "tokenizer.json").read_bytes() + b"\n")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(StoreError, match=r"isn't what its header says, as copied: .*isn't the tokenizer that was recorded"):
        open_store(gcs_root)


def test_unusable_stores_on_a_bucket(remote, made, gcs_root, tmp_path, monkeypatch):
    assert not catalog.exists(f"{gcs_root}/none")
    with pytest.raises(
        StoreError, match=r"/none: there is no header\.json; make one with python -m gqa_jax\.data\.prepare --out gs://"
    ):
        open_store(f"{gcs_root}/none")
    content = storage.read_bytes(f"{remote}/train.bin")
    storage.write_bytes(f"{remote}/train.bin", content[:-1] + b"x")
    with pytest.raises(StoreError, match=r"isn't what its header says, as copied: .*train\.bin is damaged"):
        open_store(remote)
    storage.write_bytes(f"{remote}/train.bin", content[:-2])
    with pytest.raises(StoreError, match=r"train\.bin has 222 bytes; its header says 224 bytes"):
        open_store(remote)
    storage.remove(f"{remote}/train.bin")
    with pytest.raises(StoreError, match=r"train\.bin is missing: copy the store there again"):
        open_store(remote)
    storage.write_json(f"{remote}/header.json", made.header | {"eos_id": 3})
    with pytest.raises(StoreError, match=r"header\.json was changed"):
        open_store(remote)
    assert not (tmp_path / "cache" / "stores" / made.fingerprint).exists()

    def refuse(*_, **__):
        raise OSError("Forbidden: https://x\nme@x.org does not have storage.objects.get access")

    monkeypatch.setattr(gcs.system(), "cat_file", refuse)
    for function in (open_store, catalog.exists):
        with pytest.raises(StoreError, match=r"^token store gs://.*: permission denied"):
            function(remote)
    with pytest.raises(ConfigError, match="s3:// is not supported"):
        storage.path("s3://b")


def test_a_cache_that_cannot_be_written(remote, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(StoreError, match=r"Not a directory; GQA_JAX_CACHE=FOLDER chooses another place"):
        open_store(remote)


def test_which_stores_exist(made, tmp_path):
    assert catalog.exists("sotu-gpt2")
    assert catalog.exists(made.path)
    assert not catalog.exists(tmp_path / "none")
    assert not catalog.exists("sotu-gpt")
