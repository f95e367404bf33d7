"""Each backend as a fixture. Triton runs in its interpreter where there is no GPU, which must be chosen before its import."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Backend:
    """A backend's functions on the device where it runs. Fresh outputs are full of NaN: what is not written shows."""

    name: str
    module: Any
    device: torch.device

    @property
    def interpreted(self) -> bool:
        return self.name == "cuda" and self.device.type == "cpu"

    @property
    def fuses(self) -> bool:
        """Whether c·z and the sum may be one rounding: bits of a sum of normals are then its own."""
        return self.device.type == "cuda"

    def pairs(self, seeds: Any, coefs: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        signed = [seed - (1 << 64) if seed >> 63 else seed for seed in seeds]
        return (
            torch.tensor(signed, dtype=torch.int64, device=self.device),
            torch.tensor(list(coefs), dtype=dtype, device=self.device),
        )

    def add(
        self, w: Tensor, seeds: Any, coefs: Any, pid: int, direction: str, start: int = 0, out: Tensor | None = None
    ) -> Tensor:
        """w + Σ c·z in a fresh tensor, or in out."""
        out = torch.full_like(w, math.nan) if out is None else out
        wide = torch.float64 if w.dtype == torch.float64 else torch.float32
        self.module.add_noise(out, w, *self.pairs(seeds, coefs, wide), pid, direction, start)
        return out

    def add_rows(self, w: Tensor, rows: Tensor, seeds: Any, coefs: Any, pid: int, direction: str) -> Tensor:
        out = w.new_full((len(rows), *w.shape[1:]), math.nan)
        wide = torch.float64 if w.dtype == torch.float64 else torch.float32
        self.module.add_noise_rows(out, w, rows, *self.pairs(seeds, coefs, wide), pid, direction)
        return out

    def z(self, direction: str, seed: int, pid: int, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of z, float32, on the CPU."""
        return self.add(torch.zeros(stop - start, device=self.device), [seed], [1.0], pid, direction, start).cpu()


def _backend(name: str) -> Backend:
    if name == "cuda" and find_spec("triton") is None:
        pytest.skip("triton is not installed")
    on_gpu = name == "cuda" and torch.cuda.is_available()
    return Backend(name, import_module(f"zotune.noise.{name}"), torch.device("cuda" if on_gpu else "cpu"))


@pytest.fixture(scope="session", params=["reference", "cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return _backend(request.param)


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def fast(request: pytest.FixtureRequest) -> Backend:
    """The backends that are checked against the reference."""
    return _backend(request.param)


@pytest.fixture(scope="session")
def reference() -> Backend:
    return _backend("reference")


@pytest.fixture(params=["gaussian", "rademacher"])
def direction(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
