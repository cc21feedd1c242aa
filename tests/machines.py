"""Meshes of devices that need not be there. Tests that compile for TPUs are marked `needs("libtpu")`, those that compile for
GPUs `needs("jax-cuda13-plugin")`.
"""

from gqa_jax.planning.topologies import mesh

__all__ = ["mesh"]
