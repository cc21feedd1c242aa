import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gqa_jax.config import ConfigError
from gqa_jax.training.checkpoint import Checkpoints, _sums, checksums, params_sha256, restore_params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """As `program.TrainState`."""

    step: jax.Array
    params: dict
    opt_state: tuple


def state(step):
    """That after `step` steps: no two steps have the same."""
    params = {"w": step * jnp.arange(12.0).reshape(3, 4), "half": jnp.full(5, step, jnp.bfloat16)}
    return State(jnp.int32(step), params, (jax.tree.map(lambda x: 2 * x, params),))


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))


def saved(folder, *steps):
    """Checkpoints of a run, and a description of its parameters."""
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"seconds_train": step / 2})
            checkpoints.wait()
    return abstract().params


def test_state_and_metadata_come_back_bit_for_bit(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore_newest(abstract()) is None
        checkpoints.save(7, state(7), {"seconds_train": 1.5})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore_newest(abstract())
        assert checkpoints.newest_metadata()["seconds_train"] == 1.5
    assert restored.step == restored.metadata["step"] == 7
    assert restored.metadata["seconds_train"] == 1.5
    jax.tree.map(np.testing.assert_array_equal, restored.state, state(7))
    assert [x.dtype for x in jax.tree.leaves(restored.state)] == [x.dtype for x in jax.tree.leaves(state(7))]


def test_only_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {})
            checkpoints.wait()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_an_error_of_a_save_is_looked_for_when_the_save_is_over(tmp_path, monkeypatch):
    over = []

    def check_for_errors():
        if over:
            raise OSError("no space left")

    with Checkpoints(tmp_path, keep=1) as checkpoints, monkeypatch.context() as patched:
        patched.setattr(checkpoints._manager, "wait_until_finished", lambda: over.append(True))
        patched.setattr(checkpoints._manager, "check_for_errors", check_for_errors)
        with pytest.raises(OSError, match="no space left"):
            checkpoints.wait()


def test_a_checkpoint_whose_arrays_changed_is_set_aside(tmp_path, caplog):
    """Orbax restores such a checkpoint without a word: only the checksum knows."""
    saved(tmp_path, 1, 2, 3)
    folder = tmp_path / "checkpoints"
    (folder / "3" / "state").rename(tmp_path / "other")
    (folder / "2" / "state").rename(folder / "3" / "state")  # complete, readable, and not what step 3 saved
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        restored = checkpoints.restore_newest(abstract())
    assert restored.step == 1
    assert "step 3 is damaged (checksum of .opt_state[0]['half'] differs)" in caplog.text
    assert sorted(p.name.split("-")[0] for p in (tmp_path / "damaged-checkpoints").iterdir()) == ["2", "3"]


def of_the_first_version(folder):
    """Makes the metadata of a checkpoint what it was before it named its step."""
    file = folder / "metadata" / "metadata"
    values = json.loads(file.read_text())
    del values["step"]
    file.write_text(json.dumps(values))


def renamed_from_five(folder):
    """A run whose only checkpoint, of step 5, is now called 6."""
    saved(folder, 5)
    (folder / "checkpoints" / "5").rename(folder / "checkpoints" / "6")


def copied_from_four(folder):
    """A run with checkpoints 4 and 6, and that of step 4 a second time as 8."""
    saved(folder, 4, 6)
    shutil.copytree(folder / "checkpoints" / "4", folder / "checkpoints" / "8")


def with_metadata_of_four(folder):
    """A run whose checkpoint 6 has the arrays of step 6 and the metadata of step 4."""
    saved(folder, 4, 6)
    at = folder / "checkpoints"
    sums = json.loads((at / "6" / "metadata" / "metadata").read_text())["checksums"]
    values = json.loads((at / "4" / "metadata" / "metadata").read_text())
    (at / "6" / "metadata" / "metadata").write_text(json.dumps(values | {"checksums": sums}))


