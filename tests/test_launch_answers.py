"""What is said of an answer: its first line, its tables at every width, its formats."""

import dataclasses
import io
import json

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from gqa_jax.laws import LLAMA3, Heads
from gqa_jax.search import devices, objectives, optimum, presets, words
from launch import answers, columns, device_tables, grid_tables
from launch.__main__ import main

T, LOSS = 131_072, 2.615
ASK = ["optimum", "--preset", "paper", "--context", "128K", "--loss", "2.615", "--draws", "60"]


@pytest.fixture(scope="module")
def paper():
    return presets.load("paper")


@pytest.fixture(scope="module")
def found(paper):
    return optimum.search(paper, LOSS, T, draws=200)


@pytest.fixture(scope="module")
def served(paper):
    goal = objectives.make("price", device="v5e", n_devices=4, cache_dtype="int8", tpot=0.1)
    return optimum.search(paper, LOSS, T, goal, draws=60)


@pytest.fixture(scope="module")
def far(paper):
    return optimum.search(paper, 2.3, T, draws=200)


def printed(table, width):
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


class TestHeadline:
    def test_is_the_answer_with_what_it_is_against(self, found, paper):
        exact = dataclasses.replace(
            found,
            probability=0.996,
            saving=0.292,
            saving_interval=(0.253, 0.31),
            expected_regret=0.001,
            regret_of_runner_up=0.0484,
        )
        text = words.headline(exact, ["laws of nobody"])
        assert text.startswith(
            f"(8,1), 8 query heads and 1 key/value head, in {found.n_layers:.0f} layers x {found.d_model:.0f} ("
        )
        assert (
            ": for a loss of 2.615 at 131,072 tokens of context the cheapest of the 8 with probability 99.6%, 29.2% less"
            in text
        )
        assert (
            "29.2% less (25.3% to 31.0%) than the measured model of Llama 3's heads in 32 layers x 2048 (loss 2.6145): memory "
            in text
        )
        assert f"Next, {found.runner_up} costs 4.74% more on average. Assumed: " in text
        assert text.endswith("; laws of nobody.")

    def test_a_dearer_answer_says_more_and_ascends(self, found, paper):
        dear = dataclasses.replace(found, saving=-0.066, saving_interval=(-0.107, -0.041))
        assert ", 6.6% more (4.1% to 10.7%) than the measured model" in words.headline(dear)

    def test_a_baseline_by_its_law_is_called_so(self, found, paper):
        base = dataclasses.replace(found.baseline, measured=False, shape="trained", n_layers=30.2, d_model=1900.4)
        text = words.headline(dataclasses.replace(found, baseline=base))
        assert "than Llama 3's heads in 30 layers x 1900, by the law and shaped as the trained sizes: memory " in text
        same = dataclasses.replace(found, baseline=base, saving=0.0, saving_interval=(0.0, 0.0))
        assert (
            "; it costs as much as Llama 3's heads in 30 layers x 1900, by the law and shaped as the trained sizes."
            in words.headline(same)
        )
        own = dataclasses.replace(found, loss=2.675891234)
        assert ": for a loss of 2.6759 at" in words.headline(own)
        assert "than" not in words.headline(dataclasses.replace(found, baseline=None)).split("Assumed")[0]

    def test_that_others_are_cheaper_more_often_is_said(self, found, paper):
        table = found.candidates.assign(probability=[0.3, 0.7, *[0.0] * 6])
        text = words.headline(dataclasses.replace(found, probability=0.3, candidates=table))
        assert "the least costly choice on average, and the cheapest of the 8 with probability 30.0%" in text

    def test_a_guess_comes_first_and_has_no_probability(self, far, paper):
        assert not np.isnan(far.far)
        text = words.headline(far)
        assert text.startswith(f"N* is {far.far:.1f}x beyond the trained sizes, further than 10x: a guess. (")
        assert f"the least costly of the {far.n_candidates} on average; it costs as much as Llama 3's heads" in text
        shown = text + "".join(table.markdown() + printed(table, 200) for table in answers.tables(far))
        assert "probab" not in shown
        assert "(prob.)" not in shown

    def test_without_draws_there_is_no_probability_and_no_interval(self, paper):
        text = words.headline(optimum.search(paper, LOSS, T, draws=0))
        assert "the cheapest of the 8 by the fitted laws, " in text
        assert "probability" not in text
        assert " to " not in text.split("Assumed")[0]

    def test_llama_3s_rule_in_words(self):
        assert words.in_words(LLAMA3, 64) == "a query head per 64 of the width and 8 key/value heads"
        assert words.in_words(Heads(None, -1), 64) == "a query head per 64 of the width and a key/value head for each"
        assert words.in_words(Heads(None, -4), 64).endswith("a key/value head for every 4 of them")


