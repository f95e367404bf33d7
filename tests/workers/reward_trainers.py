"""`RewardTrainer` under torchrun, where each process has prompts of its own, and alone with as many as all of theirs.

torchrun --nproc-per-node N reward_trainers.py FOLDER
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import reward_runs
import steps
import tiny

import zotune

KINDS: dict[str, dict[str, Any]] = {
    "drawn": {"temperature": 1.0},
    "rows": {"method_options": {"estimator": "two-sided"}, "groups": "batch"},
    "rate": {"learning_rate": None, "temperature": 1.0, "micro_batch": 1},
}
TIMES = ("seconds", "tokens_per_second")


def trained(folder: Path, rows: int, **options: Any) -> dict[str, Any]:
    """rows: of a step, over all processes."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    asked: list[int] = []  # how many answers each call of a function was of

    def counting(completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        asked.append(len(completions))
        return reward_runs.mean_id(completion_ids)

    given = {
        "output_dir": str(folder), "max_steps": 3, "members": 4, "sigma": 5e-2, "learning_rate": 0.05, "seed": 3,
        "max_completion_length": 4, "per_device_train_batch_size": rows // size, "logging_steps": 1, "use_cpu": True,
        "report_to": [], "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": 2, "micro_batch": 2,
    } | options  # fmt: skip
    prompts = [{"prompt": f"the film {i} was"} for i in range(12)]
    model = tiny.causal_model()
    before = steps.digest(model)
    trainer = zotune.RewardTrainer(
        model, [counting, reward_runs.missing], zotune.RewardTrainingArguments(**given), prompts, prompts[:3],
        processing_class=tiny.tokenizer(bos=True),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder / f"saved-by-{rank}"))
    after = steps.digest(model)
    assert after != before
    told = [{name: value for name, value in one.items() if name not in TIMES} for one in trainer.told.values()]
    held = [line["eval_reward"] for line in trainer.state.log_history if "eval_reward" in line]
    return {"weights": after, "told": told, "held": held, "asked": asked}


if __name__ == "__main__":
    gc.freeze()  # imports stay: the collector passes over them
    place = Path(sys.argv[1])
    found = {name: trained(place / name, 4, **options) for name, options in KINDS.items()}
    (place / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
