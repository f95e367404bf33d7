"""What a benchmark's runs say of what others have said: the positions of the authors of the study, and published claims.

The authors of arXiv 2402.11592 ask, in "Zeroth-order optimization is underexplored, not underpowered" (arXiv 2605.15622, its
abstract), for methods in subspaces and spectral ones that scale with queries, for forward-only pipelines and communication, and for
evaluations freed from task alignment and task complexity. Each is answered by figures of the store, or it is said that these runs
do not answer it. Two methods are compared seed by seed, on the same model, task and scheme.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

import pandas as pd

from zotune.bench.curves import reached
from zotune.bench.findings import paired_half
from zotune.bench.frame import percentage
from zotune.tasks.metrics import figure
from zotune.tasks.task import LOWER_IS_BETTER

SOURCE = "arXiv 2605.15622"
OPEN = "Not answered by these runs"
PLAIN, FIRST_ORDER = "zo-sgd", ("fo-sgd", "fo-adam")
SUBSPACE = ("lozo-m", "subzero-plus", "zo-act", "aim-zo")  # directions that stay in one, or follow a basis that is kept
SPECTRAL = "zo-muon"
UNSURE = "cannot be told"
FEW = 3  # differences of a sentence


@dataclass(frozen=True)
class Answer:
    """to: what was asked for, or claimed. said: in sentences, by the figures. verdict: of a claim, in a word or two."""

    to: str
    said: str
    verdict: str = ""


@dataclass(frozen=True)
class Claim:
    """`better` beats `other`, or is as good, by as many `at`: "seconds" of steps, the test score of runs that had as many, or
    forward "passes".
    """

    source: str
    better: str
    other: str
    at: str = "passes"
    as_good: bool = False

    def __str__(self) -> str:
        by = "forward passes" if self.at == "passes" else "seconds"
        return f"{self.source}: {self.better} {'is as good as' if self.as_good else 'beats'} {self.other} at equal {by}"


# Of methods that are there beside what their authors compare them with; the last three were read second hand.
CLAIMS = (
    Claim("FZOO, arXiv 2506.09034", "fzoo", PLAIN),
    Claim("AIM-ZO: leave-one-out over two-sided estimates", "leave-one-out", PLAIN),
    Claim("AIM-ZO", "aim-zo", PLAIN),
    Claim("AIM-ZO", "aim-zo", SPECTRAL),
    Claim("ZO-Muon, arXiv 2602.17155", SPECTRAL, PLAIN),
    Claim("LOZO-M, arXiv 2410.07698", "lozo-m", PLAIN),
    Claim("SubZero+, arXiv 2608.15665", "subzero-plus", PLAIN),
    Claim("ZO-Act, arXiv 2607.01125", "zo-act", PLAIN),
    Claim("GRZO, arXiv 2606.02857", "grzo", PLAIN),
    Claim("MEAZO, arXiv 2605.03869: one number for Adam's moments", "meazo", "zo-adam", as_good=True),
)


@dataclass(frozen=True)
class Difference:
    """Of one method's scores and another's, on a model and task: positive where the first is better."""

    where: str
    first: float
    second: float
    moved: tuple[float, ...]
    metric: str
    at: str = ""

    @property
    def sure(self) -> int:
        """1 where the first is better, −1 where it is worse, by more than chance explains; 0 where that cannot be told."""
        if len(self.moved) < 2:
            return 0
        mean, half = fmean(self.moved), paired_half(self.moved)
        return int(mean - half > 0) - int(mean + half < 0)

    def __str__(self) -> str:
        unit = " points" if percentage(self.metric) else ""
        said = f"{self.where}{self.at} {figure(self.metric, self.first)} against {figure(self.metric, self.second)}"
        mean = fmean(self.moved)
        if len(self.moved) < 2:
            return f"{said} ({mean:+.1f}{unit}, one seed)"
        half = paired_half(self.moved)
        return f"{said} ({mean:+.1f}{unit}, 95 % {mean - half:+.1f} to {mean + half:+.1f}, {len(self.moved)} seeds)"


class Scores:
    """The chosen runs of each configuration without a variant of its own, by (model, task, scheme) and method."""

    def __init__(self, runs: pd.DataFrame, groups: pd.DataFrame) -> None:
        by_key = runs.set_index("key")
        self.runs: dict[tuple[str, str, str], dict[str, dict[int, Any]]] = {}
        self.groups = groups[(groups.kind == "train") & groups["mean"].notna() & ~groups.tried]
        for row in self.groups[self.groups.variant == ""].itertuples():
            here = self.runs.setdefault((row.model, row.task, row.scheme), {})
            here[row.method] = {one.seed: one for one in by_key.loc[row.chosen].itertuples()}

    def pairs(
        self, better: str, other: str, at: str = "seconds", place: tuple[str, str, str] | None = None
    ) -> Iterator[Difference]:
        """On each model, task and scheme that have seeds of both; or on one of them."""
        for (_, task, scheme), here in self.runs.items() if place is None else [(place, self.runs[place])]:
            both = here.get(better, {}), here.get(other, {})
            seeds = sorted(both[0].keys() & both[1].keys())
            if not seeds:
                continue
            one, two = ([runs[seed] for seed in seeds] for runs in both)
            said, where = "", task if scheme == "full" else f"{task}, {scheme}"
            if at == "passes":
                passes = min(spent for run in (*one, *two) if (spent := run.forward_passes) == spent)
                scored = [(reached(a, passes), reached(b, passes)) for a, b in zip(one, two, strict=True)]
                said = f" after {passes:,.0f} passes (validation)"
            else:
                scored = [(a.score, b.score) for a, b in zip(one, two, strict=True)]
            if all(not math.isnan(x) for pair in scored for x in pair):
                sign = -1 if one[0].metric in LOWER_IS_BETTER else 1
                moved = tuple(sign * (a - b) for a, b in scored)
                firsts, seconds = zip(*scored, strict=True)
                yield Difference(where, fmean(firsts), fmean(seconds), moved, one[0].metric, said)

    def best(self, names: Sequence[str]) -> dict[tuple[str, str, str], str]:
        """Of these methods the one with the best mean, by model, task and scheme."""
        found = {}
        for place, here in self.runs.items():
            means = {
                name: fmean(run.score for run in here[name].values())
                * (-1 if next(iter(here[name].values())).metric in LOWER_IS_BETTER else 1)
                for name in names
                if here.get(name)
            }
            if means:
                found[place] = max(means, key=lambda name: means[name])
        return found


def positions(runs: pd.DataFrame, groups: pd.DataFrame) -> list[Answer]:
    """The six, in the order of the abstract; none where the store answers none of them."""
    scores = Scores(runs, groups)
    found = [
        Answer("Subspace methods", _subspace(scores)),
        Answer("Spectral methods that scale with queries", _spectral(scores)),
        Answer("Forward-only pipelines", _pipelines(scores)),
        Answer("Forward-only communication", f"{OPEN}: each was of one process, which sent its steps to no other."),
        Answer("Evaluation freed from task alignment", _alignment(scores)),
        Answer("Evaluation freed from task complexity", _complexity(scores)),
    ]
    return found if any(not one.said.startswith(OPEN) for one in found) else []


def claims(runs: pd.DataFrame, groups: pd.DataFrame) -> list[Answer]:
    """Those whose two methods both were run; held on a task where the difference is more than chance explains."""
    scores, found = Scores(runs, groups), []
    for claim in CLAIMS:
        if not (differences := list(scores.pairs(claim.better, claim.other, claim.at))):
            continue
        verdict = _verdict(differences)
        if claim.as_good and verdict == UNSURE and all(len(one.moved) > 1 for one in differences):
            verdict = "not contradicted"
        found.append(Answer(str(claim), f"{_listed(differences)}.", verdict))
    return found


def _verdict(differences: Sequence[Difference]) -> str:
    held, lost = (sum(one.sure == sign for one in differences) for sign in (1, -1))
    if held == len(differences):
        return "held"
    if lost == len(differences):
        return "not held"
    if held or lost:
        return f"held on {held}, not held on {lost} of {len(differences)}"
    return UNSURE


def _listed(differences: Sequence[Difference]) -> str:
    more = len(differences) - FEW
    return "; ".join(map(str, differences[:FEW])) + (f"; {more} more in the tables" if more > 0 else "")


def _subspace(scores: Scores) -> str:
    said = []
    for place, best in scores.best(SUBSPACE).items():
        said += [f"{best} beside {PLAIN}: {difference}" for difference in scores.pairs(best, PLAIN, place=place)]
    if not said:
        return f"{OPEN}: no method that stays in a subspace was run beside {PLAIN}."
    return f"The best of those that were run, on each task. {'; '.join(said)}."


def _spectral(scores: Scores) -> str:
    beside = list(scores.pairs(SPECTRAL, PLAIN))
    own = scores.groups[scores.groups.method == SPECTRAL]
    said = []
    if beside:
        said.append(f"{SPECTRAL} beside {PLAIN}: {_listed(beside)}.")
    for (_, task), here in own.groupby(["model", "task"], sort=False):
        rows = sorted(here.itertuples(), key=lambda row: row.queries)
        if len({row.queries for row in rows}) > 1:
            steps = ", ".join(f"{row.queries} queries {figure(row.metric, row.mean)}" for row in rows)
            sign = -1 if rows[0].metric in LOWER_IS_BETTER else 1
            grows = all(sign * (b.mean - a.mean) > 0 for a, b in pairwise(rows))
            said.append(f"{task}: {steps}: {'it grows' if grows else 'it does not grow'} with each.")
    if not said:
        return f"{OPEN}: no spectral method was run beside {PLAIN}."
    if not any("queries" in one for one in said):
        said.append(f"{OPEN}: whether it scales with queries, which were the same in all of them.")
    return " ".join(said)


def _pipelines(scores: Scores) -> str:
    """Memory is what these runs tell of forward passes alone."""
    said = []
    for (model, task, scheme), here in scores.groups.groupby(["model", "task", "scheme"], sort=False):
        peaks = {row.method: row.peak_bytes for row in here.itertuples() if row.variant == "" and row.peak_bytes > 0}
        beside = [name for name in FIRST_ORDER if name in peaks]
        if PLAIN in peaks and beside:
            found = ", ".join(f"{name} {peaks[name] / 2**30:.2f}" for name in (PLAIN, *beside))
            said.append(f"{model} on {task}, {scheme}: {found} GiB at the peak")
    spread = f"{OPEN}: none was spread over several devices"
    if not said:
        return f"{spread}."
    return f"Of forward passes alone: {'; '.join(said[:FEW])}. {spread}."


def _alignment(scores: Scores) -> str:
    """Tasks that were run with their template and, as NAME-plain, without."""
    said = []
    for (model, task, scheme), here in scores.runs.items():
        bare = scores.runs.get((model, f"{task}-plain", scheme), {})
        for name in [name for name in here if name in bare]:
            seeds = sorted(here[name].keys() & bare[name].keys())
            if seeds:
                one, two = ([runs[seed] for seed in seeds] for runs in (bare[name], here[name]))
                sign = -1 if one[0].metric in LOWER_IS_BETTER else 1
                moved = tuple(sign * (a.score - b.score) for a, b in zip(one, two, strict=True))
                first, second = (fmean(run.score for run in some) for some in (one, two))
                said.append(f"{name}, {Difference(task, first, second, moved, one[0].metric)}")
    if not said:
        return f"{OPEN}: no task was run with its template and without."
    return f"Without the task's template against with it: {'; '.join(said)}."


def _complexity(scores: Scores) -> str:
    """How far zeroth order is from back-propagation, task by task."""
    said = []
    zeroth = sorted({name for here in scores.runs.values() for name in here} - set(FIRST_ORDER))
    second = scores.best(FIRST_ORDER)
    for place, best in scores.best(zeroth).items():
        if place in second:
            other = second[place]
            said += [f"{best} beside {other}: {one}" for one in scores.pairs(best, other, place=place)]
    if len(said) < 2:
        return f"{OPEN}: two tasks at least, each by both zeroth and first order."
    return f"The best without back-propagation beside the best with it, task by task. {'; '.join(said)}."
