"""A kill, a failing disk, a power loss at each call with which a run writes."""

from __future__ import annotations

import collections
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from faults import DELETES, POWER, Fault, Limit
from processes import assert_same, number, outcome, zotune

from zotune.record.trajectory import read_file
from zotune.run.folder import RunFolder

SYNC = 2  # --sync-every of these runs
FAILS = ("enospc", "short", "eio")


class Whole:
    """An uninterrupted run: what it leaves, and its calls."""

    def __init__(self, argv: list[str], folder: Path) -> None:
        self.argv = argv
        report = folder.with_suffix(".json")
        done = zotune(
            [*argv, "--output", str(folder)], folder.with_suffix(".said"), Fault(str(folder), 0, "kill", str(report))
        )
        assert done.code == 0, done.said
        self.left, self.calls = outcome(folder), json.loads(report.read_text())["calls"]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Whole:
    return Whole(flags(steps=8, sync_every=SYNC), tmp_path_factory.mktemp("calls") / "whole")


def one(whole: Whole, folder: Path, kind: str, at: int) -> None:
    """The run with its fault, then resumed: the same as without it."""
    again, said = [*whole.argv, "--output", str(folder), "--resume"], folder.with_suffix(".said")
    what = f"{kind} at call {at}, {whole.calls[at - 1]}"
    report = folder.with_suffix(".json")
    first = zotune(again, said, Fault(str(folder), at, kind, str(report)))
    needs_room = any(call.split()[0] not in DELETES for call in whole.calls[at - 1 :])
    if kind in FAILS and (needs_room or kind == "eio"):
        lines = first.said.splitlines()
        assert first.code == 1, f"{what}: {first}"
        assert re.match(rf"zotune: --output {folder}: .+; what was saved is whole: .* and --resume$", lines[-1]), what
        assert not any("Traceback" in line or "Error" in line for line in lines[:-1]), f"{what}: {first.said}"
    else:
        assert first.code == (0 if kind in FAILS else -9), f"{what}: {first}"
    unfinished = not (folder / "result.json").exists()
    done = zotune(again, said)
    assert done.code == 0, f"{what}: {done.said}"
    if kind in POWER and unfinished:
        taken = json.loads(report.read_text())["records"]
        resumed = [0, *json.loads((folder / "result.json").read_text())["resumed_at"]]
        assert resumed[-1] >= taken - SYNC, f"{what}: {taken} steps were taken, {resumed[-1]} were left"
    assert_same(folder, whole.left)


def many(whole: Whole, tmp_path: Path, plan: list[tuple[str, int]]) -> None:
    with ThreadPoolExecutor(number("AT_ONCE", 2)) as pool:
        list(pool.map(lambda item: one(whole, tmp_path / f"{item[0]}-{item[1]}", *item), plan))


def test_the_calls_of_a_run_are_all_seen(whole):
    """The wrappers have hold of the writers of this version of torch and transformers."""
    seen = collections.Counter(call.split()[0] for call in whole.calls)
    assert seen.keys() == {"open", "write", "pwrite", "truncate", "fsync", "mkdir", "replace", "unlink", "rmdir",
                           "torch.save", "safetensors"}  # fmt: skip
    assert seen["pwrite"] == 8 + 1
    assert seen["safetensors"] == sum("old-checkpoint" in call and call.startswith("rmdir") for call in whole.calls) + 1


