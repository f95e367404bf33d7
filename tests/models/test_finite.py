"""Numbers that are not finite are refused before a label or a token is made of them."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import tiny
import torch
import transformers as tf

from zotune.cli.app import run
from zotune.errors import NotFinite
from zotune.models.finite import refuse_weights
from zotune.tasks.generation import left_padded, write
from zotune.tasks.objectives import error_rate, generated_losses

LARGE = 300.0  # a factor on two matrices, whose product leaves float16's range


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model that is right in float32 and overflows in float16, a masked one and a classifier that do, and rows."""
    folder = tmp_path_factory.mktemp("finite")
    overflowing(tiny.causal_model(tie=False)).save_pretrained(folder / "causal")
    tiny.tokenizer(bos=True).save_pretrained(folder / "causal")
    families.save("bert", folder / "masked")
    overflowing(tf.AutoModelForMaskedLM.from_pretrained(folder / "masked")).save_pretrained(folder / "masked")
    classifier = tf.AutoModelForSequenceClassification.from_pretrained(folder / "causal", num_labels=2)
    classifier.config.pad_token_id = 1
    overflowing(classifier).save_pretrained(folder / "classifier")
    tiny.tokenizer(bos=True).save_pretrained(folder / "classifier")
    tiny.save_data(folder / "data", train=12, validation=6, test=10)
    rows = [{"q": row["text"], "a": "good"} for row in tiny.text_rows(8)]
    for split in ("train", "validation", "test"):
        (folder / "answers").mkdir(exist_ok=True)
        tiny.write_rows(folder / "answers" / f"{split}.jsonl", rows)
    return folder


@torch.no_grad()
def overflowing(model):
    for name, param in model.named_parameters():
        if name.endswith(("up_proj.weight", "gate_proj.weight", "intermediate.dense.weight", "output.dense.weight")):
            param.mul_(LARGE / param.abs().mean() / 10)
    return model


def own(base: Path) -> list[str]:
    return ["--data", str(base / "data"), "--template", tiny.TEMPLATE, "--label-words", tiny.WORDS, "--device", "cpu"]


def answers(base: Path) -> list[str]:
    return ["--data", str(base / "answers"), "--template", "{q}", "--answer-field", "a", "--device", "cpu"]


def line_of(capsys, code: int, wanted: int = 2) -> str:
    assert code == wanted
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "nan" not in line.lower()
    return line


@pytest.mark.parametrize("kind", ["causal", "masked", "classifier"])
@pytest.mark.parametrize("command", ["eval", "predict"])
def test_scores_that_overflow_are_refused_and_no_file_is_written(base, tmp_path, capsys, kind, command):
    out = tmp_path / "out.json"
    flags = [command, "--model", str(base / kind), *own(base), "--output", str(out)]
    line = line_of(capsys, run([*flags, "--dtype", "float16"]))
    assert "10 of 10 rows: scores are not finite in float16" in line
    assert "try --dtype bfloat16 or float32" in line
    assert not out.exists()
    assert run(flags) == 0
    assert "NaN" not in out.read_text()


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_an_answer_is_not_written_from_logits_that_overflow(base, tmp_path, capsys, command):
    out = tmp_path / "out.json"
    flags = [command, "--model", str(base / "causal"), *answers(base), "--output", str(out)]
    line = line_of(capsys, run([*flags, "--dtype", "float16"]))
    assert "8 of 8 rows: the logits of what it writes are not finite in float16" in line
    assert not out.exists()
    assert run(flags) == 0


@pytest.mark.parametrize("loss", ["answer", "candidates", "accuracy"])
def test_training_begins_with_no_score_that_overflows(base, tmp_path, capsys, loss):
    flags = tiny.flags(base / "causal", base / "data", dtype="float16", loss=loss, engine="sequential")
    line = line_of(capsys, run(["train", *flags, "--output", str(tmp_path / "run")]), 1)
    assert "test, before: 10 of 10 rows: scores are not finite in float16" in line


