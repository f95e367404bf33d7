"""Runs of `zotune.reward` that workers take together, one after the other, and what each worker saw of them, as JSON.

torchrun --nproc-per-node N reward_runs.py FOLDER      FOLDER has model and prompts.jsonl
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import runs

import zotune

PLAIN: dict[str, dict[str, Any]] = {
    "drawn": {"micro_batch": 1, "temperature": 1.0, "lr": "auto"},
    "rows": {"micro_batch": 2, "groups": "batch", "estimator": "two-sided"},
    "dense": {"micro_batch": 2, "engine": "sequential", "anchor": 0.1},
}


def options_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(folder / "model"), "data": str(folder / "prompts.jsonl"), "reward": [mean_id, missing], "sigma": 5e-2,
        "lr": 0.05, "members": 4, "batch_size": 4, "steps": 5, "eval_every": 2, "max_new_tokens": 4, "device": "cpu",
    } | changes  # fmt: skip


def mean_id(completion_ids: Any, **_: Any) -> list[float]:
    return [sum(ids) / max(1, len(ids)) for ids in completion_ids]


def missing(completion_ids: Any, **_: Any) -> list[float | None]:
    return [None if sum(ids) % 3 == 0 else len(set(ids)) for ids in completion_ids]


def fails(prompts: Any, **_: Any) -> list[float]:
    if any("2" in text for text in prompts):
        raise KeyError("no gold")
    return [float(i) for i, _ in enumerate(prompts)]


run = functools.partial(runs.run, call=zotune.reward, options=options_of)


def main(folder: Path) -> dict[str, Any]:
    rank = int(os.environ["RANK"])
    found = {name: run(folder, name, rank, {}, **options) for name, options in PLAIN.items()}
    found["options"] = run(folder, "wrong-options", rank, {"max_new_tokens": 5}, micro_batch=2)
    found["whole"] = run(folder, "wrong-whole", rank, {})
    found["few"] = run(folder, "wrong-few", rank, {}, micro_batch=4)
    found["fails"] = run(folder, "fails", rank, {}, micro_batch=1, reward=[fails], eval_every=50)
    return found


if __name__ == "__main__":
    import reward_runs  # whose functions have the names that they have elsewhere

    place = Path(sys.argv[1])
    (place / f"{os.environ['RANK']}.json").write_text(json.dumps(reward_runs.main(place)))
