"""How well the intervals and probabilities of the laws hold: on synthetic grids, whose truth is known.

    python -m benchmarks.coverage [--truths 1000] [--regimes clean,break_3x] [--method posterior] [--workers 2] [--out A.json]

Of every truth of a regime (`benchmarks.coverage_grids`) a grid of losses is drawn, fitted as `fit` does, and asked what the
cheapest heads are at one of the paper's five contexts, drawn too: at each of them other heads win. Nothing is trained.

Every grid has random numbers of its own (seed, regime, number of the truth), so methods see the same grids, and results
depend neither on the number of processes nor on which regimes are asked for. Intervals of what is printed are 99%, by
resampling grids: what runs of one grid share is no independent evidence.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from benchmarks.coverage_grids import REGIMES, Grid, grid
from gqa_jax import formatting
from gqa_jax.errors import closest
from gqa_jax.formatting import LARGEST_REGRET
from gqa_jax.hardware import host
from gqa_jax.laws import LawsByHeads, fit_by_heads
from gqa_jax.search import optimum, ranking

DRAWS = 1000
LEVEL = 0.95
BINS = (0.0, 0.05, 0.2, 0.5, 0.8, 0.95, 1.0)  # of stated probabilities
RESAMPLES = 2000
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
RULES = ("free E", "shared E", "two largest")


@dataclasses.dataclass(frozen=True)
class Said:
    """What one method says of a grid, against the truth."""

    covers_size: float  # share of the H whose interval of N* has the truth
    covers_entropy: float
    covers_exponent: float  # share of the H; of the local exponent at the middle of the sizes
    width: float  # of ln N*, median over H
    unbounded: float  # share of the H whose N* has no upper end
    probability_H: np.ndarray  # that an H is the cheapest
    answer: int | None  # the H of least expected regret; None where no draw reaches the loss

    def regret(self, regret_H: np.ndarray) -> float:
        return LARGEST_REGRET if self.answer is None else float(regret_H[self.answer])


@dataclasses.dataclass(frozen=True)
class Record:
    """What came out for one truth."""

    regime: str
    index: int
    refused: str | None  # why there is no law or there are no draws
    said: dict[str, Said]  # by method
    best: int  # the H that is the cheapest in truth
    regret_H: np.ndarray  # true regret of choosing an H
    rules: dict[str, float]  # true regret of what a simple rule chooses
    seconds: dict[str, float]  # of the processor, by what was done


def measure(name: str, index: int, methods: Sequence[str], *, seed: int = 0, draws: int = DRAWS) -> Record:
    """Fits one grid and compares what each method says with the truth."""
    one = grid(name, index, seed)
    heads, seconds = one.truth.heads, {}
    cost_H = one.cost(np.exp(one.log_size_H))
    regret_H = ranking.regret(cost_H)
    said, refused, chosen = {}, None, {}

    def timed(what: str, function: Callable[[], Any]) -> Any:
        start = time.process_time()
        found = function()
        seconds[what] = time.process_time() - start
        return found

    try:
        laws = timed("fit", lambda: fit_by_heads(one.table()))
        for method in methods:
            timed(f"draws, {method}", lambda method=method: laws.draws(draws, index, method))
    except ValueError as error:  # losses that do not fall, or that no draw of a law fits
        laws, refused = None, str(error)
    if laws is not None:
        chosen["shared E"] = _choice(one, [_reached(laws[h], one.asked) for h in heads])
        said = {
            method: timed(f"answer, {method}", lambda method=method: say(laws, one, method, draws, index)) for method in methods
        }
    chosen["free E"] = _choice(one, free_entropy_sizes(one))
    chosen["two largest"] = _choice(one, two_largest_sizes(one))
    rules = {rule: LARGEST_REGRET if (i := chosen.get(rule)) is None else float(regret_H[i]) for rule in RULES}
    return Record(name, index, refused, said, int(cost_H.argmin()), regret_H, rules, seconds)


def say(laws: LawsByHeads, one: Grid, method: str, draws: int, seed: int) -> Said:
    """What a method's draws say of a grid, as `gqa_jax.search.optimum` reads them."""
    drawn = laws.draws(draws, seed, method).take(list(one.truth.heads))
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]

    def covers(values: np.ndarray, truth: np.ndarray) -> tuple[float, np.ndarray]:
        low, high = ranking.quantiles(values, tails)
        return float(np.mean((low <= truth) & (truth <= high))), high - low

    covers_size, width_H = covers(drawn.log_size(one.asked), one.log_size_H)
    exponent_SxH = drawn.b_SxH
    if drawn.bends is not None:
        exponent_SxH = exponent_SxH + drawn.bends.at(np.array([math.log(one.middle)]))[1][:, None]
    regrets = optimum.regrets(laws, one.asked, one.served, aspect="trained", draws=draws, seed=seed, method=method)
    order = [regrets.heads.index(h) for h in one.truth.heads]
    regret_SxH = regrets.regret_SxH[regrets.reached_S][:, order]
    probability, answer = np.full(len(order), np.nan), None
    if len(regret_SxH):
        probability = np.bincount(regret_SxH.argmin(1), minlength=len(order)) / len(regret_SxH)
        answer = int(regret_SxH.mean(0).argmin())
    return Said(
        covers_size,
        covers(drawn.entropy_SxH[:, 0], np.array(one.truth.entropy))[0],
        covers(exponent_SxH, one.truth.exponent(one.middle))[0],
        float(np.median(width_H)),
        float(np.mean(np.isinf(width_H))),
        probability,
        answer,
    )


