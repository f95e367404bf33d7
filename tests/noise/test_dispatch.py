"""What `zotune.noise` itself does: names, ids, and the choice of a backend."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from zotune import noise


def test_the_package_imports_neither_numba_nor_triton():
    code = "import sys, zotune.noise; print([m for m in ('numba', 'triton', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_two_names_with_one_id_are_an_error_that_names_both():
    names = ["layer.45402.weight", "layer.70558.weight"]
    assert noise.parameter_id(names[0]) == noise.parameter_id(names[1])  # found by trying 70,000 names
    with pytest.raises(ValueError, match=r"layer\.45402\.weight.*layer\.70558\.weight"):
        noise.parameter_ids(names)


def test_a_name_may_come_twice():
    assert noise.parameter_ids(["a", "b", "a"]) == {"a": noise.parameter_id("a"), "b": noise.parameter_id("b")}


def test_streams_are_part_of_the_definition():
    assert {stream.name: int(stream) for stream in noise.Stream} == {
        "NOISE": 0,
        "MASK": 1,
        "ROUNDING": 2,
        "SEED": 3,
        "SAMPLE": 4,
    }


@pytest.mark.parametrize(("device", "name"), [("cpu", "cpu"), ("mps", "reference"), ("meta", "reference")])
def test_the_device_chooses_the_backend(monkeypatch, device, name):
    monkeypatch.delenv("ZOTUNE_NOISE_BACKEND", raising=False)
    assert noise.backend_for(torch.device(device)).__name__ == f"zotune.noise.{name}"


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_environment_overrides_the_device(monkeypatch, name):
    monkeypatch.setenv("ZOTUNE_NOISE_BACKEND", name)
    assert noise.backend_for(torch.device("cuda")).__name__ == f"zotune.noise.{name}"


def test_an_unknown_backend_is_an_error_that_lists_the_known(monkeypatch):
    monkeypatch.setenv("ZOTUNE_NOISE_BACKEND", "numba")
    with pytest.raises(ValueError, match="reference, cpu, cuda"):
        noise.backend_for(torch.device("cpu"))


@pytest.mark.parametrize("seed", [0, 5, 2**63, 2**64 - 1])
@pytest.mark.parametrize("direction", noise.DIRECTIONS)
def test_fill_draws_what_add_noise_adds(direction, seed):
    z, added = torch.full((129,), float("nan")), torch.zeros(129)
    noise.fill(z, seed, 3, direction, 127)
    bits = torch.tensor([seed - (1 << 64) if seed >> 63 else seed])
    noise.add_noise(added, added, bits, torch.ones(1), 3, direction, 127)
    assert torch.equal(z, added)


def test_add_noise_rows_goes_to_the_same_backend():
    table, rows = torch.randn(5, 129), torch.tensor([4, 0])
    pair, out, whole = (torch.tensor([1]), torch.ones(1)), torch.empty(2, 129), torch.empty(5, 129)
    noise.add_noise_rows(out, table, rows, *pair, 3, "gaussian")
    noise.add_noise(whole, table, *pair, 3, "gaussian")
    assert torch.equal(out, whole[rows])
