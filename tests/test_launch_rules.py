"""Grids that the first version began, under today's code: their cells are found, offered and never lost."""

import csv
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest

from gqa_jax import differences, results, storage
from gqa_jax.config import ConfigError, TrainConfig
from gqa_jax.data import catalog, store
from gqa_jax.training import evaluation
from gqa_jax.training.metrics import write_json
from launch import __main__ as launch
from launch import grid, grid_cells, rules, state, studies
from launch import watch as watching
from launch.cells import Layout
from launch.executors import local
from tests import first_version, goldens, grid_fakes
from tests.test_grid import two_phases

pytestmark = pytest.mark.usefixtures("small_map")  # of reports

SIX = ["s16d-t32-h1-1-34ba6ee4", "s16d-t32-h2-1-b23d6eeb", "s32d-t32-h1-1-75081e82", "s32d-t32-h2-1-fb30b484",
       "s64d-t32-h1-1-c7320417", "s64d-t32-h2-1-b6dfcedd"]  # fmt: skip
TEXT = {"rules": "hash/spread/one", "heldout": "1f2e3d4c5b6a/spread/1024", "eval_documents": 11, "heldout_documents": 12,
        "heldout_tokens": 500_000}  # fmt: skip

OWN = """
import runpy
from launch.grid import Grid

def get_grid():
    return Grid("own", [runpy.run_path("config.py")["get_config"]()], [1024])
"""  # of tests/first_version.py


def finish_old(cell, layout):
    """What the first version left: a configuration without the fields of today, a store by its name of then."""
    grid_fakes.finish(cell, layout)
    values = cell.config.to_dict()
    del values["evaluation"]["windows"], values["optimizer"]["warmup_from"]
    values["data"]["store"] = values["data"]["store"].removesuffix("@position")
    write_json(layout.cell(cell.name) / "config.json", values)


def finish_new(cell, layout):
    grid_fakes.finish(cell, layout)
    path = layout.cell(cell.name) / "result.json"
    write_json(path, json.loads(path.read_text()) | TEXT)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The small grid, as the first version finished it: its folder; with the grid file and nothing else in the folder above."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(grid_fakes.GRID_FILE)
    layout = Layout(tmp_path / "runs" / "small")
    for cell in old_cells():
        finish_old(cell, layout)
    write_json(layout.root / "grid.json", {"name": "small", "contexts_served": [1024, 8192], "losses": [],
                                           "convention": "figures", "cells": SIX})  # fmt: skip
    return layout


def old_cells():
    return grid.cells(grid.under_old_rules(grid_fakes.small_grid()))


def new_cells():
    return grid.cells(grid_fakes.small_grid())


def run(*argv):
    return launch.main([argv[0], "small.py", *argv[1:]])


def files(layout):
    """Every file of a folder with its content."""
    return {path: path.read_bytes() for path in sorted(layout.root.rglob("*")) if path.is_file()}


def rows_of(layout, name="loss"):
    with (layout.tables / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("count", "finished"), [(1, 1), (2, 2), (3, 1)])
def test_cells_under_other_rules_are_counted_and_two_are_named(tmp_path, count, finished):
    others = grid.cells(grid.load(first_version.QUICKSTART))[:count]
    first, *_ = names = [cell.name for cell in others]
    said = rules.Choice(None, [], rules.NEW, False, others, finished, [], []).said(Layout(tmp_path))
    cells, ended = {
        1: ("1 cell", f"(finished): {first}"),
        2: ("2 cells", f"(finished): {', '.join(names)}"),
        3: ("3 cells", f"(1 finished, others begun): {', '.join(names[:2])} and 1 more"),
    }[count]
    assert said == f"{tmp_path} holds {cells} of this grid under the rules of the first version {ended}"


