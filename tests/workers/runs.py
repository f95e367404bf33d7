"""Runs of `zotune.train` that workers take together, one after the other, and what each worker saw of them, as JSON.

torchrun --nproc-per-node N runs.py FOLDER      FOLDER has model, other (a model), data and fewer (data)
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tiny
import torch

import zotune
from zotune.prepare.listener import Listener
from zotune.run import together
from zotune.step import pieces
from zotune.step.optimizer import ZeroOrderOptimizer
from zotune.workers.group import exit_code

WORDS = json.loads(tiny.WORDS)


def options_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(folder / "model"), "data": str(folder / "data"), "template": tiny.TEMPLATE, "label_words": WORDS,
        "steps": 6, "eval_every": 2, "log_every": 1, "batch_size": 4, "lr": 1e-2, "device": "cpu", "micro_batch": 1,
    } | changes  # fmt: skip


PLAIN: dict[str, dict[str, Any]] = {
    "sgd": {"lr_schedule": "linear"},
    "rows": {"scheme": "lora", "groups": "batch", "queries": 2, "micro_batch": 2},
    "adam": {"method": "zo-adam", "lr": 1e-3, "accumulate": 2, "weight_decay": 0.1, "batch_size": 3, "micro_batch": 2},
}


# Runs that stop, and go on where the second worker sees no checkpoint.
UNSEEN: dict[str, dict[str, Any]] = {
    "unseen": {"method": "zo-adam", "lr": 1e-3, "accumulate": 2},
    "unseen folds": {"scheme": "lora", "fold_every": 3, "eval_every": 3, "lr_schedule": "linear"},
    "unseen rows": {"method": "own-inputs", "queries": 2},
}


@contextlib.contextmanager
def at_step(step: int, do: Callable[[ZeroOrderOptimizer], None]) -> Iterator[None]:
    """Before the optimizer takes the step."""
    take = ZeroOrderOptimizer.step

    def new(optimizer: Any, closure: Any = None, **named: Any) -> Any:
        if closure is not None and optimizer.steps == step:
            do(optimizer)
        return take(optimizer, closure, **named)

    ZeroOrderOptimizer.step = new  # type: ignore[method-assign]
    try:
        yield
    finally:
        ZeroOrderOptimizer.step = take  # type: ignore[method-assign]


def touch(optimizer: ZeroOrderOptimizer) -> None:
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].view(-1)[3] += 1e-3


def no_memory(optimizer: ZeroOrderOptimizer) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    optimizer.engine.losses = full


def terminate(optimizer: ZeroOrderOptimizer) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Said(Listener):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def run(
    folder: Path,
    name: str,
    rank: int,
    mine: dict[str, Any],
    when: Any = None,
    *,
    call: Any = zotune.train,
    options: Any = options_of,
    **changes: Any,
) -> dict[str, Any]:
    """mine: what the second worker alone is told. call: zotune.train or zotune.reward, with its options."""
    said = Said()
    given = options(folder, **(changes | (mine if rank == 1 else {})))
    try:
        with when if when is not None and rank == 1 else contextlib.nullcontext():
            result = call(output=str(folder / name), listener=said, **given)
    except Exception as error:
        return {"code": exit_code(error), "kind": type(error).__name__, "message": str(error), "said": said.lines}
    return {"code": 0, "steps": result["steps"], "said": said.lines}


def main(folder: Path) -> dict[str, Any]:
    rank = int(os.environ["RANK"])
    found = {name: run(folder, name, rank, {}, **options) for name, options in PLAIN.items()}
    for name, options in UNSEEN.items():
        run(folder, name, rank, {}, at_step(3, terminate), **options)
        sees, together.seen = together.seen, lambda checkpoint: rank == 0
        found[name] = run(folder, name, rank, {}, resume=True, **options)
        together.seen = sees
    found["stopped"] = run(folder, "stopped", rank, {}, at_step(3, terminate))
    found["options"] = run(folder, "wrong-options", rank, {"lr": 0.5})
    found["data"] = run(folder, "wrong-data", rank, {"data": str(folder / "fewer")})
    found["base"] = run(folder, "wrong-base", rank, {"model": str(folder / "other")})
    found["few"] = run(folder, "wrong-few", rank, {}, micro_batch=4)
    found["whole"] = run(folder, "wrong-whole", rank, {}, micro_batch=None)
    found["first order"] = run(folder, "wrong-first-order", rank, {}, method="fo-sgd", micro_batch=None)
    found["streams"] = run(folder, "wrong-streams", rank, {}, max_gpu_memory="6GiB")
    found["taken"] = run(folder, "sgd", rank, {})
    found["memory"] = run(folder, "memory", rank, {}, at_step(2, no_memory))
    pieces.EVERY = 2
    found["touched"] = run(folder, "touched", rank, {}, at_step(3, touch))
    return found


if __name__ == "__main__":
    gc.freeze()  # imports stay: the collector, which each run calls, passes over them
    place = Path(sys.argv[1])
    (place / f"{os.environ['RANK']}.json").write_text(json.dumps(main(place)))
