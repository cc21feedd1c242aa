"""What a run of first light says: tables, verdicts and what follows from them, in Markdown. Imports no jax."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.first_light import findings, verdicts
from benchmarks.first_light.findings import (
    OURS,
    Row,
    figure,
    gigabytes,
    heads,
    listed,
    mebibytes,
    nats,
    percent,
    times,
    tokens,
)
from benchmarks.first_light.fleet import KERNELS
from benchmarks.first_light.supervisor import SCHEMA, printable

MODES = {
    "device": "on the device",
    "rehearse": "a rehearsal: the script was tried, with tiny shapes, and no figure says anything of a GPU",
    "compile_only": "compiled only: nothing ran",
}
#: Published by others for an H100, causal, bfloat16, TFLOP/s: tokamax's autotuning files (July and August 2026; T = 16K), and
#: FlashAttention 3 (September 2026; T = 8K). (who, head size, forward, backward alone.)
PUBLISHED = (
    ("cudnn", 64, 538, None), ("cudnn", 128, 645, None), ("tokamax", 64, 502, 334), ("tokamax", 128, 637, 452),
    ("tokamax, Triton", 64, 278, 257), ("tokamax, Triton", 128, 361, 338), ("FlashAttention 3, T = 8K", 128, 685, 539),
)  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """The record of a run. Raises OSError, and ValueError for what is no record of this schema."""
    record = json.loads(path.read_text())
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"is no first-light.json of schema {SCHEMA}")
    return record


def write(record: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """Writes the record, its verdicts within, and the report: first-light-CARD-DATE.json and .md.

    Files of a rehearsal, or of a run that compiled only, have that in their names. Raises FileExistsError where one is there,
    and then writes none.
    """
    mode = str(record.get("mode"))
    name = ("first-light", *(() if mode == "device" else (mode,)), findings.device(record), findings.date(record))
    stem = re.sub(r"[^a-z0-9]+", "-", " ".join(name).lower()).strip("-")
    paths = folder / f"{stem}.json", folder / f"{stem}.md"
    for path in paths:
        if path.exists():
            raise FileExistsError(f"{path} is there: move it away, or give another folder")
    texts = json.dumps(printable({**record, "verdicts": verdicts.of(record)}), indent=1, allow_nan=False), markdown(record)
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in zip(paths, texts, strict=True):
        with path.open("x", encoding="utf-8") as file:
            file.write(text.rstrip("\n") + "\n")
    return paths


def markdown(record: Mapping[str, Any]) -> str:
    """The whole report. A record that lacks something says so there."""
    device, date = findings.device(record), findings.date(record)
    parts = [f"# First light: {device}, {date}", _what_ran(record)]
    if record.get("mode") == "compile_only":
        parts += [_programs(record), "## Verdicts\n\nNone: a run that compiles only decides nothing."]
    else:
        parts += [
            _section("Attention", record, ("2", "8"), _attention, _published, _forms),
            _section("Training", record, ("3", "7"), _training, _losses, _profile),
            _section("Decoding", record, ("9",), _decoding),
            _section("Small cells", record, ("10",), _small_cells),
            _section("Resuming", record, ("4",), _resumed),
            _section("Correctness", record, ("1", "5"), _correctness, _incorrect),
            _section("Races", record, ("6",), _races),
            _section("Ceilings", record, ("0",), _ceilings),
            _section("The README's road", record, ("1b",), _readme),
            _verdicts(record),
            _to_paste(record),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(rows: Iterable[Mapping[str, Any]], *, left: Sequence[str] = ()) -> str:
    """Markdown; columns in the order of the first row. Those without any text are left out; those in `left` are words."""
    rows = list(rows)
    names = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
    if not names:
        return ""
    cells = [[re.sub(r"\s+", " ", str(row[name])).replace("|", "\\|") for name in names] for row in rows]
    marks = ["---" if name in left else "---:" for name in names]
    return "\n".join(f"| {' | '.join(values)} |" for values in (names, marks, *cells))


def _section(title: str, record: Mapping[str, Any], steps: Sequence[str], *parts: Callable[..., str]) -> str:
    bodies = [body for part in parts if (body := part(record))]
    if not bodies:
        bodies = ["Not measured: " + "; ".join(findings.step_said(record, step) for step in steps) + "."]
    return "\n\n".join([f"## {title}", *bodies])


# What ran.


def _what_ran(record: Mapping[str, Any]) -> str:
    card, host = findings.part(record, "card"), findings.part(record, "host")
    versions = {name: record[name] for name in ("ptxas", "nvcc") if record.get(name)} | findings.versions(record)
    ended = "to the end" if record.get("finished") else "stopped before the end"
    facts = {
        "mode": f"{MODES.get(str(record.get('mode')), record.get('mode'))}; {ended}",
        "card": ", ".join(f"{name} {value}" for name, value in card.items()) or findings.device(record),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "host": ", ".join(f"{name} {value}" for name, value in host.items()),
        "date": f"{record.get('began') or findings.date(record)} to {record.get('ended') or '?'}",
        "commit": str(record.get("commit") or ""),
        "command": f"`{record['command']}`" if record.get("command") else "",
    }
    steps = [
        {
            "step": f"{name} {step.get('title', '')}",
            "status": ": ".join(str(step[key]) for key in ("status", "reason") if step.get(key)),
            "seconds": figure(step.get("seconds")),
            "at most": figure(step.get("limit_s")),
        }
        for name, step in findings.part(record, "steps").items()
        if isinstance(step, Mapping)
    ]
    bad = findings.part(record, "bad")
    return "\n\n".join(
        filter(
            None,
            (
                "## What ran",
                "\n".join(f"- {name}: {value}" for name, value in facts.items() if value),
                table(steps, left=("step", "status")),
                bad and "Left out from then on:\n\n" + "\n".join(f"- {name}: {reason}" for name, reason in bad.items()),
                _grouped("Not run, and why", record, lambda row: row.get("status") in (*findings.NOT_TRIED, "refused")),
                _grouped("Failed", record, lambda row: row.get("status") in (*findings.FAILING, "nonsense")),
            ),
        )
    )


def _grouped(title: str, record: Mapping[str, Any], wanted: Callable[[Row], bool]) -> str:
    """Rows by step, who, status and reason, with how many and the first cases."""
    found: dict[tuple[str, ...], list[str]] = {}
    for row in filter(wanted, findings.rows(record)):
        who = row.get("implementation") or row.get("worker") or ""
        key = tuple(str(value) for value in (row.get("step"), who, row.get("status"), row.get("reason") or ""))
        found.setdefault(key, []).append(str(row.get("case", "")))
    names = ("step", "who", "status", "why")
    rows = [
        dict(zip(names, key, strict=True)) | {"rows": str(len(cases)), "cases": listed(cases, 3)}
        for key, cases in found.items()
    ]
    return f"{title}:\n\n{table(rows, left=(*names, 'cases'))}" if rows else ""


# Tables of figures.


def _attention(record: Mapping[str, Any]) -> str:
    rows = []
    for cell, by_name in findings.cells(record).items():
        for (implementation, direction), row in by_name.items():
            forward = by_name.get((implementation, "forward"))
            alone = findings.backward_rate(forward, row) if direction == "backward" else None
            rows.append(
                {
                    "pass": "forward and backward" if direction == "backward" else direction,
                    "T": tokens(cell.length),
                    "heads": f"{cell.n_heads}/{cell.n_kv_heads}",
                    "head size": str(cell.head_dim),
                    "implementation": implementation,
                    "ms": figure(row.get("seconds"), scale=1e3) or str(row.get("status", "")),
                    "TFLOP/s": figure(row.get("tflops")),
                    "backward alone": figure(alone, scale=1e-12),
                    "of cuDNN": times(findings.ratio(row, by_name.get(("cudnn", direction)))),
                    "error": figure(row.get("relative_error")),
                    "temp MiB": mebibytes(row.get("temp_bytes")),
                }
            )
    return table(rows, left=("pass", "implementation"))


def _published(record: Mapping[str, Any]) -> str:
    """Others' own figures beside those measured here, where these say something: on an H100 or H200."""
    sheet = findings.chip(record)
    if sheet is None or sheet.name not in verdicts.HOPPER or record.get("mode") != "device":
        return ""
    rows = []
    for who, head_dim, *bars in PUBLISHED:
        measured: tuple[float | None, ...] = (None, None)
        for cell, by_name in findings.cells(record).items():
            if cell.head_dim == head_dim and cell.length == 16_384 and measured == (None, None):
                forward, both = (by_name.get((who, direction)) for direction in ("forward", "backward"))
                measured = findings.rate(forward), findings.backward_rate(forward, both)
        row = {"who": who, "head size": str(head_dim)}
        for words, bar, rate in zip(("forward", "backward"), bars, measured, strict=True):
            row |= {words: figure(bar), f"{words} here": figure(rate, scale=1e-12)}
        rows.append(row)
    return "Published for an H100, TFLOP/s, the backward pass alone:\n\n" + table(rows, left=("who",))