class TestAssumptions:
    def test_of_z(self, found, paper):
        assert words.assumptions(found) == [
            "cost Z = 0.9 M^(1/2) + 0.1 C^(1/3) of memory M and FLOPs C",
            "counted by the convention figures (FLOPs of T/2 tokens, memory in values, without embeddings)",
            f"d/L (width over layers) {found.ratio:.0f}, the best of 32 to 128",
        ]

    @pytest.mark.parametrize(
        ("aspect", "text"),
        [("paper", "as in the paper's tables"), ("trained", "as between the trained sizes"), (64, "64, as given")],
    )
    def test_of_shapes(self, aspect, text, paper):
        assert words.assumptions(optimum.search(paper, LOSS, T, aspect=aspect, draws=0))[-1].endswith(text)

    def test_of_serving(self, served, paper):
        said = words.assumptions(served)
        row = served.candidates.iloc[0]
        assert said[0] == "cost is the price of a million tokens"
        assert said[2].startswith("served on 4 x v5e (")
        assert said[3] == f"{row['batch']:,.0f} requests at once (as many as cost the least)"
        assert said[4:7] == [
            "10% of their tokens generated",
            "parameters of 2 bytes, cache in int8",
            "each token within 0.100 s",
        ]
        assert said[7].startswith(
            "54% of the peak in matrices, 68% of the bandwidth for the cache: public measurements of TPU servers"
        )
        assert said[8].startswith("$1.20 an hour of a device (Google Cloud, ")

    def test_prices_stand_where_they_move_the_answer(self, paper):
        goal = objectives.make("latency", device="h200", batch=1)
        said = words.assumptions(optimum.search(paper, LOSS, T, goal, draws=0))
        assert "1 request at a time" in said
        assert not any("an hour" in one for one in said)

    @pytest.mark.parametrize(
        ("cost", "options", "said"),
        [
            ("memory", {"convention": "exact", "cache_dtype": "int8"}, "2 bytes a parameter and 1"),
            ("flops", {"flops": "full_T"}, "counted by the convention figures (FLOPs of T tokens, without embeddings)"),
            ("train", {"tokens": 2e12}, "trained on 2T tokens"),
            ("lifetime", {"served_tokens": 1e12, "device": "v6e"}, "trained on 20 tokens per parameter at 49% of the peak"),
            ("z", {"lam": 0.5}, "cost Z = 0.5 M^(1/2) + 0.5 C^(1/3)"),
        ],
    )
    def test_of_every_cost(self, cost, options, said, paper):
        goal = objectives.make(cost, **options)
        assert said in "; ".join(words.assumptions(optimum.search(paper, LOSS, T, goal, draws=0)))


class TestCandidates:
    @pytest.mark.parametrize("width", [60, 80, 100, 140])
    def test_heads_and_cost_are_there_at_every_width(self, width, found, paper):
        text = printed(answers.candidates(found), width)
        rows = [line.split() for line in text.splitlines()]
        for row in found.candidates.itertuples():
            cells = next(cells for cells in rows if columns.heads_text(row) in cells[:2])
            assert any(cell == f"{row.cost / 1e3:.1f}k" for cell in cells)
        base = next(cells for cells in rows if cells[:1] == ["base"])
        assert base[1] == "(d/d_h,8)"
        assert max(map(len, text.splitlines())) <= width

    def test_the_usual_terminal_has_what_a_choice_needs(self, found, paper):
        text = printed(answers.candidates(found), 80)
        for heading in ("heads", "L x d", "N*", "Z", "95%", "cheapest", "against"):
            assert heading in text
        assert "not shown at this width: d/L, 95% of N*, expected regret" in " ".join(text.split())

    def test_the_baseline_is_a_row(self, found):
        frame = found.to_frame()
        assert list(frame["role"]) == ["answer", *["candidate"] * 7, "baseline"]
        last = frame.iloc[-1]
        assert (last["cost"], last["n_layers"], last["d_model"]) == (found.baseline.cost, 32, 2048)
        assert frame.dtypes["n_heads"] == "Int64"

    def test_what_can_not_be_served_says_why_below(self, paper):
        goal = objectives.make("throughput", device="h100", batch=12)
        table = answers.candidates(optimum.search(paper, LOSS, T, goal, draws=60))
        row = next(row for row in table.rows if row[1] == "(8,8)")
        assert "-" in row
        assert next(note for note in table.notes if note.startswith("(8,8)")).startswith("(8,8): takes ")
        assert ">1000%" not in row

    def test_no_number_that_no_model_has(self, paper):
        small = optimum.search(paper, 8.0, T, draws=60)
        small = dataclasses.replace(small, n_params=1.99e-28, n_params_interval=(0.0, 1.86e17))
        table = small.candidates.assign(
            n_params=[1.99e-28] * 8, n_params_low=[0.0] * 8, n_params_high=[1.86e17] * 4 + [951.0] * 4
        )
        small = dataclasses.replace(small, candidates=table)
        text = words.headline(small) + printed(answers.candidates(small), 200)
        assert "e-28" not in text
        assert "186P" not in text
        assert "(<1k parameters)" in text
        assert text.count("any size") == 4
        assert "951" not in text


