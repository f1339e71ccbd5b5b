"""Families of schedules: names that differ only in the rate r share a line of a plot and a group of a table.

So do names that differ in the GMACs at their end, such as `diffrate_s_g2.9`, and the schedules of a search for several
budgets, `search:found:0.6` and `search:found:0.5`.
"""

import re

# A rule with its options, whose digits are not a rate; the r of a stage in an explicit form; the r or the GMACs at the
# end of a name.
_PARTS = re.compile(
    r"(?P<rule>@[^@,(]*(?:\((?:[^()]|\([^()]*\))*\))?)|(?P<stage>:r)(?P<r>\d+)|_r(?P<rate>\d+)(?=@|$)|_g\d+\.\d+$",
    re.ASCII,
)
_SEARCHED = re.compile(r"(?P<family>search:.*?|recommended)(?::(?P<budget>[\d.]+(?:G|x|/s)?))?", re.ASCII)


def family(schedule: str) -> str:
    """Drop the rate from a schedule's name: `tome_r16@nearest` is of the family `tome@nearest`."""
    if found := _SEARCHED.fullmatch(schedule):
        return found["family"]
    return _PARTS.sub(lambda part: part["rule"] or part["stage"] or "", schedule)


def rate(schedule: str) -> int | None:
    """Read r from a schedule's name; None if it has none, or several."""
    if _SEARCHED.fullmatch(schedule):
        return None
    found = {part["r"] or part["rate"] for part in _PARTS.finditer(schedule)} - {None}
    return int(found.pop()) if len(found) == 1 else None


def point_label(schedule: str) -> str | None:
    """Label a schedule within its family: `r=16`, or the budget of a search, `0.6`; None if unknown."""
    if found := _SEARCHED.fullmatch(schedule):
        return found["budget"]
    return None if (r := rate(schedule)) is None else f"r={r}"
