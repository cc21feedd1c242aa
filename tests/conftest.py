"""Every test runs on CPU with 8 simulated devices; set before jax is imported anywhere."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax

from tests.gcs import gcs_root, gcs_server  # noqa: F401 (fixtures, for all)

jax.config.update("jax_numpy_rank_promotion", "raise")
