"""The explorer of a report: it says what Python's search says, at the points of its map and between them; by keyboard, on a
phone, in the dark.

What it computes is tested in node where that is there, and in a real browser like the rest.
"""

from __future__ import annotations

import itertools
import math
import shlex

import numpy as np
import pytest
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys

from benchmarks.report import DRAG
from gqa_jax import formatting
from gqa_jax.laws import LLAMA3, Heads
from gqa_jax.search import objectives, optimum
from gqa_jax.search.words import in_words
from launch import __main__ as launch
from launch import commands, report
from launch.report import answer_map, words
from tests import browser, explorer_node, report_fakes

in_browser = [pytest.mark.slow, pytest.mark.needs("chromium")]
in_node = pytest.mark.skipif(not explorer_node.is_there(), reason="without node the slow tests in a browser see it")

WITHIN = 0.01  # of sizes and costs between the points of a map
EXACT = 1e-6  # at its points
QUESTIONS = 90

LOOK = """
    const map = gqa.studies[given.study].map;
    return given.asked.map(({ goal: [cost, device], ...rest }) => {
      const goal = map.goals.find((one) => one.cost === cost && one.device === device);
      return gqa.look(map, { ...rest, goal });
    });
"""


def asked_of(found, name, context, loss):
    """A question as the page takes it."""
    goal = found.goals[name]
    return {"goal": [goal.objective.name, goal.device], "context": int(context), "loss": float(loss)}


def asked_for(given):
    """The objective of a parsed command line."""
    (goal,) = commands.goals(given["cost"], "figures", **{name: given[name] for name in answer_map.OPTIONS})
    return goal


def number(value):
    """What JSON says of a number: text of one that it does not have."""
    return float(value) if value is not None else math.nan


def rows_of(frame, found):
    """Python's rows of a question in the order of the page's heads."""
    labels = [words.label(Heads.of(row.n_heads, row.n_kv_heads)) for row in frame.itertuples()]
    heads = [words.label(one) for one in sorted(found, key=lambda one: (one.n_heads or math.inf, one.n_kv_heads))]
    return frame.assign(label=labels).set_index("label").loc[heads]


def compare(row, seen):
    """A row of `look` against Python's, at a point of the map: every number."""
    for name in ("n_params", "n_layers", "d_model", "ratio", "cost"):
        if np.isfinite(row[name]):
            assert number(seen[name]) == pytest.approx(row[name], rel=EXACT), name
    for name in ("n_params", "cost"):
        for end, theirs in zip(("low", "high"), seen[f"{name}_interval"], strict=True):
            if np.isfinite(row[f"{name}_{end}"]):
                assert number(theirs) == pytest.approx(row[f"{name}_{end}"], rel=EXACT), f"{name}_{end}"
    for name, theirs in zip(("saving", "saving_low", "saving_high"), (seen["saving"], *seen["saving_interval"]), strict=True):
        if np.isfinite(row[name]):
            assert 1 - number(theirs) == pytest.approx(1 - row[name], rel=EXACT, abs=2 * EXACT), name


@pytest.fixture(scope="module")
def studies():
    """Llama-3's heads among the runs; by the head law alone; not known at all; and laws that bend as much as may be."""
    table = report_fakes.loss_table()
    fixed = table[table["n_heads"].notna()]
    wide = {heads: law for heads, law in report_fakes.GRID.items() if heads.n_kv_heads in (1, 8)}
    return [
        report_fakes.study(table, more=False),
        report_fakes.study(report_fakes.loss_table(wide), more=False),
        report_fakes.study(fixed[fixed["n_kv_heads"] == 1], more=False),
        report_fakes.study(table, more=False, bent=True),
    ]


