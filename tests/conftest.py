"""Choices that hold for all tests."""

import os

# read when torch is imported: a run's bits depend on it, and some tests compare runs of this process with those of others
os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # read at its import; tests need no network, and do not wait for one

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it at its import

# No time limit for one example: a machine may be shared, and a first call may compile a kernel.
settings.register_profile("zotune", deadline=None)
settings.load_profile("zotune")
