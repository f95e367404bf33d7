"""Every family of models, each with its own tokenizer's habits, through the commands: trained, saved, loaded, scored, replayed."""

from __future__ import annotations

import json
from pathlib import Path

import families
import peft
import pytest
import tiny
import torch
import transformers as tf
from families import CAUSAL, MASKED

from zotune.cli.app import run
from zotune.errors import InputError
from zotune.tasks import Example
from zotune.tasks.encoding import Collator, Encoder
from zotune.tasks.scoring import answer_losses, candidate_scores, score_rows

FAMILIES = [*CAUSAL, *MASKED]
SCHEMES = ["full", "lora", "prefix", "prompt", "head"]


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    tiny.save_data(folder / "data", train=8, validation=6, test=6)
    for name in FAMILIES:
        families.save(name, folder / name)
    return folder


def train(material: Path, name: str, out: Path, **changes: object) -> int:
    given = {"steps": 2, "eval_every": 1, "eps": "1e-2", "loss": "candidates"} | changes
    data = Path(str(given.pop("data", material / "data")))
    return run(["train", *tiny.flags(material / name, data, **given), "--output", str(out)])


def said(capsys) -> str:
    return capsys.readouterr().err


def evaluated(flags: list[str], out: Path) -> float:
    assert run(["eval", *flags, "--device", "cpu", "--output", str(out)]) == 0
    return json.loads(out.read_text())["value"]


