"""`zotune reward`, from the command line to its folder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import yaml

import zotune
from zotune.cli.app import run
from zotune.errors import InputError
from zotune.record.trajectory import read_file

TEXTS = ["the film", "a day", "good and", "the terrible day", "It was", "a great"]
REWARDS = """
import os
def share_of_e(completions, **_):
    return [text.count("e") / max(1, len(text)) for text in completions]
def fails(completions, trainer_state, **_):
    if trainer_state.global_step == 3 and not os.path.exists(os.environ["MENDED"]):
        raise KeyError("lost")
    return share_of_e(completions)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A model, 24 prompts, and a file of reward functions."""
    folder = tmp_path_factory.mktemp("reward")
    rows = [{"prompt": f"{TEXTS[i % 6]} {TEXTS[(5 * i + 1) % 6]}", "answer": "e"} for i in range(24)]
    (folder / "rewards.py").write_text(REWARDS)
    return tiny.save_model(folder / "model"), tiny.write_rows(folder / "prompts.jsonl", rows), folder / "rewards.py"


def flags(made: tuple[Path, Path, Path], **changes: object) -> list[str]:
    model, prompts, rewards = made
    options = {
        "model": model, "data": prompts, "reward": f"{rewards}:share_of_e", "sigma": "5e-2", "lr": "0.025", "members": 8,
        "batch_size": 4, "max_new_tokens": 6, "steps": 6, "eval_every": 2, "save_every": 2, "device": "cpu", "show": 3,
    } | changes  # fmt: skip
    return ["reward", *(s for k, v in options.items() if v is not None for s in ("--" + k.replace("_", "-"), str(v)))]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def done(made, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "done"
    assert run([*flags(made), "--output", str(output)]) == 0
    return output


def test_each_test_prompts_answers_are_kept_and_make_the_figures(done):
    rows, result = lines(done / "predictions.jsonl"), json.loads((done / "result.json").read_text())
    assert len(rows) == result["test_rows"]
    for when in ("before", "after"):
        assert sum(row[when]["score"] for row in rows) / len(rows) == pytest.approx(result[f"reward_{when}"])
        told = [row[when] for row in rows]
        assert all(
            one["score"] == one["rewards"]["share_of_e"] == one["answer"].count("e") / max(1, len(one["answer"]))
            for one in told
        )
        assert sum(one["tokens"] for one in told) / len(rows) == pytest.approx(result[f"length_{when}"])


def test_the_page_of_a_run_has_its_curves_figures_and_answers(done, tmp_path):
    pytest.importorskip("matplotlib", reason="zotune[bench] is not installed")
    assert run(["report", str(done), "--output", str(tmp_path / "page.html")]) == 0
    page, result = (tmp_path / "page.html").read_text(), json.loads((done / "result.json").read_text())
    for title in (
        "reward of the members",
        "reward, held-out prompts",
        "tokens an answer",
        "share of answers cut",
        "tokens a second",
    ):
        assert f'aria-label="{title} by step"' in page
    assert page.count("<svg") == 5
    assert f"{result['reward_before']:.4g}" in page
    assert f"{result['generated_tokens']:,} tokens" in page
    assert "zotune reward" in page
    rows = lines(done / "predictions.jsonl")
    more = sum(row["after"]["score"] > row["before"]["score"] for row in rows)
    assert ("Answers that got more: " + str(more) in page) == bool(more)


def test_a_runs_folder_holds_what_it_promises(done):
    result = json.loads((done / "result.json").read_text())
    assert result["forward_passes"] == 6 * 8
    assert result["steps"] == 6
    assert result["chosen_step"] in (2, 4, 6)
    assert math.isfinite(result["reward_before"])
    assert math.isfinite(result["reward_after"])
    assert 0 < result["generated_tokens"] <= 6 * 8 * 4 * 6
    assert result["tokens_per_second"] > 0
    assert (result["method"], result["members"], result["lr"], result["sigma"]) == ("es", 8, 0.025, 0.05)
    assert result["resumed_at"] == []
    logged = lines(done / "metrics.jsonl")
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "reward", "reward_std", "frac_reward_zero_std", "rewards/share_of_e/mean", "sigma"} <= set(
        logged[0]
    )
    assert logged[1]["validation_reward"] >= 0
    shown = lines(done / "completions.jsonl")
    assert {one["step"] for one in shown} == {1, 2, 4, 6}
    assert [one["reward"] for one in shown if one["step"] == 2] == sorted(
        one["reward"] for one in shown if one["step"] == 2
    )
    assert (done / "model" / "README.md").read_text().count("zotune reward") == 1


def test_the_trajectory_has_each_members_reward_and_rebuilds_the_model(made, done, tmp_path):
    trajectory = read_file(done / "trajectory.zot")
    logged = lines(done / "metrics.jsonl")
    for record, line in zip(trajectory.records, logged, strict=True):
        assert len(record.rewards) == 8
        assert sum(record.rewards) / 8 == pytest.approx(line["reward"], abs=1e-6)
    argv = ["replay", "--model", str(made[0]), "--trajectory", str(done / "trajectory.zot")]
    assert run([*argv, "--output", str(tmp_path / "again")]) == 0
    again, kept = (folder / "model.safetensors" for folder in (tmp_path / "again", done / "model"))
    assert again.read_bytes() == kept.read_bytes()


def test_a_function_that_fails_ends_the_run_which_goes_on_when_it_is_mended(made, done, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MENDED", str(tmp_path / "mended"))
    argv = [*flags(made, reward=f"{made[2]}:fails"), "--output", str(tmp_path / "run")]
    assert run(argv) == 1
    error = capsys.readouterr().err
    assert "reward fails: KeyError ('lost'), for " in error
    assert "prompts.jsonl:" in error
    assert "Traceback" not in error
    (tmp_path / "mended").touch()
    assert run([*argv, "--resume"]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["resumed_at"] == [3]
    again, kept = (folder / "model" / "model.safetensors" for folder in (tmp_path / "run", done))
    assert again.read_bytes() == kept.read_bytes()
    for name in ("reward", "loss", "frac_reward_zero_std", "completions/mean_length"):
        found, wanted = (
            [line[name] for line in lines(folder / "metrics.jsonl")] for folder in (tmp_path / "run", done)
        )
        assert found == wanted


def test_no_file_has_a_reward_imported(made, done, capsys):
    config = yaml.safe_load((done / "config.yaml").read_text())
    assert config["reward"] == [f"{made[2]}:share_of_e"]
    assert run(["reward", "--config", str(done / "config.yaml"), "--output", str(done), "--resume"]) == 2
    assert "no file has code imported" in capsys.readouterr().err
    argv = ["reward", "--config", str(done / "config.yaml"), "--output", str(done), "--resume"]
    assert run([*argv, "--reward", f"{made[2]}:share_of_e"]) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_other_rewards_or_prompts_are_not_resumed(made, done, capsys, tmp_path):
    assert run([*flags(made, reward="json"), "--output", str(done), "--resume"]) == 2
    assert "holds a run of other options (reward was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eps": "1e-3"}, "--eps 0.001: of rewards it is --sigma"),
        ({"queries": 4}, "--queries 4: of rewards it is --members"),
        ({"reward": None}, "--reward: required, what answers are worth"),
        ({"data": None}, "--data: required, the prompts"),
        ({"reward_weights": "[1, 2]"}, "--reward-weights: 2 of them for 1 reward functions"),
        ({"members": 1}, "--members: '1' should be greater than or equal to 2"),
        ({"members": 5, "estimator": "two-sided"}, "--members: members=5: of antithetic pairs; give an even number"),
        ({"top_k": 5}, "--top-k: nothing is drawn at temperature 0"),
        ({"reward": "exact-macth"}, "--reward exact-macth: did you mean 'exact-match'"),
        ({"reward": "no.module:here"}, "--reward no.module:here: cannot be imported"),
        ({"sparsity": "0.5"}, "--sparsity 0.5: members are perturbed in all that trains"),
        ({"template": "{nothing}"}, "no field 'nothing'"),
        ({"columns": '{"answer": "prompt"}'}, "would overwrite the field 'prompt'"),
        ({"chat": ""}, "no chat template"),
        ({"engine": "sequental"}, "did you mean 'sequential'"),
        ({"method": "zo-adam"}, "use groups=1 and engine='auto'"),
        ({"method": "fo-sgd"}, "perturbs no models"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(made, tmp_path, capsys, changes, said):
    argv = flags(made, **changes)
    if "chat" in changes:
        argv.remove("")
    assert run([*argv, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(made, tmp_path, capsys):
    assert run([*flags(made), "--output", str(tmp_path / "run"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    for word in (
        "prompts as the model will see them",
        "8 members × 4 prompts, 32 answers",
        "keys and values",
        "s a step",
    ):
        assert word in told
    assert not (tmp_path / "run").exists()


def test_lora_trains_on_rewards_and_antithetic_pairs_in_16_bits_replay(made, tmp_path):
    changes = {
        "scheme": "lora",
        "estimator": "two-sided",
        "dtype": "bfloat16",
        "anchor": "0.05",
        "steps": 3,
        "eval_every": 3,
    }
    argv = flags(made, **changes)
    assert run([*argv, "--output", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").exists()
    replay = ["replay", "--model", str(made[0]), "--trajectory", str(tmp_path / "run" / "trajectory.zot")]
    assert run([*replay, "--output", str(tmp_path / "again")]) == 0
    again, kept = (folder / "adapter_model.safetensors" for folder in (tmp_path / "again", tmp_path / "run" / "model"))
    assert again.read_bytes() == kept.read_bytes()


def test_the_function_is_the_command_on_rows_and_rewards_in_memory(made, tmp_path):
    rows = [json.loads(line) for line in made[1].read_text().splitlines()]

    def share_of_e(completions, **_):
        return [text.count("e") / max(1, len(text)) for text in completions]

    options = {
        "model": str(made[0]), "sigma": 5e-2, "members": 8, "batch_size": 4, "max_new_tokens": 6, "steps": 2, "eval_every": 1,
        "device": "cpu",
    }  # fmt: skip
    result = zotune.reward(
        data=rows, reward=[share_of_e, "length:6"], output=tmp_path / "run", reward_weights=[1, 0.5], **options
    )
    assert set(result["rewards"]) == {"share_of_e", "length:6"}
    with pytest.raises(InputError, match="reward"):
        zotune.reward(data=rows, reward=3, output=tmp_path / "other", **options)