def _forms(record: Mapping[str, Any]) -> str:
    """In a scan of checkpointed layers, and with documents."""
    rows = [
        {
            "what": verdicts.what(row),
            "T": tokens(row.get("length")),
            "heads": heads(row),
            "implementation": str(row["implementation"]),
            "ms": figure(row.get("seconds"), scale=1e3) or str(row.get("status", "")),
            "TFLOP/s": figure(row.get("tflops")),
            "of cuDNN": times(row.get("ratio_to_cudnn")),
            "temp MiB": mebibytes(row.get("temp_bytes")),
        }
        for row in findings.passes(record)
        if row.get("form", "plain") != "plain" or row.get("documents") is not None
    ]
    words = "Documents and scans; masked products count as work:"
    return f"{words}\n\n{table(rows, left=('what', 'implementation'))}" if rows else ""


def _sum(row: Row, *names: str) -> float | None:
    values = [findings.number(row.get(name)) for name in names]
    return None if None in values else sum(values)


def _training(record: Mapping[str, Any]) -> str:
    rows = []
    for form in findings.training(record):
        mine, prepared = form.implementation == OURS, form.prepared
        planned = findings.part(prepared, "planner")
        compile_seconds = _sum(prepared, "seconds_lower", "seconds_compile") or prepared.get("seconds_compile")
        rows.append(
            {
                "step": form.case,
                "who": form.implementation,
                "attention, remat": ", ".join(form.settings[1:][::-1]) if mine else str(prepared.get("sdpa") or ""),
                "tokens/s": figure(form.rate) or str(prepared.get("status", "not timed")),
                "MFU, T/2": percent(form.mfu("causal")),
                "MFU, T": percent(form.mfu("full")),
                "ours is": times(form.ratio),
                "s a step": figure(form.seconds),
                "planner s": figure(form.planned),
                "peak GB": gigabytes(prepared.get("bytes_peak")),
                "compiled GB": gigabytes(_sum(prepared, "bytes_arguments", "bytes_temporary")),
                "planner GB": gigabytes(_sum(planned, "bytes_arguments", "bytes_temporary")),
                "compile s": figure(compile_seconds),
            }
        )
    return table(rows, left=("step", "who", "attention, remat"))