def test_worth_says_what_heads_and_what_shape_are_for(found, paper):
    table = answers.worth(found)
    assert [row[0] for row in table.rows][:2] == ["heads and shape", "heads, in the trained shapes"]
    assert table.rows[0][-1] == f"{found.saving:.1%} less"
    assert table.rows[-1][0] == "shape alone, heads of the base"
    assert table.rows[-1][-1] == f"{found.worth['shape']:.1%} less"
    assert "k = 0.005" in table.notes[0]
    assert answers.worth(optimum.search(paper, LOSS, T, aspect="paper", draws=0)) is None


def test_models_to_build_reach_the_loss(found):
    table = answers.buildable(found)
    at = table.headings.index("loss by\nthe law")
    assert all(float(row[at]) <= LOSS for row in table.rows)


def test_money_and_time(paper):
    goals = [objectives.make("price", device=name) for name in ("h200", "v6e")]
    found = devices.compare(paper, LOSS, T, goals, draws=60)
    for table in device_tables.tables(found):
        for width in (80, 100, 140):
            text = printed(table, width)
            for row in table.frame.itertuples():
                assert f"{row.n_devices} x {row.device}" in text
                assert "$" in text
    assert "limited by" in printed(device_tables.money_and_time(found), 140)


class TestFormats:
    def test_csv_has_the_values_of_the_candidates_and_of_the_baseline(self, capsys):
        assert main([*ASK, "--format", "csv"]) == 0
        frame = pd.read_csv(io.StringIO(capsys.readouterr().out))
        assert list(frame["role"])[::8] == ["answer", "baseline"]
        assert frame["cost"].gt(5e4).all()

    @pytest.mark.parametrize(("form", "first"), [("markdown", ""), ("latex", "% "), ("html", "<p>")])
    def test_documents_begin_with_the_answer(self, form, first, capsys):
        assert main([*ASK, "--format", form, "--conventions"]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"{first}(8,1), 8 query heads")
        assert text.count({"markdown": "\n| --", "latex": r"\toprule", "html": "<table>"}[form]) == 4

    def test_several_devices(self, capsys):
        options = [*ASK, "--cost", "price", "--device", "h200,v6e"]
        assert main([*options, "--format", "markdown"]) == 0
        assert capsys.readouterr().out.count("\n| --") == 2
        assert main([*options, "--format", "csv"]) == 0
        assert list(pd.read_csv(io.StringIO(capsys.readouterr().out))["device"]) == ["v6e", "h200"]

    def test_conventions_are_in_json_and_not_in_csv(self, capsys):
        assert main([*ASK, "--conventions", "--format", "json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["conventions"]) == 9
        assert main([*ASK, "--conventions", "--format", "csv"]) == 2
        assert "--format csv has one table" in capsys.readouterr().err


def test_the_map_has_no_probability_for_a_guess(paper):
    from launch import studies

    one = studies.fit(studies.of_preset("paper")).at(None)
    one = dataclasses.replace(one, losses=[2.3, 2.7], contexts_served=[8192, T])
    frame = grid_tables.map_table(one)
    assert frame[frame["loss"] == 2.3]["probability"].isna().all()
    assert frame[frame["loss"] == 2.7]["probability"].notna().all()
    table = grid_tables.optimum_map(frame, "figures")
    assert table.notes[1] == "without a probability: N* is more than 10 times outside, a guess"
    (near, far) = table.rows
    assert "%" in near[2]
    assert "%" not in far[2]
    assert far[2].endswith("*")
