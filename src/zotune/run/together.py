"""A run that several workers take together: what has to be alike, and what those that write nothing work in."""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

import zotune
from zotune.errors import InputError
from zotune.methods import make_method
from zotune.options import RunOptions
from zotune.prepare.ready import Ready
from zotune.record.fingerprints import start
from zotune.run.folder import CALIBRATION, FREE, RunFolder
from zotune.run.state import RunState
from zotune.run.trainer import readable_state
from zotune.run.trajectory import readable, retraceable
from zotune.workers.group import Workers
from zotune.workers.launcher import launch

C = TypeVar("C", bound=RunOptions)

LAUNCH = "launch"  # key of progress.json: of the launcher that may start the run's processes again
OPTIMIZER = "optimizer.pt"  # of a checkpoint, as the Trainer names it
PLACES = {
    "model",
    "gguf_file",
    "data",
    "data_dir",
}  # may have other names on other machines; what they hold is compared
NAMES = {"code": "zotune code", "torch": "torch", "threads": "threads", "base": "base weights", "start": "first values"}


def refuse_few(config: RunOptions, workers: int) -> None:
    """Raises InputError where a step has no piece for every worker."""
    if workers == 1:
        return
    kind, accumulate = make_method(config.method).kind, getattr(config, "accumulate", 1)
    if kind != "zeroth-order" or config.hybrid is not None:
        what = "--hybrid" if config.hybrid is not None else f"--method {config.method}"
        raise InputError(
            f"{what}: {workers} workers share out the places of zeroth-order steps; run one process, without torchrun"
        )
    if getattr(config, "max_gpu_memory", None) is not None:
        raise InputError(
            f"--max-gpu-memory: {workers} workers compare all weights, and of layers that stream some are there; leave it out"
        )
    if config.micro_batch is None:
        raise InputError(
            f"--micro-batch: {workers} workers share out a step's rows, so many at a time; give it, at most "
            f"{max(1, config.batch_size * accumulate // workers)}"
        )
    parts = accumulate * -(-config.batch_size // config.micro_batch)
    if workers > parts:
        raise InputError(
            f"--micro-batch {config.micro_batch}: a step has {parts} such {'piece' if parts == 1 else 'pieces'} for {workers} "
            "workers; make it smaller, or start fewer workers"
        )


def goes_on(config: C, folder: RunFolder) -> C:
    """With --resume where an elastic launcher has started the run's processes again: the folder's run is of the same launch."""
    same = launch() and folder.read_json("progress.json").get(LAUNCH) == launch()
    return config.model_copy(update={"resume": True, "overwrite": False}) if same else config


def facts(ready: Ready) -> dict[str, Any]:
    """What all workers have to have in common."""
    config = ready.config
    own = config.model_dump(exclude=FREE | PLACES | {"forward_tokens"})
    return {
        "code": _code(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads() if ready.device.type == "cpu" else 0,
        "options": own,
        "rows": ready.made_of,
        "base": ready.base,
        "start": start(ready.model),
    }


@cache
def _code() -> str:
    digest = hashlib.sha256(zotune.__version__.encode())
    here = Path(zotune.__file__).parent
    for path in sorted(here.rglob("*.py")):
        digest.update(f"{path.relative_to(here)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def refuse_unlike(told: Sequence[Mapping[str, Any]]) -> None:
    """Raises InputError that names what differs. told: facts of each worker, by rank."""
    first = told[0]
    for rank, other in enumerate(told):
        said = []
        for name, value in other.items():
            if value == first[name]:
                continue
            if name == "options":
                keys = [key for key in value if value[key] != first[name].get(key)]
                said += [f"--{k.replace('_', '-')} {value[k]!r:.40} for {first[name].get(k)!r:.40}" for k in keys]
            elif name == "rows":
                parts = [part for part in value if value[part] != first[name].get(part) and part != "base"]
                said.append(f"data ({', '.join(parts)})" if parts else "")
            elif len(str(value)) < 40:
                said.append(f"{NAMES[name]} ({value} for {first[name]})")
            else:
                said.append(NAMES[name])
        if said := [one for one in said if one]:
            raise InputError(f"worker {rank} differs from worker 0: other {', '.join(said)}; give all the same")


@contextmanager
def state_of(folder: RunFolder, workers: Workers, config: RunOptions) -> Iterator[RunState]:
    """The state of the run in the folder, or of one that begins.

    A worker that writes none has a record of its own, in a folder that goes with it. Where a run goes on, all do from the first
    worker's checkpoint, and from its trajectory, which is sent. Who does not see the checkpoint gets all of it but weights, which
    follow from the trajectory and the base.
    """
    with ExitStack() as held:
        if workers.first:
            state = RunState.found(folder, workers)
        else:
            own = RunFolder(held.enter_context(tempfile.TemporaryDirectory(prefix="zotune-worker-")))
            state = RunState(own, {"resumed_at": [], "wall_seconds": 0.0}, workers=workers)
        checkpoint, trajectory = workers.from_first(lambda: _goes_on_from(state))
        sees = workers.together(lambda: checkpoint is None or seen(checkpoint))
        rest = {} if all(sees) else workers.from_first(lambda: _but_weights(state.checkpoint))
        workers.together(lambda: None if workers.first else _take(state, checkpoint, trajectory, rest, config))
        yield state


def seen(checkpoint: Path) -> bool:
    """Whether this worker can read the first one's checkpoint."""
    return checkpoint.is_dir()


def _goes_on_from(state: RunState) -> tuple[Path | None, bytes | None]:
    """The checkpoint, and the trajectory."""
    file = state.folder / "trajectory.zot"
    checkpoint = None if state.checkpoint is None else state.checkpoint.absolute()
    return checkpoint, file.read_bytes() if file.exists() else None


def _but_weights(checkpoint: Path | None) -> dict[str, bytes]:
    """A checkpoint's files but those that grow with the model: weights, and what the rule keeps of each."""
    assert checkpoint is not None
    files = {
        path.name: path for path in checkpoint.iterdir() if path.is_file() and path.suffix in (".json", ".pt", ".pth")
    }
    found = {name: path.read_bytes() for name, path in files.items() if name != OPTIMIZER}
    with readable_state(str(checkpoint)):
        kept = torch.load(files[OPTIMIZER], map_location="cpu", weights_only=True) | {"state": {}}
    into = io.BytesIO()
    torch.save(kept, into)
    return found | {OPTIMIZER: into.getvalue()}


def _take(
    state: RunState, checkpoint: Path | None, trajectory: bytes | None, rest: Mapping[str, bytes], config: RunOptions
) -> None:
    if trajectory is not None:
        (state.folder / "trajectory.zot").write_bytes(trajectory)
    if checkpoint is None:
        return
    if seen(checkpoint):
        state.checkpoint = checkpoint
        norms = checkpoint.parent / CALIBRATION
        if norms.is_dir():
            shutil.copytree(norms, state.folder / CALIBRATION)
        return
    state.checkpoint = state.folder / checkpoint.name
    state.checkpoint.mkdir()
    for name, data in rest.items():
        (state.checkpoint / name).write_bytes(data)
    step = state.folder.checkpoints()[0][0]
    written = (
        readable(state.folder / "trajectory.zot", step) if trajectory is not None and retraceable(config) else None
    )
    if written is None:
        raise InputError(f"{checkpoint}: not seen by this worker; --resume needs --output on a disk that all share")
    state.rebuilt = [written.records[i] for i in range(step)]
