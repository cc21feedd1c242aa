"""The workers of first light by name, and what their passes need. Imports no jax."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

from benchmarks.first_light.sizes import Sizes
from benchmarks.first_light.supervisor import Kind

KERNELS = ("pallas_gpu", "pallas_triton")  # ours
PEERS = ("cudnn", "tokamax")
BACKENDS = ("flash", "cudnn")  # of PyTorch
#: What a pass is made of. The last is blamed where the pass hangs or kills its worker; nothing that needs it runs again.
PARTS = {"forward": ("forward",), "backward": ("forward", "backward"), "decode": ("decode",)}
RESUMED = ("cudnn", "pallas_triton")  # attention of the runs that are resumed
SETTINGS = ("default", "deterministic")
INTERPRETER_THREADS = 16
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def kinds(mode: str, sizes: Sizes, target: str, torch_python: str | None) -> dict[str, Kind]:
    """The workers by name. `target` is the device to compile for ("h100"), `torch_python` a Python that has PyTorch."""
    options: tuple[str, ...] = {
        "device": (), "rehearse": ("--interpreted",), "compile_only": ("--compile_only", target)
    }[mode]  # fmt: skip
    slice_options = ("--compile_only", f"{target}:1") if mode == "compile_only" else options
    here = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}
    here["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    if mode != "device":
        here |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if mode == "compile_only":  # programs for a device that is not here can be kept, but not read back
        here["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    flags = os.environ.get("XLA_FLAGS", "")

    def python(module: str, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, "-m", f"benchmarks.{module}", *arguments)

    if mode == "rehearse":
        # A warpgroup of an interpreted kernel waits for others on a thread of XLA's pool: with one thread per core of a small
        # machine some were never begun, and one kernel in thirteen waited for ever.
        here["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={INTERPRETER_THREADS}".strip()
    attention = python("first_light.jax_worker", *options)
    resume = python("first_light.resume_worker", *(("--interpreted",) if mode == "rehearse" else ()))
    ours = python("train_ours", *slice_options)
    uncached = here | {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # so that each process tunes its own products
    found = {name: Kind(attention, here) for name in ("jax", "xla", *KERNELS, *PEERS)}
    for name, setting in itertools.product(RESUMED, SETTINGS):
        more = {"XLA_FLAGS": f"{flags} {DETERMINISTIC}".strip()} if setting == "deterministic" and mode == "device" else {}
        for process in ("first", "second"):
            found[f"resume {name} {setting} {process}"] = Kind(resume, uncached | more)
    found["ours"] = Kind(ours, here)
    for k in sizes.processes:
        share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / k:.3f}"}
        found |= {f"cell {i + 1} of {k}": Kind(ours, here | share) for i in range(k)}
    if torch_python is not None and mode != "compile_only":
        platform = "gpu" if mode == "device" else "cpu"
        found["torch attention"] = Kind((torch_python, "-m", "benchmarks.first_light.torch_worker", platform), here)
        torch = (torch_python, "-m", "benchmarks.train_torch", "--device", "cuda" if mode == "device" else "cpu")
        found |= {"torch eager": Kind(torch, here), "torch compiled": Kind(torch, here)}
    return found


def needs(kernel: str, direction: str, kind: str = "plain") -> list[str]:
    """Names by which `Lab` knows what is bad of a kernel: of all that a pass runs, and of its kind where it is not a plain one.

    The last is blamed where the pass hangs: a kernel that hangs with segments is still asked for plain attention.
    """
    parts = [f"{kernel} {part}" for part in PARTS[direction]]
    return parts if kind == "plain" else [*parts, f"{kernel} {kind}"]
