"""The report: its numbers against ones computed here, what it escapes, and the page in a browser."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import statistics
from pathlib import Path

import pandas as pd
import pytest

for extra in ("itables", "jinja2", "matplotlib", "sqlalchemy"):
    pytest.importorskip(extra, reason="zotune[bench] is not installed")

from zotune.bench.figures import context
from zotune.bench.figures.drawing import spread
from zotune.bench.findings import findings, paired_half
from zotune.bench.frame import groups_frame, runs_frame
from zotune.bench.report import make_report
from zotune.bench.store import Record, Store
from zotune.bench.tables import scores as tables_of
from zotune.cli.app import run
from zotune.errors import InputError

NASTY = "<script>alert('x')</script>&\"_$%"
SEEDS = {("zo-sgd", "full"): [80.0, 82.0, 87.0], ("zo-sgd", "lora"): [70.0, 71.0], ("zo-adam", "full"): [90.0]}


def record(number: int, **changes) -> Record:
    values = {
        "key": f"{number:016x}", "config_key": f"c{number}", "code": "0.1.0+abc", "suite": "mine", "kind": "train",
        "name": "n", "model": "org/model", "task": "sst2", "method": "zo-sgd", "scheme": "full", "seed": 0, "labels": {},
        "options": {"lr": 1e-3, "eps": 1e-3, "method": "zo-sgd"}, "command": "zotune train --lr 1e-3", "folder": "runs/x",
        "planned": {"peak_bytes": 2**30}, "status": "done", "attempts": 1, "started": float(number), "finished": 1.0 + number,
        "result": {
            "test_after": 80.0, "test_before": 50.0, "validation_best": 81.0, "lr": 1e-3, "eps": 1e-3,
            "forward_passes": 400, "wall_seconds": 90.0, "peak_memory_bytes": 3 * 2**29, "device": "cpu",
        },
        "metrics": [
            {"step": s, "loss": 1 / s, "forward_passes": 2 * s, "step_seconds": 0.1, "validation_accuracy": 50.0 + s / 10}
            for s in range(10, 210, 10)
        ],
        "error": "",
    }  # fmt: skip
    result = values["result"] | changes.pop("result", {})
    return Record(**(values | {"result": result} | changes))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Three configurations, a learning rate that is better on validation and worse on test, a failure, alignment, probes."""
    folder = tmp_path_factory.mktemp("results")
    store, number = Store(folder), 0

    def put(**changes) -> None:
        nonlocal number
        number += 1
        store.put(record(number, **changes))

    for (method, scheme), scores in SEEDS.items():
        for seed, score in enumerate(scores):
            put(method=method, scheme=scheme, seed=seed, result={"test_after": score, "validation_best": 88.0})
    put(seed=0, labels={"lr": 0.1}, result={"test_after": 99.0, "lr": 0.1, "validation_best": 60.0})
    put(task="sst2-plain", result={"test_after": 60.0})
    put(labels={"queries": 4}, options={"queries": 4}, result={"test_after": 83.0})
    put(labels={"sparsity": 0.5}, result={"test_after": 79.0})
    put(method=NASTY, model=NASTY, status="failed", error=NASTY, command=NASTY, options={"x": NASTY}, result={})
    put(scheme="head", status="oom", result={"test_after": None, "test_before": None}, error="CUDA out of memory")
    for method, bytes_a_token in (("zo-sgd", 10), ("fo-adam", 1000)):
        for tokens in (128, 256):
            put(
                kind="probe", method=method, task="", labels={"tokens": tokens}, options={"tokens": tokens}, metrics=[],
                result={"test_after": None, "peak_bytes": 2**30 + bytes_a_token * tokens * 1000, "step_seconds": 0.1},
            )  # fmt: skip
    store.close()
    make_report(folder)
    return folder


