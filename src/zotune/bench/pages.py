"""Pages that need no network: templates that escape what they are given, and one style for all."""

from __future__ import annotations

from importlib.resources import files

import jinja2


def template(name: str, room: str = "zotune.bench") -> jinja2.Template:
    """A template of a room, which may include `page.css`."""
    texts = {name: (room, name), "page.css": ("zotune.bench", "page.css")}
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({key: files(r).joinpath(n).read_text(encoding="utf-8") for key, (r, n) in texts.items()}),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(name)
