"""`zotune preview`: rows as a model will see them."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from zotune import run
from zotune.config import PreviewConfig
from zotune.models.loading import find_kind, load_tokenizer
from zotune.tasks import Example
from zotune.tasks.encoding import Encoded, Encoder
from zotune.tasks.splits import find_source


def preview(options: PreviewConfig) -> None:
    """The first rows of a split: prompt, right answer in reverse, the other candidates, lengths and cuts."""
    task = run.task_of(options)
    source = find_source(task, options.data, options.data_dir, options.columns)
    found = next(((split, rows) for split in ("train", "validation", "test") if (rows := source.rows(split))), None)
    assert found is not None  # a source without rows has said so
    split, rows = found
    console = Console(soft_wrap=True)
    console.print(Text(f"{task.name}, {split}: {len(rows)} rows, scored by {task.metric}", style="bold"))
    examples = [task.example(row) for row in rows]
    encode = None
    if options.model:
        extra: Any = {"gguf_file": options.gguf_file, "trust_remote_code": options.trust_remote_code}
        tokenizer = load_tokenizer(options.model, **extra)
        kind, _ = find_kind(options.model, options.model_kind, **extra)
        run.check_kind(kind, task)
        encode = Encoder(tokenizer, None, options.max_length, kind)
    for example in examples[: options.rows]:
        if encode is None:
            show_text(console, example)
        else:
            show_row(console, example, encode(example), tokenizer)
    if encode is not None:
        encoded = [encode(example) for example in examples]
        lengths = sorted(row.tokens for row in encoded)
        cut = sum(bool(row.cut) for row in encoded)
        said = (
            f"tokens a row: {lengths[len(lengths) // 2]} median, {lengths[-1]} most; {cut} of {len(lengths)} rows cut"
        )
        console.print(Text(said, style="bold"))
    else:
        console.print(Text("lengths in tokens: with --model", style="dim"))


def show_text(console: Console, example: Example) -> None:
    right = example.candidates[example.label or 0]
    line = Text(f"{example.where}  ", style="dim").append(Text(_plain(example.prompt)))
    line.append(_plain(right), style="bold reverse")
    console.print(line)
    _others(console, example)


def show_row(console: Console, example: Example, encoded: Encoded, tokenizer: Any) -> None:
    """What the ids decode to, so that what the tokenizer adds or cuts is seen."""
    prompt = tokenizer.decode(list(encoded.prompt))
    right = example.candidates[encoded.label].strip()
    answer = f" → {right}" if encoded.classified else tokenizer.decode(list(encoded.candidates[encoded.label]))
    line = Text(f"{example.where}  ", style="dim").append(Text(_plain(prompt)))
    line.append(_plain(answer), style="bold reverse").append(_plain(tokenizer.decode(list(encoded.tail))))
    line.append(f"   {encoded.tokens} tokens", style="dim")
    if encoded.cut:
        line.append(f", {encoded.cut} cut", style="dim")
    console.print(line)
    _others(console, example)


def _others(console: Console, example: Example) -> None:
    others = [text.strip() for i, text in enumerate(example.candidates) if i != example.label]
    if others:
        console.print(Text(f"    not: {' | '.join(map(_plain, others))}", style="dim"))


def _plain(text: str) -> str:
    """On one line, with its line ends written out."""
    return text.replace("\n", "\\n")
