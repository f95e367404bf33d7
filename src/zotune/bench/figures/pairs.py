"""Bars of configurations side by side: what two figures share."""

from __future__ import annotations

from typing import Any

from zotune.bench.figures.drawing import COLOURS, INK, legend, panels
from zotune.bench.frame import percentage, unit


def bars(titles: list[str], metric: str, groups: list[list[tuple[str, list[tuple[str, float, float]]]]]) -> Any:
    """A panel a title: clusters (name, [(bar, mean, sd), …])."""
    names = list(dict.fromkeys(bar for panel in groups for _, cluster in panel for bar, _, _ in cluster))
    figure, axes = panels(len(titles))
    for axis, title, panel in zip(axes, titles, groups, strict=True):
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            found = [(x, m, s) for x, (_, cluster) in enumerate(panel) for bar, m, s in cluster if bar == name]
            if not found:
                continue
            places = [x + (i - (len(names) - 1) / 2) * width for x, _, _ in found]
            most = [max(0.0, 100 - m) if percentage(metric) else s for _, m, s in found]
            spread = [
                [s for _, _, s in found],
                [min(s, up) for (_, _, s), up in zip(found, most, strict=True)],
            ]  # none for NaN
            axis.bar(
                places,
                [m for _, m, _ in found],
                width * 0.92,
                yerr=spread,
                label=name,
                color=COLOURS[i % 8],
                capsize=2,
                ecolor=INK,
            )
            for x, (_, m, _) in zip(places, found, strict=True):
                axis.text(x, 1, f"{m:.1f}", ha="center", va="bottom", fontsize=8, color="white", rotation=90)
        slant: Any = {"rotation": 20, "ha": "right"} if len(panel) > 2 else {}
        axis.set_xticks(range(len(panel)), [cluster for cluster, _ in panel], **slant)
        if percentage(metric):
            axis.set_ylim(0, 100)
        axis.set_ylabel(f"test {unit(metric)}")
        axis.set_title(title)
        axis.grid(axis="x", visible=False)
    legend(figure, axes)
    return figure
