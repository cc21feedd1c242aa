import json

import numpy as np
import pandas as pd
import pytest

import gqa_jax
from gqa_jax import costs, differences, results, storage
from gqa_jax.training import evaluation
from gqa_jax.training.metrics import write_json
from launch import export, grid, grid_cells
from launch.cells import Layout
from tests import first_version, grid_fakes
from tests.test_grid import two_phases


@pytest.fixture
def folder(tmp_path):
    the_grid = grid_fakes.small_grid()
    cells = grid.cells(the_grid)
    layout = Layout(tmp_path)
    for i, cell in enumerate(cells):
        if i < 5:
            grid_fakes.finish(cell, layout, "diverged" if i == 4 else "done")
        else:
            layout.cell(cell.name).mkdir(parents=True)
            write_json(layout.cell(cell.name) / "config.json", cell.config.to_dict())
    write_json(tmp_path / "grid.json", grid_cells.facts(the_grid, cells))
    return tmp_path


def test_loss_table_obeys_its_schema(folder):
    table = gqa_jax.load_results(folder)
    assert list(table.columns) == [c.name for c in results.LOSS_COLUMNS]
    assert {name: str(dtype) for name, dtype in table.dtypes.items()} == {c.name: c.dtype for c in results.LOSS_COLUMNS}
    assert len(table) == 5
    assert table["continue_from"].isna().all()
    assert all(c.meaning for c in (*results.LOSS_COLUMNS, *results.COST_COLUMNS))
    assert {"cell", "size", "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "context", "params_non_embedding",
            "params_total", "tokens", "train_flops", "seed", "status", "loss", "loss_sem", "tokens_per_second", "attention",
            "device"} <= set(table.columns)  # fmt: skip


def test_a_new_column_is_one_line(folder, monkeypatch):
    """What the configuration has by its field, what result.json has by its own name; what a run lacks is empty."""
    new = (
        results.Column("window", "Int64", "", "of the evaluation", "evaluation.tokens"),
        results.Column("step", "Int64", "", "optimizer steps done"),
        results.Column("watts", "Float64", "W", "of the device"),
    )
    monkeypatch.setattr(results, "LOSS_COLUMNS", (*results.LOSS_COLUMNS, *new))
    table = gqa_jax.load_results(folder)
    assert (table["step"] == table["steps"]).all()
    assert table["window"].notna().all()
    assert table["watts"].isna().all()


def leave_out(folder, *names):
    """As when the grid was changed, and run again, since these cells were."""
    facts = storage.read_json(folder / "grid.json")
    write_json(folder / "grid.json", facts | {"cells": [name for name in facts["cells"] if name not in names]})


def test_finished_runs_that_the_grid_does_not_name_are_told_of(folder, caplog):
    *finished, unfinished = storage.read_json(folder / "grid.json")["cells"]
    (folder / "cells" / ".DS_Store").write_text("")
    leave_out(folder, unfinished)
    assert len(gqa_jax.load_results(folder)) == 5
    assert caplog.messages == []  # it is in no table in any case
    leave_out(folder, finished[1])
    assert finished[1] not in set(gqa_jax.load_results(folder)["cell"])
    for load in (gqa_jax.load_results, gqa_jax.load_costs, gqa_jax.load_evaluations, gqa_jax.load_differences):
        load(folder)
    (message,) = caplog.messages
    assert message.startswith(f"1 finished run in {folder}/cells is not of grid.json, so not in the tables: {finished[1]}. If")
    leave_out(folder, *finished[:3])
    gqa_jax.load_evaluations(folder)
    gqa_jax.load_results(folder)
    first, second = sorted(finished[:3])[:2]
    (_, message) = caplog.messages
    assert message.startswith(f"3 finished runs in {folder}/cells are not of grid.json, so not in the tables: ")
    assert f": {first}, {second} and 1 more. If" in message
    facts = storage.read_json(folder / "grid.json")
    write_json(folder / "grid.json", facts | {"old_cells": finished[:3]})
    assert len(gqa_jax.load_results(folder)) == 5
    (folder / "grid.json").unlink()
    (folder / "cells" / ".DS_Store").unlink()
    assert len(gqa_jax.load_results(folder)) == 5
    assert len(caplog.messages) == 2


