import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.first_light import findings, report, steps, verdicts

PEAK = 989e12
H100 = "NVIDIA H100 80GB HBM3"
STEPS = [step.name for step in steps.STEPS]
KINDS = ("plain", "offset", "unseen", "segments, sorted", "segments of one token", "segments, unsorted", "large logits")
CELLS = [(64, 8, 1, 16_384), (64, 32, 8, 16_384), (64, 8, 1, 4096), (64, 32, 8, 4096), (128, 8, 1, 16_384), (128, 8, 1, 4096)]


def attention_row(cell, direction, implementation, share, **more):
    """A row whose FLOP/s are `share` of the peak."""
    head_dim, n, k, length = cell
    amount = 2.0 * n * head_dim * length**2 * (3.5 if direction == "backward" else 1)
    seconds = amount / (share * PEAK)
    return {
        "step": "2" if cell == CELLS[0] else "8", "case": f"{direction} {length} {n}/{k} d{head_dim} plain",
        "direction": direction, "implementation": implementation, "batch": 1, "length": length, "n_heads": n,
        "n_kv_heads": k, "head_dim": head_dim, "form": "plain", "documents": None, "amount": amount, "seconds": seconds,
        "turns": [0.9 * seconds, seconds, 1.1 * seconds], "tflops": amount / seconds / 1e12, "temp_bytes": 2**20,
        "relative_error": 0.002, "seconds_compile": 3.0, "status": "ok", "reason": "",
    } | more  # fmt: skip


def training_rows(step, case, seconds, remat, attention="cudnn", size=None):
    flops = 0.4 * PEAK  # so that MFU is 0.4 over the seconds
    prepared = {
        "step": step, "case": case, "implementation": "gqa_jax", "phase": "prepare", "status": "ok", "reason": "",
        "attention": attention, "remat": remat, "bytes_peak": 30e9, "bytes_arguments": 6e9, "bytes_temporary": 20e9,
        "seconds_lower": 2.0, "seconds_compile": 20.0, "tokens_per_step": 16_384, "peak_flops": PEAK,
        "flops_per_step": {"causal": flops, "full": 1.2 * flops}, "versions": {"jax": "0.11.2"},
        "planner": {"seconds_step": 0.5, "bytes_arguments": 6e9, "bytes_temporary": 21e9},
    }  # fmt: skip
    prepared |= {} if size is None else {"size": size, "attention_asked": attention}
    measured = {
        "step": step, "case": case, "implementation": "gqa_jax", "phase": "measure", "status": "ok", "seconds_step": seconds,
        "turns": [seconds] * 3, "tokens": 16_384, "tokens_per_second": 16_384 / seconds,
    }  # fmt: skip
    return [prepared, measured]


