"""Reward functions: those that zotune brings, somebody's own, and what they may do wrong."""

from __future__ import annotations

import json
import math
import time

import pytest
import tiny
import torch
import transformers as tf

from zotune.errors import InputError
from zotune.rewards import Reward, RewardError, is_code
from zotune.rewards.asking import Rewards, Written
from zotune.rewards.functions import as_rewards, find
from zotune.rewards.prompts import Prompt, PromptEncoder
from zotune.rewards.shown import samples
from zotune.tasks.encoding import Encoder
from zotune.tasks.rows import Row

TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>a:{% endif %}"


def answers(*texts: str, **columns: list) -> list[Written]:
    rows = [{name: values[i] for name, values in columns.items()} for i in range(len(texts))]
    return [
        Written(Prompt((1,), "ask", f"p.jsonl:{i + 1}", row), text, tuple(range(len(text))))
        for i, (text, row) in enumerate(zip(texts, rows, strict=True))
    ]


def total(call, *texts: str, **columns: list) -> list[float]:
    return Rewards([Reward("own", call)])(answers(*texts, **columns)).total_n


def scored(name: str, *texts: str, **columns: list) -> list[float]:
    return Rewards([find(name)])(answers(*texts, **columns)).total_n


def test_exact_match_and_f1_compare_with_a_column_as_squad_does():
    given = {"answer": ["the cat", ["dog", "a cat"], "x"]}
    assert scored("exact-match", " Cat. ", "cat", "y", **given) == [1.0, 1.0, 0.0]
    assert scored("token-f1", "the cat sat", "dog", "", **given) == [pytest.approx(2 / 3), 1.0, 0.0]
    assert scored("exact-match:gold", "a", gold=["a"]) == [1.0]


def test_a_row_without_an_answer_gets_no_reward_rather_than_none_right():
    found = scored("exact-match", "a", "a", answer=["a", None])
    assert found[0] == 1
    assert math.isnan(found[1])


def test_a_column_that_no_row_has_is_named():
    with pytest.raises(RewardError, match=r"no column 'answer' \(but 'gold'\)"):
        scored("exact-match", "a", gold=["a"])


def test_length_and_pattern_are_their_formulas():
    assert scored("length:4", "aaaa", "aa", "a" * 12) == [1.0, 0.5, 0.0]
    assert scored(r"regex:\d+ apples", "I have 3 apples", "I have no apples") == [1.0, 0.0]


def test_json_asks_for_json_and_a_schema_for_its_shape(tmp_path):
    assert scored("json", '{"a": 1}', "{", "[1]") == [1.0, 0.0, 1.0]
    pytest.importorskip("jsonschema")
    schema = tmp_path / "s.json"
    schema.write_text(json.dumps({"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}))
    assert scored(f"json:{schema}", '{"a": 1}', '{"a": "1"}', "[1]", '{"a": 1') == [1.0, 0.0, 0.0, 0.0]
    schema.write_text('{"type": 3}')
    with pytest.raises(InputError, match="no JSON schema"):
        find(f"json:{schema}")


def test_gym_scores_its_own_rows():
    pytest.importorskip("reasoning_gym")
    from zotune.rewards.gym import gym_rows

    rows = gym_rows("gym:basic_arithmetic?min_digits=1&max_digits=1", 3, 0)
    assert gym_rows("gym:basic_arithmetic?min_digits=1&max_digits=1", 3, 0) == rows
    given = {name: [row[name] for row in rows] for name in ("answer", "entry")}
    found = scored("gym:basic_arithmetic", rows[0]["answer"], "no number", rows[2]["answer"], **given)
    assert found[0] == found[2] == 1
    assert found[1] < 1
    with pytest.raises(InputError, match="did you mean 'basic_arithmetic'"):
        gym_rows("gym:basic_arithmetics", 1, 0)


@pytest.mark.parametrize("labels", [1, 2])
def test_a_reward_model_gives_its_logit_or_log_odds(tmp_path, labels):
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, num_labels=labels, pad_token_id=1,
    )  # fmt: skip
    model = tf.LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer(bos=True)
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(**tokenizer("askgood", return_tensors="pt")).logits[0]
    found = scored(f"model:{tmp_path}", "good", "bad day")
    wanted = logits[0] if labels == 1 else logits[1] - logits[0]
    assert found[0] == pytest.approx(float(wanted), abs=1e-5)
    assert found[0] != found[1]


def test_a_model_of_many_classes_is_no_reward(tmp_path):
    config = tf.LlamaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_labels=3, pad_token_id=1,
    )  # fmt: skip
    tf.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="3 outputs"):
        find(f"model:{tmp_path}")


