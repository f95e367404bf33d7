"""Steps of a model that lies over processes are those of one process: the noise and, given g, the weights to the bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import shards

sys.path.insert(0, str(Path(__file__).parents[1] / "workers"))
from launch import torchrun

# How far sums in another order put a loss, as a share of it: some of its format's last places.
ROUNDED = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 5e-3}
ULP = 2.0**-52


def told_by(processes: int, what: str, folder: Path) -> list[dict[str, Any]]:
    done = torchrun(processes, Path(shards.__file__), folder, what)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> list[dict[str, Any]]:
    return told_by(2, "quick", tmp_path_factory.mktemp("quick"))


def assert_alike(told: list[dict[str, Any]]) -> None:
    kinds = shards.DENSE | shards.LOW_RANK
    for kind, layouts in told[0]["kinds"].items():
        dtype = str(kinds[kind].get("dtype", "float64")).removeprefix("torch.")
        for layout, found in layouts.items():
            where = f"{kind}, {layout}: {found}"
            assert found["moved"] > 0, where
            assert found["losses"] <= ROUNDED[dtype], where
            assert all(one["kinds"][kind][layout]["g"] == found["g"] for one in told), where  # to the bit, everywhere
            if kind in shards.DENSE:
                assert found["replay"] == 0, where
                if layout.startswith("fsdp") and "tp" not in layout:  # no sum of a forward is cut
                    assert found["losses"] == found["weights"] == 0, where
            elif dtype == "float64":  # a block of a product may be rounded as no block of the whole
                assert found["replay"] <= ULP, where


def test_two_processes_take_the_steps_of_one(quick):
    assert_alike(quick)


def test_a_part_draws_the_part_of_the_whole_s_noise(quick):
    assert [one["parts"] for one in quick] == [[], []]


def test_with_rows_of_their_own_they_take_the_steps_of_one_process_that_has_all(quick):
    for one in quick:
        assert one["own rows"]["losses"] < 1e-14
        assert one["own rows"]["weights"] < 1e-9  # g is recorded in float32


REFUSED = {
    "other rows": "have seen other losses (3 to 3 numbers, means ",
    "more rows": "have seen other losses (3 to 4 numbers",
    "dual": "engine='dual': not where the model's weights lie over several processes; use engine='auto'",
    "method": "method 'own-inputs': not where",
    "sparsity": "sparsity: not where",
    "lr": "lr='auto': not where",
    "module": "lies over several processes: give the optimizer the model itself",
    "moved": "the model's weights are elsewhere than when the optimizer was made",
    "sharing": "workers: processes that hold parts of a model have to run each of its forwards together",
    "low rank": "workers: with low-rank directions",
    "uneven": "own_rows: 3 to 4 rows of a step for a process",
    "own rows of a part": "workers: processes that hold parts of a model",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_told_to_all_processes_in_a_line(quick, name):
    for one in quick:
        assert REFUSED[name] in one["refused"][name]
        assert "\n" not in one["refused"][name]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_all_rules_in_all_layouts_take_the_steps_of_one_process(processes, tmp_path):
    told = told_by(processes, "all", tmp_path)
    assert_alike(told)
    assert not any(one["parts"] for one in told)


@pytest.mark.slow
def test_fsdp_of_what_tensor_parallelism_has_laid_out_takes_the_steps_of_one_process(tmp_path):
    assert_alike(told_by(4, "mesh", tmp_path))
