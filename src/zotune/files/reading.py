"""YAML as plain data, never objects, whatever the file may hold."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from zotune.errors import InputError

MAX_VALUES = 100_000  # of a YAML file


def load_yaml(path: Path, where: str) -> Any:
    """A YAML file's value: plain data, never objects. Raises InputError, a line, for whatever else the file may be.

    What references to references would unfold to is counted before it is made: a few lines can name a billion values. As in
    YAML 1.2, `yes` and `no` are words: label words are often these.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, like) for tag, like in known if tag != "tag:yaml.org,2002:bool"]
            for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^([Tt]rue|TRUE|[Ff]alse|FALSE)$"), list("tTfF"))
    try:
        loader = Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        values = _values(node, {}) if node is not None else 0
        if values <= MAX_VALUES and node is not None and (again := _given_again(node)) is not None:
            raise InputError(f"{where}:{again.start_mark.line + 1}: key {again.value!r} is there twice; keep one")
        if values <= MAX_VALUES:
            return loader.construct_document(node) if node is not None else None
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        said = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{where}{f':{mark.line + 1}' if mark else ''}: not YAML ({said})") from None
    except RecursionError:
        raise InputError(f"{where}: not YAML (nested too deeply)") from None
    except (
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        ArithmeticError,
    ) as error:  # a "!!int x", a 31st of June
        raise InputError(f"{where}: not YAML (a value is not what its form says: {error})") from None
    raise InputError(f"{where}: holds more than {MAX_VALUES:,} values, references unfolded; write fewer")


def _given_again(node: Any) -> Any:
    """A key that a mapping has already; None where there is none. YAML would take the last one without a word."""
    names: set[tuple[str, str]] = set()
    for item in node.value if isinstance(node.value, list) else ():
        pair = item if isinstance(item, tuple) else (item,)
        if len(pair) == 2 and isinstance(pair[0].value, str):
            name = (pair[0].tag, pair[0].value)
            if name in names:
                return pair[0]
            names.add(name)
        again = next((found for inner in pair if (found := _given_again(inner)) is not None), None)
        if again is not None:
            return again
    return None


def _values(node: Any, known: dict[int, float]) -> float:
    """How many values a YAML node stands for, those that it refers to included each time; infinite for one within itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        inner = node.value if isinstance(node.value, list) else []
        items = [item for pair in inner for item in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_values(item, known) for item in items)
    return known[id(node)]


def read_yaml(file: str, flag: str = "--config") -> dict[str, Any]:
    """The keys and values of a YAML file."""
    value = load_yaml(Path(file).expanduser(), f"{flag} {file}")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{file}: a {type(value).__name__} where keys and values were expected")
    return {str(key).replace("-", "_"): item for key, item in value.items()}
