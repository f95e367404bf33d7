"""One id for padding, which the model's tables have: a row's scores are the same whatever rows stand beside it."""

from __future__ import annotations

import json
from pathlib import Path

import families
import peft
import pytest
import tiny
import torch
import transformers as tf

from zotune.cli.app import run
from zotune.models.ids import embedding_rows, pad_id
from zotune.models.schemes import get_scheme
from zotune.options import EvalConfig
from zotune.prepare.model import encoder_for, load
from zotune.tasks import Example, Task
from zotune.tasks.encoding import Encoder
from zotune.tasks.evaluation import outcome
from zotune.tasks.generation import answers_of
from zotune.tasks.rows import Row
from zotune.tasks.scoring import score_rows

FAMILIES = [*families.CAUSAL, *families.MASKED]
TEXTS = [
    "a",
    "the film was good and a great day",
    "bad",
    "a terrible day. It was bad. It was awfully long",
    "good film",
]
TASK = Task(name="own", prompt="{text} It was", words={"0": "bad", "1": "good", "2": "great"})
# What config and tokenizer call padding: both as they are; each other's; none; beyond the tables, as a token that was added.
PADS = ["own", "config", "none", "added"]


def saved(name: str, kind: str, pads: str, folder: Path) -> Path:
    words = families.tokenizer(name)
    model = families.build(name, kind, vocabulary=len(words) + 4)
    if pads == "config":
        model.config.pad_token_id = 3 if words.pad_token_id != 3 else 2
    elif pads == "none":
        model.config.pad_token_id = None
    elif pads == "added":
        words.add_tokens([f"<{i}>" for i in range(10)])
        words.add_special_tokens({"pad_token": "[NEWPAD]"})
        assert words.pad_token_id >= model.config.vocab_size
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.mul_(5)  # so that rows differ by more than rounding
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


CASES = [(name, pads) for name in FAMILIES for pads in PADS]
CASES.remove(("roberta", "none"))  # whose positions count from it


@pytest.mark.parametrize("kind", ["", "classifier"])
@pytest.mark.parametrize(("name", "pads"), CASES)
def test_scores_are_the_same_for_any_batch_size(tmp_path, name, kind, pads):
    folder = saved(name, kind, pads, tmp_path)
    options = EvalConfig(model=str(folder), data="rows", model_kind=kind or "auto", device="cpu")
    model, tokenizer = load(options, TASK)
    encode = encoder_for(model, tokenizer, options, TASK)
    rows = [encode(Example(f"{text} It was", (" bad", " good", " great"), 0, "row")) for text in TEXTS]
    pad = pad_id(tokenizer, model)
    assert 0 <= pad < (embedding_rows(model) or 0)
    alone, all_at_once, by_two = (
        torch.tensor(score_rows(model, rows, batch_size=size, pad_id=pad)) for size in (1, 5, 2)
    )
    torch.testing.assert_close(all_at_once, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_two, alone, rtol=1e-4, atol=1e-4)
    assert (alone[0] - alone[1]).abs().max() > 1e-3  # rows differ by more than that


def test_a_decoder_s_classifier_is_saved_with_the_id_that_it_was_trained_with(tmp_path):
    """And transformers' own pipeline, which pads by the tokenizer, finds the same last tokens."""
    folder = saved("llama", "", "config", tmp_path / "model")
    tiny.save_data(tmp_path / "data", train=8, validation=4, test=6)
    flags = tiny.flags(folder, tmp_path / "data", model_kind="classifier", steps=2, eval_every=2, template="{text}")
    assert run(["train", *flags, "--output", str(tmp_path / "run")]) == 0
    made = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    words = tf.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert made.config.pad_token_id == words.pad_token_id if words.pad_token_id is not None else words.eos_token_id
    out = tmp_path / "p.jsonl"
    given = ["--data", str(tmp_path / "data"), "--template", "{text}", "--label-words", tiny.WORDS, "--device", "cpu"]
    assert run(["predict", "--model", str(tmp_path / "run" / "model"), *given, "--output", str(out)]) == 0
    texts = [json.loads(line)["text"] for line in (tmp_path / "data" / "test.jsonl").read_text().splitlines()]
    for line, text in zip(out.read_text().splitlines(), texts, strict=True):
        with torch.no_grad():
            scores = made(input_ids=torch.tensor([words(text)["input_ids"]])).logits[0].log_softmax(-1)
        found = json.loads(line)["scores"]
        assert [found["0"], found["1"]] == pytest.approx(scores.tolist(), abs=1e-5)