SAMPLED = [
    pytest.param(("kill", "half"), id="killed"),
    pytest.param(FAILS, id="failing disk", marks=pytest.mark.slow),
    pytest.param(POWER, id="power loss", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kinds", SAMPLED)
def test_a_fault_at_a_sample_of_the_calls(whole, tmp_path, kinds):
    """One call of each part of the run, drawn anew in each part."""
    draw, parts = random.Random(3), 8
    size = len(whole.calls) / parts
    plan = [(kinds[n % len(kinds)], 1 + int((n + draw.random()) * size)) for n in range(parts)]
    many(whole, tmp_path, plan)


@pytest.mark.soak
@pytest.mark.parametrize("kinds", [("kill", "half"), FAILS, POWER], ids=["killed", "failing disk", "power loss"])
def test_soak_faults(flags, tmp_path, kinds):
    """Each call of a run of 50 steps, or every so many of them from one on."""
    argv = flags(
        steps=50, sync_every=SYNC, save_every=15, eval_every=20, dtype="bfloat16", method="zo-sgd-mmt", lr="1e-3"
    )
    whole, first, every = Whole(argv, tmp_path / "whole"), number("CALLS_FROM", 1), number("CALLS_EVERY", 1)
    plan = [(kind, at) for kind in kinds for at in range(first, len(whole.calls) + 1, every)]
    if kinds[0] == "kill":  # half a write is one only of a write
        plan = [(k, at) for k, at in plan if k == "kill" or whole.calls[at - 1].split()[0] in
                ("write", "pwrite", "torch.save", "safetensors")]  # fmt: skip
    many(whole, tmp_path, plan)
    print(f"\n{', '.join(kinds)}: {len(plan)} faults over {len(whole.calls)} calls of 50 steps; 0 runs differed")


@pytest.mark.parametrize("size", [700, 4_000, 20_000])
def test_writers_in_other_languages_that_the_system_refuses_are_told_in_a_line_too(whole, tmp_path, size):
    """A limit on the size of files, as the system itself sets it: torch's and safetensors' own errors."""
    again, said = [*whole.argv, "--output", str(tmp_path / "run"), "--resume"], tmp_path / "said"
    first = zotune(again, said, Limit(size))
    assert first.code == 1
    assert first.said.splitlines()[-1].endswith("and --resume"), first.said
    assert "Traceback" not in first.said
    assert zotune(again, said).code == 0
    assert_same(tmp_path / "run", whole.left)


def test_a_folder_that_cannot_be_written_is_refused(whole, tmp_path):
    """By its permissions, or, for root, who has no limits, by a file in its place."""
    (tmp_path / "file").write_text("mine")
    done = zotune([*whole.argv, "--output", str(tmp_path / "file" / "run")], tmp_path / "said")
    assert done.code == 2
    assert done.said.startswith(f"zotune: --output {tmp_path}/file/run: ")
    assert len(done.said.splitlines()) == 1
    done = zotune([*whole.argv, "--output", str(tmp_path / "run")], tmp_path / "said", ReadOnly(str(tmp_path / "run")))
    assert done.code == 2
    assert done.said == f"zotune: --output {tmp_path}/run: cannot be written (Read-only file system); name another\n"


@pytest.mark.parametrize(
    "error",
    [ConnectionRefusedError(111, "refused"), FileNotFoundError(2, "no such file", "/data/x"), OSError("a hub's")],
)
def test_an_error_of_something_else_is_not_told_as_the_disks(tmp_path, error):
    with pytest.raises(OSError) as seen, RunFolder(tmp_path).storing():  # noqa: PT011
        raise error
    assert seen.value is error


class ReadOnly:
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self) -> None:
        import errno
        import os

        mkdir: Any = os.mkdir

        def refuse(path: Any, *rest: Any) -> None:
            if os.fspath(path) == self.folder:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            mkdir(path, *rest)

        os.mkdir = refuse  # type: ignore[assignment]


def test_the_loss_of_power_that_these_tests_simulate_loses_what_is_not_synced(tmp_path):
    """Else they would prove nothing: a file without fsync is lost, and one whose name alone is synced is empty."""
    import multiprocessing

    for kind in POWER:
        folder = tmp_path / kind
        folder.mkdir()
        process = multiprocessing.get_context("fork").Process(target=_careless, args=(str(folder), kind))
        process.start()
        process.join(60)
        assert process.exitcode == -9
        left = {p.name: p.read_bytes() for p in folder.iterdir()}
        assert left["safe"] == b"safe"
        assert ("lost" in left) == (kind != "undone")
        if kind != "torn":
            assert left.get("lost", b"") == (bytes(4) if kind == "zeros" else b"")


def _careless(folder: str, kind: str) -> None:
    import os

    calls = Fault(folder, 7, kind)()
    for name in ("safe", "lost"):
        with open(f"{folder}/{name}", "w") as file:
            file.write(name)
            file.flush()
            if name == "safe":
                os.fsync(file.fileno())
                descriptor = os.open(folder, os.O_RDONLY)
                os.fsync(descriptor)
    os.mkdir(f"{folder}/never")
    raise AssertionError(calls.names)


def test_steps_are_in_the_file_although_no_fsync_was_waited_for(whole, tmp_path):
    """A kill is no power loss: it costs no step."""
    at = next(n for n, call in enumerate(whole.calls, 1) if call == "pwrite trajectory.zot") + 4
    at = next(n for n, call in enumerate(whole.calls, 1) if n >= at and call == "pwrite trajectory.zot")
    taken = whole.calls[: at - 1].count("pwrite trajectory.zot")
    again = [*whole.argv, "--output", str(tmp_path / "run"), "--resume"]
    assert zotune(again, tmp_path / "said", Fault(str(tmp_path / "run"), at, "kill")).code == -9
    assert len(read_file(tmp_path / "run" / "trajectory.zot").records) == taken
