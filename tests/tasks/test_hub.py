"""Hub data sets by their present names and splits, with a `load_dataset` that has them in memory."""

from __future__ import annotations

import datasets
import pytest
from test_builtin import GOLDEN

from zotune.cli.app import run
from zotune.errors import InputError
from zotune.tasks import TASKS
from zotune.tasks.splits import find_source, training_splits
from zotune.tasks.task import Task

# What https://huggingface.co/datasets/… names today: repository, configuration, splits.
THREE = ("train", "validation", "test")
HUB = {
    ("nyu-mll/glue", "sst2"): THREE,
    ("SetFit/sst5", None): THREE,
    ("allenai/winogrande", "winogrande_xl"): THREE,
    ("rajpurkar/squad", None): ("train", "validation"),
    ("ucinlp/drop", None): ("train", "validation"),
    **{
        ("aps/super_glue", name): THREE
        for name in ("rte", "cb", "copa", "boolq", "wsc.fixed", "wic", "multirc", "record")
    },
}
AS_ON_THE_HUB = {
    "drop": {"passage": "3 of 5.", "question": "How many?", "answers_spans": {"spans": ["3"], "types": ["number"]}}
}


@pytest.fixture
def hub(monkeypatch):
    """Every data set with 30 rows a split; aps/super_glue has a script, and its tables under another revision."""
    calls = []

    def load_dataset(name, subset=None, revision=None):
        calls.append((name, subset, revision))
        if name == "aps/super_glue" and revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found super_glue.py")
        if (name, subset) not in HUB:
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['sst2', 'rte']\nExample"
            )
        task = next(t.name for t in TASKS.values() if (t.source.name, t.source.subset) == (name, subset))
        row = AS_ON_THE_HUB.get(task, GOLDEN[task][0])
        unlabelled = {"label": -1, "answer": "", "answers": []} if HUB[name, subset] == THREE and task != "sst5" else {}
        rows = {
            split: [row | ({k: v for k, v in unlabelled.items() if k in row} if split == "test" else {})] * 30
            for split in HUB[name, subset]
        }
        return {split: datasets.Dataset.from_list(given) for split, given in rows.items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("name", TASKS)
def test_a_builtin_task_reads_its_rows_and_scores_a_split_whose_labels_are_public(hub, name):
    task = TASKS[name]
    source = find_source(task, None, None).asking(task.example)
    drawn = training_splits(task, source, train_size=5, validation_size=3, test_size=4, seed=0)
    assert [len(part) for part in (drawn.train, drawn.validation, drawn.test)] == [5, 3, 4]
    assert drawn.test_split == "test"
    scored = "test" if name == "sst5" else "validation"
    assert all(f"{task.source.name}/{scored}, row" in example.where for example in drawn.test)
    assert all(f"{task.source.name}/train, row" in example.where for example in drawn.train)
    if name != "sst5":  # what is scored chooses nothing
        assert all("/train, row" in example.where for example in drawn.validation)
    assert len(hub) == (2 if task.source.name == "aps/super_glue" else 1)  # loaded once
    assert hub[-1][2] == ("refs/convert/parquet" if task.source.name == "aps/super_glue" else None)


def test_ones_own_hub_data_set_needs_no_validation_or_test_split(hub):
    task = Task(name="t", prompt="{question}", answer_field="title")
    source = find_source(task, "rajpurkar/squad", None).asking(task.example)
    drawn = training_splits(task, source, train_size=5, validation_size=3, test_size=4, seed=0)
    assert drawn.test_split == "validation"
    assert all("rajpurkar/squad/validation" in example.where for example in drawn.test)


def test_a_subset_is_named_and_one_that_is_missing_is_said(hub, capsys):
    own = [
        "preview",
        "--data",
        "nyu-mll/glue",
        "--template",
        "{sentence} It was",
        "--label-words",
        '{"0": "bad", "1": "good"}',
    ]
    assert run(own) == 2
    assert "--subset" in capsys.readouterr().err
    assert run([*own, "--subset", "sst2", "--rows", "1"]) == 0
    assert "a fine film It was⟦ good⟧" in capsys.readouterr().out
    assert run(["preview", "--task", "sst2", "--subset", "rte"]) == 2
    assert "--subset: belongs to --data" in capsys.readouterr().err


def test_what_the_hub_says_is_told_in_a_line(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'no/set' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"hub data set 'no/set': Couldn't reach .*; offline, give rows by --data-dir"):
        find_source(None, "no/set", None).rows("train")
