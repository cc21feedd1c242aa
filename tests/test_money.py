"""What cells cost on an engine, and a budget."""

import dataclasses

import pytest

from gqa_jax.errors import ConfigError
from gqa_jax.hardware import prices
from launch import grid, money, watch
from launch.cells import Layout
from launch.executors import base
from launch.executors.base import RUNNING, Job, Look, SubmitError
from launch.run import Pass
from launch.state import CellState
from tests import grid_fakes
from tests.test_watch import HOUR, clock, engine  # noqa: F401 (fixtures)

CELLS = grid.cells(grid_fakes.small_grid())[:4]
TPU = {"engine": "tpu", "topology": "v5e:4x4", "project": "a-project", "zones": ["us-west4-a"]}


def made(tmp_path, **values):
    return base.make(values, Layout(tmp_path))


@pytest.mark.parametrize(
    ("values", "rents"),
    [
        (TPU, ("v5e", 16, True, "us-west4")),
        (TPU | {"provisioning": "guaranteed", "slices": 2}, ("v5e", 32, False, "us-west4")),
        ({"engine": "slurm", "topology": "h200:8", "nodes": 3}, ("h200", 24, False, None)),
        ({"engine": "slurm"}, None),
        ({"engine": "sky", "topology": "h100:8", "infra": "gcp/us-central1"}, ("h100", 8, True, "us-central1")),
        ({"engine": "sky", "accelerators": "L4:1"}, None),
    ],
)
def test_what_an_engine_rents_for_a_cell(tmp_path, values, rents):
    assert made(tmp_path, **values).rents == rents


def test_the_price_is_in_the_terms_and_the_region_that_are_asked_for(tmp_path):
    spot = money.rate(made(tmp_path, **TPU))
    listed = prices.find("v5e", "us-west4:spot")
    assert (spot.price, spot.usd_per_hour) == (listed, 16 * listed.usd_per_hour)
    assert spot.said() == (
        f"${16 * listed.usd_per_hour:.2f} an hour (16 v5e, Google Cloud, us-west4, spot, {listed.date}; on demand $19.20)"
    )
    own = money.rate(made(tmp_path, **TPU | {"provisioning": "guaranteed"}))
    assert (own.price.usd_per_hour, own.on_demand) == (1.2, None)
    file = tmp_path / "prices.json"
    file.write_text('{"v5e": 0.5}')
    assert money.rate(made(tmp_path, **TPU), str(file)).usd_per_hour == 8.0
    assert money.table(spot)["v5e"] == listed
    assert money.rate(made(tmp_path, engine="slurm")) is None


def test_cells_are_expected_to_cost_their_hours(tmp_path):
    one = made(tmp_path, **TPU | {"topology": "v5e:1x1"})
    rate = money.rate(one)
    found = money.expected(CELLS, one, rate)
    assert list(found) == [cell.name for cell in CELLS]
    assert all(0 < usd < 0.1 for usd in found.values())
    assert money.expected(CELLS, made(tmp_path, engine="slurm", topology="h200:8", nodes=2), rate) == {}


