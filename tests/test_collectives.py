import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gqa_jax import collectives
from gqa_jax.mesh import MeshShape
from gqa_jax.training import sharding


@pytest.mark.parametrize("largest_group", [8, 4, 1])
@pytest.mark.parametrize(("mesh", "axes"), [({"fsdp": 8}, ("fsdp",)), ({"fsdp": 4, "context": 2}, ("fsdp", "context"))])
def test_shares_are_those_of_an_array_cut_over_the_axes_in_one_step_or_two(monkeypatch, largest_group, mesh, axes):
    monkeypatch.setattr(collectives, "LARGEST_GROUP", largest_group)
    terms = jnp.asarray(np.random.default_rng(0).integers(-8, 8, size=(8, 3, 16, 5)), jnp.bfloat16)  # sums are exact
    summed = jax.jit(
        jax.shard_map(
            lambda x: collectives.reduce_scatter(x[0], axes, 1),
            mesh=sharding.make_mesh(MeshShape(**mesh)),
            in_specs=PartitionSpec(axes),
            out_specs=PartitionSpec(None, axes),
            check_vma=False,
        )
    )(terms)
    assert summed.dtype == jnp.float32
    np.testing.assert_array_equal(summed, np.asarray(terms, np.float32).sum(axis=0))


@pytest.mark.parametrize("size", [1, 3, 8, 16, 32, 64, 24, 256])
def test_groups_of_a_step_cover_every_device_once(size):
    factors = collectives.factors(size)
    assert np.prod(factors) == size
    assert size <= 8 or max(factors) < size
    for groups, count in zip(collectives.rings(size), factors, strict=True):
        if groups is not None:
            assert sorted(device for group in groups for device in group) == list(range(size))
            assert {len(group) for group in groups} == {count}