def _losses(record: Mapping[str, Any]) -> str:
    rows = [
        {
            "losses beside": one.implementation,
            "status": one.status,
            "steps": str(one.steps),
            "off after the first": nats(one.first),
            "after the last": nats(one.last),
            "same tokens": {True: "yes", False: "no", None: "not said"}[one.tokens],
            "within 0.01": "" if one.last is None else "yes" if one.last <= verdicts.LOSS_TOLERANCE else "no",
        }
        for one in findings.agreements(record)
    ]
    return table(rows, left=("losses beside", "status"))


def _profile(record: Mapping[str, Any], most: int = 10) -> str:
    """The longest kernels of the profile."""
    parts = []
    for row in findings.rows(record, "7"):
        kernels, span = row.get("kernels"), findings.above_zero(row.get("seconds_span"))
        if not isinstance(kernels, list) or not kernels:
            continue
        found = [
            {
                "kernel": str(one.get("name"))[:60],
                "ms a step": figure(one.get("seconds"), scale=1e3 / (findings.above_zero(row.get("steps")) or 1)),
                "of the step": percent((findings.number(one.get("seconds")) or 0) / span) if span else "",
                "runs": figure(one.get("count")),
            }
            for one in kernels[:most]
            if isinstance(one, Mapping)
        ]
        parts.append(f"{row.get('case')}:\n\n{table(found, left=('kernel',))}")
    return "\n\n".join(parts)