class TestNames:
    def test_a_finished_quickstart_of_the_first_version_has_them(self, tmp_path):
        kept = json.loads((goldens.finished(tmp_path, goldens.FIRST_VERSION) / "grid.json").read_text())["cells"]
        whole = grid.load(first_version.QUICKSTART)
        assert [cell.name for cell in grid.cells(grid.under_old_rules(whole))] == kept
        assert not {cell.name for cell in grid.cells(whole)} & set(kept)

    def test_of_phases_that_continue_others(self):
        """As the code of commit d20645f named them."""
        old = grid.cells(grid.under_old_rules(two_phases()))
        names = ["s16d-t32-h2-1-b23d6eeb", "s16d-t64-h2-1-d7cac933", "s16d-t64-h2-1-1e74d345"]
        assert [cell.name for cell in old] == names
        assert [cell.parent for cell in old] == [None, *names[:2]]
        whole = grid.load("configs/grids/long_context.py")
        assert [cell.name for cell in grid.cells(grid.under_old_rules(whole))] == [
            "s1p2b-t4096-h32-8-2ca24970", "s1p8b-t4096-h8-1-2d5700fe", "s1p2b-t131072-h32-8-7e0b1236",
            "s1p8b-t131072-h8-1-497defc7",
        ]  # fmt: skip

    def test_asking_twice_changes_nothing(self):
        once = grid.under_old_rules(two_phases())
        assert grid.under_old_rules(once).configs == once.configs
        assert [cell.name for cell in old_cells()] == SIX

    def test_a_phase_that_continues_nothing_of_the_grid_is_refused_as_ever(self):
        alone = two_phases()
        alone.configs.pop()
        with pytest.raises(ConfigError, match="is no cell of this grid"):
            grid.cells(grid.under_old_rules(alone))

    def test_a_part_of_a_grid_takes_names_of_both(self, root):
        new = new_cells()[0].name
        some = grid.part("small.py", [SIX[3], new], {SIX[0]: [7]})
        assert {cell.name for cell in grid.cells(some)} >= {SIX[3], new}
        (seventh,) = [cell for cell in grid.cells(some) if cell.config.seed == 7]
        assert seventh.config.evaluation.windows == "first"
        with pytest.raises(ConfigError, match=r"has no cell s16d-t32-h1-1-00000000 \(any more\)"):
            grid.part("small.py", ["s16d-t32-h1-1-00000000"])


def test_a_stored_configuration_means_the_store_of_its_time():
    values = old_cells()[0].config.to_dict()
    del values["evaluation"]["windows"], values["optimizer"]["warmup_from"]
    for name in ("sotu-bytes", "sotu-gpt2"):
        values["data"]["store"] = name
        assert TrainConfig.from_stored(values).data.store == f"{name}@position"
        assert f"{name}@position" in catalog.BUILT_IN
    values["data"]["store"] = "stores/own"
    assert TrainConfig.from_stored(values).data.store == "stores/own"
    today = new_cells()[0].config.to_dict()
    assert TrainConfig.from_stored(today).data.store == "sotu-bytes"


def test_folders_of_the_first_version_are_done_and_not_edited(root, tmp_path):
    states = state.of_all(old_cells(), root, 0.0, {})
    assert [now.state for now in states] == ["done"] * 6
    kept = Layout(goldens.finished(tmp_path, goldens.FIRST_VERSION))
    cells = grid.cells(grid.under_old_rules(grid.load(first_version.QUICKSTART)))
    assert [now.state for now in state.of_all(cells, kept, 0.0, {})] == ["done"] * 18


def test_a_run_of_the_first_version_is_a_cell_of_its_grid(tmp_path, monkeypatch):
    """The configuration, store and run folder that the code of that commit made."""
    monkeypatch.chdir(first_version.unpack(tmp_path))
    (tmp_path / "own.py").write_text(OWN)
    (cell,) = grid.cells(grid.under_old_rules(grid.load("own.py")))
    assert cell.data_fingerprint == first_version.FINGERPRINT
    layout = Layout(tmp_path / "root")
    layout.cell("").mkdir(parents=True)
    (tmp_path / "run").rename(layout.cell(cell.name))
    (now,) = state.of_all([cell], layout, 0.0, {})
    assert (now.state, now.loss) == ("done", first_version.LOSS)
    found = rules.choose(grid.load("own.py"), layout, None)
    assert ([one.name for one in found.others], found.finished) == ([cell.name], 1)


