"""What an hour of a chip costs: the dated list prices of `gqa_jax.hardware`, which a file may override. Imports no jax."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path

from gqa_jax.errors import closest
from gqa_jax.hardware import CHIPS, Price


def load(path: str | None = None) -> dict[str, Price]:
    """Prices by name of the chip; those in the JSON or TOML file at `path` take the list's place, the file the vendor's.

    Raises ValueError: a file that can't be read, an unknown chip (naming the closest), or what is no price.
    """
    table = {chip.name: chip.price for chip in CHIPS.values() if chip.price is not None}
    if path is None:
        return table
    try:
        text = Path(path).read_text()
        given = tomllib.loads(text) if path.endswith(".toml") else json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"prices {path}: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f'prices {path}: must map chips to US dollars per chip-hour, like {{"v5e": 1.2}}')
    for name, value in given.items():
        if name not in CHIPS:
            raise ValueError(f"prices {path}: unknown chip {name!r}: {closest(name, CHIPS)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"prices {path}: {name} = {value!r}: must be US dollars per chip-hour, a number of at least 0")
        table[name] = Price(float(value), vendor=path)
    return table