def _decoding(record: Mapping[str, Any]) -> str:
    rows = [
        {
            "batch": str(row.get("batch", "?")),
            "cache": tokens(row.get("length")),
            "heads": heads(row),
            "implementation": str(row.get("implementation", row.get("worker", ""))),
            "us": figure(row.get("seconds"), scale=1e6) or str(row.get("status", "")),
            "GB/s": figure(row.get("gb_s")),
            "copy GB/s": figure(row.get("copy_gb_s")),
            "of the copy": percent(row.get("share_of_copy")),
            "error": figure(row.get("relative_error")),
            "temp MiB": mebibytes(row.get("temp_bytes")),
        }
        for row in findings.rows(record, "9")
        if row.get("implementation")
    ]
    return table(rows, left=("implementation",))


def _small_cells(record: Mapping[str, Any]) -> str:
    found = findings.rows(record, "10")
    one = next((rate for row in found if row.get("processes") == 1 if (rate := _rate(row))), None)
    rows = [
        {
            "processes": str(row.get("processes", "?")),
            "tokens/s in all": figure(row.get("tokens_per_second")) or f"{row.get('status')}: {row.get('reason')}",
            "of one process": times(_rate(row) / one) if one and _rate(row) else "",
        }
        for row in found
        if "processes" in row
    ]
    return table(rows)


def _rate(row: Row) -> float | None:
    return findings.above_zero(row.get("tokens_per_second"))


def _resumed(record: Mapping[str, Any]) -> str:
    def equal(value: Any) -> str:
        return "yes" if value is True else "no" if value is False else ""

    rows = [
        {
            "attention": attention,
            "operations": setting,
            "status": row.get("status"),
            "different results": f"{row['distinct']} in {row.get('times', '?')}" if row.get("distinct") else "",
            "equal when resumed": equal(row.get("same_process")),
            "in another process": equal(row.get("second_process")),
            "loss off": nats(row.get("loss_difference")),
            "ms a step": figure(row.get("seconds_step"), scale=1e3),
            "of the default's time": times(findings.price(by_setting)) if setting == "deterministic" else "",
        }
        for attention, by_setting in findings.resumed(record).items()
        for setting, row in by_setting.items()
    ]
    return table(rows, left=("attention", "operations", "status"))


def _correctness(record: Mapping[str, Any]) -> str:
    """How many cases of how many are right, by kernel and kind of call."""
    found: dict[tuple[str, str], Counter] = {}
    for row in findings.rows(record, "1", "5"):
        if row.get("implementation"):
            found.setdefault((str(row["implementation"]), verdicts.what(row)), Counter())[_outcome(row)] += 1
    rows = [
        {
            "kernel": kernel,
            "calls": kind,
            "right": f"{counts['right']} of {counts.total()}",
            "wrong": figure(counts["wrong"] or None),
            "hang": figure(counts["hang"] or None),
            "failed": figure(counts["failed"] or None),
            "not tried": figure(counts["not tried"] or None),
        }
        for (kernel, kind), counts in sorted(found.items())
    ]
    return table(rows, left=("kernel", "calls"))


