"""Steps about training: beside PyTorch, in other settings, several at a time, and resumed. Imports no jax."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.first_light.fleet import KERNELS, PEERS, RESUMED, SETTINGS, needs
from benchmarks.first_light.supervisor import Lab, median
from benchmarks.workers import Outcome

OURS = "gqa_jax"
#: Seconds of silence of a large model: PyTorch compiles in its first step, and weights of 1.7 GB are written and read.
LIMITS = {"compile": 100.0, "run": 60.0, "check": 40.0}


def training_first_look(lab: Lab) -> None:
    """One training step of ours and of PyTorch's Llama, same weights, tokens and precision."""
    sizes, case = lab.sizes, lab.sizes.main
    lab.start(*(name for name in ("ours", "torch compiled", "torch eager") if lab.has(name)))
    lab.close("jax", *KERNELS, *PEERS, "xla", "torch attention")  # their memory
    request = {"do": "prepare", "case": case, **sizes.training[case], "accumulation_steps": 1}
    request |= {"remat": "attention_only", "attention": _main_attention(lab)}
    found = lab.ask("ours", request, limits=LIMITS)
    lab.keep(found, case=case, implementation=OURS, phase="prepare", size=case)
    if lab.mode == "compile_only":
        return
    weights = lab.scratch / "weights.npz"
    if found.ok:
        found = lab.ask("ours", {"do": "weights", "case": case, "path": str(weights)}, limits=LIMITS)
    reason = found.reason if not found.ok else "" if lab.has("torch eager") else "no Python with PyTorch: --torch_python"
    losses = ("ours", {"do": "losses", "case": case, "steps": sizes.agreement}, [])
    if reason:
        lab.keep(lab.ask(*losses[:2], limits=LIMITS), case=f"{case}: losses", implementation=OURS)
        for name in ("torch compiled", "torch eager"):
            lab.row(case=case, implementation=name, status="left out", reason=reason)
        _train_turns(lab, case, {OURS: ("ours", case)})
    else:
        theirs = {"do": "prepare", "case": case, "weights": str(weights), "autocast": "bfloat16"}
        theirs |= {"sdpa": "flash" if lab.mode == "device" else None}
        compiled = ("torch compiled", theirs | {"compile": True}, [])
        # most of its compiling is on the host
        answers = lab.side_by_side({"losses": losses, "compiled": compiled}, limits=LIMITS)
        lab.keep(answers["losses"], case=f"{case}: losses", implementation=OURS)
        _beside(lab, case, "torch compiled", answers["compiled"])
        _beside(lab, case, "torch eager", lab.ask("torch eager", theirs | {"compile": False}, limits=LIMITS))
    if found.ok:
        traced = lab.ask("ours", {"do": "profile", "case": case, "folder": str(lab.out.resolve())}, limits=LIMITS)
        lab.keep(traced, case=f"profile of {case} {request['remat']} {request['attention']}", implementation=OURS)
    lab.ask("ours", {"do": "forget", "case": case})
    weights.unlink(missing_ok=True)


def _beside(lab: Lab, case: str, name: str, prepared: Outcome) -> None:
    """A worker of PyTorch that has prepared the case in turns with ours; it is ended afterwards, for its memory."""
    lab.keep(prepared, case=case, implementation=name, phase="prepare", size=case)
    if prepared.ok:
        losses = lab.ask(name, {"do": "losses", "case": case, "steps": lab.sizes.agreement}, limits=LIMITS)
        lab.keep(losses, case=f"{case}: losses", implementation=name)
        _train_turns(lab, case, {OURS: ("ours", case), name: (name, case)})
    lab.close(name)


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
        found = lab.ask("ours", request, needs=wanted, limits=LIMITS)
        lab.keep(found, case=name, implementation=OURS, phase="prepare", size=size, remat=remat, attention_asked=attention)
        if not found.ok:
            continue
        seconds = _train_turns(lab, name, {OURS: ("ours", name)}, size=size, needs=wanted)
        if size == sizes.main and seconds and (best is None or seconds < best[0]):
            best = seconds, (size, remat, which)
        lab.ask("ours", {"do": "forget", "case": name})
    if best is not None and lab.mode != "compile_only":  # the first look has a profile of what it measured
        size, remat, attention = best[1]
        request = {
            "do": "prepare",
            "case": "best",
            **sizes.training[size],
            "accumulation_steps": 1,
            "remat": remat,
            "attention": attention,
        }
        if lab.ask("ours", request, limits=LIMITS).ok:
            found = lab.ask("ours", {"do": "profile", "case": "best", "folder": str(lab.out.resolve())}, limits=LIMITS)
            lab.keep(found, case=f"profile of {size} {remat} {attention}", implementation=OURS)
            lab.ask("ours", {"do": "forget", "case": "best"})


