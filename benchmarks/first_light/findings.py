"""What a record of first light says, by subject: rows that belong together, and numbers as text. Imports no jax.

Any field may be missing, since a run that is cut short keeps what it had; NaN and infinities are words in the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.first_light.supervisor import median
from gqa_jax.hardware import CHIPS, Chip, chip_of

Row = Mapping[str, Any]
#: Statuses of what was tried and did not work; the worker's own start is not counted (`failing`).
FAILING = ("wrong", "hang", "died", "failed")
NOT_TRIED = ("left out", "out of time")
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "OutOfMemoryError")
BACKWARD_ALONE = 2.5  # FLOPs of the backward pass, of the forward pass's: five products for two


class Cell(NamedTuple):
    """A shape of attention that is compared: plain, causal, without documents."""

    head_dim: int
    n_heads: int
    n_kv_heads: int
    length: int

    @property
    def group(self) -> int:
        return self.n_heads // self.n_kv_heads

    def __str__(self) -> str:
        return f"T = {tokens(self.length)}, {self.n_heads}/{self.n_kv_heads} heads of {self.head_dim}"


# Numbers.


def number(value: Any) -> float | None:
    """A figure of the record, NaN and infinities too; None for what is missing or no number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def above_zero(value: Any) -> float | None:
    """A finite figure above 0, such as a time or a rate, else None."""
    found = number(value)
    return found if found is not None and math.isfinite(found) and found > 0 else None


def figure(value: Any, *, scale: float = 1.0) -> str:
    """Three digits, or all of a whole number; "" for what is missing."""
    found = number(value)
    if found is None:
        return ""
    found *= scale
    return f"{found:,.0f}" if abs(found) >= 100 and math.isfinite(found) else f"{found:.3g}"


def percent(value: Any) -> str:
    found = number(value)
    return "" if found is None else f"{100 * found:.1f}%"


def times(value: Any) -> str:
    found = number(value)
    return "" if found is None else f"{found:.2f}x"


def gigabytes(value: Any) -> str:
    found = number(value)
    return "" if found is None else f"{found / 1e9:.1f}"


def mebibytes(value: Any) -> str:
    found = number(value)
    return "" if found is None else f"{found / 2**20:,.1f}"


def nats(value: Any) -> str:
    """A loss, to a tenth of a thousandth."""
    found = number(value)
    return "" if found is None else f"{found:.4f}"


def tokens(length: Any) -> str:
    """A length as people say it: 16K."""
    found = number(length)
    if found is None or not math.isfinite(found):
        return "?"
    return f"{found / 1024:.0f}K" if found >= 1024 and found % 1024 == 0 else f"{found:.0f}"


def heads(row: Row) -> str:
    return f"{row.get('n_heads', '?')}/{row.get('n_kv_heads', '?')}"


def listed(values: Iterable[Any], most: int = 8) -> str:
    """In one line, without repetitions; how many more where there are more than `most`."""
    different = list(dict.fromkeys(str(value) for value in values))
    return ", ".join(different[:most]) + (f" and {len(different) - most} more" if len(different) > most else "")


# The head of a record.