def test_missing_numbers_are_empty_and_never_zero(folder):
    table = gqa_jax.load_results(folder)
    assert table["mfu"].isna().all()
    assert table["bits_per_byte"].isna().all()
    diverged = table[table["status"] == "diverged"]
    assert len(diverged) == 1
    assert diverged["loss"].isna().all()
    export.write_tables(Layout(folder), Layout(folder))
    raw = pd.read_csv(folder / "tables" / "loss.csv", dtype=str, keep_default_na=False)
    assert set(raw["mfu"]) == {""}


def test_cost_table_has_a_row_per_cell_context_and_convention(folder):
    table = gqa_jax.load_costs(folder)
    assert list(table.columns) == [c.name for c in results.COST_COLUMNS]
    assert len(table) == 6 * 2 * len(costs.CONVENTIONS)
    assert not table.isna().any().any()


def test_exported_tables_read_back_the_same(folder, tmp_path_factory):
    loss, _ = export.write_tables(Layout(folder), Layout(folder))
    cost = results.load_costs(folder)
    alone = tmp_path_factory.mktemp("alone")
    (folder / "tables").rename(alone / "tables")
    pd.testing.assert_frame_equal(gqa_jax.load_results(alone), loss)
    pd.testing.assert_frame_equal(gqa_jax.load_costs(alone), cost)
    assert len(pd.read_csv(alone / "tables" / "loss.csv")) == len(loss)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "result.json can't be read (Expecting property name"),
        ("[]", "result.json holds no JSON object: move it away"),
        ({"status": "done"}, "result.json has no loss, no step, no identity: move it away"),
        ({"status": "?", "loss": 1, "step": 1, "identity": "x"}, "result.json has status = '?': move it away"),
        ({"status": "diverged", "loss": None, "step": -1, "identity": "x"}, "result.json has step = -1: move it away"),
        ({"status": "done", "loss": "nan", "step": 1, "identity": "x"}, "result.json has loss = 'nan': move it away"),
    ],
)
def test_broken_results_are_left_out_and_named_with_the_fix(folder, content, words, caplog):
    (path, *_) = sorted(folder.glob("cells/*/result.json"))
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    before = set(gqa_jax.load_results(folder)["cell"])
    assert len(before) == 4
    assert path.parent.name not in before
    assert words in caplog.text
    assert "`python -m launch retry GRID` moves it aside" in caplog.text


def test_a_folder_without_a_grid_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no grid folder"):
        gqa_jax.load_results(tmp_path)


def test_a_grid_on_a_bucket_reads_the_same(folder, gcs_root):
    storage.upload(folder, gcs_root)
    pd.testing.assert_frame_equal(gqa_jax.load_results(gcs_root), gqa_jax.load_results(folder))
    pd.testing.assert_frame_equal(results.load_costs(gcs_root), results.load_costs(folder))
    with pytest.raises(FileNotFoundError, match=r"gs://.*/none is no grid folder"):
        gqa_jax.load_results(f"{gcs_root}/none")


def test_a_run_that_continues_another_names_it(tmp_path):
    first, second, third = cells = grid.cells(two_phases())
    for cell in cells:
        grid_fakes.finish(cell, Layout(tmp_path))
    write_json(tmp_path / "grid.json", grid_cells.facts(two_phases(), cells))
    export.write_tables(Layout(tmp_path), Layout(tmp_path))
    rows = pd.read_csv(tmp_path / "tables" / "loss.csv", dtype=str, keep_default_na=False)
    assert dict(zip(rows["cell"], rows["continue_from"], strict=True)) == {
        first.name: "", second.name: first.name, third.name: second.name,
    }  # fmt: skip


def test_a_run_that_is_no_cell_of_the_grid_any_more_stays_in_the_tables(folder):
    """grid.json names those that are done under other rules apart."""
    facts = storage.read_json(folder / "grid.json")
    *cells, last = facts["cells"]
    done = [name for name in cells if (folder / "cells" / name / "result.json").exists()]
    write_json(folder / "grid.json", facts | {"cells": [*done[1:], last]})
    assert list(gqa_jax.load_results(folder)["cell"]) == done[1:]
    write_json(folder / "grid.json", facts | {"cells": [*done[1:], last], "old_cells": [done[0], done[1]]})
    assert list(gqa_jax.load_results(folder)["cell"]) == [*done[1:], done[0]]
    assert set(gqa_jax.load_costs(folder)["cell"]) == {*done, last}
    assert set(gqa_jax.load_evaluations(folder)["cell"]) == {*done[:-1]}  # the last one diverged
    assert len(gqa_jax.load_differences(folder, [(done[0], done[2])])) == 1