def test_seeds_that_find_rates_of_their_own_are_runs_of_one_configuration():
    """Else the best of them would be chosen, as among rates that were searched."""
    options = {"lr": "auto", "eps": 1e-2, "method": "leave-one-out"}
    found = [
        record(seed, seed=seed, options=options, result={"test_after": score, "lr": lr, "validation_best": score})
        for seed, (score, lr) in enumerate(((70.0, 1e-3), (80.0, 1.2e-3)))
    ]
    (group,) = groups_frame(runs_frame(found)).itertuples()
    assert (group.mean, group.n) == (75.0, 2)


def test_tables_hold_mean_spread_and_rank_and_choose_lr_on_validation(results):
    rows = list(csv.DictReader((results / "report" / "summary.csv").open()))
    found = {(r["method"], r["scheme"]): r for r in rows if r["task"] == "sst2" and not r["variant"]}
    for (method, scheme), scores in SEEDS.items():
        row = found[method, scheme]
        assert float(row["accuracy"]) == pytest.approx(statistics.mean(scores))
        assert int(row["seeds"]) == len(scores)
        assert float(row["lr"]) == 1e-3
        if len(scores) > 1:
            assert float(row["sd"]) == pytest.approx(statistics.stdev(scores))
    assert float(found["zo-adam", "full"]["rank"]) == 1
    assert float(found["zo-sgd", "full"]["rank"]) == 2
    text = (results / "report" / "tables.md").read_text()
    assert "| zo-sgd | 83.0 ± 3.6 | 70.5 ± 0.7 | does not fit |" in text
    assert r"83.0 $\pm$ 3.6" in (results / "report" / "tables.tex").read_text()
    assert float(found["zo-sgd", "full"]["ms a step"]) == pytest.approx(100)


def reported(folder: Path, *records: dict) -> tuple[list[dict], pd.DataFrame]:
    """Rows of summary.csv, and the groups."""
    store = Store(folder)
    for number, changes in enumerate(records, 1):
        store.put(record(number, **changes))
    groups = groups_frame(runs_frame(store.latest()))
    store.close()
    make_report(folder)
    return list(csv.DictReader((folder / "report" / "summary.csv").open())), groups


def test_what_a_search_alone_has_run_says_so_and_is_not_ranked(tmp_path):
    searched = {"labels": {"lr": 1e-3, "search": True}}
    rows, groups = reported(
        tmp_path,
        {"method": "zo-adam"} | searched,
        {"method": "zo-sgd"},
        {"method": "zo-sgd-mmt"},
        {"scheme": "lora"} | searched,
    )
    assert list(groups[groups.tried].method) == ["zo-sgd", "zo-adam"]
    assert {(row["method"], row["scheme"]): row["rank"] for row in rows} == {
        ("zo-sgd", "full"): "1.0", ("zo-sgd-mmt", "full"): "1.0", ("zo-adam", "full"): "", ("zo-sgd", "lora"): "",
    }  # fmt: skip
    text = (tmp_path / "report" / "tables.md").read_text()
    assert "80.0 (search)" in text
    assert "(search) where only the search has run" in (tmp_path / "report" / "README.md").read_text()
    assert {row["from"] for row in rows if row["rank"]} == {""}
    assert {row["from"] for row in rows if not row["rank"]} == {"search"}


def test_a_run_that_failed_after_its_search_is_not_shown_as_the_search(tmp_path):
    reported(
        tmp_path, {"labels": {"lr": 1e-3, "search": True}}, {"status": "failed", "result": {}}, {"method": "zo-adam"}
    )
    assert "| zo-sgd | failed |" in (tmp_path / "report" / "tables.md").read_text()


def test_rows_stand_in_the_order_of_the_lists_variants_last(tmp_path):
    """Whatever order the runs ended in."""
    _, groups = reported(
        tmp_path,
        {"method": "fo-adam"}, {"method": "zo-sgd", "labels": {"sparsity": 0.9}}, {"method": "zo-sgd", "labels": {"sparsity": 0.5}},
        {"method": "mine"}, {"method": "zo-adam", "scheme": "prompt"}, {"method": "zo-adam"}, {"method": "zo-sgd"},
    )  # fmt: skip
    assert [(row.method, row.scheme, row.variant) for row in groups.itertuples()] == [
        ("zo-sgd", "full", ""), ("zo-adam", "full", ""), ("zo-adam", "prompt", ""), ("fo-adam", "full", ""), ("mine", "full", ""),
        ("zo-sgd", "full", "sparsity=0.5"), ("zo-sgd", "full", "sparsity=0.9"),
    ]  # fmt: skip


