"""Families of schedules: names that differ in the rate r alone share a line of a plot and a group of a table.

So do names that differ in the GMACs that end them, such as `diffrate_s_g2.9`.
"""

import re

# A rule with its options, whose digits are no rate; the r of a stage in an explicit form; the r or the GMACs that end a
# name.
_PARTS = re.compile(
    r"(?P<rule>@[^@,(]*(?:\((?:[^()]|\([^()]*\))*\))?)|(?P<stage>:r)(?P<r>\d+)|_r(?P<rate>\d+)(?=@|$)|_g\d+\.\d+$",
    re.ASCII,
)


def family(schedule: str) -> str:
    """Drop the rate from a schedule's name: `tome_r16@nearest` is of the family `tome@nearest`."""
    return _PARTS.sub(lambda part: part["rule"] or part["stage"] or "", schedule)


def rate(schedule: str) -> int | None:
    """Read r from a schedule's name; None if it has none, or several."""
    found = {part["r"] or part["rate"] for part in _PARTS.finditer(schedule)} - {None}
    return int(found.pop()) if len(found) == 1 else None
