"""The page: findings as parts of text, tables and pictures, and these as one HTML file in a folder with its tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import jinja2
from etils import epath
from markupsafe import Markup

from gqa_jax import formatting, storage
from gqa_jax.search import shape_rule
from gqa_jax.search.answer import ShapeChoice
from gqa_jax.search.objectives import OBJECTIVES
from gqa_jax.search.roofline import RooflineServing
from gqa_jax.search.shape_rule import BEST
from gqa_jax.search.words import ratio_of_runs
from launch.report import answer_map, sections, words
from launch.report.answer_map import DRAWS
from launch.report.findings import Findings, Study
from launch.report.opening import opening


def page(findings: Findings) -> str:
    """The whole page as HTML: nothing that it shows or runs is outside of it."""
    return render(findings, sections.parts(findings))


def write(folder: epath.Path, findings: Findings) -> epath.Path:
    """Writes index.html, and NAME.md and NAME.tex of every table, into a folder; returns the path of the page.

    Each file is whole or not there, and the page comes last. The folder may be on local disk or on gs://.
    """
    parts = sections.parts(findings)
    html = render(findings, parts)
    folder.mkdir(parents=True, exist_ok=True)
    for table in sections.tables_of(parts):
        storage.write_bytes(folder / f"{table.name}.md", table.markdown().encode())
        storage.write_bytes(folder / f"{table.name}.tex", table.latex().encode())
    storage.write_bytes(folder / "index.html", html.encode())
    return folder / "index.html"


def render(findings: Findings, parts: Sequence[sections.Part]) -> str:
    """The page of parts that are made."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("launch.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    maps = [study.answer_map for study in findings.studies]
    goals = [goal for one in maps for goal in one.goals.values()]
    costs = {goal.objective.name: goal.objective for goal in goals}
    servings = {goal.device: goal.objective.serving for goal in goals if goal.device is not None}
    data = {"studies": [_study(study) for study in findings.studies], "command": findings.ask}
    data |= _shapes(findings.studies[0])
    return environment.get_template("page.html").render(
        findings=findings,
        opening=opening(findings),
        parts=parts,
        draws=f"{DRAWS:,}",
        map_draws=f"{maps[0].draws:,}",
        same="the same" if maps[0].draws == DRAWS else f"the same but for chance (the command takes {DRAWS:,} draws)",
        **_of_shapes(findings.studies[0].answer.shape),
        largest_regret=f"{formatting.LARGEST_REGRET:.0%}",
        head_dim=f"{findings.studies[0].laws.head_dim:g}",
        contexts=[(i, f"{formatting.context(study.laws.context)} tokens") for i, study in enumerate(findings.studies)],
        points=f"{len(maps[0].losses)} losses, {len(maps[0].contexts)} contexts and {len(maps[0].goals)} costs",
        costs=[(cost, costs[cost].choice) for cost in OBJECTIVES if cost in costs],
        devices=[(name, _device_text(one)) for name, one in servings.items()],
        style=_inline("style.css"),
        payload=_json(data),
        script=Markup("".join(_scripts())),
    )


def _study(study: Study) -> dict[str, Any]:
    """What the explorer knows of a study: the map, and what was asked first."""
    answer, goal = study.answer, next(iter(study.answer_map.goals.values()))
    first = {
        "context": answer.context_served,
        "loss": answer.loss,
        "cost": goal.objective.name,
        "device": goal.device,
    }
    return {"map": answer_map.packed(study.answer_map, study.laws), "first": first, "context_trained": int(study.laws.context)}


def _of_shapes(shape: ShapeChoice) -> dict[str, str]:
    """How shapes are chosen, and what they cost in loss: sentences of the method."""
    low, high = (f"{bound:.0f}" for bound in shape.bounds)
    if shape.rule == BEST:
        how = f"Each draw takes the ratio of width to layers of least cost, from {low} to {high}."
    elif shape.rule in shape_rule.WORDS:
        how = f"The ratio of width to layers is {words.rule(shape.rule)}, and models of a size have the loss of its law."
        return {"shapes": how, "priced": ""}
    else:
        how = f"The ratio of width to layers is {shape.rule}, as asked."
    k, best = (
        formatting.interval(*shape.k_interval, "{:.2g}".format),
        formatting.interval(*shape.best_interval, "{:.0f}".format),
    )
    priced = (
        f"A ratio r other than that of the runs, {ratio_of_runs(shape)}, changes the loss: k = {shape.k:.2g} (95%: "
        f"{k}) and the best ratio c = {shape.best:.0f} (95%: {best}) are drawn too, from {shape.source}."
    )
    return {"shapes": how, "priced": priced}


def _shapes(study: Study) -> dict[str, str]:
    """How shapes are chosen, and what savings are against, in the explorer: no model that was measured."""
    rule = study.answer.shape.rule
    against = "by their law, shaped as the trained sizes" if rule == BEST else "by their law"
    return {"shapes": words.rule(rule), "against": against}


def _device_text(one: RooflineServing) -> str:
    count = "" if one.n_devices == 1 else f"{one.n_devices} x "
    price = f", ${one.usd:.2f}/h" if one.has_price else ""
    room, peak = formatting.gb(one.chip.server_bytes), one.chip.peak_flops / 1e12
    return f"{count}{one.chip.name}: {room}{price}, {peak:.0f} TFLOP/s, {one.chip.memory_bandwidth / 1e12:.2f} TB/s"


def _file(name: str) -> str:
    return (resources.files("launch.report") / name).read_text(encoding="utf-8")


def _inline(name: str) -> Markup:
    """A file of this package, to be put into an element whose text is not escaped."""
    text = _file(name)
    assert not any(end in text for end in ("</script", "</style", "<!--")), f"{name} would end its element"
    return Markup(text)


def _scripts() -> Iterator[str]:
    """The scripts as one module: a page has no second file to import from."""
    for name in ("explorer.js", "numbers.js", "charts.js", "page.js"):
        yield from (line for line in _inline(name).splitlines(keepends=True) if not line.startswith("import "))


def _json(data: dict) -> Markup:
    """JSON that is safe inside a script element."""
    return Markup(json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))