class TestRun:
    @pytest.mark.parametrize("more", [(), ("--dry_run",), ("--where", "size=16d")])
    def test_refuses_before_anything_is_written_and_says_what_can_be_done(self, root, capsys, more):
        before = files(root)
        assert run("run", *more) == launch.EXIT_BAD_INPUT
        said = capsys.readouterr().err
        assert (
            f"holds 6 cells of this grid under the rules of the first version (finished): {SIX[0]}, {SIX[1]} and 4 more" in said
        )
        for words in ("held out by a hash", "--rules old goes on with them", "--rules new trains the grid", "another --root"):
            assert words in said
        assert files(root) == before

    def test_with_the_old_rules_goes_on_and_trains_nothing_again(self, root, capsys, monkeypatch):
        monkeypatch.setattr(local, "_start", lambda *_: pytest.fail("a finished cell was started"))
        assert run("run", "--rules", "old") == launch.EXIT_DONE
        assert "6 cells, 0 to train" in capsys.readouterr().out
        assert {path.name for path in (root.root / "cells").iterdir()} == set(SIX)
        assert {row["cell"] for row in rows_of(root)} == set(SIX)
        assert {row["rules"] for row in rows_of(root)} == {rules.FIRST}
        assert "old_cells" not in results.grid_facts(root.root)

    def test_with_the_new_rules_keeps_the_old_ones_in_the_tables(self, root, capsys, monkeypatch):
        monkeypatch.setattr(local, "_start", lambda *_: pytest.fail("a finished cell was started"))
        for cell in new_cells():
            finish_new(cell, root)
        assert run("run", "--rules", "new") == launch.EXIT_DONE
        out = capsys.readouterr().out
        assert "under the rules of the first version (finished)" in out
        assert "they stay as they are, and in the tables" in out
        facts = results.grid_facts(root.root)
        assert (facts["cells"], facts["old_cells"]) == ([cell.name for cell in new_cells()], SIX)
        assert len(rows_of(root)) == 12
        assert len(rows_of(root, "cost")) == 12 * 2 * 3
        assert {row["rules"] for row in rows_of(root, "evaluations")} == {rules.FIRST, TEXT["rules"]}
        fits = rows_of(root, "fits")
        assert [row["points"] for row in fits] == ["3", "3"]
        assert all("held-out text in common" in row["warnings"] and "by 11 documents" in row["warnings"] for row in fits)
        assert "runs under other rules: 6, in the tables and in no law" in out
        # And back again: now those of today are the others.
        assert run("run", "--rules", "old") == launch.EXIT_DONE
        facts = results.grid_facts(root.root)
        assert (facts["cells"], facts["old_cells"]) == (SIX, [cell.name for cell in new_cells()])
        assert len(rows_of(root)) == 12

    def test_with_the_new_rules_finished_old_cells_are_in_the_first_grid_json(self, root, monkeypatch):
        """Before a cell has ended, so that nothing is lost when the launcher is killed."""
        monkeypatch.setattr(watching, "repeat", lambda *_, **__: pytest.fail("stop here"))
        with pytest.raises(pytest.fail.Exception):
            run("run", "--rules", "new")
        assert results.grid_facts(root.root)["old_cells"] == SIX
        assert set(results.load_results(root.root)["cell"]) == set(SIX)

    def test_cells_that_have_only_begun_are_offered_and_planned_ones_are_not_in_the_way(self, root, capsys):
        for name in SIX[1:]:
            for path in root.cell(name).iterdir():
                if path.name != "config.json":
                    path.unlink()
        (root.cell(SIX[0]) / "result.json").rename(root.cell(SIX[0]) / "heartbeat.json")
        assert run("run") == launch.EXIT_BAD_INPUT
        assert f"holds 1 cell of this grid under the rules of the first version (0 finished, others begun): {SIX[0]}." in (
            capsys.readouterr().err
        )
        (root.cell(SIX[0]) / "heartbeat.json").unlink()
        assert run("run", "--dry_run") == launch.EXIT_DONE
        assert "6 of 6 cells would be submitted" in capsys.readouterr().out

    def test_another_root_is_free(self, root, capsys):
        assert run("run", "--dry_run", "--root", "other") == launch.EXIT_DONE
        assert "6 of 6 cells would be submitted" in capsys.readouterr().out

    def test_a_store_that_the_first_version_did_not_make_has_no_old_rules(self, root, capsys, monkeypatch):
        monkeypatch.setattr(store.TokenStore, "holdout_rule", property(lambda self: "hash"))
        assert run("run", "--rules", "old") == launch.EXIT_BAD_INPUT
        assert "are held out by hash, under the old rules they are by position" in capsys.readouterr().err


