"""A suite: a grid over the options of `zotune train`, as YAML.

A cell takes `defaults`, over them the `rules` that match it, over them its own place in the grid. An `include` is the grid
again with some of its axes replaced; an `exclude` drops the cells that match.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from zotune.errors import InputError, nearest
from zotune.estimates.cost import forwards_a_step, forwards_of, steps_for
from zotune.files.checked import Options, Positive
from zotune.files.reading import load_yaml
from zotune.options import StepOptions, TrainConfig, resolve

Pace = Callable[[Mapping[str, Any]], tuple[str, float]]
AXES = ("model", "task", "method", "scheme", "seed")  # the axes that every run has, in the order of its name
PROBE_KEYS = ("tokens", "checkpointing", "answer_tokens")  # what a probe takes beyond the options of a run
# all that changes a step, and what it is taken with
PROBE_OPTIONS = (
    "model", "scheme", "batch_size", "dtype", "device", "steps", "seed",
    *(name for name in StepOptions.model_fields if name not in ("lr", "eps")),
)  # fmt: skip


class Budget(Options):
    """Equal for every run: forward passes, steps, or seconds of its steps alone on the device (`zotune.bench.pace`)."""

    forward_passes: Positive | None = None
    steps: Positive | None = None
    seconds: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if (self.forward_passes, self.steps, self.seconds).count(None) != 2:
            raise ValueError("give forward_passes, steps or seconds, one of the three")
        return self


class Rule(Options):
    """Where a cell matches `when` (a value, a pattern such as "fo-*", or a list of them for each key), `set` these options
    and `search` these values: every pair of lr and eps is tried, and the one best on validation is run.

    A rule's `set` may name `steps`, over the suite's budget.
    """

    when: dict[str, Any] = Field({})
    set: dict[str, Any] = Field({})
    search: dict[Literal["lr", "eps"], list[float]] = Field({})


class Search(Options):
    """How pairs of lr and eps are tried: with one seed, and with a budget of their own (default: the suite's).

    task: on which, for all tasks; by default each task has a search of its own.
    """

    budget: Budget | None = None
    seed: int = 0
    task: str | None = None


class ModelEntry(Options):
    """A model of the grid by a name of the suite's own: a hub name or folder, or a random one that is made from a config."""

    model: str | None = None
    gguf_file: str | None = None
    random: dict[str, Any] | None = Field(None, description="config of a random model, with model_type")

    @model_validator(mode="after")
    def _one(self) -> ModelEntry:
        if (self.model is None) == (self.random is None):
            raise ValueError("give model or random, one of the two")
        if self.random is not None and not isinstance(self.random.get("model_type"), str):
            raise ValueError("random: a model_type is needed, such as llama")
        return self


class Suite(Options):
    name: str
    about: str = ""
    kind: Literal["train", "probe"] = Field("train", description="runs, or a few timed steps on random weights")
    models: dict[str, ModelEntry] = Field({})
    tasks: dict[str, dict[str, Any]] = Field(
        {}, description="data by a name of the suite's own: options, or made: words"
    )
    grid: dict[str, list[Any]]
    defaults: dict[str, Any] = Field({})
    rules: list[Rule] = Field([])
    include: list[dict[str, list[Any]]] = Field([])
    exclude: list[dict[str, Any]] = Field([])
    budget: Budget
    search: Search = Search()
    missing: Literal["refuse", "skip"] = Field("refuse", description="what becomes of cells that cannot be run")
    keep_models: bool = Field(False, description="keep the trained weights of each run")

    @field_validator("grid", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return {k: _listed(v) for k, v in value.items()} if isinstance(value, Mapping) else value

    @field_validator("include", mode="before")
    @classmethod
    def _lists_too(cls, value: Any) -> Any:
        return [cls._lists(entry) for entry in value] if isinstance(value, list) else value

    def cells(self) -> Iterator[dict[str, Any]]:
        """Each cell of the grid and its includes, without the excluded, none twice: methods without eps have no such axis."""
        from zotune.methods import has_eps

        seen = set()
        replacements: list[dict[str, list[Any]]] = [{}, *self.include]
        for axes in replacements:
            given: dict[str, list[Any]] = {"scheme": ["full"], "seed": [0], **self.grid, **axes}
            grid = {axis: _all_of(axis, values) for axis, values in given.items()}
            order = [a for a in AXES if a in grid] + [k for k in grid if k not in AXES]
            for values in itertools.product(*(grid[k] for k in order)):
                cell = dict(zip(order, values, strict=True))
                if not has_eps(str(cell.get("method"))):
                    cell.pop("eps", None)
                key = repr(sorted(cell.items()))
                if key not in seen and not any(matches(pattern, cell) for pattern in self.exclude):
                    seen.add(key)
                    yield cell


@dataclass(frozen=True)
class Cell:
    """A run that a suite asks for.

    options: of `zotune train` (or of a probe), complete, without the output folder. made: what has to be made first.
    """

    name: str
    kind: str
    model: str
    task: str
    options: dict[str, Any]
    forward_passes: int
    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    suite: str = ""
    search: bool = False  # one of the pairs of lr and eps that are tried
    trial: bool = False  # and with another budget than the run that the best of them gets
    group: str = ""  # what such pairs, and the runs that wait for the best of them, have in common
    open: tuple[str, ...] = ()  # which of lr and eps the search will tell
    pace_key: str = ""  # what the pace of its steps is known by, where its budget is of seconds
    pace: float | None = None  # seconds of a step alone on the device

    def chosen(self, values: Mapping[str, float]) -> Cell:
        """The cell with what the search has found."""
        found = {key: values[key] for key in self.open}
        return replace(self, options=self.options | found, open=())


@dataclass
class Expanded:
    """The cells of a suite that can be run, and for those that cannot a reason and their number."""

    suite: Suite
    cells: list[Cell]
    left_out: dict[str, int]


def shipped() -> list[str]:
    """The suites that come with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in files("zotune.bench").joinpath("suites").iterdir()
                  if p.name.endswith(".yaml"))  # fmt: skip


def load_suite(name: str, changes: Mapping[str, Any] | None = None) -> Suite:
    """A shipped suite by name, or a YAML file. changes: `KEY → value` of --set. Raises InputError, a line a fault."""
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise InputError(f"suite {name}: no such file")
        value, where = load_yaml(path, str(path)), str(path)
    elif name in shipped():
        with as_file(files("zotune.bench").joinpath("suites", f"{name}.yaml")) as own:
            value, where = load_yaml(own, name), name
    else:
        raise InputError(f"unknown suite {name!r}; {nearest(name, shipped())}, or name a .yaml file")
    if not isinstance(value, dict):
        raise InputError(f"{where}: keys and values were expected")
    for key, given in (changes or {}).items():
        _check_change(value, key, given)
        _change(value, key, given)
    try:
        return Suite.model_validate(value)
    except ValidationError as error:
        raise InputError("\n".join(_line(where, e) for e in error.errors())) from None


def _check_change(suite: Mapping[str, Any], key: str, given: Any) -> None:
    """Raise InputError for a --set of what there is not: a suite's `missing: skip` is for what the suite itself names."""
    from zotune.registry import names

    head, _, rest = key.partition(".")
    if rest and head in ("budget", "search", "models"):
        return  # the suite's own model of these tells
    name = rest if rest and head in ("grid", "defaults") else key
    grid = suite.get("grid") or {}
    known = [*TrainConfig.model_fields, *PROBE_KEYS, *grid, "missing", "keep_models"]
    if name not in known:
        raise InputError(
            f"--set {key}: no such option; {nearest(name, [*known, 'budget.steps', 'budget.forward_passes'])}"
        )
    kinds = {"method": [*names("method"), "all"], "scheme": [*names("scheme"), "all"]}
    if suite.get("kind") != "probe":
        kinds["task"] = [*names("task"), *(suite.get("tasks") or {}), "all"]
    for value in _listed(given) if name in kinds else ():
        if value not in kinds[name] and not (name == "method" and ":" in str(value)):
            raise InputError(f"--set {key}={value}: no such {name}; {nearest(str(value), kinds[name])}")


def _change(value: dict[str, Any], key: str, given: Any) -> None:
    """--set: `budget.steps`, `search.steps`, `models.NAME` and the suite's own scalars by their place; an axis of the grid;
    else a default, over all rules.
    """
    if key == "data_dir" and value.get("kind") == "probe":
        return  # it reads no data
    head, _, rest = key.partition(".")
    if rest and head == "search":
        value[head] = {
            **value.get(head, {}),
            **({rest: given} if rest in ("seed", "task") else {"budget": {rest: given}}),
        }
    elif rest and head == "models":
        value[head] = {**value.get(head, {}), rest: {"model": given}}
    elif rest and head in ("budget", "defaults", "grid"):
        value[head] = {rest: given} if head == "budget" else {**value.get(head, {}), rest: given}
    elif key in ("missing", "keep_models"):
        value[key] = given
    elif key in AXES or key in value.get("grid", {}) or isinstance(given, list):
        value.setdefault("grid", {})[key] = given
        value["include"] = [{k: v for k, v in entry.items() if k != key} for entry in value.get("include", [])]
    else:
        value.setdefault("defaults", {})[key] = given
        value["rules"] = [*value.get("rules", []), {"set": {key: given}}]


def expand(suite: Suite, paces: Pace | None = None) -> Expanded:
    """The suite's runs. Cells that this version lacks, or whose options do not go together, are left out with a reason, or
    refused, as the suite says. paces: options of a run → what its pace is known by, and seconds a step; for budgets of seconds.
    """
    cells: list[Cell] = []
    searched: set[str] = set()
    left_out: dict[str, int] = {}
    for axes in suite.cells():
        absent = [a for a in ("model", "method") + (("task",) if suite.kind == "train" else ()) if a not in axes]
        if absent:
            raise InputError(f"suite {suite.name}: grid: no {absent[0]}")
        lacking = _lacks(suite, axes)
        if lacking and suite.missing == "refuse":
            raise InputError(f"suite {suite.name}: {lacking[0]}{lacking[1]}")
        if lacking:
            left_out[lacking[0]] = left_out.get(lacking[0], 0) + 1
            continue
        try:
            own = _at(suite, axes, searched, paces)
        except InputError as error:
            lines = str(error).splitlines()
            if suite.missing == "refuse":
                raise InputError("\n".join(f"suite {suite.name}: {_name(axes)}: {line}" for line in lines)) from None
            reason = "; ".join(lines)
            left_out[reason] = left_out.get(reason, 0) + 1
        else:
            cells += own
            searched |= {cell.group for cell in own} - {""}
    if not cells:
        said = "; ".join(left_out) or "its exclusions leave nothing"
        raise InputError(f"suite {suite.name}: no run is left ({said})")
    return Expanded(suite, cells, left_out)


def _at(suite: Suite, axes: Mapping[str, Any], searched: Collection[str], paces: Pace | None) -> list[Cell]:
    """The cell, behind the pairs of lr and eps that are tried for it unless its group has been searched."""
    values = _searched(suite, axes)
    if not values:
        return [_cell(suite, axes, paces)]
    there = dict(axes) if suite.search.task is None else {**axes, "task": suite.search.task}
    group = _name({k: v for k, v in there.items() if k != "seed"})
    waits = replace(_cell(suite, axes, paces), group=group, open=tuple(values))
    tried = []
    if group not in searched:
        for pair in itertools.product(*values.values()):
            own = {**there, "seed": suite.search.seed, **dict(zip(values, pair, strict=True))}
            cell = _cell(suite, own, paces, suite.search.budget)
            trial = cell.task != waits.task or cell.options["steps"] != waits.options["steps"]
            tried.append(replace(cell, search=True, trial=trial, group=group))
    return [*tried, waits]


def together(several: Sequence[Expanded]) -> Expanded:
    """Suites as one, in their order; a run that two of them ask for is one run."""
    first, *others = several
    if not others:
        return first
    cells: dict[str, Cell] = {}
    for cell in itertools.chain.from_iterable(one.cells for one in several):
        cells.setdefault(repr((cell.kind, sorted(cell.options.items(), key=str), cell.made, cell.open)), cell)
    left_out: dict[str, int] = {}
    for reason, count in itertools.chain.from_iterable(one.left_out.items() for one in several):
        left_out[reason] = left_out.get(reason, 0) + count
    keep = any(one.suite.keep_models for one in several)
    name = ", ".join(dict.fromkeys(one.suite.name for one in several))
    return Expanded(first.suite.model_copy(update={"name": name, "keep_models": keep}), list(cells.values()), left_out)


def matches(pattern: Mapping[str, Any], cell: Mapping[str, Any]) -> bool:
    """Whether the cell has, for each key, one of the pattern's values; a text may be a shell pattern.

    >>> matches({"method": ["fo-*"], "seed": 0}, {"method": "fo-sgd", "seed": 0})
    True
    """
    return all(
        key in cell and any(fnmatchcase(_text(cell[key]), _text(value)) for value in _listed(wanted))
        for key, wanted in pattern.items()
    )


def _options(suite: Suite, axes: Mapping[str, Any]) -> dict[str, Any]:
    options = dict(suite.defaults)
    for rule in suite.rules:
        if matches(rule.when, {**options, **axes}):
            options |= rule.set
    return {**options, **axes}


def _searched(suite: Suite, axes: Mapping[str, Any]) -> dict[str, list[float]]:
    """The values of lr and eps to try for a cell; none of those that a later rule or the grid sets, no eps where it has none."""
    from zotune.methods import has_eps

    options, values = dict(suite.defaults), dict[str, list[float]]()
    for rule in suite.rules:
        if matches(rule.when, {**options, **axes}):
            options |= rule.set
            values = {k: v for k, v in values.items() if k not in rule.set} | dict(rule.search)
    known = ("lr", "eps") if has_eps(str(axes.get("method"))) else ("lr",)
    return {k: v for k, v in values.items() if k not in axes and v and k in known}


def _lacks(suite: Suite, axes: Mapping[str, Any]) -> tuple[str, str] | None:
    """What of a cell this version lacks, and a hint."""
    from zotune.methods import find
    from zotune.registry import names

    options = _options(suite, axes)
    for kind in ("method", "scheme", "task"):
        value, known = options.get(kind), names(kind)
        if kind == "task" and (suite.kind == "probe" or value in suite.tasks):
            continue
        if kind == "method" and ":" in str(value):  # somebody's own: where it is not to be had, the reason is said
            try:
                find(str(value))
            except ValueError as error:
                return str(error), ""
        elif value is not None and value not in known:
            return f"{kind} {value!r} is not in this version", f"; {nearest(str(value), known)}"
    fields = [*TrainConfig.model_fields, *(PROBE_KEYS if suite.kind == "probe" else ())]
    for key in options:
        if key not in fields:
            return f"option {key!r} is not in this version", f"; {nearest(key, fields)}"
    return None


def _name(axes: Mapping[str, Any]) -> str:
    return " ".join(_text(v) if k in AXES[:4] else f"{k}={_text(v)}" for k, v in axes.items())


def _cell(suite: Suite, axes: Mapping[str, Any], paces: Pace | None, budget: Budget | None = None) -> Cell:
    """budget: of a search, over the suite's and what rules say of steps."""
    options = _options(suite, axes)
    made: dict[str, dict[str, Any]] = {}
    model, task = str(options["model"]), str(options.get("task") or "")
    if (entry := suite.models.get(model)) is not None:
        if entry.random is not None:
            made["model"] = entry.random
        else:
            options |= entry.model_dump(exclude={"random"}, exclude_none=True)
    if task in suite.tasks:
        del options["task"]
        given = dict(suite.tasks[task])
        if "made" in given:
            made["data"] = {"kind": given.pop("made"), **{k: given.pop(k) for k in _SIZES if k in given}}
            options["data"] = f"made:{task}"
        options = given | options
    built = {"model": {"random": made["model"]}} if "model" in made else {}  # what blocks are counted in
    cost = forwards_a_step(options | built)
    paid = budget or suite.budget
    key, pace = "", None
    if paid.steps is not None:
        steps = paid.steps
    elif paid.seconds is not None:
        if paces is None:
            raise InputError("budget.seconds: is of suites that `zotune bench run` runs; give steps or forward_passes")
        key, pace = paces(options)
        steps = max(1, int(paid.seconds / pace))
    else:
        assert paid.forward_passes is not None
        steps = steps_for(paid.forward_passes, options | built)
        if steps < 1:
            raise InputError(
                f"budget: {paid.forward_passes} forward passes pay for no step of "
                f"{options['method']} ({cost} each); raise the budget"
            )
    own = options.get("steps")
    options["steps"] = steps if own is None else int(own) if budget is None else min(int(own), steps)
    name = _name(axes)
    if suite.kind == "train":
        checked = resolve(TrainConfig, options | {"output": "-"}, None)
        options = checked.model_dump(exclude={"output", "resume", "overwrite", "dry_run"}, exclude_none=True)
    else:
        probe_config(options)
    labels = {k: v for k, v in axes.items() if k not in AXES}
    passes = forwards_of(int(options["steps"]), options | built)
    return Cell(name, suite.kind, model, task, options, passes, made, labels, suite.name, pace_key=key, pace=pace)


def probe_config(options: Mapping[str, Any]) -> TrainConfig:
    """What a probe steps by. Raises InputError for what it cannot measure, and for what does not go together."""
    for key in options:
        if key not in (*PROBE_OPTIONS, *PROBE_KEYS):
            raise InputError(f"--{key.replace('_', '-')}: a probe times a few steps on random weights and takes none")
    given = {key: value for key, value in options.items() if key in PROBE_OPTIONS and key not in ("model", "steps")}
    config = resolve(TrainConfig, given | {"model": "-", "data": "-", "output": "-"}, None)
    if options.get("checkpointing") and not config.made_method.first_order:
        raise InputError(f"--checkpointing: method {config.method!r} keeps no activations; it is for fo-*")
    return config


_SIZES = ("train", "validation", "test")


def _all_of(axis: str, values: list[Any]) -> list[Any]:
    if values != ["all"]:
        return values
    from zotune.registry import names

    return names(axis)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _line(where: str, error: Any) -> str:
    place = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        parts: dict[str, type[Options]] = {"budget": Budget, "rules": Rule, "models": ModelEntry}
        known = list((parts.get(error["loc"][0], Suite) if len(error["loc"]) > 1 else Suite).model_fields)
        return f"{where}: unknown key {place!r}; {nearest(str(error['loc'][-1]), known)}"
    return f"{where}: {place}: {error['msg'].removeprefix('Value error, ')}"
