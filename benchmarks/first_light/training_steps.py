"""Steps about training: beside PyTorch, in other settings, several at a time, and resumed. Imports no jax."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.first_light.fleet import KERNELS, PEERS, RESUMED, SETTINGS, needs
from benchmarks.first_light.sizes import Sizes
from benchmarks.first_light.supervisor import Lab, median


def training_first_look(lab: Lab) -> None:
    """One training step of ours and of PyTorch's Llama, same shapes, tokens and precision: eager first, then compiled."""
    sizes = lab.sizes
    what = {**sizes.training[sizes.main], "accumulation_steps": 1, "remat": "attention_only"}
    lab.close(*KERNELS, *PEERS, "xla", "torch attention")  # their memory
    weights = str((lab.out / "weights.npz").resolve())
    request = {"do": "prepare", "case": sizes.main, **what, "attention": _main_attention(lab), "weights": weights}
    torch = request | {"autocast": "bfloat16", "sdpa": "flash" if lab.mode == "device" else None}
    limits = {"compile": 90.0, "run": 60.0}
    with_torch = lab.has("torch eager")
    ours = lab.ask("ours", request, limits=limits)
    lab.keep(ours, case=sizes.main, implementation="gqa_jax", phase="prepare", remat="attention_only")
    if ours.ok:
        losses = lab.ask("ours", {"do": "losses", "case": sizes.main, "steps": sizes.agreement}, limits=limits)
        lab.keep(losses, case=f"{sizes.main}: losses", implementation="gqa_jax")
    for name in ("torch eager", "torch compiled") if with_torch else ():
        found = lab.ask(name, {**torch, "compile": name == "torch compiled"}, limits=limits)
        lab.keep(found, case=sizes.main, implementation=name, phase="prepare")
        if not found.ok:
            lab.close(name)
            continue
        agreed = lab.ask(name, {"do": "losses", "case": sizes.main, "steps": sizes.agreement}, limits=limits)
        lab.keep(agreed, case=f"{sizes.main}: losses", implementation=name)
        _train_turns(lab, sizes.main, {"gqa_jax": ("ours", sizes.main), name: (name, sizes.main)}, sizes)
        lab.close(name)
    if not with_torch:
        lab.row(
            case=sizes.main, implementation="torch eager", status="left out", reason="no Python with PyTorch: --torch_python"
        )
        _train_turns(lab, sizes.main, {"gqa_jax": ("ours", sizes.main)}, sizes)
    lab.ask("ours", {"do": "forget", "case": sizes.main})
    Path(weights).unlink(missing_ok=True)


def training_rest(lab: Lab) -> None:
    """Rematerialisation x attention at the same shape, the other sizes, and a profile of the best."""
    sizes = lab.sizes
    best: tuple[float, tuple[str, str, str]] | None = None
    for size, remat, attention in sizes.variants:
        name = f"{size} {remat} {attention}"
        which = _main_attention(lab) if attention == "cudnn" else attention
        wanted = needs(attention, "backward")
        request = {
            "do": "prepare",
            "case": name,
            **sizes.training[size],
            "accumulation_steps": 1,
            "remat": remat,
            "attention": which,
        }
        found = lab.ask("ours", request, needs=wanted, limits={"compile": 60.0, "run": 30.0})
        lab.keep(found, case=name, implementation="gqa_jax", phase="prepare", size=size, remat=remat, attention_asked=attention)
        if not found.ok:
            continue
        seconds = _train_turns(lab, name, {"gqa_jax": ("ours", name)}, sizes, needs=wanted)
        if size == sizes.main and seconds and (best is None or seconds < best[0]):
            best = seconds, (size, remat, which)
        lab.ask("ours", {"do": "forget", "case": name})
    if best is not None and lab.mode != "compile_only":
        size, remat, attention = best[1]
        request = {
            "do": "prepare",
            "case": "best",
            **sizes.training[size],
            "accumulation_steps": 1,
            "remat": remat,
            "attention": attention,
        }
        if lab.ask("ours", request, limits={"compile": 60.0, "run": 30.0}).ok:
            found = lab.ask(
                "ours", {"do": "profile", "case": "best", "folder": str((lab.out / "profile").resolve())}, limits={"run": 60.0}
            )
            lab.keep(found, case=f"profile of {size} {remat} {attention}", implementation="gqa_jax")
            lab.ask("ours", {"do": "forget", "case": "best"})


