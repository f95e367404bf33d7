"""What a report says of others' positions and claims, on a made-up store whose answers are known."""

from __future__ import annotations

import pytest

for extra in ("itables", "jinja2", "matplotlib", "sqlalchemy"):
    pytest.importorskip(extra, reason="zotune[bench] is not installed")

from test_report import record

from zotune.bench.curves import reached
from zotune.bench.frame import groups_frame, runs_frame
from zotune.bench.positions import OPEN, claims, positions
from zotune.bench.report import make_report
from zotune.bench.store import Store
from zotune.bench.tables import equal

SIX = [
    "Subspace methods", "Spectral methods that scale with queries", "Forward-only pipelines", "Forward-only communication",
    "Evaluation freed from task alignment", "Evaluation freed from task complexity",
]  # fmt: skip


def curve(end: float, steps: int, forwards: int) -> list[dict]:
    """Validation that climbs to `end` in four evaluations."""
    return [
        {
            "step": steps * i // 4,
            "loss": 1 / i,
            "forward_passes": forwards * steps * i // 4,
            "validation_accuracy": end - 4 + i,
        }
        for i in range(1, 5)
    ]


def made(
    scores: dict[tuple, list[float]], task: str = "trec", forwards: dict[str, int] | None = None, **changes
) -> list:
    """scores: (method, scheme, queries) → the test score of each seed. A run is 30 s of steps of 0.01 s a forward."""
    found = []
    for (method, scheme, queries), seeds in scores.items():
        for seed, score in enumerate(seeds):
            each = (forwards or {}).get(method, 2)
            steps = round(30 / (0.01 * each))
            number = abs(hash((task, method, scheme, queries, seed))) % 10**9
            labels = {"queries": queries} if queries else {}
            options = {"lr": 1e-3, "eps": 1e-3, "method": method, "steps": steps, "queries": queries}
            found.append(
                record(
                    number, config_key=f"{task}{method}{scheme}{queries}{seed}", method=method, scheme=scheme, task=task, seed=seed,
                    labels=labels, options=options, planned={"pace": 0.01 * each}, metrics=curve(score - 1, steps, each),
                    result={"test_after": score, "forward_passes": each * steps, "metric": "accuracy",
                            "peak_memory_bytes": 4 * 2**30 if method.startswith("fo-") else 2**30}, **changes,
                )
            )  # fmt: skip
    return found


TREC = {
    ("zo-sgd", "full", None): [60.0, 62.0, 61.0],
    ("lozo-m", "full", None): [55.0, 56.0, 54.0],
    ("zo-act", "full", None): [70.0, 72.5, 71.2],
    ("zo-muon", "full", None): [61.0, 60.5, 63.0],
    ("fo-adam", "full", None): [90.0, 91.0, 89.0],
}
SST2 = {("zo-sgd", "full", None): [85.0, 84.0, 86.0], ("fo-adam", "full", None): [88.0, 87.5, 88.1]}


def answers(records) -> dict[str, str]:
    runs = runs_frame(records)
    return {one.to: one.said for one in positions(runs, groups_frame(runs))}


def test_each_of_the_six_positions_is_answered_by_name_or_said_to_be_open():
    said = answers(made(TREC) + made(SST2, "sst2"))
    assert list(said) == SIX
    assert "zo-act beside zo-sgd: trec 71.2 against 61.0 (+10.2 points, 95 %" in said[SIX[0]]
    assert "zo-muon beside zo-sgd: trec 61.5 against 61.0" in said[SIX[1]]
    assert said[SIX[1]].endswith(f"{OPEN}: whether it scales with queries, which were the same in all of them.")
    assert "zo-sgd 1.00, fo-adam 4.00 GiB at the peak" in said[SIX[2]]
    assert said[SIX[3]].startswith(OPEN)
    assert said[SIX[4]].startswith(OPEN)
    assert "zo-act beside fo-adam: trec 71.2 against 90.0 (-18.8 points" in said[SIX[5]]
    assert "zo-sgd beside fo-adam: sst2 85.0 against 87.9 (-2.9 points" in said[SIX[5]]


def test_queries_and_alignment_answer_the_positions_that_are_about_them():
    queries = {("zo-muon", "full", q): [50.0 + q, 51.0 + q] for q in (4, 8, 16)}
    said = answers(made(queries))
    assert "trec: 4 queries 54.5, 8 queries 58.5, 16 queries 66.5: it grows with each." in said[SIX[1]]
    fallen = answers(made(queries | {("zo-muon", "full", 32): [40.0]}))
    assert "32 queries 40.0: it does not grow with each." in fallen[SIX[1]]
    bare = {("zo-sgd", "full", None): [64.0, 65.0, 66.0], ("fo-adam", "full", None): [87.0, 87.5, 88.0]}
    plain = answers(made(SST2, "sst2") + made(bare, "sst2-plain"))
    assert "zo-sgd, sst2 65.0 against 85.0 (-20.0 points" in plain[SIX[4]]
    assert "fo-adam, sst2 87.5 against 87.9 (-0.4 points" in plain[SIX[4]]


