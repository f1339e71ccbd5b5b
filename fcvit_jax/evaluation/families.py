"""Families of schedules: names that differ in the rate r alone share a line of a plot and a group of a table."""

import re

# A rule with its options, whose digits are no rate; the r of a stage in an explicit form; the r that ends a name.
_PARTS = re.compile(
    r"(?P<rule>@[^@,(]*(?:\((?:[^()]|\([^()]*\))*\))?)|(?P<stage>:r)(?P<r>\d+)|_r(?P<rate>\d+)(?=@|$)", re.ASCII
)


def family(schedule: str) -> str:
    """Drop the rate from a schedule's name: `tome_r16@nearest` is of the family `tome@nearest`."""
    return _PARTS.sub(lambda part: part["rule"] or part["stage"] or "", schedule)


def rate(schedule: str) -> int | None:
    """Read r from a schedule's name; None if it has none, or several."""
    found = {part["r"] or part["rate"] for part in _PARTS.finditer(schedule) if not part["rule"]}
    return int(found.pop()) if len(found) == 1 else None
