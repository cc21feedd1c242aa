"""Steps about attention and decoding: right, the same each time, and how fast beside others. Imports no jax."""

from __future__ import annotations

import concurrent.futures
import itertools
from collections.abc import Sequence
from typing import Any

from benchmarks.first_light.fleet import BACKENDS, KERNELS, PEERS, needs
from benchmarks.first_light.sizes import Sizes
from benchmarks.first_light.supervisor import Lab, median

CHUNK = 4  # cases of correctness that are compiled side by side


def smoke(lab: Lab) -> None:
    """Each part of our kernels by itself on one tile, against float64; the kernels side by side."""
    parts = {"pallas_gpu": ("forward", "dq", "dkv"), "pallas_triton": ("forward", "dq", "dkv", "decode")}
    shape = {"batch": 1, "length": 64, "n_heads": 1, "n_kv_heads": 1, "head_dim": 64}

    def one(kernel: str) -> None:
        for part in parts[kernel]:
            request = {"do": "smoke", "implementation": kernel, "part": part, "shape": shape}
            wanted = [f"{kernel} {part}"]
            if part in ("dq", "dkv"):  # their program runs the forward kernel first
                wanted.insert(0, f"{kernel} forward")
            found = lab.ask(kernel, request, needs=wanted)
            lab.keep(found, case=f"{kernel} {part}", implementation=kernel, part=part, **shape)
            if found.result.get("status") == "wrong":
                lab.mark_bad(f"{kernel} {part}", f"wrong in the smoke test: {found.result['reason']}")
        for part in ("dq", "dkv"):
            if reason := lab.bad([f"{kernel} {part}"]):
                lab.mark_bad(f"{kernel} backward", reason)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(one, KERNELS))


def attention_first_look(lab: Lab) -> None:
    """Everybody's attention at the context of most interest, forward and backward, in turns."""
    for length, direction in itertools.product(lab.sizes.look, ("forward", "backward")):
        _compare(lab, direction, length, (8, 1) if lab.mode != "rehearse" else (2, 1), 64)


def attention_rest(lab: Lab) -> None:
    """Other lengths, heads and head sizes; in a scan of checkpoints; documents."""
    sizes = lab.sizes
    small = (2, 1) if lab.mode == "rehearse" else (8, 1)
    for length, heads, head_dim in sizes.rest[:2]:
        for direction in ("forward", "backward"):
            _compare(lab, direction, length, heads, head_dim)
    for documents in sizes.documents[1]:
        _compare(lab, "backward", sizes.documents[0], small, 64, documents=documents, others=())
    _compare(lab, "backward", sizes.scan, small, 64, form="scan", others=("cudnn",))
    for length, heads, head_dim in sizes.rest[2:]:
        for direction in ("forward", "backward"):
            _compare(lab, direction, length, heads, head_dim)


