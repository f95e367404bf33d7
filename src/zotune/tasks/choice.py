"""Multiple choice: COPA, WinoGrande, ReCoRD. A candidate is what follows the part that all candidates share."""

from zotune.errors import InputError
from zotune.tasks.inference import SUPERGLUE
from zotune.tasks.rows import Row
from zotune.tasks.task import Asked, Hub, Task, label_of

CONNECTIVES = {"effect": "so", "cause": "because"}


def ask_copa(row: Row, labelled: bool) -> Asked:
    """The premise without its full stop, a connective, and the choices without their capital (unless it is `I`)."""
    kind = str(row["question"])
    if kind not in CONNECTIVES:
        raise InputError(f"{row.where}: field 'question' is {kind!r}; it must be one of {', '.join(CONNECTIVES)}")
    prompt = f"{str(row['premise']).rstrip().removesuffix('.')} {CONNECTIVES[kind]}"
    choices = [_lower_first(str(row[field])) for field in ("choice1", "choice2")]
    return Asked(prompt, choices, label_of(row, {"0": 0, "1": 1}) if labelled else None)


def _lower_first(text: str) -> str:
    """
    >>> _lower_first("The lid."), _lower_first("I left."), _lower_first("I'm out.")
    ('the lid.', 'I left.', "I'm out.")
    """
    word = text.split(" ", 1)[0]
    return text if word == "I" or word.startswith("I'") else text[:1].lower() + text[1:]


copa = Task(
    name="copa", source=Hub(SUPERGLUE, "copa", test_split="validation"), ask=ask_copa,
    validation_size=100,
)  # fmt: skip


def ask_winogrande(row: Row, labelled: bool) -> Asked:
    """What stands before the blank, then each option with what stands after it."""
    sentence = str(row["sentence"])
    if sentence.count("_") != 1:
        raise InputError(f"{row.where}: field 'sentence' must have one blank, written _")
    before, after = sentence.split("_")
    options = [f"{row[field]}{after}" for field in ("option1", "option2")]
    prompt = before.rstrip() or "\n"
    return Asked(prompt, options, label_of(row, {"1": 0, "2": 1}, "answer") if labelled else None)


winogrande = Task(
    name="winogrande", source=Hub("allenai/winogrande", "winogrande_xl", test_split="validation"),
    ask=ask_winogrande, validation_size=100,
)  # fmt: skip


def ask_record(row: Row, labelled: bool) -> Asked:
    """The passage with its highlights as a list, and the query as a further item, its placeholder filled with an entity."""
    query, entities = str(row["query"]), list(dict.fromkeys(map(str, row["entities"])))
    if "@placeholder" not in query or len(entities) < 2:
        raise InputError(f"{row.where}: a query with @placeholder and two or more entities were expected")
    passage = str(row["passage"]).replace("@highlight\n", "- ")
    answers = list(map(str, row["answers"])) if labelled else []
    label = next((i for i, entity in enumerate(entities) if entity in answers), None)
    if labelled and label is None:
        raise InputError(f"{row.where}: none of the answers is among the entities")
    before, _, after = query.partition("@placeholder")
    texts = [f"{entity}{after}" for entity in entities]
    return Asked(f"{passage}\n- {before}".rstrip(" "), texts, label, answers, entities)


record = Task(
    name="record", source=Hub(SUPERGLUE, "record", test_split="validation"), ask=ask_record,
    metric="record_f1",
)  # fmt: skip
