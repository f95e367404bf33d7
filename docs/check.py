"""What holds for every page: links lead somewhere, lines (but of tables) and paragraphs are short. In seconds, without a network.

python docs/check.py           says what does not hold, a line each
python docs/check.py --fix     rewraps lines and cuts paragraphs at the ends of their sentences; no word is changed

Pages are README.md, CHANGELOG.md, CONTRIBUTING.md, SECURITY.md, tests/README.md and docs/; of docs/benchmark/, which
`zotune bench report` writes, the links alone.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDTH, WORDS, README_LINES = 132, 100, 120
SENTENCE = re.compile(r"(?<=[.!?:)\]*`])\s+(?=[(\[*`\"“]*[A-ZΑ-Ω0-9(`*])")
STARTS_A_BLOCK = re.compile(r"([-+*>|=]|#+|\d+[.)])$|[|=>#]")
ITEM = re.compile(r"(\s*)([-*+]|\d+[.)])\s+")
LINK = re.compile(r"!?\[(?:[^\[\]`]|`[^`]*`|\[[^\]]*\])*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")


@dataclass
class Block:
    """Lines of a page that belong together. kind: text (a paragraph or an item of a list), table, code, heading or blank."""

    kind: str
    first: int
    lines: list[str]

    @property
    def words(self) -> int:
        return len(re.sub(r"\]\([^)]*\)", "]", " ".join(self.lines)).split())


def pages() -> list[Path]:
    found = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "tests/README.md")]
    return [page for page in found if page.exists()] + sorted((ROOT / "docs").rglob("*.md"))


def blocks(text: str) -> list[Block]:
    found: list[Block] = []
    fence, in_list = "", False
    for number, line in enumerate(text.split("\n"), start=1):
        last = found[-1] if found else None
        stripped = line.strip()
        if fence or stripped.startswith(("```", "~~~")):
            opens = not fence
            if opens:
                fence = stripped[:3]
                found.append(Block("code", number, [line]))
            else:
                assert last is not None
                last.lines.append(line)
                fence = "" if stripped.startswith(fence) else fence
            continue
        item = ITEM.match(line)
        after_gap = last is None or last.kind in ("blank", "heading", "code")
        kind = (
            "blank" if not stripped
            else "heading" if stripped.startswith("#") or re.fullmatch(r"(---+|===+)", stripped)
            else "table" if stripped.startswith("|")
            else "code" if line.startswith(":::")  # of mkdocstrings, with its options below it
            else "code" if line.startswith("    ") and not in_list and (after_gap or (last and last.kind == "code"))
            else "text"
        )  # fmt: skip
        if kind == "heading" or (kind == "text" and not item and not line.startswith(" ") and after_gap):
            in_list = False
        in_list = in_list or (bool(item) and kind == "text")
        joins = last is not None and last.kind == kind and kind != "heading" and not (kind == "text" and item)
        if joins:
            assert last is not None
            last.lines.append(line)
        else:
            found.append(Block(kind, number, [line]))
    return found


def rewrapped(block: Block) -> list[str]:
    """A paragraph's lines at the width, in parts of at most so many words where sentences end."""
    item = ITEM.match(block.lines[0])
    first = item.group(0) if item else re.match(r"\s*", block.lines[0]).group(0)  # type: ignore[union-attr]
    rest = " " * len(first)
    text = " ".join(line.strip() for line in [block.lines[0][len(first) :], *block.lines[1:]])
    parts = [text]
    while any(len(part.split()) > WORDS for part in parts):
        cut = [piece for part in parts for piece in (_halved(part) if len(part.split()) > WORDS else [part])]
        if cut == parts:
            break
        parts = cut
    lines: list[str] = []
    for number, part in enumerate(parts):
        lines += ([""] if number else []) + _filled(part, rest if number else first, rest)
    return lines


