"""The model card of a run."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from zotune.methods import make_method
from zotune.options import RewardConfig, RunOptions, TrainConfig
from zotune.options.step import own_of
from zotune.record.trajectory import Header
from zotune.tasks import Task
from zotune.tasks.metrics import figure


def reward_card(config: RewardConfig, result: Mapping[str, Any], trajectory: bool) -> ModelCard:
    """The same of a run on rewards, of its model or of its trajectory."""
    library = "zotune" if trajectory else "peft" if config.scheme in ("lora", "prefix", "prompt") else "transformers"
    before, after = (figure("reward", result[when]) for when in ("reward_before", "reward_after"))
    steps = f"{result['steps']}, {config.batch_size} prompts each, {result['generated_tokens']:,} tokens written"
    text = f"""# {Path(config.model).name}, trained on rewards without back-propagation

| | |
|---|---|
| base model | {config.model} |
| prompts | {config.data} |
| rewards | {_cell(", ".join(result["rewards"]))} |
| method | {config.method}, {config.members} members, sigma {config.sigma}, lr {result["lr"]:.3g}, scheme {config.scheme} |
| steps | {steps}; kept: step {result["chosen_step"]} |
| reward, {result["test_rows"]} held-out prompts | {before} before, {after} after |
| answers | at most {config.max_new_tokens} tokens, temperature {config.temperature} |
| device, dtype | {result["device"]}, {config.dtype} |

Made by [zotune](https://pypi.org/project/zotune/) {result["versions"]["zotune"]}:

```
{command(config)}
```
"""
    return ModelCard(_front(config, library) + text + (_rebuilding(config) if trajectory else ""))


def model_card(config: TrainConfig, task: Task, result: Mapping[str, Any]) -> ModelCard:
    """What was trained, on what, how, with which outcome, and the command that does it again."""
    library = "peft" if config.scheme in ("lora", "prefix", "prompt") else "transformers"
    return ModelCard(_front(config, library) + _run(config, task, result))


def trajectory_card(config: TrainConfig, task: Task, result: Mapping[str, Any]) -> ModelCard:
    """The same of a run's trajectory, and how the model is had from it."""
    folder = (
        "\nThe masks of this run need the folder `calibration/` beside the file.\n" if config.mask == "wanda" else ""
    )
    if make_method(config.method).needs_rows:
        text = f"\n`trajectory.zot` holds the steps of the run. Those of {config.method} need its rows too: they give no weights.\n"
        return ModelCard(_front(config, "zotune") + _run(config, task, result) + text)
    return ModelCard(_front(config, "zotune") + _run(config, task, result) + _rebuilding(config) + folder)


def _rebuilding(config: RunOptions) -> str:
    model = shlex.quote(config.model) + (f" --gguf-file {shlex.quote(config.gguf_file)}" if config.gguf_file else "")
    return f"""
The fine-tune is `trajectory.zot`: the steps of the run, a few bytes each. With the base model it gives the weights again:

```
zotune replay --model {model} --trajectory trajectory.zot --output model
```
"""


def rebuilt_card(header: Header, line: str) -> ModelCard:
    """Of a model that a replay has made: what its trajectory says of the run, which may be a stranger's."""
    options = ", ".join(f"{key} {value}" for key, value in sorted(header.method_options.items()))
    rows = {
        "base model": header.base.get("name"),
        "task": header.task,
        "method": f"{header.method}, {header.direction} directions, scheme {header.base.get('scheme')}; {options}",
        "steps": header.planned_steps,
        "seed, dtype": f"{header.seed}, {header.dtype}",
        "device": (header.base.get("machine") or {}).get("device"),
        "command": header.extra.get("command"),
    }
    table = "".join(f"| {key} | {_cell(value)} |\n" for key, value in rows.items() if value)
    text = f"# Rebuilt from a trajectory\n\n{_plain(line)}.\n\n| | |\n|---|---|\n{table}"
    return ModelCard(f"---\ntags:\n- zotune\n- zeroth-order\n---\n\n{text}")


def _front(config: RunOptions, library: str) -> str:
    data = ModelCardData(
        library_name=library,
        tags=["zotune", "zeroth-order", config.method],
        base_model=None if Path(config.model).exists() else config.model,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _run(config: TrainConfig, task: Task, result: Mapping[str, Any]) -> str:
    words = _row(", ".join(f"{label} → {word}" for label, word in (task.words or {}).items()))
    rows, steps = result["test_rows"], f"{result['steps']}, batch {config.batch_size}"
    before, after = (figure(task.metric, result[when]) for when in ("test_before", "test_after"))
    one_class = f"; one class always: {result['one_class']:.1f}" if result["one_class"] else ""
    split = "held-out test" if result["test_split"] == "test" else "validation"
    return f"""# {Path(config.model).name}, fine-tuned on {task.name} without back-propagation

| | |
|---|---|
| base model | {config.model} |
| task | {task.name}: {_asked(task)}{f" ({words})" if words else ""} |
| method | {config.method}, {config.direction} directions, scheme {config.scheme}, lr {config.lr}, eps {config.eps} |
| steps | {steps}, {result["forward_passes"]} forward passes; kept: step {result["chosen_step"]} |
| {task.metric}, {split} | {before} before, {after} after ({rows} rows{one_class}) |
| device, dtype | {result["device"]}, {config.dtype}{f", base in {config.quantize}" if config.quantize else ""} |

Made by [zotune](https://pypi.org/project/zotune/) {result["versions"]["zotune"]}:

```
{command(config)}
```
"""


def _asked(task: Task) -> str:
    """On one line of a table, whatever the template's own lines."""
    return _code(str(task.prompt)) if task.ask is None else " ".join(task.asked.split())


def _code(text: str) -> str:
    """A span of code in a cell: line ends and bars are written out, and a fence is longer than any within."""
    text = _row(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _plain(text: str) -> str:
    """Without what Markdown or HTML would take for more than text."""
    return html.escape(re.sub(r"([\\`*_\[\]|])", r"\\\1", text), quote=False)


def _row(text: str) -> str:
    """What a user wrote, within a cell of a table."""
    return text.replace("\n", "\\n").replace("|", "\\|")


def _cell(value: object) -> str:
    return _plain(" ".join(str(value).replace("\\\n", " ").split()))[:4000]


def command(config: RunOptions, without: Collection[str] = ()) -> str:
    """The `zotune train` or `reward` command that describes the same run. without: keys to leave out."""
    defaults = type(config).model_construct(**{name: own_of(config.method, name) for name in ("groups", "rank")})
    reward = isinstance(config, RewardConfig)
    without = {*without, *(("eps", "queries") if reward else ())}
    parts = ["zotune reward" if reward else "zotune train"]
    for key, value in config.model_dump(exclude={"resume", "overwrite", "dry_run"}).items():
        if key in without or value is None or value == getattr(defaults, key, None):
            continue
        if key == "reward":
            parts += [f"--reward {shlex.quote(one)}" for one in value]
            continue
        if key == "reward_weights":
            value = json.dumps(value, allow_nan=False)
        text = ",".join(value) if isinstance(value, list) else str(value)
        text = json.dumps(value, allow_nan=False) if isinstance(value, dict) else text
        parts.append(f"--{key.replace('_', '-')}" + ("" if value is True else f" {shlex.quote(text)}"))
    return " \\\n  ".join(parts)