def test_cells_that_share_a_gpu_pay_for_their_part_of_it(tmp_path, monkeypatch):
    """While they hold it; that they are faster for it is not taken for granted."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    alone, shared = (made(tmp_path, engine="local", topology="h100:1", cells_per_gpu=n) for n in (1, 4))
    rates = money.rate(alone), money.rate(shared)
    assert rates[1].usd_per_hour == pytest.approx(rates[0].usd_per_hour / 4)
    assert f"${rates[1].usd_per_hour:,.2f} an hour (0.25 h100, " in rates[1].said()
    assert money.expected(CELLS, shared, rates[1]) == money.expected(CELLS, alone, rates[0]) != {}


@pytest.fixture
def budget(tmp_path):
    """Of cells of $2 and two hours each."""
    rate = dataclasses.replace(
        money.rate(made(tmp_path, **TPU)), rents=base.Rents("v5e", 4), price=prices.Price(0.25, vendor="Us")
    )
    return lambda usd: money.Budget(usd, rate, {cell.name: 2.0 for cell in CELLS})


def now(states, jobs=(), at=1e9):
    running = {cell.name: Job(cell.name, "1", RUNNING, since=since) for cell, since in jobs}
    return Pass(CELLS, states, Look(running, None), at)


def test_spent_is_what_devices_worked_and_what_machines_wait_since(budget):
    done = CellState("done", device_seconds=4 * HOUR)
    trains = CellState("running", device_seconds=2 * HOUR, heartbeat_age=0.5 * HOUR, step=50, steps=100)
    boots = CellState("queued")
    found = now([done, trains, boots, CellState("planned")], [(CELLS[1], 1e9 - HOUR), (CELLS[2], 1e9 - HOUR / 4)])
    assert budget(5).spent(found) == pytest.approx(1.0 + 0.5 + 0.5 + 0.25)
    assert money.billed(found, budget(5).rate) == (2, 2.0)
    back = now([dataclasses.replace(done, device_seconds=-5.0)] + [CellState("planned")] * 3, [(CELLS[1], 2e9)])
    assert budget(5).spent(back) == 0.0  # whatever clocks say


def test_what_would_lead_beyond_is_held(budget):
    found = now(
        [CellState("running", step=50, steps=100, device_seconds=4 * HOUR), *[CellState("planned")] * 3], [(CELLS[0], 1e9)]
    )
    assert budget(6.1).hold(found, CELLS[1:]) == {
        CELLS[3].name: "--max_usd 6.1: $1.00 are spent, $5.00 expected of those before it, $2.00 of this one"
    }
    assert budget(8.1).hold(found, CELLS[1:]) == {}
    assert list(budget(1).hold(found, CELLS[1:])) == [cell.name for cell in CELLS[1:]]


@pytest.mark.parametrize("usd", [0, -1, float("nan"), float("inf")])
def test_what_is_no_budget(budget, usd):
    with pytest.raises(ConfigError, match=r"--max_usd .*: must be US dollars, above 0"):
        budget(usd)


def test_a_watch_ends_its_cells_when_the_budget_is_spent(engine, budget):  # noqa: F811
    """Two cells at a time at $1 an hour; they take an hour, and are expected to take six minutes."""
    cheap = dataclasses.replace(budget(1.5), expected={cell.name: 0.1 for cell in CELLS})
    cancelled = []
    engine.cancel = cancelled.extend
    last = watch.repeat(CELLS, engine.layout, engine, True, lambda found: None, 200, cheap)
    assert cancelled == [CELLS[0].name, CELLS[1].name]
    assert last.notes[0].startswith("--max_usd 1.5: $1.")
    assert last.notes[0].endswith("are spent: 2 cells ended, to be resumed")
    assert engine.clock.now - 1.8e9 == pytest.approx(0.75 * HOUR, abs=400)


def test_what_does_not_fit_into_the_budget_is_left_and_the_watch_ends(engine, budget):  # noqa: F811
    """Of four cells of $1, of which $2 are expected: two fit into 4.5 at first, and a third when they were cheaper."""
    last = watch.repeat(CELLS, engine.layout, engine, True, lambda found: None, 200, budget(4.5))
    assert [one.state for one in last.states] == ["done", "done", "done", "planned"]
    assert list(last.held) == [CELLS[3].name]


def test_a_budget_is_over_only_when_cells_were_ended(engine, budget):  # noqa: F811
    """The engine does not answer when they are to be: it is asked again."""
    cheap = dataclasses.replace(budget(1.5), expected={cell.name: 0.1 for cell in CELLS})
    asked = []

    def cancel(cells):
        asked.append(list(cells))
        if len(asked) < 3:
            raise SubmitError("UNAVAILABLE")

    engine.cancel = cancel
    last = watch.repeat(CELLS, engine.layout, engine, True, lambda found: None, 200, cheap)
    assert asked == [[CELLS[0].name, CELLS[1].name]] * 3
    assert last.over_budget == last.notes[0]
