"""What an hour of a chip costs: dated list prices of `gqa_jax.hardware`, several for a chip, or those of a file.

A list price is named by words, separated by colons, that its vendor, product or region contain, or that say its terms:
"google", "google:spot", "runpod:secure", "lambda:8x", "google:europe-west4". On demand, unless spot is one of the words.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gqa_jax.errors import closest
from gqa_jax.hardware import CHIPS, Price

SPOT, ON_DEMAND = "spot", "on-demand"
FILES = (".json", ".toml")
_FIELDS = ("usd_per_hour", "vendor", "product", "region", "date", "spot")


def load(spec: str | None = None) -> dict[str, Price]:
    """Prices by name of the chip: the first of each chip's list; those that `spec` names; or those of a file.

    spec: words of list prices (chips of which none has them are left out), or a path that ends in .json or .toml, whose prices
    take the place of the first of the lists: US dollars per chip-hour by name of the chip, or a table of usd_per_hour, vendor,
    product, region, date and spot.

    Raises ValueError: words that no price has, a file that can't be read, an unknown chip (naming the closest), or what is no
    price.
    """
    first = {chip.name: chip.price for chip in CHIPS.values() if chip.price is not None}
    if spec is None:
        return first
    if spec.lower().endswith(FILES):
        return first | _read(spec)
    found = {name: price for name in CHIPS if (price := find(name, spec)) is not None}
    if not found:
        there = ", ".join(vendors())
        raise ValueError(f"prices {spec!r}: no list price is called so; vendors are {there}, terms {SPOT} and {ON_DEMAND}")
    return found


def find(chip: str, words: str) -> Price | None:
    """The first list price of a chip that has all of the words; None where none has."""
    asked = [word.strip().lower() for word in words.split(":") if word.strip()]
    spot = SPOT in asked
    names = [word for word in asked if word not in (SPOT, ON_DEMAND)]
    for price in CHIPS[chip].prices:
        text = f"{price.vendor} {price.product} {price.region}".lower()
        if price.spot == spot and asked and all(word in text for word in names):
            return price
    return None


def listing(chip: str) -> str:
    """The list prices of a chip, in words."""
    rows = [
        f"{price.product}, {price.region}{f', {SPOT}' * price.spot}: ${price.usd_per_hour:.2f}" for price in CHIPS[chip].prices
    ]
    return "; ".join(rows) or "none"


def vendors() -> list[str]:
    """Who has a list price of some chip."""
    return sorted({price.vendor for chip in CHIPS.values() for price in chip.prices})


def one_vendor(chips: Iterable[str]) -> str | None:
    """A vendor that lists every one of the chips on demand, best that of the first chip's price; None: nobody does."""
    chips = list(chips)
    lists = [[price.vendor for price in CHIPS[name].prices if not price.spot] for name in chips]
    common = [vendor for vendor in (lists[0] if lists else []) if all(vendor in one for one in lists)]
    return common[0] if common else None


def compared(chips: Iterable[str], table: Mapping[str, Price]) -> str | None:
    """What to say of prices that are set side by side: None where one vendor asks for all of them."""
    known = {name: table[name].vendor for name in chips if name in table}
    if len(set(known.values())) < 2:
        return None
    asked = ", ".join(f"{name} {vendor}" for name, vendor in known.items())
    other = one_vendor(known)
    instead = f"--prices {other.split()[0].lower()} compares one" if other else "nobody lists all of them"
    return f"prices of several vendors are compared ({asked}), which ask for different things: {instead}"


def markdown() -> str:
    """The table of docs/prices.md: a row per list price."""
    rows = [
        "| chip | vendor, product | region | terms | US dollars an hour of a chip | date | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for chip in CHIPS.values():
        for price in chip.prices:
            terms = SPOT if price.spot else "on demand"
            amount = f"{price.usd_per_hour:.4f}".rstrip("0").ljust(4, "0")
            source = price.source.removeprefix("https://")
            rows.append(f"| {chip.name} | {price.product} | {price.region} | {terms} | {amount} | {price.date} | {source} |")
    return "\n".join(rows) + "\n"


def _read(path: str) -> dict[str, Price]:
    try:
        text = Path(path).read_text()
        given = tomllib.loads(text) if path.lower().endswith(".toml") else json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"prices {path}: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f'prices {path}: must map chips to US dollars per chip-hour, like {{"v5e": 1.2}}')
    table = {}
    for name, value in given.items():
        if name not in CHIPS:
            raise ValueError(f"prices {path}: unknown chip {name!r}: {closest(name, CHIPS)}")
        table[name] = _price(path, name, value)
    return table


def _price(path: str, name: str, value: Any) -> Price:
    fields = value if isinstance(value, dict) else {"usd_per_hour": value}
    for field in fields:
        if field not in _FIELDS:
            raise ValueError(f"prices {path}: {name}.{field} is unknown: {closest(field, _FIELDS)}")
    usd = fields.get("usd_per_hour")
    if isinstance(usd, bool) or not isinstance(usd, int | float) or not (usd > 0 and math.isfinite(usd)):
        raise ValueError(f"prices {path}: {name} = {usd!r}: must be US dollars per chip-hour, a number above 0")
    texts = {field: str(fields[field]) for field in ("product", "region", "date") if field in fields}
    return Price(float(usd), vendor=str(fields.get("vendor") or path), **texts, spot=bool(fields.get("spot", False)))


if __name__ == "__main__":
    print(markdown(), end="")
