"""Settings of every test process."""

import gc


def pytest_collection_finish(session):
    "Exempt what imports made (torch, transformers: a million objects) from garbage collection, which trainers start by hand several times each."
    gc.collect()
    gc.freeze()
