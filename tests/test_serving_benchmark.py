"""`benchmark-serving`: what it measures of small models here, and a device that is made up, found again from its times."""

import dataclasses
import json
import logging
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

from gqa_jax import model
from gqa_jax.config import ModelConfig
from gqa_jax.errors import ConfigError
from gqa_jax.hardware import Chip, Efficiency
from gqa_jax.inference import timing
from gqa_jax.inference.engine import Engine
from gqa_jax.search import calibration, device_file
from gqa_jax.search.roofline import RooflineServing
from launch import __main__ as launch
from launch import commands, serving_benchmark

SMALL, OTHER = "2x64:4,1:320", "1x64:2,2:320"


def test_times_are_of_programs_that_ran_before():
    config = ModelConfig(1, 32, 2, 1, 16, vocab_size=64, dtype="float32")
    engine = Engine(config, model.init_params(config, jax.random.key(0)), chunk=32)
    engine.warm_up(engine.plan([80], 10), 3)
    programs = dict(engine._programs)
    compiled = {name: program._cache_size() for name, program in programs.items()}
    times = timing.measure(engine, 80, 10, 1)
    both = times + timing.measure(engine, 80, 10, 1)
    assert engine._programs == programs
    assert {n: p._cache_size() for n, p in programs.items()} == compiled
    assert times.passes == 3
    assert len(both.first_seconds) == 2
    assert min(both.first_seconds) > 0
    assert min(both.token_seconds) > 0
    assert len(both.token_seconds) > len(times.token_seconds)
    assert -(-8 // times.stretch) == len(times.token_seconds)  # 10 tokens: the prompt's, one that is looked at first, and these
    assert times.weight_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(engine.weights))
    assert times.cache_bytes == engine.cache_bytes(1, times.plan.keys)


def test_a_table_has_a_row_for_each_model_context_and_batch(capsys):
    told = []
    found = commands.benchmark_serving([SMALL, OTHER], contexts="64,100", batches=[1, 2], new_tokens=4, repeats=1,
                                       measured=told.append)  # fmt: skip
    frame = found.frame
    assert tuple(frame.columns) == serving_benchmark.COLUMNS
    assert [*zip(frame["model"], frame["context"], frame["batch"], strict=True)] == [
        (name, context, batch) for name in (SMALL, OTHER) for context in (64, 100) for batch in (1, 2)
    ]
    assert len(told) == len(frame)
    assert told[0]["ttft"] == frame["ttft"][0]
    assert (frame[["ttft", "tpot", "prefill_flops", "decode_bytes", "output_per_second"]] > 0).all().all()
    assert (frame["prompt_tokens"] == frame["context"] - 4).all()
    assert frame["expected_ttft"].isna().all()  # a CPU has no data sheet
    row = frame.iloc[0]
    weights = 4 * (2 * (64 * 64 * (2 * 4 + 2 * 1) + 3 * 64 * 160 + 2 * 64) + 64 + 320 * 64)
    assert row["weight_bytes"] == weights
    assert row["decode_bytes"] * row["tpot"] == pytest.approx(
        weights + 4 * 2 * 2 * 64 * 62, rel=1e-6
    )  # 60 and two of four keys
    assert capsys.readouterr().out == ""