def rows():
    """Of a run on an H100 in which all is right, pallas_gpu is a little slower than cuDNN, and predictions are hit."""
    found = [
        {"step": "0", "case": "tiny kernels", "status": "ok", "mosaic": "ok", "triton": "ok"},
        {"step": "0", "case": "matmul", "status": "ok", "size": 8192, "rate": 0.7 * PEAK},
        {"step": "0", "case": "copy", "status": "ok", "size": 2**30, "rate": 0.9 * 3.35e12},
    ]
    for kernel in ("pallas_gpu", "pallas_triton"):
        for part in ("forward", "dq", "dkv", *(["decode"] if kernel == "pallas_triton" else [])):
            shape = {"length": 64, "head_dim": 64, "n_heads": 1, "n_kv_heads": 1}
            found.append(
                {"step": "1", "case": f"{kernel} {part}", "implementation": kernel, "part": part, "status": "ok"} | shape
            )
        for kind in KINDS:
            shape = {"length": 200, "head_dim": 64, "n_heads": 8, "n_kv_heads": 1, "kind": kind}
            found.append({"step": "5", "case": f"{kind} 200 8/1 d64", "implementation": kernel, "status": "ok"} | shape)
        found.append(
            {"step": "6", "case": "races 4096 8/1", "implementation": kernel, "status": "ok", "runs": 30, "copies": 99}
        )
    for i in range(3):
        cell = {"case": f"{'ABC'[i]}", "loss": 5.0 + i, "loss_cpu": 5.001 + i, "device": H100, "attention": "pallas_triton"}
        found.append({"step": "1b", "status": "ok", "reason": ""} | cell)
    found.append({"step": "1b", "case": "run", "status": "ok", "reason": "", "cells": 3, "seconds": {"run": 30.0}})
    found.append({"step": "1b", "case": "run again", "status": "ok", "reason": "", "seconds": {"run": 5.0}})
    for cell in CELLS:
        for direction, shares in (("forward", (0.48, 0.5, 0.47)), ("backward", (0.3, 0.42, 0.4))):
            by_size = (1.25 if cell[0] == 128 else 1.0) * (0.9 if cell[3] == 4096 else 1.0)
            for name, share in zip(("pallas_gpu", "cudnn", "tokamax"), shares, strict=True):
                found.append(attention_row(cell, direction, name, by_size * share))
    found.append(attention_row((64, 8, 1, 32_768), "backward", "pallas_gpu", 0.1, documents=4, step="8"))
    found += training_rows("3", "470M", 1.0, "attention_only")
    losses = [10 - 0.1 * i for i in range(10)]
    found.append({"step": "3", "case": "470M: losses", "implementation": "gqa_jax", "status": "ok", "losses": losses,
                  "tokens_sha256": "a"})  # fmt: skip
    for name, is_as_fast in (("torch eager", 1.1), ("torch compiled", 0.8)):
        found += [
            {"step": "3", "case": "470M", "implementation": name, "phase": "prepare", "status": "ok", "bytes_peak": 40e9,
             "seconds_compile": 30.0, "sdpa": "flash", "versions": {"torch": "2.11.0", "python": "3.11"}},
            {"step": "3", "case": "470M: losses", "implementation": name, "status": "ok",
             "losses": [loss + 0.004 for loss in losses], "tokens_sha256": "a"},
            {"step": "3", "case": "470M", "implementation": name, "phase": "measure", "status": "ok",
             "turns": [is_as_fast] * 3, "seconds_step": is_as_fast, "tokens": 16_384, "gqa_jax_is": is_as_fast},
        ]  # fmt: skip
    for name in ("cudnn", "pallas_triton"):
        for setting, seconds in (("default", 0.010), ("deterministic", 0.012)):
            found.append({"step": "4", "case": f"3M {name} {setting}", "attention": name, "setting": setting, "status": "ok",
                          "distinct": 1, "times": 10, "same_process": True, "second_process": True, "seconds_step": seconds,
                          "loss_difference": 0.0})  # fmt: skip
    found += training_rows("7", "470M none cudnn", 1.25, "none", size="470M")
    found.append({"step": "7", "case": "profile of 470M", "implementation": "gqa_jax", "status": "ok", "steps": 3,
                  "seconds_span": 3.0, "kernels": [{"name": "gemm|bf16", "seconds": 1.5, "count": 6}]})  # fmt: skip
    for batch, length in ((1, 131_072), (8, 16_384)):
        found.append({"step": "9", "case": f"decode {batch} x {length} 8/1", "implementation": "pallas_triton", "batch": batch,
                      "length": length, "n_heads": 8, "n_kv_heads": 1, "head_dim": 64, "seconds": 1e-5, "gb_s": 2000.0,
                      "copy_gb_s": 3000.0, "share_of_copy": 0.667, "status": "ok"})  # fmt: skip
    found += [
        {"step": "10", "case": f"{k} processes", "processes": k, "status": "ok", "tokens_per_second": 1e5 * (1 + k)}
        for k in (1, 2, 4)
    ]
    return sorted(found, key=lambda row: STEPS.index(row["step"]))


def record(mode="device", device=H100):
    return {
        "schema": 1, "mode": mode, "began": "2026-12-01T10:00:00+00:00", "ended": "2026-12-01T10:08:00+00:00", "finished": True,
        "command": "python -m benchmarks.first_light --out runs/first", "date": "2026-12-01", "commit": "abc123",
        "target": "h100" if mode == "compile_only" else None, "host": {"cpus": 16, "python": "3.12.3"},
        "card": {"name": H100, "driver_version": "580.1"}, "ptxas": "13.0.88", "nvcc": "13.0.88",
        "environment": {"device": device, "versions": {"jax": "0.11.2", "tokamax": None}},
        "steps": {s.name: {"name": s.name, "title": s.title, "limit_s": s.seconds, "status": "done", "seconds": 9.0}
                  for s in steps.STEPS},
        "bad": {}, "rows": rows(),
    }  # fmt: skip


def change(*, where, **values):
    """A change of the rows of which `where` holds."""

    def of(record):
        changed = [row for row in record["rows"] if where(row)]
        assert changed
        for row in changed:
            row |= values

    return of


