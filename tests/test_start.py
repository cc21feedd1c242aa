"""Where runs start: from a run that is over, or from imported parameters; and such parameters as a model to call."""

import dataclasses
import json
import os
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gqa_jax
from gqa_jax import model, storage, train
from gqa_jax.config import ConfigError, ModelConfig, TrainConfig, hash_identity
from gqa_jax.data import catalog, reader, tokenizer, vocabulary
from gqa_jax.training import start
from gqa_jax.training.parameters import write_import
from launch import grid, state
from tests import first_version
from tests.test_train import LONGER, losses, tiny

pytestmark = pytest.mark.usefixtures("compiled_once")

OTHER_BASE = tiny().to_dict()["model"] | {"rope_theta": 1e6}
BYTES = tokenizer.load_tokenizer("bytes")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "first"
    return folder, train.train_and_evaluate(tiny(), folder)


@pytest.fixture(scope="module")
def imported(finished, tmp_path_factory):
    """The parameters of that run, as if they came from elsewhere."""
    folder, loaded = tmp_path_factory.mktemp("imported") / "there", gqa_jax.load_model(finished[0])
    return folder, write_import(folder, loaded.config, loaded.params, provenance="a test", tokenizer=loaded.tokenizer)


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train_bpe(["the cat sat on the mat, and the rat sat on the cat"] * 9, 270)


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "first")
    return tmp_path / "first"


def test_a_model_is_loaded_with_the_loss_that_its_run_had(finished):
    folder, result = finished
    loaded = gqa_jax.load_model(folder)
    config = tiny()
    _, held_out = reader.check(config, catalog.open_store(config.data.store))
    found = []
    for batch in held_out:
        tokens = np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1)
        found.append(np.asarray(loaded.losses(tokens))[batch["mask"]])
    assert np.concatenate(found).mean() == pytest.approx(result["loss"], abs=1e-6)
    logits = loaded.apply(tokens)
    assert (logits.shape, logits.dtype) == ((len(tokens), 33, 320), jnp.float32)
    each = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, jnp.roll(tokens, -1, 1)[..., None], -1)[..., 0]
    np.testing.assert_allclose(each[:, :-1], loaded.losses(tokens), rtol=1e-5)
    (ids,) = loaded.tokenizer.encode_batch(["Grüße"])
    assert loaded.losses(ids[None]).shape == (1, 6)  # of bytes, which are uint8
    assert loaded.tokenizer.decode(ids) == "Grüße"
    assert loaded.no_tokenizer is None


def test_a_run_starts_from_imported_parameters(finished, imported, tmp_path):
    (folder, first), (there, found) = finished, imported
    assert found == start.of_folder(there)
    assert (found.kind, found.step, len(found.identity)) == ("import", 0, 64)
    config = tiny(**LONGER, continue_from=str(there))
    result = train.train_and_evaluate(config, tmp_path / "second")
    assert result["start"] == {"kind": "import", "folder": str(there), "identity": found.identity, "differs": []}
    assert result["identity"] == hash_identity(config.identity(first["data_fingerprint"], found.identity))
    same = train.train_and_evaluate(tiny(**LONGER, continue_from=str(folder)), tmp_path / "third")
    assert same["start"] == {"kind": "run", "folder": str(folder), "identity": first["identity"], "differs": []}
    assert (result["params_sha256"], losses(tmp_path / "second")) == (same["params_sha256"], losses(tmp_path / "third"))
    assert first["start"] == {"kind": "scratch"}


