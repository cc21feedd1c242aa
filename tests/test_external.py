"""Runs of any trainer: a CSV or Parquet file of losses, by our names or mapped, in any unit; and what is refused."""

import json

import numpy as np
import pandas as pd
import pytest

import gqa_jax
from gqa_jax import costs
from gqa_jax.errors import ConfigError
from gqa_jax.laws import MHA, Heads, external, fit_by_heads, runs
from gqa_jax.search import optimum, presets
from launch.__main__ import main
from tests import law_tables

pytestmark = pytest.mark.usefixtures("small_map")  # of reports


@pytest.fixture
def table():
    return law_tables.synthetic(noise=1e-3).assign(vocab_size=50_304)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A table of runs as a file in the current folder."""
    monkeypatch.chdir(tmp_path)

    def written(frame, name="runs.csv"):
        frame.to_csv(name, index=False) if name.endswith(".csv") else frame.to_parquet(name)
        return name

    return written


def bare(table):
    return table.drop(columns=["status", "context", "vocab_size"])


class TestReading:
    @pytest.mark.parametrize("name", ["runs.csv", "runs.parquet"])
    def test_gives_the_laws_of_the_table(self, table, write, name):
        read = gqa_jax.load_table(write(table, name))
        ours, theirs = fit_by_heads(read), fit_by_heads(table)
        assert ours[8, 1].b == pytest.approx(theirs[8, 1].b, rel=1e-12)
        assert str(read["n_heads"].dtype) == "Int64"

    def test_columns_are_mapped_and_the_rest_is_kept(self, table, write):
        other = bare(table).rename(columns={"n_heads": "H", "loss": "val_loss", "params_non_embedding": "N"})
        path = write(other.assign(schedule="cosine", loss=1.0))  # a loss of something else, which the mapping replaces
        read = external.load_table(path, {"n_heads": "H", "loss": "val_loss", "params_non_embedding": "N"}, context=8192)
        np.testing.assert_array_equal(read["loss"].to_numpy(float), table["loss"])
        assert set(read["status"]) == {"done"}
        assert set(read["context"]) == {8192}
        assert set(read["schedule"]) == {"cosine"}

    def test_counts_the_shapes_where_n_is_missing(self, table, write):
        read = external.load_table(write(table.drop(columns="params_non_embedding")))
        norms = (2 * table["n_layers"] + 1) * table["d_model"]
        np.testing.assert_allclose(read["params_non_embedding"], table["params_non_embedding"] + norms)

    @pytest.mark.parametrize(("units", "there"), [("bits", lambda x: x / np.log(2)), ("perplexity", np.exp)])
    def test_other_units_become_nats(self, table, write, units, there):
        path = write(table.assign(loss=there(table["loss"]), loss_sem=0.01))
        read = external.load_table(path, units=units)
        np.testing.assert_allclose(read["loss"], table["loss"])
        sem = 0.01 * np.log(2) if units == "bits" else 0.01 / np.exp(table["loss"])  # d ln P = dP / P
        np.testing.assert_allclose(read["loss_sem"].to_numpy(float), np.broadcast_to(sem, len(table)))

    def test_the_papers_points(self, write):
        read = external.load_table(write(presets.paper_losses()))
        assert fit_by_heads(read)[Heads(8, 1)].solve(2.615) == pytest.approx(presets.load("paper")[8, 1].solve(2.615), rel=1e-9)


def change(**values):
    return lambda table: table.assign(**{k: v(table) if callable(v) else v for k, v in values.items()})


REFUSED = {
    "perplexities": (
        change(loss=lambda t: np.exp(t["loss"])),
        r"42 of 42 losses are above ln\(vocab_size\) = 10.826.*--units perplexity",
    ),
    "perplexities without a vocabulary": (
        lambda t: t.drop(columns="vocab_size").assign(loss=np.exp(t["loss"])),
        r"half of the losses are above 6.5.*exp\(loss\).*--units perplexity",
    ),
    "millions": (change(params_non_embedding=lambda t: t["params_non_embedding"] / 1e6), "it is in millions; multiply"),
    "billions": (change(params_non_embedding=lambda t: t["params_non_embedding"] / 1e9), "it is in billions; multiply"),
    "millions without shapes": (
        lambda t: t.assign(params_non_embedding=t["params_non_embedding"] / 1e6).drop(columns=["n_layers", "d_model"]),
        "is it in millions, or billions",
    ),
    "embeddings": (
        change(params_non_embedding=lambda t: t["params_non_embedding"] + 50_304 * t["d_model"]),
        "it counts embeddings; N of the laws is without them",
    ),
    "another shape": (change(params_non_embedding=lambda t: 2.5 * t["params_non_embedding"]), "42 of 42 rows differ by"),
    "more key/value heads": (change(n_kv_heads=16), "n_kv_heads = 16 of heads .8,16.*: more than n_heads"),
    "groups that are uneven": (change(n_heads=8, n_kv_heads=3), "n_kv_heads = 3 .*: must divide n_heads"),
    "half a head": (change(n_heads=7.5), "row 1: n_heads = '7.5' must be a whole number, or empty"),
    "words": (change(loss=lambda t: t["loss"].astype(str).where(t.index > 0, "n/a?")), "loss = 'n/a.' must be a number"),
    "negative losses": (change(loss=lambda t: -t["loss"]), "losses are above 0"),
    "zero losses": (change(loss=lambda t: t["loss"].where(t.index > 0, 0.0)), "losses are above 0"),
    "no column": (lambda t: t.rename(columns={"loss": "val_loss"}), "no column loss .did you mean 'val_loss'"),
    "no context": (lambda t: t.rename(columns={"context": "contexts"}), "did you mean 'contexts'.*--context_trained"),
    "no size": (lambda t: t.drop(columns=["params_non_embedding", "n_layers"]), "lacks n_layers"),
    "no rows": (lambda t: t[:0], "has no rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_is_refused(table, write, name):
    make, text = REFUSED[name]
    with pytest.raises(ConfigError, match=text):
        external.load_table(write(make(table)))


NO_LAW = {
    "constant losses": (change(loss=3.0), "do not fall with size"),
    "rising losses": (change(loss=lambda t: 6 - t["loss"]), "do not fall with size"),
    "two sizes": (lambda t: t[t["d_model"] < 1024], "2 sizes? ha.* finished, a law needs 3"),
    "duplicates without a seed": (lambda t: pd.concat([t, t[:1]]), "have no seed: add a column seed"),
    "one seed twice": (lambda t: pd.concat([t, t[:1]]).assign(seed=0), "have seed 0: they are one run"),
    "a mixture of rules": (change(rules=lambda t: np.where(t.index % 2, "a", "b")), "runs under 2 rules"),
    "vocabularies": (change(vocab_size=lambda t: np.where(t.index % 2, 32_000, 50_304)), "runs of several vocab_size"),
    "data": (change(data_fingerprint=lambda t: np.where(t.index % 2, "x", "y")), "runs of several data_fingerprint"),
}


@pytest.mark.parametrize("name", NO_LAW)
def test_what_has_no_law_is_refused(table, write, name):
    make, text = NO_LAW[name]
    read = external.load_table(write(make(table)))
    with pytest.raises(ValueError, match=text):
        fit_by_heads(read)


def test_losses_that_are_missing_are_left_out_and_said(table, write):
    read = external.load_table(write(table.assign(loss=table["loss"].where(table.index > 0))))
    assert any("1 of 42 runs left out: their loss is no number" in text for text in fit_by_heads(read).warnings)


def test_arguments_are_checked(table, write):
    path = write(table)
    with pytest.raises(ConfigError, match="columns: 'n_head' is no column of a loss table: did you mean 'n_heads'"):
        external.load_table(path, {"n_head": "H"})
    with pytest.raises(ConfigError, match="has no column 'los': did you mean 'loss'"):
        external.load_table(path, {"loss": "los"})
    with pytest.raises(ConfigError, match="units = 'bit': did you mean 'bits'"):
        external.load_table(path, units="bit")
    with pytest.raises(ConfigError, match="has a column context"):
        external.load_table(path, context=1024)
    with pytest.raises(ConfigError, match="is not there"):
        external.load_table("other.csv")
    with pytest.raises(ConfigError, match=r"a table of runs is a .csv or .parquet file"):
        external.load_table("runs.txt")
    with open("torn.parquet", "wb") as file:
        file.write(b"PAR1")
    with pytest.raises(ConfigError, match="can't be read as a table"):
        external.load_table("torn.parquet")


def ladder(group, width=lambda d: d / 64):
    """Runs whose query heads fill the width, with a key/value head for every `group`."""
    rows = []
    for layers, d in law_tables.SIZES[1:7]:
        n_heads = int(width(d))
        n = layers * (8 * d * d + 128 * d * (n_heads + n_heads // group))
        rows.append(
            {"n_heads": n_heads, "n_kv_heads": n_heads // group, "n_layers": layers, "d_model": d, "head_dim": 64,
             "params_non_embedding": n, "tokens": 240 * layers * d * d, "context": 8192,
             "loss": 1.95 + 0.75 * (n / 1e9) ** -0.175 - 0.002 * group}
        )  # fmt: skip
    return pd.DataFrame(rows)


class TestHeadRules:
    def test_a_ladder_is_taken_as_its_rule_and_said(self, write):
        read = external.load_table(write(ladder(1)))
        laws = fit_by_heads(read)
        assert [*laws] == [MHA]
        assert str(MHA) == "(d/d_h,d/d_h)"
        assert laws[MHA].b == pytest.approx(0.175, rel=1e-3)
        assert "heads grow with the width: the 6 runs are taken as those of (d/d_h,d/d_h)" in laws.warnings

    def test_ladders_of_several_rules_are_candidates(self, write):
        table = pd.concat([ladder(1), ladder(4)])
        laws = fit_by_heads(external.load_table(write(table)))
        assert [*laws] == [Heads(None, -4), MHA]
        assert [str(heads) for heads in laws] == ["(d/d_h,n_h/4)", "(d/d_h,d/d_h)"]
        answer = optimum.search(laws, 2.7, 131_072)
        assert answer.heads == Heads(None, -4)  # at 128K a quarter of the cache is worth more than 0.006 nats
        built = answer.buildable.iloc[0]
        assert built["n_heads"] * 64 == built["d_model"]
        assert built["n_kv_heads"] * 4 == built["n_heads"]
        assert json.loads(json.dumps(answer.to_dict()))["n_kv_heads"] == -4

    def test_heads_of_which_some_have_no_law_as_a_rule_stay_as_they_are(self):
        rows = pd.concat([ladder(1), ladder(4).iloc[:1]], ignore_index=True)
        found, said = runs.by_rule(rows)
        pd.testing.assert_frame_equal(found, rows)
        assert said == []

    def test_fixed_key_value_heads(self, write):
        table = ladder(1).assign(n_kv_heads=4)
        d = table["d_model"]
        table["params_non_embedding"] = table["n_layers"] * d * (8 * d + 128 * (table["n_heads"] + 4))
        assert [*fit_by_heads(external.load_table(write(table)))] == [Heads(None, 4)]

    @pytest.mark.parametrize(("rule", "heads"), [("mha", MHA), ("group:4", Heads(None, -4))])
    def test_rules_that_are_said(self, write, rule, heads):
        own = ladder(-heads.n_kv_heads)
        said = external.load_table(write(own.drop(columns=["n_heads", "n_kv_heads", "params_non_embedding"])), heads_rule=rule)
        column = external.load_table(write(own.assign(heads_rule=rule)))
        assert [*fit_by_heads(said)] == [*fit_by_heads(column)] == [heads]
        norms = (2 * own["n_layers"] + 1) * own["d_model"]
        np.testing.assert_allclose(said["params_non_embedding"], own["params_non_embedding"] + norms)

    def test_fixed_heads_with_sizes_enough_stay_as_they_are(self, table):
        assert Heads(8, 1) in fit_by_heads(table)

    def test_what_does_not_follow_is_refused(self, write):
        with pytest.raises(ConfigError, match=r"n_kv_heads = 2 at d_model 512, head_dim 64 is not that of"):
            external.load_table(write(ladder(4)), heads_rule="mha")
        with pytest.raises(ConfigError, match="heads rule 'gqa': use mha, group:G"):
            external.load_table(write(ladder(4)), heads_rule="gqa")
        with pytest.raises(ConfigError, match="need head_dim of every run"):
            external.load_table(write(ladder(4).drop(columns="head_dim")), heads_rule="group:4")
        with pytest.raises(ConfigError, match="has a column heads_rule"):
            external.load_table(write(ladder(4).assign(heads_rule="group:4")), heads_rule="group:4")

    @pytest.mark.parametrize("heads", [MHA, Heads(None, -4), Heads(None, 8), Heads(8, 1)])
    @pytest.mark.parametrize("convention", ["figures", "exact"])
    def test_shapes_have_the_parameters_that_were_asked_for(self, heads, convention):
        n = np.array([1e8, 3e9, np.inf])
        shape = costs.solve_shape(n, heads, lambda n: 64.0, convention=convention)
        np.testing.assert_allclose(costs.count_params(shape, convention).non_embedding[:2], n[:2], rtol=1e-12)
        np.testing.assert_allclose(shape.n_kv_heads * np.ones(3), heads.kv_heads(shape.d_model, 64) * np.ones(3))

    def test_the_screen_names_them(self, write, capsys):
        path = write(pd.concat([ladder(1), ladder(4)]))
        assert main(["optimum", path, "--context", "128K", "--loss", "2.7", "--draws", "100"]) == 0
        text = capsys.readouterr().out
        assert text.startswith("(d/d_h,n_h/4), a query head per 64 of the width and a key/value head for every 4 of them")
        assert "(d/d_h,d/d_h)" in text
        assert main(["fit", path]) == 0
        assert "(d/d_h,n_h/4)" in capsys.readouterr().out
        assert main(["report", path]) == 0


class TestCommands:
    def test_fit_and_optimum(self, table, write, capsys):
        other = bare(table).rename(columns={"n_heads": "H", "loss": "ppl"}).assign(ppl=np.exp(table["loss"]))
        about = [write(other), "--columns", "n_heads=H,loss=ppl", "--units", "perplexity", "--context_trained", "8K"]
        assert main(["fit", *about, "--format", "json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert rows[0]["b"] == pytest.approx(fit_by_heads(table)[1, 1].b, rel=1e-9)
        assert main(["optimum", *about, "--context", "128K", "--loss", "2.7", "--draws", "0", "--format", "json"]) == 0
        assert json.loads(capsys.readouterr().out)["source"] == "runs"

    def test_export_writes_beside_the_table(self, table, write, tmp_path, capsys):
        assert main(["export", write(table)]) == 0
        assert "tables in runs-report/tables" in " ".join(capsys.readouterr().out.split())
        assert len(pd.read_csv(tmp_path / "runs-report" / "tables" / "loss.csv")) == 42
        assert len(pd.read_csv(tmp_path / "runs-report" / "tables" / "fits.csv")) == 7

    @pytest.mark.parametrize("command", ["run", "status", "plan", "logs", "cancel", "retry", "next"])
    def test_what_trains_refuses_a_table(self, table, write, command, capsys):
        options = ["--context", "1K", "--loss", "2.7", "--budget", "1e20"] if command == "next" else []
        assert main([command, write(table), *options]) == 2
        assert "it is a table of runs, not a grid" in capsys.readouterr().err

    def test_options_of_the_other_kind_are_refused(self, table, write, capsys):
        assert main(["fit", write(table), "--rules", "new"]) == 2
        assert "--rules is for grids" in capsys.readouterr().err
        assert main(["fit", "--preset", "paper", "--units", "bits"]) == 2
        assert "--units is for a table of runs" in capsys.readouterr().err
        assert main(["fit", "runs.csv", "--columns", "loss"]) == 2
        assert "'loss' is no pair" in capsys.readouterr().err
        assert main(["fit", "runs.csv", "--columns", "loss=a,loss=b"]) == 2
        assert "named twice" in capsys.readouterr().err

    def test_without_shapes_there_are_laws_and_answers(self, table, write, tmp_path, capsys):
        few = table[["n_heads", "n_kv_heads", "params_non_embedding", "loss", "context"]]
        assert main(["report", write(few)]) == 0
        assert "no picture 'Loss against the cost of serving'" in " ".join(capsys.readouterr().err.split())
        assert main(["export", "runs.csv"]) == 0
        assert (tmp_path / "runs-report" / "figures" / "loss-params-t8192.png").exists()
