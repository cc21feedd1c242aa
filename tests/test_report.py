"""The report's page, files, tables and words, without a browser."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from gqa_jax import hardware, laws
from gqa_jax.laws import LLAMA3, Heads, bends, posterior
from gqa_jax.search import objectives, optimum
from launch import report
from launch.grid import Layout
from launch.report import Picture, pictures, sections, tables, words
from launch.report.payload import DRAWS, payload
from launch.report.table import Column, Table
from tests import gcs, report_fakes


class Page(HTMLParser):
    """Text of elements by id and by tag, and every attribute."""

    void = frozenset({"meta", "link", "input", "br", "col", "path", "use"})

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.attributes, self.text, self.unclosed = [], [], [], {}, []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.attributes += [(tag, *pair) for pair in attrs]
        if "id" in values:
            self.ids.append(values["id"])
        if tag not in self.void:
            self.open.append((tag, values.get("id")))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in self.void:
            return
        found, _ = self.open.pop()
        if found != tag:
            self.unclosed.append((found, tag))

    def handle_data(self, data):
        for tag, name in self.open:
            for key in {tag, name} - {None}:
                self.text[key] = self.text.get(key, "") + data


@pytest.fixture(scope="module")
def study():
    return report_fakes.study(report_fakes.loss_table())


@pytest.fixture(scope="module")
def findings(study):
    cells = pd.DataFrame([{"cell": "s1-t8192-h8-1-deadbeef", "state": "failed", "cause": "out of <memory> & time"}])
    return report_fakes.findings(
        study, cells=cells, unfitted={1024: "heads (8,1): 2 sizes have finished, a law needs 3 or more"}
    )


@pytest.fixture(scope="module")
def html(findings):
    return report.page(findings)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


class TestPage:
    def test_it_opens_with_the_answer_its_number_and_its_certainty(self, page, study):
        answer = study.questions[0].answer
        assert page.text["h1"].startswith(
            "Served at 128K tokens, a loss of 2.615 costs least with 8 query heads and 1 key/value head"
        )
        opening = page.text["answer"]
        for said in (
            words.long(answer.n_params),
            words.percent(answer.probability),
            f"95%: {words.span(answer.n_params_interval, words.short)}",
            f"95%: {words.span(answer.saving_interval, words.tenths)}",
            words.label(answer.runner_up),
            "Based on 64 runs of 8 sizes and 8 head configurations.",
        ):
            assert said in opening
        for warning in answer.warnings:
            assert words.sentence(warning) in opening

    def test_it_is_one_well_formed_file_that_needs_no_network(self, html, page):
        assert page.unclosed == []
        assert len(page.ids) == len(set(page.ids))
        assert len(html.encode()) < 5e6
        for tag, name, value in page.attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                assert value.startswith(("#", "data:")), (tag, name, value)
        policy = next(v for tag, n, v in page.attributes if tag == "meta" and n == "content" and "default-src" in v)
        assert "default-src 'none'" in policy
        assert "unsafe-eval" not in policy
        for anchor in (value[1:] for tag, name, value in page.attributes if (tag, name) == ("a", "href")):
            assert anchor in page.ids or anchor.startswith("ask:")

    def test_every_part_is_there_and_in_the_contents(self, page):
        for part in ("answer", "explorer", "questions", "runs", "laws", "costs", "provenance", "method"):
            assert part in page.ids
            assert ("a", "href", f"#{part}") in page.attributes

    def test_what_comes_from_outside_is_text(self, study):
        table = report_fakes.loss_table()
        table["commit"] = "</script><b>x"
        html = report.page(report_fakes.findings(study, table=table, name="<img src=x onerror=alert(1)>", about="a & b"))
        assert "<img src=x" not in html
        assert "<b>x" not in html
        assert "a &amp; b." in html
        assert Page(html).unclosed == []

    def test_failed_cells_and_contexts_without_laws_are_said(self, page):
        assert "s1-t8192-h8-1-deadbeef" in page.text["runs"]
        assert "out of <memory> & time" in page.text["runs"]
        assert "Trained at 1K tokens: no laws, because heads (8,1): 2 sizes have finished" in page.text["laws"]

    def test_numbers_come_with_their_uncertainty(self, page, study):
        intervals = study.laws.intervals().iloc[0]
        assert words.span((intervals["b_low"], intervals["b_high"]), "{:.4f}".format) in page.text["laws"]
        assert "degrees of freedom" in page.text["laws"]
        assert f"Ranges: {posterior.PROFILES}." in page.text["laws"]
        assert posterior.NOISE_MODELS["posterior"] in page.text["answer"]
        assert "± 0.0020" in page.text["runs"]

    def test_several_training_contexts_are_kept_apart(self, study):
        other = report_fakes.study(report_fakes.loss_table(context=2048), more=False)
        table = pd.concat([report_fakes.loss_table(), report_fakes.loss_table(context=2048)])
        page = Page(report.page(report_fakes.findings(study, other, table=table)))
        assert len(page.ids) == len(set(page.ids))
        assert "Trained at 2K tokens" in page.text["laws"]
        assert "trained at 8K and 2K tokens" in page.text["answer"]
        assert "study" in page.ids

    def test_as_many_coefficients_as_runs_give_an_answer_without_certainty(self):
        table = report_fakes.loss_table()
        few = table[table["size"].isin(["4x256", "12x768", "32x2048"]) & (table["n_heads"] == 8) & (table["n_kv_heads"] == 1)]
        study = report_fakes.study(few, loss=2.9, more=False)
        assert np.isnan(study.questions[0].answer.probability)
        assert payload(study)["draws"] is None
        page = Page(report.page(report_fakes.findings(study, table=few)))
        assert "Certainty" in page.text["answer"]
        assert "unknown" in page.text["answer"]
        assert "nan" not in re.sub(r"[a-z]*nan[a-z]+", "", page.text["main"].lower())

    def test_how_the_answer_is_served_is_said_with_its_efficiencies_and_its_price(self):
        goal = objectives.make("price", device="h200", n_devices=4)
        study = report_fakes.study(report_fakes.loss_table(), objective=goal)
        answer, serving = study.questions[0].answer, goal.serving.describe()
        made = report_fakes.findings(study)
        page = Page(report.page(made))
        said = words.served(answer.candidates.iloc[0], serving)
        for sentence in said:
            assert sentence in page.text["answer"]
        assert serving["efficiency"]["source"] in " ".join(said)
        assert serving["price"] in said[-1]
        (table,) = [one for one in sections.tables_of(sections.parts(made)) if one.name == "serving-t8192"]
        assert len(table.rows) == len(answer.candidates)
        assert "added by shared key/value heads" in table.headings
        assert f"{answer.candidates['batch'].iloc[0]:,.0f}" in table.rows[0]
        assert table.latex().isascii()

    def test_heads_that_can_not_be_served_have_no_costs(self):
        goal = objectives.make("latency", device="v5e")
        table = report_fakes.loss_table()
        study = report_fakes.study(table, context=262_144, objective=goal)
        answer = study.questions[0].answer
        refused = answer.candidates[~np.isfinite(answer.candidates["cost"])]
        assert 0 < len(refused) < len(answer.candidates)
        shown = tables.candidates(study)
        for row in shown.rows[-len(refused) :]:
            assert row[shown.headings.index("time of a request")] == "not served"
        assert "of each v5e" in shown.notes[-1]
        assert words.served(refused.iloc[0], goal.serving.describe()) == []
        page = Page(report.page(report_fakes.findings(study)))
        assert "nan" not in re.sub(r"[a-z]*nan[a-z]+", "", page.text["main"].lower())

    def test_a_question_that_can_not_be_served_is_no_loss_out_of_reach(self):
        goal = objectives.make("latency", device="v5e", batch=64)
        laws_known = report_fakes.study(report_fakes.loss_table(), more=False)
        frame = optimum.optimum_map(laws_known.laws, [2.5, 1.9], [8192, 1_048_576], goal, aspect=laws_known.aspect)
        study = dataclasses.replace(laws_known, objective=goal, optimum_map=frame)
        rows = dict(sections.parts(report_fakes.findings(study))[0].blocks[0].map.rows)
        assert [cell.text for cell in rows["2.5"]][1] == "not served"
        assert {cell.text for cell in rows["1.9"]} == {"not reached"}

    def test_laws_without_runs_are_shown_without_them(self, study):
        page = Page(report.page(report_fakes.findings(study, table=report_fakes.loss_table().iloc[:0])))
        assert "runs" not in page.ids

    def test_nothing_to_say_is_an_error(self):
        with pytest.raises(ValueError, match="trained at 128: 2 sizes only"):
            report.Findings("n", "a", [], report_fakes.loss_table(), unfitted={128: "2 sizes only"})
        with pytest.raises(ValueError, match="one question or more"):
            dataclasses.replace(report_fakes.study(report_fakes.loss_table(), more=False), questions=[])


class TestPayload:
    def test_draws_are_the_bits_of_the_laws(self, study):
        data = json.loads(json.dumps(payload(study), allow_nan=False))
        known = optimum.coefficients(study.laws, DRAWS)
        assert [one["n_heads"] for one in data["heads"]] == [one.n_heads for one in known.heads]
        for name, matrix in (("entropy", known.draws.entropy_SxH), ("log_a", known.draws.log_a_SxH), ("b", known.draws.b_SxH)):
            found = np.frombuffer(base64.b64decode(data["draws"][name]), "<f8").reshape(len(matrix), -1)
            np.testing.assert_array_equal(np.broadcast_to(found, matrix.shape), matrix)
            assert found.shape[1] == (1 if name == "entropy" else matrix.shape[1])  # E, which all share, once
        bent = data["draws"]["bends"]
        assert (bent["center"], bent["reach"]) == (known.draws.bends.center, known.draws.bends.reach)
        for name in ("kind", "amount", "place"):
            found = np.frombuffer(base64.b64decode(bent[name]), "<f8")
            np.testing.assert_array_equal(found, getattr(known.draws.bends, f"{name}_S"))
        assert [bent["kinds"].index(name) for name in ("none", "drift", "break")] == [bends.NONE, bends.DRIFT, bends.BREAK]
        assert data["heads"][data["baseline"]]["label"] == "(d/64,8)"
        assert data["point"]["b"][0] == study.laws[Heads(*known.heads[0])].b

    def test_the_slider_reaches_every_question_and_stays_above_the_entropy(self, study):
        low, high = payload(study)["ranges"]["loss"]
        assert max(law.entropy for law in study.laws.values()) < low <= study.questions[0].loss <= high

    def test_an_objective_of_its_own_is_what_the_explorer_begins_with(self):
        goal = objectives.make("latency", device="v5e", batch=4, cache_dtype="int8", n_devices=2)
        data = payload(report_fakes.study(report_fakes.loss_table(), objective=goal, more=False))
        assert data["defaults"]["cost"] == "latency"
        assert data["defaults"]["cache_dtype"] == "int8"
        assert data["objectives"]["latency"] == goal.describe()
        assert data["objectives"]["price"]["serving"] == goal.serving.describe()  # the others are served alike
        assert set(data["devices"]) == set(hardware.CHIPS)
        assert data["devices"]["h100"]["collective_seconds"] == [[2, hardware.CHIPS["h100"].collective_seconds(2)]]
        goal = objectives.make("latency", device="v5e", n_devices=16, parallelism="4,4,1")
        data = payload(report_fakes.study(report_fakes.loss_table(), objective=goal, more=False))
        assert "h100" not in data["devices"]  # no host has so many
        assert data["layouts"] == ["best", "tensor", "4,4,1"]
        goal = objectives.make("train", tokens_per_param=100.0)
        assert payload(report_fakes.study(report_fakes.loss_table(), objective=goal, more=False))["objectives"]["train"]


class TestFiles:
    def test_the_page_and_its_tables_are_written(self, findings, tmp_path):
        path = report.write(Layout(tmp_path), findings)
        assert path == tmp_path / "report" / "index.html"
        names = {one.name for one in path.parent.iterdir()}
        for stem in ("optimum-t8192", "candidates-t8192", "laws-t8192", "loss-t8192", "sensitivity-t8192", "unfinished"):
            assert {f"{stem}.md", f"{stem}.tex"} <= names
        assert "| (8,1) |" in (path.parent / "laws-t8192.md").read_text()
        assert not [name for name in names if name.endswith(".tmp")]
        before = path.read_bytes()
        report.write(Layout(tmp_path), findings)
        assert path.read_bytes() == before

    def test_gs_is_written_like_a_disk(self, findings):
        from gqa_jax import storage

        with gcs.emulator():
            path = report.write(Layout(storage.path(f"gs://{gcs.BUCKET}/grid")), findings)
            assert b"<!doctype html>" in storage.read_bytes(path)
            assert storage.read_bytes(path.parent / "laws-t8192.tex").startswith(b"\\begin{table}")


class TestTables:
    frame = pd.DataFrame({"n": [1, 2], "s": ["a|b", "50% & more_{x}"], "empty": ["", ""]})
    columns = (
        Column("n", lambda row: str(row.n)),
        Column("s", lambda row: row.s, "left"),
        Column("empty", lambda row: row.empty),
    )

    def test_markdown(self):
        text = Table.of(self.frame, self.columns, "name", "Caption.", ["A note."]).markdown()
        assert text == "Caption.\n\n| n | s |\n| ---: | --- |\n| 1 | a\\|b |\n| 2 | 50% & more_{x} |\n\nA note.\n"

    def test_latex_is_ascii_and_escaped(self, findings):
        text = Table.of(self.frame, self.columns, "name", "Caption.").latex()
        assert r"2 & 50\% \& more\_\{x\} \\" in text
        assert r"\begin{tabular}{rl}" in text
        for table in sections.tables_of(sections.parts(findings)):
            assert table.latex().isascii(), table.name
            assert table.latex().count(r"\\") == len(table.rows) + 1

    def test_empty_columns_are_left_out(self):
        assert Table.of(self.frame, self.columns, "name", "Caption.").headings == ("n", "s")


class TestPictures:
    def test_two_in_a_page_do_not_share_ids_and_have_names(self):
        drawn = []
        for prefix in ("a", "b"):
            figure = Figure()
            ax = figure.add_subplot()
            ax.plot([1, 2], [3, 4], marker="o")
            ax.fill_between([1, 2], [3, 4], hatch="//")
            drawn.append(pictures.draw(Picture(figure, 'A "title" <b>', "What it shows."), prefix))
        first, second = (Page(one.svg) for one in drawn)
        assert first.ids
        assert not set(first.ids) & set(second.ids)
        for page in (first, second):
            used = [v[1:] for _, n, v in page.attributes if n in ("xlink:href", "href")]
            used += [name for _, _, value in page.attributes for name in re.findall(r"url\(#([^)]+)\)", value or "")]
            assert used
            assert set(used) <= set(page.ids)
            assert ("svg", "role", "img") in page.attributes
            assert ("svg", "aria-label", 'A "title" <b>. What it shows.') in page.attributes
        assert "<metadata" not in drawn[0].svg
        assert pictures.draw(Picture(figure, "t", "c"), "a") == pictures.draw(Picture(figure, "t", "c"), "a")


class TestWords:
    def test_numbers(self):
        assert [words.short(x) for x in (2.0234e9, 999.6e6, 56_789, 12.34, 0.01234, 1.5e22)] == [
            "2.02B", "1.00B", "56.8k", "12.3", "0.0123", "15.0Z",
        ]  # fmt: skip
        assert words.long(2.0234e9) == "2.02 billion"
        assert [words.percent(x) for x in (0.874, 1.0, 0.9996, 0.0, 0.001)] == ["87%", "100%", ">99%", "0%", "<1%"]
        assert words.share(0.9996) == "more than 99%"
        assert [words.tenths(x) for x in (0.3349, -0.021, -0.0001, float("inf"))] == [
            "33.5%",
            "\u22122.1%",
            "0.0%",
            "not reached",
        ]
        assert words.span((1.9e9, 2.1e9), words.short) == "1.90B to 2.10B"
        assert words.span((1.9e9, np.inf), words.short) == "1.90B or more"
        assert words.span((np.nan, np.nan), words.short) == words.span(None, words.short) == ""
        assert words.cost("US dollars")(0.01234) == "$0.0123"
        assert words.cost("seconds")(12.3) == "12.3 s"

    def test_heads(self):
        assert words.heads(Heads(8, 1)) == "8 query heads and 1 key/value head"
        assert words.heads(LLAMA3, 128) == "one query head per 128 of the width and 8 key/value heads"
        assert [words.label(Heads(8, 1)), words.label(LLAMA3, 128)] == ["(8,1)", "(d/128,8)"]

    def test_sentences(self):
        assert words.sentence("three sizes of an H") == "Three sizes of an H."
        assert words.listed(["a"]) == "a"
        assert words.listed(["a", "b", "c"]) == "a, b and c"
        assert words.counted(1, "run") == "1 run"
        assert words.counted(1200, "run") == "1,200 runs"


def test_known_laws_are_what_the_fakes_say():
    fitted = laws.fit_by_heads(report_fakes.loss_table(noise=0.0))
    assert fitted[Heads(8, 1)].b == pytest.approx(report_fakes.LAWS[Heads(8, 1)][1], rel=1e-4)
