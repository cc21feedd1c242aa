"""What an hour of a chip costs: dated list prices of `gqa_jax.hardware`, several for a chip, or those of a file.

A list price is named by words, separated by colons, that its vendor, product or region has, or that say its terms:
"google", "google:spot", "runpod:secure", "lambda:8x", "google:europe-west4". On demand, unless spot is one of the words.
All of them are in hardware/prices.csv.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gqa_jax.errors import closest
from gqa_jax.hardware import CHIPS, Price

SPOT, ON_DEMAND = "spot", "on-demand"
FILES = (".json", ".toml")
_FIELDS = tuple(field for field in Price._fields if field != "source")


def load(spec: str | None = None) -> dict[str, Price]:
    """Prices by name of the chip: the first of each chip's list; those that `spec` names; or those of a file.

    Args:
      spec: words of list prices (`find`; chips of which none has them are left out), or a path that ends in .json or .toml,
        whose prices take the place of the first of the lists: US dollars per chip-hour by name of the chip, or a table of
        usd_per_hour, vendor, product, region, date and spot.

    Raises:
      ValueError: words that no price has (naming those there are), a file that can't be read, an unknown chip (naming the
        closest), or what is no price: 0 is none.
    """
    first = {chip.name: chip.price for chip in CHIPS.values() if chip.price is not None}
    if spec is None:
        return first
    if spec.lower().endswith(FILES):
        return first | _read(spec)
    found = {name: price for name in CHIPS if (price := find(name, spec)) is not None}
    if not found:
        raise ValueError(f"prices {spec!r}: {_missing(spec)}")
    return found


def find(chip: str, words: str) -> Price | None:
    """The first list price of a chip, by its name, that has all of the words; None where none has.

    Words are separated by colons, in any case: "spot", "on-demand", or how a word of a vendor, product or region begins.
    Raises ValueError: no words, or both terms.
    """
    names, spot = _asked(words)
    of_terms = (price for price in CHIPS[chip].prices if price.spot == spot)
    return next((price for price in of_terms if all(_has(price, name) for name in names)), None)


def listing(chip: str) -> str:
    """The list prices of a chip, in words, for the message of who finds none among them."""
    rows = [f"{price.product}, {price.region}{f', {SPOT}' * price.spot}" for price in CHIPS[chip].prices]
    usd = [price.usd_per_hour for price in CHIPS[chip].prices]
    return "; ".join(f"{row}: ${dollars:.2f}" for row, dollars in zip(rows, usd, strict=True)) or "no list price"


def vendors() -> list[str]:
    """Who has a list price of some chip."""
    return sorted({price.vendor for chip in CHIPS.values() for price in chip.prices})


def one_vendor(chips: Iterable[str]) -> str | None:
    """A vendor that lists every one of the chips on demand, best one whose price is the first of a chip; None: nobody does.

    A name of no chip has no list price.
    """
    rows = [CHIPS[name].prices if name in CHIPS else () for name in chips]
    asking = [[price.vendor for price in prices if not price.spot] for prices in rows]
    usual = [prices[0].vendor for prices in rows if prices]
    return next((vendor for vendor in (*usual, *(asking or [[]])[0]) if all(vendor in one for one in asking)), None)


def compared(chips: Iterable[str], table: Mapping[str, Price]) -> str | None:
    """What to say of prices that are set side by side: None where one vendor asks for all of them, on the same terms.

    `table` has prices by name of the chip; chips that are not in it are not compared.
    """
    known = {name: table[name] for name in chips if name in table}
    if len({(price.vendor, price.spot) for price in known.values()}) < 2:
        return None
    asked = ", ".join(f"{name} {price.vendor}{f' {SPOT}' * price.spot}" for name, price in known.items())
    if len({price.vendor for price in known.values()}) == 1:
        return f"prices on several terms are compared ({asked}): a spot machine may be taken back"
    other = one_vendor(known)
    instead = f"--prices {_word(other)} compares one" if other else "nobody lists all of them"
    return f"prices of several vendors are compared ({asked}), which ask for different things: {instead}"


def _asked(words: str) -> tuple[list[str], bool]:
    """The words that are no terms, in lower case, and whether spot is asked for."""
    asked = [word.strip().lower() for word in words.split(":") if word.strip()]
    if not asked:
        raise ValueError(f"prices {words!r}: no words; {_names()}")
    if SPOT in asked and ON_DEMAND in asked:
        raise ValueError(f"prices {words!r}: either {SPOT} or {ON_DEMAND}")
    return [word for word in asked if word not in (SPOT, ON_DEMAND)], SPOT in asked


def _has(price: Price, name: str) -> bool:
    """Whether a word of its vendor, product or region begins so: "us" is in "us-east1", not in "Nebius"."""
    return re.search(rf"(?<![a-z0-9]){re.escape(name)}", f"{price.vendor} {price.product} {price.region}".lower()) is not None


def _missing(words: str) -> str:
    """Why no list price has the words, and which there are."""
    names, spot = _asked(words)
    rows = [price for chip in CHIPS.values() for price in chip.prices]
    for name in names:
        if not any(_has(price, name) for price in rows):
            known = {word.lower() for price in rows for word in (*price.vendor.split(), *price.product.split(), price.region)}
            hint = closest(name, sorted(known), "")
            return f"no list price has {name!r} in its vendor, product or region{hint and ', ' + hint}; {_names()}"
    near = dict.fromkeys(f"{price.product}{f' {SPOT}' * price.spot}" for price in rows if not names or _has(price, names[0]))
    return f"no list price has all of these words, {SPOT if spot else ON_DEMAND}; there are {', '.join(near)}"


def _names() -> str:
    """What can be given."""
    return f"vendors are {', '.join(map(_word, vendors()))}, terms {SPOT} and {ON_DEMAND}; a file ends in {' or '.join(FILES)}"


def _word(vendor: str) -> str:
    """How a vendor is named in --prices."""
    return vendor.split()[0].lower()


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
    if isinstance(usd, bool) or not isinstance(usd, int | float) or not 0 < usd <= sys.float_info.max:
        raise ValueError(f"prices {path}: {name} = {usd!r}: must be US dollars per chip-hour, a number above 0")
    spot = fields.get("spot", False)
    if not isinstance(spot, bool):
        raise ValueError(f"prices {path}: {name}.spot = {spot!r}: must be true or false")
    texts = {field: str(fields[field]) for field in ("product", "region", "date") if field in fields}
    return Price(float(usd), vendor=str(fields.get("vendor") or path), **texts, spot=spot)
