"""Studies in a notebook: what is loaded, which training context answers, what is drawn and compared."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import gqa_jax
from gqa_jax import differences, results
from gqa_jax.errors import ConfigError
from gqa_jax.laws import Heads, external, fit_by_heads
from gqa_jax.search import objectives, optimum, presets, study
from gqa_jax.training import evaluation
from gqa_jax.training.metrics import write_json
from launch import grid, grid_cells, studies
from launch.cells import Layout
from tests import grid_fakes

NOISE = {32: 0.002, 64: 0.02}  # nats, by training context


def trained(folder, noise=NOISE, seed=0, shift=0.0, documents=False, sizes=(16, 32, 64, 128)):
    """A grid folder of runs on power laws, but for noise that is normal with the deviation of their training context."""
    axes = {"size": sizes, "n_heads": [1, 2, 4], "context": list(noise)}
    the_grid = grid.Grid("made-up", list(grid.product(grid_fakes.config, **axes)), contexts_served=[1024, 8192])
    cells, layout = grid.cells(the_grid), Layout(folder)
    folder.mkdir()
    write_json(folder / "grid.json", grid_cells.facts(the_grid, cells))
    generator = np.random.default_rng(seed)
    for cell in cells:
        grid_fakes.finish(cell, layout)
        path = layout.cell(cell.name) / "result.json"
        values = json.loads(path.read_text())
        loss = values["loss"] + shift + float(generator.normal(scale=noise[cell.config.context_length]))
        write_json(path, values | {"loss": loss})
        if documents:
            (layout.cell(cell.name) / "documents.npz").write_bytes(evaluation.to_bytes(documents_of(loss)))
    return folder


def documents_of(loss, count=8):
    """A text whose documents are 0.3 nats apart, of a model of this mean loss."""
    each = loss + np.linspace(-0.3, 0.3, count)
    number = np.arange(count, dtype=np.uint64)
    tokens = np.full(count, 128, np.int64)
    return evaluation.Documents(
        number, np.zeros(count, np.int32), np.array(["text"]), tokens, number + 100, tokens, each * tokens
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("study") / "grid")


@pytest.fixture(scope="module")
def loaded(folder):
    return gqa_jax.load_study(folder)


@pytest.fixture(scope="module")
def paper():
    return gqa_jax.load_study("paper")


class TestWhichLawsAnswer:
    def test_those_of_least_noise_and_it_is_said(self, loaded):
        assert list(loaded.contexts) == [32, 64]
        assert loaded.context == 32
        assert loaded.laws is loaded.contexts[32]
        assert loaded.why.startswith(f"laws of runs trained at 32 tokens: their noise, {loaded.laws.sigma:.4f} nats, is ")
        assert "the least of 2 training contexts (64: " in loaded.why
        assert loaded.answer(2.2, "8K").heads == loaded.answer(2.2, 8192, train_context=32).heads

    def test_the_other_way_round(self, tmp_path):
        """Not the shorter one, and not the first."""
        found = gqa_jax.load_study(trained(tmp_path / "grid", {32: 0.02, 64: 0.002}))
        assert found.context == 64

    def test_not_losses_that_hardly_fall(self):
        """In nats a plateau has the least noise of all."""
        n_params = np.array([1e4, 4e4, 1.6e5, 6.4e5])
        fitted = []
        for context, (scale, wiggle) in {32: (1.0, 0.004), 64: (0.01, 0.002)}.items():
            loss = scale * (2e3 / n_params) ** 0.3 + 1.5 + wiggle * np.array([1, -1, 1, -1])
            rows = pd.DataFrame(
                {"n_heads": 2, "n_kv_heads": 1, "params_non_embedding": n_params, "loss": loss, "status": "done"}
            ).assign(context=context)
            fitted.append(study.Fitted(context, rows, fit_by_heads(rows, entropy=1.45), [2.0], [1024], "figures"))
        steep, flat = fitted
        assert flat.laws.sigma < steep.laws.sigma
        assert study.by_noise([flat, steep]) == [steep, flat]

    def test_of_the_same_noise_those_of_most_runs(self, loaded):
        one = loaded.fits.fitted[0]
        fewer = study.Fitted(64, one.rows.iloc[1:], one.laws, one.losses, one.contexts_served, one.convention)
        assert study.by_noise([fewer, one]) == [one, fewer]
        assert ", as at 64, and they are of more runs, or longer ones" in study.Fits([one, fewer]).why

    def test_of_one_context_nothing_is_said(self, paper, tmp_path):
        assert paper.why == ""
        assert gqa_jax.load_study(trained(tmp_path / "grid", {32: 0.002})).why == ""

    def test_without_noise_it_is_said(self, tmp_path):
        """Three sizes of one H have as many coefficients as runs."""
        found = gqa_jax.load_study(trained(tmp_path / "grid"))
        rows = found.runs[(found.runs["n_heads"] == 1) & (found.runs["size"] != "128d")]
        source = study.Source("few", rows, [1024], (), "figures")
        fits = study.fit(source)
        assert [one.noise for one in fits.fitted] == [np.inf, np.inf]
        assert fits.fitted[0].context == 64  # of as many runs the longest
        assert "of no training context the noise is known" in fits.why

    def test_the_command_line_takes_the_same(self, folder):
        fits = studies.fit(studies.of_grid(str(folder)))
        assert fits.at(None).context == 32
        with pytest.raises(ConfigError, match="training context 77: no run was trained there; there are 32, 64"):
            fits.at(77)


class TestLoadStudy:
    def test_a_folder(self, loaded, folder):
        assert (loaded.name, loaded.folder, len(loaded.runs)) == ("made-up", str(folder), 24)
        assert loaded.fits.fitted[0].contexts_served == [1024, 8192]

    def test_a_table(self, tmp_path, loaded):
        table = loaded.runs[loaded.runs["context"] == 32].rename(columns={"loss": "val_loss", "n_heads": "H"})
        path = tmp_path / "mine.csv"
        table.drop(columns="context").to_csv(path, index=False)
        found = gqa_jax.load_study(path, {"loss": "val_loss", "n_heads": "H"}, context=32)
        assert (found.name, found.context) == ("mine", 32)
        assert found.laws[Heads(2, 1)].a == pytest.approx(loaded.laws[Heads(2, 1)].a, rel=1e-6)
        given = gqa_jax.load_study(path, {"loss": "val_loss", "n_heads": "H"}, context=32, entropy=1.4)
        assert given.laws[Heads(2, 1)].entropy == 1.4

    def test_a_preset(self, paper):
        assert paper.laws is presets.load("paper")
        assert len(paper.runs) == 45
        assert gqa_jax.load_study("paper-table4").runs.empty

    @pytest.mark.parametrize(
        ("source", "options", "said"),
        [
            ("paper", {"entropy": 1.9}, "laws of preset paper are as they are: entropy is for runs of your own"),
            ("paper", {"columns": {"loss": "x"}}, "columns is for runs of your own, and these are not mixed with the paper's"),
            (["paper", "runs/mine"], {}, "not one source.*no law holds for both"),
            (pd.DataFrame(), {}, "is not one source"),
            ("nowhere", {}, "nowhere is no grid folder.*give the folder of a grid that was run, a table"),
            ("configs/grids/quickstart.py", {}, "is a grid file: give the folder that it was run in, like runs/quickstart"),
            ("mine.csv", {"rules": "a/b/c"}, "is for the folder of a grid"),
            ("runs/mine", {"units": "bits"}, "units is for a table of runs"),
        ],
    )
    def test_bad_sources(self, source, options, said):
        with pytest.raises(ConfigError, match=said):
            gqa_jax.load_study(source, **options)

    def test_runs_under_two_rules(self, folder, monkeypatch):
        both = results.load_results(folder)
        both["rules"] = np.where(both["context"] == 32, "position/first/zero", "hash/spread/one")
        monkeypatch.setattr(results, "load_results", lambda root: both.astype({"rules": "string"}))
        with pytest.raises(ValueError, match="runs under 2 rules"):
            gqa_jax.load_study(folder)
        assert list(gqa_jax.load_study(folder, rules="hash/spread/one").contexts) == [64]
        with pytest.raises(ConfigError, match=r"no run in .* is under these rules; there are hash/spread/one, position"):
            gqa_jax.load_study(folder, rules="x")

    def test_the_paper_s_runs_and_others_are_on_no_law(self, loaded):
        mixed = pd.concat([presets.paper_losses(), loaded.runs.assign(context=presets.CONTEXT)])
        with pytest.raises(ValueError, match="runs of several vocab_size"):
            fit_by_heads(mixed)


class TestQuestions:
    def test_answer_is_that_of_the_search(self, paper):
        found = paper.answer(2.615, "128K", "price", "h200", decode_share=0.1, draws=200, seed=3)
        goal = objectives.make("price", device="h200", decode_share=0.1)
        expected = optimum.search(presets.load("paper"), 2.615, 131_072, goal, draws=200, seed=3)
        assert (found.heads, found.cost, found.cost_interval) == (expected.heads, expected.cost, expected.cost_interval)
        assert paper.answer(2.615, 131_072, goal, draws=200, seed=3).cost == expected.cost

    def test_bytes_count_exactly(self, paper):
        """As on the command line: dtypes are of bytes, which the paper's figures do not count."""
        found = paper.answer(2.615, "128K", "memory", cache_dtype="int8", draws=0)
        assert found.objective["convention"]["memory"] == "bytes"

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"lamm": 0.5}, "lamm is no option here: did you mean 'lam'"),
            ({"cost": "price"}, "needs device"),
            ({"cost": objectives.Z(), "device": "h200"}, "device: the objective z has its settings already"),
            ({"cost": objectives.Z(), "lam": 0.5}, "lam: the objective z"),
            ({"train_context": 4}, "no run was trained there; there are 8192"),
            ({"context": "128Q"}, "no number of tokens"),
        ],
    )
    def test_bad_questions(self, paper, options, said):
        with pytest.raises(ValueError, match=said):
            paper.answer(**{"loss": 2.6, "context": "128K"} | options)

    def test_map_asks_what_the_grid_asks(self, loaded):
        frame = loaded.map(draws=0)
        assert set(frame["context_served"]) == {1024, 8192}
        assert list(dict.fromkeys(frame["loss"])) == loaded.fits.fitted[0].losses
        assert set(loaded.map([2.2], ["4K"], draws=0)["context_served"]) == {4096}

    def test_curves_are_the_laws_with_their_costs(self, loaded):
        frame = loaded.curves("8K", "memory", points=7)
        assert len(frame) == 7 * len(loaded.laws)
        law = loaded.laws[Heads(2, 1)]
        rows = frame[(frame["n_heads"] == 2) & (frame["n_kv_heads"] == 1)]
        assert rows["loss"].to_numpy() == pytest.approx(law.predict(rows["n_params"].to_numpy()))
        assert (rows["low"] < rows["loss"]).all()
        assert (rows["loss"] < rows["high"]).all()
        band = loaded.laws.band(Heads(2, 1), rows["n_params"].to_numpy())
        np.testing.assert_allclose(rows[["low", "high"]].to_numpy().T, band)
        assert rows["n_params"].iloc[0] == pytest.approx(law.params.min())
        assert rows["n_params"].iloc[-1] == pytest.approx(4 * law.params.max())
        assert rows["trained"].tolist() == [n <= law.params.max() for n in rows["n_params"]]
        model = rows.iloc[2]
        d_h, tokens = 8, 8192
        assert model["cost"] == pytest.approx(model["n_params"] + 2 * tokens * model["n_layers"] * d_h, rel=0.01)
        assert set(frame["context_served"]) == {8192}

    def test_curves_of_devices(self, paper):
        frame = paper.curves("128K", "latency", "h200", points=3, until=1e10)
        assert frame["n_params"].max() == pytest.approx(1e10)
        assert frame["cost"].gt(0).all()
        with pytest.raises(ValueError, match="points = 1"):
            paper.curves(points=1)
        with pytest.raises(ValueError, match="draws is no option here"):
            paper.curves(draws=3)