@in_node
class TestPoints:
    def test_every_number_of_the_map_is_pythons(self, studies, tmp_path):
        """All heads, costs and devices; what is not reached or not served too."""
        served = 0
        for study in studies[:2]:
            found = study.answer_map
            questions = found.rows.groupby(["objective", "context_served", "loss"], sort=False)
            asked = [asked_of(found, *key) for key, _ in questions]
            seen = explorer_node.run(tmp_path, [study], LOOK, {"study": 0, "asked": asked})
            for (_, frame), result in zip(questions, seen, strict=True):
                assert result["exact"]
                rows = rows_of(frame, study.laws)
                guess = result["best"] is None or result["rows"][result["best"]]["far"]
                for row, one in zip(rows.to_dict("records"), result["rows"], strict=True):
                    compare(row, one)
                    assert np.isfinite(number(one["cost"])) == np.isfinite(row["cost"])
                    if not guess:
                        assert number(one["probability"]) == pytest.approx(row["probability"], abs=EXACT)
                    else:
                        assert np.isnan(number(one["probability"]))
                    assert number(one["expected_regret"]) == pytest.approx(row["expected_regret"], abs=2 * EXACT)
                    if one["served"] and isinstance(row["layout"], str):
                        served += 1
                        for name in answer_map.SERVED:
                            if np.isfinite(row[name]):
                                assert number(one["served"][name]) == pytest.approx(row[name], rel=EXACT)
                        assert one["served"]["decode_limit"] == words.LIMITS[row["decode_limit"]]
                best = frame.iloc[0]
                if np.isfinite(best["cost"]):
                    assert result["rows"][result["best"]]["cost"] == pytest.approx(best["cost"], rel=EXACT)
                else:
                    assert result["best"] is None
        assert served > 20

    def test_between_a_guess_and_an_answer_what_is_no_guess_has_a_probability(self, tmp_path):
        study = report_fakes.study(report_fakes.loss_table(), more=False, points=([2.4, 2.46], [131_072]))
        asked = [asked_of(study.answer_map, "z", 131_072, loss) for loss in (2.4, 2.455)]
        guess, answer = explorer_node.run(tmp_path, [study], LOOK, {"study": 0, "asked": asked})
        assert guess["rows"][guess["best"]]["far"]
        assert not answer["rows"][answer["best"]]["far"]
        assert all(np.isnan(number(one["probability"])) for one in guess["rows"])
        assert sum(number(one["probability"]) for one in answer["rows"]) == pytest.approx(1, abs=0.01)

    def test_what_is_not_served_has_no_cost_and_no_number_is_nan_on_screen(self, tmp_path):
        goal = objectives.make("latency", device="v5e")
        study = report_fakes.study(
            report_fakes.loss_table(), objective=goal, more=False, points=([2.4, 2.615, 2.9], [8192, 2**20])
        )
        rows = study.answer_map.rows
        refused = rows[(rows["objective"] == "latency@v5e") & np.isinf(rows["cost"])]
        assert len(refused)
        asked = [asked_of(study.answer_map, "latency@v5e", row.context_served, row.loss) for row in refused.itertuples()]
        seen = explorer_node.run(tmp_path, [study], LOOK, {"study": 0, "asked": asked})
        assert any(not np.isfinite(number(one["cost"])) for result in seen for one in result["rows"])
        between = {"goal": ["latency", "v5e"], "context": 100_000, "loss": 2.615}
        (result,) = explorer_node.run(tmp_path, [study], LOOK, {"study": 0, "asked": [between]})
        edges = [one for one in result["rows"] if one["edge"]]
        assert edges  # served at 8K, and not at 1M
        assert all(not np.isfinite(number(one["cost"])) for one in edges)
        assert all(not result["rows"][h]["edge"] for h in [result["best"]] if h is not None)

    def test_without_draws_the_cheapest_by_the_fitted_laws_is_the_answer(self, tmp_path):
        table = report_fakes.loss_table()
        few = table[table["size"].isin(["4x256", "12x768", "32x2048"]) & (table["n_heads"] == 8) & (table["n_kv_heads"] <= 2)]
        study = report_fakes.study(few, loss=2.9, more=False)
        (result,) = explorer_node.run(
            tmp_path, [study], LOOK, {"study": 0, "asked": [asked_of(study.answer_map, "z", 131_072, 2.9)]}
        )
        answer = study.answer
        assert result["rows"][result["best"]]["cost"] == pytest.approx(answer.cost, rel=EXACT)

    def test_texts_are_those_of_python(self, tmp_path):
        shares = [0.0, 1e-6, 0.0123, 0.371, 0.99, 1.37, 9.99, 10.0]
        script = """
            const { moreText, savingText, percent } = gqa;
            return given.map((x) => [moreText(x), savingText(x, 10), savingText(-x, 10), percent(Math.min(x, 1))]);
        """
        said = explorer_node.run(tmp_path, [], script, shares)
        assert said == [
            [words.more(x), formatting.saving(x), formatting.saving(-x), words.percent(min(x, 1.0))] for x in shares
        ]
        ends = [[0.1, 0.2], [-0.3, -0.1], [-0.02, 0.05]]
        said = explorer_node.run(tmp_path, [], "return given.map((x) => gqa.savingBetween(x, 10))", ends)
        assert said == [formatting.saving_between(*one) for one in ends]
        nothing = """
            const { moreText, savingText, savingBetween, size, sizes, range, amount } = gqa;
            const shares = [moreText(NaN), savingText(NaN, 10), savingBetween([NaN, 1], 10)];
            return [...shares, size(NaN), range(sizes([NaN, NaN])), amount(NaN, "seconds"), amount(Infinity, "US dollars")];
        """
        assert explorer_node.run(tmp_path, [], nothing) == [""] * 7

    def test_sizes_and_costs_are_written_as_everywhere(self, tmp_path):
        values = [0.01234, 0.0996, 12.34, 999.4, 999.6, 9999.4, 9999.6, 56_789.0, 2.0234e9, 999.6e6, 1.5e13, 1.5e22]
        units = ["", "FLOPs", "values", "bytes", "seconds", "US dollars"]
        script = "return given[0].map((x) => [gqa.size(x), ...given[1].map((unit) => gqa.amount(x, unit))])"
        said = explorer_node.run(tmp_path, [], script, [values, units])
        assert said == [[formatting.size(x), *(formatting.amount(x, unit) for unit in units)] for x in values]
        ends = [[1.93e9, 2.11e9], [1.93e9, 1e14], [10.0, 2.11e9], [10.0, 1e14], [1.0, 2.0], [1e14, 2e14]]
        said = explorer_node.run(tmp_path, [], "return given.map((x) => [gqa.sizes(x), gqa.amounts(x, 'bytes')])", ends)
        bytes_ = lambda one: formatting.amount(one, "bytes")  # noqa: E731
        assert said == [[formatting.sizes(*one), formatting.interval(*one, bytes_, anything="any cost")] for one in ends]
        script = "return [gqa.amounts([1, Infinity], ''), gqa.sizes([2e9, Infinity]), gqa.amounts([-Infinity, 1], '')]"
        assert explorer_node.run(tmp_path, [], script) == ["at least 1.00", "at least 2.00B", "at most 1.00"]

    def test_interpolation_goes_through_points_and_is_exact_for_cubics(self, tmp_path):
        script = """
            const points = [0, 1, 1.5, 3, 4, 6];
            const cubic = (x) => 2 - x + 0.5 * x * x - 0.1 * x ** 3;
            return given.map((x) => {
              const { cubic: four, line } = gqa.weights(points, x);
              const sum = (pairs, f) => pairs.reduce((total, [i, w]) => total + w * f(points[i]), 0);
              return [sum(four, cubic) - cubic(x), sum(line, (y) => 3 * y + 1) - (3 * x + 1), line.length];
            });
        """
        for x, (curved, straight, count) in zip(
            places := [0, 0.2, 1, 1.2, 2.9, 3, 5.5, 6], explorer_node.run(tmp_path, [], script, places), strict=True
        ):
            assert abs(curved) < 1e-12
            assert abs(straight) < 1e-12
            assert count == (1 if x in (0, 1, 3, 6) else 2)


