"""lr and eps, by grid or by Optuna. Every run goes into the folder's store; validation decides, test never does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from zotune.bench.choice import goodness, outcome
from zotune.bench.plan import Plan, Run, foresee, make_plan
from zotune.bench.suite import Suite, expand
from zotune.errors import InputError
from zotune.methods import has_eps
from zotune.options import SweepConfig, TrainConfig

if TYPE_CHECKING:
    from zotune.bench.store import Store

__all__ = ["by_optuna", "outcome", "plan_of", "suite_of", "values"]

STUDY = "study.sqlite"
BETWEEN = 1.0  # a range of Optuna's spans at least so many decades to each side of a single value


def values(options: SweepConfig) -> tuple[list[float], list[float]]:
    """The learning rates and eps to try: those given, else decades around the scheme's default, and its eps."""
    from zotune.models.schemes import get_scheme

    scheme = get_scheme(options.scheme)
    lrs = options.lrs or ([options.lr] if isinstance(options.lr, float) else None)
    if lrs is None:
        low, high = min(scheme.lr, scheme.small_lr) / 10, max(scheme.lr, scheme.small_lr) * 10
        count = math.ceil(math.log10(high / low) - 1e-9)
        lrs = [float(f"{low * (high / low) ** (i / count):.1g}") for i in range(count + 1)]
    epses = options.epses or [options.eps if options.eps is not None else scheme.eps]
    return sorted(set(lrs)), sorted(set(epses)) if has_eps(options.method) else epses[:1]


def entries(options: TrainConfig) -> tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Model and task by names of a suite's own, their entries in it, and the other options that were given."""
    own = (set(type(options).model_fields) - set(TrainConfig.model_fields)) | {
        "output",
        "resume",
        "overwrite",
        "dry_run",
    }
    given = options.model_dump(exclude=own | {"lr", "eps", "seed", "steps"}, exclude_unset=True, exclude_none=True)
    given.pop("task", None)
    task = options.task
    tasks: dict[str, dict[str, Any]] = {}
    if isinstance(task, dict):
        block, task = task, str(task["name"])
        tasks[task] = {"task": block}
    elif task is None:
        assert options.data is not None
        task = Path(options.data).name or options.data
        keys = ("data", "template", "label_field", "label_words", "choices_field")
        tasks[task] = {key: given.pop(key) for key in keys if key in given}
    model = {key: given.pop(key) for key in ("model", "gguf_file") if key in given}
    name = (
        Path(model["model"]).expanduser().resolve().name
        if Path(model["model"]).expanduser().is_dir()
        else model["model"]
    )
    return name, task, {name: model}, tasks, given


def suite_of(options: SweepConfig, lrs: Sequence[float], epses: Sequence[float]) -> Suite:
    """The search as a suite: lr × eps × seeds over one configuration."""
    name, task, models, tasks, given = entries(options)
    grid = {
        "model": [name], "task": [task], "method": [given.pop("method", options.method)],
        "scheme": [given.pop("scheme", options.scheme)], "seed": options.seeds or [options.seed],
        "lr": list(lrs), "eps": list(epses),
    }  # fmt: skip
    suite = {"name": "sweep", "models": models, "tasks": tasks, "grid": grid, "defaults": given}
    return Suite.model_validate(suite | {"budget": {"steps": options.steps}})


def plan_of(
    options: SweepConfig, folder: Path, store: Store | None, lrs: Sequence[float], epses: Sequence[float]
) -> Plan:
    plan = make_plan(expand(suite_of(options, lrs, epses)), folder, store)
    foresee(plan, store)
    return plan


def by_optuna(
    options: SweepConfig,
    folder: Path,
    store: Store,
    execute: Callable[[Plan], Any],
    lrs: list[float],
    epses: list[float],
) -> list[Run]:
    """`trials` runs, each where Optuna's TPE sampler asks; the study is in a database and goes on after a kill.

    A range is that of the values given; of a single one a decade to either side. A run that fails is a failed trial.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = options.storage or f"sqlite:///{folder / STUDY}"
    try:
        study = optuna.create_study(
            study_name="lr and eps", storage=storage, direction="maximize", load_if_exists=True,
            sampler=optuna.samplers.TPESampler(seed=options.seed),
        )  # fmt: skip
    except Exception as error:  # whatever a database driver raises
        raise InputError(f"--storage {storage}: {str(error).splitlines()[0]}") from None
    waiting = optuna.trial.TrialState.RUNNING
    for killed in study.get_trials(deepcopy=False, states=(waiting,)):  # with the process that asked for them
        study.enqueue_trial(killed.params)
        study.tell(killed.number, state=optuna.trial.TrialState.FAIL)
    (lr_low, lr_high), (eps_low, eps_high) = _range(lrs), (epses[0], epses[-1])
    runs: dict[str, Run] = {}
    while True:
        finished = [t for t in study.get_trials(deepcopy=False) if "runs" in t.user_attrs]
        if len(finished) >= (options.trials or 0):
            break
        trial = study.ask()
        lr = trial.suggest_float("lr", lr_low, lr_high, log=True)
        eps = trial.suggest_float("eps", eps_low, eps_high, log=True) if eps_high > eps_low else eps_low
        # two digits: what is recorded can be typed
        plan = plan_of(options, folder, store, [float(f"{lr:.2g}")], [float(f"{eps:.2g}")])
        execute(plan)
        records = [store.get(run.key) for run in plan.runs]
        scores = [goodness(r) for r in records if r is not None and r.status == "done"]
        trial.set_user_attr("runs", [run.key for run in plan.runs])
        runs |= {run.key: run for run in plan.runs}
        if len(scores) == len(plan.runs):
            study.tell(trial, mean(scores))
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    return list(runs.values())


def _range(given: list[float]) -> tuple[float, float]:
    if given[-1] > given[0]:
        return given[0], given[-1]
    return given[0] / 10**BETWEEN, given[0] * 10**BETWEEN
