"""Public measurements of serving against the bound and the expectation of `gqa_jax.search.roofline`.

    python -m benchmarks.public_serving                 the tables of docs/serving-measured.md
    python -m benchmarks.public_serving --rows [CLASS]  every row: seconds measured, expected, bound

benchmarks/public/serving_measured.csv holds what was published, word for word, and after it how a row is read here:

    model_key, chip, devices   of one replica, divided over heads
    param, cache, computes     dtypes of parameters and cache, and of the products with parameters
    kind                       batch 1, batched, load (as many requests as fit or as there are slots), prefill
    timing                     step: a decode step that sees `keys` keys; static: prompts read at once, then `generated` steps;
                               steady: slots are refilled as requests end; prefill: one prompt
    requests, limit            served at once; empty: as many as fit, `limit` at most
    tokens_at_once             of prompts, in one pass
    seconds, per_second        of the step, the token or the batch; output tokens of a replica
    first_token_seconds        of one prompt, where the row says it too: a second measurement, of prefill
    use, assumed, reading      fit, or bound: compared with the bound alone; what its source does not say; why it is read so

Efficiencies are fitted on half of the measurements: of each group, kind and width of operands every other one, in the order of
the file. By least squares of logarithms with a robust loss, kinds weighing alike. They are tried on the other half.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.public import comparison
from benchmarks.public.comparison import Errors, every_other, markdown
from benchmarks.public.devices import DEVICES
from benchmarks.public.models import MODELS
from gqa_jax.hardware import Efficiency
from gqa_jax.search.roofline import Layout, Phase, RooflineServing

MEASURED = Path(__file__).parent / "public" / "serving_measured.csv"
KINDS = ("batch 1", "batched", "load", "prefill")
PARTS = Phase._fields[:6]
PARTIAL = Efficiency(1.0, 1.0, 1.0, 1.0, 1.0)  # with it a Phase holds its parts at the peaks, and a second for every layer
#: Of the memory that parameters leave free, the part that TensorRT-LLM takes for caches, and vLLM of all.
FREE_SHARE = 0.9


class Case(NamedTuple):
    """A measurement: its row, the seconds, and the phases that they are spent on, each at the peaks."""

    row: int
    group: str
    kind: str
    device_class: str  # gpu or tpu
    chip: str
    bits: int  # of the operands of products with parameters
    fitted: bool
    requests: float
    seconds: float
    phases: np.ndarray  # [phase, part]: seconds at the peaks, times how often
    bound: float  # seconds
    client: bool  # whether a client of a server measured it


def read() -> pd.DataFrame:
    """The rows of `serving_measured.csv`."""
    return pd.read_csv(MEASURED)


@functools.cache
def cases() -> tuple[Case, ...]:
    """All measurements, in the order of the file; a row that times the first token too gives two."""
    found = []
    for row in read().itertuples():
        if row.timing != "prefill":
            found.append(_case(row, row.kind))
        if not math.isnan(row.first_token_seconds):
            found.append(_case(row, "prefill"))
    return tuple(found)


def _case(row, kind: str) -> Case:
    model, chip = MODELS[row.model_key], DEVICES[row.chip]
    # The bound takes the fastest products there are for the parameters' dtype.
    plain = chip if row.computes == row.param else dataclasses.replace(chip, narrow_flops=())
    expected, bound = (
        RooflineServing(
            device, int(row.devices), Layout(int(row.devices)), 1, 0.1, row.param, row.cache, model.untied, efficiency
        )
        for device, efficiency in ((plain, PARTIAL), (chip, Efficiency.of_bound()))
    )  # fmt: skip
    if kind == "prefill":
        timing, requests, seconds = "prefill", 1.0, row.first_token_seconds
    else:
        timing, requests = row.timing, row.requests if not math.isnan(row.requests) else fitting(row, reserved=True)
        seconds = row.seconds
        if math.isnan(seconds):
            seconds = requests * (row.generated if timing == "static" else 1) / row.per_second
    phases = np.array([_array(phase, times) for phase, times in _phases(row, timing, requests, expected)])
    return Case(
        row.row, row.group, kind, "tpu" if chip.tpu is not None else "gpu", row.chip,
        {"bfloat16": 16, "float8": 8, "float4": 4}[row.computes], row.use == "fit", requests, seconds, phases,
        _bound(row, timing, requests, bound), kind == "prefill" and row.group in ("silybench", "nim"),
    )  # fmt: skip


def fitting(row, *, reserved: bool) -> float:
    """Requests that a replica holds at once.

    reserved: as engines do it, with room for all tokens of a request, a part of the memory free, and `row.limit` at most.
    Otherwise the most that there can be: all memory, requests at every stage, so half of what they generate.
    """
    model, chip = MODELS[row.model_key], DEVICES[row.chip]
    serving = RooflineServing(chip, int(row.devices), Layout(int(row.devices)), 1, 0.1, row.param, row.cache, model.untied)
    tokens = row.prompt + row.generated * (1 if reserved else 0.5)
    one = serving.memory_bytes(model.shape, tokens, 2) - serving.memory_bytes(model.shape, tokens, 1)
    held = serving.memory_bytes(model.shape, tokens, 1) - one
    room = (FREE_SHARE if reserved else 1.0) * (chip.board_bytes - held) / one
    return float(np.clip(math.floor(room), 1, row.limit if reserved else math.inf))


def _phases(row, timing: str, requests: float, serving: RooflineServing) -> list[tuple[Phase, float]]:
    """What the seconds of a measurement are spent on: phases, and how often each."""
    shape = MODELS[row.model_key].shape
    if timing == "prefill":
        return [(serving.prefill(shape, row.prompt), 1.0)]
    keys = row.keys if not math.isnan(row.keys) else row.prompt + row.generated / 2
    decode = serving.decode_step(shape, keys, batch=requests)
    if timing == "step":
        return [(decode, 1.0)]
    if timing == "static":
        return [(_prompts(serving, shape, row.prompt, requests * row.prompt), 1.0), (decode, row.generated)]
    prompts = _prompts(serving, shape, row.prompt, row.tokens_at_once)
    return [(prompts, requests / row.generated * row.prompt / row.tokens_at_once), (decode, 1.0)]


def _prompts(serving: RooflineServing, shape, prompt: float, tokens: float) -> Phase:
    """A pass over so many tokens of prompts of `prompt` tokens: parameters are read once for them all."""
    passed, single = serving.prefill(shape, tokens), serving.prefill(shape, prompt)
    return passed._replace(attention=single.attention * tokens / prompt, cache=single.cache * tokens / prompt)


def _array(phase: Phase, times: float = 1.0) -> np.ndarray:
    return times * np.array([float(getattr(phase, name)) for name in PARTS])


def _bound(row, timing: str, requests: float, serving: RooflineServing) -> float:
    """Seconds below which no server can be; where lengths are not stated, of requests that have no prompt."""
    if isinstance(row.assumed, str) and row.assumed in ("keys", "lengths"):
        return float(serving.decode_step(MODELS[row.model_key].shape, 1.0, batch=requests).seconds)
    if timing != "steady":
        return sum(times * float(phase.seconds) for phase, times in _phases(row, timing, requests, serving))
    # In a steady state prompts are read while others generate, with the parameters read once for both: parts add up, and then
    # overlap. The seconds of a step are those of `requests` tokens; more of them at once may take less each.
    most = requests if not math.isnan(row.requests) else fitting(row, reserved=False)
    parts = [(phase._asdict(), times) for phase, times in _phases(row, timing, most, serving)]
    parts[0][0]["weights"] = 0.0
    whole = {name: sum(times * part[name] for part, times in parts) for name in PARTS}
    return float(Phase(**whole, overlapped=True).seconds) * requests / most


# The expectation.

#: Parts of a class's efficiency that are fitted, where from, and between what.
FREE = {
    "matmul": (0.6, 0.05, 1.0),
    "matmul_8": (0.5, 0.05, 1.0),
    "matmul_4": (0.4, 0.05, 1.0),
    "weights_bandwidth": (0.8, 0.05, 1.0),
    "cache_bandwidth": (0.8, 0.05, 1.0),
    "layer_seconds": (3e-5, 1e-6, 3e-4),
    "exchange": (0.7, 0.05, 1.0),
    "front": (5e-3, 1e-4, 0.05),
}
OF_CLASS = {
    "gpu": tuple(FREE),
    "tpu": ("matmul", "weights_bandwidth", "cache_bandwidth", "layer_seconds", "exchange"),
}


class Fitted(NamedTuple):
    """Efficiencies of a class of devices, of `hardware.Efficiency`; and what only measurements have."""

    matmul: float
    weights_bandwidth: float
    cache_bandwidth: float
    layer_seconds: float
    exchange: float = 1.0
    matmul_8: float = math.nan  # of operands of 8 bits, of their peak; NaN: as `matmul`
    matmul_4: float = math.nan
    front: float = 0.0  # seconds between a client and the first pass, of a server
    attention: float = 1.0  # of the published shares of the kernels: the measurements leave it open

    def rounded(self) -> Fitted:
        """To two digits."""
        return Fitted(*(float(f"{value:.2g}") for value in self))


def summed(parts: dict[str, np.ndarray]) -> np.ndarray:
    """Seconds of phases by parts: they add up, as in `roofline.Phase`."""
    return Phase(**parts).seconds


def overlapped(parts: dict[str, np.ndarray]) -> np.ndarray:
    """Seconds of phases where products overlap with reading what they are with: the longer of both counts."""
    hidden = np.minimum(parts["matmul"], parts["weights"]) + np.minimum(parts["attention"], parts["cache"])
    return summed(parts) - hidden


class Table(NamedTuple):
    """Cases as arrays: [case], and `parts` by name [case, phase]."""

    parts: dict[str, np.ndarray]
    bits: np.ndarray
    client: np.ndarray
    seconds: np.ndarray
    kinds: np.ndarray

    @classmethod
    def of(cls, given: list[Case]) -> Table:
        phases = np.zeros((len(given), 2, len(PARTS)))
        for i, case in enumerate(given):
            phases[i, : len(case.phases)] = case.phases
        return cls(
            dict(zip(PARTS, np.moveaxis(phases, -1, 0), strict=True)),
            *(np.array([getattr(case, name) for case in given]) for name in ("bits", "client", "seconds", "kind")),
        )

    def ratios(self, fitted: Fitted, rule: Callable = summed) -> np.ndarray:
        """Expected over measured seconds, of each case."""
        by_bits = np.select([self.bits == 8, self.bits == 4], [fitted.matmul_8, fitted.matmul_4], fitted.matmul)
        shares = {
            "matmul": np.where(np.isnan(by_bits), fitted.matmul, by_bits)[:, None],
            "attention": fitted.attention,
            "weights": fitted.weights_bandwidth,
            "cache": fitted.cache_bandwidth,
            "exchange": fitted.exchange,
            "layers": 1 / fitted.layer_seconds,
        }
        seconds = rule({name: part / shares[name] for name, part in self.parts.items()}).sum(1)
        return (seconds + fitted.front * self.client) / self.seconds


def halves(device_class: str) -> tuple[list[Case], list[Case]]:
    """What efficiencies are fitted on, and the rest: of each group, kind and width of operands every other case."""
    of_class = (case for case in cases() if case.fitted and case.device_class == device_class)
    return every_other(of_class, lambda case: (case.group, case.kind, case.bits))


def fit(given: list[Case], names: tuple[str, ...], rule: Callable = summed) -> Fitted:
    """Efficiencies `names` that come closest (`comparison.fit`), all kinds weighing alike."""
    table = Table.of(given)
    kinds, index, counts = np.unique(table.kinds, return_inverse=True, return_counts=True)
    weights = np.sqrt(len(given) / len(kinds) / counts[index])
    return Fitted(**comparison.fit(names, FREE, lambda numbers: table.ratios(Fitted(**numbers), rule), weights))


@functools.cache
def fitted(device_class: str) -> Fitted:
    """The defaults of `gqa_jax.hardware`: fitted on the first half, two digits."""
    return fit(halves(device_class)[0], OF_CLASS[device_class]).rounded()


def errors(given: list[Case], found: Fitted, rule: Callable = summed) -> dict[str, Errors]:
    """By kind, those that there are."""
    table = Table.of(given)
    ratios = table.ratios(found, rule)
    return {kind: Errors.of(ratios[table.kinds == kind]) for kind in KINDS if (table.kinds == kind).any()}


# Tables.

#: Rows that are off by more than `MISSED`, and what is known of why.
MISSED = 1.35
_SHORT = "a prompt of 128 tokens: products of so few rows reach less of their peak"
WHY = {
    5: "int4: the source itself gives 1,098 GB/s, 0.54 of the peak; int8 on the same card 1,323",
    286: _SHORT,
    329: _SHORT,
}
#: Rows of engines of 2023 with long outputs of grouped queries: as if the cache were read for every query head.
UNGROUPED = (278, 280, 296, 398)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", choices=("all", *OF_CLASS), nargs="?", const="all", help="every row, of a class of devices")
    arguments = parser.parse_args()
    if arguments.rows:
        print(rows_table(OF_CLASS if arguments.rows == "all" else (arguments.rows,)))
        return
    print("\n\n".join(tables().values()))


def tables() -> dict[str, str]:
    """The tables of docs/serving-measured.md, by what they are of."""
    return {
        "bound": bound_table(),
        "efficiencies": efficiencies_table(),
        "errors": errors_table(),
        "rules": rules_table(),
        "groups": groups_table(),
        "misses": misses_table(),
        "left out": unfitted_table(),
    }


def expected(case: Case) -> float:
    """Expected over measured seconds, by the defaults of its class."""
    return float(Table.of([case]).ratios(fitted(case.device_class))[0])


def bound_table() -> str:
    lines = []
    for kind in KINDS:
        of_kind = [case for case in cases() if case.kind == kind]
        nearest = sorted(of_kind, key=lambda case: -case.bound / case.seconds)[:3]
        faster = sum(case.seconds < case.bound for case in of_kind)
        lines.append(
            (
                kind, len(of_kind), faster, f"{np.median([case.bound / case.seconds for case in of_kind]):.2f}",
                ", ".join(f"{case.bound / case.seconds:.2f} (row {case.row}, {case.chip})" for case in nearest),
            )
        )  # fmt: skip
    return markdown("kind | measurements | faster than the bound | bound / measured, median | nearest", lines)


def efficiencies_table() -> str:
    lines = []
    for name in Fitted._fields:
        values = [getattr(fitted(kind), name) for kind in OF_CLASS]
        lines.append((LABELS[name], *(_number(name, value, kind) for value, kind in zip(values, OF_CLASS, strict=True))))
    return markdown("share of | GPU | TPU", lines)


LABELS = {
    "matmul": "peak FLOP/s, products with parameters (16 bits)",
    "matmul_8": "8-bit peak, the same",
    "matmul_4": "4-bit peak, the same",
    "weights_bandwidth": "bytes/s, reading parameters",
    "cache_bandwidth": "bytes/s, reading keys and values",
    "layer_seconds": "(us for each layer of a phase)",
    "exchange": "the least seconds of exchanges over those taken",
    "front": "(ms of a server, client to first pass)",
    "attention": "the kernels' published share of the peak, attention; not fitted",
}


def _number(name: str, value: float, kind: str) -> str:
    if math.isnan(value) or (name == "front" and not value):
        return "as 16 bits" if name.startswith("matmul") else "none measured"
    scaled = {"layer_seconds": 1e6, "front": 1e3}.get(name, 1.0) * value
    limits = FREE.get(name)
    at_limit = name in OF_CLASS[kind] and limits is not None and (value <= limits[1] or value >= limits[2])
    return f"{scaled:.2g}" + (" (its limit)" if at_limit else "")


def errors_table() -> str:
    lines = []
    for device_class, names in OF_CLASS.items():
        first, second = halves(device_class)
        found, exchanged = fitted(device_class), fit(second, names).rounded()
        seen, other, back = errors(first, found), errors(second, found), errors(first, exchanged)
        for kind in other:
            both = pooled(kind, (second, found), (first, exchanged))
            lines.append((device_class.upper(), kind, seen[kind], other[kind], back[kind], both))
    return markdown(
        "class | kind | first half, fitted | **second half** | first half, fitted on the second | all, each by the other half",
        lines,
    )


def pooled(kind: str, *pairs: tuple[list[Case], Fitted]) -> Errors:
    """Of a kind, over several lists of cases, each with efficiencies of its own."""
    ratios = [Table.of(given).ratios(found)[[case.kind == kind for case in given]] for given, found in pairs]
    return Errors.of(np.concatenate(ratios))


def variants() -> dict[str, tuple[tuple[str, ...], Callable]]:
    """Other ways to expect, for comparison: what is fitted, and how parts make seconds."""
    names = OF_CLASS["gpu"]
    return {
        "as above": (names, summed),
        "products overlap with reading": (names, overlapped),
        "one share for products of all widths": (tuple(n for n in names if n not in ("matmul_8", "matmul_4")), summed),
        "exchanges at their least": (tuple(n for n in names if n != "exchange"), summed),
    }


def rules_table() -> str:
    first, second = halves("gpu")
    lines = []
    for label, (names, rule) in variants().items():
        found = errors(second, fit(first, names, rule).rounded(), rule)
        lines.append((label, *(found[kind] for kind in KINDS)))
    return markdown("GPU, second half | " + " | ".join(KINDS), lines)


def groups_table() -> str:
    frame = read()
    lines = []
    for group, rows in frame.groupby("group", sort=False):
        of_group = [case for case in cases() if case.group == group and case.fitted]
        if not of_group:
            continue
        ratios = np.array([expected(case) for case in of_group])
        dates = sorted(str(date)[:4] for date in rows.date)
        years = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        lines.append(
            (
                group,
                ", ".join(sorted(set(rows.engine))),
                years,
                len(of_group),
                f"{np.median(ratios):.2f}",
                f"{ratios.min():.2f} to {ratios.max():.2f}",
            )
        )
    return markdown("group | engine | published | measurements | expected / measured, median | from, to", lines)


def misses_table() -> str:
    frame = read().set_index("row")
    lines = []
    for case in cases():
        ratio = expected(case)
        if case.fitted and max(ratio, 1 / ratio) > MISSED:
            why = _ungrouped(case) if case.row in UNGROUPED else WHY.get(case.row, "not known")
            lines.append((case.row, case.group, _what(frame.loc[case.row]), case.kind, f"{ratio:.2f}", why))
    return markdown("row | group | what | kind | expected / measured | why", lines)


def _ungrouped(case: Case) -> str:
    model = MODELS[read().set_index("row").loc[case.row].model_key].shape
    group = model.n_heads // model.n_kv_heads
    phases = case.phases.copy()
    phases[-1, PARTS.index("cache")] *= group
    ratio = expected(case._replace(phases=phases))
    return f"engine of 2023, grouped queries, long outputs; with the cache read for each of {group} query heads: {ratio:.2f}"


def unfitted_table() -> str:
    frame = read().set_index("row")
    lines = [
        (
            case.row,
            case.group,
            _what(frame.loc[case.row]),
            f"{case.bound / case.seconds:.2f}",
            f"{expected(case):.2f}",
            _reason(frame.loc[case.row]),
        )
        for case in cases()
        if not case.fitted
    ]
    return markdown("row | group | what | bound / measured | expected / measured | why", lines)


def _reason(row) -> str:
    return next(part for part in row.reading.split("; ") if part.startswith("not fitted: ")).removeprefix("not fitted: ")


def _what(row) -> str:
    lengths = f"{row.prompt_len}/{row.output_len}" if isinstance(row.output_len, str) else str(row.prompt_len)
    return f"{row.model_key} {row.param}, {row.devices} x {row.chip}, {lengths}"


def rows_table(classes) -> str:
    frame = read().set_index("row")
    lines = []
    for case in cases():
        if case.device_class in classes:
            lines.append(
                (
                    case.row, case.group, _what(frame.loc[case.row]), case.kind, f"{case.requests:g}", f"{case.seconds:.4g}",
                    f"{case.seconds * expected(case):.4g}", f"{case.bound:.4g}", f"{expected(case):.2f}",
                )
            )  # fmt: skip
    return markdown("row | group | what | kind | requests | seconds | expected | bound | expected / measured", lines)


if __name__ == "__main__":
    main()