def check_run(material: Path, name: str, out: Path, scheme: str, auto: type, **changes: object) -> None:
    """Trained; `model/` loads in transformers and PEFT, scores what the run's result says, and is what a replay rebuilds."""
    assert train(material, name, out, scheme=scheme, **changes) == 0
    result = json.loads((out / "result.json").read_text())
    template = str(changes.get("template", tiny.TEMPLATE))
    data = ["--data", str(material / "data"), "--template", template, "--label-words", tiny.WORDS]
    if scheme in ("full", "head"):
        saved = ["--model", str(out / "model")]
        _, info = auto.from_pretrained(out / "model", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
    else:
        kind = ["--model-kind", str(changes["model_kind"])] if "model_kind" in changes else []
        saved = ["--model", str(material / name), "--adapter", str(out / "model"), *kind]
    assert evaluated([*saved, *data], out / "value.json") == pytest.approx(result["test_after"])
    flags = ["--model", str(material / name), "--trajectory", str(out / "trajectory.zot"), "--device", "cpu"]
    assert run(["replay", *flags, "--output", str(out / "again")]) == 0
    for file in (out / "model").glob("*.safetensors"):
        assert (out / "again" / file.name).read_bytes() == file.read_bytes()


# every family whole, and by one scheme or two of the others; the rest takes minutes
RUNS = [
    pytest.param(name, scheme, marks=() if scheme == "full" or (i + j) % 3 == 0 else pytest.mark.slow)
    for i, name in enumerate(FAMILIES)
    for j, scheme in enumerate(SCHEMES)
]


@pytest.mark.parametrize(("name", "scheme"), RUNS)
def test_a_family_trains_loads_scores_and_replays(material, tmp_path, name, scheme, capsys):
    if (name, scheme) == ("deberta", "prefix"):
        assert train(material, name, tmp_path / "run", scheme=scheme) == 2
        assert "takes no keys and values from outside" in said(capsys)
        return
    auto = tf.AutoModelForCausalLM if name in CAUSAL else tf.AutoModelForMaskedLM
    check_run(material, name, tmp_path / "run", scheme, auto)


def refused(material: Path, tmp_path: Path, capsys, name: str, **changes: object) -> str:
    assert train(material, name, tmp_path / "run", **changes) == 2
    line = said(capsys).strip()
    assert "\n" not in line
    return line


# Masked language models.

TEXTS = ["a great film", "the day", "It was a terrible day and a good film"]
PROMPTS = ["{} It was", "{} It was <mask>.", "{} <mask> was it, a day."]


def asked(prompt: str, words: tuple[str, ...] = (" bad", " badly"), label: int = 1) -> Example:
    return Example(prompt, words, label, "f:1")


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", MASKED)
def test_a_masked_score_is_that_of_the_word_where_the_masks_stand(name, prompt):
    """Each text alone, all logits, the word's tokens replaced by masks."""
    words = families.tokenizer(name)
    model = families.build(name, vocabulary=len(words)).double()
    rows = [Encoder(words, 64, kind="masked")(asked(prompt.format(text))) for text in TEXTS]
    batch = Collator("candidates", words.pad_token_id, multiple=8)(rows)
    scores = candidate_scores(model, batch)
    assert max(len(answer) for row in rows for answer in row.candidates) > 1  # a word of several tokens is among them
    for text, row, found in zip(TEXTS, rows, scores, strict=True):
        for candidate, answer, score in zip((" bad", " badly"), row.candidates, found, strict=True):
            whole = prompt.format(text) if "<mask>" in prompt else prompt.format(text) + " <mask>."
            ids = words(whole.replace("<mask>", candidate.strip()))["input_ids"]
            first = len(row.prompt)
            assert list(row.prompt + answer + row.tail) == ids
            assert words.decode(answer).strip() == candidate.strip()
            hidden = ids[:first] + [words.mask_token_id] * len(answer) + ids[first + len(answer) :]
            logits = model(input_ids=torch.tensor([hidden])).logits[0].float().log_softmax(-1)
            wanted = torch.stack([logits[first + i, token] for i, token in enumerate(answer)]).mean()
            torch.testing.assert_close(score, wanted, rtol=1e-5, atol=1e-6)
    losses = answer_losses(model, Collator("answer", words.pad_token_id)(rows))
    torch.testing.assert_close(losses, -scores[:, 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MASKED)
def test_a_long_masked_prompt_is_cut_at_its_start_and_keeps_its_ends(name):
    words = families.tokenizer(name)
    whole = Encoder(words, None, kind="masked")(asked("the film was a day " * 9 + "It was <mask>, a film."))
    cut = Encoder(words, 64, max_length=24, kind="masked")(asked("the film was a day " * 9 + "It was <mask>, a film."))
    assert cut.tokens == 24
    assert cut.cut == whole.tokens - 24
    assert cut.prompt == whole.prompt[:1] + whole.prompt[1 + cut.cut :]
    assert (cut.candidates, cut.tail) == (whole.candidates, whole.tail)
    assert cut.prompt[0] == words.cls_token_id
    assert cut.tail[-1] == words.sep_token_id


def test_a_word_that_is_no_token_of_its_own_and_two_masks_are_refused():
    encode = Encoder(families.tokenizer("bert"), 64, kind="masked")
    with pytest.raises(InputError, match="'ble' shares a token with the text around it"):
        encode(asked("It was terri<mask>", ("ble", "d")))
    with pytest.raises(InputError, match="2 masks"):
        encode(asked("It was [MASK] or <mask>."))
    with pytest.raises(InputError, match="no mask token"):
        Encoder(families.tokenizer("llama"), 64, kind="masked")


def test_what_a_kind_of_model_cannot_do_is_said_in_a_line(material, tmp_path, capsys):
    masked = {"template": "{text} It was <mask>."}
    assert "<mask> is for masked models" in refused(material, tmp_path, capsys, "llama", **masked)
    answers = {"answer_field": "text", "label_words": None, "loss": "answer"}
    for kind in ("masked", "classifier"):
        line = refused(material, tmp_path, capsys, "bert", model_kind=kind, **answers)
        assert "generates its answers" in line
    for name in ("bert", "roberta"):
        line = refused(material, tmp_path, capsys, name, model_kind="causal")
        assert "an encoder, whose tokens see what comes after them" in line
    (tmp_path / "choices").mkdir()
    rows = [{"text": f"day {i}", "choices": ["good", "bad"], "label": i % 2} for i in range(40)]
    tiny.write_rows(tmp_path / "choices" / "train.jsonl", rows)
    tiny.write_rows(tmp_path / "choices" / "test.jsonl", rows)
    choices = {
        "choices_field": "choices",
        "label_words": None,
        "model_kind": "classifier",
        "data": tmp_path / "choices",
    }
    assert "no fixed labels" in refused(material, tmp_path, capsys, "bert", **choices)
    tf.AutoModel.from_config(families.build("bert", vocabulary=200).config).save_pretrained(tmp_path / "bare")
    families.tokenizer("bert").save_pretrained(tmp_path / "bare")
    line = refused(tmp_path, tmp_path, capsys, "bare", data=material / "data", model_kind="masked")
    assert "no weights for" in line
    assert "--model-kind classifier" in line
    line = refused(material, tmp_path, capsys, "gpt2", model_kind="classifier", scheme="prompt")
    assert "use --scheme prefix or lora" in line


# Sequence classification.


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", [*MASKED, "opt", "gpt2", "llama"])
def test_a_fresh_head_trains_loads_scores_and_replays(material, tmp_path, name, scheme):
    if (name, scheme) == ("deberta", "prefix") or (name in CAUSAL and scheme == "prompt"):
        return  # refused, see above
    auto = tf.AutoModelForSequenceClassification
    check_run(material, name, tmp_path / "run", scheme, auto, model_kind="classifier", template="{text}")
    if scheme == "full":
        config = tf.AutoConfig.from_pretrained(tmp_path / "run" / "model")
        assert config.id2label == {0: "0", 1: "1"}


def test_an_encoder_without_a_head_gets_one_that_follows_the_seed(material, tmp_path):
    """Its pooler too, which this checkpoint lacks: adapters carry both, so that PEFT alone gives the same logits."""
    base = tmp_path / "bare"
    families.build("bert", vocabulary=200).bert.save_pretrained(base)
    families.tokenizer("bert").save_pretrained(base)
    heads = {}
    for seed in (1, 1, 2):
        out = tmp_path / f"run{len(heads)}{seed}"
        assert train(tmp_path, "bare", out, data=material / "data", scheme="lora", lr=0, seed=seed) == 0
        for dropped in (5, 6):
            torch.manual_seed(dropped)
            model = tf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
            model = peft.PeftModel.from_pretrained(model, str(out / "model")).eval()
            logits = model(input_ids=torch.tensor([[2, 9, 4, 7]])).logits
            torch.testing.assert_close(logits, heads.setdefault(seed, logits.detach()))
    assert not torch.allclose(heads[1], heads[2])


def test_a_classifier_is_merged_and_scores_the_same(material, tmp_path):
    done = tmp_path / "run"
    assert train(material, "roberta", done, model_kind="classifier", scheme="lora", template="{text}") == 0
    base, adapter = str(material / "roberta"), str(done / "model")
    assert run(["merge", "--model", base, "--adapter", adapter, "--output", str(tmp_path / "merged")]) == 0
    ids = torch.tensor([[0, 9, 40, 7, 2]])
    merged = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    model = tf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    adapted = peft.PeftModel.from_pretrained(model, adapter).eval()
    torch.testing.assert_close(merged(input_ids=ids).logits, adapted(input_ids=ids).logits)
    out = tmp_path / "labels.jsonl"
    flags = ["--model", str(tmp_path / "merged"), "--data", str(material / "data" / "test.jsonl")]
    flags += ["--template", "{text}", "--label-words", tiny.WORDS]
    assert run(["predict", *flags, "--output", str(out), "--device", "cpu"]) == 0
    assert {json.loads(line)["label"] for line in out.read_text().splitlines()} <= {"0", "1"}


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_classifier_s_scores_are_those_of_each_text_alone(name):
    words = families.tokenizer(name)
    model = families.build(name, "classifier", vocabulary=len(words)).double()
    pad = model.config.pad_token_id
    encode = Encoder(words, 64, kind="classifier")
    rows = [encode(asked(text, (" bad", " good", " so"))) for text in TEXTS]
    found = score_rows(model, rows, batch_size=3, pad_id=pad)
    for text, scores in zip(TEXTS, found, strict=True):
        alone = model(input_ids=torch.tensor([words(text)["input_ids"]])).logits[0].float().log_softmax(-1)
        torch.testing.assert_close(torch.tensor(scores), alone, rtol=1e-5, atol=1e-5)


# Padding.


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_padding_on_the_left_gives_the_losses_of_padding_on_the_right(name):
    """Ours is on the right. On the left: a mask, and positions from the first token on (OPT and RoBERTa count them themselves)."""
    words = families.tokenizer(name)
    # Not in float64: a row that is masked whole is NaN there in Gemma 2's eager attention.
    model = families.build(name, vocabulary=len(words))
    encode = Encoder(words, 64, kind="causal" if name in CAUSAL else "masked")
    right = Collator("answer", model.config.pad_token_id or 0)([encode(asked(f"{text} It was")) for text in TEXTS])
    left = {k: v.clone() for k, v in right.items()}
    length = right["input_ids"].shape[1]
    left["attention_mask"] = torch.zeros_like(right["input_ids"])
    lengths = right["positions"].amax(1) + 1
    if name in MASKED:
        lengths = right["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
    for row, n in enumerate(lengths.tolist()):
        left["input_ids"][row] = right["input_ids"][row].roll(length - n)
        left["attention_mask"][row, length - n :] = 1
        left["positions"][row] += length - n
    left["positions"] = left["positions"].clamp(max=length - 1)  # of targets that are masked out
    if name not in ("opt", "roberta"):
        left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(answer_losses(model, left), answer_losses(model, right), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tokenizer_s_side_of_padding_changes_nothing_and_the_whole_is_encoded_as_one(name):
    words = families.tokenizer(name)
    kind = "causal" if name in CAUSAL else "masked"
    rows = []
    for side in ("left", "right"):
        words.padding_side = words.truncation_side = side
        rows.append(Encoder(words, 64, kind=kind)(asked("a great film It was")))
    assert rows[0] == rows[1]
    for text, answer in zip((" bad", " badly"), rows[0].candidates, strict=True):
        whole = words("a great film It was" + text + ("" if kind == "causal" else "."))["input_ids"]
        assert list(rows[0].prompt + answer + rows[0].tail) == whole
