"""Built-in tasks: the prompt and answers of each, on rows of the hub's fields, and their metrics."""

from __future__ import annotations

import json

import pytest
import tiny

from zotune.cli.app import run
from zotune.errors import InputError
from zotune.tasks import TASKS, get_task
from zotune.tasks.encoding import Encoded
from zotune.tasks.metrics import CHOICE_METRICS, accuracy, binary_f1, chosen_f1, exact, text_f1, text_metric
from zotune.tasks.rows import Row
from zotune.tasks.splits import find_source

PAIR = {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0}
GOLDEN = {
    "sst2": ({"sentence": "a fine film", "label": 1}, "a fine film It was", [" terrible", " great"], 1),
    "sst5": (
        {"text": "so so", "label": 2}, "so so It was", [" terrible", " bad", " okay", " good", " great"], 2
    ),
    "rte": (PAIR, 'It rains.\nDoes this mean that "It is wet." is true? Yes or No?\n', ["Yes", "No"], 0),
    "cb": (
        PAIR, 'Suppose It rains. Can we infer that "It is wet."? Yes, No, or Maybe?\n', ["Yes", "No", "Maybe"], 0
    ),
    "boolq": (
        {"passage": "Tea is a drink.", "question": "is tea a drink", "label": 1},
        "Tea is a drink. Is tea a drink?\n", ["No", "Yes"], 1,
    ),
    "wsc": (
        {"text": "Ann saw Eve; she ran.", "span1_text": "Eve", "span2_text": "she", "label": 1},
        'Ann saw Eve; she ran.\nIn the previous sentence, does the pronoun "she" refer to Eve? Yes or No?\n',
        ["No", "Yes"], 1,
    ),
    "wic": (
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "A bank robbed.", "label": 0},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA river bank.\nA bank robbed.\n',
        ["No", "Yes"], 0,
    ),
    "multirc": (
        {"paragraph": "Bo ate.", "question": "Who ate?", "answer": "Bo", "label": 1},
        'Bo ate.\nQuestion: Who ate?\nI found this answer "Bo". Is that correct? Yes or No?\n', ["No", "Yes"], 1,
    ),
    "copa": (
        {"premise": "The cup fell.", "choice1": "It broke.", "choice2": "I slept.", "question": "effect", "label": 0},
        "The cup fell so", [" it broke.", " I slept."], 0,
    ),
    "winogrande": (
        {"sentence": "Ann beat Eve because _ trained.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        "Ann beat Eve because", [" Ann trained.", " Eve trained."], 1,
    ),
    "record": (
        {
            "passage": "Ann won.\n@highlight\nEve lost", "query": "So @placeholder smiled", "entities": ["Eve", "Ann"],
            "answers": ["Ann"],
        },
        "Ann won.\n- Eve lost\n- So", [" Eve smiled", " Ann smiled"], 1,
    ),
    "squad": (
        {"title": "T", "context": "Bo ate.", "question": " Who ate?", "answers": {"text": ["Bo", "bo"], "answer_start": [0]}},
        "Context: Bo ate.\nQuestion: Who ate?\nAnswer:", [" Bo"], 0,
    ),
    "drop": (
        {"passage": "3 of 5.", "question": "How many?", "answers": ["3", "three"]},
        "Passage: 3 of 5.\nQuestion: How many?\nAnswer:", [" 3"], 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_a_row_is_asked_as_its_task_asks(name):
    fields, prompt, candidates, label = GOLDEN[name]
    example = get_task(name).example(Row(fields, "f:1"))
    assert (example.prompt, list(example.candidates), example.label) == (prompt, candidates, label)
    unlabelled = get_task(name).example(Row(fields, "f:1"), labelled=False)
    assert unlabelled.label is None
    assert unlabelled.prompt == prompt
    assert unlabelled.golds == ()


@pytest.mark.parametrize(
    ("split", "golds"),
    [("train", ("Schilens and Schilens and Russell",)), ("validation", ("Schilens", "Russell"))],
)
def test_spans_of_drop_are_one_answer_where_trained_on_and_alternatives_elsewhere(split, golds, tmp_path):
    spans = {"spans": ["Schilens", "Schilens", "Russell"], "types": ["span"] * 3}
    tiny.write_rows(tmp_path / f"{split}.jsonl", [{"passage": "p", "question": "Who?", "answers_spans": spans}])
    rows = find_source(get_task("drop"), str(tmp_path), None).rows(split)
    assert get_task("drop").example(rows[0]).golds == golds


def test_record_compares_entities_and_squad_all_answers():
    record = get_task("record").example(Row(GOLDEN["record"][0], "f:1"))
    assert (record.golds, record.names) == (("Ann",), ("Eve", "Ann"))
    assert get_task("squad").example(Row(GOLDEN["squad"][0], "f:1")).golds == ("Bo", "bo")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("copa", {"question": "why"}, "effect, cause"),
        ("copa", {"label": 2}, "one of 0, 1"),
        ("winogrande", {"sentence": "no blank"}, "one blank"),
        ("record", {"answers": ["Zoe"]}, "among the entities"),
        ("record", {"query": "no"}, "@placeholder"),
        ("squad", {"answers": {"text": []}}, "one or more answers"),
        ("boolq", {"label": 7}, "one of 0, 1, false, true"),
    ],
)
def test_a_row_that_cannot_be_asked_says_where_and_what(name, change, said):
    with pytest.raises(InputError, match=said) as error:
        get_task(name).example(Row(GOLDEN[name][0] | change, "f:7"))
    assert "f:7" in str(error.value)