def free_entropy_sizes(one: Grid) -> np.ndarray:
    """N*_H by a law of every H alone, E its own: log-linear least squares, weighted, for each E of a grid made finer thrice."""
    x, loss = np.log(one.params_HxM / one.middle)[:, None], one.loss_HxM[:, None]
    lowest = one.loss_HxM.min(1)
    low, high = np.zeros(len(lowest)), lowest - 1e-3
    rows = np.arange(len(lowest))
    for _ in range(4):
        entropy_HxE = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, 41)
        above = loss - entropy_HxE[..., None]
        offset, slope, squares = _weighted_line(x, np.log(above), above**2)
        best = squares.argmin(1)
        found = entropy_HxE[rows, best], offset[rows, best], slope[rows, best]
        low, high = entropy_HxE[rows, np.maximum(best - 1, 0)], entropy_HxE[rows, np.minimum(best + 1, 40)]
    entropy, offset, slope = found
    gap = one.asked - entropy
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        size = one.middle * np.exp((np.log(gap) - offset) / slope)
    return np.where((gap > 0) & (slope < 0), size, np.inf)


def two_largest_sizes(one: Grid) -> np.ndarray:
    """N*_H by the straight line of ln L against ln N through the two largest sizes of every H."""
    x, y = np.log(one.params_HxM[:, -2:]), np.log(one.loss_HxM[:, -2:])
    slope = (y[:, 1] - y[:, 0]) / (x[:, 1] - x[:, 0])
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(slope < 0, np.exp(x[:, 1] + (math.log(one.asked) - y[:, 1]) / slope), np.inf)


