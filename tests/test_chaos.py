"""A grid under attack (benchmarks/chaos.py): nothing is lost, or done twice."""

import json
import shutil

import pytest

from benchmarks import chaos


@pytest.fixture
def twice(tmp_path):
    """The same grid of a cell, run twice."""
    places = []
    for name in ("attacked", "undisturbed"):
        (tmp_path / name).mkdir()
        (place,) = chaos.made(tmp_path / name, tmp_path / name, {"alone": (1, 1)})
        folder = place.root / "cells" / place.cells[0]
        for part in ("attempts", "metrics", "checkpoints/24"):
            (folder / part).mkdir(parents=True)
        (folder / "attempts" / "000.json").write_text("{}")
        rows = [{"step": step, "kind": "train", "loss": 5 - step / 10} for step in range(1, chaos.STEPS + 1)]
        (folder / "metrics" / "attempt-000.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        result = {"status": "done", "loss": 2.5, "loss_sem": 0.1, "params_sha256": "a", "identity": "b", "step": 24}
        (folder / "result.json").write_text(json.dumps(result | {"n_processes": 1, "attempts": 1}))
        places.append(place)
    return places


def test_what_an_attack_must_not_change_is_seen(twice):
    attacked, _ = twice
    assert chaos.compare(*twice) == 1
    folder = attacked.root / "cells" / attacked.cells[0]
    shutil.copytree(folder, kept := attacked.root / "kept")

    def bits():
        text = (folder / "result.json").read_text()
        (folder / "result.json").write_text(text.replace('"params_sha256": "a"', '"params_sha256": "c"'))

    def a_row():
        text = (folder / "metrics" / "attempt-000.jsonl").read_text()
        (folder / "metrics" / "attempt-000.jsonl").write_text(text.partition("\n")[2])

    def an_attempt_after_the_end():
        (folder / "attempts" / "001.json").write_text("{}")

    def half_a_checkpoint():
        (folder / "checkpoints" / "27.orbax-checkpoint-tmp").mkdir()

    for change in (bits, a_row, an_attempt_after_the_end, half_a_checkpoint):
        change()
        with pytest.raises(AssertionError):
            chaos.compare(*twice)
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
    assert chaos.compare(*twice) == 1


@pytest.mark.slow
def test_grids_survive_two_minutes_of_attacks(tmp_path):
    outcome = chaos.attack(tmp_path, seconds=120.0, seed=7, cells=10)
    print(f"\n{outcome.said()}")
    assert outcome.attempts > outcome.cells == 10
    came_off = {kind for kind, times in outcome.hits.items() if times}  # which, and how many, is a matter of speed too
    assert len(came_off) >= 5, outcome.hits
    assert {"launcher", "tear_record"} <= came_off
    assert sum(outcome.hits.values()) >= 10
