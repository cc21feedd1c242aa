"""Meshes of devices that need not be there; tests that compile for them are skipped where the compiler is not installed."""

import pytest

from gqa_jax import hardware, topologies


def mesh(name, shape=None):
    """`gqa_jax.topologies.mesh`, or a skip that says what to install."""
    module = "libtpu" if hardware.CHIPS[name.partition(":")[0]].gpu is None else "jax_cuda13_plugin"
    pytest.importorskip(module, reason=f"compiling for {name} ahead of time: pip install 'gqa-jax[aot]'")
    return topologies.mesh(name, shape)
