"""Suites: the grid, its rules and budgets, and what is said of a wrong one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from zotune.bench import plan
from zotune.bench.plan import make_plan
from zotune.bench.suite import Suite, expand, load_suite, matches, shipped
from zotune.errors import InputError
from zotune.estimates.cost import forwards_a_step, steps_for
from zotune.methods import METHODS
from zotune.step.optimizer import ZeroOrderOptimizer

NAMED = {
    "smoke", "sst2", "complexities", "alignment", "memory", "context-length", "query-budget", "enhancements", "paper",
    "neutral",
}  # fmt: skip


def test_the_shipped_suites_are_those_named_and_each_can_be_read():
    assert set(shipped()) == NAMED
    for name in shipped():
        suite = load_suite(name)
        assert suite.name == name
        assert suite.about
        cells = list(suite.cells())
        assert len({repr(sorted(c.items())) for c in cells}) == len(cells)


def test_what_a_shipped_suite_names_and_this_version_lacks_is_left_out_with_a_reason(monkeypatch):
    from zotune import registry

    real = registry.names
    monkeypatch.setattr(registry, "names", lambda kind: ["zo-sgd"] if kind == "method" else real(kind))
    expanded = expand(load_suite("sst2"))
    assert {cell.options["method"] for cell in expanded.cells} == {"zo-sgd"}
    assert expanded.left_out["method 'fo-sgd' is not in this version"] == 15
    monkeypatch.setattr(registry, "names", lambda kind: ["zo-sgd", "fo-sgd"] if kind == "method" else real(kind))
    assert {c.options["method"] for c in expand(load_suite("smoke")).cells} == {"zo-sgd", "fo-sgd"}


def test_the_paper_s_suite_is_the_whole_study(monkeypatch):
    from zotune.estimates import cost

    monkeypatch.setattr(cost, "_blocks_of", lambda model, scheme, kind: 27)
    expanded = expand(load_suite("paper"))
    assert expanded.left_out == {}
    finals = [cell for cell in expanded.cells if not cell.search]
    assert {cell.model for cell in finals} >= {"meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf"}
    assert {cell.task for cell in finals} >= {"sst2", "sst2-plain", "rte", "rte-plain", "copa", "winogrande", "multirc"}
    labels = {(cell.options["method"], key) for cell in finals for key in cell.labels}
    assert labels >= {("zo-sgd", key) for key in ("blocks", "hybrid", "sparsity", "mask", "queries")}
    assert ("forward-grad", "queries") in labels
    first = [cell for cell in finals if cell.options["method"].startswith("fo-")]
    assert {cell.options["steps"] for cell in first} == {625}
    assert all("lr" in cell.open for cell in finals)
    assert all(("eps" in cell.open) == cell.options["method"].startswith("zo-") for cell in finals if not cell.labels)
    plain = [cell for cell in finals if cell.options["method"] == "zo-sgd" and not cell.labels]
    assert {cell.forward_passes for cell in plain} == {40_000}


@pytest.mark.parametrize(
    ("options", "cost"),
    [
        ({"method": "zo-sgd"}, 2),
        ({"method": "zo-adam", "queries": 3}, 6),
        ({"method": "zo-sgd", "estimator": "one-sided", "queries": 3}, 4),
        ({"method": "zo-sgd-cons"}, 5),
        ({"method": "zo-sgd-cons", "queries": 4}, 11),
        ({"method": "zo-sgd", "blocks": 27}, 54),
        ({"method": "forward-grad"}, 1),
        ({"method": "fo-adam"}, 1),
        ({"method": "fo-adam", "accumulate": 4}, 4),
    ],
)
def test_a_step_costs_what_the_study_says(options, cost):
    assert forwards_a_step(options) == cost


AFTER = ("lozo-m", "zo-muon", "subzero-plus", "zo-act", "aim-zo", "grzo")  # whose directions are low-rank


@pytest.mark.parametrize("more", [{}, {"blocks": "transformer"}, {"blocks": "linear"}, {"hybrid": 0.5, "fo_lr": 1e-3}])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(
    ("method", "estimator"),
    [
        (method, kind)
        for method in METHODS
        for kind in ("two-sided", "one-sided")
        if method not in ("fo-sgd", "fo-adam")
    ],
)
def test_a_step_costs_what_the_optimizer_counts(method, estimator, queries, more):
    model = nn.ModuleDict({"embed": nn.Linear(2, 2), "layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    given = {"queries": queries, **({"estimator": estimator} if "estimator" in METHODS[method].options else {}), **more}
    try:
        optimizer = ZeroOrderOptimizer(model, method, **given)
    except ValueError:
        refused = method in ("zo-sgd-cons", "own-inputs", *AFTER) and more  # blocks or hybrid training
        assert refused or (method in ("leave-one-out", "aim-zo") and queries == 1) or method in ("copes", "grzo")
        return
    options = {"method": method, **given}
    if "blocks" in more:
        options["blocks"] = len(optimizer.blocks)
        assert options["blocks"] == 3
    assert forwards_a_step(options) == optimizer.forwards_a_step


@given(st.sampled_from(["zo-sgd", "zo-sgd-cons", "fo-sgd", "forward-grad"]), st.integers(1, 9), st.integers(1, 10**6))
def test_a_budget_is_spent_as_far_as_whole_steps_go(method, queries, budget):
    options = {"method": method, "queries": queries}
    spent = steps_for(budget, options) * forwards_a_step(options)
    assert budget - forwards_a_step(options) < spent <= budget


def test_rules_go_over_defaults_cells_over_rules_and_includes_replace_axes(suite_file):
    suite = load_suite(
        suite_file(
            grid={"model": "tiny", "task": "words", "method": "zo-sgd", "scheme": ["full", "lora"], "seed": [0, 1]},
            rules=[{"when": {"scheme": "lo*"}, "set": {"lr": 0.5}}],
            include=[{"seed": 7, "lr": [0.1, 0.2]}],
            exclude=[{"scheme": "full", "seed": 1}],
        )
    )
    got = {(c.options["scheme"], c.options["seed"], c.options["lr"]) for c in expand(suite).cells}
    assert got == {
        ("full", 0, 1e-3), ("lora", 0, 0.5), ("lora", 1, 0.5),
        ("full", 7, 0.1), ("full", 7, 0.2), ("lora", 7, 0.1), ("lora", 7, 0.2),
    }  # fmt: skip


def test_every_run_of_a_suite_has_the_same_forward_passes(suite_file):
    expanded = expand(load_suite(suite_file(budget={"forward_passes": 24}, include=[{"queries": [2, 3, 4]}])))
    assert {cell.forward_passes for cell in expanded.cells} == {24}
    assert sorted({cell.options["steps"] for cell in expanded.cells}) == [3, 4, 6, 12]


def test_blocks_are_counted_in_the_config_of_a_random_model(suite_file):
    cells = expand(load_suite(suite_file(budget={"forward_passes": 24}), {"blocks": "transformer"})).cells
    assert {(cell.options["steps"], cell.forward_passes) for cell in cells} == {
        (3, 24)
    }  # embedding, a layer, norm, head


def test_a_cell_that_cannot_be_composed_is_left_out_or_refused_as_the_suite_says(suite_file):
    grid = {
        "model": "tiny",
        "task": "words",
        "method": ["zo-sgd", "zo-sgd-cons"],
        "scheme": ["full", "prompt"],
        "seed": 0,
    }
    changes = {"grid": grid, "defaults": {"blocks": "transformer"}, "budget": {"forward_passes": 24}}
    expanded = expand(load_suite(suite_file(missing="skip", **changes)))
    assert [cell.name for cell in expanded.cells] == ["tiny words zo-sgd full seed=0"]
    said = " ".join(expanded.left_out)
    assert sum(expanded.left_out.values()) == 3
    assert "scheme full or lora" in said
    assert "compares one move" in said
    with pytest.raises(
        InputError, match=r"^suite mine: tiny words zo-sgd prompt seed=0: --blocks: .*scheme full or lora$"
    ):
        expand(load_suite(suite_file(**changes)))


def test_set_replaces_an_axis_an_option_and_the_budget(suite_file):
    changes = {"seed": [5], "lr": 0.25, "budget.steps": 3}
    cells = expand(load_suite(suite_file(rules=[{"set": {"lr": 9}}]), changes)).cells
    assert [(c.options["seed"], c.options["lr"], c.options["steps"]) for c in cells] == [(5, 0.25, 3)]


def test_keys_depend_on_what_is_computed_and_not_on_where(suite_file, tmp_path):
    def keys(folder="a", **changes):
        return [run.key for run in make_plan(expand(load_suite(suite_file(**changes))), tmp_path / folder).runs]

    assert keys() == keys("b")
    assert keys() == keys(defaults={"batch_size": 4, "lr": 1e-3, "device": "auto", "log_every": 5})
    assert set(keys()).isdisjoint(keys(defaults={"batch_size": 4, "lr": 2e-3}))
    assert set(keys()).isdisjoint(keys(tasks={"words": {"made": "words", "train": 21, "template": "{text}",
                                                        "label_words": {"0": "bad", "1": "good"}}}))  # fmt: skip


@pytest.mark.parametrize("name", ["data", "data_dir", "model"])
def test_under_the_same_name_other_rows_or_another_model_are_another_run(suite_file, tmp_path, monkeypatch, name):
    place = tmp_path / "place"
    file = place / {"data": "train.jsonl", "data_dir": "words/train.jsonl", "model": "model.safetensors"}[name]
    file.parent.mkdir(parents=True)
    options = {name: str(place)} | ({"task": "words"} if name == "data_dir" else {})
    monkeypatch.setattr(plan, "ENDS", 2)
    told = []
    for text in ("aaaaaaaa", "aaaaaaab", "baaaaaaa", "aaaabaaa", "aaaaaaaa"):
        file.write_text(text)
        told.append(plan.digest(plan._contents(options)))
    assert told[0] == told[4]
    assert len(set(told)) == (3 if file.suffix == ".safetensors" else 4)
    assert plan._contents({name: "owner/hub-name", "task": "sst2"}) == {}


def test_the_device_is_part_of_a_probe_and_not_of_a_training_run(suite_file, tmp_path):
    def keys(kind, device):
        grid = {"model": "tiny", "method": "zo-sgd", "seed": 0} | ({"task": "words"} if kind == "train" else {})
        suite = load_suite(suite_file(kind=kind, grid=grid, defaults={"device": device}))
        return {run.key for run in make_plan(expand(suite), tmp_path).runs}

    assert keys("train", "cpu") == keys("train", "cuda")
    assert keys("probe", "cpu") != keys("probe", "cuda")


def test_patterns_match_texts_and_numbers():
    assert matches({"method": ["fo-*", "zo-adam"], "seed": [0, 1]}, {"method": "zo-adam", "seed": 1})
    assert not matches({"method": "fo-*"}, {"method": "zo-adam"})
    assert not matches({"scheme": "full"}, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gird": {}}, "unknown key 'gird'; did you mean 'grid'?"),
        ({"budget": {"step": 3}}, "unknown key 'budget.step'; did you mean 'steps'?"),
        ({"budget": {"steps": 3, "forward_passes": 6}}, "one of the three"),
        ({"budget": {"forward_passes": 1}}, "pay for no step"),
        ({"grid": {"model": "tiny", "task": "words", "method": "zo-sdg"}}, "did you mean 'zo-sgd'?"),
        ({"grid": {"model": "tiny", "task": "wrods", "method": "zo-sgd"}}, "'wrods'"),
        ({"grid": {"task": "words", "method": "zo-sgd"}}, "no model"),
        ({"defaults": {"bach_size": 3}}, "did you mean 'batch_size'?"),
        ({"defaults": {"lr": "fast"}}, "lr"),
        ({"exclude": [{"method": "*"}]}, "no run is left"),
        ({"models": {"tiny": {"random": {"hidden_size": 3}}}}, "model_type"),
    ],
)
def test_a_wrong_suite_is_said_in_one_line(suite_file, changes, message):
    with pytest.raises(InputError) as error:
        expand(load_suite(suite_file(**changes)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("metod", "zo-sgd", "--set metod: no such option; did you mean 'method'?"),
        ("method", ["zo-sgd", "zo-adm"], "--set method=zo-adm: no such method; did you mean 'zo-adam'?"),
        ("task", "wrods", "--set task=wrods: no such task; did you mean 'words'?"),
        ("defaults.bach_size", 4, "did you mean 'batch_size'?"),
        ("budjet.steps", 4, "did you mean 'budget.steps'?"),
    ],
)
def test_what_set_names_and_there_is_not_is_refused_where_missing_is_skipped_too(key, value, message):
    with pytest.raises(InputError) as error:
        load_suite("smoke", {key: value})
    assert message in str(error.value)


def test_an_unknown_suite_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'smoke'"):
        load_suite("smok")


def test_a_suite_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="extra"):
        Suite.model_validate({"name": "x", "grid": {}, "budget": {"steps": 1}, "extra": 1})


def test_a_suite_may_leave_the_rate_to_its_runs():
    suite = Suite.model_validate(
        {
            "name": "found",
            "grid": {"model": ["m"], "task": ["sst2"], "method": ["leave-one-out"], "scheme": ["full"], "seed": [0]},
            "models": {"m": {"model": "m"}}, "defaults": {"lr": "auto", "groups": "batch"}, "budget": {"steps": 4},
        }
    )  # fmt: skip
    (cell,) = expand(suite).cells
    assert (cell.options["lr"], cell.options["lr_schedule"]) == ("auto", "linear")