@in_node
@pytest.mark.slow
def test_between_the_points_numbers_are_within_a_percent_and_the_answer_is_hardly_dearer(tmp_path):
    """A map as a report has it, random questions of all its costs. Where a cost moves in steps the page says so."""
    table = report_fakes.loss_table()
    fitted = report_fakes.study(table, more=False).laws
    study = report_fakes.study(
        table, more=False, devices=("h100",), points=(answer_map.losses_of(fitted, [2.615]), answer_map.contexts_of([131_072]))
    )
    found, generator = study.answer_map, np.random.default_rng(20_261_128)
    below = answer_map.below_all(study.laws, found.losses[0])
    low, high = np.log(found.losses[0] - below), np.log(found.losses[-1] - below)
    names = list(found.goals)
    questions = [
        (
            names[i % len(names)],
            int(generator.choice(found.contexts)) if i % 2 else int(2 ** generator.uniform(10, 20)),
            float(below + np.exp(generator.uniform(low, high))),
        )
        for i in range(QUESTIONS)
    ]
    asked = [asked_of(found, *question) for question in questions]
    seen = explorer_node.run(tmp_path, [study], LOOK, {"study": 0, "asked": asked})
    compared, away = 0, []
    for (name, context, loss), result in zip(questions, seen, strict=True):
        frame = optimum.optimum_map(answer_map.by_law(study.laws), [loss], [context], found.goals[name].objective)
        for row, one in zip(rows_of(frame, study.laws).to_dict("records"), result["rows"], strict=True):
            if one["steps"] or one["edge"] or not np.isfinite(row["cost"]):
                continue
            compared += 1
            assert number(one["cost"]) == pytest.approx(row["cost"], rel=WITHIN), (name, context, loss)
            away.append(abs(number(one["n_params"]) / row["n_params"] - 1))
        regrets = rows_of(frame, study.laws)["expected_regret"].to_numpy()
        if result["best"] is not None and not any(one["edge"] for one in result["rows"]):
            assert regrets[result["best"]] - np.nanmin(regrets) < WITHIN, (name, context, loss)
    assert compared > 0.7 * QUESTIONS * len(found.rows.groupby(["n_heads", "n_kv_heads"], dropna=False))
    # Of shapes, and of sizes with them, many are about as good: the best may jump from one to another.
    assert np.quantile(away, 0.95) < WITHIN
    assert max(away) < 4 * WITHIN


