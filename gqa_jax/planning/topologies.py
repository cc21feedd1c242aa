"""Devices that are not here, by name: programs are compiled for them ahead of time, and don't run.

TPU slices need the package libtpu, GPUs jax-cuda13-plugin and jax-cuda13-pjrt: `pip install 'gqa-jax[aot]'`. Compile under
`jax.set_mesh` of a mesh of these devices: kernels, and the choice of one, go by the mesh. `gqa_jax.hardware` lists the names.
"""

from __future__ import annotations

import os

import jax
import numpy as np
from jax.experimental import topologies

from gqa_jax import hardware
from gqa_jax.hardware import ALLOCATOR_FRACTION, CHIPS, Chip, Slice
from gqa_jax.mesh import MeshShape
from gqa_jax.training import sharding


def devices(name: str) -> list[jax.Device]:
    """Every device of the slice `name` (`gqa_jax.hardware`): "v5e:4x4" has 16, "h200:8" 8.

    Raises ValueError: an unknown name, naming the closest, or a compiler that is not installed, with what to install.
    """
    found = hardware.find(name)
    found.require_compiler()
    return _tpu(found) if found.is_tpu else _gpu(found.chip, found.n_chips)


def mesh(name: str, shape: MeshShape | None = None) -> jax.sharding.Mesh:
    """A mesh of `shape` of all devices of the slice `name`, as a run there has it (`sharding.make_mesh`).

    Without a shape: one device of a TPU generation ("v5e"), a GPU ("h200") or a slice, with the single axis "data".

    Raises:
      ValueError: an unknown name, a compiler that is not installed, with what to install, or a shape of another size.
    """
    if shape is None:
        whole = name if ":" in name else _host(name)
        return jax.sharding.Mesh(np.array(devices(whole)[:1]), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    found = devices(name)
    if shape.n_devices != len(found):
        raise ValueError(f"mesh {str(shape)!r} is of {shape.n_devices} devices, and {name} has {len(found)}")
    return sharding.make_mesh(shape, found)


def _host(name: str) -> str:
    """The slice of one whole TPU host, or of one GPU."""
    if name not in CHIPS:
        tpus, gpus = ([chip.name for chip in CHIPS.values() if (chip.tpu is not None) == is_tpu] for is_tpu in (True, False))
        raise ValueError(f"unknown device {name!r}: TPUs are {', '.join(tpus)}, GPUs {', '.join(gpus)}")
    count = 1 if CHIPS[name].tpu is None else hardware.CHIPS_PER_HOST
    return next(one.name for one in hardware.SLICES.values() if one.chip.name == name and one.n_chips == count)


def _tpu(where: Slice) -> list[jax.Device]:
    # libtpu asks Google's metadata server where it runs, and locks the machine's TPUs, unless told not to
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):  # fmt: skip
        os.environ.setdefault(variable, value)
    config = where.chip.tpu.libtpu_config
    options = {} if config is None else {"chip_config_name": config}
    return topologies.get_topology_desc(topology_name=where.name, platform="tpu", **options).devices


def _gpu(chip: Chip, count: int) -> list[jax.Device]:
    gpu = chip.gpu
    (major, minor), memory = gpu.compute_capability, 1024 * gpu.shared_kib
    target = f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 fpus_per_core: 128
      shared_memory_per_block: 49152 shared_memory_per_core: {memory} shared_memory_per_block_optin: {memory - 1024}
      core_count: {gpu.multiprocessors} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {chip.memory_bandwidth:.0f} l2_cache_size: {gpu.l2_mib * 2**20} clock_rate_ghz: {gpu.clock_ghz}
      device_memory_size: {chip.memory_bytes / ALLOCATOR_FRACTION:.0f}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      cuda_compute_capability {{ major: {major} minor: {minor} }}
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 7 }} runtime_version {{ major: 13 minor: 0 patch: 0 }}
    device_description_str: "{gpu.device_kind}"
    """
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{count}").devices
