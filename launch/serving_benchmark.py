"""`benchmark-serving`: what models take to serve on the devices of this machine, beside what is expected, and a device's file.

A model is a run, a public model or a config.json, or random weights of a shape: 12x768:8,1 is 12 layers, d_model = 768, 8 query
heads and 1 key/value head; 12x768:8,1:2048:128 has a vocabulary of 2,048 and heads of 128, not 50,304 and 64; 470M:8,1 has
layers and width of the paper's tables.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from gqa_jax import costs, hardware, model, shapes
from gqa_jax.config import ModelConfig
from gqa_jax.errors import ConfigError, first_line
from gqa_jax.formatting import counted, gb, seconds, si, size
from gqa_jax.hardware import Chip, host
from gqa_jax.inference.engine import Engine
from gqa_jax.inference.loaded import load_model, require_room
from gqa_jax.inference.timing import Times, measure
from gqa_jax.mesh import MeshShape
from gqa_jax.search import calibration, device_file, own_model
from gqa_jax.search.calibration import Fitted, Timing
from gqa_jax.search.device_file import Device
from gqa_jax.search.roofline import Layout, RooflineServing
from gqa_jax.storage import write_bytes
from launch.tables import Column, Table

log = logging.getLogger(__name__)

COLUMNS = (
    "model", "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size", "untied", "n_params", "context",
    "prompt_tokens", "new_tokens", "batch", "device", "n_devices", "dtype", "cache_dtype", "passes", "ttft", "ttft_p99",
    "repeats", "tpot", "tpot_p99", "stretch", "input_per_second", "output_per_second", "prefill_flops", "prefill_mfu",
    "decode_bytes", "decode_mbu", "weight_bytes", "cache_bytes", "peak_bytes", "expected_ttft", "expected_tpot",
    "expected_bytes", "compile_seconds", "note",
)  # fmt: skip
CONTEXTS = {"cpu": (256, 1024, 4096), "gpu": (2048, 16_384, 65_536), "tpu": (2048, 16_384, 65_536)}
BATCHES = (1, 2, 8)
NEW_TOKENS = 32
DIFFER = 1.15  # times of two models that differ by less are called alike
BEYOND_CACHE = 4.5  # times the last-level cache: parameters of the models that a device is calibrated with
LEAST_PARAMS = {"cpu": 0.0, "gpu": 4e8, "tpu": 4e8}
_DEPTHS = {"cpu": (4, 16), "gpu": (8, 32), "tpu": (8, 32)}
_VOCABULARY = 2048
_SHAPE = re.compile(r"(?:(\d+)x(\d+)|([\d.]+[MB])):(\d+),(\d+)(?::(\d+)(?::(\d+))?)?")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that is measured; `open` makes its programs."""

    name: str
    config: ModelConfig  # with the dtype that it computes in
    open: Callable[[], Engine]

    @property
    def shape(self) -> costs.Shape:
        own = self.config
        return costs.Shape(
            own.n_layers, own.d_model, own.n_heads, own.n_kv_heads, own.head_dim, own.d_ff, own.vocab_size, own.untied
        )


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What was measured: `frame` has a row for each model, context and batch, columns COLUMNS."""

    frame: pd.DataFrame
    expected: RooflineServing | None  # what the expected numbers are of
    fitted: Fitted | None
    written: str | None  # the device's file

    def table(self) -> Table:
        """The frame, as it is read."""
        return Table.of(self.frame, columns(self.expected), "serving", "Served here, a closed batch at a time.")

    def sentences(self) -> list[str]:
        """What the table rests on, and the device that was fitted."""
        lines = [
            "TTFT, TPOT: seconds to the first token of a batch and for each further one; medians, and the 99th percentile",
        ]
        if self.expected is not None:
            lines.append(f"expected: {self.expected.chip.name}, {self.expected.efficiency.source}")
            lines += self._beside()
        if self.fitted is not None:
            lines += fit_sentences(self.fitted)
        if self.written:
            lines.append(f"written: {self.written}; python -m launch optimum ... --cost latency --device {self.written}")
        return lines

    def _beside(self) -> list[str]:
        """How far off what was expected is, and whether it puts heads in the order that was measured."""
        known = self.frame.dropna(subset=["ttft", "expected_ttft"])
        if not len(known):
            return []
        parts = []
        for name, title in (("ttft", "TTFT"), ("tpot", "TPOT")):
            ratio = (known[f"expected_{name}"] / known[name]).to_numpy()
            parts.append(
                f"{title} {np.median(ratio):.2f} in the median, {ratio.min():.2f} to {ratio.max():.2f}, off by "
                f"{_off(ratio, 50):.0%} in the median and {_off(ratio, 95):.0%} at the 95th percentile"
            )
        lines = [f"expected / measured of {counted(len(known), 'run')}: {'; '.join(parts)}"]
        pairs, reversed_pairs = _order(known)
        if pairs:
            lines.append(
                f"of {counted(pairs, 'pair')} of models at one context and batch whose measured times differ by more than "
                f"{DIFFER - 1:.0%}, what was expected puts {reversed_pairs} in the other order"
            )
        return lines


def _order(frame: pd.DataFrame) -> tuple[int, int]:
    """Pairs of models that differ by more than DIFFER in a time, and those that are expected the other way round."""
    pairs = wrong = 0
    for _, rows in frame.groupby(["context", "batch"]):
        for name in ("ttft", "tpot"):
            values = rows[[name, f"expected_{name}"]].to_numpy()
            for i, (own, foretold) in enumerate(values):
                for other, other_foretold in values[i + 1 :]:
                    if max(own, other) > DIFFER * min(own, other):
                        pairs += 1
                        wrong += (own < other) != (foretold < other_foretold)
    return pairs, wrong


def run(
    models: Sequence[str], *, contexts: Sequence[int] | None, batches: Sequence[int] | None, new_tokens: int, dtype: str | None,
    cache_dtype: str | None, mesh: str | None, device: str | None, fit: str | None, repeats: int, seed: int,
    measured: Callable[[dict[str, Any]], None],
) -> Benchmark:  # fmt: skip
    """Measures every model at every context with every batch; `measured` is given each row, again after each turn.

    Arguments are those of `launch.commands.benchmark_serving`.
    """
    here = jax.devices()[0]
    kind, chip = _kind(here), hardware.chip_of(here.device_kind)
    if not models and fit is None:
        raise ConfigError("name a run or a shape, like runs/.../cells/NAME or 12x768:8,1; or --fit FILE, which has its own")
    if fit is not None and mesh is not None:
        raise ConfigError(f"--fit with --mesh {mesh}: a device is measured by itself; leave one of them out")
    if fit is not None and not fit.endswith(".json"):
        raise ConfigError(f"--fit {fit}: must end in .json, by which --device knows a file")
    if fit is not None and not Path(fit).absolute().parent.is_dir():
        raise ConfigError(f"--fit {fit}: there is no folder {Path(fit).parent}")
    if fit is not None and Path(fit).exists():
        raise ConfigError(f"--fit {fit}: that file is there; give another name, or remove it")
    if new_tokens < 2:
        raise ConfigError(f"--new_tokens {new_tokens}: must be at least 2, the first one is the prompt's")
    if repeats < 1 or min(batches or (1,)) < 1:
        raise ConfigError(f"--repeats {repeats}, --batches {','.join(map(str, batches or ()))}: at least 1 each")
    contexts = CONTEXTS[kind] if contexts is None else contexts
    batches = (BATCHES if fit is not None else (1,)) if batches is None else batches
    short = [one for one in contexts if one <= new_tokens]
    if short:
        raise ConfigError(f"--contexts {short[0]}: no room for a prompt and {counted(new_tokens, 'new token')} (--new_tokens)")
    subjects = [subject(name, dtype, cache_dtype, mesh, seed) for name in models or calibration_models(kind, chip, dtype)]
    times = 2 * len(subjects) * len(contexts) * len(batches)
    if fit is not None and times < calibration.LEAST_RUNS:
        raise ConfigError(
            f"--fit {fit}: {times} times of {counted(len(subjects), 'model')}, contexts and batches, and a fit takes "
            f"{calibration.LEAST_RUNS}: give more --contexts or --batches"
        )
    expected = _expected(device, chip, here.device_kind, subjects[0].config.dtype, cache_dtype, mesh)
    if fit is not None and len({one.config.dtype for one in subjects}) > 1:
        raise ConfigError("--fit: models of one dtype; give --dtype")

    def in_turns(models: Sequence[Subject]) -> list[tuple[dict[str, Any], list[Timing]]]:
        """Rows of models, in turns: a time at which the machine was busy is not all of one's."""
        engines = [(one, one.open()) for one in models]
        cells = [(*both, context, batch) for both in engines for context in contexts for batch in batches]
        times: list[Times | str | None] = [None] * len(cells)
        found: list[tuple[dict[str, Any], list[Timing]]] = [({}, [])] * len(cells)
        for _ in range(repeats):
            for i, (one, engine, context, batch) in enumerate(cells):
                if isinstance(times[i], str) or (times[i] is not None and times[i].enough):
                    continue
                times[i] = _visit(engine, context, batch, new_tokens, seed, times[i])
                row = _row(one, engine, context, batch, new_tokens, times[i], chip, expected, here.device_kind)
                found[i] = row, _timings(one, times[i])
                measured(row)
        return found

    groups = [subjects] if fit is not None else [[one] for one in subjects]  # those of a fit are small
    found = [both for group in groups for both in in_turns(group)]
    rows, timings = [row for row, _ in found], [timing for _, several in found for timing in several]
    frame = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    if fit is None:
        return Benchmark(frame, expected, None, None)
    dtypes = subjects[0].config.dtype, cache_dtype or subjects[0].config.dtype
    fitted = calibration.fit(
        timings, chip, name=_name_of(kind, chip), device_kind=_described(here), memory_bytes=_memory(here, chip),
        param_dtype=dtypes[0], cache_dtype=dtypes[1], source=_source(here),
    )  # fmt: skip
    return Benchmark(frame, expected, fitted, write_device(fit, fitted, frame))


