"""The same question on several devices, and what the screens say of how a model is served."""

import json

import numpy as np
import pytest

from gqa_jax.hardware import CHIPS
from gqa_jax.search import objectives, optimum, presets
from gqa_jax.search.devices import compare, front
from gqa_jax.search.roofline import Layout, RooflineServing
from launch.__main__ import main

LOSS, T = 2.615, 131_072
ASK = ["optimum", "--preset", "paper", "--context", "128K", "--loss", str(LOSS)]


@pytest.fixture(scope="module")
def paper():
    return presets.load("paper")


def goals(*devices, cost="price", **settings):
    return [objectives.make(cost, device=name, **settings) for name in devices]


def test_each_device_has_the_answer_that_it_has_alone_cheapest_first(paper):
    found = compare(paper, LOSS, T, goals("h100", "v6e", batch=4), draws=50)
    assert list(found.table["cost"]) == sorted(found.table["cost"])
    for name, goal in zip(("h100", "v6e"), goals("h100", "v6e", batch=4), strict=True):
        alone = optimum.search(paper, LOSS, T, goal, draws=50)
        row = found.table.set_index("device").loc[name]
        assert found.answers[name].to_dict() == alone.to_dict()
        assert (row["n_heads"], row["n_kv_heads"], row["cost"]) == (*alone.heads, alone.cost)
        assert row["usd_per_million"] == pytest.approx(alone.cost)  # the price of its tokens, input and output together
        assert row["usd_per_hour"] == CHIPS[name].price.usd_per_hour


def test_a_device_that_can_not_serve_it_says_why_and_the_others_answer(paper):
    found = compare(paper, 2.42, T, goals("l4", "h200", batch=1), draws=0)
    rows = found.table.set_index("device")
    assert list(found.answers) == ["h200"]
    assert np.isnan(rows.loc["l4", "cost"])
    assert "a server has 21.7 GB" in rows.loc["l4", "note"]
    assert set(found.front["device"]) == {"h200"}
    with pytest.raises(ValueError, match="l4: no head configuration can be served as asked"):
        compare(paper, 2.42, T, goals("l4", batch=1), draws=0)


def test_a_device_is_named_once(paper):
    with pytest.raises(ValueError, match="devices v6e, v6e: each once"):
        compare(paper, LOSS, T, goals("v6e", "v6e"), draws=0)


def test_nothing_of_the_front_is_both_dearer_and_slower_than_another(paper):
    servings = [goal.serving for goal in goals("h100", "h200", "v6e")]
    found = front(paper, LOSS, T, servings)
    assert len(found) > 3
    assert (np.diff(found["request_seconds"]) > 0).all()
    assert (np.diff(found["usd_per_million"]) < 0).all()
    assert found["device"].nunique() > 1
    # one by one: whatever was left out is no better than a row of it
    for name in ("h100", "h200", "v6e"):
        for batch in (1, 4, 16):
            rows = optimum.optimum_map(paper, [LOSS], [T], objectives.make("price", device=name, batch=batch), draws=0)
            usd, seconds = rows.iloc[0][["cost", "request_seconds"]]
            assert ((found["usd_per_million"] <= usd) & (found["request_seconds"] <= seconds)).any()


@pytest.mark.parametrize("batch", [1, 8])
def test_for_a_number_of_requests_the_cheapest_is_the_fastest(paper, batch):
    cheap, fast = (
        optimum.optimum_map(paper, [LOSS], [T], goal(RooflineServing("h100", 8, batch=batch)), draws=0).iloc[0]
        for goal in (objectives.Price, objectives.Latency)
    )
    assert cheap["request_seconds"] == pytest.approx(fast["request_seconds"])


def test_prices_of_several_vendors_are_said(paper):
    assert compare(paper, LOSS, T, goals("h200", "v6e", batch=1), draws=0).vendors is None
    assert "--prices lambda" in compare(paper, LOSS, T, goals("b200", "h100", batch=1), draws=0).vendors


def test_limits_of_time_hold_on_the_front(paper):
    (goal,) = goals("h200", tpot=0.01)
    assert front(paper, LOSS, T, [goal.serving])["tpot"].max() <= 0.01


def test_a_given_layout_serves_no_fewer_requests_than_it_divides(paper):
    found = front(paper, LOSS, T, [RooflineServing("h200", 4, Layout(1, 4, 1))])
    assert found["batch"].min() >= 4
    assert set(found["layout"]) == {"1,4,1"}


class TestScreens:
    def test_an_answer_says_how_it_is_served(self, capsys):
        options = ["--cost", "price", "--device", "v5e", "--n_devices", "4", "--cache_dtype", "int8", "--parallelism", "tensor"]
        assert main([*ASK, *options, "--batch", "1", "--efficiency", "bound", "--draws", "50"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert text.startswith("(8,4), 8 query heads and 4 key/value heads, in ")
        assert "served on 4 x v5e (heads over 4); 1 request at a time; 10% of their tokens generated;" in text
        assert "cache in int8; the bound: every peak reached, all at once; $1.20 an hour of a device (Google Cloud" in text
        assert "of the 15.22 GB that a server fills of each device" in text
        assert "first token after " in text
        assert "a token (reading parameters)" in text
        assert "so that several hold the same: costs (8,2) " in text
        assert "of the peaks are reached: the bound: every peak reached, all at once" in text
        assert "4 devices can't share 1 query head: 1 can" in text

    def test_limits_that_nothing_meets_say_what_comes_closest(self, capsys):
        assert main([*ASK, "--cost", "price", "--device", "h100", "--tpot", "1e-4"]) == 2
        assert "what comes closest: (8,1) token after" in capsys.readouterr().err

    def test_several_devices(self, capsys):
        options = ["--cost", "price", "--device", "h200,v6e", "--draws", "50"]
        assert main([*ASK, *options]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert text.startswith("Of 2 devices, 1 x v6e is the cheapest (price of a million tokens $")
        assert "The answer on each device" in text
        assert "Money against time" in text
        assert "10% of their tokens generated" in text
        assert "laws of the preset paper" in text
        assert main([*ASK, *options, "--format", "json"]) == 0
        values = json.loads(capsys.readouterr().out)
        assert {row["device"] for row in values["devices"]} == set(values["answers"]) == {"h200", "v6e"}
        assert values["front"][0]["request_seconds"] <= values["front"][-1]["request_seconds"]

    def test_several_devices_are_for_optimum(self, capsys, tmp_path):
        argv = ["report", "--preset", "paper", "--cost", "price", "--device", "h200,v6e"]
        assert main(argv) == 2
        assert "--device h200,v6e: one device here" in capsys.readouterr().err