class TestOthers:
    def test_a_root_of_the_old_rules_alone_is_shown_as_it_is(self, root, capsys):
        assert run("status", "--json") == launch.EXIT_DONE
        said = capsys.readouterr()
        assert [row["cell"] for row in json.loads(said.out)] == SIX
        assert "6 cells of this grid under the rules of the first version" in said.err
        assert "these are shown (as with --rules old); --rules new takes the grid under today's rules" in said.err
        assert run("status", "--json", "--rules", "new") == launch.EXIT_UNFINISHED
        assert [row["cell"] for row in json.loads(capsys.readouterr().out)] == [cell.name for cell in new_cells()]
        assert run("plan", "--format", "csv") == launch.EXIT_DONE
        assert SIX[5] in capsys.readouterr().out
        assert run("logs", SIX[2]) == launch.EXIT_BAD_INPUT
        assert f"{SIX[2]} has printed nothing yet: it is done" in capsys.readouterr().err
        assert run("cancel", "--rules", "old") == launch.EXIT_DONE
        assert run("retry", SIX[0]) == launch.EXIT_BAD_INPUT
        assert f"{SIX[0]} is done" in capsys.readouterr().err

    def test_beside_begun_cells_of_today_they_are_named(self, root, capsys):
        finish_new(new_cells()[0], root)
        assert run("status", "--json") == launch.EXIT_UNFINISHED
        said = capsys.readouterr()
        assert [row["cell"] for row in json.loads(said.out)] == [cell.name for cell in new_cells()]
        assert "--rules old takes these" in said.err
        assert run("status") == launch.EXIT_UNFINISHED
        assert "are of no cell" not in capsys.readouterr().out

    def test_commands_that_are_offered_are_about_the_same_cells(self, root, capsys):
        write_json(root.cell(SIX[0]) / "result.json", {"status": "diverged", "loss": None, "step": 2, "identity": "x"})
        assert run("status", "--rules", "old") == launch.EXIT_FAILED
        assert "python -m launch retry small.py --rules old, then run" in capsys.readouterr().out
        assert run("retry", "--rules", "old") == launch.EXIT_DONE
        assert "python -m launch run small.py --rules old" in capsys.readouterr().out

    def test_commands_that_are_offered_on_a_root_of_old_cells_say_so(self, root, capsys):
        """What `status` and `retry` print is followed: `run` would refuse it without the rules."""
        folder = root.cell(SIX[0])
        write_json(folder / "exit.json", {"code": 1, "class": "error", "reason": "it broke", "time": 1.0})
        (folder / "result.json").unlink()
        assert run("status") == launch.EXIT_FAILED
        assert "python -m launch retry small.py --rules old" in " ".join(capsys.readouterr().out.split())
        assert run("status", "--root", os.fspath(root.root)) == launch.EXIT_FAILED
        said = "".join(capsys.readouterr().out.split())
        assert f"launchretrysmall.py--root{root.root}--rulesold,thenrun" in said
        assert run("retry") == launch.EXIT_DONE
        assert "1 cell can run again: python -m launch run small.py --rules old\n" in capsys.readouterr().out
        write_json(folder / "exit.json", {"code": 1, "class": "error", "reason": "it broke", "time": 2.0})
        assert run("retry", "--rules", "old") == launch.EXIT_DONE
        assert "1 cell can run again: python -m launch run small.py --rules old\n" in capsys.readouterr().out
        assert run("run", "--rules", "old", "--dry_run", "--on", "local") == launch.EXIT_DONE
        assert SIX[0] in capsys.readouterr().out

    def test_another_grid_file_over_the_root_takes_no_finished_run_away(self, root, tmp_path, capsys):
        """Of fewer cells, under the old rules themselves, as `next --rules old` writes; cells of both rules have finished."""
        for cell in new_cells():
            finish_new(cell, root)
        write_json(root.root / "grid.json", grid_cells.facts(grid_fakes.small_grid(), new_cells(), SIX))
        before = results.load_results(root.root)
        assert before["rules"].value_counts().to_dict() == {"hash/spread/one": 6, "position/first/zero": 6}
        part = grid.under_old_rules(grid_fakes.small_grid())
        text = "from launch import grid\nfrom tests import grid_fakes\n\n\ndef get_grid():\n"
        text += "    return grid.under_old_rules(grid_fakes.small_grid())\n"
        (tmp_path / "part.py").write_text(text)
        assert len(part.configs) == 6
        for options in ([], ["--rules", "old"]):
            said = launch.main(["export", "part.py", "--root", os.fspath(root.root), *options])
            assert said == launch.EXIT_DONE
            assert set(results.load_results(root.root)["cell"]) == set(before["cell"])
            said = capsys.readouterr().out
            assert "6 finished runs in" in said
            assert "under other rules: they stay in the tables, like s16d-t32" in said
            assert "it was changed since" not in said

    def test_folders_of_no_cell_are_said_by_export(self, root, capsys):
        finish_old(grid.cells(grid.under_old_rules(grid.Grid("g", [grid_fakes.config(size=128)], [1024])))[0], root)
        assert run("export") == launch.EXIT_DONE
        assert "1 folders in" in (out := capsys.readouterr().out)
        assert "and in no table, like s128d-t32-h2-1-" in out


