"""`zotune reward`: the run with its progress shown and its table at the end; what it would cost, without it."""

from __future__ import annotations

import time
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from zotune.cli.expected import time_of
from zotune.cli.progress import Bars
from zotune.decode import Request
from zotune.estimates.memory import keep_freed, peak_bytes, readable
from zotune.estimates.writing import cache_bytes
from zotune.models.quantized import weight_bytes
from zotune.models.schemes import trainable_parameters
from zotune.options import RewardConfig
from zotune.prepare.listener import Listener
from zotune.prepare.prompts import PreparedReward, prepare_reward, resolved_reward
from zotune.run import reward as run
from zotune.run.arguments import check_reporters
from zotune.run.folder import RunFolder
from zotune.run.result import device_name
from zotune.run.rewarding import PromptTrainer
from zotune.run.state import RunState
from zotune.tasks.metrics import figure
from zotune.workers.launcher import is_first

FEW = 8  # requests, and tokens, of the decode that is timed


def reward(config: RewardConfig) -> None:
    first = is_first()  # of the workers that torchrun has started
    if config.dry_run:
        if first:
            dry_run(config)
        return
    keep_freed()
    if not first:
        run.reward(config)
        return
    with Bars() as bars:
        result = run.reward(config, bars)
    summary(result, config.output)


def summary(result: dict[str, Any], output: str) -> None:
    table = _table()
    held = "held-out prompts" if result["test_split"] == "test" else "held-out prompts (those to choose by)"
    table.add_row("reward before", f"{figure('reward', result['reward_before'])}   on {result['test_rows']} {held}")
    early = "; stopped early" if result["stopped_early"] else ""
    table.add_row(
        "reward after",
        f"{figure('reward', result['reward_after'])}   step {result['chosen_step']} of {result['steps']}, the best{early}",
    )
    if len(result["rewards"]) > 1:
        for name, (before, after) in result["rewards"].items():
            table.add_row(Text(name), f"{figure('reward', before)} → {figure('reward', after)}")
    table.add_row("tokens an answer", f"{result['length_before']:.1f} → {result['length_after']:.1f}")
    table.add_row("answers cut", f"{100 * result['cut_before']:.0f} % → {100 * result['cut_after']:.0f} %")
    if result["steps_that_told_nothing"]:
        table.add_row("told nothing", f"{result['steps_that_told_nothing']} steps, whose members all scored alike")
    if result["skipped_steps"]:
        table.add_row("skipped steps", str(result["skipped_steps"]))
    speed = f"   {result['tokens_per_second']:,.0f} a second" if result["tokens_per_second"] else ""
    table.add_row("tokens written", f"{result['generated_tokens']:,}{speed}, decoder {result['decoder']}")
    table.add_row("wall time", f"{time_of(result['wall_seconds'])}   {result['device']}")
    table.add_row("peak memory", readable(result["peak_memory_bytes"]))
    if result["bad_rows"]:
        table.add_row("bad rows", f"{result['bad_rows']}   left out")
    table.add_row("run", output)
    Console().print(table)


def dry_run(config: RewardConfig) -> None:
    """What a run would do and cost. Writes nothing; a few tokens of a few members are timed, no reward is asked for."""
    check_reporters(config.report_to)
    folder = RunFolder(config.output)
    folder.check({}, resume=True, overwrite=False)
    ready = prepare_reward(config)
    ready.config = config = resolved_reward(config, ready.model)
    console = Console()
    console.print(Text("configuration", style="bold"))
    shown = yaml.safe_dump(config.model_dump(exclude={"dry_run"}), sort_keys=False, allow_unicode=True)
    console.print(shown, markup=False, highlight=False)
    console.print(Text("prompts as the model will see them", style="bold"))
    for prompt in ready.train[:3]:
        console.print(Text(f"{prompt.where}  {len(prompt.ids)} tokens", style="dim"))
        console.print(Text(ready.tokenizer.decode(list(prompt.ids))))
    with TemporaryDirectory() as nowhere:  # the Trainer makes its folder
        trainer = PromptTrainer(ready, RunState(RunFolder(nowhere), {}), Listener())
    seconds_token, seconds_answer = _timed(trainer, ready)
    answers = config.members * config.batch_size
    step = answers * (seconds_answer + config.max_new_tokens * seconds_token)
    evaluations = -(-config.steps // config.evaluates_every)
    scored = 2 * len(ready.test) + evaluations * len(ready.validation)
    total = config.steps * step + scored * step / answers
    lengths = [len(prompt.ids) for prompt in ready.train]
    slots = min(config.slots or getattr(trainer.decoder, "slots", answers), answers)
    weights = weight_bytes(ready.model)
    cache = cache_bytes(ready.model.config, slots, max(lengths) + config.max_new_tokens, config.dtype or "float32")
    table = _table()
    table.add_row("prompts", ready.described().removeprefix("prompts: "))
    table.add_row("tokens a prompt", f"{sum(lengths) / len(lengths):.0f} mean, {max(lengths)} most")
    if ready.bad.said:
        table.add_row("bad rows", str(ready.bad))
    table.add_row("trainable", f"{trainable_parameters(ready.model):,} parameters")
    table.add_row("decoder", f"{trainer.decoder.name}, {slots} answers at a time")
    table.add_row("a step", f"{config.members} members × {config.batch_size} prompts, {answers:,} answers")
    kept = "   and as much for what rounding takes" if config.rounding == "compensated" else ""
    table.add_row("memory", f"{readable(weights)} weights{kept}, {readable(cache)} keys and values, at most")
    table.add_row("", f"{readable(peak_bytes(ready.device))} peak so far, loading included")
    table.add_row(
        "time",
        f"{time_of(total)} at most ({step:.2f} s a step where no answer ends before {config.max_new_tokens} tokens; without the "
        f"reward functions)   {device_name(ready.device)}",
    )
    console.print(table)
    for line in run.warnings_of(ready):
        console.print(Text(line))
    console.print("nothing was written")


def _timed(trainer: PromptTrainer, ready: PreparedReward) -> tuple[float, float]:
    """Seconds of a token and of an answer's beginning, of a few answers of a few members at once: more at once take less each."""
    members = [(seed, 1) for seed in range(min(2, ready.config.members))]
    longest = sorted(ready.train, key=lambda prompt: len(prompt.ids))[-FEW:]
    requests = [Request(longest[i % len(longest)].ids, i % len(longest), i % len(members)) for i in range(FEW)]
    few = min(FEW, ready.config.max_new_tokens)
    took = []
    for tokens in (1, 1, few):  # the first time of all is of what is made once
        settings = replace(trainer.settings, max_new_tokens=tokens, ends=())
        began = time.perf_counter()
        trainer.decoder.generate(requests, members, settings=settings, seed=0, step=0)
        took.append((time.perf_counter() - began) / FEW)
    token = max(0.0, took[2] - took[1]) / max(1, few - 1)
    return token, max(0.0, took[1] - token)


def _table() -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table
