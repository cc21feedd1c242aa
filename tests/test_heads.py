"""Other heads of a trained model: what changes no logit, what is kept of what, and a run that goes on from one, on any mesh."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gqa_jax
from gqa_jax import model, train
from gqa_jax.config import ConfigError
from gqa_jax.conversion import converting, heads
from gqa_jax.data import tokenizer
from gqa_jax.training import parameters, start
from gqa_jax.training.parameters import write_import
from launch import __main__ as launch
from launch import grid
from tests.test_inference import tiny
from tests.test_train import tiny as training

pytestmark = pytest.mark.usefixtures("compiled_once")

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 24))
WIDE = {"model": training().to_dict()["model"] | {"n_heads": 4, "n_kv_heads": 4}}


def drawn(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda like: (0.3 * rng.standard_normal(like.shape)).astype(np.float32), parameters.abstract(config))


def logits(config, params):
    return np.asarray(model.with_params(config, jax.tree.map(jnp.asarray, params))(TOKENS))


def config_of(n_heads, n_kv_heads):
    return tiny(n_heads, n_kv_heads, param_dtype="float32")


@pytest.mark.parametrize("method", ["mean", "first"])
@pytest.mark.parametrize(("here", "there"), [((4, 4), 2), ((4, 4), 1), ((6, 3), 1), ((8, 4), 2)])
def test_pooling_heads_that_are_equal_changes_no_logit(method, here, there):
    source = config_of(*here)
    params, size = drawn(source), here[1] // there
    for name in ("key", "value"):
        params["layers"][name] = np.repeat(params["layers"][name][:, :, ::size], size, axis=2)
    target = heads.target(source, there)
    found = heads.convert(params, target, method)
    assert found["layers"]["key"].shape[2] == there
    np.testing.assert_allclose(logits(target, found), logits(source, params), atol=1e-6 * 30)
    scaled = heads.convert(params, target, "scaled_mean")["layers"]["value"]
    np.testing.assert_allclose(scaled, size**0.5 * found["layers"]["value"], rtol=1e-6)


@pytest.mark.parametrize(("here", "there"), [((4, 1), 4), ((4, 2), 4), ((6, 1), 3)])
def test_repeating_heads_changes_no_logit(here, there):
    source = config_of(*here)
    params, target = drawn(source), heads.target(config_of(*here), there)
    found = heads.convert(params, target, "mean")
    np.testing.assert_allclose(logits(target, found), logits(source, params), atol=1e-6 * 30)
    back = heads.convert(found, source, "first")
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_heads_that_are_pooled_are_neighbours():
    source = config_of(4, 4)
    params = drawn(source)
    for method, expected in (
        ("mean", lambda x: (x[:, :, 0::2] + x[:, :, 1::2]) / 2),
        ("scaled_mean", lambda x: (x[:, :, 0::2] + x[:, :, 1::2]) / 2**0.5),
        ("first", lambda x: x[:, :, 0::2]),
    ):
        found = heads.convert(params, heads.target(source, 2), method)["layers"]
        for name in ("key", "value"):
            np.testing.assert_allclose(found[name], expected(params["layers"][name]), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found["query"], params["layers"]["query"])


def test_query_heads_that_write_nothing_are_the_first_to_go():
    """One of each group is silenced, its value or its output: without it no logit changes."""
    source = config_of(6, 2)
    params = drawn(source)
    params["layers"]["output"][0, [1, 5]] = 0
    params["layers"]["output"][1, [0, 3]] *= 1e-9
    target = heads.target(source, n_heads=4)
    found = heads.convert(params, target, "mean")
    np.testing.assert_allclose(logits(target, found), logits(source, params), atol=1e-6 * 30)
    np.testing.assert_array_equal(found["layers"]["query"][0], params["layers"]["query"][0][:, [0, 2, 3, 4]])
    np.testing.assert_array_equal(found["layers"]["output"][1], params["layers"]["output"][1][[1, 2, 4, 5]])


def test_strength_is_of_what_a_head_can_write_and_not_of_how_it_is_written():
    """A value twice as large and an output half as large are the same head."""
    source = config_of(4, 4)
    params = drawn(source)
    target = heads.target(source, n_kv_heads=1, n_heads=2)
    chosen = heads.convert(params, target, "first")["layers"]["query"]
    params["layers"]["value"] *= 7
    params["layers"]["output"] /= 7
    np.testing.assert_array_equal(heads.convert(params, target, "first")["layers"]["query"], chosen)


@pytest.mark.parametrize(
    ("n_kv_heads", "n_heads", "said"),
    [
        (3, None, r"n_kv_heads = 3 can't be made of 4 key/value heads of 8 query heads: .*; use one of \[1, 2, 4, 8\]"),
        (16, None, r"n_kv_heads = 16 can't be made"),
        (0, None, r"n_kv_heads = 0 can't be made"),
        (4, 6, r"n_heads = 6 can't be made of 8 query heads over 4 key/value heads: .*; use one of \[4, 8\]"),
        (None, 16, r"n_heads = 16 can't be made"),
        (2, 0, r"n_heads = 0 can't be made"),
    ],
)
def test_heads_that_can_not_be_made(n_kv_heads, n_heads, said):
    with pytest.raises(ConfigError, match=said):
        heads.target(config_of(8, 4), n_kv_heads, n_heads)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, train.train_and_evaluate(training(**WIDE), folder)


class TestCommand:
    def test_a_run_with_fewer_heads_is_a_model_like_any_other(self, run, tmp_path, capsys):
        folder, result = run
        argv = ["convert-heads", str(folder), "--n_kv_heads", "1", "--n-heads", "2", "--method", "mean"]
        assert launch.main([*argv, "--out", str(tmp_path / "fewer")]) == 0
        said = capsys.readouterr().out
        assert f"{tmp_path / 'fewer'}: (4,4) heads to (2,1) by mean" in said
        assert f"held-out loss {result['loss']:.4f} before, " in said
        loaded = gqa_jax.load_model(tmp_path / "fewer")
        assert (loaded.config.n_heads, loaded.config.n_kv_heads, loaded.context) == (2, 1, training().context_length)
        assert len(loaded.generate("We", 4).tokens) == 4
        about = json.loads((tmp_path / "fewer" / "import.json").read_text())
        assert about["provenance"].startswith(f"of {result['identity']}, (4,4) heads to (2,1) by mean; held-out loss ")

    def test_the_loss_after_is_that_of_the_new_model(self, run, tmp_path):
        found = converting.convert_heads(run[0], tmp_path / "more", n_heads=2, n_kv_heads=2)
        assert found.before.loss == pytest.approx(run[1]["loss"], abs=1e-6)
        assert found.difference.estimate.value == pytest.approx(found.after.loss - found.before.loss, abs=1e-6)
        assert "(2,2) by scaled_mean" in found.sentences()[0]

        again = converting.convert_heads(tmp_path / "more", tmp_path / "again", n_kv_heads=1, store="sotu-bytes")
        back = converting.convert_heads(tmp_path / "again", tmp_path / "back", n_kv_heads=2, store="sotu-bytes")
        assert "(2,1) heads to (2,2) by repetition" in back.sentences()[0]
        assert back.after.loss == pytest.approx(back.before.loss, abs=1e-6)
        assert again.before.tokens == 65_536  # of imported parameters: on the store that is named
        assert abs(again.before.loss - found.after.loss) < 0.05

    def test_imported_parameters_have_no_text(self, run, tmp_path):
        config = config_of(4, 4)
        write_import(tmp_path / "in", config, drawn(config), provenance="")
        found = converting.convert_heads(tmp_path / "in", tmp_path / "out", n_kv_heads=2)
        assert "loss not known: imported parameters have no text of their own" in " ".join(found.sentences())
        other = tokenizer.train_bpe(["the cat"] * 9, 260)
        write_import(tmp_path / "b", training().model, drawn(training().model), provenance="", tokenizer=other)
        with pytest.raises(ConfigError, match="--store sotu-bytes has another vocabulary than"):
            converting.convert_heads(tmp_path / "b", tmp_path / "c", n_heads=1, store="sotu-bytes")

    def test_bad_input_writes_nothing(self, run, tmp_path, capsys):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "x").write_text("")
        for options, said in (
            (["--n_kv_heads", "3", "--out", "a"], "n_kv_heads = 3 can't be made of 4"),
            (["--n_kv_heads", "4", "--out", "a"], "the model has these heads already"),
            (["--n_kv_heads", "2", "--out", "full"], "full holds something: write into a new folder"),
            (["--n_kv_heads", "2", "--out", "a", "--store", "nowhere"], "nowhere"),
        ):
            options[options.index("--out") + 1] = str(tmp_path / options[options.index("--out") + 1])
            assert launch.main(["convert-heads", str(run[0]), *options]) == 2
            assert said in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
        with pytest.raises(ConfigError, match=r"method = 'means': did you mean 'mean'\?"):
            converting.convert_heads(run[0], tmp_path / "a", n_kv_heads=2, method="means")


class TestRuns:
    """A run that starts from a parent with other heads."""

    def fewer(self, **changes):
        wide = training(**WIDE).to_dict()["model"]
        model = {"model": wide | {"n_kv_heads": 2}}
        return training(**({"continue_from": "../first", "convert_heads": "mean", "steps": 8} | model | changes))

    def test_it_starts_from_what_convert_heads_writes(self, tmp_path):
        """The same as a run that continues the folder that `convert-heads` makes, but for its name."""
        train.train_and_evaluate(training(**WIDE), tmp_path / "first")
        result = train.train_and_evaluate(self.fewer(), tmp_path / "second")
        converting.convert_heads(tmp_path / "first", tmp_path / "between", n_kv_heads=2, method="mean")
        plain = train.train_and_evaluate(self.fewer(convert_heads=None, continue_from="../between"), tmp_path / "third")
        assert result["params_sha256"] == plain["params_sha256"]
        assert result["start"]["differs"] == ["heads: (4,2) here, by mean, (4,4) there"]
        assert result["start"]["kind"] == "run"
        first = json.loads((tmp_path / "first" / "result.json").read_text())
        assert result["start"]["identity"] == first["identity"]  # the parent's, not a hash of content
        mesh = {"execution": {"mesh": "data=2,fsdp=2,tensor=2"}}
        shared = train.train_and_evaluate(self.fewer(**mesh), tmp_path / "fourth")
        assert shared["identity"] == result["identity"]
        assert shared["loss"] == pytest.approx(result["loss"], abs=1e-5)

    def test_what_can_not_be(self, tmp_path):
        with pytest.raises(ConfigError, match="convert_heads = 'mean': set continue_from to the folder whose heads they are"):
            self.fewer(continue_from=None)
        with pytest.raises(ConfigError, match=r"convert_heads = 'meen': did you mean 'mean'\?"):
            self.fewer(convert_heads="meen")
        source = start.Start(start.RUN, model=training(**WIDE).model)
        with pytest.raises(ConfigError, match=r"n_kv_heads = 3 can't be made of 4 key/value heads"):
            source.differences(self.fewer(model=training(**WIDE).to_dict()["model"] | {"n_heads": 3, "n_kv_heads": 3}))
        with pytest.raises(ConfigError, match=r"has other parameters: model\.n_kv_heads: 2 here, 4 there"):
            source.differences(self.fewer(convert_heads=None))
        with pytest.raises(ConfigError, match=r"has other parameters: model\.d_model"):
            source.differences(self.fewer(model=training(**WIDE).to_dict()["model"] | {"d_model": 32}))


def test_a_grid_makes_every_h_of_one_checkpoint():
    """Names follow from the parent, the heads, the method and the tokens."""
    from launch import training_cells

    first = training(**WIDE)
    configs = [first, *(grid.converted(first, k, share) for k in (2, 1) for share in (0.25, 0.5))]
    configs.append(grid.converted(first, 1, 0.5, method="mean", n_heads=2))
    found = training_cells.make("g", configs)
    assert len({cell.name for cell in found}) == 6
    parent, *children = found
    assert {cell.parent for cell in children} == {parent.name}
    models = [cell.config.model for cell in children]
    assert [(model.n_heads, model.n_kv_heads) for model in models] == [(4, 2), (4, 2), (4, 1), (4, 1), (2, 1)]
    assert [cell.config.n_steps for cell in children] == [3, 6, 3, 6, 6]  # of 12
    assert {cell.config.data.skip_tokens for cell in children} == {-(-first.train_tokens // 32) * 32}
    assert {cell.config.optimizer.learning_rate for cell in children} == {first.optimizer.learning_rate}
    assert {cell.start.differs[-1].split(", by ")[1].split(",")[0] for cell in children} == {"scaled_mean", "mean"}
    with pytest.raises(ConfigError, match=r"n_kv_heads = 3 can't be made of 4"):
        grid.converted(first, 3, 0.5)


def test_names_of_runs_without_other_heads_stay(tmp_path):
    assert "convert_heads" not in training().identity("f")
    stored = training().to_dict()
    del stored["convert_heads"]
    assert type(training()).from_stored(stored) == training()
