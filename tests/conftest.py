"""Every test runs on CPU with 8 simulated devices; set before jax is imported anywhere. Hooks and fixtures for all."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax

from tests.gcs import gcs_root, gcs_server  # noqa: F401
from tests.needs import (  # noqa: F401
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_make_collect_report,
    pytest_runtest_makereport,
    pytest_runtest_setup,
    pytest_terminal_summary,
)

jax.config.update("jax_numpy_rank_promotion", "raise")
