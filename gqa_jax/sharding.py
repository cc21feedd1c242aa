"""Where arrays live. Today one device; every array is placed through these, so that a larger mesh is a configuration."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh() -> Mesh:
    """A mesh of the first device with the single axis `data`."""
    return jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])


def replicated(mesh: Mesh) -> NamedSharding:
    """Of parameters and moments."""
    return NamedSharding(mesh, PartitionSpec())


def by_sequence(mesh: Mesh) -> NamedSharding:
    """Of batches (accumulation step, sequence, position): sequences are spread over `data`."""
    return NamedSharding(mesh, PartitionSpec(None, "data"))