# In a browser


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

    def opened(path=page, **options):
        chromium.open(path, **options)
        chromium.run("while (!globalThis.gqa) await new Promise((resolve) => setTimeout(resolve, 20))")
        return chromium

    return opened


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


ASKED = "const { context, loss, goal } = gqa.query(); return { context, loss, cost: goal.cost, device: goal.device }"
NO_NUMBER = ("NaN", "Infinity", "undefined", "null", "[object")


class TestPage:
    pytestmark = in_browser

    def test_it_opens_with_pythons_answer_and_says_nothing_on_the_console(self, explorer, studies):
        chromium = explorer()
        answer = studies[0].answer
        assert in_words(answer.heads, 64) in text(chromium, "sentence")
        assert in_words(answer.heads, 64) in chromium.run("return document.querySelector('h1').innerText")
        assert text(chromium, "fact-probability") == words.percent(answer.probability)
        assert text(chromium, "fact-params") == formatting.size(answer.n_params)
        assert text(chromium, "fact-params-range") == f"95%: {formatting.sizes(*answer.n_params_interval)}"
        assert text(chromium, "fact-shape") == words.shape(answer.n_layers, answer.d_model)
        assert text(chromium, "fact-cost") == formatting.amount(answer.cost, "")
        between = formatting.interval(*answer.cost_interval, lambda one: formatting.amount(one, ""))
        assert text(chromium, "fact-cost-range") == f"95%: {between}"
        assert text(chromium, "fact-runner-up") == words.label(answer.runner_up)
        more = words.more(answer.regret_of_runner_up - answer.expected_regret)
        assert text(chromium, "fact-runner-up-range") == f"costs {more} on average"
        rows = chromium.run("return [...document.querySelectorAll('#ranking tr th')].map((cell) => cell.innerText)")
        assert rows == [words.label(Heads.of(row.n_heads, row.n_kv_heads)) for row in answer.candidates.itertuples()]
        assert chromium.run("return [...document.querySelectorAll('#ranking tr')].map((row) => row.className)")[0] == "best"
        assert chromium.run("return [...document.querySelectorAll('.chart svg')].length") == 2
        assert chromium.console() == []

    def test_every_choice_gives_an_answer_without_a_word_on_the_console(self, explorer):
        chromium = explorer()
        for element in ("cost", "device", "study", "cost", "device"):
            values = chromium.run("return [...document.getElementById(arguments[0]).options].map((one) => one.value)", element)
            for value in values:
                set_to(chromium, element, value)
                assert text(chromium, "sentence")
                shown = chromium.run("return document.body.innerText")
                assert not [one for one in NO_NUMBER if one in shown]
        assert chromium.console() == []

    def test_no_number_is_missing_on_screen_anywhere(self, explorer):
        """A hundred questions of every study: between points, at the edges of what is served and of what was drawn."""
        chromium = explorer()
        script = """
          const said = [];
          for (let i = 0; i < 100; i++) {
            for (const name of ["study", "cost", "device", "context", "loss"]) {
              const input = document.getElementById(name);
              const share = (i * (0.1 + 0.618034 * (1 + name.length))) % 1;
              if (input.options) {
                const open = [...input.options].filter((one) => !one.disabled);
                if (open.length) input.value = open[Math.floor(share * open.length)].value;
              } else {
                const [low, high] = [Number(input.min), Number(input.max)];
                input.value = String(name === "context" ? Math.round(low * (high / low) ** share) : low + share * (high - low));
              }
              input.dispatchEvent(new Event("input", { bubbles: true }));
            }
            const drawn = [...document.querySelectorAll(".chart")].map((one) => one.innerHTML).join();
            const text = document.getElementById("explorer").innerText + drawn;
            for (const bad of arguments[0]) {
              const at = text.indexOf(bad);
              if (at >= 0) said.push([bad, text.slice(Math.max(0, at - 80), at + 20)]);
            }
            const row = document.querySelector("#ranking tr");
            if (row.className === "best" && row.children[2].innerText !== "the answer") said.push(row.innerText);
          }
          return said;
        """
        assert chromium.run(script, NO_NUMBER) == []
        assert chromium.console() == []

    def test_a_device_is_asked_of_costs_that_are_of_one(self, explorer):
        chromium = explorer()
        shown = "return document.getElementById('device').checkVisibility()"
        assert not chromium.run(shown)
        set_to(chromium, "cost", "latency")
        assert chromium.run(shown)
        set_to(chromium, "device", "v5e")
        assert chromium.run(ASKED)["device"] == "v5e"
        set_to(chromium, "cost", "memory")
        assert not chromium.run(shown)
        assert chromium.run(ASKED)["device"] is None

    def test_the_command_asks_the_same_question(self, explorer, studies):
        """The command line of the page, parsed by the program."""
        chromium = explorer()
        for element, value in (
            ("cost", "flops"), ("context", 70_000), ("loss", 2.7), ("cost", "price"), ("device", "v5e"), ("cost", "memory"),
        ):  # fmt: skip
            set_to(chromium, element, value)
            line = text(chromium, "command")
            assert line.startswith("python -m launch optimum GRID ")
            given = vars(launch.parser().parse_args(shlex.split(line)[3:]))
            asked = chromium.run(ASKED)
            assert (given["context"], given["loss"]) == (asked["context"], asked["loss"])
            name = "@".join(filter(None, (asked["cost"], asked["device"])))
            goal = studies[0].answer_map.goals[name].objective
            assert asked_for(given).describe() == goal.describe(), line

    def test_the_command_keeps_what_was_asked_of_how_it_is_served(self, explorer, tmp_path):
        options = {"device": "h100", "n_devices": 8, "disaggregated": True, "ttft": 20.0, "cache_dtype": "float8"}
        goal = objectives.make("price", **options)
        study = report_fakes.study(report_fakes.loss_table(), objective=goal, more=False, options=options)
        path = tmp_path / "index.html"
        path.write_text(report.page(report_fakes.findings(study)), encoding="utf-8")
        chromium = explorer(path)
        answer = study.answer
        assert text(chromium, "served") == " ".join(words.served(answer.candidates.iloc[0], answer.objective["serving"]))
        for element, value in ((None, None), ("cost", "latency"), ("device", "v5e"), ("cost", "z")):
            if element:
                set_to(chromium, element, value)
            given = vars(launch.parser().parse_args(shlex.split(text(chromium, "command"))[3:]))
            asked = chromium.run(ASKED)
            found = study.answer_map.goals["@".join(filter(None, (asked["cost"], asked["device"])))]
            assert asked_for(given).describe() == found.objective.describe()
        assert text(chromium, "served") == ""
        assert chromium.console() == []

    def test_a_command_is_copied(self, explorer):
        chromium = explorer()
        chromium.driver.find_element("id", "copy").send_keys(Keys.ENTER)
        chromium.run("await new Promise((resolve) => setTimeout(resolve, 200))")
        assert text(chromium, "copy") in ("Copied", "Selected")

    def test_a_link_opens_its_question(self, explorer):
        chromium = explorer(fragment="ask:context=8192&loss=2.8&cost=latency&device=v5e&nonsense=1&lam=7")
        assert chromium.run(ASKED) == {"context": 8192, "loss": 2.8, "cost": "latency", "device": "v5e"}
        set_to(chromium, "loss", 2.75)
        chromium.run("await new Promise((resolve) => setTimeout(resolve, 1200))")
        address = chromium.run("return location.hash")
        assert "loss=2.75" in address
        again = explorer(fragment=address.removeprefix("#"))
        assert again.run(ASKED) == {"context": 8192, "loss": 2.75, "cost": "latency", "device": "v5e"}
        again = explorer(fragment="ask:context=&loss=nonsense&cost=nothing&device=")
        assert again.run(ASKED) == {"context": 131_072, "loss": 2.615, "cost": "z", "device": None}

    def test_what_can_not_be_served_is_said(self, explorer, tmp_path):
        study = report_fakes.study(report_fakes.loss_table(), more=False, points=([2.3, 2.615, 2.9], [8192, 131_072, 2**20]))
        path = tmp_path / "index.html"
        path.write_text(report.page(report_fakes.findings(study)), encoding="utf-8")
        chromium = explorer(path)
        for element, value in (("cost", "latency"), ("device", "v5e"), ("context", 2**20), ("loss", 2.3)):
            set_to(chromium, element, value)
        assert "but not as asked: no model of these heads can be served so." in text(chromium, "sentence")
        assert "not served" in text(chromium, "ranking")
        assert text(chromium, "served") == ""
        for element, value in (("loss", 2.615), ("context", 400_000)):
            set_to(chromium, element, value)
        assert "at the edge of what can be served so" in text(chromium, "explorer-warnings")
        assert chromium.console() == []

    def test_a_cell_of_the_map_opens_its_question(self, explorer, tmp_path):
        path = tmp_path / "index.html"
        path.write_text(report.page(report_fakes.findings()), encoding="utf-8")
        chromium = explorer(path)
        chromium.driver.find_element("css selector", ".map tbody tr:first-child td:nth-child(2) a").send_keys(Keys.ENTER)
        chromium.run("await new Promise((resolve) => setTimeout(resolve, 200))")
        asked = chromium.run(ASKED)
        assert (asked["loss"], asked["context"]) == (3.0, 8192)
        assert text(chromium, "sentence").startswith("Served at 8K tokens, a loss of 3 ")
        assert chromium.console() == []


