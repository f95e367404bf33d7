"""Figures as people say them."""

from __future__ import annotations


def time_of(seconds: float) -> str:
    """
    >>> time_of(2.14), time_of(264.0), time_of(9000.0), time_of(864000.0)
    ('2.1 s', '4.4 minutes', '2.5 hours', '10.0 days')
    """
    for unit, length, least in (("days", 86400, 172800), ("hours", 3600, 7200), ("minutes", 60, 60)):
        if seconds >= least:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
