"""A grid under attack (benchmarks/chaos.py): nothing is lost, or done twice."""

import pytest

from benchmarks import chaos


@pytest.mark.slow
def test_grids_survive_two_minutes_of_attacks(tmp_path):
    outcome = chaos.attack(tmp_path, seconds=120.0, seed=7, cells=10)
    print(f"\n{outcome.said()}")
    assert outcome.attempts > outcome.cells == 10
    came_off = {kind for kind, times in outcome.hits.items() if times}  # which, and how many, is a matter of speed too
    assert len(came_off) >= 5, outcome.hits
    assert {"launcher", "tear_record"} <= came_off
    assert sum(outcome.hits.values()) >= 10