def test_the_command_line_prints_tables_and_data(capsys, tmp_path):
    asked = ["benchmark-serving", SMALL, "--contexts", "64", "--new_tokens", "3", "--repeats", "1"]
    assert launch.main([*asked, "--out", str(tmp_path / "all.csv")]) == launch.EXIT_DONE
    said = capsys.readouterr()
    assert "TTFT" in said.out
    assert "(4, 1)" in said.out
    assert "T = 64, B = 1: TTFT" in said.err
    assert pd.read_csv(tmp_path / "all.csv")["model"].tolist() == [SMALL]
    assert launch.main([*asked, "--format", "json"]) == launch.EXIT_DONE
    (row,) = json.loads(capsys.readouterr().out)
    assert row["n_kv_heads"] == 1
    assert row["prefill_mfu"] is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "name a run or a shape"),
        ({"models": ["nothing"]}, r"nothing: no run, and no shape like 12x768:8,1"),
        ({"models": ["12x768:8,3"]}, "not a multiple of model.n_kv_heads = 3"),
        ({"models": ["471M:8,1"]}, "the paper's tables have no 471M: there are 3M"),
        ({"models": [SMALL], "contexts": "32"}, "--contexts 32: no room for a prompt and 32 new tokens"),
        ({"models": [SMALL], "contexts": "nine"}, "nine"),
        ({"models": [SMALL], "new_tokens": 1}, "--new_tokens 1: must be at least 2"),
        ({"models": [SMALL], "batches": [0]}, "at least 1 each"),
        ({"models": [SMALL], "dtype": "float3"}, "float3"),
        ({"models": [SMALL], "cache_dtype": "float8", "contexts": "64"}, "float8"),
        ({"models": [SMALL], "device": "h20"}, "'h20' is unknown"),
        ({"fit": "x.json", "models": [SMALL], "contexts": "64"}, "6 times of 1 model.* a fit takes 12"),
        ({"fit": "device"}, "--fit device: must end in .json"),
        ({"fit": "here/there/x.json"}, "there is no folder here/there"),
        ({"fit": "x.json", "mesh": "tensor=2"}, "a device is measured by itself"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(given, message, monkeypatch):
    monkeypatch.setattr(serving_benchmark, "measure", None)
    with pytest.raises(ConfigError, match=message):
        commands.benchmark_serving(**given)


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "x.json").write_text("mine")
    with pytest.raises(ConfigError, match="that file is there"):
        commands.benchmark_serving(fit=str(tmp_path / "x.json"))


def test_what_was_measured_before_it_failed_is_kept(monkeypatch, tmp_path):
    """Of thirteen minutes, say, before Ctrl-C, or before there turn out to be too few times for a fit."""
    monkeypatch.setattr("gqa_jax.inference.loaded.free_bytes", lambda: 1e6)
    asked = ["benchmark-serving", SMALL, OTHER, "--contexts", "16,32,4K", "--new_tokens", "3", "--repeats", "1"]
    files = [str(tmp_path / name) for name in ("all.csv", "x.json")]
    assert launch.main([*asked, "--batches", "1", "--out", files[0], "--fit", files[1]]) != launch.EXIT_DONE
    assert len(pd.read_csv(files[0]).dropna(subset="ttft")) == 4
    assert not (tmp_path / "x.json").exists()


def test_what_does_not_fit_is_a_row_with_a_note(monkeypatch):
    monkeypatch.setattr("gqa_jax.inference.loaded.free_bytes", lambda: 1e6)
    found = commands.benchmark_serving([SMALL], contexts="64,4K", new_tokens=4, repeats=1)
    notes = found.frame["note"].tolist()
    assert pd.isna(notes[0])
    assert "does not fit: caches of 1 sequence" in notes[1]
    assert np.isnan(found.frame["ttft"][1])
    assert "does not fit" in found.table().text("csv") + found.table().text("markdown")


