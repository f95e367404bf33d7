"""A command's options from its flags and its file, and what they say together: all faults in one error, a line each."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from zotune.errors import InputError, OptionError, nearest
from zotune.files.checked import Options, fault_line, flag
from zotune.files.reading import read_yaml
from zotune.options.code import is_record, refuse_code
from zotune.options.commands import (
    WHOLE,
    DataOptions,
    EstimateConfig,
    RunOptions,
    SweepConfig,
    TrainConfig,
)
from zotune.options.defaults import by_default
from zotune.options.from_run import from_run
from zotune.options.reward import RewardConfig
from zotune.rewards import is_code
from zotune.step.choices import AUTO

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=Options)


def resolve(kind: type[T], flags: Mapping[str, Any], file: str | None) -> T:
    """The options of a command: the YAML file's, over them the flags. All errors are raised as one InputError, a line each."""
    from_file = read_yaml(file) if file else {}
    problems = [
        f"{file}: unknown key {key!r}; {nearest(key, kind.model_fields)}"
        for key in from_file
        if key not in kind.model_fields and not _of_another_command(key, kind)
    ]
    given = {key: value for key, value in from_file.items() if key in kind.model_fields}
    if file and is_record(file):
        refuse_code(file, given, flags)
    if any(_of_another_command(key, kind) for key in from_file):
        given.pop("output", None)  # the run's own folder
    given |= {key: value for key, value in flags.items() if value is not None}
    if not issubclass(kind, RunOptions) and kind is not EstimateConfig:
        given = from_run(given, kind.model_fields)
    taken = by_default(given) if kind is TrainConfig else {}
    given = taken | given
    try:
        options = kind.model_validate(given)
    except ValidationError as error:
        flagged = {key for key, value in flags.items() if value is not None}
        problems += [fault_line(e, None if e["loc"][0] in flagged else file) for e in error.errors()]
    else:
        if isinstance(options, RewardConfig):
            problems += _reward_problems(options)
        elif isinstance(options, RunOptions):
            problems += _method_problems(options)
            _say_unused(options.method, given)
            if isinstance(options, TrainConfig):
                options.note(taken)
    if issubclass(kind, DataOptions):
        problems += _data_problems(given)
    problems += _code_in(file, from_file, flags) if kind is RewardConfig else []
    if given.get("quantize") is not None and issubclass(kind, RunOptions) and given.get("scheme", "full") in WHOLE:
        problems.append(
            f"--quantize {given['quantize']}: scheme {given.get('scheme', 'full')} trains weights of the model itself; "
            "use --scheme lora, prefix or prompt"
        )
    if given.get("adapter") is not None and given.get("trajectory") is not None:
        problems.append("--adapter, --trajectory: give one of the two")
    if given.get("resume") in (True, "true") and given.get("overwrite") in (True, "true"):
        problems.append("--resume and --overwrite: choose one")
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))
    return options


def _data_problems(given: Mapping[str, Any]) -> list[str]:
    """What pydantic cannot see: options that exclude or need each other."""
    problems = []
    task, data = given.get("task"), given.get("data")
    if task is None and data is None:
        problems.append("--task, --data: give one of the two, or both: the task asks about the data's rows")
    if given.get("alignment") == "none" and task is None:
        problems.append("--alignment none: of built-in tasks; --template says how your own rows are asked")
    if given.get("subset") is not None and data is None:
        problems.append("--subset: belongs to --data; a task names its own")
    kinds = ("label_words", "choices_field", "answer_field")
    if data is not None and task is None:
        chosen = [key for key in kinds if given.get(key) is not None]
        if not given.get("template") and (
            given.get("template") is not None or {"choices_field", "answer_field"} & set(chosen)
        ):
            problems.append(
                "--template: needed with --data, such as '{text} It was' (rows of text, prompt and completion, or messages "
                "need no option)"
            )
        if len(chosen) > 1:
            problems.append("--label-words, --choices-field, --answer-field: give one of them with --data")
        if given.get("text_field") is not None:
            problems += [
                f"{flag(key)}: means nothing beside --text-field, whose text counts as it stands"
                for key in ("template", "label_field", *kinds)
                if given.get(key) is not None
            ]
        if given.get("answer_field") is not None and given.get("loss") == "candidates":
            problems.append("--loss candidates: a generated answer has none; use answer")
    elif task is not None:
        owned = ("template", "label_field", "text_field", *kinds)
        problems += [
            f"{flag(key)}: belongs to --data without --task, which brings its own"
            for key in owned
            if given.get(key) is not None
        ]
    return problems


def _reward_problems(options: RewardConfig) -> list[str]:
    try:
        return list(options.problems()) or _method_problems(options.filled)
    except OptionError as error:
        return [f"{flag(error.option)}: {error}"]


def _code_in(file: str | None, from_file: Mapping[str, Any], flags: Mapping[str, Any]) -> list[str]:
    """Functions that a file names and no flag: a run's folder is a file too, and may be a stranger's."""
    named = from_file.get("reward")
    named = named if isinstance(named, list) else [named]
    if flags.get("reward") is not None:
        return []
    return [
        f"{file}: reward {name!r:.80}: no file has code imported; where you know it, name it again by --reward {name:.80}"
        for name in named
        if isinstance(name, str) and is_code(name)
    ]


def _method_problems(options: RunOptions) -> list[str]:
    """Options that the method does not have, or that do not go together."""
    if isinstance(options, SweepConfig) and options.lr == AUTO:
        return ["--lr auto: a search tries numbers; give --lrs, or leave the search to `zotune train --lr auto`"]
    for name in ("steps", "eval_every"):
        if (getattr(options, name) or 0) % options.fold_every:
            return [
                f"{flag(name)} {getattr(options, name)}: no multiple of --fold-every {options.fold_every}; make it one"
            ]

    try:
        chosen = options.choices(options.seed, options.scheme)
    except OptionError as error:
        return [f"{flag(error.option)}: {error}"]
    except ValueError as error:
        return [f"--method: {error}"]
    if getattr(options, "calibration_rows", None) is not None and options.mask != "wanda":
        return ["--calibration-rows: means nothing without mask wanda"]
    return [f"{flag(problem.option)}: {problem}" for problem in chosen.problems()]


def _say_unused(method: str, given: Mapping[str, Any]) -> None:
    """A line for each option that is given and that the method has no use for: one set of options may serve several methods."""
    from zotune.methods import find, has_eps

    if has_eps(method):
        return
    unused = ["eps", "epses"] + (["direction", "engine"] if find(method).build().first_order else [])
    defaults = {name: field.default for name, field in SweepConfig.model_fields.items()}
    for name in unused:
        if given.get(name) is not None and given[name] != defaults[name]:
            logger.warning("%s %s: method %s does not use it", flag(name), given[name], method)


def _of_another_command(key: str, kind: type[Options]) -> bool:
    """A run's config.yaml also serves `eval` and `predict`: what only training has is passed over there."""
    return not issubclass(kind, RunOptions) and key in {**TrainConfig.model_fields, **RewardConfig.model_fields}