class TestExport:
    def test_of_the_old_rules_alone_has_tables_and_laws(self, root, capsys):
        assert run("export") == launch.EXIT_DONE
        out = capsys.readouterr().out
        assert out.count(rules.SAID[:60]) == 1
        assert "Cheapest heads" in out
        assert {row["cell"] for row in rows_of(root)} == set(SIX)
        assert {path.name for path in (root.root / "cells").iterdir()} == set(SIX)

    def test_of_both_has_all_rows_and_no_laws_until_rules_are_chosen(self, root, capsys):
        for cell in new_cells():
            finish_new(cell, root)
        assert run("export") == launch.EXIT_DONE
        out = capsys.readouterr().out
        assert f"no laws: runs under 2 rules (hash/spread/one: 6 runs, {rules.FIRST}: 6 runs)" in out
        assert "Cheapest heads" not in out
        assert "under hash/spread/one" in out
        assert f"under {rules.FIRST}" in out
        assert len(rows_of(root)) == 12
        assert not (root.tables / "fits.csv").exists()
        for asked, words in (("new", "over 11 of 12 documents, common to all runs"), ("old", f"under {rules.FIRST}")):
            assert run("export", "--rules", asked) == launch.EXIT_DONE
            out = capsys.readouterr().out
            assert "Cheapest heads" in out
            assert words in " ".join(out.split())
            assert len(rows_of(root)) == 12
        assert run("export") == launch.EXIT_DONE
        assert "fits.csv and optimum.csv are of an earlier export" in capsys.readouterr().out

    def test_a_run_of_other_rules_that_diverged_is_no_mixture(self, root, capsys):
        grid_fakes.finish(new_cells()[0], root, "diverged")
        path = root.cell(new_cells()[0].name) / "result.json"
        write_json(path, json.loads(path.read_text()) | TEXT)
        assert run("export") == launch.EXIT_DONE
        out = capsys.readouterr().out
        assert "Cheapest heads" in out
        assert rules.SAID[:60] in out
        assert len(rows_of(root)) == 7

    def test_rules_under_which_nothing_has_finished_are_refused_before_anything_is_written(self, root, capsys):
        before = files(root)
        assert run("export", "--rules", "new") == launch.EXIT_BAD_INPUT
        assert "no cell of small has finished" in capsys.readouterr().err
        assert files(root) == before