@pytest.mark.parametrize("command", ["eval", "predict", "train", "preview"])
def test_a_token_that_the_embedding_does_not_have_is_one_line(tmp_path, capsys, command):
    tiny.save_model(tmp_path / "model")
    words = tiny.tokenizer(bos=True)
    words.add_tokens([f"<{i}>" for i in range(tiny.VOCABULARY - len(words))])
    words.add_tokens(["film"])
    words.save_pretrained(tmp_path / "model")
    tiny.save_data(tmp_path / "data", train=30, validation=30, test=30)
    flags = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--template", tiny.TEMPLATE]
    flags += ["--label-words", tiny.WORDS]
    flags += [] if command in ("preview", "eval") else ["--output", str(tmp_path / "out")]
    assert run([command, *flags]) == 2
    line = next(line for line in capsys.readouterr().err.splitlines() if "jsonl:" in line)
    assert f"token 'film' has id {len(words) - 1}, and the model's embedding {tiny.VOCABULARY} rows" in line


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_s_classifier_reads_the_end_that_its_tokenizer_writes(tmp_path, capsys, family):
    """By the tokenizer's id, whatever the config says, and with other padding; else one line."""
    small = {"vocab_size": tiny.VOCABULARY, "d_model": 32, "dropout_rate": 0.0, "eos_token_id": 5}
    if family == "t5":
        config = tf.T5Config(**small, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0)
        config.decoder_start_token_id = 0
        model = tf.T5ForSequenceClassification(config)
    else:
        halves = {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in BART.items()}
        config = tf.BartConfig(**small, **halves, max_position_embeddings=64, pad_token_id=0)
        config.id2label = {0: "0", 1: "1"}
        model = tf.BartForSequenceClassification(config)
    model.save_pretrained(tmp_path / "model")
    tiny.save_data(tmp_path / "data", test=12)
    flags = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--template", "{text}"]
    flags += ["--label-words", tiny.WORDS, "--device", "cpu"]
    for eos, code in ((True, 0), (False, 2)):
        tiny.tokenizer(eos=eos).save_pretrained(tmp_path / "model")
        found = []
        for size in ("1", "6"):
            out = tmp_path / f"{size}.jsonl"
            assert run(["predict", *flags, "--batch-size", size, "--output", str(out), "--overwrite"]) == code
            found += [[json.loads(line)["scores"]["0"] for line in out.read_text().splitlines()]]
        assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert "reads the token at the text's end, and its tokenizer writes none" in capsys.readouterr().err


BART = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PromptEncoderConfig, peft.PrefixTuningConfig])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_virtual_tokens_of_other_tools_keep_a_classifier_s_scores_or_are_refused(tmp_path, capsys, name, config):
    """Embeddings have no ids by which a decoder's head would find the text's end: it read padding, 13 nats off."""
    model = saved(name, "classifier", "own", tmp_path / "model")
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(model)
    adapted = peft.get_peft_model(loaded, config("SEQ_CLS", num_virtual_tokens=3))
    with torch.no_grad():
        for param in adapted.parameters():
            param += param.requires_grad * torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(tmp_path / "adapter")
    data = tiny.write_rows(tmp_path / "a.jsonl", [{"text": text, "label": 0} for text in TEXTS])
    argv = ["predict", "--model", str(model), "--adapter", str(tmp_path / "adapter"), "--device", "cpu"]
    argv += ["--data", str(data), "--template", TASK.prompt, "--label-words", json.dumps(TASK.words)]
    argv += ["--overwrite", "--output", str(tmp_path / "p.jsonl")]
    told = []
    for size in ("1", "8"):
        if run([*argv, "--batch-size", size]) == 2:
            assert (name, config is peft.PrefixTuningConfig) == ("llama", False)
            assert "cannot tell padding from text" in capsys.readouterr().err
            return
        told.append([json.loads(line)["scores"] for line in (tmp_path / "p.jsonl").read_text().splitlines()])
    assert config is peft.PrefixTuningConfig or name == "bert"
    for one, other in zip(*told, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("scheme", ["prefix", "prompt", "lora"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "phi3", "gpt2", "opt"])
def test_answers_are_the_same_for_any_batch_size(name, scheme):
    """Padding on the left stood between virtual tokens and the text, of rotary positions and of windows that slide."""
    words = families.tokenizer(name)
    model = families.build(name, vocabulary=len(words) + 4)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.mul_(5)
        model = get_scheme(scheme).prepare(model).eval()
        draw = torch.Generator().manual_seed(1)
        for param in model.parameters():
            if param.requires_grad:
                param.add_(torch.randn(param.shape, generator=draw) / 2)
    task = Task(name="own", prompt="{text} It was", answer_field="answer", max_new_tokens=6)
    rows = [Encoder(words, None)(task.example(Row({"text": text, "answer": "good"}, "f:1"))) for text in TEXTS]
    one, other = (
        outcome(model, words, task, rows, batch_size=size, pad_id=pad_id(words, model)).answers
        for size in (1, len(rows))
    )
    assert one == other
    assert len(set(one)) > 1


def test_an_answer_has_as_many_tokens_beside_a_longer_prompt_as_alone():
    """Near the end of what a model takes; it had those of the longest prompt of its batch."""
    words, model = families.tokenizer("gpt2"), families.build("gpt2", vocabulary=330)  # takes 64
    task = Task(name="own", prompt="{text}", answer_field="answer", max_new_tokens=12)
    texts = ["a", "a b c d " * 6, "a b c d " * 8, "a b c d " * 8 + "a b"]
    rows = [Encoder(words, None)(task.example(Row({"text": text, "answer": "good"}, "f:1"))) for text in texts]
    rooms = [min(12, 64 - len(row.prompt)) for row in rows]
    assert len(set(rooms)) > 2
    assert min(rooms) > 0
    one, other = (
        answers_of(model, words, rows, batch_size=size, pad_id=pad_id(words, model), most=12, end=None)
        for size in (1, len(rows))
    )
    assert one == other


@pytest.mark.parametrize("pad", [None, -1])
@pytest.mark.parametrize("kind", ["masked", "classifier"])
def test_a_model_that_counts_positions_from_its_padding_s_id_wants_it_named(tmp_path, capsys, kind, pad):
    """RoBERTa's embedding raises at the first batch of one whose config names none; −1 would count from the table's end."""
    folder = families.save("roberta", tmp_path / "roberta")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
    data = tiny.save_data(tmp_path / "data", train=4, validation=4, test=4)
    argv = [*tiny.flags(folder, data, model_kind=kind), "--output", str(tmp_path / "run")]
    for command in (["train", *argv], ["eval", *argv[:8], "--model-kind", kind, "--device", "cpu"]):
        assert run(command) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"pad_token_id of its config.json is {pad}, and the model counts positions from it" in line