def test_a_function_of_a_file_has_its_neighbours_and_its_own_name(tmp_path):
    (tmp_path / "beside.py").write_text("WORTH = 7.0\n")
    (tmp_path / "mine.py").write_text("from beside import WORTH\ndef worth(completions, **_): return [WORTH]\n")
    made = find(f"{tmp_path}/mine.py:worth")
    assert made.name == "worth"
    assert made.code
    assert made.call(completions=["a"]) == [7.0]
    with pytest.raises(InputError, match="has no 'wort'; did you mean 'worth'"):
        find(f"{tmp_path}/mine.py:wort")
    with pytest.raises(InputError, match="no such file"):
        find(f"{tmp_path}/other.py:worth")
    (tmp_path / "broken.py").write_text("1/0\n")
    with pytest.raises(InputError, match=r"broken.py raises ZeroDivisionError \(division by zero\)"):
        find(f"{tmp_path}/broken.py:worth")


def test_names_are_told_apart_from_code_and_near_ones_are_named():
    assert find("math:floor").code
    assert not is_code("json:schema.json")
    with pytest.raises(InputError, match="did you mean 'exact-match'"):
        find("exactmatch")
    twice = as_rewards([lambda completions, **_: [], lambda completions, **_: []])
    assert [one.name for one in twice] == ["<lambda> 1", "<lambda> 2"]


def test_a_function_gets_what_trl_gives_it():
    seen = {}

    def call(prompts, completions, completion_ids, trainer_state, level, **kwargs):
        seen.update(
            prompts=prompts,
            ids=completion_ids,
            again=kwargs["completions_ids"],
            step=trainer_state.global_step,
            level=level,
        )
        return [1.0] * len(completions)

    assert total(call, "ab", "c", level=[1, 2]) == [1.0, 1.0]
    assert seen == {"prompts": ["ask", "ask"], "ids": [[0, 1], [0]], "again": [[0, 1], [0]], "step": 0, "level": [1, 2]}


def test_what_a_function_logs_is_kept_beside_its_rewards():
    def call(completions, log_extra, log_metric, **_):
        log_extra("letters", [sorted(set(text)) for text in completions])
        log_metric("share_long", sum(len(text) > 1 for text in completions) / len(completions))
        return [1.0] * len(completions)

    scores = Rewards(as_rewards([call]))(answers("ab", "c"))
    assert (scores.extra_n, scores.metrics) == ({"letters": [["a", "b"], ["c"]]}, {"share_long": [0.5]})
    shown = samples(1, ["call"], answers("ab", "c"), scores, 2)
    assert [one["extra"] for one in shown] == [{"letters": "['a', 'b']"}, {"letters": "['c']"}]

    def one_too_many(completions, log_extra, **_):
        log_extra("letters", [1] * (len(completions) + 1))
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match="log_extra has 3 values of 'letters' for 2 completions"):
        Rewards(as_rewards([one_too_many]))(answers("ab", "c"))


def test_conversations_come_as_messages_and_go_out_as_one():
    prompt = Prompt((1,), [{"role": "user", "content": "hi"}], "p:1")
    assert Written(prompt, "ho", (3,)).completion == [{"role": "assistant", "content": "ho"}]
    assert Rewards([find("regex:ho")])([Written(prompt, "ho", (3,))]).total_n == [1.0]


def test_a_coroutine_is_awaited_and_tensors_are_numbers():
    async def later(completions, **_):
        return [float(len(text)) for text in completions]

    assert total(later, "ab", "") == [2.0, 0.0]
    assert total(lambda completions, **_: torch.tensor([1, 2]), "a", "b") == [1.0, 2.0]


def test_rewards_are_weighed_and_none_leaves_its_function_out():
    one = Reward("one", lambda completions, **_: [1.0, None, None])
    two = Reward("two", lambda completions, **_: [2.0, 4.0, None])
    found = Rewards([one, two], [1.0, 0.5])(answers("a", "b", "c"))
    assert found.total_n[:2] == [2.0, 2.0]
    assert math.isnan(found.total_n[2])