@pytest.fixture
def old_folder(tmp_path):
    """A grid folder with a run of the first version."""
    first_version.unpack(tmp_path / "old")
    (tmp_path / "grid" / "cells").mkdir(parents=True)
    (tmp_path / "old" / "run").rename(tmp_path / "grid" / "cells" / "run")
    return tmp_path / "grid"


def test_a_run_of_the_first_version_is_in_the_tables_under_its_rules(old_folder, tmp_path):
    (row,) = gqa_jax.load_results(old_folder).to_dict("records")
    assert (row["loss"], row["status"]) == (first_version.LOSS, "done")
    assert row["rules"] == "position/first/zero"
    assert row["heldout"] == f"{first_version.FINGERPRINT[:12]}/first/1024"
    assert (row["eval_documents"], row["heldout_documents"]) == (2, None)
    assert row["loss_high"] - row["loss"] == pytest.approx(12.7062 * row["loss_sem"])  # one degree of freedom
    assert row["loss"] - row["loss_low"] == pytest.approx(12.7062 * row["loss_sem"])

    rows = gqa_jax.load_evaluations(old_folder)
    assert list(rows["metric"]) == ["loss", "bits_per_byte"]
    assert rows["value"].tolist() == [first_version.LOSS, row["bits_per_byte"]]
    assert rows["standard_error"].to_list() == [row["loss_sem"], pd.NA]
    assert set(zip(rows["step"], rows["context"], rows["n"], rows["n_documents"], rows["rules"], strict=True)) == {
        (20, 64, 1024, 2, "position/first/zero")
    }

    before = ["cell", "loss", "data_fingerprint", "eval_tokens"]  # of a table that the first version exported
    (tmp_path / "alone" / "tables").mkdir(parents=True)
    gqa_jax.load_results(old_folder)[before].to_parquet(tmp_path / "alone" / "tables" / "loss.parquet")
    (alone,) = gqa_jax.load_results(tmp_path / "alone").to_dict("records")
    assert (alone["rules"], alone["heldout"]) == (row["rules"], row["heldout"])


def test_what_a_result_says_of_its_rules_is_in_the_loss_table(folder):
    (path, *_) = sorted(folder.glob("cells/*/result.json"))
    said = {
        "rules": "hash/spread/one", "heldout": "abc/spread/16x64", "eval_documents": 7, "heldout_documents": 9,
        "loss_low": 1.0, "loss_high": 9.0,
    }  # fmt: skip
    write_json(path, storage.read_json(path) | said)
    table = gqa_jax.load_results(folder).set_index("cell")
    row = table.loc[path.parent.name]
    assert {name: row[name] for name in said} == said
    others = table.drop(path.parent.name)
    assert len(set(others["heldout"])) == 1  # of one store, with as many tokens
    assert others["loss_low"].isna().all()  # of how many documents is not known


def test_an_untied_model_is_said_to_be_one(folder):
    (path, *_) = sorted(folder.glob("cells/*/config.json"))
    facts = storage.read_json(path)
    facts["model"]["untied"] = True
    write_json(path, facts)
    table = gqa_jax.load_results(folder).set_index("cell")
    assert table.pop("unembedding").to_dict() == dict.fromkeys(table.index, "tied") | {path.parent.name: "untied"}


def add_evaluation(folder, name, by_document):
    """What a run leaves of its evaluation."""
    parts = (
        evaluation.Row("", "", "loss", 3.5, 0.1, 100, 4, "nats/token"),
        evaluation.Row("web", "", "loss", 3.25, None, 60, 1, "nats/token"),
    )
    result = evaluation.Evaluation(3.5, 0.1, 3.2, 3.8, None, 100, 4, parts, by_document)
    rows = evaluation.rows(result, step=4, context=32, rules="hash/spread/one")
    write_json(folder / "cells" / name / "evaluations.json", {"rows": rows})
    storage.write_bytes(folder / "cells" / name / "documents.npz", evaluation.to_bytes(by_document))


def documents(loss, hashes=(1, 2, 3, 4)):
    tokens = np.array([10, 20, 30, 40])
    return evaluation.Documents(
        document=np.array(hashes, np.uint64), source=np.zeros(4, np.int32), sources=np.array(["web"]), tokens=tokens,
        targets=np.zeros(4, np.uint64), text_bytes=tokens, loss=np.array(loss) * tokens,
    )  # fmt: skip


