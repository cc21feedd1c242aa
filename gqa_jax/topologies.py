"""Devices that are not here, by name: programs are compiled for them ahead of time, and don't run.

TPU slices need the package libtpu, GPUs jax-cuda13-plugin and jax-cuda13-pjrt: `pip install 'gqa-jax[aot]'`. Compile under
`jax.set_mesh` of a mesh of these devices: kernels, and the choice of one, go by the mesh.
"""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

TPUS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}  # generation: JAX's device kind


class Gpu(NamedTuple):
    """What XLA asks of a GPU model. Sources: NVIDIA's data sheets and the CUDA C++ programming guide, table of limits."""

    kind: str  # as JAX names the device
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # bytes of a multiprocessor; a program may have 1 KiB less
    memory_bytes: float
    bandwidth: float  # bytes a second
    clock_ghz: float
    l2_bytes: int


GPUS = {
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 233472, 141e9, 4.8e12, 1.98, 50 * 2**20),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 233472, 80e9, 3.35e12, 1.98, 50 * 2**20),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 167936, 80e9, 2.04e12, 1.41, 40 * 2**20),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 102400, 24e9, 0.3e12, 2.04, 48 * 2**20),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 233472, 180e9, 8e12, 1.96, 126 * 2**20),
}


def mesh(name: str) -> jax.sharding.Mesh:
    """A mesh ("data",) of one device of `name`: a TPU generation ("v5e"), a slice ("v5e:2x2") or a GPU ("h200").

    Raises:
      ValueError: an unknown name, or a compiler that is not installed, with what to install.
    """
    generation = name.partition(":")[0]
    if name in GPUS:
        found = _gpu(GPUS[name])
    elif generation in TPUS:
        found = _tpu(name if ":" in name else f"{name}:2x2x1" if generation in ("v4", "v5p") else f"{name}:2x2")
    else:
        raise ValueError(f"unknown device {name!r}: TPUs are {', '.join(TPUS)}, GPUs {', '.join(GPUS)}")
    return jax.sharding.Mesh(np.array(found[:1]), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def _tpu(name: str):
    _require("libtpu", name)
    # libtpu asks Google's metadata server where it runs, and locks the machine's TPUs, unless told not to
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):  # fmt: skip
        os.environ.setdefault(variable, value)
    return topologies.get_topology_desc(topology_name=name, platform="tpu").devices


def _gpu(gpu: Gpu):
    _require("jax_cuda13_plugin", gpu.kind)
    (major, minor), memory = gpu.capability, gpu.shared_memory
    target = f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 fpus_per_core: 128
      shared_memory_per_block: 49152 shared_memory_per_core: {memory} shared_memory_per_block_optin: {memory - 1024}
      core_count: {gpu.multiprocessors} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {gpu.bandwidth:.0f} l2_cache_size: {gpu.l2_bytes} clock_rate_ghz: {gpu.clock_ghz}
      device_memory_size: {gpu.memory_bytes:.0f} registers_per_core_limit: 65536 registers_per_block_limit: 65536
      cuda_compute_capability {{ major: {major} minor: {minor} }}
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 7 }} runtime_version {{ major: 13 minor: 0 patch: 0 }}
    device_description_str: "{gpu.kind}"
    """
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1").devices


def _require(module: str, name: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"compiling for {name} takes the package {module.replace('_', '-')}: pip install 'gqa-jax[aot]'")
