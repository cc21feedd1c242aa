"""Numbers for people: how sizes, costs, shares, times and contexts are written on screens, in reports and in pictures.

What is not known or infinite has words of its own in each place, which are not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

SIZES = (1e21, 1e18, 1e15, 1e12, 1e9, 1e6, 1e3)
COUNT = ("Z", "E", "P", "T", "B", "M", "k")  # letters of counted things: parameters, tokens
SI = ("Z", "E", "P", "T", "G", "M", "k")  # of amounts of a unit: FLOPs, bytes
MODELS = (1e3, 1e13)  # parameters: sizes beyond these are of no model, and their numbers say nothing
LARGEST_CONTEXT = 2**40  # tokens: sums over more are of no model
LARGEST_REGRET = 10.0  # cost over the least one, minus 1: what is beyond it counts as this (`gqa_jax.search.ranking.regret`)


def scaled(value: float, endings: Sequence[str], text: Callable[[float], str]) -> str:
    """`value` over the largest of SIZES that it reaches, as `text` writes it, with that one's of `endings`.

    999.6e6 has reached 1e9: three digits would round it to 1,000 million.
    """
    for size, ending in zip(SIZES, endings, strict=True):
        if value >= 0.9995 * size:
            return text(value / size) + ending
    return text(value)


def short(value: float) -> str:
    """A count, with three digits at most: 2.08B, 35k, 950."""
    return scaled(value, COUNT, "{:.3g}".format)


def si(value: float) -> str:
    """An amount of a unit, with three digits at most: 2.08G, before "FLOPs" or "B"."""
    return scaled(value, SI, "{:.3g}".format)


def size(n_params: float) -> str:
    """A number of parameters, three digits: 2.00B; <1k and >10T outside MODELS; empty where not known."""
    least, most = MODELS
    if math.isnan(n_params):
        return ""
    if n_params < least:
        return f"<{short(least)}"
    return f">{short(most)}" if n_params > most else scaled(n_params, COUNT, three)


def three(value: float) -> str:
    """Three significant digits, zeros too, without an exponent: 1,230; 12.0; 0.0123."""
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value) * (1 + 5e-4)))
    return f"{value:,.{max(0, 2 - power)}f}"


def figure(value: float) -> str:
    """Three significant digits at most, or all of a whole number: 0.0235, 12, 1,234."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(factor: float) -> str:
    """How many times as large: 1.2x, 81x, 1,100x."""
    return f"{figure(factor)}x"


def alike(values: Sequence[float]) -> list[str]:
    """Numbers with as many decimals as the one that needs the most: 3 and 2.35 as "3.00" and "2.35"."""
    decimals = max(len(f"{value:.6g}".partition(".")[2]) for value in values)
    return [f"{value:.{decimals}f}" for value in values]


def percent(share: float) -> str:
    """A share of something counted, 0 to 1, to a percent: 87%. What is not all or nothing is not called so: >99%, <1%."""
    return ">99%" if 0.995 <= share < 1 else "<1%" if 0 < share < 0.005 else f"{100 * share:.0f}%"


def percent_of_draws(share: float) -> str:
    """A probability that rests on about 1,000 draws, to a percent: 87%, >99%, <1%, never 0% or 100%."""
    return percent(min(max(share, 0.001), 0.999))


def probability(share: float) -> str:
    """A probability that rests on about 1,000 draws: 87.3%. These can't tell any from 0 or 1: >99.9%, <0.1%."""
    return ">99.9%" if share > 0.999 else "<0.1%" if share < 0.001 else f"{share:.1%}"


def regret(share: float) -> str:
    """A regret, relative, or a difference of two: 0.12%, 37.10%; >1000% of LARGEST_REGRET; empty where not known."""
    if math.isnan(share):
        return ""
    if share >= LARGEST_REGRET - 5e-5:
        return f">{LARGEST_REGRET:.0%}"
    return "<0.01%" if 0 < share < 5e-5 else f"{share:.2%}"


def saving(share: float) -> str:
    """A saving, 1 - cost / other cost, with its direction in words: 29.2% less, 6.6% more; empty where not known."""
    if math.isnan(share):
        return ""
    if abs(share) < 5e-4:
        return "the same"
    return f"{_tenths(share)} {'less' if share > 0 else 'more'}"