class TestCharts:
    pytestmark = in_browser

    def test_no_two_heads_share_a_colour_and_the_answer_stands_out(self, explorer, studies):
        chromium = explorer()
        lines = chromium.run(
            "return [...document.querySelectorAll('#chart-curves polyline')]"
            ".map((one) => [one.getAttribute('stroke'), Number(one.getAttribute('stroke-width'))])"
        )
        halo, widths = lines[-2], dict([*lines[:-2], lines[-1]])
        assert len(widths) == len(lines) - 1 == len(studies[0].answer_map.rows.groupby(["n_heads", "n_kv_heads"], dropna=False))
        assert halo[1] > max(widths.values()) == lines[-1][1]
        said = chromium.run("return document.getElementById('chart-curves').textContent")
        assert f"{words.label(studies[0].answer.heads)}, the answer" in said
        assert words.label(LLAMA3) in said

    def test_axes_say_where_cheaper_is_and_bars_what_they_hold(self, explorer):
        chromium = explorer()
        for chart in ("curves", "costs"):
            assert "\u2190 cheaper" in text(chromium, f"chart-{chart}")
            assert "95% of the draws" in text(chromium, f"{chart}-caption")
        bars = "return document.querySelectorAll('#chart-costs g').length === document.querySelectorAll('#ranking tr').length"
        assert chromium.run(bars)

    def test_curves_have_no_kinks(self, explorer):
        """Neighbouring pieces of a curve turn by little: shapes are free, not of a table."""
        chromium = explorer()
        script = """
          const map = gqa.studies[0].map;
          const losses = Array.from({ length: 60 }, (_, i) => 2.52 + 0.008 * i);
          return gqa.costCurves(map, gqa.query(), losses);
        """
        for curve in chromium.run(script):
            slope = np.diff(np.log(curve))
            assert (np.abs(np.diff(slope)) < 0.12 * np.abs(slope[1:])).all()