def _weighted_line(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(offset, slope, weighted sum of squares) of least squares along the last axis."""
    total = w.sum(-1)
    mean_x, mean_y = (w * x).sum(-1) / total, (w * y).sum(-1) / total
    dx, dy = x - mean_x[..., None], y - mean_y[..., None]
    slope = (w * dx * dy).sum(-1) / (w * dx**2).sum(-1)
    return mean_y - slope * mean_x, slope, (w * (dy - slope[..., None] * dx) ** 2).sum(-1)


def _reached(law: Any, loss: float) -> float:
    return law.solve(loss) if loss > law.entropy else np.inf


def _choice(one: Grid, size_H: Sequence[float]) -> int | None:
    """The cheapest H at these sizes; None where no H reaches the loss."""
    cost = one.cost(np.asarray(size_H, np.float64))
    return int(cost.argmin()) if np.isfinite(cost).any() else None


# What is said of many grids.


def summary(records: Sequence[Record], method: str, against: str | None = None) -> dict[str, Any]:
    """How well a method holds in one regime: numbers, and {"value", "low", "high"} with 99% intervals over grids.

    Args:
      records: of one regime; those that were refused count in `refused` and in the regret of the rules only.
      against: a method whose widths are compared with.
    """
    heard = [r for r in records if r.refused is None]
    result: dict[str, Any] = {
        "truths": len(records),
        "refused": len(records) - len(heard),
        "seconds": {k: float(np.mean([r.seconds[k] for r in heard])) for k in heard[0].seconds} if heard else {},
    }
    if not heard:
        return result
    said = [r.said[method] for r in heard]
    for name in ("covers_size", "covers_entropy", "covers_exponent", "unbounded"):
        result[name] = mean([getattr(s, name) for s in said])
    result["width"] = resampled(lambda rows: np.median(column(said, "width")[rows], -1), len(said))
    if against is not None:
        base = column([r.said[against] for r in heard], "width")
        own = column(said, "width")
        result["width_ratio"] = resampled(lambda rows: _ratio(np.median(own[rows], -1), np.median(base[rows], -1)), len(said))
    answered = [(r, s) for r, s in zip(heard, said, strict=True) if s.answer is not None]
    result["without_answer"] = len(heard) - len(answered)
    if answered:
        stated = np.array([s.probability_H[s.answer] for _, s in answered])
        hit = np.array([s.answer == r.best for r, s in answered], float)
        result |= {"stated": mean(stated), "happened": mean(hit), "overstated": mean(stated - hit)}
        result["bins"] = bins(
            np.array([s.probability_H for _, s in answered]),
            np.array([np.arange(len(s.probability_H)) == r.best for r, s in answered]),
        )
    own = np.array([s.regret(r.regret_H) for r, s in zip(heard, said, strict=True)])
    result["regret"] = _points(own)
    result["rules"] = {
        rule: {"regret": _points(other := np.array([r.rules[rule] for r in heard])), "more": _points(own - other)}
        for rule in RULES
    }
    return result


def bins(stated_NxH: np.ndarray, happened_NxH: np.ndarray) -> list[dict[str, float]]:
    """Of all H of all grids by their stated probability: how many, the mean that was stated, and how often it happened."""
    place = np.clip(np.searchsorted(BINS, stated_NxH, "right") - 1, 0, len(BINS) - 2)
    return [
        {"from": BINS[i], "to": BINS[i + 1], "count": int((place == i).sum()),
         "stated": float(stated_NxH[place == i].mean()), "happened": float(happened_NxH[place == i].mean())}
        for i in range(len(BINS) - 1)
        if (place == i).any()
    ]  # fmt: skip


def column(rows: Iterable[Any], name: str) -> np.ndarray:
    return np.array([getattr(row, name) for row in rows], np.float64)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b; 1 where both are infinite."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(a) & np.isinf(b), 1.0, a / b)


@functools.lru_cache(maxsize=4)
def _resamples(count: int) -> np.ndarray:
    """Rows of `count` grids drawn with replacement, the same for every column, so that differences are of the same grids."""
    return np.random.default_rng(count).integers(count, size=(RESAMPLES, count))


def resampled(statistic: Callable[[np.ndarray], np.ndarray], count: int) -> dict[str, float]:
    """A statistic of indices (..., count) of grids, with its 99% interval; ends of infinite values may be infinite."""
    low, high = ranking.quantiles(np.asarray(statistic(_resamples(count))), [0.005, 0.995])
    return {"value": float(statistic(np.arange(count))), "low": float(low), "high": float(high)}


def mean(values: Sequence[float]) -> dict[str, float]:
    values = np.asarray(values, np.float64)
    return resampled(lambda rows: values[rows].mean(-1), len(values))


def _points(values: np.ndarray) -> dict[str, float]:
    """Mean and its standard error, in percent points."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": float(100 * values.mean()), "error": float(100 * error)}


LEAST_COVERAGE, PRIOR_COVERAGE = 0.92, (0.93, 0.97)
WIDEST = 1.9  # times the width of independent noise and exact power laws, on clean grids
FURTHEST_OFF = 0.05  # of stated probabilities
REGRET_MARGIN = 0.05  # percent points


