"""Memory of a process, beside what a run's peaks say (tests/bench/test_estimate.py)."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys

import pytest
import torch
from tiny import causal_model

from zotune.models.schemes import get_scheme
from zotune.step.optimizer import ZeroOrderOptimizer
from zotune.tasks.scoring import ROW_LOSSES

FAULTS = """
import resource, torch
from zotune.estimates.memory import keep_freed
kept = {keep} and keep_freed()
def step():
    x = torch.zeros(16 << 20)  # 64 MiB
    y = x + 1
    return y.sum()
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone hands freed blocks back so eagerly")
def test_memory_that_is_kept_is_not_asked_for_again_page_by_page():
    def faults(keep: bool) -> tuple[str, int]:
        said = subprocess.run(
            [sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True
        ).stdout.split()
        return said[0], int(said[1])

    (without, many), (kept, few) = faults(False), faults(True)
    assert (without, kept) == ("False", "True")
    assert 2 * few < many


def tensors() -> int:
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize(
    ("method", "scheme", "options"),
    [
        *((method, "full", {}) for method in ("zo-sgd", "zo-sgd-cons", "zo-adam", "forward-grad", "fo-adam")),
        *((method, scheme, {}) for method in ("zo-sgd", "forward-grad") for scheme in ("lora", "prefix", "head")),
        *(("zo-sgd", scheme, {"engine": "lowrank"}) for scheme in ("full", "lora")),
        ("zo-sgd", "full", {"engine": "sequential", "queries": 2}),
        ("zo-sgd", "full", {"engine": "lowrank", "groups": "batch"}),
        ("zo-sgd", "full", {"sparsity": 0.5, "mask": "magnitude"}),
        ("zo-sgd", "full", {"blocks": "transformer"}),
        ("zo-sgd", "full", {"hybrid": 0.5, "fo_lr": 1e-4}),
    ],
)
def test_a_step_leaves_nothing_for_the_garbage_collector(method, scheme, options):
    """A reference cycle would keep copies of weights until the collector comes: as much memory again, at some later time."""
    model = get_scheme(scheme).prepare(causal_model())
    batch = {"input_ids": torch.randint(2, 300, (2, 8)), "positions": torch.full((2, 1), 6),
             "targets": torch.randint(2, 300, (2, 1)), "target_mask": torch.ones((2, 1))}  # fmt: skip
    optimizer = ZeroOrderOptimizer(model, method, lr=1e-6, eps=1e-3, **options)

    def step():
        optimizer.step(lambda given: ROW_LOSSES["answer"](model, given), batch=batch)

    step()
    gc.collect()
    gc.disable()
    gc.freeze()  # of what lives already nothing is counted: there are a million things, and this step is asked about
    try:
        step()
        before = tensors()
        step()
        assert tensors() == before
    finally:
        gc.enable()  # frozen they stay, as they are for every other test (conftest.py)