class TestKeyboard:
    pytestmark = in_browser

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
        press(chromium, Keys.ARROW_LEFT)
        assert chromium.run("return document.getElementById('context').value") == "65536"
        assert "64K tokens" in text(chromium, "sentence")
        assert chromium.run("return document.activeElement.getAttribute('aria-valuetext')") == "64K tokens"
        assert text(chromium, "live") == before  # not while keys are pressed
        chromium.run("await new Promise((resolve) => setTimeout(resolve, 1200))")
        assert "64K tokens" in text(chromium, "live")
        assert "Probability" in text(chromium, "live")
        press(chromium, Keys.TAB)
        assert focused(chromium) == "context"
        press(chromium, Keys.TAB, Keys.HOME)
        assert focused(chromium) == "loss-slider"
        low = chromium.run("return gqa.studies[0].map.losses[0]")
        assert chromium.run("return gqa.query().loss") == low
        press(chromium, Keys.END)
        assert chromium.run("return gqa.query().loss") == chromium.run("return gqa.studies[0].map.losses.at(-1)")
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
        low, high = chromium.run("return [gqa.studies[0].map.losses[0], gqa.studies[0].map.losses.at(-1)]")
        assert text(chromium, "loss-problem") == f"a number from {low:.3f} to {high:.3f}"
        assert field.get_attribute("aria-invalid") == "true"
        assert chromium.run("return gqa.query().loss") == 2.75  # the last that could be asked
        context = chromium.driver.find_element("id", "context")
        context.send_keys(Keys.CONTROL, "a")
        context.send_keys("10000.5")
        assert text(chromium, "context-problem") == "a whole number from 8,192 to 131,072"
        chromium.driver.find_element("id", "reset").send_keys(Keys.ENTER)
        assert chromium.run("return gqa.query().loss") == 2.615
        assert text(chromium, "loss-problem") == ""
        assert field.get_attribute("aria-invalid") is None
        assert chromium.console() == []

    def test_choices_are_made_by_keys(self, explorer):
        chromium = explorer()
        chromium.driver.find_element("id", "cost").send_keys("price")
        assert chromium.run("return gqa.query().goal.cost") == "price"
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
        assert len(sliders) == len(set(sliders)) >= 2
        levels = chromium.run("return [...document.querySelectorAll('h1, h2, h3')].map((one) => Number(one.tagName[1]))")
        assert levels[0] == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


