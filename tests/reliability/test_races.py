"""Two processes for one folder: one has it, the other says so and leaves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from faults import KilledAtStep
from processes import Zotune, assert_same, number, outcome, zotune


def race(argv: list[str], folder: Path, pause: float) -> tuple[Any, Any]:
    """How the winner and the loser end."""
    first = Zotune(argv, folder.with_suffix(".a"))
    time.sleep(pause)
    second = Zotune(argv, folder.with_suffix(".b"))
    ended = sorted((first.end(), second.end()), key=lambda done: done.code)
    return ended[0], ended[1]


def assert_one_wins(
    argv: list[str], folder: Path, pause: float, whole: dict[str, Any], losers: tuple[str, ...]
) -> None:
    winner, loser = race([*argv, "--output", str(folder)], folder, pause)
    assert (winner.code, loser.code) == (0, 2), (winner, loser)
    assert loser.said.startswith(f"zotune: --output {folder}: ")
    assert len(loser.said.splitlines()) == 1
    assert any(line in loser.said for line in losers), loser.said
    assert_same(folder, whole)


def races(flags: Any, tmp_path: Path, count: int) -> None:
    argv = flags(steps=4)
    assert zotune([*argv, "--output", str(tmp_path / "whole")], tmp_path / "said").code == 0
    whole = outcome(tmp_path / "whole")
    for n in range(count):
        losers = ("another zotune is running", "holds a run; go on with --resume")
        assert_one_wins(argv, tmp_path / f"{n}", (n % 5) * 0.05, whole, losers)


def test_of_two_processes_that_start_in_one_folder_one_wins(flags, tmp_path):
    races(flags, tmp_path, 4)


def test_of_two_processes_that_resume_one_run_one_wins(flags, tmp_path):
    """A process that comes after the other has ended finds a finished run; these come at once."""
    argv = flags(steps=60, save_every=20, eval_every=20)
    assert zotune([*argv, "--output", str(tmp_path / "whole")], tmp_path / "said").code == 0
    folder = tmp_path / "run"
    killed = zotune([*argv, "--output", str(folder)], tmp_path / "said", KilledAtStep(2, "after"))
    assert killed.code == -9
    assert_one_wins([*argv, "--resume"], folder, 0, outcome(tmp_path / "whole"), ("another zotune is running",))


@pytest.mark.soak
def test_soak_races(flags, tmp_path):
    count = number("RACES", 50)
    races(flags, tmp_path, count)
    print(f"\nraces of two processes for one folder: {count}; each had one winner, whose run was whole")