def test_of_a_metric_that_is_better_lower_the_least_is_chosen_and_ranks_first(tmp_path):
    def ran(method: str, lr: float, validation: float, test: float) -> dict:
        line = {"step": 10, "loss": 1.0, "forward_passes": 20, "validation_perplexity": validation}
        result = {
            "metric": "perplexity",
            "lr": lr,
            "validation_best": validation,
            "test_after": test,
            "test_before": 30.0,
        }
        return {"method": method, "labels": {"lr": lr}, "result": result, "metrics": [line]}

    rows, _ = reported(
        tmp_path, ran("zo-sgd", 1e-3, 12.5, 12.25), ran("zo-sgd", 1e-2, 20.0, 19.0), ran("zo-adam", 1e-3, 11.0, 11.5)
    )
    found = {row["method"]: row for row in rows}
    assert (found["zo-sgd"]["lr"], found["zo-sgd"]["perplexity"], found["zo-sgd"]["rank"]) == ("0.001", "12.25", "2.0")
    assert (found["zo-adam"]["perplexity"], found["zo-adam"]["rank"]) == ("11.5", "1.0")
    page, readme = ((tmp_path / "report" / name).read_text() for name in ("index.html", "README.md"))
    assert "Test perplexity, mean" in page
    assert "validation perplexity" in page
    assert "Perplexity by method and scheme" in readme
    assert "accuracy in percent" not in readme


def test_reports_of_several_metrics_say_which(tmp_path):
    rows, _ = reported(tmp_path, {"result": {"metric": "accuracy"}}, {"task": "squad", "result": {"metric": "f1"}})
    assert [(row["metric"], row["score"]) for row in rows] == [("accuracy", "80.0"), ("f1", "80.0")]


def test_methods_are_ranked_where_they_compete_and_variants_are_no_methods(tmp_path):
    def ran(method: str, scheme: str, score: float, **labels) -> dict:
        return {"method": method, "scheme": scheme, "labels": labels, "result": {"test_after": score}}

    _, groups = reported(
        tmp_path,
        ran("zo-sgd", "full", 80), ran("zo-adam", "full", 90), ran("zo-sgd-sign", "full", 70),
        ran("zo-sgd", "lora", 60), ran("zo-adam", "lora", 50),  # which sign has not
        ran("zo-sgd", "prompt", 99),  # without a rival
        ran("zo-sgd", "full", 95, queries=4),
        ran("zo-sgd", "full", 75, queries=8), ran("zo-adam", "full", 76, queries=8),
    )  # fmt: skip
    (table,) = tables_of(groups).values()
    assert dict(table["mean rank"]) == {
        "zo-sgd": "2.0", "zo-adam": "1.0", "zo-sgd-sign": "3.0", "zo-sgd queries=4": "",
        "zo-sgd queries=8": "2.0", "zo-adam queries=8": "1.0",
    }  # fmt: skip


def test_no_eps_stands_where_a_method_has_none(tmp_path):
    ran = [
        {"method": "fo-sgd", "labels": {"lr": lr}, "result": {"lr": lr, "validation_best": 80 - lr}}
        for lr in (0.1, 0.2)
    ]
    (row,), _ = reported(tmp_path, *ran)
    assert (row["lr"], row["eps"]) == ("0.1", "")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Of 2 lr, 0.1 is best on validation" in page
    assert "eps nan" not in page


def test_every_figure_is_drawn_where_the_store_has_its_data_and_only_there(results, tmp_path_factory):
    drawn = {path.stem for path in (results / "report").glob("*.png")}
    assert drawn == {
        "accuracy", "memory", "context", "passes", "seconds", "queries", "curves", "alignment", "enhancements", "pareto-memory",
        "pareto-time", "sensitivity",
    }  # fmt: skip
    assert drawn == {path.stem for path in (results / "report").glob("*.svg")}
    other = tmp_path_factory.mktemp("other")
    store = Store(other)
    store.put(record(1))
    store.close()
    page = make_report(other).read_text()
    assert {p.stem for p in (other / "report").glob("*.png")} == {"accuracy", "memory", "passes", "seconds", "curves"}
    assert "context length" not in page


