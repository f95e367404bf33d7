"""What rewards.py and grpo.py train on: rows, a reward, and what is looked at. Shared, so that both see the same.

squad      a passage and a question, plain text; F1 of the answer's first line. DATA/squad has the rows (SQuAD's fields)
json       who somebody is, as JSON; the reward is graded (JSON at all, keys, types), what is looked at is the whole schema
sums       two numbers of one digit, in the words of reasoning-gym's chain_sum and with its score: 1 for the number alone, of a
           longer answer that holds it the share of its letters; what is looked at is the number alone
"""

from __future__ import annotations

import datetime
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import zotune
from zotune.rewards.builtin import text_of
from zotune.tasks.metrics import text_f1

SCHEMA = {"name": str, "age": int, "city": str}
FIRST = (
    "Anna",
    "Tom",
    "Ivan",
    "Maria",
    "John",
    "Aiko",
    "Lena",
    "Omar",
    "Rosa",
    "Igor",
    "Mei",
    "Paul",
    "Nora",
    "Hugo",
    "Ines",
)
LAST = ("Weber", "Lee", "Petrov", "Silva", "Smith", "Tanaka", "Novak", "Haddad", "Moreau", "Costa", "Berg", "Okafor")
CITIES = (
    "Berlin",
    "Paris",
    "Sofia",
    "Lisbon",
    "Boston",
    "Kyoto",
    "Prague",
    "Cairo",
    "Oslo",
    "Lima",
    "Dublin",
    "Lagos",
    "Quito",
)
TRAINED, HELD = 1000, 64  # rows
WARM = 2  # steps that capture and compile, and are not counted

Reward = Callable[..., list[float]]


@dataclass(frozen=True)
class Task:
    """chat: whether prompts go through the chat template. line: whether a line's end ends an answer. seen: what is looked at."""

    name: str
    reward: Reward
    seen: Reward
    tokens: int
    chat: bool = False
    line: bool = False
    train: list[dict[str, Any]] = field(default_factory=list)
    held: list[dict[str, Any]] = field(default_factory=list)


def task_of(name: str, data: Path | None, train: int = TRAINED, held: int = HELD) -> Task:
    if name == "squad":
        if data is None:
            raise SystemExit("squad: its rows are wanted, --data FOLDER with squad/train.jsonl and squad/test.jsonl")
        rows = [_squad(data / "squad" / f"{part}.jsonl", n, part) for part, n in (("train", train), ("test", held))]
        return Task(name, first_line_f1, first_line_f1, 16, line=True, train=rows[0], held=rows[1])
    if name == "json":
        made = _people(train + held)
        return Task(name, schema_share, whole_schema, 48, chat=True, train=made[held:], held=made[:held])
    if name == "sums":
        made = _sums()
        return Task(name, chain_sum_score, number_alone, 16, chat=True, train=made[30:], held=made[:30])
    raise SystemExit(f"no task {name}; squad, json or sums")


def _squad(path: Path, count: int, part: str) -> list[dict[str, Any]]:
    """Held-out rows are any of up to 1,000 letters; those that train are the shortest: a step takes what reading them takes."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if len(row["context"]) <= 1000]
    if part == "train":
        rows = sorted(rows, key=lambda row: len(row["context"]))[:count]
    random.Random(0).shuffle(rows)
    return [
        {"prompt": f"Context: {row['context']}\nQuestion: {row['question'].strip()}\nAnswer:", "answers": row["answers"]["text"]}
        for row in rows[:count]
    ]  # fmt: skip


def _people(count: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    people: dict[tuple[str, str, int], str] = {}
    while len(people) < count:
        people[draw.choice(FIRST), draw.choice(LAST), draw.randint(18, 80)] = draw.choice(CITIES)
    return [
        {"prompt": f"{first} {last} is {age} years old and lives in {city}. Who is it? Answer in JSON."}
        for (first, last, age), city in people.items()
    ]


def _sums() -> list[dict[str, Any]]:
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    random.Random(0).shuffle(pairs)
    ask = "State the final answer to the following arithmetic problem: {} + {} ="
    return [{"prompt": ask.format(a, b), "answer": str(a + b)} for a, b in pairs]


def first_line_f1(completions: Sequence[Any], answers: Sequence[list[str]], **columns: Any) -> list[float]:
    return [text_f1(text_of(c).strip(" ").split("\n")[0], gold) for c, gold in zip(completions, answers, strict=True)]


def whole_schema(completions: Sequence[Any], **columns: Any) -> list[float]:
    return [float(score == 1) for score in schema_share(completions)]


def schema_share(completions: Sequence[Any], **columns: Any) -> list[float]:
    """0 for no JSON object; 0.2 for one, and 0.8 times the share of keys, wanted or there, that are both and of their type."""
    return [_share(text_of(c)) for c in completions]


def _share(text: str) -> float:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return 0.0
    if not isinstance(found, dict):
        return 0.0
    right = sum(type(found.get(key)) is kind for key, kind in SCHEMA.items())
    return 1.0 if right == len({*found, *SCHEMA}) else 0.2 + 0.8 * right / len({*found, *SCHEMA})


def chain_sum_score(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """reasoning-gym's score of an answer that is one text: 1, or what share of the answer it is."""
    texts = [text_of(c).strip() for c in completions]
    return [
        1.0 if text == gold else len(gold) / len(text) if gold in text else 0.0
        for text, gold in zip(texts, answer, strict=True)
    ]


