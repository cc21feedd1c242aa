"""`python -m launch fit|optimum|report`: on the paper's data and on grids whose results were made up."""

import json

import pandas as pd
import pytest

from gqa_jax import laws, results
from launch.__main__ import main
from tests import grid_fakes, test_study

pytestmark = pytest.mark.usefixtures("small_map")  # of reports

ASK = ["optimum", "--preset", "paper", "--context", "131072", "--loss", "2.615"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A finished grid: its file, and its folder."""
    monkeypatch.chdir(tmp_path)
    return grid_fakes.finished_grid(tmp_path)


def test_finished_runs_that_are_left_out_are_told_of(small, caplog):
    _, layout, cells = small
    facts = json.loads((layout.root / "grid.json").read_text())
    (layout.root / "grid.json").write_text(json.dumps(facts | {"cells": facts["cells"][1:]}))
    main(["fit", str(layout.root)])
    (message,) = caplog.messages
    assert f"not in the tables: {cells[0].name}. If" in message


class TestOptimum:
    def test_answers_from_the_papers_data(self, capsys):
        assert main([*ASK, "--aspect", "paper"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert text.startswith(
            "(8,1), 8 query heads and 1 key/value head, in 43 layers x 2403 (2.09B parameters): for a loss of"
        )
        assert (
            "29.1% less (26.1% to 31.3%) than the measured model of Llama 3's heads in 32 layers x 2048 (loss 2.6145)" in text
        )
        assert "45 losses read off Figures 1 and 2" in text
        assert "extrapolated: N* is 1.82x above the trained sizes" in text

    def test_json_has_the_fixed_names(self, capsys):
        assert main([*ASK, "--format", "json"]) == 0
        values = json.loads(capsys.readouterr().out)
        assert (values["n_heads"], values["n_kv_heads"]) == (8, 1)
        low, high = values["n_params_interval"]
        assert low < values["n_params"] < high
        assert 0.9 < values["probability"] <= 1
        assert values["cost"] > 0
        assert 0.3 < values["saving"] < 0.4
        assert len(values["candidates"]) == values["n_candidates"] == 8
        assert values["objective"]["convention"]["flops"] == "half_T"

    @pytest.mark.parametrize(
        ("options", "heads"),
        [
            (["--cost", "memory"], {(8, 1)}),
            (["--cost", "flops"], {(2, 1), (1, 1)}),
            (["--flops", "per_token"], {(8, 1)}),
            (["--cost", "latency", "--device", "h200", "--batch", "4", "--cache_dtype", "int8"], None),
            (["--cost", "price", "--device", "v5e", "--n_devices", "8"], None),
            (["--cost", "lifetime", "--served_tokens", "1e12", "--device", "v6e"], None),
            (["--fits", "h100", "--batch", "8"], {(8, 1)}),
            (["--cost", "memory", "--cache_dtype", "int8"], None),
            (["--method", "bootstrap", "--draws", "200", "--conventions"], {(8, 1)}),
        ],
    )
    def test_every_cost(self, options, heads, capsys):
        assert main([*ASK, "--format", "json", *options]) == 0
        values = json.loads(capsys.readouterr().out)
        assert values["probability"] > 0.3
        if heads:
            assert (values["n_heads"], values["n_kv_heads"]) in heads

    @pytest.mark.parametrize(
        ("argv", "said"),
        [
            (["optimum", "--context", "8K", "--loss", "2.6"], "give a GRID, or --preset paper"),
            ([*ASK, "runs/x"], "--preset paper or a GRID: not both"),
            (["optimum", "nowhere", "--context", "8K", "--loss", "2.6"], "nowhere is not there: give a grid file"),
            ([*ASK[:-1], "2.0"], r"a loss of 2 can't be reached at any size: the fitted entropy E is 2.07"),
            ([*ASK, "--cost", "latency"], "needs device"),
            ([*ASK, "--cost", "price", "--device", "h20"], "did you mean 'h200'"),
            ([*ASK, "--lam", "2"], "a weight between 0"),
            ([*ASK, "--cost", "memory", "--lam", "0.5"], "has no use for it"),
            ([*ASK, "--train_context", "1024"], "no run was trained there; there are 8192"),
            ([*ASK, "--draws", "1"], "draw 2 or more"),
            (
                [*ASK, "--fits", "v5e", "--batch", "64"],
                "no head configuration reaches a loss of 2.615 within the 15.22 GB that a server fills of each of 1 x v5e",
            ),
        ],
    )
    def test_bad_input_is_a_sentence(self, argv, said, capsys):
        assert main(argv) == 2
        assert said in capsys.readouterr().err

    def test_a_grid_by_its_file_or_its_folder(self, small, capsys):
        file, layout, _ = small
        answers = []
        for source in (str(file), str(layout.root)):
            assert main(["optimum", source, "--context", "8K", "--loss", "2.1", "--format", "json"]) == 0
            answers.append(json.loads(capsys.readouterr().out))
        assert answers[0]["cost"] == answers[1]["cost"]
        assert answers[0]["train_context"] == 32
        assert answers[0]["source"] == "small"


class TestFit:
    def test_prints_laws_checks_and_warnings(self, capsys):
        assert main(["fit", "--preset", "paper"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "(d/d_h,8)" in text
        assert "2.0704 (1.968 to 2.152)" in text
        assert "leave largest out" in text
        assert "run (d/d_h,8) at N = 80.2M" in text
        assert "profile likelihood" in text

    def test_says_which_size_would_narrow_the_intervals_where_runs_tell_of_noise(self, small, capsys):
        assert main(["fit", "--preset", "paper"]) == 0
        lines = capsys.readouterr().out.splitlines()
        (said,) = [i for i, line in enumerate(lines) if line.startswith("one more size at N = ")]
        assert "(8 runs, one of each H)" in lines[said]
        assert "the interval of N* at a loss of 2.7" in lines[said]
        assert said < next(i for i, line in enumerate(lines) if line.startswith("warning:"))
        assert main(["fit", "--preset", "paper-table4"]) == 0  # curves that were read off
        file, layout, cells = small
        for cell in cells:
            if cell.config.model.n_heads == 2:
                layout.cell(cell.name).joinpath("result.json").unlink()
        assert main(["fit", str(file)]) == 0  # as many coefficients as runs
        assert "more size" not in capsys.readouterr().out

    def test_tables_for_programs(self, small, capsys):
        file, _, _ = small
        assert main(["fit", str(file), "--format", "json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [(row["n_heads"], row["n_kv_heads"]) for row in rows] == [(1, 1), (2, 1)]
        assert main(["fit", str(file), "--entropy", "1.5", "--format", "csv"]) == 0
        assert capsys.readouterr().out.count("1.5,1.5,1.5") == 2

    def test_documents(self, small, capsys):
        file, _, _ = small
        for form, heads in (
            ("markdown", "| (2,1) |"),
            ("latex", "(2,1) & "),
            ("html", '<th scope="row"'),
            ("html", ">(2,1)</th>"),
        ):
            assert main(["fit", str(file), "--format", form]) == 0
            assert heads in capsys.readouterr().out

    def test_options_that_contradict_or_do_not_apply(self, small, capsys):
        file, _, _ = small
        assert main(["fit", str(file), "--free_entropy", "--entropy", "1"]) == 2
        assert main(["fit", "--preset", "paper", "--free_entropy"]) == 2
        assert "is for runs of your own" in capsys.readouterr().err

    def test_heads_that_lack_sizes_are_left_out_and_said(self, small, capsys):
        file, layout, cells = small
        for cell in cells:
            if cell.config.model.n_heads == 2 and cell.config.model.d_model == 64:
                layout.cell(cell.name).joinpath("result.json").unlink()
        assert main(["fit", str(file)]) == 0
        assert "heads (2,1): 2 sizes have finished, a law needs 3 or more; left out" in capsys.readouterr().out

    def test_a_grid_that_can_not_be_fitted_says_why(self, small, capsys):
        file, layout, cells = small
        for cell in cells[2:]:
            layout.cell(cell.name).joinpath("result.json").unlink()
        assert main(["fit", str(file)]) == 2
        assert "no law can be fitted: trained at 32: heads (1,1), (2,1): 1 size has finished" in capsys.readouterr().err
        for cell in cells[:2]:
            layout.cell(cell.name).joinpath("result.json").unlink()
        assert main(["fit", str(file)]) == 2
        assert "no cell of small has finished" in capsys.readouterr().err

    def test_diverged_and_unfinished_runs_are_no_points(self, small):
        _, layout, cells = small
        grid_fakes.finish(cells[0], layout, status="diverged")
        table = results.load_results(layout.root)
        assert (table["status"] == "diverged").sum() == 1
        with pytest.raises(ValueError, match="2 sizes have finished"):
            laws.fit_by_heads(table)


def test_report_of_a_grid_is_one_file(small, capsys):
    file, layout, cells = small
    layout.cell(cells[-1].name).joinpath("result.json").unlink()
    grid_fakes.finish(cells[-2], layout)
    assert main(["report", str(file), "--loss", "2.1", "--context", "8K"]) == 0
    page = (layout.root / "report" / "index.html").read_text()
    assert len(page) < 5_000_000
    assert "http://" not in page.split("<script")[0].replace("http://www.w3.org", "")
    assert cells[-1].name in page  # not finished, and said
    assert pd.notna(page.index("explorer"))
    assert list((layout.root / "report").glob("*.md"))
    assert list((layout.root / "report").glob("*.tex"))


def test_which_training_context_answers_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = test_study.trained(tmp_path / "two")
    ask = ["optimum", str(folder), "--context", "8K", "--loss", "2.2"]
    assert main(ask) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "trained at 32 tokens (their noise, " in said
    assert "the least of 2 training contexts (64: " in said
    assert main([*ask, "--train_context", "64"]) == 0
    assert "the least of" not in capsys.readouterr().out
    assert main([*ask, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["train_context"] == 32
