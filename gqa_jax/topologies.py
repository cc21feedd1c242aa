"""Devices that are not here, by name: programs are compiled for them ahead of time, and don't run.

TPU slices need the package libtpu, GPUs jax-cuda13-plugin and jax-cuda13-pjrt: `pip install 'gqa-jax[aot]'`. Compile under
`jax.set_mesh` of a mesh of these devices: kernels, and the choice of one, go by the mesh. `gqa_jax.slices` lists the names.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from gqa_jax import sharding, slices
from gqa_jax.devices import ALLOCATOR_FRACTION, CHIPS
from gqa_jax.mesh import MeshShape

TPUS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}  # generation: JAX's device kind


class Gpu(NamedTuple):
    """What XLA asks of a GPU model beside `devices.CHIPS`. Sources: NVIDIA's data sheets and the CUDA C++ programming guide."""

    kind: str  # as JAX names the device
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # bytes of a multiprocessor; a program may have 1 KiB less
    clock_ghz: float
    l2_bytes: int


GPUS = {
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 233472, 1.98, 50 * 2**20),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 233472, 1.98, 50 * 2**20),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 167936, 1.41, 40 * 2**20),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 102400, 2.04, 48 * 2**20),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 233472, 1.96, 126 * 2**20),
}


def devices(name: str) -> list[jax.Device]:
    """Every device of the slice `name` (`gqa_jax.slices`): "v5e:4x4" has 16, "h200:8" 8.

    Raises ValueError: an unknown name, naming the closest, or a compiler that is not installed, with what to install.
    """
    found = slices.find(name)
    found.require_compiler()
    return _tpu(found.name) if found.is_tpu else _gpu(found.chip.name, found.n_chips)


def mesh(name: str, shape: MeshShape | None = None) -> jax.sharding.Mesh:
    """A mesh of `shape` of all devices of the slice `name`, as a run there has it (`sharding.make_mesh`).

    Without a shape: one device of a TPU generation ("v5e"), a GPU ("h200") or a slice, with the single axis "data".

    Raises:
      ValueError: an unknown name, a compiler that is not installed, with what to install, or a shape of another size.
    """
    if shape is None:
        if name not in (*TPUS, *GPUS) and ":" not in name:
            raise ValueError(f"unknown device {name!r}: TPUs are {', '.join(TPUS)}, GPUs {', '.join(GPUS)}")
        whole = (
            name if ":" in name else f"{name}:1" if name in GPUS else f"{name}:{'2x2x1' if name in ('v4', 'v5p') else '2x2'}"
        )
        return jax.sharding.Mesh(np.array(devices(whole)[:1]), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    found = devices(name)
    if shape.n_devices != len(found):
        raise ValueError(f"mesh {str(shape)!r} is of {shape.n_devices} devices, and {name} has {len(found)}")
    return sharding.make_mesh(shape, found)


def _tpu(name: str) -> list[jax.Device]:
    # libtpu asks Google's metadata server where it runs, and locks the machine's TPUs, unless told not to
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):  # fmt: skip
        os.environ.setdefault(variable, value)
    # the two cores of a v4 chip work as one device, as they do on Google Cloud; of a v5p they do without being told
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    return topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices


def _gpu(name: str, count: int) -> list[jax.Device]:
    gpu, chip = GPUS[name], CHIPS[name]
    (major, minor), memory = gpu.capability, gpu.shared_memory
    target = f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 fpus_per_core: 128
      shared_memory_per_block: 49152 shared_memory_per_core: {memory} shared_memory_per_block_optin: {memory - 1024}
      core_count: {gpu.multiprocessors} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {chip.memory_bandwidth:.0f} l2_cache_size: {gpu.l2_bytes} clock_rate_ghz: {gpu.clock_ghz}
      device_memory_size: {chip.memory_bytes / ALLOCATOR_FRACTION:.0f}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      cuda_compute_capability {{ major: {major} minor: {minor} }}
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 7 }} runtime_version {{ major: 13 minor: 0 patch: 0 }}
    device_description_str: "{gpu.kind}"
    """
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{count}").devices
