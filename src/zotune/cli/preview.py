"""`zotune preview`: rows as a model will see them."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from zotune.models.loading import check_architecture, find_kind, limit_of, load_config, load_tokenizer
from zotune.models.schemes import get_scheme
from zotune.options import PreviewConfig
from zotune.prepare.model import check_kind
from zotune.tasks import Example
from zotune.tasks.encoding import Encoded, Encoder
from zotune.tasks.own import data_of, encoded
from zotune.tasks.splits import after_shots, demonstrations, scored_rows

MARKS = "⟦⟧"  # around what counts, where there is no terminal to show it in reverse


def preview(options: PreviewConfig) -> None:
    """The first rows of a split: prompt, right answer (in reverse, or in marks), the other candidates, lengths and cuts.

    With `shots` they are rows that `zotune eval` scores, each behind what it shows.
    """
    task, source = data_of(options)
    taken = get_scheme(options.scheme).tokens
    if options.shots:
        rows, split = scored_rows(source, options.eval_size, seed=options.seed)
        shots = demonstrations(task, source, options.shots, options.seed, rows)
    else:
        (split, rows), shots = source.first(), []
    console = Console(soft_wrap=True)
    console.print(Text(f"{task.name}, {split}: {len(rows)} rows, scored by {task.metric}", style="bold"))
    if not console.is_terminal:
        console.print(f"what counts stands between {MARKS[0]} and {MARKS[1]}")
    examples = [task.example(row) for row in rows]
    if options.model is None:
        for example in after_shots(examples[: options.rows], shots):
            show_text(console, example)
        console.print(Text("lengths in tokens: with --model", style="dim"))
    else:
        extra: Any = {"gguf_file": options.gguf_file, "trust_remote_code": options.trust_remote_code}
        kind, _ = find_kind(options.model, options.model_kind, **extra)
        check_kind(kind, task)
        check_architecture(options.model, kind, **extra)
        tokenizer = load_tokenizer(options.model, **extra)
        if shots:
            examples = after_shots(examples, shots, tokenizer.mask_token)
        limit = limit_of(options.model, kind, **extra)
        limit = limit - taken if limit is not None else None
        config = load_config(options.model, **extra).get_text_config()
        rows_of = getattr(config, "vocab_size", None)
        encode = Encoder(tokenizer, limit, options.max_length, kind, vocabulary=rows_of)
        examples, ids = encoded(encode, source, examples)
        for example, row in list(zip(examples, ids, strict=True))[: options.rows]:
            show_row(console, example, row, tokenizer)
        lengths = sorted(row.tokens for row in ids)
        cut = sum(bool(row.cut) for row in ids)
        said = (
            f"tokens a row: {lengths[len(lengths) // 2]} median, {lengths[-1]} most; {cut} of {len(lengths)} rows cut"
        )
        console.print(Text(said, style="bold"))
    if source.unread:
        console.print(Text(source.unread, style="bold"))
    if source.bad.said:
        console.print(Text(f"bad rows: {source.bad}", style="bold"))


def show_text(console: Console, example: Example) -> None:
    right = example.candidates[example.label or 0]
    line = Text.assemble((f"{example.where}  ", "dim"), _plain(example.prompt))
    line.append(_counted(console, _plain(right)))
    if example.end is not None:  # the tokenizer's is known with --model
        line.append(_counted(console, _plain(example.end) or "the tokenizer's end", end=True))
    console.print(line)
    _others(console, example)


def show_row(console: Console, example: Example, ids: Encoded, tokenizer: Any) -> None:
    """What the ids decode to, so that what the tokenizer adds or cuts is seen."""
    line = Text.assemble((f"{example.where}  ", "dim"), _plain(tokenizer.decode(list(ids.prompt))))
    if ids.classified:
        line.append(" → ").append(_counted(console, example.candidates[ids.label].strip()))
    else:
        answer = ids.candidates[ids.label]
        counted = set(ids.counted or range(len(answer)))
        whole = str(tokenizer.decode(list(answer)))
        if (
            ids.ended and example.end and whole.endswith(example.end)
        ):  # it may share a token with the answer, or take several
            line.append(_counted(console, _plain(whole.removesuffix(example.end))))
            line.append(_counted(console, _plain(example.end), end=True))
        else:
            last = len(answer) - ids.ended
            for counts, places in groupby(range(last), counted.__contains__):  # a conversation has questions in between
                text = _plain(tokenizer.decode([answer[place] for place in places]))
                line.append(_counted(console, text) if counts else Text(text))
            if ids.ended:
                line.append(_counted(console, _plain(tokenizer.decode([answer[-1]])), end=True))
        line.append(_plain(tokenizer.decode(list(ids.tail))))
    line.append(f"   {ids.tokens} tokens", style="dim")
    if ids.cut:
        line.append(f", {ids.cut} cut", style="dim")
    console.print(line)
    _others(console, example)


def _counted(console: Console, text: str, end: bool = False) -> Text:
    """end: of the end of an answer, which stands apart from it."""
    return (
        Text(text, style="dim reverse" if end else "bold reverse")
        if console.is_terminal
        else Text(f"{MARKS[0]}{text}{MARKS[1]}")
    )


def _others(console: Console, example: Example) -> None:
    others = [text.strip() for i, text in enumerate(example.candidates) if i != example.label]
    if others:
        console.print(Text(f"    not: {' | '.join(map(_plain, others))}", style="dim"))


def _plain(text: str) -> str:
    """On one line, with its line ends written out."""
    return text.replace("\n", "\\n")