def _outcome(row: Row) -> str:
    status = row.get("status")
    if status in ("wrong", "hang"):
        return str(status)
    return "right" if status == "ok" else "failed" if findings.failing(row) else "not tried"


def _incorrect(record: Mapping[str, Any]) -> str:
    rows = [
        {
            "kernel": str(row["implementation"]),
            "case": str(row.get("case", "")),
            "status": str(row.get("status")),
            "why": str(row.get("reason", "")),
        }
        for row in findings.rows(record, "1", "5")
        if row.get("implementation") and findings.failing(row)
    ]
    return f"Those that are not right:\n\n{table(rows, left=('kernel', 'case', 'status', 'why'))}" if rows else ""


def _races(record: Mapping[str, Any]) -> str:
    rows = [
        {
            "case": str(row.get("case", "")),
            "kernel": str(row.get("implementation", "")),
            "runs": figure(row.get("runs")),
            "copies meanwhile": figure(row.get("copies")),
            "bits": {"ok": "equal", "wrong": "differ"}.get(str(row.get("status")), str(row.get("status"))),
            "where": str(row.get("reason") or ""),
        }
        for row in findings.rows(record, "6")
        if row.get("implementation")
    ]
    return table(rows, left=("case", "kernel", "bits", "where"))


def _ceilings(record: Mapping[str, Any]) -> str:
    rows = []
    for name, row, rate, share in findings.ceilings(record):
        matmul = name == "matmul"
        size = findings.number(row.get("size"))
        rows.append(
            {
                "what": f"{name}, {'bfloat16, n = ' if matmul else ''}{figure(size)}{'' if matmul else ' bytes'}",
                "rate": f"{figure(rate, scale=1e-12 if matmul else 1e-9)} {'TFLOP/s' if matmul else 'GB/s'}" if rate else "",
                "of the data sheet": percent(share),
                "status": str(row.get("status", "")),
            }
        )
    tiny = next((row for row in findings.rows(record, "0") if row.get("case") == "tiny kernels"), {})
    rows += [
        {"what": f"a kernel of a line in {name}", "rate": "", "of the data sheet": "", "status": str(tiny[name])}
        for name in ("mosaic", "triton")
        if name in tiny
    ]
    return table(rows, left=("what", "status"))


def _readme(record: Mapping[str, Any]) -> str:
    rows = [
        {
            "what": str(row.get("case", "")),
            "status": ": ".join(str(row[key]) for key in ("status", "reason") if row.get(key)),
            "loss": nats(row.get("loss")),
            "loss on the CPU": nats(row.get("loss_cpu")),
            "device": str(row.get("device") or ""),
            "attention": str(row.get("attention") or ""),
            "seconds": figure(row["seconds"].get("run") if isinstance(row.get("seconds"), Mapping) else row.get("seconds")),
        }
        for row in findings.rows(record, "1b")
    ]
    return table(rows, left=("what", "status", "device", "attention"))


# What follows.


def _verdicts(record: Mapping[str, Any]) -> str:
    found = verdicts.of(record)
    rows = [{"subject": one["subject"], "decision": one["decision"], "why": one["why"]} for one in found]
    changes = [f"- `{change['file']}`, for {one['subject']}: {change['setting']}" for one in found for change in one["changes"]]
    parts = ["## Verdicts", table(rows, left=("subject", "decision", "why"))]
    if changes:
        parts.append("To change:\n\n" + "\n".join(changes))
    return "\n\n".join(parts)


def _to_paste(record: Mapping[str, Any]) -> str:
    parts = {
        "The table of defaults (`BEST`, before the row of GPUs)": verdicts.default_rows(record),
        "The planner's calibration: seconds planned over seconds measured": planner_rows(record),
        "The chip's efficiencies: shares of the data sheet": chip_rows(record),
    }
    said = [
        f"{title}:\n\n" + ("```python\n" + "\n".join(lines) + "\n```" if lines else "Nothing.")
        for title, lines in parts.items()
    ]
    return "\n\n".join(["## To paste", *said])


