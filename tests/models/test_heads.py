"""A classifier's outputs are its labels by name, in whatever order a task lists them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import families
import pytest
import tiny
import torch
import transformers as tf
from safetensors.torch import load_file

from zotune.cli.app import run
from zotune.record.trajectory import read_file

ORDER, OTHER = '{"0": "bad", "1": "good"}', '{"1": "good", "0": "bad"}'


@pytest.fixture(scope="module", params=["bert", "llama"])
def base(request, tmp_path_factory) -> Path:
    """A model without a head, and rows."""
    folder = tmp_path_factory.mktemp(request.param)
    families.save(request.param, folder / "model")
    tiny.save_data(folder / "data", train=24, validation=6, test=20)
    return folder


def train(base: Path, out: Path, model: Path | None = None, **changes: object) -> int:
    given = {"model_kind": "classifier", "template": "{text}", "steps": 3, "eval_every": 3, "lr": "1e-3"} | changes
    return run(["train", *tiny.flags(model or base / "model", base / "data", **given), "--output", str(out)])


def rows_of(base: Path, words: str) -> list[str]:
    return ["--data", str(base / "data"), "--template", "{text}", "--label-words", words, "--device", "cpu"]


def predicted(base: Path, out: Path, words: str, *flags: str) -> list[dict]:
    assert run(["predict", *flags, *rows_of(base, words), "--output", str(out), "--overwrite"]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def accuracy(base: Path, out: Path, words: str, *flags: str) -> float:
    assert run(["eval", *flags, *rows_of(base, words), "--output", str(out)]) == 0
    return json.loads(out.read_text())["value"]


def refused(capsys, code: int) -> str:
    assert code == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    return line


def renamed(model: Path, names: list[str] | None, to: Path) -> Path:
    """A copy whose outputs have these names, or none."""
    shutil.copytree(model, to)
    config = json.loads((to / "config.json").read_text())
    for key in ("id2label", "label2id"):
        config.pop(key, None)
    if names:
        config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (to / "config.json").write_text(json.dumps(config))
    return to


def logits_of(model: Path, texts: list[str]) -> list[list[float]]:
    """By transformers alone."""
    words = tf.AutoTokenizer.from_pretrained(model)
    made = tf.AutoModelForSequenceClassification.from_pretrained(model).eval()
    with torch.no_grad():
        ids = (torch.tensor([words(text)["input_ids"]]) for text in texts)
        return [made(input_ids=one).logits[0].log_softmax(-1).tolist() for one in ids]


@pytest.mark.parametrize("scheme", ["full", "lora"])
def test_the_order_of_label_words_changes_no_prediction(base, tmp_path, scheme):
    """Of a checkpoint, an adapter, what is merged of it and what is replayed; of a fine-tuned one the run's own figure."""
    done = tmp_path / "run"
    assert train(base, done, scheme=scheme) == 0
    kept = json.loads((done / "result.json").read_text())["test_after"]
    model, saved = ["--model", str(base / "model")], str(done / "model")
    trajectory = [*model, "--trajectory", str(done / "trajectory.zot")]
    ways = [["--model", saved]] if scheme == "full" else [[*model, "--adapter", saved]]
    if scheme == "lora":
        assert run(["merge", *ways[0], "--output", str(tmp_path / "merged")]) == 0
        ways.append(["--model", str(tmp_path / "merged")])
    else:
        assert run(["replay", *trajectory, "--output", str(tmp_path / "again"), "--device", "cpu"]) == 0
        ways.append(["--model", str(tmp_path / "again")])
    for flags in ways:
        first, second = (predicted(base, tmp_path / "p.jsonl", words, *flags) for words in (ORDER, OTHER))
        assert first == second
        assert any(line["scores"]["0"] != line["scores"]["1"] for line in first)
    for flags in (*ways, trajectory):
        assert {accuracy(base, tmp_path / "f.json", words, *flags) for words in (ORDER, OTHER)} == {kept}


def test_scores_are_those_of_the_outputs_that_bear_the_names(base, tmp_path):
    """transformers' own logits, by id2label; by the words where these are what the head's labels are called."""
    assert train(base, tmp_path / "run") == 0
    texts = [json.loads(line)["text"] for line in (base / "data" / "test.jsonl").read_text().splitlines()]
    model = tmp_path / "run" / "model"
    logits = logits_of(model, texts)
    for name, names in (("labels", ["1", "0"]), ("words", ["good", "bad"])):
        turned = renamed(model, names, tmp_path / name)
        for words in (ORDER, OTHER):
            found = predicted(base, tmp_path / "p.jsonl", words, "--model", str(turned))
            assert [[line["scores"]["1"], line["scores"]["0"]] for line in found] == [
                pytest.approx(one, abs=1e-5) for one in logits
            ]