def test_memory_against_length_joins_no_batches_of_other_sizes():
    """Suites `memory` and `context-length` in one report: both have 256 tokens, of 16 rows and of 4."""
    sizes = [("", 256, 16), ("tokens", 256, 4), ("tokens", 512, 4)]
    rows = [
        record(
            i, kind="probe", task="", labels={"tokens": tokens} if label else {}, metrics=[],
            options={"tokens": tokens, "batch_size": size}, result={"test_after": None, "peak_memory_bytes": size * 2**30},
        )
        for i, (label, tokens, size) in enumerate(sizes)
    ]  # fmt: skip
    runs = runs_frame(rows)
    (line,) = context.draw(runs, groups_frame(runs)).axes[0].get_lines()
    assert list(line.get_xdata()) == [256, 512]
    assert list(line.get_ydata()) == [4, 4]


def test_names_are_escaped_everywhere(results):
    page = (results / "report" / "index.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "<script>" not in (results / "report" / "tables.md").read_text()
    assert r"\_\$\%" in (results / "report" / "tables.tex").read_text()
    for svg in (results / "report").glob("*.svg"):
        assert "<script>" not in svg.read_text()


def test_each_number_leads_to_its_runs_and_their_commands(results):
    page = (results / "report" / "index.html").read_text()
    anchors = set(re.findall(r'<details id="([^"]+)"', page))
    links = {link for link in re.findall(r'href=\\?"#([^"\\]+)', page) if link.startswith(("g-", "run-"))}
    assert links
    assert links <= anchors
    assert "zotune train --lr 1e-3" in page
    assert "Quoted from arXiv 2402.11592" in page
    assert "Not measured here" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_page_asks_for_nothing_from_outside(results):
    page = (results / "report" / "index.html").read_text()
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page)
    assert "var(--s0" in page
    assert "currentColor" in page


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    assert run(["bench", "report", str(tmp_path)]) == 2
    assert "zotune bench run" in capsys.readouterr().err
    Store(tmp_path).close()
    with pytest.raises(InputError, match="no run has finished"):
        make_report(tmp_path)


def test_a_file_in_the_place_of_the_report_is_refused(tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    assert run(["bench", "report", str(tmp_path), "--output", str(tmp_path / "taken")]) == 2
    assert capsys.readouterr().err == f"zotune: --output {tmp_path / 'taken'}: is a file; name a folder\n"
    assert (tmp_path / "taken").read_text() == "mine"


def test_no_bar_passes_a_hundred_percent():
    rows = pd.DataFrame({"mean": [98.0, 60.0, 12.0], "sd": [5.0, 5.0, math.nan], "metric": ["accuracy"] * 3})
    down, up = spread(rows)
    assert (list(down), list(up)) == ([5.0, 5.0, 0.0], [2.0, 5.0, 0.0])
    assert list(spread(rows.assign(metric="perplexity"))[1]) == [5.0, 5.0, 0.0]


WIDTHS = [(1200, "light"), (390, "dark")]


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    with sync.sync_playwright() as play:
        started = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser, results: Path, width: int, scheme: str):
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    faults: list[str] = []
    page.on("console", lambda m: faults.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: faults.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith(("data:", "blob:", "file:")) else faults.append(r.url))
    page.on("dialog", lambda d: faults.append(d.message))
    page.goto((results / "report" / "index.html").as_uri())
    page.wait_for_selector("#table-runs tbody tr")
    return page, faults


