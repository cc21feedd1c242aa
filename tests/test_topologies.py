import pytest

from gqa_jax import topologies
from tests import machines


@pytest.mark.parametrize(
    ("name", "kind"), [("v5e", "TPU v5 lite"), ("v5p", "TPU v5"), ("v6e:2x4", "TPU v6 lite"), ("h200", "NVIDIA H200")]
)
def test_a_mesh_of_a_device_that_is_not_here(name, kind):
    mesh = machines.mesh(name)
    assert mesh.devices.flat[0].device_kind == kind
    assert dict(mesh.shape) == {"data": 1}


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(ValueError, match=r"unknown device 'v9z': TPUs are v4, .* GPUs h200"):
        topologies.mesh("v9z")


@pytest.mark.parametrize(("name", "package"), [("v5e", "libtpu"), ("h200", "jax-cuda13-plugin")])
def test_a_missing_compiler_says_what_to_install(name, package, monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match=rf"takes the package {package}: pip install 'gqa-jax\[aot\]'"):
        topologies.mesh(name)