def test_a_store_that_answers_none_of_them_says_nothing():
    assert answers(made({("zo-sgd", "full", None): [60.0]})) == {}


def test_a_claim_is_held_where_its_difference_is_more_than_chance_explains():
    runs = runs_frame(made(TREC) + made({("zo-sgd", "full", None): [60.0], ("fzoo", "full", None): [70.0]}, "sst5"))
    found = {one.to.split(": ")[-1]: one for one in claims(runs, groups_frame(runs))}
    assert found["zo-act beats zo-sgd at equal forward passes"].verdict == "held"
    assert found["lozo-m beats zo-sgd at equal forward passes"].verdict == "not held"
    assert found["zo-muon beats zo-sgd at equal forward passes"].verdict == "cannot be told"
    assert found["fzoo beats zo-sgd at equal forward passes"].verdict == "cannot be told"
    assert "(+10.0 points, one seed)" in found["fzoo beats zo-sgd at equal forward passes"].said
    assert not any("aim-zo" in to for to in found)  # was not run
    pair = {("zo-adam", "full", None): [60.0, 62.0], ("meazo", "full", None): [60.5, 61.0]}
    like = runs_frame(made(pair))
    (as_good,) = claims(like, groups_frame(like))
    assert as_good.to.endswith("meazo is as good as zo-adam at equal forward passes")
    assert as_good.verdict == "not contradicted"


def test_equal_passes_are_those_of_the_run_that_has_fewer():
    """What a run gained behind them does not count."""
    scores = {("zo-sgd", "full", None): [60.0, 61.0], ("fzoo", "full", None): [61.5, 62.5]}
    records = made(scores, forwards={"fzoo": 9})
    for one in records:
        if one.method == "zo-sgd":  # half as many passes as 30 s have
            one.options["steps"] //= 2
            one.metrics[:] = one.metrics[:2]
            one.result["forward_passes"] //= 2
    runs = runs_frame(records)
    (claim,) = claims(runs, groups_frame(runs))
    assert claim.said.startswith("trec after 1,500 passes (validation) 59.0 against 57.5 (+1.5 points")
    fzoo = next(run for run in runs.itertuples() if run.method == "fzoo")
    assert reached(fzoo, 1500) == 60.5 - 4 + 2
    assert reached(fzoo, 10) != reached(fzoo, 10)


def test_equal_seconds_and_passes_stand_in_a_table_of_runs_whose_budget_was_seconds(tmp_path):
    records = made(TREC | {("fo-adam", "lora", None): [80.0]}, forwards={"fo-adam": 3})
    runs = runs_frame(records)
    (table,) = equal(runs, groups_frame(runs)).values()
    assert list(table.columns) == ["10 s", "30 s, test", "1,000 passes", "4,000 passes", "16,000 passes"]
    assert table.loc["zo-sgd", "30 s, test"] == "61.0 ± 1.0"
    assert table.loc["zo-sgd", "10 s"] == f"{61.0 - 1 - 3:.1f}"
    assert table.loc["zo-sgd", "1,000 passes"] == f"{61.0 - 1 - 3:.1f}"
    assert table.loc["zo-sgd", "4,000 passes"] == ""  # 3,000 were spent
    assert table.loc["fo-adam, lora", "30 s, test"] == "80.0"
    for one in records:
        one.planned.pop("pace")
    plain = runs_frame(records)
    assert equal(plain, groups_frame(plain)) == {}


def test_positions_claims_and_equal_budgets_are_on_the_page(tmp_path):
    store = Store(tmp_path / "out")
    for one in made(TREC) + made(SST2, "sst2"):
        store.put(one)
    store.close()
    page = make_report(tmp_path / "out").read_text(encoding="utf-8")
    told = (tmp_path / "out/report/README.md").read_text(encoding="utf-8")
    for part in ("What the authors ask for", "Published claims", "Equal seconds, equal passes", *SIX):
        assert part in page
        assert part in told
    assert page.lstrip().startswith("<!doctype html>")
    assert (
        page.index('id="findings"')
        < page.index('id="positions"')
        < page.index('id="claims"')
        < page.index('id="equal"')
    )
