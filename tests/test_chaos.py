"""A grid under attack (benchmarks/chaos.py): nothing is lost, or done twice."""

import pytest

from benchmarks import chaos


@pytest.mark.slow
def test_grids_survive_two_minutes_of_attacks(tmp_path):
    outcome = chaos.attack(tmp_path, seconds=120.0, seed=7, cells=10)
    print(f"\n{outcome.said()}")
    assert outcome.attempts > outcome.cells == 10
    assert min(outcome.hits.values()) > 0, outcome.hits
    assert {"config.json", "heartbeat.json", "attempts", "grid.json"} <= outcome.torn.keys()