def small_cells(lab: Lab) -> None:
    """Several processes of the smallest cell on one device: tokens a second in all."""
    sizes = lab.sizes
    lab.close()
    what = {**sizes.training[sizes.small], "accumulation_steps": 1, "remat": "none", "attention": _main_attention(lab)}
    lab.start(*(f"cell {i + 1} of {k}" for k in sizes.processes for i in range(k) if lab.mode == "device"))
    for k in sizes.processes[:1] if lab.mode == "compile_only" else sizes.processes:
        cells = [f"cell {i + 1} of {k}" for i in range(k)]
        found = lab.side_by_side({cell: (cell, {"do": "prepare", "case": sizes.small, **what}, []) for cell in cells})
        bad = next((one for one in found.values() if not one.ok), None)
        if bad is not None or lab.mode == "compile_only":
            lab.keep(bad or next(iter(found.values())), case=f"{k} processes", processes=k)
            continue
        request = {"do": "measure", "case": sizes.small, "steps": 10 * sizes.steps}
        measured = lab.side_by_side({cell: (cell, request, []) for cell in cells})
        tokens = _tokens(what)
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
    lab: Lab, case: str, who: Mapping[str, tuple[str, str]], *, size: str | None = None, needs: Sequence[str] = ()
) -> float | None:
    """Steps in turns: a row for each with seconds of a step and tokens a second. Returns the seconds of the first.

    `who`: name -> (worker, case there). `size` is the training's name, where the case has another one.
    """
    steps = {"do": "measure", "steps": lab.sizes.steps, "blocked": False}
    asked = {name: (worker, steps | {"case": there}, list(needs)) for name, (worker, there) in who.items()}
    found = lab.turns(asked, turns=3)
    tokens = _tokens(lab.sizes.training[size or case])
    first = next(iter(found.values()), [])
    for name, seconds in found.items():
        if seconds:
            row = {
                "seconds_step": median(seconds),
                "turns": seconds,
                "tokens": tokens,
                "tokens_per_second": tokens / median(seconds),
            }
            if name != OURS:
                row["gqa_jax_is"] = median([theirs / ours for theirs, ours in zip(seconds, first, strict=False)])
            lab.row(case=case, implementation=name, status="ok", reason="", phase="measure", size=size or case, **row)
    return median(first) if first else None


def _tokens(training: Mapping[str, Any]) -> int:
    """Of a step."""
    return training["micro_batch"] * training["context_length"]


def resume(lab: Lab) -> None:
    """Is a step the same each time, and a run that another process resumes? With and without deterministic operations."""
    sizes, processes = lab.sizes, ("first", "second")
    what = {**sizes.training[sizes.small], "accumulation_steps": 1, "remat": "attention_only"}
    lab.close()
    settings = [(name, setting) for setting in (SETTINGS if lab.mode == "device" else SETTINGS[:1]) for name in RESUMED]

    def request(name: str) -> dict[str, Any]:
        return {"do": "prepare", "case": sizes.small, **what, "attention": _main_attention(lab) if name == "cudnn" else name}

    if lab.mode == "compile_only":
        for name in RESUMED:
            lab.keep(lab.ask("ours", request(name)), case=f"{sizes.small} {name}", attention_asked=name)
        return

    ready: dict[tuple[str, str, str], Outcome] = {}
    for name, setting in settings:
        case = f"{sizes.small} {name} {setting}"
        if (name, setting, "first") not in ready:  # those of a setting side by side
            requests = {
                (other, setting, process): (f"resume {other} {setting} {process}", request(other), needs(other, "backward"))
                for other, process in itertools.product(RESUMED, processes)
            }
            ready |= lab.side_by_side(requests)
        answers = [ready[name, setting, process] for process in processes]
        if (bad := next((answer for answer in answers if not answer.ok), None)) is not None:
            lab.keep(bad, case=case, attention=name, setting=setting)
            continue
        first, second = (f"resume {name} {setting} {process}" for process in processes)
        repeated = lab.ask(first, {"do": "repeat", "case": sizes.small, "times": sizes.repeats})
        half, whole = sizes.agreement // 2, sizes.agreement
        folders = {part: str(lab.scratch / "resume" / f"{name}-{setting}-{part}") for part in ("whole", "half")}
        trained = {}
        for key, worker, folder, begin, end in (
            ("whole", first, "whole", 0, whole), ("half", first, "half", 0, half),
            ("same process", first, "half", half, whole), ("second process", second, "half", half, whole),
        ):  # fmt: skip
            trained[key] = lab.ask(
                worker, {"do": "train", "case": sizes.small, "folder": folders[folder], "first": begin, "last": end}
            )
        failed = next((one for one in (repeated, *trained.values()) if not one.ok), None)
        if failed is not None:
            lab.keep(failed, case=case, attention=name, setting=setting)
            continue
        sums = {key: one.result["sha256"] for key, one in trained.items()}
        lab.row(
            case=case,
            attention=name,
            setting=setting,
            status="ok",
            distinct=repeated.result["distinct"],
            times=sizes.repeats,
            same_process=sums["same process"] == sums["whole"],
            second_process=sums["second process"] == sums["whole"],
            seconds_step=median(repeated.result["seconds"]),
            loss_difference=abs(trained["second process"].result["loss"] - trained["whole"].result["loss"]),
        )
    lab.close()
    shutil.rmtree(lab.scratch / "resume", ignore_errors=True)