def boom(completions, **_):
    if "bad" in completions:
        raise KeyError("lost")
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (boom, r"reward own: KeyError \('lost'\), for p.jsonl:2, completion 'bad'"),
        (lambda completions, **_: [1.0], "gives 1 numbers for 2 completions, p.jsonl:1, completion 'good' the first"),
        (lambda completions, **_: [1.0, "high"], "gives 'high', for p.jsonl:2, completion 'bad'"),
        (lambda completions, **_: [math.nan, 1.0], "gives nan, for p.jsonl:1, completion 'good'"),
        (lambda completions, **_: [1.0, math.inf], "gives inf, for p.jsonl:2"),
        (lambda completions, **_: "12", "gives a str; a list of 2 numbers is wanted"),
        (lambda completions, **_: 1.0, "gives a float"),
        (lambda prompt, **_: [1.0], r"TypeError \(.*missing 1 required positional argument: 'prompt'"),
    ],
)
def test_what_a_function_does_wrong_is_one_line_with_the_row_and_the_text(call, said):
    with pytest.raises(RewardError, match=said) as raised:
        total(call, "good", "bad")
    assert "\n" not in str(raised.value)


def test_a_function_that_never_ends_is_left_behind_in_time():
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"own: no result after 0.05 s.*p.jsonl:1.*--reward-timeout"):
        Rewards([Reward("own", lambda **_: time.sleep(5))], timeout=0.05)(answers("a"))
    assert time.monotonic() - began < 4


def test_weights_and_functions_are_as_many():
    with pytest.raises(InputError, match="2 of them for 1 reward functions"):
        Rewards([find("json")], [1.0, 2.0])
    with pytest.raises(InputError, match="give one function at least"):
        Rewards([])


# Prompts.


def encoder(template: str | None = None, takes: int = 64, **options) -> PromptEncoder:
    tokenizer = tiny.tokenizer(bos=True)
    tokenizer.chat_template = template
    return PromptEncoder(tokenizer, Encoder(tokenizer, takes), **options)


def test_a_text_is_asked_as_it_stands_and_through_the_chat_template_where_asked():
    tokenizer = tiny.tokenizer(bos=True)
    plain = encoder()(Row({"prompt": "the film", "level": 3}, "p:1"))
    assert list(plain.ids) == tokenizer("the film")["input_ids"]
    assert plain.columns == {"level": 3}
    asked = encoder(TEMPLATE, chat=True)(Row({"prompt": "the film"}, "p:1"))
    assert asked.prompt == [{"role": "user", "content": "the film"}]
    assert tokenizer.decode(list(asked.ids)) == "<s>user: the film</s><s>a:"
    assert encoder(template="{a} and {b}").template is None  # of the chat
    filled = PromptEncoder(tokenizer, Encoder(tokenizer, 64), template="{a} and {b}")(Row({"a": "x", "b": 3}, "p:1"))
    assert (filled.prompt, filled.columns) == ("x and 3", {"a": "x", "b": 3})


@pytest.mark.parametrize(
    ("fields", "chat", "said"),
    [
        ({"question": "a"}, TEMPLATE, r"p:1: no field 'prompt' \(has 'question'\); name one by --columns"),
        ({"prompt": 3}, TEMPLATE, "field 'prompt' is a int; a text is wanted, or a list of messages"),
        ({"prompt": [{"role": "user", "content": "a"}]}, None, "no chat template"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, TEMPLATE, "ends with the assistant's turn"),
        ({"prompt": "a " * 80}, TEMPLATE, "the model takes 64"),
        (
            {"prompt": [{"role": "user", "content": "a " * 80}]},
            TEMPLATE,
            "leaves no room to answer, the model takes 64",
        ),
        ({"prompt": [{"content": "a"}]}, TEMPLATE, "a message without texts 'role' and 'content'"),
    ],
)
def test_a_row_that_cannot_be_asked_says_so(fields, chat, said):
    with pytest.raises(InputError, match=said):
        encoder(chat)(Row(fields, "p:1"))


def test_a_prompt_that_fills_the_model_leaves_no_room():
    with pytest.raises(InputError, match="leaves no room to answer"):
        encoder(takes=4)(Row({"prompt": "xyz"}, "p:1"))


def test_samples_reach_from_the_least_reward_to_the_most():
    written = answers("a", "bb", "ccc", "dddd")
    found = Rewards([Reward("len", lambda completions, **_: [len(c) for c in completions])])(written)
    shown = samples(7, ["len"], written, found, 2)
    assert [(one["step"], one["completion"], one["reward"], one["rewards"]) for one in shown] == [
        (7, "a", 1.0, {"len": 1.0}), (7, "dddd", 4.0, {"len": 4.0}),
    ]  # fmt: skip
