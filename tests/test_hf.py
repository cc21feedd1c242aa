"""Models out to Hugging Face's folders and in from them: the same logits and bytes, and what is refused by name."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

import gqa_jax
from gqa_jax import storage, train
from gqa_jax.conversion import hf, hf_tensors, hf_tokenizer
from gqa_jax.data import tokenizer as tokenizing
from gqa_jax.errors import ConfigError
from gqa_jax.search import own_model
from gqa_jax.training import parameters
from gqa_jax.training.parameters import write_import
from launch import __main__ as launch
from launch import grid, serving_benchmark, training_cells
from tests import llama_numpy
from tests.test_inference import tiny
from tests.test_train import LONGER
from tests.test_train import tiny as training

pytestmark = pytest.mark.usefixtures("compiled_once")

LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_context": 64}
CARD = "README.md"


def config_of(n_heads=4, n_kv_heads=2, **changes):
    return tiny(n_heads, n_kv_heads, **{"vocab_size": 320, "param_dtype": "float32", "dtype": "float32"} | changes)


def drawn(config, std=0.2, seed=0):
    """Parameters, scales of norms too."""
    rng = np.random.default_rng(seed)

    def leaf(path, like):
        mean = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return (mean + std * rng.standard_normal(like.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, parameters.abstract(config))


def imported(folder, config, tokenizer=None, **about):
    write_import(folder, config, drawn(config), provenance="a test", tokenizer=tokenizer, **about)
    return folder


def contents(folder):
    return {name: (Path(folder) / name).read_bytes() for name in sorted(os.listdir(folder))}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that is done."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, train.train_and_evaluate(training(), folder)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder of a model with the tokenizer of bytes."""
    root = tmp_path_factory.mktemp("exported")
    hf.export(imported(root / "import", config_of(), tokenizing.load_tokenizer("bytes"), context=64), root / "hf")
    return root / "hf"


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(exported, tmp_path / "theirs")


def edit(folder, name="config.json", **changes):
    values = {key: value for key, value in (json.loads((folder / name).read_text()) | changes).items() if value != "missing"}
    (folder / name).write_text(json.dumps(values))


def arrays(folder, **changes):
    found = safetensors.numpy.load_file(folder / "model.safetensors")
    found = {name: value for name, value in (found | changes).items() if value is not None}
    safetensors.numpy.save_file(found, folder / "model.safetensors", {"format": "pt"})


def by_hand(theirs, config):
    """Tokens, and their logits by the tests' own implementation from arrays of a folder: row n h + i is dim i of head n."""
    h, layers = config.head_dim, []
    for i in range(config.n_layers):
        at = {name.removeprefix(f"model.layers.{i}."): array.astype(np.float64) for name, array in theirs.items()}

        def heads(name, at=at):
            rows = at[f"self_attn.{name}_proj.weight"]
            return np.stack([rows[n * h : (n + 1) * h].T for n in range(len(rows) // h)], axis=1)

        output = at["self_attn.o_proj.weight"]
        layers.append(
            {"query": heads("q"), "key": heads("k"), "value": heads("v")}
            | {"output": np.stack([output[:, n * h : (n + 1) * h].T for n in range(config.n_heads)])}
            | {name: at[f"mlp.{name}_proj.weight"].T for name in ("gate", "up", "down")}
            | {"attention_norm": at["input_layernorm.weight"], "ffn_norm": at["post_attention_layernorm.weight"]}
        )
    tables = {"embedding": "model.embed_tokens", "final_norm": "model.norm"} | ({"head": "lm_head"} if config.untied else {})
    params = {ours: theirs[f"{name}.weight"].astype(np.float64) for ours, name in tables.items()}
    params["layers"] = {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 12))
    return tokens, llama_numpy.logits(params, tokens, config)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "LlamaForCausalLM"),
        ({"untied": True, **LLAMA3}, "LlamaForCausalLM"),
        ({"n_heads": 5, "n_kv_heads": 1, "d_model": 33, "rope_scaling": "linear", "rope_factor": 2.0}, "MistralForCausalLM"),
        ({"n_heads": 1, "n_kv_heads": 1, "untied": True}, "LlamaForCausalLM"),
    ],
)
def test_out_in_and_out_again_are_the_same_model_and_bytes(changes, kind, tmp_path):
    config = config_of(**changes)
    imported(tmp_path / "ours", config, tokenizing.load_tokenizer("bytes"), context=64)
    found = hf.export(tmp_path / "ours", tmp_path / "hf")
    assert found.model_class == kind
    theirs = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    tokens, expected = by_hand(theirs, config)
    first = gqa_jax.load_model(tmp_path / "ours")
    np.testing.assert_allclose(first.apply(tokens), expected, rtol=1e-4, atol=1e-4)
    hf.read_in(tmp_path / "hf", tmp_path / "again")
    second = gqa_jax.load_model(tmp_path / "again")
    assert (second.config, second.context, second.tokenizer.name) == (config, 64, "bytes")
    assert second.start.identity == first.start.identity  # the content, whoever wrote it
    jax.tree.map(np.testing.assert_array_equal, second.params, first.params)
    hf.export(tmp_path / "again", tmp_path / "twice")
    one, two = contents(tmp_path / "hf"), contents(tmp_path / "twice")
    assert {name for name in one if one[name] != two.get(name)} == {CARD}