def subject(text: str, dtype: str | None, cache_dtype: str | None, mesh: str | None, seed: int) -> Subject:
    """The model that a word names. Raises ConfigError naming the forms that there are."""
    if (found := _SHAPE.fullmatch(text)) is not None:
        layers, width, name, n_heads, n_kv, vocabulary, head_dim = found.groups()
        if name is not None:
            known = {key: (one.n_layers, one.d_model) for key, one in shapes.SIZES.items()} | shapes.LARGE_SHAPES
            if name not in known:
                raise ConfigError(f"{text}: the paper's tables have no {name}: there are {', '.join(known)}")
            layers, width = known[name]
        sizes = {"vocab_size": int(vocabulary or shapes.VOCAB_SIZE), "head_dim": int(head_dim or shapes.HEAD_DIM)}
        config = ModelConfig(int(layers), int(width), int(n_heads), int(n_kv), **sizes, dtype=_dtype(dtype))
        return _random(text, config, cache_dtype, mesh, seed)
    folder = Path(text)
    if own_model.is_trained(text):
        loaded = load_model(text)
        config = loaded.config if dtype is None else dataclasses.replace(loaded.config, dtype=dtype)
        return Subject(folder.name, config, lambda: loaded.engine(cache_dtype=cache_dtype, dtype=dtype, mesh=mesh))
    try:
        own = own_model.load(text)
    except ConfigError as error:
        raise ConfigError(
            f"{text}: no run, and no shape like 12x768:8,1 (layers x width : query, key/value heads) or 470M:8,1; as a model: "
            f"{error}"
        ) from error
    numbers = {field: int(getattr(own.shape, field)) for field in own_model.SHAPE}
    return _random(own.name, ModelConfig(**numbers, untied=own.untied, dtype=_dtype(dtype)), cache_dtype, mesh, seed)