def missed(summaries: dict[str, dict[str, Any]]) -> list[str]:
    """Sentences on the bounds that do not hold; a bound holds where the 99% interval over grids meets it."""
    found = []

    def check(name: str, what: str, measured: dict[str, float], low: float, high: float) -> None:
        if measured["high"] < low or measured["low"] > high:
            limits = (
                f"at least {low:g}" if math.isinf(high) else f"at most {high:g}" if math.isinf(low) else f"{low:g} to {high:g}"
            )
            found.append(
                f"{name}: {what} {measured['value']:.3f} ({measured['low']:.3f} to {measured['high']:.3f}), wanted {limits}"
            )

    for name, one in summaries.items():
        if one["refused"] == one["truths"]:
            found.append(f"{name}: every grid was refused")
            continue
        bounds = PRIOR_COVERAGE if REGIMES[name].from_prior else (LEAST_COVERAGE, math.inf)
        check(name, "coverage of N*", one["covers_size"], *bounds)
        if name == "clean" and "width_ratio" in one:
            check(name, "width against independent noise and power laws", one["width_ratio"], -math.inf, WIDEST)
        if "overstated" in one:
            check(name, "stated probability minus what happened", one["overstated"], -FURTHEST_OFF, FURTHEST_OFF)
        best = min(RULES, key=lambda rule: one["rules"][rule]["regret"]["mean"])
        more = one["rules"][best]["more"]
        if more["mean"] > REGRET_MARGIN + 2 * more["error"]:
            found.append(f"{name}: regret {more['mean']:.2f} ± {more['error']:.2f} points above that of {best}")
    return found


def markdown(summaries: dict[str, dict[str, Any]]) -> str:
    """Tables for a page of documentation."""
    rows = [
        "| regime | asked at | 95% of N* hold | E | exponent | width of ln N* | x independent | unbounded | P of the answer | "
        "it was the best |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    regrets = [
        "| regime | regret | " + " | ".join(f"against {rule}" for rule in RULES) + " | no law | no answer |",
        "|---|---|" + "---|" * len(RULES) + "---|---|",
    ]
    for name, one in summaries.items():
        about = f"{name}: {REGIMES[name].about}"
        if "covers_size" not in one:
            rows.append(f"| {about} | {REGIMES[name].far:g}x |" + " |" * 8)
            regrets.append(f"| {name} |" + " |" * (1 + len(RULES)) + f" {one['refused']} of {one['truths']} | |")
            continue
        cells = [
            about, f"{REGIMES[name].far:g}x", percent(one["covers_size"], spread=True), percent(one["covers_entropy"]),
            percent(one["covers_exponent"]), f"{one['width']['value']:.2f}",
            f"{one['width_ratio']['value']:.2f}" if "width_ratio" in one else "", percent(one["unbounded"]),
        ]  # fmt: skip
        cells += [percent(one["stated"]), percent(one["happened"], spread=True)] if "stated" in one else ["", ""]
        rows.append(f"| {' | '.join(cells)} |")
        cells = [name, _said(one["regret"]), *(_said(one["rules"][r]["more"], sign=True) for r in RULES)]
        cells += [f"{one['refused']} of {one['truths']}", f"{one['without_answer']}"]
        regrets.append(f"| {' | '.join(cells)} |")
    binned = ["| stated | " + " | ".join(summaries) + " |", "|---|" + "---|" * len(summaries)]
    for low, high in itertools.pairwise(BINS):
        cells = []
        for one in summaries.values():
            row = next((b for b in one.get("bins", ()) if b["from"] == low), None)
            cells.append(f"{row['stated']:.2f} / {row['happened']:.2f} ({row['count']})" if row else "")
        binned.append(f"| {low:g} to {high:g} | {' | '.join(cells)} |")
    parts = [
        "\n".join(rows),
        "True regret of the answer in percent, mean ± standard error, and how much more it is than that of simple rules:",
        "\n".join(regrets),
        "Stated probability of an H being the cheapest / how often it was (how many):",
        "\n".join(binned),
    ]
    return "\n\n".join(parts)