def test_a_run_goes_out_with_what_is_known_of_it(run, tmp_path, capsys):
    folder, result = run
    assert launch.main(["export-hf", str(folder), "--out", str(tmp_path / "hf"), "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'hf'}: LlamaForCausalLM, 1 file of arrays, " in said
    card = (tmp_path / "hf" / CARD).read_text()
    for known in (
        f"{result['loss']:.4f} nats per token",
        result["identity"],
        result["rules"],
        "(2, 1)",
        result["commit"],
        "12 steps",
    ):
        assert known in card
    theirs = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    loaded = gqa_jax.load_model(folder)
    assert {array.dtype.name for array in theirs.values()} == {"bfloat16"}
    np.testing.assert_array_equal(
        theirs["model.embed_tokens.weight"], np.asarray(loaded.params["embedding"]).astype("bfloat16")
    )
    assert storage.read_json(tmp_path / "hf" / "config.json")["max_position_embeddings"] == training().context_length
    modes = {(tmp_path / "hf" / name).stat().st_mode & 0o777 for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1
    hf.read_in(tmp_path / "hf", tmp_path / "in")
    back = gqa_jax.load_model(tmp_path / "in")
    assert (back.config.dtype, back.config.param_dtype) == ("bfloat16", "float32")
    hf.export(tmp_path / "in", tmp_path / "again", "bfloat16")
    one, two = contents(tmp_path / "hf"), contents(tmp_path / "again")
    assert {name for name in one if one[name] != two.get(name)} == {CARD}


def test_what_comes_in_is_generated_from_continued_and_compared_with(run, tmp_path, capsys):
    folder, first = run
    hf.export(folder, tmp_path / "hf")
    assert launch.main(["import-hf", str(tmp_path / "hf"), "--out", str(tmp_path / "in")]) == 0
    assert "python -m launch generate" in capsys.readouterr().out
    loaded = gqa_jax.load_model(tmp_path / "in")
    assert loaded.generate("We", 4) == gqa_jax.load_model(folder).generate("We", 4)
    result = train.train_and_evaluate(training(**LONGER, continue_from=str(tmp_path / "in")), tmp_path / "second")
    assert (result["start"]["kind"], result["start"]["differs"]) == ("import", [])  # the same vocabulary, text and arrays
    same = train.train_and_evaluate(training(**LONGER, continue_from=str(folder)), tmp_path / "third")
    assert result["params_sha256"] == same["params_sha256"]
    for source in (folder, tmp_path / "in"):
        measured = serving_benchmark.subject(str(source), None, None, None, 0)
        assert (measured.name, measured.config) == (source.name, loaded.config)
    for source in (folder, tmp_path / "in", tmp_path / "hf"):
        own = own_model.load(source)
        assert (own.shape.d_model, own.shape.n_heads, own.untied) == (16, 2, False)
        assert own.total_params == first["params_total"]


def test_large_models_are_in_several_files_one_in_memory(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_tensors, "SHARD_BYTES", 20_000)
    hf.read_in(exported, tmp_path / "in")
    found = hf.export(tmp_path / "in", tmp_path / "hf")
    files = [name for name in found.files if name.endswith(".safetensors")]
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    index = json.loads((tmp_path / "hf" / hf_tensors.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(
        array.nbytes for array in safetensors.numpy.load_file(exported / "model.safetensors").values()
    )
    for file in files:
        held = safetensors.numpy.load_file(tmp_path / "hf" / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == set(held)
        assert sum(array.nbytes for array in held.values()) <= 20_000 or len(held) == 1
    hf.read_in(tmp_path / "hf", tmp_path / "again")
    one, two = gqa_jax.load_model(tmp_path / "in"), gqa_jax.load_model(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)


def test_a_bucket_is_read_and_written(exported, gcs_root, tmp_path):
    hf.read_in(exported, f"{gcs_root}/in")
    hf.export(f"{gcs_root}/in", tmp_path / "hf")
    assert contents(tmp_path / "hf")["model.safetensors"] == contents(exported)["model.safetensors"]
    assert {"tokenizer_config.json", "generation_config.json"} <= set(storage.names(f"{gcs_root}/in/tokenizer"))
    with pytest.raises(ConfigError, match="export into a local folder, then copy it"):
        hf.export(f"{gcs_root}/in", f"{gcs_root}/hf")


class TestBadInput:
    """Before anything is written: a folder that is not there stays so."""

    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (
                lambda at: arrays(at, **{"model.layers.1.mlp.up_proj.weight": None}),
                r"has no model\.layers\.1\.mlp\.up_proj\.weight \[64, 32\] \(1 such array\)",
            ),
            (
                lambda at: arrays(at, **{"model.layers.0.self_attn.q_norm.weight": np.ones(16, np.float32)}),
                r"has model\.layers\.0\.self_attn\.q_norm\.weight \[16\] \(1 such array\), which no model of the Llama class",
            ),
            (
                lambda at: edit(at, num_key_value_heads=4),
                r"self_attn\.[kv]_proj\.weight is \[16, 32\], and config\.json says \[32, 32\]",
            ),
            (lambda at: edit(at, num_hidden_layers=1), r"has model\.layers\.1\.\S+ .* \(9 such arrays\), which no model"),
            (
                lambda at: edit(at, num_hidden_layers=9),
                r"has no model\.layers\.2\.\S+ .* \(63 such arrays\), which config\.json asks for",
            ),
            (lambda at: edit(at, tie_word_embeddings=False), r"has no lm_head\.weight \[320, 32\]"),
            (
                lambda at: arrays(at, **{"lm_head.weight": np.ones((320, 32), np.float32)}),
                r"lm_head\.weight differs from model\.embed_tokens\.weight, and tie_word_embeddings is true",
            ),
            (
                lambda at: arrays(at, **{"model.norm.weight": np.ones(32, np.int8)}),
                r"model\.norm\.weight is I8: arrays of F32, BF16, F16 are taken, and none quantized",
            ),
            (lambda at: os.truncate(at / "model.safetensors", 5000), r"model\.safetensors is damaged or cut off"),
            (lambda at: (at / "model.safetensors").write_bytes(b""), r"model\.safetensors is damaged or cut off"),
            (
                lambda at: (at / "model.safetensors").rename(at / "pytorch_model.bin"),
                r"has neither model\.safetensors nor model\.safetensors\.index\.json \(there is pytorch_model\.bin\)",
            ),
            (
                lambda at: (at / hf_tensors.INDEX).write_text('{"weight_map": {"model.norm.weight": "model-2.safetensors"}}'),
                r"model-2\.safetensors is not there, and model\.safetensors\.index\.json names it",
            ),
            (
                lambda at: (at / hf_tensors.INDEX).write_text('{"weight_map": {"nothing": "model.safetensors"}}'),
                r"has nothing in model\.safetensors, and it is not there",
            ),
            (
                lambda at: (at / hf_tensors.INDEX).write_text('{"weight_map": {"a": "../model.safetensors"}}'),
                r"its weight_map must have",
            ),
            (lambda at: (at / hf_tensors.INDEX).write_text("{"), r"index\.json has no weight_map that can be read"),
            (lambda at: (at / "config.json").unlink(), r"the folder holds no config\.json"),
            (lambda at: (at / "config.json").write_text("[]"), r"it holds no fields of a model, but a list"),
            (
                lambda at: (at / "tokenizer.json").write_text("{}"),
                r"tokenizer\.json: tokenizer theirs is no Hugging Face tokenizer\.json",
            ),
            (lambda at: shutil.rmtree(at), r"there is no such folder: download the model first"),
        ],
    )  # fmt: skip
    def test_a_folder_that_is_no_model(self, folder, tmp_path, damage, said):
        damage(folder)
        with pytest.raises(ConfigError, match=said):
            hf.read_in(folder, tmp_path / "in")
        assert not (tmp_path / "in").exists()
        assert not (tmp_path / "in.partial").exists()

    def test_a_tokenizer_with_more_entries_than_the_model(self, folder, tmp_path):
        (folder / "tokenizer.json").write_bytes(
            tokenizing.train_bpe(["the cat sat on the mat and ate a rat"] * 9 + ["".join(map(chr, range(33, 120)))], 270).json
        )
        theirs = safetensors.numpy.load_file(folder / "model.safetensors")
        edit(folder, vocab_size=260, eos_token_id=None)
        arrays(folder, **{"model.embed_tokens.weight": np.ascontiguousarray(theirs["model.embed_tokens.weight"][:260])})
        with pytest.raises(ConfigError, match="tokenizer theirs has 270 entries, the model 260"):
            hf.read_in(folder, tmp_path / "in")

    def test_folders_that_hold_something_and_disks_that_are_full(self, exported, run, tmp_path, monkeypatch, capsys):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine").write_text("")
        for act in (lambda out: hf.read_in(exported, out), lambda out: hf.export(run[0], out)):
            with pytest.raises(ConfigError, match=r"full holds something: (import|export) into a new folder"):
                act(tmp_path / "full")
            with pytest.raises(ConfigError, match=r"full/mine holds something"):
                act(tmp_path / "full" / "mine")
            (tmp_path / "new.partial").mkdir()
            with pytest.raises(ConfigError, match=r"new\.partial is there: another is making new, or was killed"):
                act(tmp_path / "new")
            (tmp_path / "new.partial").rmdir()
            monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
            with pytest.raises(ConfigError, match=r"--out .*new: .* GB will be written, and .* has 1e-06 GB free"):
                act(tmp_path / "new")
            monkeypatch.undo()
        assert sorted(os.listdir(tmp_path)) == ["full"]
        assert launch.main(["import-hf", str(exported), "--out", str(tmp_path / "full")]) == 2
        assert launch.main(["export-hf", str(run[0]), "--out", str(tmp_path / "a"), "--dtype", "float16"]) == 2
        assert launch.main(["export-hf", str(tmp_path / "full"), "--out", str(tmp_path / "a")]) == 2
        assert "dtype = 'float16': use float32, bfloat16" in capsys.readouterr().err

    def test_what_fails_half_way_leaves_nothing(self, exported, tmp_path, monkeypatch):
        write = safetensors.numpy.save_file
        hf.read_in(exported, tmp_path / "in")

        def fails(*args):
            write(*args)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(safetensors.numpy, "save_file", fails)
        with pytest.raises(OSError, match="No space"):
            hf.export(tmp_path / "in", tmp_path / "hf")
        monkeypatch.setattr(hf_tensors.Arrays, "read", lambda *_: fails("x", "y"))
        with pytest.raises(Exception, match=r"No space|safetensors|items"):
            hf.read_in(exported, tmp_path / "second")
        assert os.listdir(tmp_path) == ["in"]


def test_old_files_have_more_than_parameters(folder, tmp_path):
    """Buffers of Llama 2's time, and the table twice."""
    theirs = safetensors.numpy.load_file(folder / "model.safetensors")
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
        "lm_head.weight": theirs["model.embed_tokens.weight"],
    }
    arrays(folder, **more)
    hf.read_in(folder, tmp_path / "in")
    hf.export(tmp_path / "in", tmp_path / "hf")
    again = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    assert again.keys() == theirs.keys()


def test_halves_are_read_as_they_are(folder, tmp_path):
    theirs = safetensors.numpy.load_file(folder / "model.safetensors")
    for dtype, computed in (("float16", "float32"), ("bfloat16", "bfloat16")):
        arrays(folder, **{name: array.astype(jnp.dtype(dtype)) for name, array in theirs.items()})
        edit(folder, dtype="missing", torch_dtype="missing")
        hf.read_in(folder, tmp_path / dtype)
        loaded = gqa_jax.load_model(tmp_path / dtype)
        assert (loaded.config.dtype, loaded.params["embedding"].dtype) == (computed, jnp.float32)
        held = theirs["model.embed_tokens.weight"].astype(jnp.dtype(dtype)).astype(np.float32)
        np.testing.assert_array_equal(loaded.params["embedding"], held)


class TestTokenizers:
    """What AutoTokenizer itself makes of them: tests/test_hf_readers.py."""

    TEXTS = ("We the people", "Grüße 👋\n\t x", "a <|endoftext|> b", "\0 né", "  two  spaces ", "")

    def check(self, tokenizer, folder):
        """The file alone, used as these folders' readers do, encodes and decodes as the tokenizer does."""
        found = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        found.encode_special_tokens = json.loads((folder / "tokenizer_config.json").read_text()).get(
            "split_special_tokens", False
        )
        for text in self.TEXTS:
            ids = tokenizer.encode_batch([text])[0].tolist()
            assert found.encode(text).ids == ids
            assert found.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)
        eos = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
        assert found.token_to_id(eos) == tokenizer.eos_id

    @pytest.mark.parametrize("name", ["bytes", "gpt2"])
    def test_built_in_ones_come_back_under_their_names(self, name, tmp_path):
        tokenizer = tokenizing.load_tokenizer(name)
        imported(tmp_path / "in", config_of(vocab_size=50_304 if name == "gpt2" else 320), tokenizer)
        hf.export(tmp_path / "in", tmp_path / "hf")
        self.check(tokenizer, tmp_path / "hf")
        assert hf_tokenizer.read(tmp_path / "hf", None).sha256 == tokenizer.sha256

    def test_one_that_was_trained_here_is_its_own_file(self, tmp_path):
        tokenizer = tokenizing.train_bpe(["the cat sat on the mat, and the rat sat on the cat"] * 9, 270)
        imported(tmp_path / "in", config_of(), tokenizer)
        hf.export(tmp_path / "in", tmp_path / "hf")
        assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == tokenizer.json
        self.check(tokenizer, tmp_path / "hf")
        hf.read_in(tmp_path / "hf", tmp_path / "back")
        assert gqa_jax.load_model(tmp_path / "back").tokenizer.sha256 == tokenizer.sha256

    def with_bos(self):
        """A tokenizer that begins texts with <s>, as Llama's do."""
        found = tokenizers.Tokenizer.from_str(tokenizing.train_bpe(["the cat sat on the mat"] * 9, 265).json.decode())
        found.add_special_tokens(["<s>"])
        found.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 265)])
        return found.to_str().encode()

    def test_a_built_in_one_with_something_before_a_text_is_another(self, folder, tmp_path):
        """The ids of bytes, and the end of a document in front, as some publish GPT-2's vocabulary."""
        found = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        found.post_processor = tokenizers.processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 256)])
        (folder / "tokenizer.json").write_text(found.to_str())
        read = hf_tokenizer.read(folder, 256)
        assert (read.prefix, read.name) == ((256,), "theirs")

    def test_a_built_in_one_that_ends_documents_otherwise_is_another(self, folder):
        read = hf_tokenizer.read(folder, 0)
        assert (read.eos_id, read.name) == (0, "theirs")
        assert hf_tokenizer.read(folder, 256).name == "bytes"

    def test_what_it_adds_is_left_out_of_a_run_that_was_trained_without(self, run, tmp_path):
        folder = shutil.copytree(run[0], tmp_path / "run")
        tokenizer = tokenizing.HuggingFaceTokenizer(self.with_bos(), "hub:x")
        about = {"name": "hub:x", "sha256": tokenizer.sha256, "eos_id": tokenizer.eos_id}
        (folder / "tokenizer" / "about.json").write_text(json.dumps(about))
        (folder / "tokenizer" / "tokenizer.json").write_bytes(tokenizer.json)
        hf.export(folder, tmp_path / "hf")
        self.check(tokenizer, tmp_path / "hf")

    def test_what_it_adds_begins_a_prompt_of_a_model_that_came_in(self, folder, tmp_path):
        (folder / "tokenizer.json").write_bytes(self.with_bos())
        (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<s>"}')
        edit(folder, eos_token_id=[256, 264], bos_token_id=265)
        hf.read_in(folder, tmp_path / "in")
        loaded = gqa_jax.load_model(tmp_path / "in")
        assert (loaded.tokenizer.prefix, loaded.tokenizer.eos_id, loaded.start.stop) == ((265,), 256, (256, 264))
        ids = loaded.tokenizer.encode_batch(["the cat"])[0].tolist()
        assert loaded.generate("the cat", 3, stop=[]) == loaded.generate([[265, *ids]], 3, stop=[])[0]
        free = loaded.generate("the cat", 9, stop=[])
        assert (
            loaded.generate("the cat", 9).tokens
            == free.tokens[: next((i for i, one in enumerate(free.tokens) if one in (256, 264)), 9)]
        )
        hf.export(tmp_path / "in", tmp_path / "hf")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / "hf" / name).read_bytes() == (folder / name).read_bytes()
        fields = json.loads((tmp_path / "hf" / "config.json").read_text())
        assert (fields["eos_token_id"], fields["bos_token_id"]) == ([256, 264], 265)

    def test_none_is_no_error(self, folder, run, tmp_path):
        (folder / "tokenizer.json").unlink()
        found = hf.read_in(folder, tmp_path / "in")
        assert "without a tokenizer" in " ".join(found.sentences())
        assert found.start.stop == (256,)
        out = hf.export(tmp_path / "in", tmp_path / "hf")
        assert "without a tokenizer: no tokenizer is kept in" in " ".join(out.sentences())
        assert "tokenizer.json" not in out.files
        assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 256


def test_a_plan_of_a_cell_that_goes_on_from_an_import(exported, tmp_path):
    """It is costed like any other."""
    hf.read_in(exported, tmp_path / "in")

    config = grid.continued(
        tmp_path / "in", context_length=32, learning_rate=1e-3, tokens=4096, batch_tokens=512,
        data={"store": "sotu-bytes", "block_tokens": 512}, evaluation={"tokens": 4096},
    )  # fmt: skip
    (cell,) = training_cells.make("g", [config])
    described = cell.describe()
    assert (described["continue_from"], described["n_kv_heads"], cell.start.kind) == ("in", 2, "import")
    assert described["train_flops"] > 0
    assert cell.start.differs == ()
