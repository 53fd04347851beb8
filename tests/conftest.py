"""Settings of the whole suite: eight simulated devices, no accelerator, and the slow tests only on request."""

import os

# Before JAX is imported. The programs are small: compiling them is the work, so the backend should not optimise them.
os.environ["JAX_PLATFORMS"] = "cpu"
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # what is tested is compiled here and now

import pytest  # noqa: E402
from launch_desk import Desk  # noqa: E402


@pytest.fixture
def desk(tmp_path):
    """An empty folder in which stand-ins for the commands of the clouds answer."""
    return Desk(tmp_path)


@pytest.fixture
def in_this_process(monkeypatch):
    """`prepare` without worker processes, which take seconds to start; test_prepare_processes.py is about them."""
    from prepare_command import one_after_the_other  # here, since most tests prepare nothing

    monkeypatch.setattr("alice_jax.prepare._run", one_after_the_other)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))
