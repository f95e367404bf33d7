"""A run's folder where a model is asked for: base, adapter, task and template are those of its config.yaml. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zotune.errors import InputError
from zotune.files.reading import read_yaml
from zotune.options.code import refuse_code

ADAPTERS = ("lora", "prefix", "prompt")  # schemes whose model is an adapter beside its base
TASKS = (
    "template",
    "text_field",
    "label_field",
    "label_words",
    "choices_field",
    "answer_field",
)  # of own rows, without a task
WEIGHTS = ("gguf_file", "quantize")  # of the base; a whole model that was trained has neither


def from_run(given: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The options with those of the run that `model` names where they say nothing; as they are where it names none.

    known: the command's options by name; others of the run are left out. Raises InputError for a run without a model yet, and
    one without an adapter where one has to be named.
    """
    name = given.get("model")
    folder = Path(name).expanduser() if isinstance(name, str) else None
    if folder is None or not (folder / "config.yaml").is_file() or (folder / "config.json").is_file():
        return dict(given)
    if not (folder / "model").is_dir():
        raise InputError(f"--model {name}: a run without a model yet; go on with it by --resume")
    run = {key: value for key, value in read_yaml(str(folder / "config.yaml"), "--model").items() if value is not None}
    whole = run.get("scheme", "full") not in ADAPTERS
    if whole and "adapter" in known and known["adapter"].is_required() and "adapter" not in given:
        raise InputError(
            f"--model {name}: a run of scheme {run.get('scheme', 'full')}, whose model {folder / 'model'} is whole already"
        )
    own = {"model": str(folder / "model")} if whole else {"model": run.get("model"), "adapter": str(folder / "model")}
    left = {"output", "resume", "overwrite", "dry_run", "seed", *(WEIGHTS if whole else ())}
    if "task" in given:  # asks about other rows, in its own words
        left |= {"data", "data_dir", "columns", "subset", *TASKS}
    elif any(key in given for key in TASKS):
        left |= {"task", *TASKS}
    if "data" in given:
        left |= {"columns", "subset", "data_dir"}
        own_seed = {}
    else:
        own_seed = {"seed": run["seed"]} if "seed" in run and "seed" in known else {}  # which rows are its test rows
    if str(run.get("data", "")).startswith("rows-") and not Path(str(run.get("data"))).exists():
        left.add("data")  # they were in memory
    if "adapter" in given or "trajectory" in given:
        own.pop("adapter", None)
    taken = {key: value for key, value in run.items() if key in known and key not in left}
    refuse_code(f"--model {name}", taken, given)
    return taken | own_seed | {**given, **own}