def saving_between(low: float, high: float) -> str:
    """The interval of a saving, ascending: 25.3% to 31.0%, of which the `saving` before it says that it is less or more.

    Where the ends differ in that, they say it: 2.0% more to 5.1% less. Empty where not known.
    """
    if math.isnan(low) or math.isnan(high):
        return ""
    if low >= 0:
        return f"{_tenths(low)} to {_tenths(high)}"
    if high <= 0:
        return f"{_tenths(high)} to {_tenths(low)}"
    return f"{saving(low)} to {saving(high)}"


def _tenths(share: float) -> str:
    return f">{LARGEST_REGRET:.0%}" if abs(share) >= LARGEST_REGRET else f"{abs(share):.1%}"


def interval(
    low: float,
    high: float,
    text: Callable[[float], str],
    within: tuple[float, float] = (-math.inf, math.inf),
    anything: str = "any value",
) -> str:
    """Both ends as `text` writes them: 1.93B to 2.11B; empty where not known.

    An end that lies at one of `within` or beyond is none: at least 1.93B, at most 2.11B, or `anything`.
    """
    if math.isnan(low) or math.isnan(high):
        return ""
    below, above = low <= within[0], high >= within[1]
    if below and above:
        return anything
    if above:
        return f"at least {text(low)}"
    return f"at most {text(high)}" if below else f"{text(low)} to {text(high)}"


def sizes(low: float, high: float) -> str:
    """An interval of numbers of parameters: 1.93B to 2.11B, at least 1.93B, any size; <1k where all of it is of no model."""
    if high < MODELS[0] or low > MODELS[1]:
        return size(low)
    return interval(low, high, size, MODELS, "any size")


def seconds(value: float) -> str:
    """A time in seconds or milliseconds, three digits: 1.27 s, 1.98 ms."""
    return f"{three(1e3 * value)} ms" if value < 0.1 else f"{three(value)} s"


def usd(value: float) -> str:
    """US dollars, three digits: $0.0449, $1,230, $78.5k."""
    return f"${scaled(value, SI, three)}" if value >= 9999.5 else f"${three(value)}"


def amount(value: float, unit: str) -> str:
    """A cost, three digits: dollars, seconds, bytes with their sign, others with a letter for their size; empty: not known."""
    if not math.isfinite(value):
        return ""
    if unit in ("US dollars", "seconds"):
        return usd(value) if unit == "US dollars" else seconds(value)
    if unit != "bytes":
        return scaled(value, SI, three)
    return scaled(value, [f" {letter}B" for letter in SI], three) if value >= 999.5 else f"{three(value)} B"


def counted(count: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def context(tokens: int) -> str:
    """A context length, tokens: 128K; 1,000 where it is no multiple of 1024."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def read_context(text: str) -> int:
    """Tokens of "131072", "128K" or "1M" (of 1024 K). Raises ValueError for anything else, none, and over LARGEST_CONTEXT."""
    scale = {"K": 2**10, "M": 2**20}.get(text[-1:].upper(), 1)
    digits = text if scale == 1 else text[:-1]
    if not (digits.isascii() and digits.isdigit()) or not 1 <= int(digits[:20]) * scale <= LARGEST_CONTEXT:
        raise ValueError(f"{text[:20]!r} is no number of tokens: write it like 131072 or 128K, at most {LARGEST_CONTEXT}")
    return int(digits) * scale


def duration(seconds: float) -> str:
    """5 s, 3 min, 2.5 h, 4.1 d."""
    for unit, symbol in ((86400, "d"), (3600, "h")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {symbol}"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def gib(n_bytes: float) -> str:
    """Memory of a program against that of a device, as compilers say it: 15.75 GiB."""
    return f"{n_bytes / 2**30:.2f} GiB"


def gb(n_bytes: float) -> str:
    """Memory of a device or a machine, as its data sheet says it, in units of 1e9 bytes: 16.91 GB, 105.8 GB."""
    return f"{n_bytes / 1e9:.4g} GB"
