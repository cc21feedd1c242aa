import jax
import jax.numpy as jnp
import numpy as np

from gqa_jax.checkpoint import Checkpoints, checksums


def state(scale=1.0):
    return {"step": jnp.int32(3), "w": scale * jnp.arange(12.0).reshape(3, 4), "half": jnp.ones(5, jnp.bfloat16)}


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state())


def test_state_and_metadata_come_back_bit_for_bit(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore_newest(abstract()) is None
        checkpoints.save(7, state(), {"seconds_train": 1.5})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore_newest(abstract())
        assert checkpoints.newest_metadata()["seconds_train"] == 1.5
    assert restored.step == 7
    assert restored.metadata["seconds_train"] == 1.5
    for name, value in state().items():
        np.testing.assert_array_equal(restored.state[name], value)
        assert restored.state[name].dtype == value.dtype


def test_only_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {})
            checkpoints.wait()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_a_checkpoint_whose_arrays_changed_is_set_aside(tmp_path, caplog):
    """Orbax restores such a checkpoint without a word: only the checksum knows."""
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, state(1.0), {})
        checkpoints.wait()
        checkpoints.save(2, state(2.0), {})
        checkpoints.wait()
        checkpoints.save(3, state(3.0), {})
    folder = tmp_path / "checkpoints"
    (folder / "3" / "state").rename(tmp_path / "other")
    (folder / "2" / "state").rename(folder / "3" / "state")  # complete, readable, and not what step 3 saved
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        restored = checkpoints.restore_newest(abstract())
    assert restored.step == 1
    assert "step 3 is damaged (checksum of ['w'] differs)" in caplog.text
    assert sorted(p.name.split("-")[0] for p in (tmp_path / "damaged-checkpoints").iterdir()) == ["2", "3"]


def test_checksums_see_any_element_and_any_exchange_and_no_sharding():
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    x = jnp.arange(64.0).reshape(8, 8)
    base = int(checksums({"x": x})["['x']"])
    assert int(checksums({"x": x.at[3, 4].add(1e-6 * 28)})["['x']"]) != base
    assert int(checksums({"x": x.at[0].set(x[1]).at[1].set(x[0])})["['x']"]) != base
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    assert int(checksums({"x": spread})["['x']"]) == base
