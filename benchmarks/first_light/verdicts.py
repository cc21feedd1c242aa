"""What the outcomes of first light decide, each with its figures and what is to be changed. Functions of a record alone.

What was not measured is "not decided", and says so; a rehearsal and a run that compiles only decide nothing. Imports no jax.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.first_light import findings
from benchmarks.first_light.findings import Cell, Row, figure, listed, nats, percent, times, tokens
from benchmarks.first_light.fleet import KERNELS, RESUMED
from benchmarks.first_light.supervisor import median

CHANGE, KEEP, HIT, MISSED, OPEN = "change", "keep", "hit", "missed", "not decided"
SHARE_OF_COPY = 0.5  # that decoding must reach
LOSS_TOLERANCE, LOSS_STEPS = 0.01, 10  # nats, of losses beside PyTorch's, and after how many steps
QUICKSTART_CELLS = 3
NEAR = 0.1  # a prediction of a single figure is hit within a tenth of it
HOPPER = ("h100", "h200")  # the chips that predictions are of

TABLE = "gqa_jax/attention/dispatch.py"
TESTS = {"pallas_gpu": "tests/test_attention_hopper.py", "pallas_triton": "tests/test_attention_triton.py"}
HOPPER_FILES = "gqa_jax/attention/hopper/"


class Change(NamedTuple):
    """What to change where."""

    file: str
    setting: str


class Verdict(NamedTuple):
    """`status` is CHANGE, KEEP, HIT, MISSED or OPEN; the decision says in words what that means for the subject."""

    subject: str
    status: str
    decision: str
    why: str
    changes: tuple[Change, ...] = ()


class Prediction(NamedTuple):
    """A figure that was said before anything had run, and the one measured.

    There is a range, bounds included, for each state of the code that was spoken of.
    """

    subject: str
    ranges: tuple[tuple[str, float, float], ...]  # of which state of the code ("": there is one), lowest, highest
    measured: float | None
    of: str  # what was measured, or that it was not
    unit: str = ""

    @property
    def said(self) -> str:
        def one(words: str, low: float, high: float) -> str:
            bounds = f"at most {figure(high)}" if low == -math.inf else f"{figure(low)} to {figure(high)}"
            return f"{bounds}{self.unit}{words and ' '}{words}"

        return ", ".join(one(*values) for values in self.ranges)


def of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All verdicts of a record, for JSON: subject, status, decision, why, and changes, each a file and a setting."""
    found = [
        *(_kernel(record, kernel) for kernel in KERNELS), _triton_as_default(record), *_rows_of_defaults(record),
        _hopper_kernels(record), *(_races(record, kernel) for kernel in KERNELS), *(_resume(record, name) for name in RESUMED),
        _decoding(record), _efficiency(record), *_losses(record), _readme(record), *map(_judged, predictions(record)),
    ]  # fmt: skip
    mode = record.get("mode")
    if mode != "device":
        found = [_of_no_device(verdict, str(mode)) for verdict in found]
    return [verdict._asdict() | {"changes": [change._asdict() for change in verdict.changes]} for verdict in found]


def _of_no_device(verdict: Verdict, mode: str) -> Verdict:
    name = {"rehearse": "a rehearsal", "compile_only": "a run that compiles only"}.get(mode, f"a record of mode {mode!r}")
    why = f"{name} decides nothing"
    if verdict.status != OPEN:
        why += f"; on a device this would be: {verdict.decision} ({verdict.why})"
    return Verdict(verdict.subject, OPEN, OPEN, why)


def _open(subject: str, why: str) -> Verdict:
    return Verdict(subject, OPEN, OPEN, why)


# Kernels: right or wrong.


def kernel_rows(record: Mapping[str, Any], kernel: str) -> list[Row]:
    """All rows about a kernel by itself; not those of races, where differing bits are a matter of their own."""
    return [row for row in findings.rows(record, "1", "2", "5", "8", "9") if row.get("implementation") == kernel]


def failures(record: Mapping[str, Any], kernel: str) -> tuple[list[Row], list[str]]:
    """Rows in which a kernel was wrong, hung, or ended in an error; and what it was marked bad for, by part or kind."""
    rows = kernel_rows(record, kernel)
    refused = [row.get("reason") for row in rows if row.get("status") == "refused"]
    bad = findings.part(record, "bad")
    marked = [f"{name}: {reason}" for name, reason in bad.items() if name.split(" ")[0] == kernel]
    return [row for row in rows if findings.failing(row) and row.get("reason") not in refused], marked


