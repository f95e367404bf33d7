"""How answers are scored, as each task's own authors do it. Figures are percentages, but for perplexity and loss."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from zotune.tasks.encoding import Encoded
from zotune.tasks.task import LOWER_IS_BETTER

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces. Source: SQuAD's evaluation, arXiv 1606.05250.

    >>> normalised("The  Beyoncé's a-team!")
    'beyoncés ateam'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def text_f1(answer: str, golds: Sequence[str]) -> float:
    """The best token F1 with any gold answer, 0 to 1. Source: SQuAD's evaluation.

    >>> text_f1("the cat sat", ["a cat"])
    0.6666666666666666
    """
    return max((_f1(normalised(answer).split(), normalised(gold).split()) for gold in golds), default=0.0)


def _f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    same = sum((Counter(answer) & Counter(gold)).values())
    return 2 * same / (len(answer) + len(gold))


def exact(answer: str, golds: Sequence[str]) -> float:
    """1 where the normalised answer is a normalised gold one."""
    return float(any(normalised(answer) == normalised(gold) for gold in golds))


def best(scores: Sequence[float]) -> int:
    """The candidate of the highest score; of equal ones the first."""
    return max(range(len(scores)), key=scores.__getitem__)


def accuracy(scores: Sequence[Sequence[float]], rows: Sequence[Encoded]) -> float:
    """Percent of rows whose right candidate scores highest. Source: MeZO, arXiv 2305.17333, appendix."""
    return 100 * sum(best(s) == row.label for s, row in zip(scores, rows, strict=True)) / len(rows)


def binary_f1(scores: Sequence[Sequence[float]], rows: Sequence[Encoded]) -> float:
    """F1 of the last candidate as the positive class, over all rows: MultiRC's F1a. Source: Khashabi et al. 2018."""
    pairs = [(best(s) == len(s) - 1, row.label == len(s) - 1) for s, row in zip(scores, rows, strict=True)]
    true = sum(a and b for a, b in pairs)
    wrong = sum(a != b for a, b in pairs)
    return 100 * 2 * true / (2 * true + wrong) if true else 0.0


def chosen_f1(scores: Sequence[Sequence[float]], rows: Sequence[Encoded]) -> float:
    """The best token F1 of the chosen candidate's answer with any gold one: ReCoRD's F1. Source: arXiv 1810.12885."""
    return 100 * sum(text_f1(row.names[best(s)], row.golds) for s, row in zip(scores, rows, strict=True)) / len(rows)


CHOICE_METRICS: dict[str, Callable[[Sequence[Sequence[float]], Sequence[Encoded]], float]] = {
    "accuracy": accuracy,
    "f1a": binary_f1,
    "record_f1": chosen_f1,
}
TEXT_METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {"f1": text_f1, "exact_match": exact}


def token_loss(losses: Sequence[float], rows: Sequence[Encoded]) -> float:
    """Nats: the mean of −log p over all tokens that count, of rows whose means over their own tokens are given."""
    return sum(loss * row.learned for loss, row in zip(losses, rows, strict=True)) / sum(row.learned for row in rows)


def perplexity(losses: Sequence[float], rows: Sequence[Encoded]) -> float:
    """e to the mean loss a token; infinite where that is too large for a number."""
    nats = token_loss(losses, rows)
    return math.exp(nats) if nats < 700 else (math.inf if nats == nats else math.nan)


# How well text is predicted.
LIKELIHOOD: dict[str, Callable[[Sequence[float], Sequence[Encoded]], float]] = {
    "perplexity": perplexity,
    "loss": token_loss,
}


def figure(metric: str, value: float, unit: str = "") -> str:
    """A metric's value as it is printed; the unit stands behind percentages alone: not perplexity, nor a function of one's own.

    >>> figure("accuracy", 81.25, " %"), figure("perplexity", 12.3456, " %")
    ('81.2 %', '12.35')
    """
    own = metric == "reward" or metric in LOWER_IS_BETTER or ":" in metric
    return f"{value:.4g}" if own else f"{value:.1f}{unit}"


def text_metric(name: str, answers: Sequence[str], rows: Sequence[Encoded]) -> float:
    """The mean of a text metric over rows, in percent."""
    return 100 * sum(TEXT_METRICS[name](a, row.golds) for a, row in zip(answers, rows, strict=True)) / len(rows)
