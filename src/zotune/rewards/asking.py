"""Reward functions asked about a step's answers: by TRL's signature, within a time, and what they may do wrong as one line."""

# n answers, F functions.

from __future__ import annotations

import asyncio
import inspect
import math
import reprlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from types import SimpleNamespace
from typing import Any

from zotune.errors import InputError, plain
from zotune.rewards import Reward, RewardError
from zotune.rewards.prompts import Prompt

SHOWN = 60  # characters of a text in an error


@dataclass(frozen=True)
class Written:
    """An answer to a prompt. text: without special tokens. finished: it ended by itself. member: who wrote it, −1 the model."""

    prompt: Prompt
    text: str
    ids: tuple[int, ...]
    finished: bool = True
    member: int = -1

    @property
    def completion(self) -> Any:
        """As a reward function gets it: of a conversation one message of the assistant's."""
        return [{"role": "assistant", "content": self.text}] if self.prompt.conversational else self.text


@dataclass(frozen=True)
class Scores:
    """by_function_Fn: what each function gave, NaN for None. total_n: Σ_f w_f·r_f over those that gave one, NaN where none did.

    extra_n: columns that functions told of by `log_extra`. metrics: what they told by `log_metric`, call by call.
    """

    by_function_Fn: list[list[float]]
    total_n: list[float]
    extra_n: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)


class Rewards:
    """Functions and their weights. timeout: seconds that one call of a function may take; None: any.

    Raises InputError where there are no functions, or other weights than functions.
    """

    def __init__(
        self, functions: Sequence[Reward], weights: Sequence[float] | None = None, timeout: float | None = None
    ) -> None:
        if not functions:
            raise InputError("--reward: give one function at least, such as exact-match or FILE.py:function")
        if weights is not None and len(weights) != len(functions):
            raise InputError(f"--reward-weights: {len(weights)} of them for {len(functions)} reward functions")
        self.functions, self.timeout = list(functions), timeout
        self.weights = [1.0] * len(functions) if weights is None else [float(w) for w in weights]

    @property
    def names(self) -> list[str]:
        return [function.name for function in self.functions]

    def __call__(self, answers: Sequence[Written], state: Any = None) -> Scores:
        """The rewards of all answers. state: the Trainer's, for functions that ask for `trainer_state`. Raises RewardError."""
        state = SimpleNamespace(global_step=0) if state is None else state
        by_function_Fn: list[list[float]] = []
        total_n: list[float] = []
        found = Scores(by_function_Fn, total_n)
        for function in self.functions:
            by_function_Fn.append(self._asked(function, answers, state, found))
        for rewards in zip(*by_function_Fn, strict=True):
            given = [(w, r) for w, r in zip(self.weights, rewards, strict=True) if not math.isnan(r)]
            total_n.append(sum(w * r for w, r in given) if given else math.nan)
        return found

    def _asked(self, function: Reward, answers: Sequence[Written], state: Any, told: Scores) -> list[float]:
        try:
            found = self._called(function, answers, state, told)
        except _Late:
            raise RewardError(
                f"reward {function.name}: no result after {self.timeout:g} s, of {len(answers)} answers, {_told(answers[0])} the "
                "first; see --reward-timeout"
            ) from None
        except Exception as error:  # anything a stranger's function may raise
            raise RewardError(
                f"reward {function.name}: {_said(error)}, for {self._culprit(function, answers, state)}"
            ) from error
        for column, values in told.extra_n.items():
            if len(values) != len(answers):
                raise RewardError(
                    f"reward {function.name}: log_extra has {len(values)} values of {column!r} for {len(answers)} completions, "
                    f"{_told(answers[0])} the first"
                )
        return _numbers(function.name, found, answers)

    def _called(self, function: Reward, answers: Sequence[Written], state: Any, told: Scores) -> Any:
        ids = [list(answer.ids) for answer in answers]
        given: dict[str, Any] = {
            "prompts": [answer.prompt.prompt for answer in answers],
            "completions": [answer.completion for answer in answers],
            "completion_ids": ids,
            "completions_ids": ids,
            "trainer_state": state,
            "log_extra": lambda column, values: told.extra_n.setdefault(str(column), []).extend(values),
            "log_metric": lambda name, value: told.metrics.setdefault(str(name), []).append(float(value)),
        }
        names = dict.fromkeys(name for answer in answers for name in answer.prompt.columns)
        given |= {name: [a.prompt.columns.get(name) for a in answers] for name in names if name not in given}
        return _within(self.timeout, function.call, given)

    def _culprit(self, function: Reward, answers: Sequence[Written], state: Any) -> str:
        """The first answer that the function fails for alone."""
        for answer in answers:
            try:
                self._called(function, [answer], state, Scores([], []))
            except _Late:
                break
            except Exception:
                return _told(answer)
        return f"{len(answers)} answers together, {_told(answers[0])} the first"


class _Late(Exception):
    """A call did not come back in time."""


def _within(seconds: float | None, call: Any, given: Mapping[str, Any]) -> Any:
    """What a call gives, a coroutine awaited. With a time it runs in a thread of its own: one that never ends cannot be ended from
    here, but it does not keep the process."""

    def run() -> Any:
        found = call(**given)
        return asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found

    if seconds is None:
        return run()
    results: list[Any] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            results.append(run())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise _Late
    if raised:
        raise raised[0]
    return results[0]


async def _awaited(found: Any) -> Any:
    return await found


def _numbers(name: str, found: Any, answers: Sequence[Written]) -> list[float]:
    """A number for each answer, NaN for None."""
    if hasattr(found, "tolist"):
        found = found.tolist()  # of torch or NumPy
    if isinstance(found, (str, bytes, Mapping)) or not isinstance(found, Sequence):
        raise RewardError(
            f"reward {name}: gives a {type(found).__name__}; a list of {len(answers)} numbers is wanted, one for each completion, "
            f"{_told(answers[0])} the first"
        )
    if len(found) != len(answers):
        raise RewardError(
            f"reward {name}: gives {len(found)} numbers for {len(answers)} completions, {_told(answers[0])} the first"
        )
    made = []
    for value, answer in zip(found, answers, strict=True):
        value = value.item() if getattr(value, "shape", None) == () else value
        if value is not None and not (isinstance(value, Real) and math.isfinite(float(value))):
            raise RewardError(
                f"reward {name}: gives {reprlib.repr(value)}, for {_told(answer)}; a finite number is wanted, or None"
            )
        made.append(math.nan if value is None else float(value))
    return made


def _told(answer: Written) -> str:
    text = plain(answer.text if len(answer.text) <= SHOWN else answer.text[:SHOWN] + "…")
    return f"{answer.prompt.where}, completion {text!r}"


def _said(error: Exception) -> str:
    return f"{type(error).__name__} ({plain((str(error).splitlines() or ['no message'])[0])})"
