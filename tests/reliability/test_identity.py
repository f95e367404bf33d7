"""`--resume` goes on with the rows, the tokenizer, the template and the task that the run began with, and with no others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
import tiny
import yaml
from processes import outcome
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from zotune.cli.app import run
from zotune.run.recorder import Recorder
from zotune.tasks import TASKS

CHAT = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<s>assistant\n{% endif %}"


@pytest.fixture
def place(material, tmp_path):
    """A model, data and a run's folder of its own: what may be changed under it."""
    model, data = (shutil.copytree(path, tmp_path / path.name) for path in material)
    return model, data, tmp_path / "run"


def begin(argv, monkeypatch, at=4):
    """A run that is stopped after some steps, as SIGTERM stops it."""
    step_end = Recorder.on_step_end

    def stopping(self, args, state, control, **kwargs):
        if state.global_step == at:
            self.state.ask_to_stop(15)
        step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_end", stopping)
        assert run(argv) == 143


def command(model, data, out, **changes):
    return ["train", *tiny.flags(model, data, **({"steps": 9, "save_every": 3} | changes)), "--output", str(out)]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def refused(argv, out, capsys):
    """The line that refuses a resumption, which has changed nothing in the folder."""
    before = contents(out)
    capsys.readouterr()
    assert run([*argv, "--resume"]) == 2
    assert contents(out) == before
    said = " ".join(capsys.readouterr().err.split())
    return said[said.index("--output") :]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_rows_whose_labels_were_swapped_are_refused_and_the_run_s_own_go_on(place, monkeypatch, capsys, split):
    model, data, out = place
    argv, path = command(*place), data / f"{split}.jsonl"
    begin(argv, monkeypatch)
    own = path.read_text()
    tiny.write_rows(path, [row | {"label": 1 - row["label"]} for row in rows_of(path)])
    said = refused(argv, out, capsys)
    assert f"holds a run of other rows ({split}); --resume goes on with its own alone" in said
    path.write_text(own)
    assert run([*argv, "--resume"]) == 0
    whole = out.with_name("whole")
    assert run(command(model, data, whole)) == 0
    a, b = outcome(whole), outcome(out)
    assert all(a[part] == b[part] for part in ("weights", "metrics"))


def test_rows_that_were_dropped_are_refused(place, monkeypatch, capsys):
    _, data, out = place
    argv = command(*place)
    begin(argv, monkeypatch)
    tiny.write_rows(data / "train.jsonl", rows_of(data / "train.jsonl")[:-5])
    assert "other rows (train);" in refused(argv, out, capsys)


@pytest.mark.parametrize("method", ["zo-sgd", "fo-adam"])
def test_another_base_model_under_the_same_name_is_refused(place, monkeypatch, capsys, method):
    model, _, out = place
    argv = command(*place, scheme="lora", method=method)
    begin(argv, monkeypatch)
    tiny.causal_model(seed=1).save_pretrained(model)
    before = contents(out)
    capsys.readouterr()
    assert run([*argv, "--resume"]) == 2
    assert contents(out) == before
    assert "its weights are not those that the run began with" in " ".join(capsys.readouterr().err.split())


def test_columns_that_the_model_never_sees_may_change(place, monkeypatch):
    argv, path = command(*place), place[1] / "train.jsonl"
    begin(argv, monkeypatch)
    tiny.write_rows(path, [row | {"comment": i} for i, row in enumerate(rows_of(path))])
    assert run([*argv, "--resume"]) == 0


def test_another_tokenizer_is_refused(place, monkeypatch, capsys):
    model, _, out = place
    argv = command(*place)
    begin(argv, monkeypatch)
    made = json.loads((model / "tokenizer.json").read_text())
    turned = list(reversed(made["model"]["vocab"].values()))
    made["model"]["vocab"] = dict(zip(made["model"]["vocab"], turned, strict=True))
    (model / "tokenizer.json").write_text(json.dumps(made))
    assert "holds a run of other tokenizer;" in refused(argv, out, capsys)


def test_a_tokenizer_that_splits_otherwise_is_refused(place, monkeypatch, capsys):
    """The same vocabulary, fewer merges: only the rows' own ids show it."""
    model, _, out = place
    argv = command(*place)
    begin(argv, monkeypatch)
    made = json.loads((model / "tokenizer.json").read_text())
    made["model"]["merges"] = made["model"]["merges"][:3]
    (model / "tokenizer.json").write_text(json.dumps(made))
    assert "holds a run of other tokenizer (the same texts have other ids);" in refused(argv, out, capsys)


