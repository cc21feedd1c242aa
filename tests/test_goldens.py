"""What the code answers is what it answered before (`tests.goldens`, which says how each kind of answer is compared)."""

import json

import pytest

from tests import first_version, goldens
from tests.goldens import GOLDENS, Golden


@pytest.mark.parametrize(
    "golden", [pytest.param(one, id=one.name, marks=[pytest.mark.slow] if one.slow else []) for one in GOLDENS]
)
def test_an_answer_is_as_it_was(golden, tmp_path):
    found = golden.differences(golden.make(tmp_path))
    assert not found, f"{golden.name}: {goldens.MEANING}:\n" + "\n".join(found[:20])


@pytest.mark.slow
def test_training_ends_with_the_same_bits():
    """As those that were kept, where this machine has any; elsewhere they may be others, but the same the second time."""
    found = goldens.bits()
    goldens.trained.cache_clear()
    assert found == (goldens.kept_bits().get(goldens.machine()) or goldens.bits()), goldens.MEANING


@pytest.mark.slow
def test_the_plan_of_the_papers_grid_is_the_one_in_configs(tmp_path):
    """That was made without the token store, which the names of its cells say."""
    kept = (goldens.REPOSITORY / "configs/grids/paper-plan.csv").read_text()
    assert goldens.paper_plan(tmp_path).splitlines() == kept.splitlines(), goldens.MEANING


@pytest.mark.slow
def test_cells_of_the_quickstart_are_trained_to_the_same_losses(tmp_path, monkeypatch):
    """All of them: `python -m tests.goldens --quickstart runs/quickstart`."""
    monkeypatch.delenv("XLA_FLAGS")  # one device a cell, as they were trained
    goldens.printed(tmp_path, "run", "configs/grids/quickstart.py", "--root", "ROOT", "--where", "size=40k,context=128")
    found = goldens.compare_quickstart(tmp_path / "ROOT")
    assert not found, f"{goldens.MEANING}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("version", "file"),
    [(goldens.NOW, "configs/grids/quickstart.py"), (goldens.FIRST_VERSION, first_version.QUICKSTART)],
)
def test_a_finished_grid_says_that_it_is_finished(version, file, tmp_path):
    """Nothing of it is trained again, also where the code of November 2026 has written it."""
    goldens.finished(tmp_path, version)
    said = goldens.printed(tmp_path, "status", file, "--root", "ROOT", "--json")
    assert [row["state"] for row in json.loads(said)] == ["done"] * 18


def test_what_differs_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(goldens, "FOLDER", tmp_path)
    text = Golden("a.txt.xz", lambda _: "")
    text.write("one\ntwo\n")
    assert text.differences("one\ntwo\n") == []
    assert text.differences("one\nto\nthree\n") == ["line 2: 'to', was 'two'", "3 lines, were 2"]
    assert text.differences("one\ntwo") == ["other ends of lines"]
    numbers = Golden("b.json", lambda _: "", 1e-6)
    numbers.write(json.dumps({"a": [1.0, 2.0], "n": 3, "gone": None}))
    assert numbers.differences(json.dumps({"a": [1.0, 2.000001], "n": 3, "gone": None})) == []
    assert numbers.differences(json.dumps({"a": [1.0, 2.00001], "n": 4, "new": 0})) == [
        ".a[1]: 2.00001, was 2.0, a relative difference of 5.0e-06",
        ".n: 4, was 3",
        ".gone is gone",
        ".new is new",
    ]
    assert numbers.differences(json.dumps({"a": [1.0], "n": 3, "gone": None})) == [".a: 1 entries, were 2"]
