"""The explorer of a report in a real browser: the same numbers as Python's search, by keyboard, on a phone, in the dark."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex

import numpy as np
import pandas as pd
import pytest
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys

from benchmarks.report import DRAG
from gqa_jax import costs, formatting, shape_search
from gqa_jax.hardware import CHIPS, Efficiency
from gqa_jax.laws import LLAMA3, Heads, bends
from gqa_jax.search import objectives, optimum, roofline
from gqa_jax.search.roofline import Serving
from launch import analysis, report
from launch.report import words
from launch.report.payload import DRAWS
from tests import browser, report_fakes

pytestmark = [pytest.mark.slow, pytest.mark.needs("chromium")]

QUERIES = 1000
RELATIVE = 1e-9


@pytest.fixture(scope="module")
def studies():
    """Llama-3's heads among the runs; by the head law alone; not known at all; and laws that bend as much as may be."""
    table = report_fakes.loss_table()
    fixed = table[table["n_heads"].notna()]
    wide = {heads: law for heads, law in report_fakes.GRID.items() if heads.n_kv_heads in (1, 8)}
    found = [
        report_fakes.study(table, more=False),
        report_fakes.study(report_fakes.loss_table(wide), more=False),
        report_fakes.study(fixed[fixed["n_kv_heads"] == 1], more=False),
        report_fakes.study(table, more=False, bent=True),
    ]
    known = [optimum.coefficients(one.laws, DRAWS) for one in found]
    own = [None if one.baseline is None else np.isfinite(one.b_H[one.baseline]) for one in known]
    assert own == [True, False, None, True]
    for one in known:  # draws of every kind
        assert (np.bincount(one.draws.bends.kind_S.astype(int), minlength=len(bends.NAMES)) > 20).all()
    return found