def part(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A field of a record that is a table of its own; empty where it is missing."""
    found = record.get(name)
    return dict(found) if isinstance(found, Mapping) else {}


def device(record: Mapping[str, Any]) -> str:
    """The card as JAX names it, else as its driver does, else as a row has it; compiled only: what for."""
    target = record.get("target") if record.get("mode") == "compile_only" else None
    found = target or part(record, "environment").get("device") or part(record, "card").get("name")
    found = found or next((row["device"] for row in rows(record) if row.get("device")), None)
    return str(found or "an unknown device")


def chip(record: Mapping[str, Any]) -> Chip | None:
    """The data sheet's row of the card, or None."""
    name = device(record)
    return CHIPS.get(name) or chip_of(name)


def date(record: Mapping[str, Any]) -> str:
    return str(record.get("date") or str(record.get("began") or "")[:10] or "undated")


def versions(record: Mapping[str, Any]) -> dict[str, str]:
    """Of all that took part, by name; PyTorch has a Python of its own."""
    found: dict[str, str] = {}
    for one in (part(record, "environment"), *rows(record)):
        known = {name: str(version) for name, version in part(one, "versions").items() if version is not None}
        if "torch" in known and "python" in known:
            known["PyTorch's python"] = known.pop("python")
        found |= known
    return found


def rows(record: Mapping[str, Any], *steps: str) -> list[Row]:
    """Rows of these steps, or of all."""
    found = record.get("rows")
    found = [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []
    return [row for row in found if not steps or str(row.get("step")) in steps]


def step_said(record: Mapping[str, Any], name: str) -> str:
    """How a step went, for what it lacks: "step 3: left out: no time left"."""
    step = part(part(record, "steps"), name)
    if not step:
        return f"step {name} did not begin"
    return f"step {name}: " + ": ".join(str(step[key]) for key in ("status", "reason") if step.get(key))


def failing(row: Row) -> bool:
    """Whether what the row is of was tried and did not work. Memory that does not suffice is no failure of a kernel."""
    if row.get("status") not in FAILING or (row.get("status") != "wrong" and row.get("ended_in") == "start"):
        return False
    return not any(words in str(row.get("reason")) for words in OUT_OF_MEMORY)


# Attention.


def passes(record: Mapping[str, Any]) -> list[Row]:
    """Rows of attention's speed: a pass of one contender."""
    return [row for row in rows(record, "2", "8") if row.get("direction") and row.get("implementation")]


def cells(record: Mapping[str, Any]) -> dict[Cell, dict[tuple[str, str], Row]]:
    """Plain passes by cell, and within it by (implementation, direction)."""
    found: dict[Cell, dict[tuple[str, str], Row]] = {}
    for row in passes(record):
        shape = [row.get(name) for name in Cell._fields]
        if not all(isinstance(size, int) and size > 0 for size in shape):
            continue
        if row.get("form", "plain") == "plain" and row.get("documents") is None:
            found.setdefault(Cell(*shape), {})[str(row["implementation"]), str(row["direction"])] = row
    return found


def ratio(row: Row | None, baseline: Row | None) -> float | None:
    """How many times as fast as the baseline, the median within turns; None where one was not timed."""
    if row is None or baseline is None:
        return None
    mine, others = (above_zero(one.get("seconds")) for one in (row, baseline))
    if mine is None or others is None:
        return None
    pairs = zip(turns(row), turns(baseline), strict=False)
    return median([b / a for a, b in pairs]) if turns(row) and turns(baseline) else others / mine


def turns(row: Row) -> list[float]:
    """Seconds by turn."""
    found = row.get("turns")
    found = [above_zero(value) for value in found] if isinstance(found, list) else []
    return [value for value in found if value is not None]


def rate(row: Row | None) -> float | None:
    """FLOP/s of a pass, None where it was not timed. "backward" has the forward pass within it."""
    if row is None or row.get("status") != "ok":
        return None
    found = above_zero(row.get("tflops"))
    return None if found is None else found * 1e12


def backward_rate(forward: Row | None, both: Row | None) -> float | None:
    """FLOP/s of the backward pass alone: what forward and backward take more than forward."""
    if rate(forward) is None or rate(both) is None:
        return None
    amount, short, long = above_zero(forward.get("amount")), above_zero(forward.get("seconds")), above_zero(both.get("seconds"))
    if None in (amount, short, long) or long <= short:
        return None
    return BACKWARD_ALONE * amount / (long - short)


def shares(record: Mapping[str, Any], implementation: str) -> list[tuple[int, float, float]]:
    """(head size, forward share, backward share) of the chip's peak, at the longest length: the median over heads.

    Heads alone, as `attention_share` of a chip has them; the backward pass by difference. Empty without a data sheet.
    """
    sheet = chip(record)
    if sheet is None:
        return []
    found: dict[int, dict[int, list[tuple[float, float]]]] = {}
    for cell, by_name in cells(record).items():
        forward, both = (by_name.get((implementation, direction)) for direction in ("forward", "backward"))
        first, second = rate(forward), backward_rate(forward, both)
        if first is not None and second is not None:
            found.setdefault(cell.head_dim, {}).setdefault(cell.length, []).append((first, second))
    result = []
    for head_dim, by_length in sorted(found.items()):
        longest = by_length[max(by_length)]
        result.append((head_dim, *(median([pair[i] for pair in longest]) / sheet.peak_flops for i in range(2))))
    return result


# Training.


class Training(NamedTuple):
    """One form of a training step, from its preparation and all of its turns."""

    step: str
    case: str
    implementation: str
    prepared: Row  # of its worker; empty where there is none
    ours: Row  # our preparation of the same case: tokens and FLOPs of a step, the chip's peak
    seconds: float | None  # of a step
    ratio: float | None  # how many times as fast ours is; None for ours

    def mfu(self, convention: str = "causal") -> float | None:
        """Model FLOPs utilisation; attention over T/2 keys a token ("causal"), or over T ("full")."""
        flops = above_zero(part(self.ours, "flops_per_step").get(convention))
        peak = above_zero(self.ours.get("peak_flops"))
        return None if None in (flops, peak, self.seconds) else flops / self.seconds / peak

    @property
    def rate(self) -> float | None:
        """Tokens a second."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None

    @property
    def tokens(self) -> float | None:
        return above_zero(self.ours.get("tokens_per_step"))

    @property
    def planned(self) -> float | None:
        """Seconds of a step by the planner, which ours alone has."""
        found = above_zero(part(self.prepared, "planner").get("seconds_step"))
        return found if self.implementation == OURS else None

    @property
    def efficiency(self) -> float | None:
        """The planner's seconds of a step over those measured: at most 1 of a true lower bound."""
        return None if self.planned is None or self.seconds is None else self.planned / self.seconds

    @property
    def settings(self) -> tuple[str, str, str]:
        """Size, rematerialisation, attention; "?" for what the record lacks."""
        size = str(self.prepared.get("size") or self.case.split(" ")[0])
        return size, str(self.prepared.get("remat") or "?"), str(self.prepared.get("attention") or "?")


OURS = "gqa_jax"


def training(record: Mapping[str, Any]) -> list[Training]:
    """Every form that was prepared or measured, in order."""
    prepared: dict[tuple[str, str, str], Row] = {}
    measured: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows(record, "3", "7"):
        key = str(row.get("step")), str(row.get("case")), str(row.get("implementation"))
        if row.get("phase") == "measure":
            measured.setdefault(key, []).append(row)
        elif row.get("phase") == "prepare" or (row.get("status") == "left out" and row.get("implementation")):
            prepared.setdefault(key, row)
    found = []
    for key in dict.fromkeys([*prepared, *measured]):
        step, case, implementation = key
        ours = prepared.get((step, case, OURS), {})
        made = measured.get(key, [])
        seconds = [second for row in made for second in (turns(row) or [above_zero(row.get("seconds_step"))]) if second]
        if not above_zero(ours.get("tokens_per_step")):
            ours = {**ours, "tokens_per_step": next((row["tokens"] for row in made if above_zero(row.get("tokens"))), None)}
        compared = [value for row in made if (value := above_zero(row.get("gqa_jax_is"))) is not None]
        ratio = median(compared) if compared and implementation != OURS else None
        found.append(Training(*key, prepared.get(key, {}), ours, median(seconds) if seconds else None, ratio))
    return found


class Agreement(NamedTuple):
    """Losses of the same steps, ours and another's."""

    implementation: str
    status: str  # of the other's losses: "ok", or why there are none
    steps: int  # compared
    last: float | None  # difference at the last of them, in nats; NaN where a loss is
    first: float | None
    tokens: bool | None  # whether both trained on the same; None: not said


def agreements(record: Mapping[str, Any]) -> list[Agreement]:
    """Of each other framework that was asked for its losses."""
    found = {str(row.get("implementation")): row for row in rows(record, "3") if str(row.get("case")).endswith(": losses")}
    ours = found.pop(OURS, {})
    return [_agreement(name, ours, row) for name, row in found.items()]


def _agreement(name: str, ours: Row, theirs: Row) -> Agreement:
    both = [one.get("losses") if isinstance(one.get("losses"), list) else [] for one in (ours, theirs)]
    pairs = [(number(a), number(b)) for a, b in zip(*both, strict=False)]
    off = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    sums = [one.get("tokens_sha256") for one in (ours, theirs)]
    status = str(theirs.get("status")) if ours.get("status") == "ok" else f"ours: {ours.get('status', 'not measured')}"
    same = sums[0] == sums[1] if all(sums) else None
    return Agreement(name, status, len(off), off[-1] if off else None, off[0] if off else None, same)


# The rest.


def ceilings(record: Mapping[str, Any]) -> Iterator[tuple[str, Row, float | None, float | None]]:
    """Name, row, rate (FLOP/s of products, bytes/s of copies, read and written), and its share of the data sheet's."""
    sheet = chip(record)
    for row in rows(record, "0"):
        if row.get("case") in ("matmul", "copy"):
            reached = above_zero(row.get("rate"))
            most = None if sheet is None else sheet.peak_flops if row["case"] == "matmul" else sheet.memory_bandwidth
            yield row["case"], row, reached, reached / most if reached and most else None


def resumed(record: Mapping[str, Any]) -> dict[str, dict[str, Row]]:
    """Rows of the step about resuming: attention -> setting -> row."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows(record, "4"):
        if row.get("attention") and row.get("setting"):
            found.setdefault(str(row["attention"]), {})[str(row["setting"])] = row
    return found


def price(by_setting: Mapping[str, Row]) -> float | None:
    """How many times as long a step takes with deterministic operations; None where one of both was not timed."""
    plain, other = (above_zero(by_setting.get(name, {}).get("seconds_step")) for name in ("default", "deterministic"))
    return other / plain if plain and other else None


def exact(row: Row) -> bool | None:
    """Whether steps were equal in all their bits, repeated and resumed here and in another process; None: not known."""
    answers = row.get("distinct"), row.get("same_process"), row.get("second_process")
    if row.get("status") != "ok" or None in answers:
        return None
    return answers == (1, True, True)
