"""Reward functions by name.

exact-match, exact-match:COLUMN     1 where the answer is that of the column (default `answer`), as SQuAD compares them
token-f1, token-f1:COLUMN           the best token F1 with the column's answers
json, json:SCHEMA.json              1 where the answer is JSON, and as the schema says
length:N                            1 − |tokens − N|/N, at least 0
regex:PATTERN                       1 where the pattern is found in the answer
model:NAME                          the score that a sequence classifier gives prompt and answer
gym:TASK                            reasoning-gym's score of its own rows (zotune[reward])
FILE.py:function, package.module:function    your own
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zotune.errors import InputError, nearest
from zotune.rewards import KINDS, Reward, is_code
from zotune.rewards.builtin import BUILT_IN
from zotune.rewards.gym import gym_reward
from zotune.rewards.models import model_reward
from zotune.tasks.files import named_function

MAKERS: dict[str, Callable[[str], Callable[..., Any]]] = BUILT_IN | {"model": model_reward, "gym": gym_reward}
assert set(KINDS) == set(MAKERS)


def find(name: str) -> Reward:
    """The reward function that a name, or a file and a name, says. Raises InputError where there is none.

    >>> find("length:3").call(completions=["a"], completion_ids=[[5, 6]])
    [0.6666666666666667]
    """
    kind, _, rest = name.partition(":")
    if kind in MAKERS:
        try:
            return Reward(name, MAKERS[kind](rest))
        except InputError as error:
            raise InputError(f"--reward {name}: {error}") from None
    if not is_code(name):
        raise InputError(
            f"--reward {name}: {nearest(kind, MAKERS)} (your own are FILE.py:function or package.module:function)"
        )
    path, _, attribute = name.rpartition(":")
    call = _from_file(path, attribute, name) if path.endswith(".py") else named_function(name, "--reward")
    return Reward(attribute, call, code=True)


def as_rewards(given: Sequence[Any]) -> list[Reward]:
    """Of names and of functions themselves. Two of one name are told apart by their numbers."""
    made = [
        one
        if isinstance(one, Reward)
        else find(one)
        if isinstance(one, str)
        else Reward(getattr(one, "__name__", type(one).__name__), one)
        for one in given
    ]
    names = [one.name for one in made]
    for i, one in enumerate(made):
        if not callable(one.call):
            raise InputError(f"reward_funcs: a {type(one.call).__name__} is no function")
        if names.count(one.name) > 1:
            made[i] = Reward(f"{one.name} {names[: i + 1].count(one.name)}", one.call, one.code)
    return made


def _from_file(path: str, attribute: str, name: str) -> Callable[..., Any]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"--reward {name}: no such file {path}")
    spec = importlib.util.spec_from_file_location(f"zotune_reward_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for what looks its own module up, such as dataclasses
    sys.path.insert(0, str(file.parent.absolute()))  # its own neighbours, as `python FILE.py` has them
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a stranger's file raises
        said = (str(error).splitlines() or ["no message"])[0]
        raise InputError(f"--reward {name}: {path} raises {type(error).__name__} ({said})") from error
    finally:
        sys.path.remove(str(file.parent.absolute()))
    found = getattr(module, attribute, None)
    if found is None:
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"--reward {name}: {path} has no {attribute!r}; {nearest(attribute, own)}")
    if not callable(found):
        raise InputError(f"--reward {name}: is no function")
    made: Callable[..., Any] = found
    return made