@pytest.mark.parametrize(
    ("which", "changes"),
    [
        ("template", {"prompt": "{sentence} All in all it was"}),
        ("task", {"words": {"0": "good", "1": "bad"}}),
        ("task", {"metric": "f1a"}),
        ("template, task", {"prompt": "{sentence} So it was", "words": {"0": "poor", "1": "fine"}}),
    ],
)
def test_a_built_in_task_that_another_version_has_otherwise_is_refused(place, monkeypatch, capsys, which, changes):
    model, data, out = place
    for path in data.iterdir():
        tiny.write_rows(path, [{"sentence": row["text"], "label": row["label"]} for row in rows_of(path)])
    data.rename(data.with_name("sst2"))
    argv = command(model, data, out, task="sst2", template=None, label_words=None)
    at = argv.index("--data")
    argv[at : at + 2] = ["--data-dir", str(data.parent)]
    begin(argv, monkeypatch)
    monkeypatch.setitem(TASKS, "sst2", replace(TASKS["sst2"], **changes))
    assert f"holds a run of other {which};" in refused(argv, out, capsys)


def test_a_task_s_file_that_was_edited_is_refused_by_the_key_that_was(place, monkeypatch, capsys):
    model, data, out = place
    path = out.with_name("task.yaml")
    own = {"name": "own", "prompt": "{text} It was", "words": {"0": "bad", "1": "good"}}
    path.write_text(yaml.safe_dump(own))
    argv = command(model, data, out, task=path, template=None, label_words=None)
    begin(argv, monkeypatch)
    path.write_text(yaml.safe_dump(own | {"words": {"0": "bad", "1": "fine"}}))
    assert "other options (task.words.1 was 'good', is 'fine');" in refused(argv, out, capsys)


def conversations(folder):
    """Rows of messages, and a tokenizer with a chat template."""
    model, data = folder / "model", folder / "talk"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(model / "tokenizer.json")), bos_token="<s>", eos_token="</s>"
    )
    data.mkdir()
    for split, size in (("train", 12), ("validation", 4), ("test", 4)):
        rows = tiny.text_rows(size)
        talk = [[{"role": "user", "content": r["text"]}, {"role": "assistant", "content": "good"}] for r in rows]
        tiny.write_rows(data / f"{split}.jsonl", [{"messages": one} for one in talk])
    return model, data, tokenizer


def test_a_function_whose_file_was_edited_is_refused(place, monkeypatch, capsys):
    """The objective is what the run minimises: the same name says nothing of it."""
    code = place[2].parent / "judge.py"
    code.write_text("def good(prompt, answer, golds):\n    return float(answer in golds)\n")
    monkeypatch.syspath_prepend(str(code.parent))
    argv = command(*place, loss="judge:good", max_new_tokens=2, eval_every=9)
    begin(argv, monkeypatch)
    own = code.read_text()
    code.write_text(own.replace("in golds", "not in golds"))
    assert "holds a run of other code (judge:good); --resume" in refused(argv, place[2], capsys)
    code.write_text(own)
    progress = place[2] / "progress.json"
    held = json.loads(progress.read_text())
    assert held["made_of"].pop("code")  # as an older run has it
    progress.write_text(json.dumps(held))
    assert run([*argv, "--resume"]) == 0


def test_another_chat_template_is_refused(place, monkeypatch, capsys):
    out = place[2]
    model, data, tokenizer = conversations(out.parent)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)
    argv = command(model, data, out, template=None, label_words=None)
    begin(argv, monkeypatch)
    tokenizer.chat_template = f"the film {CHAT}"
    tokenizer.save_pretrained(model)
    assert "holds a run of other template;" in refused(argv, out, capsys)


class Tomorrow(datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + timedelta(days=1)


def test_a_chat_template_that_writes_the_day_goes_on_the_next_day_and_not_with_other_rows(place, monkeypatch, capsys):
    out = place[2]
    model, data, tokenizer = conversations(out.parent)
    tokenizer.chat_template = "{{ strftime_now('%d') }}" + CHAT
    tokenizer.save_pretrained(model)
    argv = command(model, data, out, template=None, label_words=None)
    begin(argv, monkeypatch)
    own = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(own.replace("good", "bad", 1))
    assert "holds a run of other rows (train);" in refused(argv, out, capsys)
    (data / "train.jsonl").write_text(own)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert run([*argv, "--resume"]) == 0


@pytest.mark.parametrize("record", [None, {"format": 0}, "words", {"format": 1}])
def test_a_record_that_does_not_say_goes_on_with_a_line_or_is_refused(place, monkeypatch, capsys, record):
    out = place[2]
    argv = command(*place)
    begin(argv, monkeypatch)
    progress = json.loads((out / "progress.json").read_text())
    progress.pop("made_of")
    (out / "progress.json").write_text(json.dumps(progress | ({"made_of": record} if record is not None else {})))
    if record == {"format": 1}:
        refused(argv, out, capsys)
        return
    assert run([*argv, "--resume"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "this run's record does not say which rows, tokenizer, template and task it began with; going on" in said


def test_a_run_that_begins_with_resume_says_nothing_of_its_record(place, capsys):
    assert run([*command(*place), "--resume"]) == 0
    assert "record" not in capsys.readouterr().err
