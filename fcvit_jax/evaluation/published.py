"""Published accuracies of token merging without training: what others report, not what was measured here.

`published.json`, beside this file, has every curve with its source and how it was read. Top-1 is that of the 50,000
ImageNet-1k validation images. Print the table of docs/published.md with

    python -m fcvit_jax.evaluation.published
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fcvit_jax.models import flops, zoo
from fcvit_jax.models.schedule import MergeSchedule


@dataclass(frozen=True)
class Source:
    """where: paper and figure or table; how: read off with which precision; device: of images/s."""

    name: str
    authors: str
    where: str
    how: str
    device: str | None

    @property
    def label(self) -> str:
        """For a legend."""
        return f"{self.authors}, digitised" if self.how.startswith("Digitised") else self.authors


@dataclass(frozen=True)
class Point:
    """One published result. top1: percent; gmacs: as the source plots or prints them; None for what it does not say.

    family and r: the schedule's name in two parts; r is None where the source's rate is unknown, and 0 for `dense`.
    """

    family: str
    r: int | None
    top1: float | None = None
    gmacs: float | None = None
    images_per_second: float | None = None

    @property
    def schedule(self) -> str | None:
        """A name that `MergeSchedule.parse` reads; None where the rate is unknown."""
        return self.family if self.family == "dense" else None if self.r is None else f"{self.family}_r{self.r}"


@dataclass(frozen=True)
class Curve:
    """The points of one family of schedules on one set of weights, from one source. model: full name of the zoo."""

    model: str
    family: str
    source: Source
    points: tuple[Point, ...]
    note: str | None

    def gmacs(self, point: Point) -> float | None:
        """Multiply-accumulates / 1e9 of one image: computed where the schedule is known, else what the source says."""
        if point.schedule is None:
            return point.gmacs
        config = zoo.get(self.model).config
        return flops.gmacs(config, MergeSchedule.parse(point.schedule, config.depth))


def curves(model: str | None = None) -> tuple[Curve, ...]:
    """All curves, or those of one set of weights by its name in the zoo; () for one that nobody published.

    The name of an architecture alone stands for the first of its weights in `published.json`.
    """
    if model is None:
        return _read()
    names = (curve.model for curve in _read())
    weights = next((name for name in names if model in (name, name.split(".")[0])), None)
    return tuple(curve for curve in _read() if curve.model == weights)


def points(model: str | None) -> dict[str, Point]:
    """The points of one set of weights by schedule; of several sources the first that `published.json` lists."""
    named: dict[str, Point] = {}
    for curve in curves(model or ""):
        for point in curve.points:
            if point.schedule:
                named.setdefault(point.schedule, point)
    return named


def fields(model: str | None, schedule: str) -> dict[str, float | None]:
    """What a result row says of others' results: published_top1, a fraction as the row's own, and published_gmacs."""
    point = points(model).get(schedule)
    top1, gmacs = (point.top1, point.gmacs) if point else (None, None)
    return {"published_top1": None if top1 is None else round(top1 / 100, 6), "published_gmacs": gmacs}


@cache
def _read() -> tuple[Curve, ...]:
    table = json.loads(Path(__file__).with_suffix(".json").read_text())
    sources = {name: Source(name, **fields) for name, fields in table["sources"].items()}
    read = []
    for entry in table["curves"]:
        family = entry["family"]
        columns = (entry.get(key, [None] * len(entry["r"])) for key in ("r", "top1", "gmacs", "images_per_second"))
        named = tuple(Point(family, *values) for values in zip(*columns, strict=True))
        read.append(Curve(entry["model"], family, sources[entry["source"]], named, entry.get("note")))
    return tuple(read)


def as_markdown() -> str:
    """docs/published.md: every point, and beside it the multiply-accumulates that this library counts."""
    lines = [_HEAD]
    lines += [
        f"- `{s.name}`: {s.authors}, {s.where}. {s.how}." + (f" {s.device}." if s.device else "")
        for s in dict.fromkeys(curve.source for curve in curves())
    ]
    for model in dict.fromkeys(curve.model for curve in curves()):
        lines += ["", f"## {model}", ""]
        lines += [
            "| schedule | top-1, % | images/s | GMACs, published | GMACs, computed | source |",
            "|---|---|---|---|---|---|",
        ]
        for curve in curves(model):
            for point in curve.points:
                name = f"`{point.schedule}`" if point.schedule else f"{curve.family}, rate unknown"
                computed = f"{curve.gmacs(point):.2f}" if point.schedule else "-"
                cells = (_number(point.top1), _number(point.images_per_second), _number(point.gmacs))
                lines.append(f"| {name} | {' | '.join(cells)} | {computed} | `{curve.source.name}` |")
        lines += [f"\n`{curve.family}`: {curve.note}" for curve in curves(model) if curve.note]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


_HEAD = """\
# Published accuracies

What others report of token merging without training, on the 50,000 ImageNet-1k validation images. Nothing on this page
was measured with this library. The column "computed" has the multiply-accumulates / 1e9 of one image that it counts for
the same schedule. Made by `python -m fcvit_jax.evaluation.published` from `fcvit_jax/evaluation/published.json`.

Measure the same schedules yourself with [configs/paper_vit_s.py](../configs/paper_vit_s.py), `paper_vit_b.py`,
`paper_vit_l.py`, `paper_deit_s.py` and `paper_vit_b_sam.py`; the reports have the published top-1 beside the measured,
and draw the digitised curves behind.

Sources:
"""

if __name__ == "__main__":
    print(as_markdown(), end="")
