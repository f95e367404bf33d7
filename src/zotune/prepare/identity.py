"""What a run's rows, tokenizer, template and task are, by content: a run that goes on under the same names goes on with the same.

What counts is what the model sees, the token ids; the other digests say what has changed where those differ. They are in a run's
progress.json and leave its options alone.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zotune.errors import InputError
from zotune.rewards.prompts import Prompt
from zotune.tasks.encoding import Encoded
from zotune.tasks.splits import SPLITS, Source
from zotune.tasks.task import Example, Task

FORMAT = 1  # of what is digested; a record of another one tells nothing
SAMPLE = 512  # tokens of the vocabulary that stand for it, beside the rows' own ids
NAMES = ("tokenizer", "template", "task")
DATED = "strftime_now"  # in a chat template that writes the day: its ids differ from day to day


def identity(
    task: Task,
    tokenizer: Any,
    source: Source,
    examples: Mapping[str, Sequence[Example]],
    rows: Mapping[str, Sequence[Encoded]],
    base: str = "",
    named: Iterable[str] = (),
) -> dict[str, Any]:
    """Digests of a run's examples by split, and of what they are as ids.

    rows: as they are read, split by split. texts: what template and task make of them. seen: what the tokenizer makes of those,
    with what else is scored. The rest is digested by itself. base: fingerprint of the model as it was loaded. code: files of code
    that is not zotune's own: the metric's, `ask`'s of the task, and of what else is `named` module:NAME (loss, method).
    """
    wanted = {example.where for part in examples.values() for example in part}
    read = {row.where: row.fields for split in SPLITS for row in source.rows(split) or () if row.where in wanted}
    chat = getattr(tokenizer, "chat_template", None) if task.messages_field is not None else None
    dated = DATED in str(chat)
    return {
        "format": FORMAT,
        "rows": {split: _digest(_fields(read.get(e.where, {})) for e in part) for split, part in examples.items()},
        "seen": {} if dated else {split: _digest(map(_ids, part)) for split, part in rows.items()},
        "texts": _digest(_texts(example) for part in examples.values() for example in part),
        "tokenizer": _digest([_vocabulary(tokenizer)]),
        "template": _digest([(task.prompt, task.plain, chat)]),
        "task": _digest([_asked(task)]),
        "base": base,
        "code": _code(task, named),
    }


def identity_of_prompts(
    tokenizer: Any, prompts: Mapping[str, Sequence[Prompt]], asked: tuple[Any, ...], base: str
) -> dict[str, Any]:
    """The same of prompts, whose columns count too: reward functions see them all. asked: how rows were made prompts."""
    chat = getattr(tokenizer, "chat_template", None)
    some = [prompt for part in prompts.values() for prompt in part]
    return {
        "format": FORMAT,
        "rows": {
            name: _digest((p.prompt, sorted(map(repr, p.columns.items()))) for p in part)
            for name, part in prompts.items()
        },
        "seen": {},
        "texts": _digest(repr(p.prompt) for p in some),
        "tokenizer": _digest([_vocabulary(tokenizer)]),
        "template": _digest([(*asked, chat if any(p.conversational for p in some) else None)]),
        "task": _digest([]),
        "base": base,
        "code": {},  # of reward functions: named anew at each resumption
    }


def refuse_others(was: Any, now: Mapping[str, Any], place: str, model: str) -> bool:
    """Whether the record says what the run is made of; raises InputError where that is not what there is now."""
    if not isinstance(was, Mapping) or was.get("format") != FORMAT:
        return False
    if was.get("base", now["base"]) != now["base"]:
        raise InputError(f"--model {model}: its weights are not those that the run began with; give the run's own")
    if said := changed(was, now):
        raise InputError(
            f"--output {place}: holds a run of other {', '.join(said)}; --resume goes on with its own alone: put back what it "
            "began with, or start anew with --overwrite"
        )
    return True


def changed(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which of rows, tokenizer, template and task are others. Columns that the model never sees may change."""
    known: dict[str, Any] = {
        name: was.get(name) if isinstance(was.get(name), Mapping) else {} for name in ("rows", "seen")
    }
    by = "seen" if now["seen"] else "rows"
    apart = [split for split in now["rows"] if known[by].get(split) != now[by].get(split)]
    rows = [split for split in apart if known["rows"].get(split) != now["rows"][split]]
    said = [f"rows ({', '.join(rows)})"] if rows else []
    said += [name for name in NAMES if was.get(name) != now[name]]
    code = was.get("code", now["code"])  # an older record has none
    said += [f"code ({name})" for name, digest in now["code"].items() if code.get(name) != digest]
    if apart and not said:
        said = ["template" if was.get("texts") != now["texts"] else "tokenizer (the same texts have other ids)"]
    return said


def _fields(fields: Mapping[str, Any]) -> Any:
    return sorted(fields.items(), key=lambda pair: str(pair[0]))


def _ids(row: Encoded) -> Any:
    return (row.prompt, row.candidates, row.label, row.golds, row.names, row.counted, row.mask, row.tail, row.outputs)


def _texts(example: Example) -> Any:
    messages = [sorted(message.items()) for message in example.messages]
    return (example.prompt, example.candidates, example.label, example.golds, example.names, messages, example.learned)


def _vocabulary(tokenizer: Any) -> Any:
    size = len(tokenizer)
    some = range(0, size, max(1, size // SAMPLE))
    special = [
        getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk", "mask", "sep", "cls")
    ]
    return (size, special, tokenizer.convert_ids_to_tokens(list(some)))


def _asked(task: Task) -> Any:
    """All of it but its texts and where its rows are."""
    ask = getattr(task.ask, "__qualname__", None)
    fields = (task.label_field, task.choices_field, task.answer_field, task.text_field, task.messages_field)
    return (list((task.words or {}).items()), fields, ask, task.metric, task.generates, sorted(task.columns.items()))


def _code(task: Task, named: Iterable[str]) -> dict[str, str]:
    """Digests of the files of modules that are not zotune's own."""
    names = [name for name in (*named, task.metric) if ":" in name]
    names += [f"{task.ask.__module__}:{task.ask.__qualname__}"] if task.ask is not None else []
    modules = {name: name.partition(":")[0] for name in names}
    files = {name: getattr(sys.modules.get(module), "__file__", None) for name, module in modules.items()}
    own = {name: file for name, file in files.items() if file and modules[name].split(".")[0] != "zotune"}
    return {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in own.items()}


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()
