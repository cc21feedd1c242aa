"""Where arrays live: one table from the name of a leaf to the axes of a mesh that cut it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gqa_jax import collectives
from gqa_jax.errors import ConfigError
from gqa_jax.mesh import AXES, PARAMETERS, SEQUENCES, MeshShape

# Each axis of a leaf of one layer, by what cuts it: "hidden" (fsdp and context), "tensor", "key_value" (tensor, where it
# divides the key/value heads; else every device has them all), "vocabulary" rows (nothing), None (nothing).
RULES: dict[str, tuple[str | None, ...]] = {
    "embedding": (None, "everything"),  # hidden size over fsdp, context and tensor
    "head": (None, "everything"),
    "attention_norm": (None,),
    "query": ("hidden", "tensor", None),
    "key": ("hidden", "key_value", None),
    "value": ("hidden", "key_value", None),
    "output": ("tensor", None, "hidden"),
    "ffn_norm": (None,),
    "gate": ("hidden", "tensor"),
    "up": ("hidden", "tensor"),
    "down": ("tensor", "hidden"),
    "final_norm": (None,),
}
SCALARS = ("step", "count")  # of the training state and of the optimizer's
STACKED = "layers"  # leaves below it have the layers as their first axis, which is never cut
BATCH = PartitionSpec(None, SEQUENCES, "context")  # (accumulation step, sequence, position)


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of four axes over `devices` (default: the first of those there), neighbours on the network side by side.

    On several TPU slices `data` is spread over them first. Raises ConfigError when there are too few devices, or when
    several processes would leave some of theirs out.
    """
    if devices is None:
        devices = jax.devices()
        if shape.n_devices > len(devices) or (shape.n_devices < len(devices) and jax.process_count() > 1):
            raise ConfigError(
                f"mesh {str(shape)!r} takes {shape.n_devices} devices, and there are {len(devices)} "
                f"({devices[0].device_kind}): use axes whose product is {len(devices)}"
            )
        devices = devices[: shape.n_devices]
    sizes = tuple(shape.sizes.values())
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    if slices > 1:
        if shape.data % slices:
            raise ConfigError(f"mesh {str(shape)!r} on {slices} slices: data must be a multiple of {slices}")
        across = (slices, 1, 1, 1)
        within = (shape.data // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    elif devices[0].platform == "tpu":
        # by the groups of `collectives`, so that each is a row of the torus and not a piece of a snake through it
        groups = [size for axis in sizes for size in collectives.factors(axis)]
        grid = mesh_utils.create_device_mesh(groups, devices, allow_split_physical_axes=True).reshape(sizes)
    else:
        grid = np.array(devices).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shape_of(mesh: Mesh) -> MeshShape:
    """The sizes of a mesh that `make_mesh` made."""
    return MeshShape(**{name: mesh.shape[name] for name in AXES})


def name_of(path: Sequence[Any]) -> str:
    """Name of a leaf: the last key of its path that RULES or SCALARS know. Raises ValueError on a leaf without a rule."""
    for key in reversed(path):
        name = getattr(key, "key", getattr(key, "name", None))
        if name in RULES or name in SCALARS:
            return name
    raise ValueError(
        f"no rule of gqa_jax.training.sharding says how {jax.tree_util.keystr(tuple(path))} lies on a mesh: add one"
    )


def cuts(name: str, mesh: MeshShape, n_kv_heads: int) -> tuple[tuple[str, ...], ...]:
    """For each axis of a leaf of one layer, the mesh axes (of size above 1) that cut it."""
    by_rule = {
        None: (),
        "hidden": PARAMETERS,
        "everything": (*PARAMETERS, "tensor"),
        "tensor": ("tensor",),
        "key_value": ("tensor",) if n_kv_heads % mesh.tensor == 0 else (),
    }
    return tuple(tuple(axis for axis in by_rule[rule] if mesh.sizes[axis] > 1) for rule in RULES[name])


def spec_of(path: Sequence[Any], mesh: MeshShape, n_kv_heads: int) -> PartitionSpec:
    """How the leaf at `path` of parameters, gradients, moments or a training state is cut."""
    name = name_of(path)
    if name in SCALARS:
        return PartitionSpec()
    axes = [axes or None for axes in cuts(name, mesh, n_kv_heads)]
    stacked = any(getattr(key, "key", None) == STACKED for key in path)
    return PartitionSpec(*([None] if stacked else []), *axes)


def specs(tree: Any, mesh: MeshShape, n_kv_heads: int) -> Any:
    """A PartitionSpec for every leaf of `tree`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: spec_of(path, mesh, n_kv_heads), tree)


def placed(tree: Any, mesh: Mesh, n_kv_heads: int) -> Any:
    """`tree` of arrays or ShapeDtypeStructs as ShapeDtypeStructs that say where each leaf lies."""
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
        tree,
        specs(tree, shape_of(mesh), n_kv_heads),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())