def small_cells(lab: Lab) -> None:
    """Several processes of the smallest cell on one device: tokens a second in all."""
    sizes = lab.sizes
    lab.close()
    what = {**sizes.training[sizes.small], "accumulation_steps": 1, "remat": "none", "attention": _main_attention(lab)}
    for k in sizes.processes[:1] if lab.mode == "compile_only" else sizes.processes:
        cells = [f"cell {i + 1} of {k}" for i in range(k)]
        found = lab.side_by_side({cell: (cell, {"do": "prepare", "case": sizes.small, **what}, []) for cell in cells})
        bad = next((one for one in found.values() if not one.ok), None)
        if bad is not None or lab.mode == "compile_only":
            lab.keep(bad or next(iter(found.values())), case=f"{k} processes", processes=k)
            continue
        request = {"do": "measure", "case": sizes.small, "steps": 10 * sizes.steps}
        measured = lab.side_by_side({cell: (cell, request, []) for cell in cells})
        tokens = what["micro_batch"] * what["context_length"]
        if all(one.ok for one in measured.values()):
            rate = sum(tokens / median(one.result["seconds"]) for one in measured.values())
            lab.row(case=f"{k} processes", processes=k, status="ok", tokens_per_second=rate)
        else:
            reason = next(one.reason for one in measured.values() if not one.ok)
            lab.row(case=f"{k} processes", processes=k, status="failed", reason=reason)
        lab.close(*cells)


def _main_attention(lab: Lab) -> str:
    """cuDNN, the default on GPUs; where a rehearsal has none, `xla`."""
    return "xla" if lab.mode == "rehearse" else "cudnn"


def _train_turns(
    lab: Lab, case: str, who: Mapping[str, tuple[str, str]], sizes: Sizes, *, needs: Sequence[str] = ()
) -> float | None:  # fmt: skip
    """Steps in turns; a row for each with seconds a step and tokens a second. The seconds of the first."""
    asked = {
        name: (worker, {"do": "measure", "case": prepared, "steps": sizes.steps}, list(needs))
        for name, (worker, prepared) in who.items()
    }
    found = lab.turns(asked, turns=3)
    size = case.split(" ")[0]
    what = sizes.training[size]
    tokens = what["micro_batch"] * what["context_length"]
    first = next(iter(found.values()), [])
    for name, seconds in found.items():
        if seconds:
            ratio = {} if name == "gqa_jax" else {"gqa_jax_is": median([s / o for s, o in zip(seconds, first, strict=False)])}
            lab.row(case=case, implementation=name, status="ok", phase="measure", seconds_step=median(seconds), turns=seconds,
                    tokens_per_second=tokens / median(seconds), tokens=tokens, **ratio)  # fmt: skip
    return median(first) if first else None


def resume(lab: Lab) -> None:
    """Is a step the same each time, and a run that another process resumes? With and without deterministic operations."""
    sizes = lab.sizes
    what = sizes.training[sizes.small]
    lab.close()
    settings = [(name, setting) for name in RESUMED for setting in (SETTINGS if lab.mode == "device" else SETTINGS[:1])]
    processes = ("first", "second") if lab.mode != "compile_only" else ("first",)

    def request(name: str) -> dict[str, Any]:
        which = _main_attention(lab) if name == "cudnn" else name
        shape = {"model": what["model"], "context_length": what["context_length"], "batch": what["micro_batch"]}
        return {"do": "prepare", "attention_name": which, **shape}

    requests = {}
    for (name, setting), process in itertools.product(settings, processes):
        worker = f"resume {name} {setting} {process}"
        requests[name, setting, process] = worker, request(name), needs(name, "backward")
    ready = lab.side_by_side(requests)
    step: dict[tuple[str, str], float] = {}
    for name, setting in settings:
        case = f"{sizes.small} {name} {setting}"
        answers = [ready[name, setting, process] for process in processes]
        if (bad := next((answer for answer in answers if not answer.ok), None)) is not None:
            lab.keep(bad, case=case, attention=name, setting=setting)
            continue
        if lab.mode == "compile_only":
            lab.keep(answers[0], case=case, attention=name, setting=setting)
            continue
        first, second = (f"resume {name} {setting} {process}" for process in processes)
        repeated = lab.ask(first, {"do": "repeat", "times": sizes.repeats})
        half, whole = sizes.agreement // 2, sizes.agreement
        folders = {part: str((lab.out / "resume" / f"{name}-{setting}-{part}").resolve()) for part in ("whole", "half")}
        trained = {}
        for key, worker, folder, begin, end in (
            ("whole", first, "whole", 0, whole), ("half", first, "half", 0, half),
            ("same process", first, "half", half, whole), ("second process", second, "half", half, whole),
        ):  # fmt: skip
            trained[key] = lab.ask(worker, {"do": "train", "folder": folders[folder], "first": begin, "last": end})
        failed = next((one for one in (repeated, *trained.values()) if not one.ok), None)
        if failed is not None:
            lab.keep(failed, case=case, attention=name, setting=setting)
            continue
        step[name, setting] = median(repeated.result["seconds"])
        sums = {key: one.result["sha256"] for key, one in trained.items()}
        lab.row(
            case=case, attention=name, setting=setting, status="ok", distinct=repeated.result["distinct"], times=sizes.repeats,
            same_process=sums["same process"] == sums["whole"], second_process=sums["second process"] == sums["whole"],
            seconds_step=step[name, setting], price=step[name, setting] / step.get((name, "default"), step[name, setting]),
            loss_difference=abs(trained["second process"].result["loss"] - trained["whole"].result["loss"]),
        )  # fmt: skip
    lab.close()
    shutil.rmtree(lab.out / "resume", ignore_errors=True)
