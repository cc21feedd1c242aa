"""What an hour of a chip costs: a dated table, which a file may override. Imports no jax.

Lists of on-demand prices change and differ by region; every row says where and when it was read. `--prices FILE` gives others.
"""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import NamedTuple

from gqa_jax.config import closest
from gqa_jax.devices import CHIPS


class Price(NamedTuple):
    """US dollars for an hour of one chip with its share of the host, on demand, without storage and taxes."""

    usd_per_hour: float
    product: str
    region: str
    date: str  # of the price list; a month: when it was read
    source: str


_SKYPILOT = "https://github.com/skypilot-org/skypilot-catalog catalogs/v8/gcp/vms.csv, commit 006059e0"
_CYCLENERD = "https://github.com/Cyclenerd/google-cloud-pricing-cost-calculator pricing.yml, commit dac31281"
_SILYBENCH = "https://github.com/tgarg01/silybench-data prices/gpu_hourly.yaml"
_TANOD = "https://huggingface.co/datasets/tanod/cloud-gpu-list-prices"
_EVANGELIST = "https://github.com/api-evangelist/lambda-labs plans/lambda-labs-plans-pricing.yml"

PRICES = {
    "v4": Price(12.88 / 4, "Cloud TPU v4-8", "us-central2", "2026-11", _SKYPILOT),
    "v5e": Price(1.20, "Cloud TPU v5litepod-1", "us-central1", "2026-11", _SKYPILOT),
    "v5p": Price(25804.8 / 6144, "Cloud TPU v5p-12288", "us-central1", "2026-11", _SKYPILOT),
    "v6e": Price(2.70, "Cloud TPU v6e-1", "us-central1", "2026-11", _SKYPILOT),
    "h200": Price(10.4365, "Google Cloud a3-ultragpu-8g", "us-central1", "2026-10-13", _TANOD),
    "h100": Price(10.9791, "Google Cloud a3-highgpu-1g", "us-central1", "2026-09-26", _SILYBENCH),
    "a100": Price(40.5503831 / 8, "Google Cloud a2-ultragpu-8g", "us-central1", "2026-08-20", _CYCLENERD),
    "b200": Price(6.69, "Lambda 8x B200 SXM6", "US", "2026-09-20", _EVANGELIST),
    "l4": Price(0.706832255, "Google Cloud g2-standard-4", "us-central1", "2026-08-20", _CYCLENERD),
}


def load(path: str | None = None) -> dict[str, float]:
    """US dollars per chip-hour by name of the chip; those in the JSON or TOML file at `path` take the table's place.

    Raises ValueError: a file that can't be read, an unknown chip (naming the closest), or what is no price.
    """
    table = {name: price.usd_per_hour for name, price in PRICES.items()}
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
        table[name] = float(value)
    return table
