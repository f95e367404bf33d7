"""A run on rewards that is killed in the middle of a step goes on, and ends as if nothing had been."""

from __future__ import annotations

import json

import pytest
import tiny
from processes import zotune

from zotune.record.trajectory import read_file

# At each step that KILLS names the process is killed once, by a signal that no Python code sees.
REWARD = """
import os, signal
from pathlib import Path
def share_of_e(completions, trainer_state, **_):
    mark = Path(__file__).with_name(f"killed-{trainer_state.global_step}")
    if trainer_state.global_step in KILLS and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [text.count("e") / max(1, len(text)) for text in completions]
"""
UNTIMED = (
    "step", "loss", "lr", "sigma", "reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "validation_reward",
)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16", "temperature": "1.0"},
        {"scheme": "lora", "estimator": "two-sided", "anchor": "0.05"},
        {"groups": "batch", "method": "eggroll", "lr": "1e-3"},
    ],
    ids=["16 bits, drawn answers", "LoRA, antithetic pairs, anchored", "a direction a slot"],
)
def test_a_killed_run_on_rewards_ends_to_the_same_bits(tmp_path, changes):
    texts = ["the film", "a day", "good and", "the terrible day", "It was", "a great"]
    prompts = tiny.write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{a} {b}"} for a in texts for b in texts[:3]])
    model = tiny.save_model(tmp_path / "model")
    ends = {}
    for name, kills in (("whole", ()), ("killed", (0, 3, 4))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "reward.py").write_text(f"KILLS = {kills}\n{REWARD}")
        options = {
            "model": model, "data": prompts, "reward": f"{folder}/reward.py:share_of_e", "sigma": "5e-2", "members": 6,
            "batch_size": 3, "max_new_tokens": 5, "steps": 6, "eval_every": 3, "device": "cpu", "output": folder / "run",
        } | changes  # fmt: skip
        argv = ["reward", *(s for k, v in options.items() for s in ("--" + k.replace("_", "-"), str(v))), "--resume"]
        for _ in kills:
            assert zotune(argv, folder / "said").code == -9
        done = zotune(argv, folder / "said")
        assert done.code == 0, done.said
        ends[name] = folder / "run"
    whole, killed = ends["whole"], ends["killed"]
    for path in sorted((whole / "model").glob("*.safetensors")):
        assert path.read_bytes() == (killed / "model" / path.name).read_bytes()
    one, other = (read_file(run / "trajectory.zot") for run in (whole, killed))
    assert list(one.records) == list(other.records)
    assert one.chosen_step == other.chosen_step
    found, wanted = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (killed, whole)
    )
    assert [[line.get(name) for name in UNTIMED] for line in found] == [
        [line.get(name) for name in UNTIMED] for line in wanted
    ]
    result = json.loads((killed / "result.json").read_text())
    assert result["resumed_at"] == [3, 4]  # the first kill was before any step
    assert result["forward_passes"] == json.loads((whole / "result.json").read_text())["forward_passes"]
    shown, as_shown = ((run / "completions.jsonl").read_text() for run in (killed, whole))
    assert shown == as_shown