def test_other_data_and_another_rope_base_are_allowed_and_said(finished, tmp_path, caplog):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "first").symlink_to(finished[0])
    changed = {"model": OTHER_BASE, "data": {"store": "sotu-bytes@position"}, "continue_from": "../first"}
    with caplog.at_level("WARNING", logger="gqa_jax.train"):
        result = train.train_and_evaluate(tiny(**(LONGER | changed)), tmp_path / "cells" / "second")
    data = [catalog.open_store(name).fingerprint[:12] for name in ("sotu-bytes@position", "sotu-bytes")]
    base, other = result["start"]["differs"]
    assert base == "model.rope_theta: 1000000.0 here, 500000.0 there"
    assert other == f"data.fingerprint: {data[0]} here, {data[1]} there"
    assert f"continue_from = '../first': not as it was there: {base}\n" in caplog.text
    assert f"{other}" in caplog.text
    table = gqa_jax.load_results(tmp_path).set_index("cell")
    assert table.loc["second", "start_differs"] == f"{base}; {other}"
    assert table.loc["second", "continue_from"] == "first"
    assert table["start_differs"].isna()["first"]


def test_another_vocabulary_is_refused(copied):
    about = json.loads((copied / "tokenizer" / "about.json").read_text())
    (copied / "tokenizer" / "about.json").write_text(json.dumps(about | {"name": "bpe:320", "sha256": "0" * 64}))
    message = r"has another vocabulary: tokenizer bytes \(d5b0c3df68ad\) here, bpe:320 \(0{12}\) there\. Prepare the text"
    with pytest.raises(ConfigError, match=message):
        train.train_and_evaluate(tiny(**LONGER, continue_from="../first"), copied.parent / "second")
    found = dataclasses.replace(start.of_folder(copied), model=dataclasses.replace(tiny().model, vocab_size=384))
    with pytest.raises(ConfigError, match=r"other parameters: model\.vocab_size: 320 here, 384 there"):
        found.differences(tiny(**LONGER, continue_from="../first"))


def test_an_unknown_tokenizer_of_other_data_is_said(copied, imported, tmp_path):
    config = tiny(**LONGER, continue_from="../first")
    shutil.rmtree(copied / "tokenizer")
    found, ours = start.of_folder(copied), {"name": "gpt2", "sha256": "1", "eos_id": 1}
    assert found.differences(config, found.data_fingerprint, ours) == []
    data, vocabulary = found.differences(config, "f" * 64, ours)
    assert data.startswith("data.fingerprint: ffffffffffff here")
    assert vocabulary == "tokenizer: gpt2 here, not known there"
    assert dataclasses.replace(imported[1], tokenizer=None).differences(config, "f" * 64, ours) == [vocabulary]
    assert found.differences(config) == imported[1].differences(config, "f" * 64) == []  # of a store that is not there yet


def test_the_content_of_an_import_is_what_it_is_named_by(imported, finished, tmp_path):
    (folder, found), loaded = imported, gqa_jax.load_model(imported[0])
    again = write_import(tmp_path / "again", loaded.config, jax.tree.map(np.asarray, loaded.params), provenance="elsewhere")
    assert (again.identity, again.tokenizer) == (found.identity, None)
    touched = loaded.params | {"final_norm": loaded.params["final_norm"].at[3].add(1e-6)}
    assert write_import(tmp_path / "touched", loaded.config, touched, provenance="").identity != found.identity

    values = json.loads((folder / "import.json").read_text())
    assert values["provenance"] == "a test"
    assert values["params_sha256"] == finished[1]["params_sha256"]
    (tmp_path / "again" / "import.json").write_text(json.dumps(values | {"model": values["model"] | {"rope_theta": 1e4}}))
    with pytest.raises(ConfigError, match=r"import\.json was changed: its content hash is another: import the parameters"):
        start.of_folder(tmp_path / "again")
    (tmp_path / "again" / "import.json").write_text(json.dumps({**values, "version": 2}))
    with pytest.raises(ConfigError, match="of another version than 1"):
        start.of_folder(tmp_path / "again")
    del values["params_sha256"]
    (tmp_path / "again" / "import.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="lacks params_sha256"):
        start.of_folder(tmp_path / "again")


def test_names_of_imports_stay_what_they_were():
    """Computed before a model could be untied or its rotations scaled."""
    config = ModelConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, vocab_size=64, dtype="float32")
    names = []
    for one in (config, dataclasses.replace(config, untied=True)):
        values = {"format": start.FORMAT, "version": 1, "model": one.identity(), "params_sha256": "0" * 64}
        names.append(start.content_hash(values))
    assert names[0] == "391c4e22738a1df7bdf9945dadfa3d7afac995a25656373844d26a9fc50802d4"
    assert names[1] != names[0]