def faster(row):
    """pallas_gpu 1.2 times as fast as cuDNN."""
    return is_attention(row, "pallas_gpu") and row["length"] in (4096, 16_384)


def is_attention(row, name):
    return "direction" in row and row["implementation"] == name


def speed_up(where, factor):
    def of(record):
        for row in filter(where, record["rows"]):
            row["turns"] = [seconds / factor for seconds in row["turns"]]
            row["seconds"], row["tflops"] = row["seconds"] / factor, row["tflops"] * factor

    return of


def without(where):
    def of(record):
        kept = [row for row in record["rows"] if not where(row)]
        assert len(kept) < len(record["rows"])
        record["rows"] = kept

    return of


def both(*changes):
    def of(record):
        for one in changes:
            one(record)

    return of


def marked_bad(record):
    record["bad"]["pallas_gpu backward"] = "hang in step 7, 470M none pallas_gpu, phase run: silent for 15 s"


def at(step, **fields):
    return lambda row: row["step"] == step and all(row.get(name) == value for name, value in fields.items())


def verdict(record, subject):
    found = [one for one in verdicts.of(record) if one["subject"] == subject]
    assert len(found) == 1, [one["subject"] for one in verdicts.of(record)]
    return found[0]


def files(found):
    return [change["file"] for change in found["changes"]]


