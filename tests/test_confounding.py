"""What differs between heads of a size besides the heads: which design it is, what is refused, what answers repeat."""

import json

import numpy as np
import pandas as pd
import pytest

from gqa_jax import results
from gqa_jax.laws import Heads, confounding, fit_by_heads, fit_joint, fit_query_heads
from gqa_jax.search import optimum, presets
from launch.__main__ import main
from tests import grid_fakes, law_tables


@pytest.fixture
def table():
    return law_tables.synthetic(noise=1e-3)


def per_parameter(table, ratio=20.0):
    return table.assign(tokens=ratio * table["params_non_embedding"])


def longer(table, heads=(4, 1), factor=2.9):
    """Those heads saw more tokens than the others, and have the lower loss that these give."""
    mine = (table["n_heads"] == heads[0]) & (table["n_kv_heads"] == heads[1])
    return table.assign(tokens=table["tokens"] * np.where(mine, factor, 1.0), loss=table["loss"] - 0.02 * mine)


class TestDesign:
    def test_equal_tokens(self, table):
        design = confounding.design(table)
        assert (design.kind, design.problem, design.warnings) == ("equal tokens", None, ())
        nothing = "differs between heads at a size: nothing that the table has a column for"
        assert str(design) == f"design: equal tokens for all heads of a size; {nothing}"

    def test_equal_tokens_per_parameter(self, table):
        assert confounding.design(per_parameter(table)).kind == "equal tokens per parameter"
        close = law_tables.synthetic(heads=[(8, 2), (8, 1)])  # N differs by 2% at a size
        assert confounding.design(close).kind == "equal tokens, and equal tokens per parameter"

    @pytest.mark.parametrize(("factor", "kind"), [(1.049, "equal tokens"), (1.051, "neither")])
    def test_within_a_twentieth(self, table, factor, kind):
        assert confounding.design(longer(table, factor=factor)).kind == kind

    def test_of_heads_with_the_same_set_of_token_counts(self, table):
        crossed = pd.concat([table, table.assign(tokens=3 * table["tokens"], loss=table["loss"] - 0.1)])
        assert confounding.design(crossed).kind == "equal tokens"
        assert confounding.design(crossed[:-1]).kind == "neither"  # the longer run of one H is missing

    def test_that_is_not_known(self, table):
        unknown = confounding.design(table.drop(columns="tokens"))
        assert unknown.kind == "not known"
        assert unknown.warnings == ("whether heads of a size saw as many tokens is not known: the table has no column tokens",)
        some = confounding.design(table.assign(tokens=table["tokens"].where(table.index > 1)))
        assert some.kind == "equal tokens"
        assert some.warnings[0].startswith("tokens of 2 of 42 runs are not known")
        alone = confounding.design(table[(table["n_heads"] == 4)].drop(columns="tokens"))
        assert (alone.kind, alone.warnings) == ("not known", ())  # there is nothing to compare

    def test_is_of_the_sizes_that_the_table_names(self, table):
        named = table.assign(size=table["d_model"].astype(str) + " wide")[table["n_layers"] != 16].drop(
            columns=["n_layers", "d_model"]
        )
        assert confounding.design(named).kind == "equal tokens"
        with pytest.raises(ValueError, match="at size 512 wide saw"):
            confounding.require(longer(named))

    def test_no_sizes_agree_on_a_design(self, table):
        """Equal tokens at the small sizes, equal tokens per parameter at the large ones: neither, and both places are said."""
        mixed = table.assign(tokens=np.where(table["d_model"] > 1300, 20 * table["params_non_embedding"], table["tokens"]))
        design = confounding.design(mixed)
        assert design.kind == "neither"
        assert "tokens, other heads there" in design.problem
        assert "per parameter, other heads there" in design.problem


class TestDifferences:
    def test_are_named_with_size_heads_and_values(self, table):
        rate = np.where(table["n_heads"] == 1, 2e-3, 1e-3)
        seed = np.where((table["n_heads"] == 2) & (table["d_model"] == 1280), 5, 0)
        design = confounding.design(table.assign(learning_rate=rate, seed=seed, batch_tokens=512))
        assert design.differences == (
            "learning_rate (at 6 of 6 sizes; at 6x512 0.002 of (1,1); 0.001 of (2,1), (4,1), (8,1) and 3 more)",
            "seed (at 1 of 6 sizes; at 24x1280 0 of (1,1), (4,1), (8,1) and 3 more; 5 of (2,1))",
        )
        assert design.warnings == (f"heads of a size differ in more than their heads: {design.differences[0]}",)

    @pytest.mark.parametrize("name", ["learning_rate", "batch_tokens", "schedule", "heldout", "d_ff"])
    def test_of_the_recipe_are_in_every_answer(self, table, name):
        values = np.where(
            table["n_heads"] == 1, "a" if name in ("schedule", "heldout") else 1, "b" if name in ("schedule", "heldout") else 2
        )
        laws = fit_by_heads(table.assign(**{name: values}))
        (said,) = [text for text in laws.warnings if text.startswith("heads of a size differ in more than their heads")]
        assert name in said
        assert said in optimum.search(laws, 2.7, 32_768, draws=0).warnings

    def test_a_number_within_a_thousandth_is_the_same(self, table):
        rate = np.where(table["n_heads"] == 1, 1e-3, 1e-3 * (1 + 1e-9))
        assert confounding.design(table.assign(learning_rate=rate)).differences == ()


