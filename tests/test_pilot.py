"""What noise is: the analysis of variance where it is known, the committed tables of the pilot, and what is refused."""

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks import pilot
from gqa_jax.laws import evidence
from gqa_jax.training import evaluation
from gqa_jax.training.metrics import write_json
from launch import grid, grid_cells
from launch.cells import Layout
from tests import grid_fakes

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "results" / "pilot"
HEADS, SEEDS = 3, 2000
HAND_MADE = np.array([[1.0, 2.0], [2.0, 5.0], [3.0, 5.0]])


def test_the_analysis_of_a_table_that_is_worked_out_by_hand():
    """Means of seeds 1.5, 3.5, 4.0, of heads 2, 4, of all 3: squares of seeds 2 (2.25 + .25 + 1), of all 14, of heads 6."""
    found = pilot.analyse([HAND_MADE])
    assert (found.between, found.within, found.dof_between, found.dof_within) == pytest.approx((7 / 2, 1 / 2, 2, 2))
    assert (found.shared, found.own, found.share, found.f) == pytest.approx((1.5, 0.5, 0.75, 7.0))
    assert found.p == pytest.approx(1 / 8)  # of F with 2 and 2 degrees of freedom: 1 / (1 + F)
    assert found.interval == pytest.approx(((7 / 39 - 1) / (7 / 39 + 1), (7 * 39 - 1) / (7 * 39 + 1)))
    both = pilot.analyse([HAND_MADE, HAND_MADE + 7])  # another size
    assert (both.between, both.within, both.dof_between, both.dof_within) == pytest.approx((7 / 2, 1 / 2, 4, 4))


@pytest.mark.parametrize(("shared", "own"), [(0.0, 0.01), (0.01, 0.01), (0.02, 0.005)])
def test_known_variances_are_found(shared, own):
    """One table of many seeds: within four standard errors of the truth. Many of three seeds: intervals cover as they say."""
    generator = np.random.default_rng(8)
    noise = shared * generator.normal(size=(SEEDS, 1)) + own * generator.normal(size=(SEEDS, HEADS))
    losses = 3.0 + 0.1 * np.arange(HEADS) + noise
    found = pilot.analyse([losses])
    assert found.own == pytest.approx(own**2, rel=4 * np.sqrt(2 / (SEEDS * (HEADS - 1))))
    error = np.sqrt(2 / SEEDS) * np.hypot(shared**2 + own**2 / HEADS, own**2 / HEADS / np.sqrt(HEADS - 1))
    assert found.shared == pytest.approx(shared**2, abs=4 * error)
    share = shared**2 / (shared**2 + own**2)
    assert found.interval[0] < share < found.interval[1]
    assert found.interval[1] - found.interval[0] < 0.1
    small = [pilot.analyse([losses[i : i + 3]]) for i in range(0, SEEDS - 2, 3)]
    covered = np.mean([one.interval[0] <= share <= one.interval[1] for one in small])
    assert covered == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / len(small)))
    if not shared:
        alarms = np.mean([one.p < 0.05 for one in small])
        assert alarms == pytest.approx(0.05, abs=4 * np.sqrt(0.95 * 0.05 / len(small)))


def test_a_probability_of_something_shared_is_right_as_often_as_it_says():
    """Truths drawn from the prior; by bins of the probability, within four standard errors."""
    generator = np.random.default_rng(9)
    there = generator.random(SEEDS) < evidence.SIZE_EFFECT
    share = np.where(there, generator.uniform(*evidence.SHARE, SEEDS), 0.0)
    shared = np.sqrt(share / (1 - share))[:, None, None] * generator.normal(size=(SEEDS, 3, 1))
    stated = np.array([pilot.analyse([table]).probability for table in shared + generator.normal(size=(SEEDS, 3, HEADS))])
    edges = np.quantile(stated, [0, 0.25, 0.5, 0.75, 1])
    assert edges[-1] - edges[0] > 0.5
    for low, high in itertools.pairwise(edges):
        inside = (stated >= low) & (stated <= high)
        error = np.sqrt(np.mean(stated[inside] * (1 - stated[inside])) / inside.sum())
        assert there[inside].mean() == pytest.approx(stated[inside].mean(), abs=4 * error)


def test_deviations_are_pooled_about_the_mean_of_each():
    sd, low, high = pilot.deviation([np.array([1.0, 2.0, 3.0]), np.array([10.0, 10.0, 13.0])])
    assert sd == pytest.approx(np.sqrt((2 + 6) / 4))
    assert (low, high) == pytest.approx((np.sqrt(8 / stats.chi2.ppf(0.975, 4)), np.sqrt(8 / stats.chi2.ppf(0.025, 4))))


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ([HAND_MADE[:1]], "two or more of each"),
        ([HAND_MADE[:, :1]], "two or more of each"),
        ([HAND_MADE, np.ones((3, 3))], "as many columns in all"),
        ([np.array([[1.0, 2.0], [1.5, 2.5]])], "copies of one run"),
    ],
)
def test_tables_that_say_nothing_of_noise_are_refused(tables, words):
    with pytest.raises(ValueError, match=words):
        pilot.analyse(tables)


@pytest.fixture(scope="module")
def committed():
    texts = {"document": str}
    return {name: pd.read_csv(RESULTS / f"{name}.csv", dtype=texts) for name in ("loss", "documents", "noise")}


def test_committed_noise_follows_from_the_committed_losses(committed):
    found = pilot.noise(committed["loss"], committed["documents"])
    pd.testing.assert_frame_equal(found, committed["noise"], rtol=1e-5, check_dtype=False)
    assert list(found["size"]) == ["a", "b", "all"] * 2
    assert found["runs"].sum() == 2 * len(committed["loss"]) == 72