def _random(name: str, config: ModelConfig, cache_dtype: str | None, mesh: str | None, seed: int) -> Subject:
    def open() -> Engine:
        params = jax.jit(lambda key: model.init_params(config, key))(jax.random.key(seed))
        try:
            return Engine(config, params, cache_dtype=cache_dtype, mesh=mesh)
        except ValueError as error:
            raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error

    return Subject(name, config, open)


def calibration_models(kind: str, chip: Chip | None, dtype: str | None) -> list[str]:
    """Two shapes of opposite depth and width and opposite heads, whose parameters no cache holds, in words of `subject`."""
    value = costs.dtype_bytes(_dtype(dtype))
    n_params = max(BEYOND_CACHE * last_level_cache(chip) / value, LEAST_PARAMS[kind])
    shallow, deep = _DEPTHS[kind]
    found = []
    for layers, heads in ((shallow, lambda d: (8, 1)), (deep, lambda d: (d // 64, d // 64))):
        d_model = 64 * max(1, round(math.sqrt(n_params / layers / 10) / 64))
        while costs.count_params(costs.Shape(layers, d_model, *heads(d_model)), "exact").non_embedding < n_params:
            d_model += 64
        found.append(f"{layers}x{d_model}:{','.join(map(str, heads(d_model)))}:{_VOCABULARY}")
    return found


def last_level_cache(chip: Chip | None) -> float:
    """Bytes of the largest cache between memory and processor; 64 MiB where nothing says."""
    if chip is not None:
        return 2**20 * (chip.gpu.l2_mib if chip.gpu is not None else 128)  # a TPU's scratchpad memory
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    known = [1024.0 * int(size.removesuffix("K")) for size in sizes if size.removesuffix("K").isdecimal()]
    return max(known, default=64.0 * 2**20)


def write_device(path: str, found: Fitted, frame: pd.DataFrame) -> str:
    """Writes the device's file with what it was fitted to; returns its path."""
    ratio = found.left_out_T
    content = found.device.to_dict() | {
        "bounds": [number.name for number in found.numbers if number.bound],
        "left_out": {"times": len(ratio), "median": _off(ratio, 50), "p95": _off(ratio, 95)},
        "measurements": json.loads(frame.dropna(axis=1, how="all").to_json(orient="records")),
    }
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def fit_sentences(found: Fitted) -> list[str]:
    """The five numbers with their standard errors, and how far off times are that a fit had not seen."""
    lines = []
    for number in found.numbers:
        words, value = calibration.unit(number)
        of_time = number.name == device_file.NUMBERS[4]
        if number.bound:
            lines.append(f"{'at most' if of_time else 'at least'} {value:.3g} {words}: a bound, these runs do not fix it")
        else:
            lines.append(f"{value:.3g} {words}, standard error {number.error:.1%}")
    if (overlap := found.device.efficiency.overlap) != 1:
        lines.append(f"computing and reading hide each other in part, with an exponent of {overlap:g}")
    lines.append(
        f"times of a shape and context that the fit had not seen: off by {_off(found.left_out_T, 50):.1%} in the median, "
        f"{_off(found.left_out_T, 95):.1%} at the 95th percentile of {found.n_runs}"
    )
    return lines


def columns(expected: RooflineServing | None) -> tuple[Column, ...]:
    """Of the table."""

    def beside(name: str) -> Callable[[Any], str]:
        return lambda row: seconds(getattr(row, f"expected_{name}")) if pd.notna(getattr(row, f"expected_{name}")) else ""

    def share(value: float, peak: float, unit: str) -> str:
        return "" if pd.isna(value) else f"{si(value)}{unit}" + ("" if pd.isna(peak) else f" ({peak:.0%})")

    found = [
        Column("model", lambda row: row.model, "left", 0),
        Column("heads", lambda row: f"({row.n_heads}, {row.n_kv_heads})", "left", 0),
        Column("N", lambda row: size(row.n_params), rank=6),
        Column("T", lambda row: f"{row.context:,}", rank=0),
        Column("B", lambda row: f"{row.batch}", rank=0),
        Column("TTFT", lambda row: _time(row.ttft), rank=0),
        Column("p99", lambda row: _time(row.ttft_p99), rank=7),
        Column("TPOT", lambda row: _time(row.tpot), rank=0),
        Column("p99", lambda row: _time(row.tpot_p99), rank=5),
        Column("in/s", lambda row: _rate(row.input_per_second), rank=3),
        Column("out/s", lambda row: _rate(row.output_per_second), rank=2),
        Column("prefill", lambda row: share(row.prefill_flops, row.prefill_mfu, "FLOP/s"), rank=4),
        Column("decode", lambda row: share(row.decode_bytes, row.decode_mbu, "B/s"), rank=4),
        Column("held", lambda row: gb(row.weight_bytes + row.cache_bytes) if pd.notna(row.cache_bytes) else "", rank=4),
    ]
    if expected is not None:
        found += [
            Column("TTFT\nexpected", beside("ttft"), rank=2),
            Column("TPOT\nexpected", beside("tpot"), rank=2),
            Column("held\nexpected", lambda row: gb(row.expected_bytes) if pd.notna(row.expected_bytes) else "", rank=5),
        ]
    return (*found, Column("note", lambda row: "" if pd.isna(row.note) else row.note, "text", 1))


def _time(value: float) -> str:
    return "" if pd.isna(value) else seconds(value)


def _rate(value: float) -> str:
    return "" if pd.isna(value) else f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _visit(engine: Engine, context: int, batch: int, new_tokens: int, seed: int, before: Times | None) -> Times | str:
    """What was found before with what one more turn finds, or a note, where that much doesn't fit."""
    try:
        require_room(engine, engine.plan([context - new_tokens] * batch, new_tokens))
        times = measure(engine, context - new_tokens, new_tokens, batch, seed=seed)
    except (ConfigError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, ConfigError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return f"does not fit: {first_line(error)}"
    return times if before is None else before + times


def _row(
    one: Subject, engine: Engine, context: int, batch: int, new_tokens: int, times: Times | str, chip: Chip | None,
    expected: RooflineServing | None, device_kind: str,
) -> dict[str, Any]:  # fmt: skip
    shape, config = one.shape, one.config
    row: dict[str, Any] = {
        "model": one.name, "n_layers": config.n_layers, "d_model": config.d_model, "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads, "head_dim": config.head_dim, "d_ff": config.d_ff, "vocab_size": config.vocab_size,
        "untied": config.untied, "n_params": float(costs.count_params(shape, "exact").non_embedding), "context": context,
        "prompt_tokens": context - new_tokens, "new_tokens": new_tokens, "batch": batch, "device": device_kind,
        "n_devices": engine.shape.n_devices, "dtype": config.dtype, "cache_dtype": engine.cache_dtype, "note": None,
    }  # fmt: skip
    if isinstance(times, str):
        return row | {"note": times}
    row |= {
        "passes": times.passes, "ttft": times.ttft(), "ttft_p99": times.ttft(99), "repeats": len(times.first_seconds),
        "tpot": times.tpot(), "tpot_p99": times.tpot(99), "stretch": times.stretch,
        "input_per_second": batch * times.prompt_tokens / times.ttft(), "output_per_second": batch / times.tpot(),
        "weight_bytes": times.weight_bytes, "cache_bytes": times.cache_bytes, "peak_bytes": times.peak_bytes,
        "compile_seconds": times.compile_seconds,
    }  # fmt: skip
    prefill, decode = _timings(one, times)
    layout = Layout(engine.shape.tensor, 1, engine.shape.context) if engine.shape.n_devices > 1 else Layout()
    work = calibration.of_units(config.dtype, engine.cache_dtype)
    first, step = (calibration.phase(work, timing) for timing in (prefill, decode))
    devices = engine.shape.n_devices
    row["prefill_flops"] = (first.matmul + first.attention) / times.ttft() / devices
    row["decode_bytes"] = (step.weights + step.cache) / times.tpot() / devices
    if chip is not None:
        row["prefill_mfu"] = row["prefill_flops"] / chip.peak(config.dtype)
        row["decode_mbu"] = row["decode_bytes"] / chip.memory_bandwidth
    if expected is not None:
        own = dataclasses.replace(expected, parallelism=layout, batch=batch)
        row["expected_ttft"] = float(calibration.phase(own, prefill).seconds)
        row["expected_tpot"] = float(calibration.phase(own, decode).seconds)
        row["expected_bytes"] = float(own.memory_bytes(shape, context, batch, layout))
    return row


def _timings(one: Subject, times: Times | str) -> list[Timing]:
    if isinstance(times, str):
        return []
    batch, shape = times.plan.batch, one.shape
    keys = times.prompt_tokens + times.new_tokens / 2
    return [
        Timing("prefill", shape, times.prompt_tokens, batch, times.passes, times.ttft()),
        Timing("decode", shape, keys, batch, 1, times.tpot()),
    ]


def _expected(
    device: str | None, chip: Chip | None, device_kind: str, dtype: str, cache_dtype: str | None, mesh: str | None
) -> RooflineServing | None:
    """What times are set beside: the device that is asked for, else the data sheet of the one that is here."""
    if device is None and chip is None:
        return None
    if device is not None and device_file.is_file(device):
        _warn_of_another(device_file.read(device), device)
    elif device in hardware.CHIPS and (chip is None or chip.name != device):
        log.warning(f"--device {device}: this machine has {device_kind}; what is expected is of another device")
    count = MeshShape.parse(mesh).n_devices if mesh else 1
    try:
        return RooflineServing(
            chip if device is None else device, count, param_dtype=dtype, cache_dtype=cache_dtype or dtype, parallelism="tensor"
        )
    except ValueError as error:
        raise ConfigError(f"--device {device}: {error}") from error


def _warn_of_another(device: Device, path: str) -> None:
    here = _described(jax.devices()[0])
    if device.device_kind != here:
        log.warning(f"--device {path}: was measured on {device.device_kind or 'an unnamed device'}, and this is {here}")


def _described(device: jax.Device) -> str:
    """A device as JAX calls it; of a CPU the processor, of which JAX says nothing."""
    if device.platform != "cpu":
        return device.device_kind
    return host.described()


def _source(device: jax.Device) -> str:
    when, version = datetime.datetime.now(datetime.UTC).date(), metadata.version("jax")
    return f"measured on {_described(device)}, {when}, jax {version} (python -m launch benchmark-serving --fit)"


def _name_of(kind: str, chip: Chip | None) -> str:
    return f"this {kind}" if chip is None else f"{chip.name}, measured"


def _memory(device: jax.Device, chip: Chip | None) -> float:
    return chip.memory_bytes if chip is not None else float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _kind(device: jax.Device) -> str:
    return {"gpu": "gpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}.get(device.platform, "cpu")


def _dtype(dtype: str | None) -> str:
    """Of random weights: bfloat16, and float32 on CPUs, which are faster with it."""
    return dtype or ("float32" if jax.devices()[0].platform == "cpu" else "bfloat16")


def _off(ratio: Any, percentile: float) -> float:
    """How far off, as a share: of expected over measured, whichever way."""
    return float(np.percentile(np.abs(np.asarray(ratio) - 1), percentile))
