"""Tiles of kernels, tried side by side on the device at hand; the best are printed as lines of Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks import attention_measure as measuring
from benchmarks.attention_contenders import Contender
from benchmarks.attention_measure import Ceilings, Limits
from gqa_jax.attention import Case, implementations, xla
from gqa_jax.attention.gradient import Kernel, attend
from gqa_jax.attention.masks import Mask

FINALISTS = 4
WORTHWHILE = 1.02  # less is noise, and a table that changes with every run


class Tunable(NamedTuple):
    """What a kernel offers to be tuned; options are a NamedTuple.

    candidates(case): options worth trying. choose(case): the present ones. forward, backward: as in `gradient.Kernel`.
    Where options are a tuple of tiles, NamedTuples themselves, tiles are tuned one after the other: that called `forward` by
    the forward pass, the others by forward and backward. Candidates then need not hold all combinations.
    """

    candidates: Callable[[Case], Sequence[Any]]
    choose: Callable[[Case], Any]
    forward: Callable
    backward: Callable

    @classmethod
    def of(cls, module) -> Tunable:
        """Of a module that has the four under these names."""
        return cls(*(getattr(module, field) for field in cls._fields))


def _xla_candidates(case: Case) -> list[xla.Options]:
    """Unrolled blocks while there are few of them; loops over chunks."""
    blocks = [block for block in (64, 128, 256, 512, 1024) if block <= case.length]
    unrolled = [xla.Options(block, None) for block in blocks if case.length // block <= 16]
    return unrolled + [xla.Options(block, chunk) for block in blocks for chunk in (128, 256, 512, 1024) if chunk <= case.keys]


#: By name of the implementation: the one place to enter a kernel.
TUNABLES: dict[str, Tunable] = {
    "xla": Tunable(_xla_candidates, lambda case: xla.choose(case.batch, case.length, case.n_heads), xla.forward, xla.backward),
}


class Gain(NamedTuple):
    """What one contest brought: seconds of the pass with the best options, and how many times as fast as the ones before."""

    what: str
    seconds: float
    ratio: float
    tried: int


class Tuned(NamedTuple):
    """The best options for a case, how they came about, and the candidates that were wrong or failed."""

    implementation: str
    case: Case
    options: Any
    gains: tuple[Gain, ...]
    problems: tuple[str, ...]

    def line(self) -> str:
        """A line of the table of tiles: (implementation, chip, head size, group, length): options."""
        case = self.case
        key = f'("{self.implementation}", "{case.chip}", {case.head_dim}, {case.group}, {case.length})'
        gains = ", ".join(
            f"{gain.what} {1e3 * gain.seconds:.3g} ms, {gain.ratio:.2f}x, best of {gain.tried}" for gain in self.gains
        )
        return f"    {key}: {self.options!r},  # {gains}"


def tune(name: str, tunable: Tunable, case: Case, directions: Sequence[str], ceilings: Ceilings, limits: Limits) -> Tuned | str:
    """The fastest right options, the present ones unless beaten by 2%; or why nothing could be tried."""
    if (obstacle := implementations.get(name).obstacle(case)) is not None:
        return obstacle
    best = tunable.choose(case)
    gains, problems = [], []
    for what, direction, trials in _contests(tunable.candidates(case), best, directions):
        work = measuring.make_work(case, direction, ceilings, limits)
        options = {repr(each): each for each in (best, *(trial(best) for trial in trials))}
        contenders = [_contender(label, tunable, each) for label, each in options.items()]
        entries = measuring.prepare(contenders, work, limits)
        problems += [f"{entry.name}: {entry.status}: {entry.reason}" for entry in entries if entry.status != "ok"]
        tried = sum(entry.status == "ok" for entry in entries)
        medians, ratios = _contest(entries, repr(best), work, ceilings, limits)
        if not medians:
            return f"none of {len(options)} candidates ran: {'; '.join(problems)}"
        winner = min(medians, key=medians.get)
        if repr(best) in medians and ratios[winner] < WORTHWHILE:
            winner = repr(best)
        best = options[winner]
        # present options that don't run have no ratio: nothing to be faster than
        gains.append(Gain(what, medians[winner], ratios.get(winner) or float("nan"), tried))
    return Tuned(name, case, best, tuple(gains), tuple(problems))


def _contests(candidates: Sequence[Any], present: Any, directions: Sequence[str]) -> Iterator[tuple[str, str, list[Callable]]]:
    """What is decided together: its name, the pass that decides, and functions from the best options so far to those to try."""
    last = "backward" if "backward" in directions else "forward"
    tiles = [field for field in present._fields if hasattr(getattr(present, field), "_fields")]
    if not tiles:
        yield ("forward+backward" if last == "backward" else last), last, [lambda best, each=each: each for each in candidates]
    for field in tiles:
        direction = "forward" if field == "forward" else "backward"
        if direction in directions:
            values = dict.fromkeys(getattr(each, field) for each in candidates)
            yield field, direction, [lambda best, value=value, field=field: best._replace(**{field: value}) for value in values]


def _contest(entries, present: str, work, ceilings: Ceilings, limits: Limits) -> tuple[dict, dict]:
    """Medians and ratios to the present options by label. A few turns of all, then the rest of the best."""
    rows = measuring.time_entries(entries, work, ceilings, limits._replace(turns=min(3, limits.turns)), present)
    first = {row["implementation"]: row["median_s"] for row in rows if row["status"] == "ok"}
    finalists = {*sorted(first, key=first.get)[:FINALISTS], present}
    rows = measuring.time_entries([e for e in entries if e.name in finalists], work, ceilings, limits, present)
    rows = [row for row in rows if row["status"] == "ok"]
    return ({row["implementation"]: row[key] for row in rows} for key in ("median_s", "ratio"))


def _contender(label: str, tunable: Tunable, options: Any) -> Contender:
    def attending(case: Case):
        kernel = Kernel(tunable.forward, tunable.backward, case.head_dim**-0.5, options)

        def run(q, k, v):
            b, t, n, h = q.shape
            return attend(kernel, q.reshape(b, t, k.shape[2], n // k.shape[2], h), k, v, Mask())[0].reshape(q.shape)

        return run

    return Contender(label, lambda case: None, attending)