def test_text_that_overflows_has_no_perplexity(base, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    tiny.write_rows(data / "test.jsonl", [{"text": row["text"]} for row in tiny.text_rows(5)])
    flags = ["eval", "--model", str(base / "causal"), "--data", str(data), "--device", "cpu", "--dtype", "float16"]
    assert "5 of 5 rows: losses are not finite in float16" in line_of(capsys, run(flags))


def test_a_long_prompt_that_is_read_once_is_refused_too(base, tmp_path, capsys):
    rows = [{"q": "the film " * 8, "c": ["good day", "bad great", "terrible film"], "label": 0} for _ in range(3)]
    data = tmp_path / "data"
    data.mkdir()
    tiny.write_rows(data / "test.jsonl", rows)
    flags = ["eval", "--model", str(base / "causal"), "--data", str(data), "--template", "{q}", "--choices-field", "c"]
    line = line_of(capsys, run([*flags, "--device", "cpu", "--dtype", "float16"]))
    assert "3 of 3 rows: scores are not finite" in line


def test_weights_that_are_not_finite_are_named(base, tmp_path, capsys):
    model = tiny.causal_model(tie=False)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer(bos=True).save_pretrained(tmp_path / "model")
    line = run(["eval", "--model", str(tmp_path / "model"), *own(base)])
    assert line == 2
    assert "its weights are not (model.layers.1.mlp.up_proj.weight is the first): fetch" in capsys.readouterr().err
    with pytest.raises(NotFinite, match=r"replay: weights are not finite in float32 \(model.layers.1"):
        refuse_weights(model, "replay")


def broken_causal():
    model = tiny.causal_model(tie=False)
    with torch.no_grad():
        model.lm_head.weight[5] = float("inf")
    return model


def test_losses_without_a_gradient_are_nan_where_the_model_is():
    """So that a step is skipped; the right label's loss would be 0 where the right label is the first."""
    batch = {
        "input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]]),
        "positions": torch.tensor([[2], [2]]),
        "targets": torch.tensor([[5], [5]]),
        "candidates": torch.tensor([[9, 5], [9, 5]]),
        "labels": torch.tensor([0, 0]),
    }
    with torch.no_grad():
        assert error_rate(broken_causal(), batch).isnan().all()
        sound = error_rate(tiny.causal_model(tie=False), batch)
    assert set(sound.tolist()) <= {0.0, 1.0}
    ids, mask = left_padded([[3, 4, 5], [6, 7]], 1)
    written = {"prompt_ids": ids, "prompt_mask": mask, "prompts": ["a", "b"], "golds": [["x"], ["x"]]}
    common = {"tokenizer": tiny.tokenizer(), "pad_id": 1, "score": lambda prompt, text, golds: 1.0, "offset": 1.0}
    with torch.no_grad():
        assert generated_losses(broken_causal(), written, **common).isnan().all()
        assert generated_losses(tiny.causal_model(), written, **common).tolist() == [0.0, 0.0]


def test_logits_behind_an_answer_s_end_count_for_nothing(monkeypatch):
    """Rows that have ended are fed padding until the longest has."""
    model = tiny.causal_model(tie=False)
    forward, calls = model.forward, []

    def altered(*args, **kwargs):
        found = forward(*args, **kwargs)
        calls.append(1)
        if len(calls) == 1:
            found.logits[0, -1, 1] = 1e4  # the first row ends
        elif len(calls) == 3:
            found.logits[0] = float("nan")
        elif len(calls) == 4:
            found.logits[2] = float("nan")
        return found

    monkeypatch.setattr(model, "forward", altered)
    model.generation_config.eos_token_id = 1
    ids, mask = left_padded([[3, 4], [6, 7], [8, 9]], 1)
    with torch.no_grad():
        first, second, third = write(model, tiny.tokenizer(), ids, mask, pad_id=1, most=6)
    assert first.text == ""
    assert [first.finite, second.finite, third.finite] == [True, True, False]


def test_a_run_whose_validation_leaves_the_range_stops_with_1_and_keeps_what_it_has(
    base, tmp_path, capsys, monkeypatch
):
    from zotune.prepare.prepared import Prepared

    score, seen = Prepared.score, []

    def fails(self, rows, listener, what):
        seen.append(what)
        if seen.count("validation") == 2:
            raise NotFinite("3 of 6 rows: scores are not finite in float16; it overflows there: try --dtype float32")
        return score(self, rows, listener, what)

    monkeypatch.setattr(Prepared, "score", fails)
    out = tmp_path / "run"
    line = line_of(capsys, run(["train", *tiny.flags(base / "causal", base / "data"), "--output", str(out)]), 1)
    assert "step 4: validation: 3 of 6 rows" in line
    assert (out / "checkpoint-2" / "model.safetensors").exists()


def strict(text: str) -> object:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def test_a_skipped_step_leaves_no_nan_in_any_json(base, tmp_path):
    """Checkpoints, lines and results of a run with steps that were skipped; it resumes from them."""
    out = tmp_path / "run"
    flags = tiny.flags(base / "causal", base / "data", dtype="float16", lr="1e-5", steps=4, eval_every=4, log_every=3)
    sound = tmp_path / "sound"
    tiny.save_model(sound, tie=False)
    flags[flags.index("--model") + 1] = str(sound)
    flags += ["--eps", "1e5", "--save-every", "2", "--keep", "9"]  # probes overflow, weights do not
    assert run(["train", *flags, "--output", str(out)]) == 0
    assert json.loads((out / "result.json").read_text())["skipped_steps"] == 4
    files = [path for path in out.rglob("*.json*") if path.suffix in (".json", ".jsonl")]
    assert any(path.name == "trainer_state.json" for path in files)
    for path in files:
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            strict(text)
