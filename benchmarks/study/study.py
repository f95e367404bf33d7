"""The study of docs/benchmark/ in calls of a few minutes, on a machine that keeps nothing between them.

    python benchmarks/study/study.py OUT --minutes 9 --jobs 16 -- SUITE… [options of `zotune bench run`]

Each call unpacks what the last one left (--packed FOLDER), goes on for so many minutes, and leaves in OUT the store, the
logs and the small files of every run as study.tar.gz.00, .01, …, parts of --part MiB. A pack is made every minute too,
for a call that is killed. Weights and checkpoints stay behind: what they held, a run that was stopped rebuilds from its
trajectory.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

NAME = "study.tar.gz"
KEPT = ("config.yaml", "metrics.jsonl", "result.json", "progress.json", "trajectory.zot")  # of a run's folder
PACES = "made/paces.json"  # seconds a step, of suites whose budget is of seconds
RESERVE = 20.0  # seconds for runs to save, and for the last pack


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--packed", type=Path, help="folder with the parts of the last call [default: OUT]")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="where the runs are while the call lasts")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole call")
    parser.add_argument("--jobs", type=int, help="runs at one time [default: one for each GPU]")
    parser.add_argument("--part", type=float, default=15.0, metavar="MIB")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between packs")
    args, command = parser.parse_known_args()
    command = command[1:] if command[:1] == ["--"] else command
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.work / "results.sqlite").exists():
        unpack(args.packed or args.out, args.work)
    left = (60 * args.minutes - RESERVE - (time.monotonic() - began)) / 60
    jobs = ["--jobs", str(args.jobs)] if args.jobs else []
    bound = [sys.executable, "-m", "zotune.bench.child", str(os.getpid())]  # dies with this process
    bench = [*bound, sys.executable, "-m", "zotune", "bench", "run", *command]
    runner = subprocess.Popen([*bench, "--output", str(args.work), "--for", f"{left:.2f}", *jobs])
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = runner.wait(args.every)
                break
            pack(args.work, args.out, args.part)
    except KeyboardInterrupt:
        code = runner.wait()
    size = pack(args.work, args.out, args.part)
    print(f"{args.out}: {size / 2**20:.1f} MiB; {time.monotonic() - began:.0f} s of {60 * args.minutes:.0f}")
    sys.exit(code)


def pack(work: Path, out: Path, part_mib: float) -> int:
    """OUT/study.tar.gz.NN: a copy of the store as of one moment, and what is small. Returns its bytes."""
    store = (work / "results.sqlite").exists()
    if not store and not (work / PACES).exists():
        return 0
    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        if store:
            with sqlite3.connect(work / "results.sqlite") as live, sqlite3.connect(f"{folder}/copy") as copy:
                live.backup(copy)
            copy.close()
            tar.add(f"{folder}/copy", "results.sqlite")
        for path in sorted(
            [*work.glob(PACES), *work.glob("logs/*"), *(p for name in KEPT for p in work.glob(f"runs/*/{name}"))]
        ):
            with contextlib.suppress(FileNotFoundError):  # a run writes while we look
                tar.addfile(*_entry(path, path.relative_to(work).as_posix()))
    whole, size = buffer.getvalue(), int(part_mib * 2**20)
    names = []
    for i, start in enumerate(range(0, len(whole), size)):
        names.append(f"{NAME}.{i:02}")
        (out / f".{names[-1]}").write_bytes(whole[start : start + size])
    for name in names:  # only when all of it is there
        (out / f".{name}").replace(out / name)
    for stale in set(out.glob(f"{NAME}.*")) - {out / name for name in names}:
        stale.unlink()
    return len(whole)


def _entry(path: Path, name: str) -> tuple[tarfile.TarInfo, io.BytesIO]:
    """A file that may grow meanwhile, as it is now."""
    content = path.read_bytes()
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(content), int(path.stat().st_mtime)
    return info, io.BytesIO(content)


def unpack(packed: Path, work: Path) -> None:
    parts = sorted(packed.glob(f"{NAME}.*"))
    if not parts:
        return
    work.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts)), mode="r:gz") as tar:
        tar.extractall(work, filter="data")
    print(f"{work}: gone on with, from {packed}", flush=True)


if __name__ == "__main__":
    main()
