"""Who watches a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zotune.prepare.prepared import Prepared


class Listener:
    """What a run tells whoever watches it. The command line draws it; this one is silent."""

    def say(self, line: str) -> None: ...
    def prepared(self, ready: Prepared) -> None: ...
    def answered(self, step: int, shown: Sequence[dict[str, Any]]) -> None: ...
    def begin(self, what: str, total: int) -> None: ...
    def advance(self, what: str, done: int, **shown: float) -> None: ...
    def end(self, what: str) -> None: ...