@pytest.fixture
def evaluated(folder):
    """The grid folder with evaluations of its four runs that are done: pairs of heads at two sizes, and one alone."""
    names = list(gqa_jax.load_results(folder).query("status == 'done'")["cell"])
    for name, more in zip(names, (0.1, 0.0, 0.02, 0.05), strict=True):
        add_evaluation(folder, name, documents([3 + more, 5 + more, 2 + 2 * more, 4 + more]))
    return folder, names


def test_long_table_of_evaluations(evaluated, caplog):
    folder, names = evaluated
    table = gqa_jax.load_evaluations(folder)
    assert {name: str(dtype) for name, dtype in table.dtypes.items()} == {c.name: c.dtype for c in results.EVALUATION_COLUMNS}
    assert list(table["cell"]) == [name for name in names for _ in range(2)]
    row = table.iloc[1].to_dict()
    assert row == {
        "cell": names[0], "step": 4, "task": "held-out", "source": "web", "context": 32, "position": "", "metric": "loss",
        "value": 3.25, "standard_error": None, "n": 60, "n_documents": 1, "unit": "nats/token", "rules": "hash/spread/one",
    }  # fmt: skip
    (folder / "cells" / names[1] / "evaluations.json").unlink()
    for content in ("{", "{}", '{"rows": [{}]}', '{"rows": [1]}'):
        (folder / "cells" / names[2] / "evaluations.json").write_text(content)
        caplog.clear()
        table = gqa_jax.load_evaluations(folder)
        assert list(table["cell"]) == [names[0], names[0], names[1], names[2], names[3], names[3]]
        assert f"{names[2]}/evaluations.json can't be read" in caplog.text
        assert names[1] not in caplog.text


def test_exported_evaluations_and_differences_read_back(evaluated):
    folder, names = evaluated
    (folder / "tables").mkdir()
    before = {name: getattr(gqa_jax, f"load_{name}")(folder) for name in ("results", "evaluations", "differences")}
    for name, table in before.items():
        file = {"results": "loss"}.get(name, name)
        table.to_parquet(folder / "tables" / f"{file}.parquet", index=False)
    pairs = [(row.cell, row.other) for row in before["differences"].itertuples()]
    asked = [pairs[0], pairs[1][::-1], (pairs[0][0], pairs[1][0])]
    of_folders = gqa_jax.load_differences(folder, asked)
    (folder / "cells").rename(folder / "away")
    (folder / "grid.json").unlink()
    pd.testing.assert_frame_equal(gqa_jax.load_evaluations(folder), before["evaluations"])
    pd.testing.assert_frame_equal(gqa_jax.load_differences(folder), before["differences"])
    of_tables = gqa_jax.load_differences(folder, asked)
    pd.testing.assert_frame_equal(of_tables[:2], of_folders[:2])
    assert of_tables["note"][2] == "not among the exported differences: needs the folders of the runs"
    assert pd.isna(of_tables["difference"][2])
    against = gqa_jax.load_differences(folder, other=pairs[0][1])
    assert list(against["cell"]) == [name for name in names if name != pairs[0][1]]
    assert against["difference"].notna().tolist() == [cell == pairs[0][0] for cell in against["cell"]]
    (folder / "tables" / "differences.parquet").unlink()  # as the first version exported
    assert gqa_jax.load_differences(folder, asked)["note"].str.startswith("not among the exported").all()
    with pytest.raises(FileNotFoundError, match=r"neither cells/ nor tables/differences\.parquet is in it"):
        gqa_jax.load_differences(folder)