def test_committed_losses_are_means_of_the_committed_documents(committed):
    documents = committed["documents"]
    assert (documents.groupby("cell").size() == 10).all()
    sums = (documents["loss"] * documents["targets"]).groupby(documents["cell"]).sum()
    found = sums / documents.groupby("cell")["targets"].sum()
    losses = committed["loss"].set_index("cell")["loss"]
    assert found[losses.index].to_numpy() == pytest.approx(losses.to_numpy(), abs=2e-6)


def test_what_is_written_of_the_pilot_has_its_table(committed):
    for name in ("results/pilot/README.md", "docs/noise.md"):
        assert pilot.table(committed["noise"]) in (REPOSITORY / name).read_text(), (
            f"{name} is of another results/pilot/noise.csv"
        )
    assert pilot.says(committed["loss"], committed["noise"]) in (RESULTS / "README.md").read_text()


def finished(folder, seeds=(0, 1), n_heads=(1, 2)):
    """A grid folder of two sizes at which seeds deviate, and all that runs leave."""
    the_grid = grid_fakes.small_grid()
    the_grid.configs[:] = grid.product(grid_fakes.config, size=[16, 32], n_heads=n_heads, seed=seeds)
    cells, layout, generator = grid.cells(the_grid), Layout(folder), np.random.default_rng(3)
    ones, ids = np.ones(4, np.int64), np.arange(4, dtype=np.uint64)
    for cell in cells:
        grid_fakes.finish(cell, layout)
        sums = 256 * (2 + 0.1 * generator.normal() + 0.01 * generator.normal(size=4))
        own = evaluation.Documents(ids, 0 * ones.astype(np.int32), np.array(["text"]), 256 * ones, ids, 256 * ones, sums)
        path = layout.cell(cell.name)
        (path / "documents.npz").write_bytes(evaluation.to_bytes(own))
        about = json.loads((path / "result.json").read_text())
        write_json(path / "result.json", about | {"loss": sums.sum() / 1024, "eval_documents": 4})
        write_json(path / "environment.json", {"versions": {"jax": "0.11.2"}, "device": "cpu", "n_devices": 1})
        write_json(path / "heartbeat.json", {"time": 1e9})
    write_json(folder / "grid.json", grid_cells.facts(the_grid, cells))
    return [layout.cell(cell.name) for cell in cells]


def test_a_finished_grid_is_read_and_written(tmp_path, capsys):
    folders = finished(tmp_path / "grid")
    pilot.main([str(tmp_path / "grid"), "--out", str(tmp_path / "out"), "--machine", "one abacus"])
    losses, documents, noise = (pd.read_csv(tmp_path / "out" / f"{name}.csv") for name in ("loss", "documents", "noise"))
    assert (len(losses), len(documents), list(noise["size"])) == (8, 32, ["16d", "32d", "all"])
    assert losses["loss"].tolist() == [round(json.loads((folder / "result.json").read_text())["loss"], 6) for folder in folders]
    assert noise["documents"].tolist() == [4, 4, 4]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "8 runs: 2 seeds x (1,1), (2,1) x sizes 16d, 32d" in text
    assert "one abacus" in text
    assert "2001-09-09" in text
    assert text in capsys.readouterr().out


def drop(name):
    return lambda folders: (folders[3] / name).unlink()


def diverge(folders):
    path = folders[3] / "result.json"
    write_json(path, json.loads(path.read_text()) | {"status": "diverged", "loss": None, "loss_sem": None})


def other_text(folders):
    path = folders[3] / "documents.npz"
    there = evaluation.from_bytes(path.read_bytes())
    path.write_bytes(evaluation.to_bytes(there._replace(document=there.document + np.uint64(9))))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("result.json"), r"1 of 8 runs are not done \(s16d-\S+\): .*goes on"),
        (diverge, "1 of 8 runs are not done .* diverged"),
        (drop("documents.npz"), "documents.npz is not there"),
        (lambda folders: (folders[3] / "documents.npz").write_bytes(b"no"), "documents.npz can't be read"),
        (other_text, "of other held-out text"),
        (drop("environment.json"), "environment.json is not there"),
        (lambda folders: (folders[3].parent.parent / "grid.json").unlink(), "grid.json is not there"),
    ],
)
def test_an_unfinished_grid_is_refused_before_anything_is_written(change, words, tmp_path, capsys):
    change(finished(tmp_path / "grid"))
    refused(tmp_path, capsys, words)


@pytest.mark.parametrize(
    ("axes", "words"),
    [({"seeds": (0,)}, "1 of seeds"), ({"n_heads": (1,)}, "1 of head configurations")],
)
def test_a_grid_in_which_nothing_differs_is_refused(axes, words, tmp_path, capsys):
    finished(tmp_path / "grid", **axes)
    refused(tmp_path, capsys, words)


def test_a_grid_that_lacks_a_pair_is_refused(tmp_path, capsys):
    folders = finished(tmp_path / "grid")
    facts = json.loads((tmp_path / "grid" / "grid.json").read_text())
    write_json(tmp_path / "grid" / "grid.json", facts | {"cells": [name for name in facts["cells"] if name != folders[3].name]})
    refused(tmp_path, capsys, "3 runs of 2 seeds and 2 head configurations: needs each pair once")


def refused(folder, capsys, words):
    with pytest.raises(SystemExit) as error:
        pilot.main([str(folder / "grid"), "--out", str(folder / "out")])
    assert error.value.code == 2
    text = " ".join(capsys.readouterr().err.split())
    assert pd.Series([text]).str.contains(words).all(), text
    assert not (folder / "out").exists()