class TestDocuments:
    """Losses by document of runs of one text, which is hard where it is hard for all."""

    @pytest.fixture
    def evaluated(self, root):
        """The grid of today, finished: in a folder of its own."""
        layout, generator = Layout(root.root.parent / "today"), np.random.default_rng(0)
        hard = generator.normal(0, 0.3, 11)
        for cell in new_cells():
            finish_new(cell, layout)
            path = layout.cell(cell.name) / "result.json"
            result = json.loads(path.read_text())
            loss = 100 * (result["loss"] + hard + generator.normal(0, 0.01, 11))
            count = np.full(11, 100)
            documents = evaluation.Documents(
                document=np.arange(11, dtype=np.uint64), source=np.zeros(11, np.int32), sources=np.array(["a"]), tokens=count,
                targets=np.zeros(11, np.uint64), text_bytes=count, loss=loss,
            )  # fmt: skip
            storage.write_bytes(layout.cell(cell.name) / "documents.npz", evaluation.to_bytes(documents))
            error = evaluation.estimate(loss, count).standard_error
            write_json(path, result | {"loss": float(loss.sum() / 1100), "loss_sem": error})
        write_json(layout.root / "grid.json", grid_cells.facts(grid_fakes.small_grid(), new_cells()))
        return layout

    def test_export_shows_differences_to_the_best_of_a_size_with_their_own_error(self, evaluated, capsys):
        assert run("export", "--root", str(evaluated.root)) == launch.EXIT_DONE
        out = capsys.readouterr().out
        assert "over 11 of 12 documents, common to all runs" in " ".join(out.split())
        shown = out[out.index("Above the best heads of the size") :]
        shown = shown[: shown.index("Trained at")]
        assert shown.count("best") == 4  # the title, and a run of each size
        known = rows_of(evaluated, "differences")
        for row in known:
            assert f"{float(row['difference']):+.4f} ± {float(row['standard_error']):.4f}" in shown
            assert float(row["standard_error"]) < 0.01 < 0.05 < float(rows_of(evaluated)[0]["loss_sem"])
        assert len(known) == 3
        assert {path.name for path in evaluated.tables.iterdir()} == {
            f"{name}.{kind}" for name in ("loss", "cost", "evaluations", "differences") for kind in ("csv", "parquet")
        } | {"fits.csv", "optimum.csv"}

    def test_the_report_has_them_too(self, evaluated, capsys):
        assert launch.main(["report", str(evaluated.root), *ASK]) == 0
        page = (evaluated.root / "report" / "index.html").read_text()
        assert "(± standard error over 11 of 12 documents, common to all runs)" in page
        table = (evaluated.root / "report" / "difference-t32.md").read_text()
        for row in differences.load_differences(evaluated.root).itertuples():
            assert f"{row.difference:+.4f} ± {row.standard_error:.4f}" in table
        assert table.count("best") == 4  # the title, and a run of each size
        assert "1024 tokens of 11 of 12 documents (1f2e3d4c5b6a/spread/1024)" in page

    def test_of_runs_without_them_nothing_is_shown(self, root, capsys):
        assert run("export") == launch.EXIT_DONE
        assert "Above the best" not in capsys.readouterr().out
        assert all(row["standard_error"] == "" for row in rows_of(root, "differences"))
        assert launch.main(["report", "small.py", *ASK]) == 0
        assert not (root.root / "report" / "difference-t32.md").exists()
        page = (root.root / "report" / "index.html").read_text()
        assert "1024 tokens of an unknown number of documents" in page
        assert rules.FIRST in page

    def test_a_folder_of_exported_tables_alone_has_a_report(self, evaluated, capsys):
        assert run("export", "--root", str(evaluated.root)) == launch.EXIT_DONE
        (evaluated.root / "grid.json").unlink()
        shutil.rmtree(evaluated.root / "cells")
        assert launch.main(["report", str(evaluated.root), *ASK]) == 0
        assert "common to all runs" in (evaluated.root / "report" / "index.html").read_text()


def test_what_errors_are_over_in_words():
    known = {"heldout": ["a", "a"], "eval_documents": [4, 4], "heldout_documents": [12, 12]}

    def words(**changes):
        return studies.of_documents(pd.DataFrame(known | changes))

    assert words() == "over 4 of 12 documents, common to all runs"
    assert words(heldout_documents=[None, None]) == "over 4 documents, common to all runs"
    assert (
        words(heldout=["a", "b"])
        == words(eval_documents=[4, 5])
        == ("over documents, the same for runs of the same held-out text")
    )
    assert words(heldout=[None, None]) == studies.of_documents(pd.DataFrame({"loss": [1.0]})) == ""


ASK = ("--context", "8192", "--loss", "1.9")


