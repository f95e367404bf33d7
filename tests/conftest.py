"""Choices that hold for all tests."""

import gc
import os
from collections.abc import Generator, Iterator

# read when torch is imported: a run's bits depend on it, and some tests compare runs of this process with those of others
os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # read at its import; tests need no network, and do not wait for one

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it at its import

# No time limit for one example: a machine may be shared, and a first call may compile a kernel.
settings.register_profile("zotune", deadline=None)
settings.load_profile("zotune")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Modules and tests are a million things that stay: the collector, which each run of the Trainer calls, passes over them."""
    gc.disable()
    collected = yield
    gc.collect()
    gc.freeze()
    gc.enable()
    return collected


@pytest.fixture(autouse=True, scope="session")
def _no_wait_for_the_disk() -> Iterator[None]:
    """No test cuts the power. What would be on the disk is tests/reliability's, which keeps its own account of these calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.fstat(descriptor) and None)
        yield