class TestScreens:
    pytestmark = in_browser

    @pytest.mark.parametrize("width", [360, 768, 1280])
    def test_nothing_scrolls_sideways(self, explorer, width):
        chromium = explorer(width=width, height=740)
        for cost in ("z", "price"):
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
            "return [backgroundColor, color, getComputedStyle(document.querySelector('.chart svg')).filter]"
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
        names = ["paper", "wash", "ink", "muted", "accent", "care", "care-wash", "best", "best-wash"]
        colors = chromium.run(
            "const probe = document.body.appendChild(document.createElement('span'));"
            "return Object.fromEntries(arguments[0].map((name) => {"
            "  probe.style.color = `var(--${name})`;"
            "  return [name, getComputedStyle(probe).color.match(/\\d+/g).map(Number)];"
            "}));",
            names,
        )
        pairs = [(name, "paper") for name in ("ink", "muted", "accent", "best")]
        for front, back in [
            *pairs,
            ("care", "care-wash"),
            ("ink", "care-wash"),
            ("ink", "wash"),
            ("ink", "best-wash"),
            ("muted", "best-wash"),
        ]:
            assert contrast(colors[front], colors[back]) >= 4.5, (front, back)

    def test_charts_are_as_wide_as_their_place_also_when_it_changes(self, explorer):
        chromium = explorer(width=1280)
        chromium.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        )
        chromium.run("await new Promise((resolve) => setTimeout(resolve, 400))")
        wide = (
            "return [...document.querySelectorAll('.chart')]"
            ".map((one) => [one.clientWidth, Number(one.firstChild.getAttribute('width'))])"
        )
        assert all(outer == inner for outer, inner in chromium.run(wide))

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