class TestCompare:
    def test_differences_are_paired_by_documents(self, tmp_path):
        one = gqa_jax.load_study(trained(tmp_path / "one", {32: 0.001}, documents=True))
        other = gqa_jax.load_study(trained(tmp_path / "two", {32: 0.001}, documents=True, shift=0.05, sizes=(16, 32, 64)))
        found = one.compare(other, 2.3, "8K", draws=200)
        assert list(found.runs.columns) == list(study.COMPARED)
        assert len(found.runs) == 9
        assert found.runs["difference"].to_numpy() == pytest.approx(-0.05, abs=0.01)
        assert found.runs["difference"].to_numpy() == pytest.approx((found.runs["loss"] - found.runs["other_loss"]).to_numpy())
        assert (found.runs["standard_error"] < 1e-6).all()  # documents are 0.3 apart, in both alike
        noise = np.hypot(one.laws.sigma, other.laws.sigma)
        assert found.runs["noise"].to_numpy() == pytest.approx(noise)
        assert found.answers["study"].tolist() == ["made-up", "made-up"]
        assert (found.answers["n_params"].iloc[1] > found.answers["n_params"].iloc[0]).all()  # higher losses, larger models
        assert found.answers["regret_of_other"].ge(found.answers["expected_regret"]).all()
        assert "-0.05" in found.summary()
        assert "9 configurations" in repr(found)
        assert "<table" in found._repr_html_()

    def test_seeds_of_a_configuration_are_averaged(self, tmp_path):
        a = trained(tmp_path / "one", {32: 0.001}, documents=True)
        names = sorted(path.name for path in (a / "cells").iterdir())
        frame = differences.load_differences_between(a, a, [(names[:2], names[2:3]), ([names[0]], [names[0]])])
        losses = results.load_results(a).set_index("cell")["loss"]
        assert frame["difference"].iloc[0] == pytest.approx(losses[names[:2]].mean() - losses[names[2]])
        assert frame["difference"].iloc[1] == 0
        (a / "cells" / names[0] / "documents.npz").unlink()
        frame = differences.load_differences_between(a, a, [(names[:2], names[2:3])])
        assert frame["difference"].isna().all()
        assert f"{names[0]} has no documents.npz" in frame["note"].iloc[0]

    def test_of_several_seeds(self, loaded):
        twice = pd.concat([loaded.runs, loaded.runs.assign(loss=loaded.runs["loss"] + 0.01)])
        source = study.Source("twice", twice, [1024], (), "figures")
        found = study._compared(study.Study("twice", source, loaded.fits), loaded)
        assert set(found["n_runs"]) == {2}
        assert set(found["other_n_runs"]) == {1}
        assert found["difference"].to_numpy() == pytest.approx(0.005)

    def test_what_losses_of_other_text_can_t_tell(self, paper, loaded):
        found = paper.compare(loaded, draws=0)
        assert found.runs.empty
        assert any("of another vocabulary (50304; 320)" in note for note in found.notes)
        assert any("on which text the losses are is not known" in note for note in found.notes)
        assert found.answers["loss"].tolist() == [2.6, 2.6]

    def test_a_study_that_can_t_answer_is_said(self, paper, loaded):
        found = paper.compare(loaded, 1.0, draws=0)
        assert found.answers["n_params"].isna().all()
        assert any("made-up has no answer: a loss of 1 can't be reached" in note for note in found.notes)
        assert "no answer" in found.summary()

    def test_errors_of_unpaired_losses(self, loaded):
        a, b = loaded.runs.assign(heldout="one", loss_sem=0.003), loaded.runs.assign(heldout="two", loss_sem=0.004)
        assert study._unpaired(a, b) == pytest.approx(0.005)
        assert np.isnan(study._unpaired(a, a))