def sound(record: Mapping[str, Any], kernel: str) -> bool | None:
    """False: wrong or hanging somewhere. True: right in all cases of the step about correctness that ran. None: none ran."""
    rows, marked = failures(record, kernel)
    if rows or marked:
        return False
    checked = [row for row in findings.rows(record, "5") if row.get("implementation") == kernel and row.get("status") == "ok"]
    return True if checked else None


def what(row: Row) -> str:
    """What kind of call a row is of."""
    if row.get("kind"):
        return str(row["kind"])
    if row.get("part"):
        return f"{row['part']} of one tile"
    if str(row.get("step")) == "9":
        return "decode"
    documents = "" if row.get("documents") is None else f" with {row['documents']} documents"
    return f"{row.get('direction', 'a pass')}{documents}" + (" in a scan" if row.get("form") == "scan" else "")


def when(rows: Sequence[Row]) -> str:
    """Where a kernel fails, a part for each kind of call: "segments, sorted (head size 64, 128; T = 200): wrong 4 times"."""
    found = []
    for kind, status in dict.fromkeys((what(row), row["status"]) for row in rows):
        these = [row for row in rows if (what(row), row["status"]) == (kind, status)]
        sizes = listed(sorted({row["head_dim"] for row in these if isinstance(row.get("head_dim"), int)}))
        lengths = listed(tokens(n) for n in sorted({row["length"] for row in these if isinstance(row.get("length"), int)}))
        count = "once" if len(these) == 1 else f"{len(these)} times"
        found.append(f"{kind} (head size {sizes or '?'}; T = {lengths or '?'}): {status} {count}")
    return "; ".join(found)


def _kernel(record: Mapping[str, Any], kernel: str) -> Verdict:
    subject = f"kernel {kernel}"
    rows, marked = failures(record, kernel)
    checked = [row for row in findings.rows(record, "5") if row.get("implementation") == kernel]
    right = [row for row in checked if row.get("status") == "ok"]
    tried = f"{len(right)} of {len(checked)} cases of the step about correctness right"
    if not rows and not marked:
        if right:
            return Verdict(subject, KEEP, "right in all that ran", tried)
        refused = next((row for row in kernel_rows(record, kernel) if row.get("status") == "refused"), None)
        why = f"it refuses this device: {refused.get('reason')}" if refused else findings.step_said(record, "5")
        tiles = [row for row in findings.rows(record, "1") if row.get("implementation") == kernel]
        if any(row.get("status") == "ok" for row in tiles):
            why += f"; right in the smoke test: {listed(row.get('part') for row in tiles if row.get('status') == 'ok')}"
        return _open(subject, why)
    where = when(rows) or listed(marked)
    reasons = listed([str(row.get("reason")) for row in rows if row.get("reason")] or marked, 3)
    statuses = {row["status"] for row in rows} | {"hang" for reason in marked if ": hang in" in reason}
    decision = "its limits say on which device and when; the failing cases join its tests"
    word = "wrong" if "wrong" in statuses else "hangs" if "hang" in statuses else "fails"
    joined = listed(row.get("case") for row in rows) or listed(marked)
    changes = [
        Change(TABLE, f"limits of {kernel!r}: on {findings.device(record)!r}, when {where}"),
        Change(TESTS[kernel], f"cases: {joined}"),
    ]
    if any("decode" in what(row) for row in rows) or any(name.startswith(f"{kernel} decode") for name in marked):
        changes.append(Change("tests/test_attention_decode.py", "the cases of decode among them"))
    return Verdict(subject, CHANGE, f"{word}: {decision}", f"{where}; {reasons}; {tried}", tuple(changes))


def _triton_as_default(record: Mapping[str, Any]) -> Verdict:
    subject = "pallas_triton as a default"
    right = sound(record, "pallas_triton")
    if right is None:
        return _open(subject, f"no case of its correctness ran: {findings.step_said(record, '5')}")
    if right:
        return Verdict(subject, KEEP, "stays in the table of defaults and the default of decode", "right in all that ran")
    changes = (Change(TABLE, 'BEST: no "pallas_triton" in the row of "gpu"'),)
    rows, marked = failures(record, "pallas_triton")
    return Verdict(subject, CHANGE, "off the table of defaults and of decode", when(rows) or listed(marked), changes)


# Attention: the table of defaults.