def test_outputs_without_names_are_taken_in_the_task_s_order(base, tmp_path):
    assert train(base, tmp_path / "run") == 0
    bare = renamed(tmp_path / "run" / "model", None, tmp_path / "bare")
    for_order, for_other = (predicted(base, tmp_path / "p", words, "--model", str(bare)) for words in (ORDER, OTHER))
    for first, second in zip(for_order, for_other, strict=True):
        assert first["scores"]["0"] == second["scores"]["1"]
        assert first["scores"]["1"] == second["scores"]["0"]


@pytest.mark.parametrize("scheme", ["full", "lora"])
@pytest.mark.parametrize("loss", ["answer", "accuracy"])
def test_training_goes_on_by_name(base, tmp_path, scheme, loss):
    """The same steps in either order, the checkpoint's names in its order, and a replay of both."""
    assert train(base, tmp_path / "first") == 0
    model = tmp_path / "first" / "model"
    for name, words in (("a", ORDER), ("b", OTHER)):
        out = tmp_path / name
        assert train(base, out, model, label_words=words, scheme=scheme, loss=loss, eps="1e-1") == 0
        assert tf.AutoConfig.from_pretrained(out / "model").id2label == {0: "0", 1: "1"}
        assert read_file(out / "trajectory.zot").header.base["labels"] == ["0", "1"]
        flags = ["--model", str(model), "--trajectory", str(out / "trajectory.zot"), "--device", "cpu"]
        assert run(["replay", *flags, "--output", str(out / "again")]) == 0
    files = [next((tmp_path / way).glob("*.safetensors")) for way in ("a/model", "b/model", "a/again", "b/again")]
    first, *others = (load_file(file) for file in files)
    for other in others:
        assert first.keys() == other.keys()
        for key, value in first.items():
            torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-6)
    results = [json.loads((tmp_path / way / "result.json").read_text()) for way in ("a", "b")]
    assert results[0]["test_before"] == results[1]["test_before"]
    assert results[0]["test_after"] == results[1]["test_after"]


def test_a_fresh_head_is_of_the_run_s_labels_in_the_run_s_order(base, tmp_path):
    assert train(base, tmp_path / "run", label_words=OTHER) == 0
    assert tf.AutoConfig.from_pretrained(tmp_path / "run" / "model").id2label == {0: "1", 1: "0"}


def test_other_names_are_refused_in_a_line_that_has_both(base, tmp_path, capsys):
    assert train(base, tmp_path / "run", scheme="lora") == 0
    model, adapter = str(base / "model"), str(tmp_path / "run" / "model")
    assert run(["merge", "--model", model, "--adapter", adapter, "--output", str(tmp_path / "merged")]) == 0
    named = renamed(tmp_path / "merged", ["bad", "good"], tmp_path / "named")
    trajectory = str(tmp_path / "run" / "trajectory.zot")
    ways = {
        f"--model {named}: its head's labels are bad, good,": ["--model", str(named)],
        f"--adapter {adapter}: its head's labels are 0, 1,": ["--model", model, "--adapter", adapter],
        f"--trajectory {trajectory}: its head's labels are 0, 1,": ["--model", model, "--trajectory", trajectory],
    }
    rows = tiny.write_rows(tmp_path / "test.jsonl", [{"text": "a good day", "label": "yes"}] * 2)
    asked = ["--data", str(rows), "--template", "{text}", "--label-words", '{"yes": "fine", "no": "awful"}']
    capsys.readouterr()
    for said, flags in ways.items():
        line = refused(capsys, run(["eval", *flags, *asked, "--device", "cpu"]))
        assert f"{said} the task's yes, no; give --label-words" in line
    assert f"--model {named}" in refused(
        capsys, train(base, tmp_path / "out", named, label_words='{"0": "x", "1": "y"}')
    )


def test_another_number_of_labels_is_refused_in_a_line(base, tmp_path, capsys):
    three = '{"0": "bad", "1": "good", "2": "so"}'
    assert train(base, tmp_path / "run") == 0
    model = tmp_path / "run" / "model"
    bare = renamed(model, None, tmp_path / "bare")
    capsys.readouterr()
    line = refused(capsys, train(base, tmp_path / "out", model, label_words=three))
    assert f"--model {model}: its head has 2 labels (0, 1), the task has 3 (0, 1, 2); give --label-words" in line
    code = run(["eval", "--model", str(bare), *rows_of(base, three)])
    line = refused(capsys, code)
    assert f"--model {bare}: its head has 2 labels, the task has 3 (0, 1, 2); give --label-words" in line
    assert "ignore_mismatched_sizes" not in line
