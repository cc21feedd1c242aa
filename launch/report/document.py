"""The page: findings as parts of text, tables and pictures, and these as one HTML file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import resources

import bokeh.resources
import jinja2
from markupsafe import Markup

from gqa_jax import costs, formatting
from gqa_jax.search.roofline import Layout
from gqa_jax.search.serving_words import LIMITS
from launch.report import charts, sections
from launch.report.findings import Findings
from launch.report.opening import opening
from launch.report.payload import COSTS, DRAWS, payload

_CHOICES = {
    "z": "Z: memory and compute, weighted",
    "flops": "compute (FLOPs)",
    "memory": "memory",
    "latency": "time of a request",
    "price": "price of a million tokens",
    "throughput": "time per token and device",
    "train": "compute of training",
    "lifetime": "training and serving, over a lifetime",
}
_LAYOUTS = {"best": "whatever costs the least", "tensor": "heads alone (tensor parallelism)"}
_FLOPS = {"half_T": "half a sequence: T/2 tokens", "per_token": "a token", "full_T": "a sequence: T tokens"}
_CONVENTIONS = {
    "paper": "the paper's tables",
    "figures": "the paper's figures",
    "exact": "the model as trained, in bytes",
    "own": "this study's own",
}


def page(findings: Findings) -> str:
    """The whole page as HTML: nothing that it shows or runs is outside of it."""
    return render(findings, sections.parts(findings))


def render(findings: Findings, parts: Sequence[sections.Part]) -> str:
    """The page of parts that are made."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("launch.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    studies = [payload(study) for study in findings.studies]
    answering = findings.studies[0]
    data = {
        "studies": studies,
        "charts": charts.charts(),
        "command": findings.ask,
        "limited_by": LIMITS,
    }
    asked = [answering.objective.name] if answering.objective.name not in COSTS else []
    return environment.get_template("page.html").render(
        findings=findings,
        opening=opening(findings),
        parts=parts,
        draws=f"{DRAWS:,}",
        largest_regret=f"{formatting.LARGEST_REGRET:.0%}",
        head_dim=f"{answering.laws.head_dim:g}",
        contexts=[(i, f"{formatting.context(study.laws.context)} tokens") for i, study in enumerate(findings.studies)],
        costs=[(cost, _CHOICES[cost]) for cost in (*COSTS, *asked)],
        devices=[(name, _device_text(one)) for name, one in studies[0]["devices"].items()],
        limits=[("", "nothing: any memory"), *((name, _limit_text(one)) for name, one in studies[0]["devices"].items())],
        layouts=[(one, _LAYOUTS.get(one) or Layout.parse(one).describe()) for one in studies[0]["layouts"]],
        dtypes=[(name, name) for name in costs.DTYPE_BYTES],
        conventions=[(name, _CONVENTIONS[name]) for name in studies[0]["conventions"]],
        flops_rules=list(_FLOPS.items()),
        style=_inline("style.css"),
        payload=_json(data),
        bokeh=_library(),
        script=Markup("".join(_scripts())),
    )


def _device_text(one: dict) -> str:
    peak, bandwidth = one["bfloat16_flops"] / 1e12, one["memory_bandwidth"] / 1e12
    price = "" if one["usd_per_hour"] is None else f", ${one['usd_per_hour']:.2f}/h"
    return f"{one['device']}: {peak:.0f} TFLOP/s, {bandwidth:.2f} TB/s{price}"


def _limit_text(one: dict) -> str:
    return f"{one['device']}: {formatting.gb(one['memory_bytes'])}"


def _file(name: str) -> str:
    return (resources.files("launch.report") / name).read_text(encoding="utf-8")


def _inline(name: str) -> Markup:
    """A file of this package, to be put into an element whose text is not escaped."""
    text = _file(name)
    assert "</" not in text.replace("</ ", ""), f"{name} would end its element"
    return Markup(text)


def _scripts() -> Iterator[str]:
    """The scripts as one module: a page has no second file to import from."""
    for name in ("costs.js", "roofline.js", "explorer.js", "numbers.js", "charts.js", "page.js"):
        yield from (line for line in _inline(name).splitlines(keepends=True) if not line.startswith("import "))


def _library() -> Markup:
    """BokehJS, from the installed package."""
    library = bokeh.resources.Resources(mode="inline", components=["bokeh"], minified=True, log_level="warn")
    return Markup("\n".join(library.js_raw).replace("</script", "<\\/script"))


def _json(data: dict) -> Markup:
    """JSON that is safe inside a script element."""
    return Markup(json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))