def test_alignment_none_leaves_the_template_out():
    assert get_task("sst2").aligned("none").example(Row(GOLDEN["sst2"][0], "f:1")).prompt == "a fine film"
    assert get_task("rte").aligned("none").example(Row(PAIR, "f:1")).prompt == "It rains.\nIt is wet.\n"
    assert get_task("rte").aligned("template") is get_task("rte")
    with pytest.raises(InputError, match="one form"):
        get_task("copa").aligned("none")


def rows(*labels: int, **more) -> list[Encoded]:
    return [Encoded((1,), ((2,), (3,)), label, **more) for label in labels]


def test_metrics_by_hand():
    scores = [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
    assert accuracy(scores, rows(1, 0, 0, 1)) == 50
    assert binary_f1(scores, rows(1, 0, 0, 1)) == 50  # one true positive, one false, one missed
    assert binary_f1([[1.0, 0.0]], rows(1)) == 0
    assert exact("The Cat!", ["cat"]) == 1
    assert text_f1("a red cat", ["red dog", "cat"]) == pytest.approx(2 / 3)
    assert text_f1("", [""]) == 1
    assert text_f1("x", [""]) == 0
    assert text_metric("f1", ["Bo", "no"], rows(0, 0, golds=("bo",))) == 50
    named = rows(0, golds=("Ann Lee",), names=("Ann", "Eve"))
    assert chosen_f1([[2.0, 1.0]], named) == pytest.approx(200 / 3)
    assert {task.metric for task in TASKS.values() if not task.generates} <= set(CHOICE_METRICS)


def test_answers_are_trained_generated_and_scored_from_the_command_line(tmp_path, capsys):
    model = tiny.save_model(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    lines = [{"text": f"the film {i}", "answer": ["good", "great"]} for i in range(12)]
    for split in ("train", "validation", "test"):
        tiny.write_rows(data / f"{split}.jsonl", lines)
    own = ["--data", str(data), "--template", "{text} It was", "--answer-field", "answer"]
    flags = ["--model", str(model), *own, "--device", "cpu", "--batch-size", "4"]
    done = tmp_path / "run"
    assert run(["train", *flags, "--steps", "4", "--eval-every", "2", "--lr", "1e-3", "--output", str(done)]) == 0
    assert json.loads((done / "result.json").read_text())["metric"] == "f1"
    assert run(["eval", *flags, "--output", str(tmp_path / "f.json")]) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["metric"] == "f1"
    assert 0 <= figures["exact_match"] <= figures["value"] <= 100
    assert run(["predict", *flags, "--output", str(tmp_path / "p.jsonl")]) == 0
    written = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(written) == 12
    assert all("\n" not in line["answer"] for line in written)
    capsys.readouterr()
    assert run(["train", *flags, "--loss", "candidates", "--output", str(tmp_path / "x")]) == 2
    assert "--loss candidates" in capsys.readouterr().err
    assert run(["preview", *own, "--model", str(model), "--rows", "2"]) == 0
    assert "tokens a row" in capsys.readouterr().out


def test_a_batch_of_answers_is_each_alone():
    import torch

    from zotune.tasks.generation import generate_answers

    model, tokenizer = tiny.causal_model(), tiny.tokenizer(bos=True)
    torch.manual_seed(0)
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in ("the film", "a great terrible day It was", "good")]
    encoded = [Encoded(prompt, ((),), -1) for prompt in prompts]
    common = {"pad_id": 1, "most": 8}
    together = generate_answers(model, tokenizer, encoded, batch_size=3, **common)
    alone = [generate_answers(model, tokenizer, [row], batch_size=1, **common)[0] for row in encoded]
    assert together == alone


@pytest.mark.parametrize("adapted", [False, True])
def test_an_answer_is_the_likeliest_token_each_time_whatever_the_checkpoint_asks_for(adapted):
    import torch
    import transformers as tf

    from zotune.models import schemes
    from zotune.tasks.generation import generate_answers

    model, tokenizer = tiny.causal_model(), tiny.tokenizer(bos=True)
    prompt = tokenizer("a great terrible day It was")["input_ids"]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    wanted = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip().split("\n")[0].strip()
    assert wanted
    asks = tf.GenerationConfig(
        eos_token_id=1, repetition_penalty=5.0, no_repeat_ngram_size=1, suppress_tokens=[ids[len(prompt)]], num_beams=3,
        bad_words_ids=[[ids[len(prompt)]]], min_new_tokens=8, forced_eos_token_id=1, do_sample=True, temperature=9.0,
    )  # fmt: skip
    model.generation_config = asks
    model = schemes.prepare(model, "lora") if adapted else model
    rows = [Encoded(tuple(prompt), ((),), -1)]
    assert generate_answers(model, tokenizer, rows, batch_size=1, pad_id=1, most=8) == [wanted]
    assert model.generation_config is asks


def test_an_answer_ends_where_the_model_does():
    """Position tables end there, as OPT's and GPT-2's do; a prompt that fills them is refused in a line."""
    import transformers as tf

    from zotune.tasks.generation import generate_answers

    tokenizer = tiny.tokenizer()
    sizes = {
        "vocab_size": tiny.VOCABULARY,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config = tf.OPTConfig(**sizes, max_position_embeddings=24, word_embed_proj_dim=32, eos_token_id=1, pad_token_id=1)
    model = tf.OPTForCausalLM(config).eval()
    long, full = Encoded(tuple(range(5, 25)), ((),), -1), Encoded(tuple(range(5, 29)), ((),), -1)
    assert len(generate_answers(model, tokenizer, [long], batch_size=1, pad_id=1)) == 1
    with pytest.raises(InputError, match=r"24 tokens leaves no room to answer, the model takes 24; .*--max-length 12"):
        generate_answers(model, tokenizer, [full], batch_size=1, pad_id=1)
