import pytest

from gqa_jax import hardware
from gqa_jax.hardware import chip_of
from gqa_jax.mesh import MeshShape
from gqa_jax.planning import topologies


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("v5e", "TPU v5 lite", marks=pytest.mark.needs("libtpu")),
        pytest.param("v5p", "TPU v5", marks=pytest.mark.needs("libtpu")),
        pytest.param("v6e:2x4", "TPU v6 lite", marks=pytest.mark.needs("libtpu")),
        pytest.param("h200", "NVIDIA H200", marks=pytest.mark.needs("jax-cuda13-plugin")),
    ],
)
def test_a_mesh_of_a_device_that_is_not_here(name, kind):
    mesh = topologies.mesh(name)
    assert mesh.devices.flat[0].device_kind == kind
    assert dict(mesh.shape) == {"data": 1}


@pytest.mark.needs("libtpu")
@pytest.mark.parametrize("name", ["v4:2x2x2", "v5e:4x4", "v5p:2x2x4", "v6e:2x4", "v5e:1x1"])
def test_a_tpu_slice_has_one_device_a_chip(name):
    found = topologies.devices(name)
    assert len(found) == hardware.find(name).n_chips
    assert chip_of(found[0].device_kind) == hardware.find(name).chip
    assert len({device.process_index for device in found}) == hardware.find(name).n_hosts


@pytest.mark.needs("jax-cuda13-plugin")
@pytest.mark.parametrize("name", ["h200:8", "a100:2", "l4:1"])
def test_a_gpu_host_has_as_many_as_its_name_says(name):
    found = topologies.devices(name)
    assert len(found) == hardware.find(name).n_chips
    assert {device.process_index for device in found} == {0}
    assert chip_of(found[0].device_kind) == hardware.find(name).chip


@pytest.mark.needs("libtpu")
def test_a_mesh_of_a_slice_has_the_axes_of_a_run():
    mesh = topologies.mesh("v5e:2x4", MeshShape(fsdp=4, context=2))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 1, "context": 2}
    assert len({device.id for device in mesh.devices.flat}) == 8
    with pytest.raises(ValueError, match="mesh 'fsdp=4' is of 4 devices, and v5e:2x4 has 8"):
        topologies.mesh("v5e:2x4", MeshShape(fsdp=4))


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(ValueError, match=r"unknown device 'v9z': TPUs are v4, v5e, v5p, v6e, GPUs h200, "):
        topologies.mesh("v9z")
    with pytest.raises(ValueError, match=r"unknown topology 'v5e:3x3'"):
        topologies.devices("v5e:3x3")


@pytest.mark.parametrize(("name", "package"), [("v5e", "libtpu"), ("h200", "jax-cuda13-plugin")])
def test_a_missing_compiler_says_what_to_install(name, package, monkeypatch):
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match=rf"takes the package {package}: pip install 'gqa-jax\[aot\]'"):
        topologies.mesh(name)
