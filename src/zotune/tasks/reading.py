"""Questions answered by a generated line: SQuAD (arXiv 1606.05250) and DROP (arXiv 1903.00161). As in the study's code
(arXiv 2305.17333) the end of the line is trained, and ends an answer."""

from collections.abc import Mapping

from zotune.errors import InputError
from zotune.tasks.rows import Row
from zotune.tasks.task import Asked, Hub, Task


def ask_squad(row: Row, labelled: bool) -> Asked:
    """Context and question. All answers count, the first is trained on."""
    prompt = f"Context: {row['context']}\nQuestion: {_question(row)}\nAnswer:"
    if not labelled:
        return Asked(prompt, [""], None)
    answers = row["answers"]
    texts = answers.get("text") if isinstance(answers, Mapping) else None
    if not texts:
        raise InputError(f"{row.where}: field 'answers' must hold a list 'text' of one or more answers")
    return Asked(prompt, [str(texts[0])], 0, [str(text) for text in texts])


def ask_drop(row: Row, labelled: bool) -> Asked:
    """Passage and question. Answers of several spans are one text, joined by "and" as the data has them: F1 is SQuAD's on that
    text, which the authors' alignment of spans can only raise.

    The hub's form lists spans: of a training row those of its one answer, elsewhere those of all annotators, one after the
    other, which all count.
    """
    prompt = f"Passage: {row['passage']}\nQuestion: {_question(row)}\nAnswer:"
    if not labelled:
        return Asked(prompt, [""], None)
    if "answers_spans" in row.fields:
        given = row["answers_spans"]
        spans = given.get("spans") if isinstance(given, Mapping) else None
        if not isinstance(spans, list):
            raise InputError(f"{row.where}: field 'answers_spans' must hold a list 'spans'")
        golds = [" and ".join(map(str, spans))] if row.split == "train" else list(dict.fromkeys(map(str, spans)))
    else:
        golds = [str(answer) for answer in row["answers"]]
    if not golds or not golds[0]:
        raise InputError(f"{row.where}: no answer in it")
    return Asked(prompt, golds[:1], 0, golds)


def _question(row: Row) -> str:
    text = str(row["question"]).strip()
    if not text:
        raise InputError(f"{row.where}: field 'question' has no text, so nothing is asked")
    return text


squad = Task(
    name="squad", source=Hub("rajpurkar/squad", test_split="validation"),
    ask=ask_squad, metric="f1", generates=True, end="\n",
)  # fmt: skip
drop = Task(
    name="drop", source=Hub("ucinlp/drop", test_split="validation"),
    ask=ask_drop, metric="f1", generates=True, end="\n",
)  # fmt: skip