def percent(one: dict[str, float], *, spread: bool = False) -> str:
    text = f"{100 * one['value']:.1f}%"
    return f"{text} ({100 * one['low']:.1f} to {100 * one['high']:.1f})" if spread else text


def _said(one: dict[str, float], *, sign: bool = False) -> str:
    return f"{one['mean']:+.2f} ± {one['error']:.2f}" if sign else f"{one['mean']:.2f} ± {one['error']:.2f}"


# All of them.


def run(
    task: Callable[[str, int], Any], regimes: Sequence[str], truths: int, workers: int, say: Callable[[str], None]
) -> dict[str, list]:
    """`task(regime, index)` of every truth, in `workers` processes with one thread each; results in the order of the truths.

    `task` must pickle, and its results must have `regime` and `index`.
    """
    jobs = [(name, i) for i in range(truths) for name in regimes]
    found: dict[str, list] = {name: [None] * truths for name in regimes}
    start = told = time.perf_counter()
    for done, record in enumerate(_each(functools.partial(_apply, task), jobs, workers), 1):
        found[record.regime][record.index] = record
        now = time.perf_counter()
        if now - told > 15 or done == len(jobs):
            told = now
            rate = done / (now - start)
            say(f"{done} of {len(jobs)} grids, {rate:.2f} per second, {formatting.duration((len(jobs) - done) / rate)} left")
    return found


def _apply(task: Callable[[str, int], Any], job: tuple[str, int]) -> Any:
    return task(*job)


def _each(function: Callable, jobs: Sequence, workers: int) -> Iterator:
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))  # read by the processes when they load numpy
    try:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            yield from pool.imap_unordered(function, jobs, chunksize=1)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def document(arguments: Sequence[str], about: dict[str, Any], summaries: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What is written as JSON: results with what they were made by. Infinite numbers become null."""
    return {
        "command": shlex.join(["python", "-m", "benchmarks.coverage", *arguments]),
        **about,
        "seconds": seconds,
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "machine": host.described(),
        "regimes": _plain(summaries),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def chosen_regimes(text: str | None) -> list[str]:
    """Names from a comma-separated list; all where there is none. ValueError for an unknown one."""
    names = list(REGIMES) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in REGIMES:
            raise ValueError(f"regime {name!r} is unknown: {closest(name, REGIMES)}")
    return list(dict.fromkeys(names))


def read(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a benchmark over grids, those that all of them have included, and the regimes that were chosen."""
    parser.add_argument("--truths", type=int, default=1000, help="per regime")
    parser.add_argument("--regimes", help=f"some of {', '.join(REGIMES)}; default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=len(host.cpus()))
    options = parser.parse_args(arguments)
    for name, least in (("truths", 1), ("workers", 1), ("draws", 2)):
        if getattr(options, name, least) < least:
            parser.error(f"--{name} {getattr(options, name)}: must be at least {least}")
    try:
        return options, chosen_regimes(options.regimes)
    except ValueError as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="posterior", choices=["posterior", "independent", "bootstrap"])
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--out", type=Path, help="writes the numbers as JSON")
    options, regimes = read(parser, arguments)
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.parent}")
    start = time.perf_counter()
    against = "independent" if options.method != "independent" else None
    methods = [options.method, *([against] if against else [])]
    task = functools.partial(measure, methods=methods, seed=options.seed, draws=options.draws)
    records = run(task, regimes, options.truths, options.workers, tell)
    summaries = {name: summary(found, options.method, against) for name, found in records.items()}
    print(markdown(summaries))
    for sentence in missed(summaries):
        print(f"\nmissed: {sentence}")
    seconds = time.perf_counter() - start
    print(f"\n{options.truths} truths per regime, {seconds:.0f} s with {options.workers} workers")
    if options.out is not None:
        about = {"truths": options.truths, "seed": options.seed, "method": options.method, "draws": options.draws}
        options.out.write_text(json.dumps(document(arguments, about, summaries, seconds), indent=1, allow_nan=False) + "\n")


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