def test_differences_are_with_the_best_of_a_size_unless_told(evaluated):
    folder, names = evaluated
    loss = gqa_jax.load_results(folder).set_index("cell")
    table = gqa_jax.load_differences(folder)
    assert {name: str(dtype) for name, dtype in table.dtypes.items()} == {
        c.name: c.dtype for c in differences.DIFFERENCE_COLUMNS
    }
    assert len(table) == 2  # of two sizes two runs each
    for row in table.itertuples():
        assert loss.loc[row.cell, "size"] == loss.loc[row.other, "size"]
        assert loss.loc[row.cell, "loss"] > loss.loc[row.other, "loss"]
    assert set(table["n_documents"]) == {4}
    assert set(table["tokens"]) == {100}
    assert (table["standard_error"] > 0).all()
    assert (table["low"] < table["difference"]).all()
    assert (table["difference"] < table["high"]).all()

    pair = gqa_jax.load_differences(folder, [(names[0], names[1])]).iloc[0]
    assert pair["difference"] == pytest.approx(0.1 * (10 + 20 + 60 + 40) / 100)
    assert pair["note"] == ""
    against = gqa_jax.load_differences(folder, other=names[3])
    assert list(against["cell"]) == names[:3]
    assert set(against["other"]) == {names[3]}
    with pytest.raises(ValueError, match="give pairs, or the one other"):
        gqa_jax.load_differences(folder, [(names[0], names[1])], other=names[2])
    for arguments in ({"other": names[0] + "x"}, {"pairs": [(names[0], names[0] + "x")]}):
        with pytest.raises(ValueError, match=f"has no cell '{names[0]}x': did you mean '{names[0]}'"):
            gqa_jax.load_differences(folder, **arguments)
    assert gqa_jax.load_differences(folder, []).empty


def test_runs_under_other_rules_are_not_compared_unless_asked(evaluated):
    folder, _ = evaluated
    row = gqa_jax.load_differences(folder).iloc[0]
    path = folder / "cells" / row["cell"] / "result.json"
    write_json(path, storage.read_json(path) | {"rules": "hash/spread/zero"})
    assert row["cell"] not in set(gqa_jax.load_differences(folder)["cell"])
    assert row["difference"] == gqa_jax.load_differences(folder, [(row["cell"], row["other"])])["difference"][0]


def test_missing_and_damaged_losses_by_document_are_said(evaluated):
    folder, names = evaluated
    cells = folder / "cells"
    (cells / names[0] / "documents.npz").unlink()
    (cells / names[1] / "documents.npz").write_bytes(b"PK not a file of numpy")
    add_evaluation(folder, names[2], documents([3, 5, 2, 4], hashes=(1, 2, 30, 40)))
    (unfinished,) = {path.name for path in cells.iterdir() if not (path / "result.json").exists()}
    pairs = [(names[0], names[3]), (names[3], names[1]), (names[2], names[3]), (names[3], names[3]), (unfinished, names[3])]
    table = gqa_jax.load_differences(folder, pairs)
    again = "; move its result.json away and run it again: its last checkpoint is evaluated"
    assert table["note"][0] == f"{names[0]} has no documents.npz{again}"
    assert table["note"][1].startswith(f"documents.npz of {names[1]} can't be read (")
    assert table["note"][1].endswith(again)
    assert table["note"][2] == "left out: 4 documents that are not alike in both"
    assert table["note"][3] == ""
    assert table["note"][4] == f"{unfinished} has no result yet"
    assert table["difference"].isna().tolist() == [True, True, False, False, True]
    assert table["n_documents"].tolist() == [pd.NA, pd.NA, 2, 4, pd.NA]
    add_evaluation(folder, names[2], documents([3, 5, 2, 4], hashes=(10, 20, 30, 40)))
    none = gqa_jax.load_differences(folder, [(names[2], names[3])]).iloc[0]
    assert (none["note"], none["n_documents"]) == ("not one document was evaluated alike in both", 0)
    assert pd.isna(none["difference"])
    add_evaluation(folder, names[2], documents([3, 5, 2, 4], hashes=(1, 20, 30, 40)))
    one = gqa_jax.load_differences(folder, [(names[2], names[3])]).iloc[0]
    assert one["note"] == "one document: no standard error; left out: 6 documents that are not alike in both"
    assert pd.isna(one["standard_error"])
    assert not pd.isna(one["difference"])


def test_evaluations_on_a_bucket_read_the_same(evaluated, gcs_root, caplog):
    folder, names = evaluated
    leave_out(folder, names[1])
    storage.upload(folder, gcs_root)
    pd.testing.assert_frame_equal(gqa_jax.load_evaluations(gcs_root), gqa_jax.load_evaluations(folder))
    pd.testing.assert_frame_equal(
        gqa_jax.load_differences(gcs_root, other=names[0]), gqa_jax.load_differences(folder, other=names[0])
    )
    for message, root in zip(caplog.messages, (gcs_root, folder), strict=True):
        assert message.startswith(f"1 finished run in {root}/cells is not of grid.json, so not in the tables: {names[1]}. If")


def test_columns_have_a_meaning():
    assert all(c.meaning for c in (*results.EVALUATION_COLUMNS, *differences.DIFFERENCE_COLUMNS))