class TestWhatIsShown:
    def test_summary(self, loaded, paper):
        text = loaded.summary()
        assert text.startswith("made-up: 24 runs\n")
        assert "trained at 32: 12 runs, 3 head configurations at 4 sizes; R² from 0.99" in text
        assert text.endswith(f"answers are of {loaded.why}")
        assert "no run of yours" in paper.summary()

    def test_a_context_without_laws(self, loaded):
        rows = loaded.runs[(loaded.runs["context"] == 32) | (loaded.runs["size"] == "16d")]
        source = study.Source("part", rows, [1024], (), "figures")
        found = study.Study("part", source, study.fit(source))
        assert "trained at 64: heads (1,1), (2,1), (4,1): 1 size has finished" in found.summary()
        assert found.table()["default"].tolist() == [True, False]
        assert "1 size has finished" in found._repr_html_()

    def test_html_and_repr(self, loaded):
        assert repr(loaded) == "<Study made-up: 24 runs trained at 32, 64 tokens>"
        html = loaded._repr_html_()
        assert "<table" in html
        assert "the least of 2 training contexts" in html


class TestThePackage:
    def test_dir_is_complete(self):
        names = dir(gqa_jax)
        assert set(gqa_jax.__all__) <= set(names)
        assert {"presets", "laws", "search", "plots", "results", "hardware", "train", "invariance"} <= set(names)
        assert all(not name.startswith("_") or name.startswith("__") for name in names)
        assert gqa_jax.load_table is external.load_table

    def test_what_is_imported_when_it_is_asked_for_has_a_type(self):
        """What type checkers read is what comes at run time."""
        tree = ast.parse(Path(gqa_jax.__file__).read_text())
        block = next(node for node in tree.body if isinstance(node, ast.If))
        typed = {alias.name: node.module for node in block.body for alias in node.names}
        assert set(typed) == {*gqa_jax.__all__, "invariance", "presets"}
        for name, module in typed.items():
            assert getattr(gqa_jax, name) is getattr(importlib.import_module(module), name)
        with pytest.raises(AttributeError, match="no attribute 'load_nothing'"):
            _ = gqa_jax.load_nothing

    def test_modules_are_attributes_and_jax_is_not_imported(self):
        code = (
            "import sys, gqa_jax\n"
            "assert 'pandas' not in sys.modules, 'slow to import'\n"
            "gqa_jax.results.load_costs, gqa_jax.search.presets.load, gqa_jax.laws.fit_by_heads, gqa_jax.plots\n"
            "gqa_jax.load_study\n"
            "assert 'jax' not in sys.modules\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_metrics_of_a_grid_and_of_a_run(self, tmp_path):
        for cell, losses in {"a": [3.0, 2.0], "b": [4.0]}.items():
            folder = tmp_path / "cells" / cell / "metrics"
            folder.mkdir(parents=True)
            rows = [{"kind": "train", "step": i + 1, "time": 1.0 * i, "loss": loss} for i, loss in enumerate(losses)]
            rows.append({"kind": "eval", "step": len(losses), "time": 9.0, "loss": 2.5, "bits_per_byte": 3.5})
            (folder / "attempt-001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        table = gqa_jax.load_metrics(tmp_path)
        assert list(table.columns) == ["cell", "kind", "step", "time", "loss", "bits_per_byte"]
        assert table["cell"].tolist() == ["a"] * 3 + ["b"] * 2
        assert sorted(table.loc[table["kind"] == "train", "loss"]) == [2.0, 3.0, 4.0]
        assert table["bits_per_byte"].notna().tolist() == table["kind"].eq("eval").tolist()
        one = gqa_jax.load_metrics(tmp_path / "cells" / "b")
        assert one["loss"].tolist() == table.loc[table["cell"] == "b", "loss"].tolist()
        with pytest.raises(FileNotFoundError, match="no grid folder and no run's"):
            gqa_jax.load_metrics(tmp_path / "nowhere")