def against_cudnn(record: Mapping[str, Any]) -> dict[Cell, dict[str, float | None]]:
    """By cell and direction, how many times as fast as cuDNN pallas_gpu is; None where one of them was not timed."""
    return {
        cell: {
            direction: findings.ratio(by_name.get(("pallas_gpu", direction)), by_name.get(("cudnn", direction)))
            for direction in ("forward", "backward")
        }
        for cell, by_name in findings.cells(record).items()
    }


def wins(record: Mapping[str, Any]) -> dict[tuple[int, int, int], bool | None]:
    """(head size, group, T) -> whether pallas_gpu is at least as fast as cuDNN, in both directions, with all heads measured.

    The figure of a direction that was not timed leaves it open (None) unless the other one is below.
    """
    found: dict[tuple[int, int, int], list[float | None]] = {}
    for cell, by_direction in against_cudnn(record).items():
        found.setdefault((cell.head_dim, cell.group, cell.length), []).extend(by_direction.values())
    return {
        key: False if any(x is not None and x < 1 for x in values) else None if None in values else True
        for key, values in found.items()
    }


def row_line(record: Mapping[str, Any], head_dim: int, group: int, lengths: Sequence[int]) -> str:
    """A line of the table of defaults for a head size, a group, and lengths from the first to the last."""
    names = ("pallas_gpu", "cudnn", "pallas_triton", "xla")
    kept = ", ".join(f'"{name}"' for name in names if name != "pallas_triton" or sound(record, name) is not False)
    return (
        f'Row("gpu", ({kept}), head_dims=range({head_dim}, {head_dim + 1}), '
        f"lengths=range({min(lengths)}, {max(lengths) + 1}), groups=range({group}, {group + 1})),"
    )


def default_rows(record: Mapping[str, Any]) -> list[str]:
    """Lines for the table of defaults, lengths side by side in one, each below a comment with its figures.

    None unless pallas_gpu is right and the record is of a device. Lengths between two measured ones count with them.
    """
    if record.get("mode") != "device" or not sound(record, "pallas_gpu"):
        return []
    won, lines = wins(record), []
    for head_dim, group in dict.fromkeys((head_dim, group) for head_dim, group, _ in sorted(won)):
        run: list[int] = []
        for length in [*sorted(n for d, g, n in won if (d, g) == (head_dim, group)), None]:
            if length is not None and won[head_dim, group, length]:
                run.append(length)
            elif run:
                said = ", ".join(f"T = {tokens(n)} {_ratios(record, head_dim, group, n)}" for n in run)
                lines += [f"# {findings.device(record)}, {findings.date(record)}, of cuDNN: {said}"]
                lines += [row_line(record, head_dim, group, run)]
                run = []
    return lines


def _ratios(record: Mapping[str, Any], head_dim: int, group: int, length: int) -> str:
    """ "forward 1.05x, forward and backward 1.01x", the lowest of all heads measured."""
    said = []
    for direction, words in (("forward", "forward"), ("backward", "forward and backward")):
        values = [
            by_direction[direction]
            for cell, by_direction in against_cudnn(record).items()
            if (cell.head_dim, cell.group, cell.length) == (head_dim, group, length) and by_direction[direction] is not None
        ]
        said.append(f"{words} {times(min(values)) if values else 'not timed'}")
    return ", ".join(said)


def _rows_of_defaults(record: Mapping[str, Any]) -> Iterator[Verdict]:
    found = wins(record)
    if not found:
        steps = ", ".join(findings.step_said(record, step) for step in ("2", "8"))
        yield _open("pallas_gpu as a default", f"no cell was measured: {steps}")
    right = sound(record, "pallas_gpu")
    for (head_dim, group, length), won in found.items():
        subject = f"pallas_gpu as a default: head size {head_dim}, group {group}, T = {tokens(length)}"
        why = f"{_ratios(record, head_dim, group, length)} of cuDNN"
        if right is False:
            yield Verdict(subject, KEEP, "no row of defaults: the kernel is wrong or hangs", why)
        elif won is False:
            yield Verdict(subject, KEEP, "no row of defaults: below cuDNN", why)
        elif won is None or right is None:
            yield _open(subject, why + ("" if right else "; no case of its correctness ran"))
        else:
            raced = [row for row in findings.rows(record, "6") if row.get("implementation") == "pallas_gpu"]
            if any(row.get("status") == "wrong" for row in raced):
                why += "; its runs differ in bits (races)"
            change = Change(TABLE, f"BEST: {row_line(record, head_dim, group, [length])}")
            yield Verdict(subject, CHANGE, "a row of defaults", why, (change,))