def test_an_untied_model_with_scaled_rotations_is_trained_loaded_imported_and_continued(tmp_path):
    scaled = {"rope_scaling": "llama3", "rope_factor": 2.0, "rope_original_context": 16}
    config = tiny(model=tiny().to_dict()["model"] | {"untied": True} | scaled)
    result = train.train_and_evaluate(config, tmp_path / "first")
    loaded = gqa_jax.load_model(tmp_path / "first")
    assert loaded.config == config.model
    assert result["params_total"] == sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
    _, held_out = reader.check(config, catalog.open_store(config.data.store))
    (tokens, found) = np.arange(24).reshape(2, 12), []
    for batch in held_out:
        found.append(np.asarray(loaded.losses(np.concatenate([batch["tokens"], batch["targets"][:, -1:]], 1)))[batch["mask"]])
    assert np.concatenate(found).mean() == pytest.approx(result["loss"], abs=1e-6)
    write_import(tmp_path / "there", loaded.config, loaded.params, provenance="a test")
    again = gqa_jax.load_model(tmp_path / "there")
    assert again.config == config.model
    np.testing.assert_array_equal(again.apply(tokens), loaded.apply(tokens))
    tied = {name: leaf for name, leaf in loaded.params.items() if name != "head"}
    with pytest.raises(ConfigError, match=r"\['head'\] is not there, must be float32\[320, 16\]"):
        write_import(tmp_path / "tied", loaded.config, tied, provenance="")
    with pytest.raises(ConfigError, match=r"other parameters: model\.untied: False here, True there"):
        again.start.differences(tiny(**LONGER, continue_from="../there"))
    plain = tiny(**LONGER, continue_from="../there", model=tiny().to_dict()["model"] | {"untied": True})
    assert again.start.differences(plain) == [
        "model.rope_factor: 1.0 here, 2.0 there",
        "model.rope_original_context: 8192 here, 16 there",
        "model.rope_scaling: None here, 'llama3' there",
    ]