@pytest.mark.parametrize(
    ("make", "named", "held"), [(renamed_from_five, 6, 5), (copied_from_four, 8, 4), (with_metadata_of_four, 6, 4)]
)
def test_a_renamed_or_copied_checkpoint_is_refused_and_left_where_it_is(tmp_path, make, named, held):
    make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    message = rf"checkpoints/{named} holds the state after step {held}, not {named}: it was renamed or copied: give it back its"
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        with pytest.raises(ConfigError, match=message):
            checkpoints.newest_metadata()
        with pytest.raises(ConfigError, match=message):
            checkpoints.restore_newest(abstract())
    with pytest.raises(ConfigError, match=message):
        restore_params(tmp_path, abstract().params)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("make", "named"), [(renamed_from_five, 6), (copied_from_four, 8)])
def test_a_renamed_checkpoint_of_the_first_version_is_known_by_its_state(tmp_path, make, named):
    make(tmp_path)
    for folder in (tmp_path / "checkpoints").iterdir():
        of_the_first_version(folder)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.newest_metadata()["seconds_train"] > 0
        with pytest.raises(ConfigError, match=f"checkpoints/{named} holds the state after step"):
            checkpoints.restore_newest(abstract())
    with pytest.raises(ConfigError, match=f"checkpoints/{named} holds the state after step"):
        restore_params(tmp_path, abstract().params)


def test_a_checkpoint_of_the_first_version_is_read(tmp_path):
    saved(tmp_path, 5)
    of_the_first_version(tmp_path / "checkpoints" / "5")
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.newest_metadata()["seconds_train"] == 2.5
        assert checkpoints.restore_newest(abstract()).step == 5
    assert restore_params(tmp_path, abstract().params).step == 5


def test_a_folder_with_more_than_a_step_in_its_name_is_no_checkpoint(tmp_path, caplog):
    """Orbax reads "old_9" and "07" as steps."""
    saved(tmp_path, 5)
    for name in ("old_9", "07"):
        shutil.copytree(tmp_path / "checkpoints" / "5", tmp_path / "checkpoints" / name)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.restore_newest(abstract()).step == 5
    assert restore_params(tmp_path, abstract().params).step == 5
    assert not caplog.text


def test_checksums_see_any_element_and_any_exchange_and_no_sharding():
    x = jnp.arange(64.0).reshape(8, 8)
    base = int(checksums({"x": x})["['x']"])
    assert int(checksums({"x": x.at[3, 4].add(1e-6 * 28)})["['x']"]) != base
    assert int(checksums({"x": x.at[0].set(x[1]).at[1].set(x[0])})["['x']"]) != base
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    assert int(checksums({"x": spread})["['x']"]) == base


def test_parameters_of_another_run_are_those_of_its_newest_undamaged_checkpoint(tmp_path, caplog):
    wanted = saved(tmp_path, 1, 2)
    step, params, metadata = restore_params(tmp_path, wanted)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, params, state(2).params)
    assert metadata["seconds_train"] == 1.0

    (tmp_path / "checkpoints" / "2" / "state" / "manifest.ocdbt").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    step, params, _ = restore_params(tmp_path, wanted)
    assert step == 1
    jax.tree.map(np.testing.assert_array_equal, params, state(1).params)
    assert "checkpoints/2 is damaged" in caplog.text
    assert sorted(tmp_path.rglob("*")) == before

    other = tmp_path / "checkpoints" / "1"
    (other / "state").rename(tmp_path / "away")
    with pytest.raises(
        ConfigError, match=r"no checkpoint to start from: that of step 2 is damaged .*; that of step 1 is damaged"
    ):
        restore_params(tmp_path, wanted)
    with pytest.raises(ConfigError, match=r"has no checkpoint to start from: there is none"):
        restore_params(tmp_path / "none", wanted)


def test_parameters_whose_arrays_changed_are_not_used(tmp_path):
    """Orbax restores such a checkpoint without a word: only the checksum knows."""
    wanted = saved(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints"
    (folder / "2" / "state").rename(tmp_path / "away")
    (folder / "1" / "state").rename(folder / "2" / "state")
    with pytest.raises(ConfigError, match=r"step 2 is damaged \(checksum of \.params\['half'\] differs\)"):
        restore_params(tmp_path, wanted)


def test_parameters_of_another_model_are_refused(tmp_path):
    wanted = saved(tmp_path, 1, 2)
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
