"""Memory of a process, beside what a run's peaks say (tests/bench/test_estimate.py)."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from zotune.memory import keep_freed
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
