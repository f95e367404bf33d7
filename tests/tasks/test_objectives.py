"""Objectives that have no gradient: the loss of each row is what the metric says of it, and the command line trains on it."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from zotune.cli.app import run
from zotune.errors import InputError
from zotune.prepare.model import check_kind
from zotune.tasks import get_task
from zotune.tasks.encoding import Encoded
from zotune.tasks.metrics import text_f1
from zotune.tasks.objectives import NAMES, check_name, objective
from zotune.tasks.scoring import score_rows

ROWS = [Encoded((3, 9, 4), ((11,), (12,)), 0), Encoded((5, 2), ((11,), (12,)), 1), Encoded((8, 8), ((11,), (12,)), 0)]


def test_the_error_rate_is_that_of_the_scores():
    model = tiny.causal_model()
    asked = objective("accuracy", get_task("sst2"), None, 0)
    scores = score_rows(model, ROWS, batch_size=3, pad_id=0)
    wanted = [float(max(range(2), key=s.__getitem__) != row.label) for s, row in zip(scores, ROWS, strict=True)]
    assert asked.row_loss(model, asked.collate(ROWS)).tolist() == wanted
    assert not asked.differentiable


@pytest.mark.parametrize("name", ["accuracy", "f1"])
def test_what_is_no_number_is_no_loss_either(name):
    """The largest of scores, and the likeliest token, would hide a NaN."""
    model = tiny.causal_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = float("nan")  # the first row has this token
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.nan_to_num())
    rows = [Encoded(row.prompt, row.candidates, row.label, golds=("film",)) for row in ROWS]
    asked = objective(name, get_task("sst2" if name == "accuracy" else "squad"), tiny.tokenizer(), 1)
    with torch.no_grad():
        losses = asked.row_loss(model, asked.collate(rows))
    assert losses.isnan().tolist() == [True, False, False]


def test_generated_answers_are_scored_one_a_row():
    model, tokenizer = tiny.causal_model(), tiny.tokenizer(bos=True)
    rows = [Encoded(row.prompt, ((7,),), 0, golds=("the film", "day")) for row in ROWS]
    asked = objective("f1", get_task("squad"), tokenizer, 1)
    with torch.no_grad():
        losses = asked.row_loss(model, asked.collate(rows))
    from zotune.tasks.generation import generate_answers

    answers = generate_answers(model, tokenizer, rows, batch_size=3, pad_id=1)
    assert losses.tolist() == [1 - text_f1(answer, ("the film", "day")) for answer in answers]


@pytest.mark.parametrize(
    ("name", "task", "said"),
    [
        ("candidates", "squad", "use answer"),
        ("accuracy", "squad", "use f1"),
        ("f1", "sst2", "use accuracy"),
        ("no.such.module:f", "sst2", "cannot be imported"),
        ("json:nothing", "sst2", "cannot be imported"),
        ("json:__name__", "sst2", "is no function"),
    ],
)
def test_what_does_not_go_together_is_said(name, task, said):
    with pytest.raises(InputError, match=said):
        objective(name, get_task(task), None, 0)


def test_an_unknown_loss_names_the_nearest():
    with pytest.raises(ValueError, match="candidates"):
        check_name("candidate")
    assert all(check_name(name) == name for name in NAMES)


@pytest.mark.parametrize("loss", ["accuracy", "scorer:length"])
def test_a_run_on_an_objective_without_a_gradient(loss, tmp_path, monkeypatch, capsys):
    (tmp_path / "scorer.py").write_text("def length(prompt, answer, golds):\n    return -len(answer) / 100\n")
    monkeypatch.chdir(tmp_path)
    material = tiny.save_model(tmp_path / "model"), tiny.save_data(tmp_path / "data")
    done = tmp_path / "run"
    assert run(["train", *tiny.flags(*material, loss=loss, steps=2), "--output", str(done)]) == 0
    result = json.loads((done / "result.json").read_text())
    assert result["forward_passes"] == 4
    assert result["metric"] == "accuracy"
    capsys.readouterr()
    refused = ["train", *tiny.flags(*material, loss=loss, method="fo-adam"), "--output", str(tmp_path / "no")]
    assert run(refused) == 2
    assert "has no gradient" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("(prompt, answer, golds): pass", "gives None; a finite number is wanted"),
        ("(prompt, answer, golds): return float('nan')", "gives nan; a finite number is wanted"),
        ("(prompt, answer, golds): return 1 / 0", "raises ZeroDivisionError (division by zero)"),
        ("(prompt, answer, golds): raise RuntimeError", "raises RuntimeError (no message)"),
        ("(answer): return 1", "does not fit (too many positional arguments)"),
    ],
)
@pytest.mark.parametrize("answered", [True, False])
def test_a_function_that_gives_no_number_is_one_line(body, said, answered, tmp_path, monkeypatch, capsys):
    """Where answers are generated it is called to score test first, else by the first step."""
    module = f"faulty{abs(hash((body, answered)))}"
    (tmp_path / f"{module}.py").write_text(f"def f{body}\n")
    monkeypatch.chdir(tmp_path)
    model, data = tiny.save_model(tmp_path / "model"), tiny.save_data(tmp_path / "data", train=4, test=2)
    own = {"template": "{text}", "answer_field": "text", "label_words": None} if answered else {}
    flags = tiny.flags(model, data, loss=f"{module}:f", steps=2, **own)
    assert run(["train", *flags, "--output", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "zotune: " in line] == lines[-1:]
    assert f"{module}:f: called with prompt, answer and golds it {said}" in lines[-1]
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("kind", ["masked", "classifier"])
def test_a_loss_of_generated_answers_is_refused_for_models_that_write_none(kind):
    for loss in ("f1", "json:loads"):
        with pytest.raises(
            InputError, match=f"--loss {loss}: scores a generated answer, which a {kind} model cannot write"
        ):
            check_kind(kind, get_task("sst2"), loss)


def test_a_function_of_one_s_own_also_says_which_step_is_best(tmp_path, monkeypatch, capsys):
    """What it scores is a plain mean: here the prompt's digit, so that the figure is known whatever the model writes."""
    (tmp_path / "mine.py").write_text(
        "def digit(prompt, answer, golds):\n    return int(prompt[-1]) + 10 * (golds == ['a'])\n"
    )
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"day {i % 3}", "completion": "a"} for i in range(8)]
    for split in ("train", "validation", "test"):
        tiny.write_rows(tmp_path / f"{split}.jsonl", rows)
    tiny.save_model(tmp_path / "model")
    plain = {"template": None, "label_words": None, "steps": 2}
    flags = tiny.flags(tmp_path / "model", tmp_path, loss="mine:digit", **plain)
    assert run(["train", *flags, "--output", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metric"] == "mine:digit"
    assert result["test_after"] == result["validation_best"] == sum(int(row["prompt"][-1]) + 10 for row in rows) / 8
    assert "validation_mine:digit" in (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "asked.yaml").write_text("prompt: '{prompt}'\nanswer_field: completion\nmetric: mine:digit\n")
    given = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "test.jsonl"), "--device", "cpu"]
    capsys.readouterr()
    assert run(["eval", *given, "--task", str(tmp_path / "asked.yaml")]) == 0
    assert "mine:digit 10.88" in capsys.readouterr().out
    (tmp_path / "asked.yaml").write_text("prompt: '{prompt}'\nanswer_field: completion\nmetric: mine:none\n")
    assert run(["eval", *given, "--task", str(tmp_path / "asked.yaml")]) == 2
    assert "has no attribute 'none'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["masked", "classifier"])
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "the film"}, "is plain text"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "is conversations"),
    ],
)
def test_rows_for_causal_models_are_refused_once_and_not_row_by_row(kind, row, said, tmp_path, capsys):
    model = tiny.save_model(tmp_path / "model")
    data = tiny.write_rows(tmp_path / "notes.jsonl", [row] * 12)
    command = ["train", "--model", str(model), "--data", str(data), "--model-kind", kind, "--device", "cpu"]
    assert run([*command, "--output", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.splitlines()
    assert len(line) == 1
    assert line[0].startswith(
        f"zotune: --model: task 'notes.jsonl' {said}, which causal models train on; this is a {kind}"
    )