def _dated(record: Mapping[str, Any]) -> str:
    versions = findings.versions(record)
    facts = [findings.device(record), findings.date(record), record.get("commit") and f"commit {record['commit']}"]
    return "# " + ", ".join(filter(None, [*facts, versions.get("jax") and f"jax {versions['jax']}"]))


def planner_rows(record: Mapping[str, Any]) -> list[str]:
    """(chip, size, remat, attention): efficiency, a line for each case of ours that was timed; none but of a device."""
    sheet = findings.chip(record)
    forms = [form for form in findings.training(record) if form.efficiency is not None]
    if record.get("mode") != "device" or sheet is None or not forms:
        return []
    lines = [
        f'("{sheet.name}", {", ".join(json.dumps(name) for name in form.settings)}): {form.efficiency:.3f},'
        f"  # {form.planned:.3g} s planned, {form.seconds:.3g} s measured"
        for form in forms
    ]
    return [_dated(record), *lines]


def chip_rows(record: Mapping[str, Any]) -> list[str]:
    """What products, copies and attention reach, as fields of a chip; none but of a device that has a data sheet."""
    sheet = findings.chip(record)
    if record.get("mode") != "device" or sheet is None:
        return []
    lines = [
        f"{name}_share={share:.3f},  # {figure(row.get('size'))}{'' if name == 'matmul' else ' bytes'}"
        for name, row, _, share in findings.ceilings(record)
        if share is not None
    ]
    for implementation in ("cudnn", *KERNELS, "tokamax"):
        found = findings.shares(record, implementation)
        values = ", ".join(f"({head_dim}, {forward:.3f}, {backward:.3f})" for head_dim, forward, backward in found)
        if found:
            comment = "" if implementation == "cudnn" else "# "
            lines.append(f"{comment}attention_share=({values},),  # {implementation}, the longest T of each head size")
    return [_dated(record), *lines] if lines else []


# Programs that were compiled only.


def _programs(record: Mapping[str, Any]) -> str:
    """Every program with its seconds and temporary memory; those compiled side by side, in one answer, are one line."""
    groups: dict[tuple, list[Row]] = {}
    for i, row in enumerate(findings.rows(record)):
        phases = findings.part(row, "phases")
        together = tuple(sorted((str(k), str(v)) for k, v in phases.items()))
        groups.setdefault((row.get("step"), row.get("implementation"), together or i), []).append(row)
    found, total = [], Counter()
    for rows in groups.values():
        row = rows[0]
        seconds = _seconds_compile(row)
        total[str(row.get("step"))] += seconds or 0
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        statuses = Counter(str(one.get("status")) for one in rows)
        found.append(
            {
                "step": str(row.get("step")),
                "program": f"{row.get('case', '?')}{more}",
                "who": str(row.get("implementation") or row.get("attention") or ""),
                "status": ", ".join(name if len(rows) == 1 else f"{n} {name}" for name, n in statuses.items()),
                "compile s": figure(seconds),
                "temp MiB": mebibytes(next((row[name] for name in ("temp_bytes", "bytes_temporary") if name in row), None)),
            }
        )
    sums = [{"step": step, "compile s": figure(seconds), "limit": _limit(record, step)} for step, seconds in total.items()]
    said = "Seconds of lowering and compiling on this host, added up over workers that run side by side."
    if not found:
        return "## Programs\n\nNone."
    words = ("step", "program", "who", "status")
    return "\n\n".join(["## Programs", said, table(sums, left=("step",)), table(found, left=words)])


def _limit(record: Mapping[str, Any], step: str) -> str:
    return figure(findings.part(findings.part(record, "steps"), step).get("limit_s"))


def _seconds_compile(row: Row) -> float | None:
    """By the phases of the answer; without them, as the worker counted."""
    phases = findings.part(row, "phases")
    found = [findings.number(phases.get(name)) for name in ("lower", "compile")]
    if found == [None, None]:
        found = [findings.number(row.get(name)) for name in ("seconds_lower", "seconds_compile")]
    known = [value for value in found if value is not None]
    return sum(known) if known else None
