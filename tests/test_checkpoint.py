import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gqa_jax.checkpoint import Checkpoints, _sums, checksums, params_sha256, restore_params
from gqa_jax.config import ConfigError


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
    x = jnp.arange(64.0).reshape(8, 8)
    base = int(checksums({"x": x})["['x']"])
    assert int(checksums({"x": x.at[3, 4].add(1e-6 * 28)})["['x']"]) != base
    assert int(checksums({"x": x.at[0].set(x[1]).at[1].set(x[0])})["['x']"]) != base
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    assert int(checksums({"x": spread})["['x']"]) == base


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: dict
    opt_state: tuple


def saved(folder):
    """Two checkpoints of a run, and a description of its parameters."""
    params = state()
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 2):
            values = jax.tree.map(lambda x, step=step: x * step, params)
            checkpoints.save(step, State(jnp.int32(step), values, (values, values)), {"seconds_train": 1.5})
            checkpoints.wait()
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)


def test_parameters_of_another_run_are_those_of_its_newest_undamaged_checkpoint(tmp_path, caplog):
    wanted = saved(tmp_path)
    step, params, metadata = restore_params(tmp_path, wanted)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(lambda x: 2 * x, state()))
    assert metadata["seconds_train"] == 1.5

    (tmp_path / "checkpoints" / "2" / "state" / "manifest.ocdbt").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    step, params, _ = restore_params(tmp_path, wanted)
    assert step == 1
    jax.tree.map(np.testing.assert_array_equal, params, state())
    assert "checkpoints/2 is damaged" in caplog.text
    assert sorted(tmp_path.rglob("*")) == before

    other = tmp_path / "checkpoints" / "1"
    (other / "state").rename(tmp_path / "away")
    with pytest.raises(
        ConfigError, match=r"no checkpoint to start from: that of step 2 is damaged .*; that of step 1 is damaged"
    ):
        restore_params(tmp_path, wanted)
    with pytest.raises(ConfigError, match=r"continue_from: .* has no checkpoint to start from: there is none"):
        restore_params(tmp_path / "none", wanted)


def test_parameters_whose_arrays_changed_are_not_used(tmp_path):
    """Orbax restores such a checkpoint without a word: only the checksum knows."""
    wanted = saved(tmp_path)
    folder = tmp_path / "checkpoints"
    (folder / "2" / "state").rename(tmp_path / "away")
    (folder / "1" / "state").rename(folder / "2" / "state")
    with pytest.raises(ConfigError, match=r"step 2 is damaged \(checksum of \['half'\] differs\)"):
        restore_params(tmp_path, wanted)


def test_parameters_of_another_model_are_refused(tmp_path):
    wanted = saved(tmp_path)
    with pytest.raises(ConfigError, match=r"is of another model: \['w'\] is float32\[3, 4\], here float32\[4, 3\]"):
        restore_params(tmp_path, wanted | {"w": jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=wanted["w"].sharding)})
    with pytest.raises(ConfigError, match=r"\['half'\] is bfloat16\[5\], here not there"):
        restore_params(tmp_path, {name: leaf for name, leaf in wanted.items() if name != "half"})


def test_checksums_are_made_where_the_shards_are():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    x = jax.device_put(jnp.zeros((64, 8, 128)), NamedSharding(mesh, PartitionSpec(None, "data", "fsdp")))
    text = _sums(NamedSharding(mesh, PartitionSpec())).lower([x]).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "[64,8,128]" not in text


def test_hash_of_parameters_is_the_same_on_any_mesh():
    values = {"a": jnp.arange(64.0).reshape(8, 8), "b": {"c": jnp.ones(3, jnp.bfloat16)}}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = values | {"a": jax.device_put(values["a"], NamedSharding(mesh, PartitionSpec("data")))}
    assert params_sha256(spread) == params_sha256(values)
    assert params_sha256(values | {"a": values["a"].at[3, 3].set(0.5)}) != params_sha256(values)