OUTCOMES = {
    "right kernel": ("kernel pallas_gpu", None, "keep", "right", []),
    "wrong kernel": (
        "kernel pallas_gpu", change(where=at("5", implementation="pallas_gpu", kind="offset"), status="wrong"),
        "change", "wrong: its limits", ["gqa_jax/attention/dispatch.py", "tests/test_attention_hopper.py"],
    ),
    "kernel that hangs": (
        "kernel pallas_gpu", change(where=at("2", implementation="pallas_gpu"), status="hang", ended_in="run", reason="silent"),
        "change", "hangs: its limits", ["gqa_jax/attention/dispatch.py", "tests/test_attention_hopper.py"],
    ),
    "kernel that hangs in training": (
        "kernel pallas_gpu", marked_bad, "change", "hangs",
        ["gqa_jax/attention/dispatch.py", "tests/test_attention_hopper.py"],
    ),
    "kernel without memory": (
        "kernel pallas_gpu",
        change(where=at("8", implementation="pallas_gpu"), status="failed", ended_in="run", reason="RESOURCE_EXHAUSTED: 3 GiB"),
        "keep", "right", [],
    ),
    "worker that does not start": (
        "kernel pallas_gpu", change(where=at("8", implementation="pallas_gpu"), status="died", ended_in="start"),
        "keep", "right", [],
    ),
    "kernel that refuses": (
        "kernel pallas_gpu",
        both(change(where=at("1", implementation="pallas_gpu"), status="refused", reason="of Hopper alone"),
             change(where=at("5", implementation="pallas_gpu"), status="failed", reason="of Hopper alone")),
        "not decided", "not decided", [],
    ),
    "kernel never checked": ("kernel pallas_gpu", without(at("5")), "not decided", "not decided", []),
    "decode wrong": (
        "kernel pallas_triton", change(where=at("9"), status="wrong", reason="off"), "change", "wrong",
        ["gqa_jax/attention/dispatch.py", "tests/test_attention_triton.py", "tests/test_attention_decode.py"],
    ),
    "triton right": ("pallas_triton as a default", None, "keep", "stays", []),
    "triton wrong": (
        "pallas_triton as a default", change(where=at("5", implementation="pallas_triton", kind="unseen"), status="wrong"),
        "change", "off the table", ["gqa_jax/attention/dispatch.py"],
    ),
    "triton never checked": ("pallas_triton as a default", without(at("5")), "not decided", "not decided", []),
    "slower than cuDNN": (
        "pallas_gpu as a default: head size 64, group 8, T = 16K", None, "keep", "no row of defaults: below", [],
    ),
    "as fast as cuDNN": (
        "pallas_gpu as a default: head size 64, group 8, T = 16K", speed_up(faster, 1.5), "change", "a row of defaults",
        ["gqa_jax/attention/dispatch.py"],
    ),
    "faster forward alone": (
        "pallas_gpu as a default: head size 64, group 8, T = 16K",
        speed_up(lambda row: faster(row) and row["direction"] == "forward", 1.5), "keep", "no row of defaults: below", [],
    ),
    "faster, and wrong": (
        "pallas_gpu as a default: head size 64, group 8, T = 16K", both(speed_up(faster, 1.5), marked_bad), "keep",
        "no row of defaults: the kernel is wrong or hangs", [],
    ),
    "faster, never checked": (
        "pallas_gpu as a default: head size 64, group 8, T = 16K", both(speed_up(faster, 1.5), without(at("5"))),
        "not decided", "not decided", [],
    ),
    "no cuDNN": (
        "pallas_gpu as a default: head size 64, group 8, T = 16K", without(lambda row: is_attention(row, "cudnn")),
        "not decided", "not decided", [],
    ),
    "above tokamax": ("the Hopper kernels", None, "keep", "kept", []),
    "below both everywhere": (
        "the Hopper kernels", speed_up(faster, 0.9), "change", "deleted", [verdicts.HOPPER_FILES],
    ),
    "below both, one cell unknown": (
        "the Hopper kernels",
        both(speed_up(faster, 0.9), without(lambda row: is_attention(row, "tokamax") and row["head_dim"] == 128)),
        "not decided", "not decided", [],
    ),
    "below both in the first look": (
        "the Hopper kernels", both(speed_up(faster, 0.9), without(at("8"))), "not decided", "not decided", [],
    ),
    "below both, and one hangs": (
        "the Hopper kernels",
        both(speed_up(faster, 0.9), change(where=at("2", implementation="pallas_gpu"), status="hang", seconds=None)),
        "not decided", "not decided", [],
    ),
    "no races": ("pallas_gpu is deterministic", None, "keep", "stays so", []),
    "races": (
        "pallas_gpu is deterministic",
        change(where=at("6", implementation="pallas_gpu"), status="wrong", reason="dq differs in 2 of 30 runs"),
        "change", '"deterministic" is withdrawn', ["README.md"],
    ),
    "races of the other": (
        "pallas_triton is deterministic", change(where=at("6", implementation="pallas_gpu"), status="wrong"), "keep",
        "stays", [],
    ),
    "races left out": (
        "pallas_gpu is deterministic", change(where=at("6"), status="left out", reason="no time"),
        "not decided", "not decided", [],
    ),
    "resume exact": ("resuming is exact, with cudnn", None, "keep", "README's words stay", []),
    "resume exact with determinism": (
        "resuming is exact, with cudnn", change(where=at("4", attention="cudnn", setting="default"), distinct=3),
        "change", "a `deterministic` option: it takes 1.20x the time", ["gqa_jax/config.py", "README.md"],
    ),
    "resume never exact": (
        "resuming is exact, with cudnn", change(where=at("4", attention="cudnn"), second_process=False),
        "change", "README's words change: not exact, nor", ["README.md"],
    ),
    "resume failed": (
        "resuming is exact, with cudnn", change(where=at("4"), status="failed", reason="no disk"),
        "not decided", "not decided", [],
    ),
    "decode at two thirds": ("decoding with pallas_triton", None, "keep", "at least 50%", []),
    "decode slow": (
        "decoding with pallas_triton", change(where=at("9", batch=8), share_of_copy=0.49), "change", "below 50% of a copy",
        ["gqa_jax/attention/triton/decode.py"],
    ),
    "decode not timed": (
        "decoding with pallas_triton", change(where=at("9"), share_of_copy=None), "not decided", "not decided", [],
    ),
    "efficiency": ("the planner's efficiency on h100", None, "change", "0.45, dated", ["gqa_jax/planning/planner.py"]),
    "no planner": (
        "the planner's efficiency on h100", change(where=at("3", phase="prepare"), planner=None), "change", "0.40, dated",
        ["gqa_jax/planning/planner.py"],
    ),
    "no training": (
        "the planner's efficiency on h100", without(lambda row: row["step"] in ("3", "7")), "not decided", "not decided", [],
    ),
    "losses agree": ("losses beside torch compiled's", None, "keep", "agree within 0.01", []),
    "losses disagree": (
        "losses beside torch compiled's",
        change(where=at("3", case="470M: losses", implementation="torch compiled"), losses=[9.9 - 0.1 * i for i in range(10)]),
        "change", "disagree", ["benchmarks/train_ours.py, benchmarks/train_torch.py"],
    ),
    "losses diverge": (
        "losses beside torch compiled's",
        change(where=at("3", case="470M: losses", implementation="torch compiled"), losses=[10.0] * 9 + ["nan"]),
        "change", "disagree", ["benchmarks/train_ours.py, benchmarks/train_torch.py"],
    ),
    "losses of other tokens": (
        "losses beside torch compiled's", change(where=at("3", implementation="torch compiled"), tokens_sha256="b"),
        "not decided", "not decided", [],
    ),
    "losses of five steps": (
        "losses beside torch compiled's",
        change(where=at("3", case="470M: losses", implementation="torch compiled"), losses=[10.0, 9.9, 9.8, 9.7, 9.6]),
        "not decided", "not decided", [],
    ),
    "road right": ("the README's road", None, "keep", "right", []),
    "road off": (
        "the README's road", change(where=at("1b", case="A"), status="wrong", reason="off by 0.3"), "change",
        "wrong", ["README.md"],
    ),
    "road trains again": (
        "the README's road", change(where=at("1b", case="run again"), status="wrong", reason="checkpoints changed"),
        "change", "wrong", ["README.md"],
    ),
    "road without the device": (
        "the README's road", change(where=at("1b", case="B"), device=""), "change", "wrong", ["README.md"],
    ),
    "road of two cells": ("the README's road", without(at("1b", case="C")), "change", "wrong", ["README.md"]),
    "road out of time": (
        "the README's road",
        both(without(at("1b", case="run again")), change(where=at("1b", case="run"), status="out of time")),
        "not decided", "not decided", [],
    ),
    "forward as predicted": ("prediction: forward pass of pallas_gpu at head size 64", None, "hit", "hit", []),
    "forward faster": (
        "prediction: forward pass of pallas_gpu at head size 64", speed_up(faster, 1.5), "missed", "missed", [],
    ),
    "backward as predicted": ("prediction: backward pass of pallas_gpu, of cuDNN's fused one", None, "hit", "hit", []),
    "backward better": (
        "prediction: backward pass of pallas_gpu, of cuDNN's fused one",
        speed_up(lambda row: faster(row) and row["direction"] == "backward", 1.5), "missed", "missed", [],
    ),
    "MFU as predicted": ("prediction: MFU of 470M, 8/1 heads, remat none, cudnn", None, "hit", "hit", []),
    "MFU better": (
        "prediction: MFU of 470M, 8/1 heads, remat none, cudnn",
        change(where=at("7", phase="measure"), turns=[1.0, 1.0, 1.0]), "missed", "missed", [],
    ),
    "beside compiled": ("prediction: ours, of torch.compile's speed", None, "hit", "hit: as the code was", []),
    "beside compiled, later": (
        "prediction: ours, of torch.compile's speed", change(where=at("3", implementation="torch compiled"), gqa_jax_is=1.2),
        "hit", "hit: with layers unrolled", [],
    ),
    "beside compiled, between": (
        "prediction: ours, of torch.compile's speed", change(where=at("3", implementation="torch compiled"), gqa_jax_is=1.0),
        "missed", "missed", [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTCOMES)
def test_an_outcome_decides(name):
    subject, made, status, decision, changed = OUTCOMES[name]
    found = record()
    if made is not None:
        made(found)
    one = verdict(found, subject)
    assert (one["status"], files(one)) == (status, changed), one
    assert one["decision"].startswith(decision), one
    assert one["why"]


def test_what_is_wrong_says_where_and_when():
    found = record()
    reason = "dq is off by 0.2, allowed are 0.01"
    change(where=at("5", implementation="pallas_gpu", kind="segments, sorted"), status="wrong", reason=reason)(found)
    one = verdict(found, "kernel pallas_gpu")
    assert "segments, sorted (head size 64; T = 200): wrong once" in one["changes"][0]["setting"]
    assert H100 in one["changes"][0]["setting"]
    assert "segments, sorted 200 8/1 d64" in one["changes"][1]["setting"]
    assert reason in one["why"]
    text = report.markdown(found)
    assert "| pallas_gpu | segments, sorted | 0 of 1 | 1 |" in text
    assert "| pallas_gpu | plain | 1 of 1 |" in text
    assert f"| pallas_gpu | segments, sorted 200 8/1 d64 | wrong | {reason} |" in text


def test_an_empty_record_decides_nothing_and_says_so_of_everything():
    empty = record() | {"rows": [], "steps": {}}
    subjects = {one["subject"] for one in verdicts.of(record())}
    found = verdicts.of(empty)
    assert {one["status"] for one in found} == {"not decided"}
    assert all(one["why"] and not one["changes"] for one in found)
    of_figures = ("pallas_gpu as a default", "losses beside")
    assert {s for s in subjects if not s.startswith(of_figures)} <= {one["subject"] for one in found}
    assert all(any(one["subject"].startswith(s) for one in found) for s in of_figures)
    assert "step 4 did not begin" in verdict(empty, "resuming is exact, with cudnn")["why"]


@pytest.mark.parametrize(("mode", "words"), [("rehearse", "a rehearsal decides nothing"), ("compile_only", "compiles only")])
def test_other_modes_decide_nothing(mode, words):
    found = verdicts.of(record(mode, device="cpu" if mode == "rehearse" else H100))
    assert {one["status"] for one in found} == {"not decided"}
    assert all(words in one["why"] and one["changes"] == [] for one in found)
    text = report.markdown(record(mode))
    assert words in text
    assert "```python" not in text
    assert verdict(record(mode), "the README's road")["why"].endswith("trained nothing)")  # what it would have been


@pytest.mark.parametrize("mode", ["device", "rehearse", "compile_only"])
def test_a_record_cut_short_after_each_step_still_says_what_it_has(mode):
    whole = record(mode)
    for i, step in enumerate(STEPS):
        cut = copy.deepcopy(whole)
        cut["steps"] = {name: cut["steps"][name] for name in STEPS[: i + 1]}
        cut["steps"][step] |= {"status": "running"}
        cut["steps"][step].pop("seconds")
        cut["rows"] = [row for row in cut["rows"] if row["step"] in cut["steps"]]
        cut |= {"finished": False}
        cut.pop("ended")
        text = report.markdown(cut)
        assert "stopped before the end" in text
        json.dumps(verdicts.of(cut), allow_nan=False)
        if mode == "device":
            assert ("## Small cells\n\nNot measured: step 10 did not begin." in text) == (step != "10")
            assert ("## Ceilings\n\nNot measured" in text) is False


def few_rows():
    """A record in which some things are right and some wrong, of one cell of attention."""
    found = record()
    without(lambda row: row["step"] == "8" and row["documents"] is None)(found)
    without(at("5", kind="plain"))(found)
    for where in (at("5", kind="offset"), at("6", implementation="pallas_gpu"), at("4", setting="default"), at("9", batch=8)):
        change(where=where, status="wrong", reason="off")(found)
    return found


def test_any_field_may_be_missing_or_no_number():
    whole = few_rows()
    for name in sorted({name for row in whole["rows"] for name in row}):
        for value in (None, "nan", -1, ["nan"], "missing"):
            changed = copy.deepcopy(whole)
            for row in changed["rows"]:
                if name in row:
                    row.pop(name) if value == "missing" else row.update({name: value})
            report.markdown(changed)
            json.dumps(verdicts.of(changed), allow_nan=False)
    for name in whole:
        report.markdown({key: value for key, value in whole.items() if key != name})
        for value in (None, "", [], {}):
            report.markdown(whole | {name: value})


def test_lines_for_the_table_of_defaults_can_be_pasted():
    from gqa_jax.attention.dispatch import Row

    found = record()
    assert verdicts.default_rows(found) == []
    speed_up(lambda row: faster(row) and row["head_dim"] == 64, 1.5)(found)
    lines = verdicts.default_rows(found)
    made = [eval(line.rstrip(","), {"Row": Row, "range": range}) for line in lines if not line.startswith("#")]
    preferred = ("pallas_gpu", "cudnn", "pallas_triton", "xla")
    lengths = range(4096, 16_385)
    assert made == [
        Row("gpu", preferred, head_dims=range(64, 65), lengths=lengths, groups=range(group, group + 1)) for group in (4, 8)
    ]
    assert all(line.startswith(f"# {H100}, 2026-12-01, of cuDNN: T = 4K forward 1.44x") for line in lines[::2])
    change(where=at("5", implementation="pallas_triton", kind="unseen"), status="wrong")(found)
    assert not any("pallas_triton" in line for line in verdicts.default_rows(found))
    marked_bad(found)
    assert verdicts.default_rows(found) == []


def test_lines_of_a_rehearsal_are_none():
    found = record("rehearse")
    speed_up(faster, 1.5)(found)
    assert verdicts.default_rows(found) == report.planner_rows(found) == report.chip_rows(found) == []
    assert len(verdicts.default_rows(found | {"mode": "device"})) == 6


def test_a_ratio_is_taken_within_turns_where_there_are_any():
    slow, fast = {"seconds": 2.0, "turns": [1.0, 2.0, 9.0]}, {"seconds": 1.0, "turns": [0.5, 0.9, 1.0]}
    assert findings.ratio(fast, slow) == pytest.approx(2 / 0.9)
    assert findings.ratio({"seconds": 1.0}, slow) == 2.0
    assert findings.ratio(slow, None) is findings.ratio({"seconds": "nan"}, slow) is None


def test_a_kernel_that_hangs_has_no_speed_to_be_deleted_for():
    found = record()
    speed_up(faster, 0.9)(found)
    change(where=at("2", implementation="pallas_gpu", direction="forward"), status="hang", seconds=None)(found)
    assert "forward, T = 16K, 8/1 heads of 64: hang, so no speed" in verdict(found, "the Hopper kernels")["why"]


def test_a_card_is_known_without_the_first_step():
    found = record()
    found["environment"] = found["card"] = {}
    assert (findings.device(found), findings.chip(found).name) == (H100, "h100")  # of the README's cells
    without(at("1b"))(found)
    assert (findings.device(found), findings.chip(found)) == ("an unknown device", None)


def test_predictions_are_of_hopper_alone():
    of_another = verdicts.of(record(device="NVIDIA A100-SXM4-80GB"))
    assert {one["status"] for one in of_another if one["subject"].startswith("prediction")} == {"not decided"}
    assert {one["status"] for one in verdicts.of(record(device="NVIDIA H200")) if "prediction" in one["subject"]} == {"hit"}


def test_a_length_that_is_lost_parts_the_lines():
    found = record()
    found["rows"] += [attention_row((64, 8, 1, 8192), d, n, 0.4) for d in ("forward", "backward") for n in ("cudnn", "tokamax")]
    found["rows"] += [attention_row((64, 8, 1, 8192), d, "pallas_gpu", 0.3) for d in ("forward", "backward")]
    speed_up(lambda row: faster(row) and row["n_heads"] == 8 and row["head_dim"] == 64, 1.5)(found)
    lines = [line for line in verdicts.default_rows(found) if not line.startswith("#")]
    assert [line[line.index("lengths") : line.index(", groups")] for line in lines] == [
        "lengths=range(4096, 4097)",
        "lengths=range(16384, 16385)",
    ]


def test_shares_of_the_chip_by_hand():
    """Forward and backward take 7 units of FLOPs for 2, so the backward pass alone has 5 in the time that is left."""
    forward, both = 0.5, 0.42
    backward = 2.5 / (3.5 / both - 1 / forward)
    found = findings.shares(record(), "cudnn")
    assert [size for size, *_ in found] == [64, 128]
    assert found[0][1:] == pytest.approx((forward, backward))
    assert found[1][1:] == pytest.approx((1.25 * forward, 1.25 * backward))
    lines = report.chip_rows(record())
    assert f"attention_share=((64, 0.500, {backward:.3f}), (128, 0.625, {1.25 * backward:.3f}),),  # cudnn" in lines[3]
    assert lines[1].startswith("matmul_share=0.700,")
    assert lines[2].startswith("copy_share=0.900,")


def test_training_by_hand():
    forms = {(form.case, form.implementation): form for form in findings.training(record())}
    ours, compiled = forms["470M", "gqa_jax"], forms["470M", "torch compiled"]
    assert (ours.mfu(), ours.mfu("full"), ours.efficiency, ours.rate) == pytest.approx((0.4, 0.48, 0.5, 16_384))
    assert (compiled.mfu(), compiled.ratio, compiled.rate) == pytest.approx((0.5, 0.8, 20_480))
    assert compiled.efficiency is None
    text = report.markdown(record())
    assert "| 470M | gqa_jax | cudnn, attention_only | 16,384 | 40.0% | 48.0% |  | 1 | 0.5 | 30.0 | 26.0 | 27.0 | 22 |" in text
    assert "| 470M | torch compiled | flash | 20,480 | 50.0% | 60.0% | 0.80x | 0.8 |  | 40.0 |  |  | 30 |" in text
    assert report.planner_rows(record())[1:] == [
        '("h100", "470M", "attention_only", "cudnn"): 0.500,  # 0.5 s planned, 1 s measured',
        '("h100", "470M", "none", "cudnn"): 0.400,  # 0.5 s planned, 1.25 s measured',
    ]


def test_figures_of_the_other_tables():
    text = report.markdown(record())
    for line in (
        "| forward | 16K | 8/1 | 64 | pallas_gpu | 0.579 | 475 |  | 0.96x | 0.002 | 1.0 |",
        "| 1 | 128K | 8/1 | pallas_triton | 10 | 2,000 | 3,000 | 66.7% |",
        "| 4 | 500,000 | 2.50x |",
        "| cudnn | deterministic | ok | 1 in 10 | yes | yes | 0.0000 | 12 | 1.20x |",
        "| races 4096 8/1 | pallas_gpu | 30 | 99 | equal |",
        "| matmul, bfloat16, n = 8,192 | 692 TFLOP/s | 70.0% | ok |",
        "| cudnn | 64 | 538 | 494 |",  # published, and here
        "| A | ok | 5.0000 | 5.0010 | NVIDIA H100 80GB HBM3 | pallas_triton |",
        "| gemm\\|bf16 | 500 | 50.0% | 6 |",
        "- card: name NVIDIA H100 80GB HBM3, driver_version 580.1",
        "- versions: ptxas 13.0.88, nvcc 13.0.88, jax 0.11.2, torch 2.11.0, PyTorch's python 3.11",
    ):
        assert line in text


def test_what_was_left_out_and_what_failed_is_said_once_for_each_reason():
    found = record()
    change(where=at("6"), status="left out", reason="no time left in this step")(found)
    change(where=at("10"), status="failed", reason="no | memory\nleft")(found)
    text = report.markdown(found)
    assert "| 6 | pallas_gpu | left out | no time left in this step | 1 | races 4096 8/1 |" in text
    assert "| 10 | failed | no \\| memory left | 3 | 1 processes, 2 processes, 4 processes |" in text


def test_programs_compiled_side_by_side_count_once():
    found = record("compile_only") | {"rows": []}
    together = {"lower": 2.0, "compile": 30.0}
    for i in range(8):
        found["rows"].append({"step": "5", "case": f"case {i}", "implementation": "pallas_gpu", "status": "compiled",
                              "phases": dict(together)})  # fmt: skip
    found["rows"] += [
        {"step": "5", "case": "case 0", "implementation": "pallas_triton", "status": "failed", "reason": "ptxas", "phases": {}},
        {
            "step": "3",
            "case": "470M",
            "status": "compiled",
            "seconds_lower": 1.0,
            "seconds_compile": 9.0,
            "bytes_temporary": 2**30,
        },
    ]
    text = report.markdown(found)
    assert "| 5 | 32 | 65 |" in text
    assert "| 3 | 10 | 140 |" in text
    assert "| 5 | case 0 and 7 more | pallas_gpu | 8 compiled | 32 |" in text
    assert "| 3 | 470M |  | compiled | 10 | 1,024.0 |" in text
    assert "| 5 | pallas_triton | failed | ptxas | 1 | case 0 |" in text


def test_a_record_is_kept_once(tmp_path):
    paths = report.write(record(), tmp_path / "results")
    assert [path.name for path in paths] == [f"first-light-nvidia-h100-80gb-hbm3-2026-12-01.{end}" for end in ("json", "md")]
    kept = report.read(paths[0])
    assert kept["verdicts"] == verdicts.of(record())
    assert paths[1].read_text() == report.markdown(record()) == report.markdown(kept)
    with pytest.raises(FileExistsError, match=r"first-light-nvidia.*\.json is there"):
        report.write(record(), tmp_path / "results")
    paths[0].unlink()
    with pytest.raises(FileExistsError, match=r"\.md is there"):
        report.write(record(), tmp_path / "results")
    assert not paths[0].exists()
    rehearsed = report.write(record("rehearse", device="cpu") | {"date": "2026-12-02"}, tmp_path)
    assert rehearsed[0].name == "first-light-rehearse-cpu-2026-12-02.json"


def test_numbers_are_written_in_one_way():
    assert [findings.figure(x) for x in (None, "nan", math.inf, 0.012345, 12.345, 1234.5, True)] == [
        "", "nan", "inf", "0.0123", "12.3", "1,234", ""
    ]  # fmt: skip
    assert [findings.tokens(n) for n in (64, 1000, 16_384, None)] == ["64", "1000", "16K", "?"]


def test_reading_takes_no_jax():
    code = "import sys; from benchmarks.first_light import report; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_files_that_verdicts_name_are_there():
    root = Path(verdicts.__file__).parents[2]
    named = [verdicts.TABLE, *verdicts.TESTS.values()]
    for name in [
        *named,
        verdicts.HOPPER_FILES,
        "gqa_jax/attention/triton/decode.py",
        "gqa_jax/planning/planner.py",
    ]:
        assert (root / name).exists(), name