def test_parameters_of_another_import_are_not_taken_for_these(imported, tmp_path):
    loaded = gqa_jax.load_model(imported[0])
    for name, add in (("a", 1.0), ("b", 2.0)):
        params = loaded.params | {"final_norm": loaded.params["final_norm"] + add}
        write_import(tmp_path / name, loaded.config, params, provenance=name)
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    (tmp_path / "b" / "checkpoints").rename(tmp_path / "a" / "checkpoints")
    with pytest.raises(ConfigError, match=r"or of other parameters: import them again"):
        gqa_jax.load_model(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    with pytest.raises(ConfigError, match="has no checkpoint to start from"):
        gqa_jax.load_model(tmp_path / "a")


def test_what_can_not_be_imported(imported, tmp_path):
    config = tiny().model
    params = model.init_params(config, jax.random.key(0))
    with pytest.raises(ConfigError, match="holds something: import into a new folder"):
        write_import(imported[0], config, params, provenance="")
    with pytest.raises(ConfigError, match=r"\['embedding'\] is float32\[320, 16\], must be float32\[384, 16\]"):
        write_import(tmp_path / "a", dataclasses.replace(config, vocab_size=384), params, provenance="")
    with pytest.raises(ConfigError, match=r"\['bias'\] is float32\[3\], must be left out"):
        write_import(tmp_path / "a", config, params | {"bias": np.zeros(3, np.float32)}, provenance="")
    with pytest.raises(ConfigError, match=r"\['final_norm'\] is bfloat16\[16\], must be float32\[16\]"):
        write_import(tmp_path / "a", config, params | {"final_norm": jnp.ones(16, jnp.bfloat16)}, provenance="")
    small = dataclasses.replace(config, vocab_size=256)
    with pytest.raises(ConfigError, match="tokenizer bytes has 257 entries, the model 256"):
        write_import(tmp_path / "a", small, model.init_params(small, jax.random.key(0)), provenance="", tokenizer=BYTES)
    assert not (tmp_path / "a").exists()


def test_what_is_no_model(copied, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere has no result\.json: let that run end first, or name another"):
        gqa_jax.load_model(tmp_path / "nowhere")
    result = json.loads((copied / "result.json").read_text())
    (copied / "result.json").write_text(json.dumps(result | {"status": "diverged"}))
    with pytest.raises(ConfigError, match="that run diverged at step 12"):
        gqa_jax.load_model(copied)


def test_an_import_on_a_bucket(imported, gcs_root, tmp_path):
    loaded = gqa_jax.load_model(imported[0])
    found = write_import(f"{gcs_root}/there", loaded.config, loaded.params, provenance="", tokenizer=loaded.tokenizer)
    assert found.identity == imported[1].identity
    assert storage.names(f"{gcs_root}/there/tokenizer") == ["about.json"]
    there = gqa_jax.load_model(f"{gcs_root}/there")
    jax.tree.map(np.testing.assert_array_equal, there.params, loaded.params)
    assert there.tokenizer.name == "bytes"
    result = train.train_and_evaluate(tiny(**LONGER, continue_from="../there"), f"{gcs_root}/second")
    assert (result["status"], result["start"]["folder"]) == ("done", f"{gcs_root}/there")


class TestTokenizer:
    """That of a run, kept in its folder."""

    def test_one_with_a_file_is_kept_whole(self, bpe, tmp_path):
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "tokenizer.json").write_bytes(bpe.json)
        about = {"name": bpe.name, "sha256": bpe.sha256, "eos_id": bpe.eos_id}
        vocabulary.record(tmp_path / "run", SimpleNamespace(path=tmp_path / "store", vocabulary=about))
        found = tokenizer.of_run(tmp_path / "run")
        assert (found.name, found.eos_id, found.sha256) == ("bpe:270", bpe.eos_id, bpe.sha256)
        text = "the rat"
        assert found.encode_batch([text])[0].tolist() == bpe.encode_batch([text])[0].tolist()
        (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_bytes(bpe.json + b" ")
        with pytest.raises(vocabulary.TokenizerError, match=r"tokenizer\.json isn't the tokenizer that was recorded \(SHA"):
            tokenizer.of_run(tmp_path / "run")

    def test_what_is_kept_stays(self, bpe, tmp_path):
        vocabulary.record_tokenizer(tmp_path, bpe)
        made = catalog.open_store("sotu-bytes")
        vocabulary.record(tmp_path, made)
        assert vocabulary.recorded(tmp_path)["name"] == "bpe:270"

    def test_a_run_without_one_has_that_of_its_built_in_store(self, copied):
        shutil.rmtree(copied / "tokenizer")
        assert gqa_jax.load_model(copied).tokenizer.name == "bytes"

    def test_a_run_of_the_first_version_has_that_of_its_store_while_it_is_there(self, tmp_path, monkeypatch):
        folder = first_version.unpack(tmp_path)
        monkeypatch.chdir(folder)
        loaded = gqa_jax.load_model("run")
        assert (loaded.start.identity, loaded.tokenizer.name) == (first_version.IDENTITY, "bytes")
        result = json.loads((folder / "run" / "result.json").read_text())
        (folder / "run" / "result.json").write_text(json.dumps(result | {"data_fingerprint": "0" * 64}))
        assert "the token store store was made again" in gqa_jax.load_model("run").no_tokenizer
        shutil.rmtree("store")
        loaded = gqa_jax.load_model("run")
        assert loaded.tokenizer is None
        assert loaded.no_tokenizer.startswith("token store store: no such folder")

    def test_imported_parameters_may_have_none(self, tmp_path):
        write_import(tmp_path / "a", tiny().model, model.init_params(tiny().model, jax.random.key(0)), provenance="")
        assert "no tokenizer is kept in" in gqa_jax.load_model(tmp_path / "a").no_tokenizer


class TestGrid:
    """Cells that start from folders outside of their grid."""

    def continued(self, folder, **changes):
        about = {"batch_tokens": 256, "data": {"block_tokens": 64}, "evaluation": {"tokens": 1024}}
        config = grid.continued(folder, context_length=64, learning_rate=1e-5, tokens=512, **(about | changes))
        return grid.cells(grid.Grid("g", [config], [1024]))[0]

    def test_a_cell_from_an_import_is_the_run_that_its_name_says(self, imported, tmp_path):
        cell = self.continued(imported[0], rope_theta=1e6)
        assert (cell.parent, cell.config.continue_from, cell.start.identity) == (None, str(imported[0]), imported[1].identity)
        assert cell.start.differs == ("model.rope_theta: 1000000.0 here, 500000.0 there",)
        assert cell.identity["continue_from"] == imported[1].identity
        assert cell.config.model == dataclasses.replace(tiny().model, rope_theta=1e6)
        assert cell.config.data.skip_tokens == 0
        assert cell.describe()["continue_from"] == "there"
        folder = tmp_path / "cells" / cell.name
        folder.mkdir(parents=True)
        storage.write_json(folder / "config.json", cell.stored())
        assert cell.edited(folder) is None
        assert state.of(cell, folder, 0.0).cause is None  # waits for nothing
        result = train.train_and_evaluate(cell.config, folder)
        assert result["identity"] == hash_identity(cell.identity)
        assert result["start"]["differs"] == list(cell.start.differs)

    def test_a_cell_from_a_run_has_its_recipe_and_reads_on(self, finished, monkeypatch):
        folder, result = finished
        monkeypatch.chdir(folder.parent)
        cell = self.continued("first", label="longer")
        assert cell.config.continue_from == str(folder)
        assert cell.identity["continue_from"] == result["identity"]
        assert (cell.config.data.skip_tokens, cell.config.checkpoint) == (12 * 256, tiny().checkpoint)
        assert cell.start.differs == ()
        assert self.continued("first", seed=1).config.data.skip_tokens == 0
        other = self.continued("first", data={"store": "sotu-bytes@position"})
        assert other.config.data.skip_tokens == 0
        assert other.start.differs[0].startswith("data.fingerprint: ")
        copy = os.fspath(catalog.open_store("sotu-bytes").path)  # the same tokens by another name
        assert self.continued("first", data={"store": copy}).config.data.skip_tokens == 12 * 256
        by_hand = dataclasses.replace(cell.config, continue_from="first")
        (again,) = grid.cells(grid.Grid("g", [by_hand], [1024]))
        assert again == cell

    def test_its_children_and_old_rules(self, finished):
        first = grid.continued(finished[0], context_length=64, learning_rate=1e-5, tokens=512)
        second = grid.continued(first, context_length=64, learning_rate=1e-6, tokens=512)
        phases = grid.Grid("g", [second, first], [1024])
        one, two = grid.cells(phases)
        assert (one.parent, two.parent) == (None, one.name)
        assert two.config.data.skip_tokens == 12 * 256 + 512
        assert two.identity["continue_from"] == hash_identity(one.identity)
        old, _ = grid.cells(grid.under_old_rules(phases))
        assert old.config.evaluation.windows == "first"
        assert old.identity["continue_from"] == finished[1]["identity"]

    def test_what_it_can_not_start_from(self, imported, copied, tmp_path):
        with pytest.raises(ConfigError, match=r"nowhere has no result\.json: let that run end first"):
            self.continued(tmp_path / "nowhere")
        with pytest.raises(ConfigError, match=r"has other parameters: model\.n_heads: 4 here, 2 there"):
            self.continued(imported[0], model={"n_heads": 4})
        config = TrainConfig.from_dict(grid.continued(copied, context_length=64, learning_rate=1e-5, tokens=512).to_dict())
        shutil.rmtree(copied)
        with pytest.raises(ConfigError, match=r"cell 0 of grid 'g': continue_from = '.*first': .* has no result\.json"):
            grid.cells(grid.Grid("g", [config], [1024]))
