"""The page of one run, or of some beside each other: one file that needs nothing else."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

import zotune
from zotune.bench.figures import drawing
from zotune.bench.pages import template
from zotune.errors import InputError
from zotune.estimates.memory import readable
from zotune.estimates.words import time_of
from zotune.options import RewardConfig, TrainConfig
from zotune.reports.facts import Facts
from zotune.reports.figures import curves
from zotune.run.card import command

SHOWN = 10  # rows that changed, each way
ROWS = {"train": "train on", "validation": "choose by", "test": "test on"}


def make_page(folders: Sequence[Path], target: Path, names: Sequence[str] | None = None) -> Path:
    """The page of these finished runs. names: what they are called [as their folders]. Raises InputError for one that is none."""
    if target.is_dir():
        raise InputError(f"--output {target}: is a folder; name an .html file")
    runs = [Facts.read(folder) for folder in folders]
    names = names or [folder.name or str(folder) for folder in folders]
    names = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    with drawing.style():
        drawn = [
            (title, Markup(drawing.as_svg(figure, f"curve{i}", f"{title} by step")))
            for i, (title, figure) in enumerate(curves(runs, names))
        ]
    text = template("run.html.j2", "zotune.reports").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        made=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=zotune.__version__,
        runs=[(name, run, _told(run)) for name, run in zip(names, runs, strict=True)],
        curves=drawn,
        rewarded=all(run.rewarded for run in runs),
        shown=SHOWN,
    )
    target.write_text(text, encoding="utf-8")
    return target


def _told(run: Facts) -> dict[str, Any]:
    """What the page says of a run, in words."""
    r, c = run.result, run.config
    spans = {when: run.interval(when) for when in ("before", "after")}
    return {
        "figures": {
            when: run.shown(run.value(when)) + (f" ({_range(run, span)})" if (span := spans[when]) else "")
            for when in ("before", "after")
        },
        "facts": [(key, value) for key, value in _facts(run) if value not in (None, "", "–")],
        "bars": _bars(run, spans),
        "mended": run.changed(better=True),
        "spoilt": run.changed(better=False),
        "matrices": [(when, matrix) for when in ("before", "after") if (matrix := run.confusion(when)) is not None],
        "time": time_of(r.get("wall_seconds") or 0.0),
        "command": command((RewardConfig if run.rewarded else TrainConfig).model_construct(**c)),
    }


def _range(run: Facts, span: tuple[float, float]) -> str:
    return " to ".join(f"{bound:.3f}" if run.rewarded else f"{bound:.1f}" for bound in span)


def _facts(run: Facts) -> list[tuple[str, Any]]:
    return _of_rewards(run) if run.rewarded else _of_task(run)


def _rows(result: Mapping[str, Any]) -> str:
    """How many for what; where there is no test split, those to choose by are scored, and are no others."""
    some = [what for what in ROWS if what != "test" or result.get("test_split") in (None, "test")]
    counts = [f"{result.get(f'{what}_rows', '–')} to {ROWS[what]}" for what in some]
    return ", ".join(counts + ["none to test on"] * (len(some) < len(ROWS)))


def _of_rewards(run: Facts) -> list[tuple[str, Any]]:
    r, c = run.result, run.config
    functions = [f"{name} {a:.3g} → {b:.3g}" for name, (a, b) in r.get("rewards", {}).items()]
    drawn = f"temperature {c.get('temperature')}" if c.get("temperature") else "the likeliest token"
    alike = r.get("steps_that_told_nothing")
    return [
        ("model", r.get("model")),
        ("prompts", f"{r.get('task')}: {_rows(r)}"),
        ("rewards, before → after", ", ".join(functions)),
        ("method", f"{r.get('method')}, {r.get('members')} members, sigma {r.get('sigma'):.3g}, lr {r.get('lr'):.3g}"),
        ("trained", f"{r.get('trainable_parameters', 0):,} parameters (scheme {r.get('scheme')}), {r.get('dtype')}"),
        (
            "steps",
            f"{r.get('steps'):,}, {c.get('batch_size')} prompts each; kept: step {r.get('chosen_step')}, best on held-out prompts",
        ),
        ("told nothing", f"{alike} steps, whose members all scored alike" if alike else None),
        ("answers", f"at most {c.get('max_new_tokens')} tokens, {drawn}"),
        ("tokens an answer", f"{r['length_before']:.1f} before, {r['length_after']:.1f} after"),
        ("answers cut", f"{100 * r['cut_before']:.0f} % before, {100 * r['cut_after']:.0f} % after"),
        ("written", f"{r.get('generated_tokens', 0):,} tokens, {r.get('tokens_per_second') or 0:,.0f} a second"),
        ("decoder", r.get("decoder")),
        ("time", f"{time_of(r.get('wall_seconds') or 0.0)} on {r.get('device')}"),
        ("peak memory", readable(r["peak_memory_bytes"]) if r.get("peak_memory_bytes") else None),
        ("skipped steps", r.get("skipped_steps") or None),
        ("versions", ", ".join(f"{k} {v}" for k, v in (r.get("versions") or {}).items())),
    ]  # fmt: skip


def _of_task(run: Facts) -> list[tuple[str, Any]]:
    r, c = run.result, run.config
    peak, adam = r.get("peak_memory_bytes"), r.get("adam_memory_bytes")
    best = r.get("validation_best")
    return [
        ("model", r.get("model")),
        ("task", r.get("task")),
        ("template", c.get("template")),
        ("rows", _rows(r)),
        ("method", _method(run)),
        ("trained", f"{r.get('trainable_parameters', 0):,} parameters (scheme {r.get('scheme')}), {r.get('dtype')}"),
        (
            "steps",
            f"{r.get('steps'):,}, batch {c.get('batch_size')}; kept: step {r.get('chosen_step')}, best on validation",
        ),
        (
            "validation",
            f"{run.shown(r.get('validation_before'))} before, {run.shown(best)} at best" if best is not None else None,
        ),
        ("always one class", run.shown(r["one_class"]) if r.get("one_class") else None),
        ("forward passes", f"{r.get('forward_passes', 0):,}"),
        ("time", f"{time_of(r.get('wall_seconds') or 0.0)} on {r.get('device')}"),
        ("peak memory", f"{readable(peak)}; with Adam {readable(adam)} (computed)" if peak and adam else None),
        ("skipped steps", r.get("skipped_steps") or None),
        ("versions", ", ".join(f"{k} {v}" for k, v in (r.get("versions") or {}).items())),
    ]


def _method(run: Facts) -> str:
    """Of methods that draw directions, these and eps too."""
    r = run.result
    drawn = (
        ""
        if str(r.get("method")).startswith("fo-")
        else f", {run.config.get('direction')} directions, eps {r.get('eps')}"
    )
    return f"{r.get('method')}, lr {r.get('lr')}{drawn}"


def _bars(run: Facts, spans: dict[str, tuple[float, float] | None]) -> list[dict[str, Any]]:
    """Before and after as bars from 0 to 100, with the interval; [] where the metric is neither a percentage nor from 0 to 1."""
    if any(spans[when] is None for when in spans):
        return []
    return [
        {
            "name": when,
            **{key: 100 / run.unit * x for key, x in (("value", value), ("low", span[0]), ("high", span[1]))},
        }
        for when, span in spans.items()
        if span is not None and (value := run.value(when)) is not None
    ]