def _compare(
    lab: Lab, direction: str, length: int, heads: tuple[int, int], head_dim: int, *, form: str = "plain",
    documents: int | None = None, others: Sequence[str] = PEERS,
) -> None:  # fmt: skip
    """Prepares a pass with all contenders side by side, then measures them in turns. One row for each."""
    shape = {"batch": max(1, 16_384 // length) if lab.mode != "rehearse" else 1, "length": length}
    shape |= {"n_heads": heads[0], "n_kv_heads": heads[1], "head_dim": head_dim}
    more = {"form": form, "documents": documents}
    name = f"{direction} {length} {heads[0]}/{heads[1]} d{head_dim} {form}" + (
        "" if documents is None else f" {documents} documents"
    )
    contenders = {kernel: (kernel, kernel, "implementation") for kernel in (*KERNELS, *others)}
    if lab.mode == "rehearse":
        contenders["xla"] = ("xla", "xla", "implementation")  # in the place of cuDNN, which needs a GPU
    if lab.has("torch attention") and form == "plain" and documents is None:
        backends = BACKENDS if lab.mode == "device" else ("sdpa",)
        contenders |= {f"torch {backend}": ("torch attention", backend, "backend") for backend in backends}
    kind = "plain" if documents is None else "segments, sorted"
    requests = {}
    for contender, (worker, value, field) in contenders.items():
        request = {
            "do": "prepare",
            "case": f"{name}: {contender}",
            field: value,
            "direction": direction,
            "shape": shape,
            **more,
        }
        requests[contender] = worker, request, needs(contender, direction, kind)
    prepared = lab.side_by_side(requests)
    asked = {
        contender: (requests[contender][0], {"do": "measure", "case": f"{name}: {contender}"}, requests[contender][2])
        for contender, found in prepared.items()
        if found.result.get("status") == "ok"
    }
    seconds = lab.turns(asked)
    baseline = seconds.get("cudnn") or seconds.get("xla") or []
    for contender, found in prepared.items():
        row = {"case": name, "direction": direction, "implementation": contender, **shape, **more}
        if times := seconds.get(contender):
            ratios = [b / s for b, s in zip(baseline, times, strict=False)]
            row |= {"seconds": median(times), "turns": times, "tflops": found.result["amount"] / median(times) / 1e12}
            row |= {"ratio_to_cudnn": median(ratios)} if ratios and "cudnn" in seconds and lab.mode == "device" else {}
        lab.keep(found, **row)
    lab.forget({contender: (worker, request["case"]) for contender, (worker, request, _) in requests.items()})


def correctness(lab: Lab) -> None:
    """Our kernels against float64 in all kinds of calls; what they write to was full of NaN before."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda kernel: _correct(lab, kernel), KERNELS))


def _correct(lab: Lab, kernel: str) -> None:
    # where the backward pass is bad, the forward one is still checked
    passes = "backward" if lab.bad([f"{kernel} backward"]) is None else "forward"
    for chunk in itertools.batched(_correct_cases(lab.sizes), CHUNK):
        known = {
            one["case"]: {"implementation": kernel, "passes": passes, "kind": one["kind"], **one["shape"]} for one in chunk
        }
        request = {"do": "compile_correct", "implementation": kernel, "cases": list(chunk), "passes": passes}
        compiled = lab.ask(kernel, request, needs=needs(kernel, passes))
        if not compiled.ok:
            for case, values in known.items():
                lab.keep(compiled, case=case, **values)
            continue
        for status, field in (("refused", "refused"), ("failed", "reasons")):
            for case, reason in compiled.result[field].items():
                lab.row(case=case, status=status, reason=reason, **known[case])
        for case in compiled.result["ready"]:
            found = compiled._replace(result={"status": "compiled"})
            if lab.mode != "compile_only":
                found = lab.ask(kernel, {"do": "correct", "case": case}, needs=needs(kernel, passes, known[case]["kind"]))
            lab.keep(found, case=case, **known[case])


def _correct_cases(sizes: Sizes) -> list[dict[str, Any]]:
    """Plain calls of every shape, those that differ the most first; then the other kinds at one length."""
    plain = [(*case, "plain") for case in itertools.product(sizes.correct_dims, sizes.correct_lengths, sizes.correct_heads)]
    special = [
        (d, sizes.correct_lengths[0], heads, kind)
        for kind in sizes.correct_kinds
        for d in sizes.correct_dims
        for heads in sizes.correct_heads[:2]
    ]
    few, rest = plain[::7], [case for i, case in enumerate(plain) if i % 7]
    cases = []
    for seed, (head_dim, length, (n_heads, n_kv_heads), kind) in enumerate([*few, *special, *rest]):
        shape = {
            "batch": 2 if length < 500 else 1,
            "length": length,
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "head_dim": head_dim,
        }
        if kind == "unseen" and length < 5:
            continue
        cases.append(
            {"case": f"{kind} {length} {n_heads}/{n_kv_heads} d{head_dim}", "shape": shape, "kind": kind, "seed": seed}
        )
    return cases


def races(lab: Lab) -> None:
    """The same pass again and again beside copies: all bits equal? (The first look compares 16K tokens with float32.)"""
    sizes = lab.sizes
    for length, heads in itertools.product(sizes.races, sizes.race_heads):
        shape = {"batch": 1, "length": length, "n_heads": heads[0], "n_kv_heads": heads[1], "head_dim": 64}
        request = {"do": "races", "shape": shape, "runs": sizes.runs, "copy_bytes": sizes.copy_bytes // 8}
        found = lab.side_by_side(
            {kernel: (kernel, request | {"implementation": kernel}, needs(kernel, "backward")) for kernel in KERNELS}
        )
        for kernel, outcome in found.items():
            lab.keep(outcome, case=f"races {length} {heads[0]}/{heads[1]}", implementation=kernel, **shape)


def decoding(lab: Lab) -> None:
    """One query against a cache: bytes a second beside a copy's."""
    sizes = lab.sizes
    lab.start("jax", "pallas_triton", "xla")
    made = lab.ask("jax", {"do": "ceiling", "case": "copy", "kind": "copy", "size": sizes.copy_bytes})
    for (batch, length), heads in itertools.product(sizes.decode, sizes.decode_heads):
        shape = {"batch": batch, "length": length, "n_heads": heads[0], "n_kv_heads": heads[1], "head_dim": 64}
        name = f"decode {batch} x {length} {heads[0]}/{heads[1]}"
        requests = {}
        for kernel in ("pallas_triton", "xla"):
            request = {"do": "prepare", "case": f"{name}: {kernel}", "implementation": kernel, "direction": "decode"}
            requests[kernel] = kernel, request | {"shape": shape}, needs(kernel, "decode")
        prepared = lab.side_by_side(requests)
        asked = {
            kernel: (kernel, {"do": "measure", "case": f"{name}: {kernel}"}, needs(kernel, "decode"))
            for kernel, found in prepared.items()
            if found.result.get("status") == "ok"
        }
        if made.ok:
            asked["copy"] = ("jax", {"do": "measure", "case": "copy"}, [])
        seconds = lab.turns(asked)
        copy = seconds.pop("copy", [])
        for kernel, found in prepared.items():
            row = {"case": name, "implementation": kernel, **shape}
            if times := seconds.get(kernel):
                rate = found.result["amount"] / median(times)
                row |= {"seconds": median(times), "gb_s": rate / 1e9}
                row |= {"share_of_copy": rate * median(copy), "copy_gb_s": 1 / median(copy) / 1e9} if copy else {}
            lab.keep(found, **row)
        lab.forget({kernel: (kernel, request["case"]) for kernel, (_, request, _) in requests.items()})