def made_up(monkeypatch, efficiency, chip):
    """Times of a device that is not here."""
    serving = RooflineServing(chip, param_dtype="float32", cache_dtype="float32", efficiency=efficiency)

    def measure(engine, prompt_tokens, new_tokens, batch, *, seed):
        plan = engine.plan([prompt_tokens] * batch, new_tokens)
        passes, shape = -(-prompt_tokens // plan.chunk), serving_benchmark.Subject("", engine.config, engine.plan).shape
        first = calibration.Timing("prefill", shape, prompt_tokens, batch, passes, 1.0)
        step = calibration.Timing("decode", shape, prompt_tokens + new_tokens / 2, batch, 1, 1.0)
        seconds = [float(calibration.phase(serving, one).seconds) for one in (first, step)]
        return timing.Times(plan, prompt_tokens, new_tokens, passes, (seconds[0],), (seconds[1],), 1, 0.0, 1, 1, None)

    monkeypatch.setattr(serving_benchmark, "measure", measure)


@pytest.mark.parametrize(("patience", "order"), [(20.0, [12, 28, 12, 28]), (0.0, [12, 28])])
def test_contexts_take_turns_and_long_ones_have_one(patience, order, monkeypatch):
    made_up(monkeypatch, Efficiency(1.0, 1.0, 1.0, 1.0, 0.0), Chip("made up", 50e9, 1e10, 9e9, interconnect=0.0))
    monkeypatch.setattr(timing, "PATIENCE", patience)
    asked, one = [], serving_benchmark.measure
    monkeypatch.setattr(serving_benchmark, "measure", lambda *given, seed: asked.append(given[1]) or one(*given, seed=seed))
    told = []
    found = commands.benchmark_serving([SMALL], contexts="16,32", new_tokens=4, repeats=2, measured=told.append)
    assert asked == order
    assert [row["prompt_tokens"] for row in told] == order
    assert found.frame["repeats"].tolist() == [len(order) // 2] * 2


def test_a_device_is_found_again_from_its_times_and_foretells_others(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(serving_benchmark, "last_level_cache", lambda chip: 1e5)
    chip, true = Chip("made up", 50e9, 1e10, 9e9, interconnect=0.0), Efficiency(1.0, 0.7, 1.0, 0.8, 2e-5)
    made_up(monkeypatch, true, chip)
    file = str(tmp_path / "device.json")
    found = commands.benchmark_serving(fit=file)
    assert len(found.frame) == 18
    assert found.written == file
    held = device_file.read(file)
    assert held == found.fitted.device
    peaks = np.array([held.chip.peak_flops, held.chip.peak_flops, held.chip.memory_bandwidth, held.chip.memory_bandwidth])
    np.testing.assert_allclose(peaks * held.efficiency[:4], [50e9, 35e9, 9e9, 7.2e9], rtol=0.02)
    said = "\n".join(found.sentences())
    assert "GFLOP/s in products with parameters, standard error" in said
    assert "off by 0.0% in the median" in said
    assert json.loads(Path(file).read_text())["measurements"][0]["context"] == 256
    with caplog.at_level(logging.WARNING):
        beside = commands.benchmark_serving(["4x64:4,2:320"], contexts="512", batches=[3], device=file)
    assert not caplog.records  # the same device
    row = beside.frame.iloc[0]
    assert row["expected_ttft"] == pytest.approx(row["ttft"], rel=0.02)
    assert row["expected_tpot"] == pytest.approx(row["tpot"], rel=0.02)
    assert "expected / measured" in "\n".join(beside.sentences())
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(Path(file).read_text()) | {"device_kind": "another processor"}))
    with caplog.at_level(logging.WARNING):
        commands.benchmark_serving([SMALL], contexts="512", device=str(other))
    assert "was measured on another processor, and this is " in caplog.text


def test_shapes_of_a_calibration_are_opposite_and_beyond_the_cache():
    for kind, chip in (("cpu", None), ("gpu", serving_benchmark.hardware.CHIPS["h100"])):
        dtype = "float32" if chip is None else "bfloat16"
        wide, deep = (serving_benchmark.subject(name, dtype, None, None, 0)
                      for name in serving_benchmark.calibration_models(kind, chip, dtype))  # fmt: skip
        assert deep.config.n_layers == 4 * wide.config.n_layers
        assert deep.config.d_model < wide.config.d_model
        assert wide.config.n_kv_heads == 1
        assert deep.config.n_kv_heads == deep.config.n_heads
        for one in (wide, deep):
            held = one.shape.n_layers * one.shape.d_model * (3 * one.shape.d_ff) * (4 if chip is None else 2)
            assert held > 0.7 * 4 * serving_benchmark.last_level_cache(chip)


def test_a_run_and_a_public_model_are_subjects():
    assert serving_benchmark.subject("llama-3.2-1b", "bfloat16", None, None, 0).config.n_kv_heads == 8
    one = serving_benchmark.subject("470M:8,1", None, None, None, 0).config
    assert dataclasses.astuple(one)[:4] == (24, 1280, 8, 1)
    one = serving_benchmark.subject("3x28:4,2:320:16", None, None, None, 0).config
    assert (one.n_layers, one.d_model, one.n_kv_heads, one.vocab_size, one.head_dim) == (3, 28, 2, 320, 16)
