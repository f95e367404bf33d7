"""Textual inference and yes-or-no questions: RTE, CB, BoolQ, WSC, WiC, MultiRC, in SuperGLUE's fields."""

from zotune.tasks.rows import Row
from zotune.tasks.task import Asked, Hub, Task, label_of

SUPERGLUE = "aps/super_glue"  # where no split of labelled test rows is public, validation is scored


def _hub(subset: str) -> Hub:
    return Hub(SUPERGLUE, subset, test_split="validation")


rte = Task(
    name="rte",
    source=_hub("rte"),
    prompt='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
    plain="{premise}\n{hypothesis}\n",
    words={"0": "Yes", "1": "No"},
)
cb = Task(
    name="cb",
    source=_hub("cb"),
    prompt='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
    plain="{premise}\n{hypothesis}\n",
    words={"0": "Yes", "1": "No", "2": "Maybe"},
)
wsc = Task(
    name="wsc",
    source=_hub("wsc.fixed"),
    prompt='{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n',
    words={"0": "No", "1": "Yes"},
)
wic = Task(
    name="wic",
    source=_hub("wic"),
    prompt='Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
    words={"0": "No", "1": "Yes"},
)
multirc = Task(
    name="multirc",
    source=_hub("multirc"),
    prompt='{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
    words={"0": "No", "1": "Yes"},
    metric="f1a",
)


def ask_boolq(row: Row, labelled: bool) -> Asked:
    """The passage, then the question with a capital and a question mark."""
    question = str(row["question"]).strip()
    question = question[:1].upper() + question[1:] + ("" if question.endswith("?") else "?")
    prompt = f"{row['passage']} {question}\n"
    return Asked(prompt, ["No", "Yes"], label_of(row, {"0": 0, "1": 1, "false": 0, "true": 1}) if labelled else None)


boolq = Task(name="boolq", source=_hub("boolq"), ask=ask_boolq)