@pytest.mark.parametrize(("width", "scheme"), WIDTHS)
def test_the_page_in_a_browser_fits_sorts_and_filters_without_an_error(browser, results, width, scheme):
    page, faults = opened(browser, results, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # a figure fills its place, and where that is narrow it is as wide as its letters need and scrolls there
    regions = "[...document.querySelectorAll('figure .wide')].map(one => one.getBoundingClientRect())"
    assert max(one["right"] for one in page.evaluate(f"{regions}.map(r => r.toJSON())")) <= width
    widths = "[...document.querySelectorAll('figure svg')].map(svg => svg.getBoundingClientRect().width)"
    assert min(page.evaluate(widths)) >= (700 if width < 640 else 0.8 * min(width, 1400))
    every = page.locator("#table-runs tbody tr").count()
    header = page.locator("#table-runs_wrapper thead th", has_text="seed").first
    column = header.evaluate("th => th.cellIndex")
    seeds = f"[...document.querySelectorAll('#table-runs tbody tr')].map(row => row.cells[{column}].innerText)"
    assert page.evaluate(seeds) != sorted(page.evaluate(seeds))
    header.click()  # in its middle
    page.wait_for_function(f"(seeds => seeds.every((s, i) => !i || seeds[i - 1] <= s))({seeds})", timeout=30_000)
    page.locator("#table-runs_wrapper input[type=search]").fill("zo-adam")
    rows = "document.querySelectorAll('#table-runs tbody tr').length"
    page.wait_for_function(f"every => 0 < {rows} && {rows} < every", arg=every, timeout=30_000)
    page.locator("table.matrix a").first.click(timeout=30_000)
    page.wait_for_selector("details[open]", timeout=30_000)
    assert page.locator("details[open]").count() == 1
    assert faults == []


@pytest.mark.parametrize(("width", "scheme"), WIDTHS)
def test_the_page_has_no_fault_of_accessibility(browser, results, width, scheme):
    found = [Path("node_modules/axe-core/axe.min.js"), Path("/usr/lib/node_modules/axe-core/axe.min.js")]
    axe = next((path.read_text() for path in found if path.is_file()), None)
    if axe is None:
        pytest.skip("axe-core is not installed (npm install axe-core)")
    page, _ = opened(browser, results, width, scheme)
    page.evaluate(axe)
    assert [f"{v['id']}: {v['nodes'][0]['html']}" for v in page.evaluate("axe.run()")["violations"]] == []


def test_json_in_the_store_survives_a_round(tmp_path):
    store = Store(tmp_path)
    store.put(record(1, labels={"queries": 4}))
    assert json.dumps(store.get(f"{1:016x}").labels) == '{"queries": 4}'


def test_findings_say_what_won_by_how_much_and_how_sure(tmp_path):
    def said(scores: dict[str, list[float]]) -> str:
        records = [
            record(10 * i + seed, method=method, seed=seed, config_key=f"{method}{seed}", result={"test_after": score})
            for i, (method, found) in enumerate(scores.items())
            for seed, score in enumerate(found)
        ]
        runs = runs_frame(records)
        (line,) = findings(runs, groups_frame(runs))
        return line

    sure = said({"zo-sgd": [80.0, 82.0, 81.0], "zo-adam": [90.0, 92.1, 90.9]})
    assert "zo-adam, full is first of 2 with 91.0" in sure
    moved = [10.0, 10.1, 9.9]
    half = paired_half(moved)
    assert math.isclose(half, 4.303 * statistics.stdev(moved) / math.sqrt(3))
    assert (
        f"more than chance explains (+10.0 points, 95 % {10 - half:+.1f} to {10 + half:+.1f}, 3 seeds in pairs)" in sure
    )
    assert "cannot tell the two apart" in said({"zo-sgd": [80.0, 90.0, 85.0], "zo-adam": [90.0, 82.0, 84.0]})
    assert "may be luck" in said({"zo-sgd": [80.0], "zo-adam": [90.0]})


def test_findings_lead_the_page_and_what_does_not_fit_is_no_alarm(results):
    page = (results / "report/index.html").read_text(encoding="utf-8")
    assert 0 < page.index('id="findings"') < page.index('id="tables"')
    assert "## Findings" in (results / "report/README.md").read_text(encoding="utf-8")
    assert not re.search(r'class="oom">[^<]*did not fit', page)