class TestAnswers:
    @pytest.fixture
    def both(self, root):
        for cell in new_cells():
            finish_new(cell, root)
        write_json(root.root / "grid.json", grid_cells.facts(grid_fakes.small_grid(), new_cells(), SIX))
        return root

    @pytest.mark.parametrize("which", ["small.py", "runs/small"])
    def test_a_mixture_is_refused_and_rules_choose(self, both, capsys, which):
        assert launch.main(["optimum", which, *ASK]) == launch.EXIT_BAD_INPUT
        said = capsys.readouterr().err
        assert f"runs under 2 rules (hash/spread/one: 6 runs, {rules.FIRST}: 6 runs)" in said
        assert "--rules old or --rules new" in said
        for command in (("fit", which), ("optimum", which, *ASK)):
            for asked in ("old", "new"):
                assert launch.main([*command, "--rules", asked]) == 0, command
                assert "rules of the first version" not in capsys.readouterr().err

    def test_of_old_runs_alone_it_is_said_once(self, root, capsys):
        for command in (("fit", "small.py"), ("optimum", "runs/small", *ASK)):
            assert launch.main([*command]) == 0
            assert capsys.readouterr().err.count(rules.FIRST) == 1
            assert launch.main([*command, "--rules", "old"]) == 0
            assert rules.FIRST not in capsys.readouterr().err
        assert launch.main(["optimum", "runs/small", *ASK, "--rules", "new"]) == launch.EXIT_BAD_INPUT
        assert f"--rules new: no run in runs/small is under these rules, all are under {rules.FIRST}" in capsys.readouterr().err

    def test_contexts_under_rules_of_their_own_are_a_mixture_too(self, both):
        """A law is of one context, but an answer of a grid is not."""
        loss = results.load_results(both.root)
        loss["context"] = loss["context"].where(loss["rules"] == rules.FIRST, 64)
        with pytest.raises(ValueError, match="runs under 2 rules"):
            studies.under(loss, None, both)
        assert len(studies.under(loss, "old", both)[0]) == 6

    def test_a_report_is_of_its_runs_alone(self, both, capsys):
        assert launch.main(["report", "small.py", *ASK, "--rules", "new"]) == 0
        (table,) = (both.root / "report").glob("cost-*.md")
        assert table.read_text().count(" · ") == 2 * (6 + 1)  # in the caption, and of each run
        page = (both.root / "report" / "index.html").read_text()
        assert "hash/spread/one" in page
        assert rules.FIRST not in page
        assert "1024 tokens of 11 of 12 documents (1f2e3d4c5b6a/spread/1024)" in page
        assert "over 11 of 12 documents, common to all runs" in page
        assert "python -m launch report small.py --rules new" in page
        assert "nothing here rests on them" not in page  # no cell of theirs is unfinished

    def test_presets_are_under_their_own(self, capsys):
        assert launch.main(["optimum", "--preset", "paper", *ASK, "--rules", "old"]) == launch.EXIT_BAD_INPUT
        assert "--rules old is for grids" in capsys.readouterr().err

    def test_unfinished_cells_of_a_report_are_those_of_its_rules(self, both):
        (both.cell(new_cells()[5].name) / "result.json").unlink()
        (both.cell(SIX[0]) / "result.json").unlink()
        for asked, cells in (("old", SIX), ("new", [cell.name for cell in new_cells()])):
            source = studies.of_grid("small.py", rules=asked)
            assert list(source.planned) == cells
            assert len(source.loss) == 5


def test_a_root_on_gs(root, capsys, gcs_root):
    """The same on Google Cloud Storage: found, offered, exported."""
    storage.upload(root.root, storage.path(gcs_root))
    assert run("run", "--root", gcs_root) == launch.EXIT_BAD_INPUT
    assert "holds 6 cells of this grid under the rules of the first version (finished)" in capsys.readouterr().err
    assert run("status", "--root", gcs_root, "--json") == launch.EXIT_DONE
    assert [row["cell"] for row in json.loads(capsys.readouterr().out)] == SIX
    assert run("export", "--root", gcs_root) == launch.EXIT_DONE
    assert {"evaluations.csv", "differences.csv", "loss.parquet"} <= set(storage.names(f"{gcs_root}/tables"))


def test_a_cell_that_the_first_version_began_is_trained_to_its_end(tmp_path, monkeypatch, capsys):
    """Ten of its twenty steps were done: with the old rules `run` goes on, to the loss that that version reached."""
    monkeypatch.chdir(first_version.unpack(tmp_path))
    (tmp_path / "own.py").write_text(OWN)
    (cell,) = grid.cells(grid.under_old_rules(grid.load("own.py")))
    layout = Layout(tmp_path / "root")
    layout.cell("").mkdir(parents=True)
    (tmp_path / "begun").rename(layout.cell(cell.name))
    arguments = ["own.py", "--root", str(layout.root)]
    assert launch.main(["run", *arguments]) == launch.EXIT_BAD_INPUT
    assert "(0 finished, others begun)" in capsys.readouterr().err
    assert launch.main(["run", *arguments, "--rules", "old"]) == launch.EXIT_DONE
    (row,) = results.load_results(layout.root).to_dict("records")
    assert row["loss"] == pytest.approx(first_version.LOSS, rel=1e-5)
    assert (row["rules"], row["attempts"]) == (rules.FIRST, 2)