def _hopper_kernels(record: Mapping[str, Any]) -> Verdict:
    """Deleted where nothing measured is as fast as cuDNN or as tokamax; that takes all cells of both steps."""
    subject = "the Hopper kernels"
    below, missing = [], []
    for cell, by_name in findings.cells(record).items():
        for direction in ("forward", "backward"):
            mine = by_name.get(("pallas_gpu", direction))
            ratios = {peer: findings.ratio(mine, by_name.get((peer, direction))) for peer in ("cudnn", "tokamax")}
            said = ", ".join(f"{times(value)} of {peer}" for peer, value in ratios.items() if value is not None)
            if any(value is not None and value >= 1 for value in ratios.values()):
                return Verdict(subject, KEEP, "kept", f"{direction}, {cell}: {said}")
            if mine is not None and findings.failing(mine):
                missing.append(f"{direction}, {cell}: {mine['status']}, so no speed")
            elif None in ratios.values():
                absent = [peer for peer, value in ratios.items() if value is None]
                missing.append(f"{direction}, {cell}: no figures beside {' and '.join(absent)}")
            else:
                below.append(f"{direction}, {cell}: {said}")
    for step in ("2", "8"):
        if not findings.rows(record, step):
            missing.append(findings.step_said(record, step))
    if missing:
        return _open(subject, "; ".join(filter(None, (listed(missing, 4), below and f"below so far: {listed(below, 4)}"))))
    change = Change(HOPPER_FILES, "delete, and their name from dispatch.py; the README says why, with these figures")
    return Verdict(subject, CHANGE, "deleted: below cuDNN and tokamax everywhere", listed(below, 20), (change,))


# Bits: races, resuming.


def _races(record: Mapping[str, Any], kernel: str) -> Verdict:
    subject = f"{kernel} is deterministic"
    rows = [row for row in findings.rows(record, "6") if row.get("implementation") == kernel]
    different = [row for row in rows if row.get("status") == "wrong"]
    if different:
        change = Change("README.md", f'"The kernels of this package are deterministic": not {kernel}')
        why = listed(f"{row.get('case')}: {row.get('reason')}" for row in different)
        return Verdict(subject, CHANGE, '"deterministic" is withdrawn', why, (change,))
    equal = [row for row in rows if row.get("status") == "ok"]
    rest = [f"{row.get('case')}: {row.get('status')}: {row.get('reason')}" for row in rows if row.get("status") != "ok"]
    if not equal:
        return _open(subject, listed(rest, 2) or findings.step_said(record, "6"))
    said = listed(f"{row.get('case')}: {row.get('runs', '?')} runs equal in all bits" for row in equal)
    return Verdict(subject, KEEP, "stays so", said + (f"; not tried: {listed(rest, 2)}" if rest else ""))


def _resume(record: Mapping[str, Any], attention: str) -> Verdict:
    subject = f"resuming is exact, with {attention}"
    by_setting = findings.resumed(record).get(attention, {})
    plain, deterministic = (findings.exact(by_setting.get(name, {})) for name in ("default", "deterministic"))
    if plain is None:
        row = by_setting.get("default", {})
        said = f"{row.get('status')}: {row.get('reason')}" if row else findings.step_said(record, "4")
        return _open(subject, said)
    found = {name: _bits(row) for name, row in by_setting.items() if findings.exact(row) is not None}
    why = "; ".join(f"{name}: {said}" for name, said in found.items())
    cost = findings.price(by_setting)
    cost = "its price was not measured" if cost is None else f"it takes {times(cost)} the time of a step"
    if plain:
        return Verdict(subject, KEEP, "README's words stay", f"{why}; deterministic operations: {cost}")
    words = Change("README.md", f'"Resuming is exact": not on {findings.device(record)!r}: {found["default"]}')
    if deterministic:
        option = Change("gqa_jax/config.py", f"`deterministic`: --xla_gpu_deterministic_ops=true; {cost}")
        return Verdict(subject, CHANGE, f"a `deterministic` option: {cost}; README says so", why, (option, words))
    tried = "nor with deterministic operations" if deterministic is False else "with deterministic operations it is not known"
    return Verdict(subject, CHANGE, f"README's words change: not exact, {tried}", f"{why}; {cost}", (words,))


def _bits(row: Row) -> str:
    """What of a step was equal."""
    distinct = "equal bits" if row.get("distinct") == 1 else f"{row.get('distinct')} different results"
    places = {"here": row.get("same_process"), "in another process": row.get("second_process")}
    said = [f"resumed {place} {'equal' if equal else 'not equal'}" for place, equal in places.items()]
    return ", ".join([f"{row.get('times', '?')} equal steps gave {distinct}", *said])


