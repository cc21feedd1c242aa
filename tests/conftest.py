"""Every test runs on CPU with 8 simulated devices; set before jax is imported anywhere. Hooks and fixtures for all.

A worker of pytest-xdist per CPU runs the tests, so that a BLAS with threads of its own only makes them wait for each other: the
slow tests of laws take up to three times as long then.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

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


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """A folder of compiled programs for this process alone: JAX writes them in place, and another would read half of one."""
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module")
def compiled_once(programs):
    """For modules that train the same small model again and again: programs are kept, as on the command line."""
    options = {"jax_compilation_cache_dir": str(programs), "jax_persistent_cache_min_compile_time_secs": 0.1}
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def small_map(monkeypatch):
    """Reports have a map of a few questions and one device: all of them take a minute."""
    from launch.report import answer_map

    monkeypatch.setattr(answer_map, "LOSSES", 4)
    monkeypatch.setattr(answer_map, "CONTEXTS", (1024, 8192))
    monkeypatch.setattr(answer_map, "DEVICES", ("h100",))
