"""Who may import whom: no circle among modules, and between rooms only downwards in the order that docs/architecture.md states."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "src"
MODULES = {  # by name; of a package its __init__
    ".".join(path.relative_to(SOURCES).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (SOURCES / "zotune").rglob("*.py")
}
KNOWN: dict[str, str] = {}  # "module -> module": why this arrow still points up


def imported(node: ast.AST) -> Iterator[str]:
    """What is imported anywhere below a node, within functions too, but for what stands under `if TYPE_CHECKING:`."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.If) and ast.unparse(inner.test).endswith("TYPE_CHECKING"):
            yield from imported(ast.Module(inner.orelse, []))
        elif isinstance(inner, ast.Import):
            yield from (name.name for name in inner.names)
        elif isinstance(inner, ast.ImportFrom):
            assert inner.level == 0, "an import names the whole module"
            given = (f"{inner.module}.{name.name}" for name in inner.names)
            yield from (name if name in MODULES else str(inner.module) for name in given)
        else:
            yield from imported(inner)


ARROWS = {
    name: {target for target in imported(ast.parse(path.read_text(encoding="utf-8"))) if target in MODULES} - {name}
    for name, path in MODULES.items()
}


def order() -> tuple[dict[str, int], set[frozenset[str]]]:
    """The layer of each room, 0 the lowest, and the pairs of rooms that do not know each other wherever they stand."""
    text = (SOURCES.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split("\n## Layers\n")[1].split("\n## ")[0]
    layers, _, apart = " ".join(re.findall(r"^    (.*)", section, re.M)).partition("apart:")
    place = {room.strip(): i for i, layer in enumerate(layers.split("<")) for room in layer.split(",")}
    return place, {frozenset(pair.split()) for pair in apart.split(",")}


def test_no_modules_import_each_other_in_a_circle():
    TopologicalSorter(ARROWS).prepare()  # its CycleError names one


def test_rooms_know_only_what_is_below_them():
    place, apart = order()

    def room(module: str) -> str:
        two = ".".join(module.split(".")[1:3])
        return two if two in place else two.split(".")[0]

    up = []
    for module, target in ((module, target) for module, targets in ARROWS.items() for target in targets):
        a, b = room(module), room(target)
        # `zotune` itself holds nothing: it looks a name up when somebody asks for it.
        below = a in (b, "", "__main__") or b == "" or (place[a] > place[b] and {a, b} not in apart)
        if not below and f"{module} -> {target}" not in KNOWN:
            up.append(f"{module} -> {target}")
    assert not up


def test_imports_within_functions_count_and_those_for_types_do_not():
    text = "if TYPE_CHECKING:\n import a\nelse:\n import b\ndef f():\n from zotune import noise\n from torch import c"
    assert list(imported(ast.parse(text))) == ["b", "zotune.noise", "torch"]