# Speed.


def _decoding(record: Mapping[str, Any]) -> Verdict:
    subject = "decoding with pallas_triton"
    rows = [row for row in findings.rows(record, "9") if row.get("implementation") == "pallas_triton"]
    figures = {str(row.get("case")): findings.above_zero(row.get("share_of_copy")) for row in rows}
    found = {case: share for case, share in figures.items() if share is not None}
    missing = [f"{row.get('case')}: {row.get('status')}" for row in rows if str(row.get("case")) not in found]
    if not found:
        return _open(subject, listed(missing, 3) or findings.step_said(record, "9"))
    why = listed(f"{case}: {percent(share)}" for case, share in found.items()) + " of a copy's bytes a second"
    why += f"; not measured: {listed(missing, 3)}" if missing else ""
    if all(share >= SHARE_OF_COPY for share in found.values()):
        return Verdict(subject, KEEP, f"at least {SHARE_OF_COPY:.0%} of a copy", why)
    change = Change("gqa_jax/attention/triton/decode.py", "SMALLEST_PART and PROGRAMS: larger parts; or decode by cuDNN")
    return Verdict(subject, CHANGE, f"below {SHARE_OF_COPY:.0%} of a copy: larger parts, or cuDNN", why, (change,))


def _efficiency(record: Mapping[str, Any]) -> Verdict:
    sheet = findings.chip(record)
    subject = f"the planner's efficiency on {sheet.name if sheet else findings.device(record)}"
    forms = [form for form in findings.training(record) if form.efficiency is not None]
    if not forms:
        steps = ", ".join(findings.step_said(record, step) for step in ("3", "7"))
        return _open(subject, f"no step of ours was timed beside the planner's figure: {steps}")
    why = listed(
        (
            f"{' '.join(form.settings)}: {figure(form.planned)} s planned, {figure(form.seconds)} s measured, "
            f"MFU {percent(form.mfu()) or 'unknown'}"
            for form in forms
        ),
        20,
    )
    middle = median([form.efficiency for form in forms])
    values = ", ".join(f"{' '.join(form.settings)} {form.efficiency:.2f}" for form in forms)
    setting = f"{values}; median {middle:.2f}; {findings.device(record)}, {findings.date(record)}"
    return Verdict(subject, CHANGE, f"{middle:.2f}, dated", why, (Change("gqa_jax/planning/planner.py", setting),))


def _losses(record: Mapping[str, Any]) -> Iterator[Verdict]:
    found = findings.agreements(record)
    if not found:
        yield _open("losses beside PyTorch's", findings.step_said(record, "3"))
    for one in found:
        subject = f"losses beside {one.implementation}'s"
        if one.status != "ok" or one.last is None:
            yield _open(subject, f"no losses to compare: {one.status}")
        elif one.tokens is not True:
            yield _open(
                subject, "trained on other tokens" if one.tokens is False else "nothing says that the tokens were equal"
            )
        elif not one.last <= LOSS_TOLERANCE:
            why = f"off by {nats(one.last)} nats after {one.steps} equal steps, by {nats(one.first)} after the first"
            change = Change("benchmarks/train_ours.py, benchmarks/train_torch.py", "find the cause before a speed is quoted")
            yield Verdict(subject, CHANGE, f"disagree by more than {LOSS_TOLERANCE} nats", why, (change,))
        elif one.steps < LOSS_STEPS:
            yield _open(subject, f"{one.steps} steps alone were compared, {LOSS_STEPS} are needed")
        else:
            yield Verdict(subject, KEEP, f"agree within {LOSS_TOLERANCE} nats", f"{nats(one.last)} after {one.steps} steps")


