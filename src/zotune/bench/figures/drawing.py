"""What the figures share: colours and marks, panels, legends, and a figure as SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from zotune.bench.frame import metric_of, percentage

# Series are told apart by marker and dash as well as by colour. Okabe and Ito's palette, darkened to stand on white.
COLOURS = ("#0068a8", "#c04a00", "#007a5a", "#a8508a", "#7a6400", "#4a4ac0", "#b02a2a", "#5a5a5a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
INK, FAINT = "#1f2328", "#c8ccd0"
STYLE: Any = {
    "text.parse_math": False,
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.edgecolor": INK, "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
    "figure.facecolor": "white", "axes.facecolor": "none", "axes.titlesize": 10, "axes.titleweight": "bold",
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    with plt.rc_context(STYLE):
        yield
    plt.close("all")


def panels(count: int, height: float = 3.2, most: int = 2, width: float = 4.2) -> tuple[Figure, list[Any]]:
    """A figure of so many panels, at most `most` in a row."""
    columns = min(count, most)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns + 0.6, height * rows), squeeze=False)
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_visible(False)
    return figure, flat[:count]


def rows_of(counts: list[int], columns: int, each: float = 0.3, width: float = 4.2) -> tuple[Figure, list[list[Any]]]:
    """A figure of rows of panels, each as high as the lines that it has to show."""
    heights = [0.9 + each * count for count in counts]
    figure, axes = plt.subplots(
        len(counts), columns, figsize=(width * columns + 0.6, sum(heights)), squeeze=False, height_ratios=heights
    )
    return figure, [list(row) for row in axes]


def place(model: str, task: str) -> str:
    """A panel's title."""
    return f"{model.rsplit('/', 1)[-1]}, {task}" if task else model.rsplit("/", 1)[-1]


def percent(axis: Any, shown: pd.DataFrame) -> None:
    """No room above 100 %, where percentages are shown."""
    low, high = axis.get_ylim()
    axis.set_ylim(low, min(high, 101) if percentage(metric_of(shown)) else high)


def spread(rows: pd.DataFrame) -> Any:
    """One standard deviation down and up; of percentages no further than 100."""
    up = rows.sd.fillna(0)
    if percentage(metric_of(rows)):
        up = up.clip(upper=(100 - rows["mean"]).clip(lower=0))
    return [rows.sd.fillna(0), up]


def legend(figure: Figure, axes: list[Any]) -> None:
    """One legend under all panels."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    figure.tight_layout()
    if entries:
        columns = max(1, min(len(entries), int(figure.get_figwidth() * 9 / (4 + max(map(len, entries))))))
        figure.legend(
            entries.values(), entries.keys(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncol=columns, fontsize=9
        )


def plain_svg(figure: Figure, name: str) -> str:
    """An SVG file; the same figure gives the same bytes. Without the comments, which repeat every text."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<!--.*?-->", "", buffer.getvalue(), flags=re.S)
    short = lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip(".")  # noqa: E731
    svg = re.sub(r'\bd="[^"]*"', lambda path: re.sub(r"-?\d+\.\d{3,}", short, path[0]), svg)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)


def as_svg(figure: Figure, name: str, title: str) -> str:
    """An SVG element for a page: ink follows `currentColor`, series the page's --s0 … --s7, ids are the figure's own."""
    svg = plain_svg(figure, name)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    for i, colour in enumerate(COLOURS):
        svg = re.sub(colour, f"var(--s{i}, {colour})", svg, flags=re.I)
    svg = re.sub(INK, "currentColor", svg, flags=re.I)
    svg = re.sub(FAINT, "var(--rule, #c8ccd0)", svg, flags=re.I)
    width = re.search(r'\bwidth="([0-9.]+)pt"', svg)
    size = f"max-width:{float(width[1]) * 4 / 3:.0f}px" if width else ""
    svg = re.sub(r'(<svg[^>]*?) (?:width)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) (?:height)="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{_attribute(title)}" style="{size}"', 1)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