def number_alone(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    return [float(text_of(c).strip() == gold) for c, gold in zip(completions, answer, strict=True)]


def ends_of_lines(tokenizer: Any) -> list[int]:
    """Tokens that hold a line's end."""
    return [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]


def plain_texts(data: Path | None, tokenizer: Any, tokens: int = 64, count: int = 16) -> torch.Tensor:
    """(count, tokens) ids of prose that no run trains on: passages of SQuAD's validation, else a text of this repository."""
    if data is not None:
        lines = (data / "squad" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
        passages = list(dict.fromkeys(json.loads(line)["context"] for line in lines))
    else:
        text = (Path(__file__).parent.parent / "docs" / "log.md").read_text(encoding="utf-8")
        passages = [text[first : first + 1000] for first in range(0, len(text), 1000)]
    ids = [tokenizer(text)["input_ids"] for text in passages]
    return torch.tensor([one[:tokens] for one in ids if len(one) >= tokens][:count])


@torch.no_grad()
def text_loss(model: Any, ids_PT: torch.Tensor) -> float:
    """Mean loss a token on prose: how far the model has drifted as a model of language."""
    ids = ids_PT.to(model.device)
    return float(model(input_ids=ids, labels=ids).loss)


class Watch(tf.TrainerCallback):
    """Writes a run's lines, looks, and ends it when its seconds are spent. Of any Trainer that logs TRL's names at each step.

    cell: the run's options; `seconds`, `look_every`, and `answers` of a step. answer: the model's own answers to the held-out
    prompts, by the likeliest token.
    """

    def __init__(
        self, path: Path, cell: dict[str, Any], task: Task, answer: Callable[[], list[str]], loss: Callable[[], float]
    ) -> None:
        self.cell, self.task, self.answer, self.loss = cell, task, answer, loss
        self.file = open(path, "w", encoding="utf-8")  # noqa: SIM115  # open as long as the run
        self.began, self.spent, self.since, self.looked = time.monotonic(), 0.0, 0.0, -math.inf
        self.took, self.tokens, self.answers = 0.0, 0, 0
        self.lately: list[float] = []
        self.plan: Callable[[int], None] | None = None  # told how many steps the seconds hold, once that is known
        self.cuda = cell["device"] == "cuda"

    def line(self, **told: Any) -> None:
        self.file.write(json.dumps(told) + "\n")
        self.file.flush()

    def begin(self, **told: Any) -> None:
        """The run's first line."""
        self.line(
            kind="run", cell=self.cell, **told, device=torch.cuda.get_device_name() if self.cuda else "cpu",
            date=datetime.date.today().isoformat(),
            versions={"torch": torch.__version__, "transformers": tf.__version__, "zotune": zotune.__version__},
        )  # fmt: skip

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look(0)
        self.since = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.took = time.monotonic() - self.since
        self.spent += self.took if state.global_step > WARM else 0.0
        self.lately = [*self.lately[-2:], self.took]
        if state.global_step == WARM + 3 and self.plan is not None:
            state.max_steps = (
                WARM + 3 + max(10, int((self.cell["seconds"] - self.spent) / statistics.median(self.lately)))
            )
            self.plan(state.max_steps)
        self.since = time.monotonic()
        control.should_training_stop |= self.spent >= self.cell["seconds"]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Behind the step's end, with what it found."""
        if "reward" not in logs:
            return
        self.answers += self.cell["answers"]
        self.tokens += round(logs["completions/mean_length"] * self.cell["answers"])
        names = ("reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio")
        self.line(
            kind="step", step=state.global_step, took=round(self.took, 3), spent=round(self.spent, 2), tokens=self.tokens,
            answers=self.answers, **{name.rpartition("/")[2]: logs.get(name) for name in names},
        )  # fmt: skip
        over = control.should_training_stop or state.global_step >= state.max_steps
        if over or self.spent - self.looked >= self.cell["look_every"]:
            self.look(state.global_step)
        self.since = time.monotonic()

    def look(self, step: int) -> None:
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else None  # of steps, a look's own is less
        texts, held = self.answer(), self.task.held
        columns = {name: [row[name] for row in held] for name in held[0] if name != "prompt"}
        seen, reward = (of(completions=texts, **columns) for of in (self.task.seen, self.task.reward))
        self.looked = self.spent
        self.line(
            kind="look", step=step, spent=round(self.spent, 2), clock=round(time.monotonic() - self.began, 1),
            tokens=self.tokens, answers=self.answers, seen=sum(seen) / len(seen), reward=sum(reward) / len(reward),
            text_loss=self.loss(), peak_gib=peak, some=texts[:3],
        )  # fmt: skip


def summary(folder: Path) -> str:
    """A line a run: what was seen at its looks, what it took, and how far it drifted."""
    said = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        looks, steps = ([one for one in lines if one["kind"] == kind] for kind in ("look", "step"))
        if looks:
            first, last = looks[0], looks[-1]
            curve = " ".join(f"{one['spent']:.0f}s:{100 * one['seen']:.1f}" for one in looks)
            rate = last["tokens"] / max(1e-9, sum(one["took"] for one in steps))
            peak = f", {last['peak_gib']:.1f} GiB" if last["peak_gib"] else ""
            said.append(
                f"{path.stem}: {curve}; {len(steps)} steps, {last['answers']:,} answers, {last['tokens']:,} tokens "
                f"({rate:,.0f}/s), prose {first['text_loss']:.2f} {last['text_loss'] - first['text_loss']:+.2f}{peak}"
            )
    return "\n".join(said)