def _readme(record: Mapping[str, Any]) -> Verdict:
    subject = "the README's road"
    rows = {str(row.get("case")): row for row in findings.rows(record, "1b")}
    runs = {case: rows.pop(case, {}) for case in ("run", "run again")}
    every = runs | rows
    wrong = [f"{case}: {row.get('reason') or row.get('status')}" for case, row in every.items() if findings.failing(row)]
    wrong += [
        f"{case}: the tables don't say {name}"
        for case, row in rows.items() for name in ("device", "attention") if row.get("loss") is not None and not row.get(name)
    ]  # fmt: skip
    if runs["run"].get("status") == "ok" and len(rows) != QUICKSTART_CELLS:
        wrong.append(f"{len(rows)} cells in the table of losses, not {QUICKSTART_CELLS}")
    if wrong:
        change = Change("README.md", "the quickstart, or what it runs: configs/grids/quickstart.py")
        return Verdict(subject, CHANGE, "wrong: mend the road", listed(wrong), (change,))
    unsure = [f"{case}: {row.get('status', 'not run')}" for case, row in every.items() if row.get("status") != "ok"]
    if unsure:
        return _open(subject, f"{findings.step_said(record, '1b')}; {listed(unsure, 5)}")
    losses = [[findings.number(row.get(name)) for name in ("loss", "loss_cpu")] for row in rows.values()]
    off = [abs(here - usual) for here, usual in losses if here is not None and usual is not None]
    why = f"{len(rows)} cells, losses within {nats(max(off))} of the CPU's, a second run trained nothing" if off else ""
    return Verdict(subject, KEEP, "right", why) if off else _open(subject, "no losses of the CPU to compare with")


# Predictions, made from compiled programs before anything had run.


def predictions(record: Mapping[str, Any]) -> list[Prediction]:
    """Each beside what was measured; of Hopper GPUs alone."""
    sheet = findings.chip(record)
    if sheet is None or sheet.name not in HOPPER:
        record = {}
    found = []
    for head_dim, low, high in ((64, 430, 520), (128, 560, 640)):
        best, of = _longest(record, head_dim, lambda by_name: findings.rate(by_name.get(("pallas_gpu", "forward"))))
        subject = f"forward pass of pallas_gpu at head size {head_dim}"
        found.append(Prediction(subject, (("", low, high),), best and best / 1e12, of, " TFLOP/s"))
    best, of = _longest(record, 64, _part_of_cudnn_backward)
    found.append(Prediction("backward pass of pallas_gpu, of cuDNN's fused one", (("", -math.inf, 0.71),), best, of, "x"))
    now, later = "as the code was", "with layers unrolled and own gradients of norms and SwiGLU"
    for remat, values in (("none", ((now, 0.32),)), ("attention_only", ((now, 0.41), (later, 0.45)))):
        form = _form(record, remat)
        ranges = tuple((words, (1 - NEAR) * value, (1 + NEAR) * value) for words, value in values)
        of = f"attention over T/2 keys a token, {' '.join(form.settings)}" if form else "not measured"
        found.append(Prediction(f"MFU of 470M, 8/1 heads, remat {remat}, cudnn", ranges, form and form.mfu(), of))
    compiled = next((f for f in findings.training(record) if f.implementation == "torch compiled" and f.ratio), None)
    ranges = (now, 0.75, 0.9), (later, 1.1, 1.25)
    of = compiled.case if compiled else "not measured"
    found.append(Prediction("ours, of torch.compile's speed", ranges, compiled and compiled.ratio, of, "x"))
    return found


def _longest(record: Mapping[str, Any], head_dim: int, value) -> tuple[float | None, str]:
    """A figure of the longest cell of a head size that has it, with 8/1 heads where there is a choice; and the cell."""
    cells = [cell for cell in findings.cells(record) if cell.head_dim == head_dim]
    for cell in sorted(cells, key=lambda cell: (-cell.length, cell.n_heads)):
        if (found := value(findings.cells(record)[cell])) is not None:
            return found, str(cell)
    return None, "not measured"


def _part_of_cudnn_backward(by_name: Mapping[tuple[str, str], Row]) -> float | None:
    mine, others = (
        findings.backward_rate(by_name.get((name, "forward")), by_name.get((name, "backward")))
        for name in ("pallas_gpu", "cudnn")
    )
    return mine / others if mine and others else None


def _form(record: Mapping[str, Any], remat: str) -> findings.Training | None:
    forms: Iterable[findings.Training] = findings.training(record)
    return next((form for form in forms if form.settings == ("470M", remat, "cudnn") and form.mfu() is not None), None)


def _judged(prediction: Prediction) -> Verdict:
    subject = f"prediction: {prediction.subject}"
    if prediction.measured is None or math.isnan(prediction.measured):
        return _open(subject, f"predicted {prediction.said}; not measured")
    hits = [words for words, low, high in prediction.ranges if low <= prediction.measured <= high]
    why = f"predicted {prediction.said}; measured {figure(prediction.measured)}{prediction.unit} ({prediction.of})"
    if not hits:
        return Verdict(subject, MISSED, MISSED, why)
    return Verdict(subject, HIT, ": ".join(filter(None, (HIT, listed(hits)))), why)
