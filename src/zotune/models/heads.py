"""Which output of a classifier's head is which label: by the names in its config, not by the order that a task lists them in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zotune.errors import InputError, plain
from zotune.models.kinds import names_classifier

SHOWN = 6  # labels of a list in a message


def label_names(config: Any) -> list[str]:
    """The label of each output, in their order; transformers' placeholders LABEL_0, LABEL_1, … where nobody gave any."""
    names = getattr(config, "id2label", None) or {}
    return [str(names[i]) for i in sorted(names)]


def is_named(names: Sequence[str]) -> bool:
    """Whether somebody gave the outputs names. transformers writes LABEL_i for output i where nobody did."""
    return any(name != f"LABEL_{i}" for i, name in enumerate(names))


def head_names(config: Any) -> list[str]:
    """`label_names` of the head that a checkpoint of this config holds; [] where it holds none."""
    names = label_names(config)
    named = bool(getattr(config, "architectures", None))
    return names if names_classifier(config) or (not named and is_named(names)) else []


def outputs_of(names: Sequence[str], words: Mapping[str, str], where: str) -> tuple[int, ...]:
    """The output of each of the task's labels, in the task's order. names: of the outputs, in theirs. words: label → word.

    A name is a label of the task or, where labels are numbers in the data, its label word. Outputs without names of their own
    are taken in the task's order. where: what an error begins with, whose head it is. Raises InputError for other names.

    >>> words = {"0": "bad", "1": "good"}
    >>> outputs_of(["1", "0"], words, ""), outputs_of(["good", "bad"], words, ""), outputs_of(["LABEL_0", "LABEL_1"], words, "")
    ((1, 0), (1, 0), (0, 1))
    """
    labels = list(words)
    check_count(names, labels, where)
    for known in (labels, [word.strip() for word in words.values()]):
        if sorted(known) == sorted(names):
            return tuple(map(list(names).index, known))
    if not is_named(names):
        return tuple(range(len(labels)))
    raise InputError(
        f"{where}: its head's labels are {_listed(names)}, the task's {_listed(labels)}; give --label-words whose labels or words "
        "are the head's, or a model without a head, which gets a fresh one"
    )


def check_count(names: Sequence[str], labels: Sequence[str], where: str, whose: str = "the task") -> None:
    """Raises InputError where a head of these outputs has more or fewer than there are labels. whose: the labels are."""
    if len(names) != len(labels):
        own = f" ({_listed(names)})" if is_named(names) else ""
        raise InputError(
            f"{where}: its head has {len(names)} label{'s' * (len(names) != 1)}{own}, {whose} has {len(labels)} "
            f"({_listed(labels)}); give --label-words for each of the head's, or a model without a head, which gets a fresh one"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return plain(", ".join(names[:SHOWN])) + more