class TestRefusal:
    def test_heads_that_saw_more_tokens_do_not_win_in_silence(self, table):
        with pytest.raises(
            ValueError, match=r"heads \(4,1\) at size \S+ saw \S+ tokens, other heads there \S+: \S+ times apart"
        ) as e:
            fit_by_heads(longer(per_parameter(table)))
        assert "2.9 times per parameter" in str(e.value)
        assert "allow_confounded=True" in str(e.value)
        assert "--allow_confounded" in str(e.value)

    def test_allowed_is_repeated_by_every_answer(self, table):
        laws = fit_by_heads(longer(table), allow_confounded=True)
        assert laws.design.kind == "neither"
        (said,) = [text for text in laws.warnings if text.startswith("confounded, and allowed: heads (4,1)")]
        answer = optimum.search(laws, 2.7, 32_768, draws=100)
        assert said in answer.warnings
        assert said in answer.to_dict()["warnings"]

    def test_of_other_laws_of_heads(self, table):
        with pytest.raises(ValueError, match=r"heads \(4,1\)"):
            fit_joint(longer(table))
        assert any(text.startswith("confounded") for text in fit_joint(longer(table), allow_confounded=True).warnings)
        one = table[(table["n_kv_heads"] == 1)]
        with pytest.raises(ValueError, match=r"heads \(4,1\)"):
            fit_query_heads(longer(one))
        found = fit_query_heads(longer(one, factor=1.1), allow_confounded=True)
        assert any(text.startswith("confounded") for text in found.warnings)

    @pytest.mark.parametrize("name", ["data_fingerprint", "vocab_size", "unembedding"])
    def test_one_law_is_of_one_text_and_one_vocabulary(self, table, name):
        values = np.where(table["n_heads"] == 1, 1, 2)
        with pytest.raises(
            ValueError, match=f"runs of several {name} .1: 6 runs, 2: 36 runs. are not on one law: fit them apart"
        ):
            fit_by_heads(table.assign(**{name: values}))

    def test_what_was_published_passes(self):
        assert fit_by_heads(presets.paper_losses())[Heads(8, 1)]


class TestCommands:
    @pytest.fixture
    def confounded(self, tmp_path, monkeypatch):
        """A finished grid of which (1,1) saw three times the tokens."""
        file, layout, cells = grid_fakes.finished_grid(tmp_path)
        for cell in cells:
            path = layout.cell(cell.name) / "result.json"
            if cell.config.model.n_heads == 1:
                path.write_text(json.dumps(json.loads(path.read_text()) | {"tokens": 3072}))
        monkeypatch.chdir(tmp_path)
        assert set(results.load_results(layout.root)["tokens"]) == {1024, 3072}
        return file, layout

    def test_fit_shows_the_design(self, confounded, capsys):
        file, _ = confounded
        assert main(["fit", str(file)]) != 0
        assert "heads (1,1) at size" in capsys.readouterr().err
        assert main(["fit", str(file), "--allow_confounded"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "design: neither equal tokens nor equal tokens per parameter; differs between heads at a size: tokens" in text
        assert "confounded, and allowed" in text

    def test_optimum_refuses_and_repeats(self, confounded, capsys):
        file, _ = confounded
        ask = ["optimum", str(file), "--context", "1024", "--loss", "1.9", "--draws", "0"]
        assert main(ask) != 0
        assert "--allow_confounded" in capsys.readouterr().err
        assert main([*ask, "--allow_confounded", "--format", "json"]) == 0
        assert any("confounded, and allowed" in text for text in json.loads(capsys.readouterr().out)["warnings"])

    def test_export_has_tables_and_no_laws(self, confounded, capsys):
        file, layout = confounded
        assert main(["export", str(file)]) == 0
        assert "no fit: heads (1,1)" in " ".join(capsys.readouterr().out.split())
        assert (layout.tables / "loss.csv").exists()
        assert not (layout.tables / "fits.csv").exists()
        assert main(["export", str(file), "--allow_confounded"]) == 0
        assert "confounded, and allowed" in pd.read_csv(layout.tables / "fits.csv")["warnings"][0]

    def test_it_is_for_runs(self, capsys):
        assert main(["fit", "--preset", "paper", "--allow_confounded"]) != 0
        assert "--allow_confounded is for your runs" in capsys.readouterr().err
