"""A device as it was measured, in a JSON file: what `benchmark-serving --fit FILE` writes and `--device FILE` takes.

{"name": ..., "chip": a name of `gqa_jax.hardware.CHIPS` or null, "device_kind": as JAX calls it,
 "peak_flops", "memory_bandwidth", "memory_bytes": where no data sheet has them,
 "param_dtype", "cache_dtype": that were measured,
 "efficiency": {"matmul", "attention", "weights_bandwidth", "cache_bandwidth", "layer_seconds", "exchange", "overlap"},
 "errors": five relative standard errors, "correlation": five rows of five, "source": what was measured, when, where}

A device without a data sheet has the larger one of its measured rates as its peak, so that shares are at most 1. The numbers
of "efficiency" and "source" alone are a file for `--efficiency`. More fields may be there.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from gqa_jax.costs import dtype_bytes
from gqa_jax.hardware import CHIPS, Chip, Efficiency

NUMBERS = Efficiency._fields[:5]
_MORE = ("exchange", "overlap")  # that need not be there
_OF_A_DEVICE = ("peak_flops", "memory_bandwidth", "memory_bytes")


@dataclasses.dataclass(frozen=True)
class Device:
    """A device and what serving reaches on it."""

    chip: Chip
    device_kind: str
    efficiency: Efficiency
    param_dtype: str
    cache_dtype: str
    data_sheet: str | None  # its name in `CHIPS`; None: its peaks are what was measured

    def to_dict(self) -> dict[str, Any]:
        """As the file has it."""
        chip = self.data_sheet
        numbers = {name: getattr(self.efficiency, name) for name in (*NUMBERS, *_MORE)}
        own = {} if chip else {name: getattr(self.chip, name) for name in _OF_A_DEVICE}
        return {
            "name": self.chip.name, "chip": chip, "device_kind": self.device_kind, **own,
            "param_dtype": self.param_dtype, "cache_dtype": self.cache_dtype, "efficiency": numbers,
            "errors": list(self.efficiency.errors), "correlation": [list(row) for row in self.efficiency.correlation],
            "source": self.efficiency.source,
        }  # fmt: skip


def is_file(text: str) -> bool:
    """Whether a device's name is meant as a file: it is none of `CHIPS`, and ends in .json or is one."""
    return text not in CHIPS and (text.endswith(".json") or Path(text).is_file())


def read(path: str) -> Device:
    """The device of a file. Raises ValueError: a file that can't be read, and the field that is missing or wrong."""
    given = _read(path, "device")
    try:
        chip = given.get("chip")
        if chip is not None and chip not in CHIPS:
            raise ValueError(f"chip = {chip!r}: must be null or one of {', '.join(CHIPS)}")
        name = str(given.get("name") or (f"{chip}, measured" if chip else "measured"))
        kind = str(given.get("device_kind", ""))
        if chip is not None:
            found = dataclasses.replace(CHIPS[chip], name=name)
        else:
            found = Chip(name, **{field: _positive(given, field) for field in _OF_A_DEVICE}, interconnect=0.0, data_sheet=False)
        dtypes = [str(given.get(field, "bfloat16")) for field in ("param_dtype", "cache_dtype")]
        for dtype in dtypes:
            dtype_bytes(dtype)
        return Device(found, kind, _efficiency(given, path), *dtypes, chip)
    except (TypeError, ValueError) as error:
        raise ValueError(f"device {path}: {error}") from error


def read_efficiency(path: str) -> Efficiency:
    """Of a JSON file of measurements: {"efficiency": {"matmul": ..., ...}, "source": what was measured, when, where}.

    Raises ValueError: a file that can't be read, a missing or unknown number, or one that is no share.
    """
    given = _read(path, "efficiency")
    try:
        return _efficiency(given, path)
    except (TypeError, ValueError) as error:
        raise ValueError(f"efficiency {path}: {error}") from error


def _read(path: str, what: str) -> dict[str, Any]:
    try:
        given = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{what} {path}: {error}") from error
    return given if isinstance(given, dict) else {}


def _efficiency(given: dict[str, Any], path: str) -> Efficiency:
    numbers = given.get("efficiency")
    if not isinstance(numbers, dict) or set(numbers) - set(_MORE) != set(NUMBERS):
        raise ValueError(f'must have {{"efficiency": {{{", ".join(NUMBERS)}}}}}, each a number')
    return Efficiency(
        **{name: float(value) for name, value in numbers.items()},
        source=str(given.get("source") or path),
        errors=tuple(map(float, given.get("errors") or ())),
        correlation=tuple(tuple(map(float, row)) for row in given.get("correlation") or ()),
    ).checked()


def _positive(given: dict[str, Any], field: str) -> float:
    value = given.get(field)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{field} = {value!r}: must be a number above 0, where chip is null")
    return float(value)