def _halved(part: str) -> list[str]:
    ends = [match.span() for match in SENTENCE.finditer(part) if not _within(part, match.start())]
    if not ends:
        return [part]
    start, end = min(ends, key=lambda span: abs(len(part[: span[0]].split()) - len(part[span[1] :].split())))
    return [part[:start], part[end:]]


def _within(text: str, place: int) -> bool:
    """Whether a place is within code, brackets or emphasis."""
    before = text[:place]
    return before.count("`") % 2 == 1 or before.count("**") % 2 == 1 or before.count("(") > before.count(")")


def _filled(text: str, first: str, rest: str) -> list[str]:
    lines, line = [], first
    for token in re.findall(r"(?:`[^`]*`|\S)+", text):
        room = len(line) + len(token) + (line.strip() != "" and line != first) <= WIDTH
        if line in (first, rest) or room or STARTS_A_BLOCK.match(token):
            line += token if line in (first, rest) else f" {token}"
        else:
            lines.append(line)
            line = rest + token
    return [*lines, line]


def faults(page: Path) -> Iterator[tuple[int, str]]:
    text = page.read_text(encoding="utf-8")
    if page.name == "README.md" and page.parent == ROOT and len(text.splitlines()) > README_LINES:
        yield README_LINES + 1, f"{len(text.splitlines())} lines; {README_LINES} at most"
    written_by_hand = ROOT / "docs" / "benchmark" not in page.parents
    for block in blocks(text):
        if block.kind != "code":
            for offset, line in enumerate(block.lines):
                for target in LINK.findall(re.sub(r"`[^`]*`", "``", line)):
                    if said := broken(page, target):
                        yield block.first + offset, said
        if block.kind not in ("text", "code") or not written_by_hand:
            continue
        for offset, line in enumerate(block.lines):
            if len(line) > WIDTH:
                yield block.first + offset, f"{len(line)} characters; {WIDTH} at most"
        if block.kind == "text" and block.words > WORDS:
            yield block.first, f"a paragraph of {block.words} words; {WORDS} at most"


def broken(page: Path, target: str) -> str | None:
    if re.match(r"[a-z]+:", target):
        return None
    path, _, anchor = target.partition("#")
    place = (page.parent / path).resolve() if path else page
    if not place.exists():
        return f"{target}: no such file"
    if anchor and place.suffix == ".md" and anchor not in anchors(place):
        return f"{target}: no such heading there"
    return None


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub and mkdocs name them, and those that are given."""
    text = page.read_text(encoding="utf-8")
    found = set(re.findall(r"\{\s*#([\w.-]+)\s*\}", text)) | set(re.findall(r"<a id=\"([^\"]+)\"", text))
    for block in blocks(text):
        if block.kind == "heading":
            words = re.sub(r"[`*]|\[|\]\([^)]*\)", "", block.lines[0].lstrip("# ")).lower()
            found.add(re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", words).strip()))
    return found


def fix(page: Path) -> bool:
    """Whether something was changed. The words are the same before and after, in their order."""
    text = page.read_text(encoding="utf-8")
    lines: list[str] = []
    for block in blocks(text):
        long = block.kind == "text" and (block.words > WORDS or max(map(len, block.lines)) > WIDTH)
        lines += rewrapped(block) if long else block.lines
    new = "\n".join(lines)
    assert new.split() == text.split(), f"{page}: words would change"
    if new != text:
        page.write_text(new, encoding="utf-8")
    return new != text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true")
    parser.add_argument("pages", nargs="*", type=Path, help="these alone")
    given = parser.parse_args()
    wanted = [page.resolve() for page in given.pages] or pages()
    if given.fix:
        for page in wanted:
            if ROOT / "docs" / "benchmark" not in page.parents and fix(page):
                print(f"{page.relative_to(ROOT)}: rewrapped")
    count = 0
    for page in wanted:
        for line, said in faults(page):
            print(f"{page.relative_to(ROOT)}:{line}: {said}")
            count += 1
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