@pytest.fixture(scope="module")
def page(studies, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "index.html"
    path.write_text(report.page(report_fakes.findings(*studies)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chromium():
    with browser.running() as one:
        yield one


@pytest.fixture
def explorer(chromium, page):
    """The page in a browser, ready."""

    def opened(**options):
        chromium.open(page, **options)
        chromium.run("while (!globalThis.gqa) await new Promise((resolve) => setTimeout(resolve, 20))")
        return chromium

    return opened


def random_efficiency(generator):
    """One of every kind that may be given."""
    own = Efficiency(
        *generator.uniform(0.2, 1, 4),
        layer_seconds=generator.uniform(0, 2e-5),
        exchange=generator.uniform(0.2, 1),
        source="of a test",
    )
    return [None, "bound", generator.uniform(0.2, 1), own][generator.integers(4)]


def random_serving(generator):
    """Any device, as many as share a model, any layout, batch, limits and precisions that are allowed together."""
    device = str(generator.choice(list(CHIPS)))
    most = max(math.prod(map(int, shape.split("x"))) for shape in CHIPS[device].shapes)
    n_devices = int(generator.choice([one for one in (1, 2, 3, 4, 6, 8, 16) if one <= most]))
    parallelism = [roofline.BEST, roofline.TENSOR, generator.choice([str(one) for one in roofline.layouts(n_devices)])]
    parallelism = str(parallelism[generator.choice(3, p=[0.6, 0.2, 0.2])])
    least = roofline.Layout.parse(parallelism).sequences if "," in parallelism else 1
    batch = [roofline.BEST, roofline.FITS, float(generator.integers(least, least + 12))][generator.choice(3, p=[0.5, 0.2, 0.3])]
    decode_share = generator.choice([0.0, 1.0, generator.random()], p=[0.1, 0.1, 0.8])
    limits = {
        "ttft": 10 ** generator.uniform(-1, 3) if decode_share < 1 and generator.random() < 0.3 else None,
        "tpot": 10 ** generator.uniform(-2.5, 0.5) if decode_share > 0 and generator.random() < 0.4 else None,
    }
    return limits | {
        "device": device,
        "n_devices": n_devices,
        "parallelism": parallelism,
        "batch": batch,
        "decode_share": decode_share,
        "param_dtype": str(generator.choice(list(costs.DTYPE_BYTES))),
        "cache_dtype": str(generator.choice(list(costs.DTYPE_BYTES))),
        "efficiency": random_efficiency(generator),
        "untied": bool(generator.integers(2)),
        "disaggregated": bool(generator.integers(2)),
        "usd_per_hour": generator.choice([None, generator.uniform(1, 20)]),
    }


def random_objective(generator):
    """Any cost with any settings."""
    cost = str(generator.choice(list(objectives.OBJECTIVES)))
    if cost in ("z", "flops", "memory"):
        name = str(generator.choice(list(costs.CONVENTIONS)))
        settings = {"convention": name}
        if cost != "memory":
            settings["flops"] = str(generator.choice(["per_token", "half_T", "full_T"]))
        if cost == "z":
            settings |= {"lam": generator.choice([0.0, 1.0, generator.random()]), "alpha": 0.3 + generator.random() / 2}
        if costs.CONVENTIONS[name].memory == "bytes" and cost != "flops":
            settings |= {"cache_dtype": str(generator.choice(list(costs.DTYPE_BYTES)))}
        return objectives.make(cost, **settings)
    training = {
        "tokens_per_param": generator.uniform(5, 200),
        "train_context": generator.choice([None, 4096]),
        "convention": str(generator.choice(list(costs.CONVENTIONS))),
    }
    if cost == "train":
        return objectives.make(cost, **training)
    serving = random_serving(generator)
    if cost == "lifetime":
        served = {"served_tokens": generator.choice([0.0, 10 ** generator.uniform(9, 14)], p=[0.1, 0.9])} | training
        on = serving | {"training_mfu": generator.choice([None, generator.uniform(0.1, 1)])}
        return objectives.make(cost, **served, **(on if generator.random() < 0.5 else {}))
    return objectives.make(cost, **serving)


def random_question(generator, study):
    """A loss, often where some draws don't reach it, a context, a cost, and a limit of memory one time in five."""
    objective = random_objective(generator)
    limit = Serving(**random_serving(generator)) if generator.random() < 0.2 else None
    on_devices = limit is not None or getattr(objective, "serving", None) is not None
    entropy = min(law.entropy for law in study.laws.values())
    least = 0.25 if on_devices and generator.random() < 0.9 else 0.005  # of larger models no device holds one
    loss = entropy + np.exp(generator.uniform(np.log(least), np.log(2.0)))
    context = int(2 ** generator.uniform(10, 17 if on_devices else 20))
    return loss, context, objective, limit


def as_query(loss, context, objective, limit):
    """The same for the page."""
    limit = None if limit is None else limit.describe()
    return {"context": context, "loss": loss, "objective": objective.describe(), "memory_limit": limit}


SEARCH = """
    const [study, queries] = arguments;
    const text = (key, value) => (typeof value === "number" && !Number.isFinite(value) ? String(value) : value);
    return JSON.stringify(queries.map((query) => gqa.search(gqa.studies[study], query)), text);
"""


def same(ours, theirs, what):
    """Equal to 1e-9 relative; what Python leaves out (NaN) is not compared with the page's infinity."""
    ours, theirs = np.array(ours, np.float64), np.array([float(x) for x in np.atleast_1d(theirs)]).reshape(np.shape(ours))
    np.testing.assert_allclose(theirs, ours, rtol=RELATIVE, atol=0, err_msg=what)


class TestNumbers:
    def test_a_thousand_random_questions_have_pythons_answers(self, explorer, studies, monkeypatch):
        monkeypatch.setattr(
            optimum, "_buildable", lambda *_: pd.DataFrame()
        )  # real models are not the explorer's, and take time
        chromium = explorer()
        generator = np.random.default_rng(20_261_121)
        compared = reached_by_some = 0
        for index, study in enumerate(studies):
            share = QUERIES // len(studies) + (index == 0) * (QUERIES % len(studies))
            asked = [random_question(generator, study) for _ in range(share)]
            found = json.loads(chromium.run(SEARCH, index, [as_query(*question) for question in asked]))
            for question, result in zip(asked, found, strict=True):
                compared += self.compare(study, question, result)
                reached_by_some += 0 < float(result["not_reached"]) < 1
        assert compared > 0.8 * QUERIES  # the others are not reached by any H: the page says so too
        assert reached_by_some > 50

    def compare(self, study, question, result) -> bool:
        loss, context, objective, limit = question
        what = f"{question}"
        try:
            answer = optimum.search(study.laws, loss, context, objective, aspect=study.aspect, memory_limit=limit)
        except ValueError:
            assert result["best"] is None, what
            return False
        known = optimum.coefficients(study.laws)
        position = {one: h for h, one in enumerate(known.heads)}
        frame = answer.candidates
        order = [
            position[Heads(None if pd.isna(n) else n, kv)] for n, kv in zip(frame["n_heads"], frame["n_kv_heads"], strict=True)
        ]
        rows = [result["rows"][h] for h in order]
        assert result["best"] == order[0], what
        assert result["runner_up"] == (None if answer.runner_up is None else position[answer.runner_up]), what
        same(answer.not_reached, result["not_reached"], what)
        for name in ("n_params", "n_layers", "d_model", "cost"):
            ours = frame[name].to_numpy()
            theirs = np.array([float(row[name]) for row in rows])
            known = ~np.isnan(ours)  # Python leaves sizes that are infinite out
            assert not np.isfinite(theirs[~known]).any(), what
            same(ours[known], theirs[known], f"{name} of {what}")
        same(frame["probability"], [row["probability"] for row in rows], what)
        same(1 + frame["expected_regret"], [1 + float(row["expected_regret"]) for row in rows], what)
        for name in ("n_params", "cost"):
            for side, end in enumerate(("low", "high")):
                same(frame[f"{name}_{end}"], [row[f"{name}_interval"][side] for row in rows], f"{name}_{end} of {what}")
        best = rows[0]
        same(1 - answer.saving_vs_llama3, 1 - float(best["saving"]), what)
        same([1 - x for x in answer.saving_interval], [1 - float(x) for x in best["saving_interval"]], what)
        if answer.objective.get("serving"):
            self.compare_served(frame, rows, what)
        return True

    def compare_served(self, frame, rows, what):
        """How each H is served, or that it can't be."""
        found = [row["served"] or {"obstacle": "not reached"} for row in rows]
        assert [one["obstacle"] is not None for one in found] == list(frame["layout"].isna()), what
        for (_, ours), theirs in zip(frame.iterrows(), found, strict=True):
            if theirs["obstacle"] is not None:
                continue
            assert ours["layout"] == ",".join(map(str, theirs["layout"])), what
            for name in ("batch", "memory_bytes", "ttft", "tpot", "request_seconds"):
                same(ours[name], theirs[name], f"{name} of {what}")
            for name in ("usd_per_million_input", "usd_per_million_output"):
                same(ours[name], theirs[name], f"{name} of {what}")
            if theirs["prefill_limit"] is not None:
                assert ours["prefill_limit"] == theirs["prefill_limit"], what
            assert ours["decode_limit"] == theirs["decode_limit"], what

    def test_regrets_are_written_as_python_writes_them(self, explorer):
        """Also those beyond the largest, and of nothing."""
        shares = [0.0, 1e-6, 0.00012, 0.0123, 0.371, 1.0, 9.99, 10.0]
        chromium = explorer()
        largest = chromium.run("return gqa.studies[0].largest_regret")
        assert chromium.run("return arguments[0].map((x) => gqa.regretText(x, arguments[1]))", shares, largest) == [
            formatting.regret(share) for share in shares
        ]

    def test_the_curve_of_heads_without_a_law_goes_through_their_mark(self, explorer, studies):
        """Llama-3's by the head law: at every loss the middle of the draws, as `optimum.search` has it.

        The page computes it at some losses, once: between them to half a percent.
        """
        known = optimum.coefficients(studies[1].laws, DRAWS)
        objective = objectives.make("memory", convention="figures")
        chromium = explorer()
        losses = np.linspace(*chromium.run("return gqa.studies[1].ranges.loss"), 29).tolist()
        query = as_query(2.615, 131_072, objective, None)
        ours = [
            float(objective(shape_search.solve_shape(n, LLAMA3, studies[1].aspect, 64, 50_304, "figures"), 131_072))
            for n in (np.exp(np.median(known.draws.log_size(loss)[:, known.baseline])) for loss in losses)
        ]
        script = "return gqa.costCurve(gqa.studies[1], arguments[0], arguments[1], gqa.studies[1].baseline)"
        np.testing.assert_allclose(chromium.run(script, query, losses), ours, rtol=0.005)


def text(chromium, element):
    """What is shown of an element, by its id."""
    return chromium.run("return document.getElementById(arguments[0]).innerText.trim()", element)


def focused(chromium):
    """Id of the element that has the focus."""
    return chromium.run("return document.activeElement.id")


def press(chromium, *keys):
    """Keys, as a person presses them."""
    ActionChains(chromium.driver).send_keys(*keys).perform()


def set_to(chromium, element, value):
    """A control given a value, and what listens told so."""
    chromium.run(
        "const input = document.getElementById(arguments[0]); input.value = arguments[1];"
        "input.dispatchEvent(new Event('input', { bubbles: true }));"
        "await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));",
        element,
        str(value),
    )


class TestPage:
    def test_it_opens_with_pythons_answer_and_says_nothing_on_the_console(self, explorer, studies):
        chromium = explorer()
        answer = studies[0].questions[0].answer
        assert words.heads(answer.heads) in text(chromium, "sentence")
        assert words.heads(answer.heads) in chromium.run("return document.querySelector('h1').innerText")
        assert text(chromium, "fact-probability") == words.percent(answer.probability)
        assert text(chromium, "fact-params") == words.short(answer.n_params)
        assert text(chromium, "fact-cost") == words.short(answer.cost)
        assert text(chromium, "fact-saving") == words.tenths(answer.saving_vs_llama3)
        assert text(chromium, "fact-runner-up") == words.label(answer.runner_up)
        rows = chromium.run("return [...document.querySelectorAll('#ranking tr th')].map((cell) => cell.innerText)")
        order = zip(answer.candidates["n_heads"], answer.candidates["n_kv_heads"], strict=True)
        assert rows == [words.label(Heads(*map(int, heads))) for heads in order]
        drawn = "return Object.values(gqa.charts).map((c) => [...c.root.references()].filter((m) => m.data?.y?.length).length)"
        assert chromium.run(drawn)[1:] == [1, 1]
        assert chromium.console() == []

    def test_every_choice_gives_an_answer_without_a_word_on_the_console(self, explorer):
        chromium = explorer()
        for element in ("cost", "device", "param_dtype", "cache_dtype", "convention", "flops", "limit", "study"):
            values = chromium.run("return [...document.getElementById(arguments[0]).options].map((one) => one.value)", element)
            for value in values:
                set_to(chromium, element, value)
                assert text(chromium, "sentence")
                assert "NaN" not in chromium.run("return document.body.innerText")
        assert chromium.console() == []

    def test_only_the_controls_of_the_chosen_cost_are_shown(self, explorer):
        chromium = explorer()
        shown = (
            "return ['lam', 'device', 'convention', 'cache_dtype'].map((id) => document.getElementById(id).checkVisibility())"
        )
        assert chromium.run(shown) == [True, False, True, False]
        set_to(chromium, "cost", "latency")
        assert chromium.run(shown) == [False, True, False, True]
        set_to(chromium, "cost", "memory")
        set_to(chromium, "convention", "exact")
        assert chromium.run(shown) == [False, False, True, True]

    def test_the_command_asks_the_same_question(self, explorer, studies):
        """Every control to another value than it has; the command line of the page, parsed by the program."""
        chromium = explorer()
        parser = argparse.ArgumentParser()
        analysis.add_commands(parser.add_subparsers())
        changes = [("cost", "flops"), ("flops", "per_token"), ("cost", "z"), ("lam", 0.25), ("convention", "exact")]
        changes += [("cache_dtype", "int8"), ("limit", "h200"), ("context", 70_000), ("loss", 2.7), ("cost", "price")]
        changes += [
            ("device", "v5e"),
            ("batch", 12),
            ("decode_share", 0.4),
            ("param_dtype", "int4"),
            ("limit", ""),
            ("batch", ""),
        ]
        for element, value in changes:
            set_to(chromium, element, value)
            line = text(chromium, "command")
            assert line.startswith("python -m launch optimum GRID ")
            given = parser.parse_args(shlex.split(line)[3:])
            asked = chromium.run("return gqa.query()")
            objective = analysis.objective(given, "figures")
            if given.fits:
                kept = {name: getattr(given, name) for name in ("param_dtype", "cache_dtype") if getattr(given, name)}
                limit = Serving(given.fits, batch=given.batch or roofline.BEST, **kept).describe()
                for name in ("device", "n_devices", "batch", "memory_bytes", "param_bytes", "cache_dtype", "convention"):
                    assert asked["memory_limit"][name] == limit[name], (line, name)
            else:
                assert asked["memory_limit"] is None
            assert (given.context, given.loss) == (asked["context"], asked["loss"])
            described = objective.describe()
            assert {name: asked["objective"][name] for name in described} == described, line

    def test_a_link_opens_its_question(self, explorer, page):
        chromium = explorer(fragment="ask:context=8192&loss=2.8&cost=memory&convention=exact&limit=h100&nonsense=1&lam=7")
        asked = chromium.run("return gqa.query()")
        assert (asked["context"], asked["loss"], asked["objective"]["cost"]) == (8192, 2.8, "memory")
        assert asked["memory_limit"]["device"] == "h100"
        set_to(chromium, "loss", 2.75)
        chromium.run("await new Promise((resolve) => setTimeout(resolve, 1200))")
        address = chromium.run("return location.hash")
        assert "loss=2.75" in address
        again = explorer(fragment=address.removeprefix("#"))
        assert again.run("return gqa.query()") == asked | {"loss": 2.75}

    @pytest.fixture
    def shared(self, chromium, tmp_path):
        """A page about a price on eight devices that share a model; its study, and the browser."""
        goal = objectives.make("price", device="h100", n_devices=8, disaggregated=True)
        study = report_fakes.study(report_fakes.loss_table(), objective=goal, more=False)
        path = tmp_path / "index.html"
        path.write_text(report.page(report_fakes.findings(study)), encoding="utf-8")
        chromium.open(path)
        chromium.run("while (!globalThis.gqa) await new Promise((resolve) => setTimeout(resolve, 20))")
        return study, chromium

    def test_how_the_answer_is_served_is_said_as_python_says_it(self, shared):
        study, chromium = shared
        answer = study.questions[0].answer
        assert text(chromium, "served") == " ".join(words.served(answer.candidates.iloc[0], answer.objective["serving"]))
        for element, value in (
            ("parallelism", "tensor"),
            ("batch", 16),
            ("decode_share", 0),
            ("device", "h200"),
            ("batch", ""),
        ):
            set_to(chromium, element, value)
            serving = chromium.run("return gqa.query().objective.serving")
            asked = {"n_devices": 8, "disaggregated": True} | {
                name: serving[name] for name in ("device", "parallelism", "batch", "decode_share")
            }
            assert Serving(**asked).describe() == serving
            answer = optimum.search(study.laws, 2.615, 131_072, objectives.make("price", **asked), aspect=study.aspect)
            said = " ".join(words.served(answer.candidates.iloc[0], answer.objective["serving"]))
            assert text(chromium, "served") == said, (element, value)
        assert chromium.console() == []

    def test_a_layout_is_chosen_where_several_devices_share_a_model(self, shared, explorer):
        _, chromium = shared
        shown = "return document.getElementById('parallelism').checkVisibility()"
        assert chromium.run(shown)
        set_to(chromium, "parallelism", "tensor")
        assert "heads over 8" in text(chromium, "served")
        assert "--parallelism tensor" in text(chromium, "command")
        set_to(chromium, "cost", "z")
        assert not chromium.run(shown)
        assert text(chromium, "served") == ""
        chromium = explorer()
        set_to(chromium, "cost", "latency")
        assert not chromium.run(shown)

    def test_the_best_number_of_requests_is_left_of_one(self, shared):
        _, chromium = shared
        assert chromium.run("return gqa.query().objective.serving.batch") == "best"
        assert chromium.run("return document.getElementById('batch').placeholder") == "best"
        set_to(chromium, "batch-slider", 5)
        assert chromium.run("return [gqa.query().objective.serving.batch, document.getElementById('batch').value]") == [
            32,
            "32",
        ]
        set_to(chromium, "batch-slider", -0.25)
        assert chromium.run("return gqa.query().objective.serving.batch") == "best"
        spoken = "return document.getElementById('batch-slider').getAttribute('aria-valuetext')"
        assert chromium.run(spoken) == "the best number of requests"

    def test_what_can_not_be_served_is_said(self, explorer):
        chromium = explorer()
        for element, value in (("cost", "latency"), ("device", "l4"), ("context", 1_048_576), ("batch", 1024)):
            set_to(chromium, element, value)
        assert "but not as asked: with every one of these heads it is too large." in text(chromium, "sentence")
        assert text(chromium, "served") == ""
        assert chromium.console() == []

    def test_a_cell_of_the_map_opens_its_question(self, chromium, tmp_path):
        path = tmp_path / "index.html"
        path.write_text(report.page(report_fakes.findings()), encoding="utf-8")
        chromium.open(path)
        chromium.run("while (!globalThis.gqa) await new Promise((resolve) => setTimeout(resolve, 20))")
        chromium.driver.find_element("css selector", ".map tbody tr:first-child td:nth-child(2) a").send_keys(Keys.ENTER)
        chromium.run("await new Promise((resolve) => setTimeout(resolve, 200))")
        asked = chromium.run("return gqa.query()")
        assert (asked["loss"], asked["context"]) == (3.0, 8192)
        assert text(chromium, "sentence").startswith("Served at 8K tokens, a loss of 3 ")
        assert chromium.console() == []


class TestKeyboard:
    def test_sliders_answer_to_arrows_and_the_answer_is_spoken_at_rest(self, explorer):
        chromium = explorer()
        press(chromium, Keys.TAB)
        assert chromium.run("return document.activeElement.className") == "skip"
        for _ in range(30):
            press(chromium, Keys.TAB)
            if focused(chromium) == "context-slider":
                break
        assert focused(chromium) == "context-slider"
        outline = "const style = getComputedStyle(document.activeElement); return [style.outlineStyle, style.outlineWidth]"
        assert chromium.run(outline) == ["solid", "3px"]
        before = text(chromium, "live")
        press(chromium, Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
        assert chromium.run("return document.getElementById('context').value") == "65536"
        assert "64K tokens" in text(chromium, "sentence")
        assert chromium.run("return document.activeElement.getAttribute('aria-valuetext')") == "64K tokens"
        assert text(chromium, "live") == before  # not while keys are pressed
        chromium.run("await new Promise((resolve) => setTimeout(resolve, 1200))")
        assert "64K tokens" in text(chromium, "live")
        assert "of the draws" in text(chromium, "live")
        press(chromium, Keys.TAB)
        assert focused(chromium) == "context"
        press(chromium, Keys.TAB, Keys.HOME)
        assert focused(chromium) == "loss-slider"
        low = chromium.run("return gqa.studies[0].ranges.loss[0]")
        assert chromium.run("return gqa.query().loss") == low
        press(chromium, Keys.END)
        assert chromium.run("return gqa.query().loss") == chromium.run("return gqa.studies[0].ranges.loss[1]")
        assert chromium.console() == []

    def test_numbers_are_typed_and_refused_with_what_is_allowed(self, explorer):
        chromium = explorer()
        field = chromium.driver.find_element("id", "loss")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys("2.75")
        assert chromium.run("return gqa.query().loss") == 2.75
        assert float(chromium.run("return document.getElementById('loss-slider').value")) == 2.75
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys("1")
        low, high = chromium.run("return gqa.studies[0].ranges.loss")
        assert text(chromium, "loss-problem") == f"a number from {low:.3f} to {high:.3f}"
        assert field.get_attribute("aria-invalid") == "true"
        assert chromium.run("return gqa.query().loss") == 2.75  # the last that could be asked
        context = chromium.driver.find_element("id", "context")
        context.send_keys(Keys.CONTROL, "a")
        context.send_keys("10000.5")
        assert text(chromium, "context-problem") == "a whole number from 1,024 to 1,048,576"
        chromium.driver.find_element("id", "reset").send_keys(Keys.ENTER)
        assert chromium.run("return gqa.query().loss") == 2.615
        assert text(chromium, "loss-problem") == ""
        assert field.get_attribute("aria-invalid") is None
        assert chromium.console() == []

    def test_choices_are_made_by_keys(self, explorer):
        chromium = explorer()
        chromium.driver.find_element("id", "cost").send_keys("price")
        assert chromium.run("return gqa.query().objective.cost") == "price"
        assert "$" in text(chromium, "fact-cost")

    def test_everything_has_a_name(self, explorer):
        chromium = explorer()
        set_to(chromium, "cost", "latency")
        nodes = chromium.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        wanted = {"slider", "spinbutton", "combobox", "button", "link", "img", "image", "table", "region"}
        named = [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node.get("ignored") and node.get("role", {}).get("value") in wanted
        ]
        assert {"slider", "spinbutton", "button", "link", "table"} <= {role for role, _ in named}
        assert all(name.strip() for _, name in named), [role for role, name in named if not name.strip()]
        sliders = [name for role, name in named if role == "slider"]
        assert len(sliders) == len(set(sliders)) >= 4
        levels = chromium.run("return [...document.querySelectorAll('h1, h2, h3')].map((one) => Number(one.tagName[1]))")
        assert levels[0] == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


class TestScreens:
    @pytest.mark.parametrize("width", [360, 768, 1280])
    def test_nothing_scrolls_sideways(self, explorer, width):
        chromium = explorer(width=width, height=740)
        for cost in ("z", "latency"):
            set_to(chromium, "cost", cost)
            inner, outer = chromium.run("return [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert inner <= outer
        small = chromium.run(
            "return [...document.querySelectorAll('form input, form select, form button')]"
            ".filter((one) => one.checkVisibility() && one.getBoundingClientRect().height < 24).map((one) => one.id)"
        )
        assert small == []  # large enough for a finger (WCAG 2.2, 2.5.8)
        assert chromium.console() == []

    def test_dark_and_light_are_the_readers_choice_also_when_it_changes(self, explorer):
        look = (
            "const { backgroundColor, color } = getComputedStyle(document.body);"
            "const label = gqa.charts.curves.root.left[0].major_label_text_color;"
            "return [backgroundColor, color, label.value ?? label]"
        )
        chromium = explorer(dark=True)
        dark = chromium.run(look)
        scheme = [{"name": "prefers-color-scheme", "value": "light"}]
        chromium.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        chromium.run("await new Promise((resolve) => setTimeout(resolve, 200))")
        light = chromium.run(look)
        for before, after in zip(dark, light, strict=True):
            assert before != after
        assert chromium.console() == []

    @pytest.mark.parametrize("dark", [False, True])
    def test_text_can_be_read(self, explorer, dark):
        """Contrast of text and of what is quiet against the page, by WCAG 2.2: 4.5 and more."""
        chromium = explorer(dark=dark)
        names = ["paper", "wash", "ink", "muted", "accent", "care", "care-wash", "best", "baseline"]
        colors = chromium.run(
            "const probe = document.body.appendChild(document.createElement('span'));"
            "return Object.fromEntries(arguments[0].map((name) => {"
            "  probe.style.color = `var(--${name})`;"
            "  return [name, getComputedStyle(probe).color.match(/\\d+/g).map(Number)];"
            "}));",
            names,
        )
        pairs = [(name, "paper") for name in ("ink", "muted", "accent", "best", "baseline")]
        for front, back in [*pairs, ("care", "care-wash"), ("ink", "care-wash"), ("ink", "wash")]:
            assert contrast(colors[front], colors[back]) >= 4.5, (front, back)

    def test_what_is_out_of_the_window_is_drawn_when_it_is_seen(self, explorer):
        chromium = explorer(width=360, height=640)
        set_to(chromium, "loss", 2.9)
        assert chromium.run("return gqa.charts.probability.stale")
        chromium.run(
            "document.getElementById('chart-probability').scrollIntoView({ behavior: 'instant' });"
            "await new Promise((resolve) => setTimeout(resolve, 400))"
        )
        assert not chromium.run("return gqa.charts.probability.stale")

    def test_an_update_takes_no_time_to_speak_of(self, explorer):
        """Printed, not asserted: `python -m benchmarks.report` measures it properly."""
        chromium = explorer()
        times = chromium.run(DRAG, 30)
        print(
            f"update: median {np.median(times['update']):.0f} ms, 95th percentile {np.percentile(times['update'], 95):.0f} ms"
        )
        assert len(times["update"]) == 30
        assert chromium.console() == []


def contrast(front, back):
    """Ratio of the luminances of two sRGB colours (WCAG 2.2)."""
    light, dark = sorted((luminance(front), luminance(back)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(color):
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in np.array(color[:3]) / 255]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))
