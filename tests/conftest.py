"""Settings of every test process."""

import gc
import sys

import pytest

LONG = ("test_interleave", "test_trainer", "test_trl_suite", "test_recipes", "test_parity", "test_resume", "test_app_browser", "test_sandbox_attacks", "test_families")


def pytest_collection_modifyitems(items):
    "Let long files begin first, so that no process is left alone with one at the end."
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish(session):
    "Exempt what imports made (torch, transformers: a million objects) from garbage collection, which trainers start by hand several times each."
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    "Where tests fork processes: begin with a copy of this one, before any test leaves something in it."
    if "small" in sys.modules: sys.modules["small"].small_policy()   # the copies find it made
    if "forks" in sys.modules: sys.modules["forks"].start_server()
