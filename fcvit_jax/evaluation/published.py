"""Published accuracies of token merging without training, as others report them; nothing was measured here.

`published.json`, beside this file, has every curve with its source and how it was read. Top-1 is over the 50,000
ImageNet-1k validation images.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fcvit_jax.models import flops, zoo
from fcvit_jax.models.schedule import MergeSchedule


class Publication(NamedTuple):
    """A source of published results.

    where: paper and figure or table; how: read off, and how precisely; device: of images/s.
    """

    name: str
    authors: str
    where: str
    how: str
    device: str | None

    @property
    def label(self) -> str:
        """The text of a legend."""
        return f"{self.authors}, digitised" if self.how.startswith("Digitised") else self.authors


class Point(NamedTuple):
    """One published result. top1: percent; gmacs: as plotted or printed in the source; None if not given there.

    family and r: the schedule's name in two parts; r is None if the rate is unknown, and 0 for `dense`.
    """

    family: str
    r: int | None
    top1: float | None = None
    gmacs: float | None = None
    images_per_second: float | None = None

    @property
    def schedule(self) -> str | None:
        """A name that `MergeSchedule.parse` reads; None if the rate is unknown."""
        return self.family if self.family == "dense" else None if self.r is None else f"{self.family}_r{self.r}"


class Curve(NamedTuple):
    """The points of one family of schedules on one set of weights, from one source. model: full name of the zoo."""

    model: str
    family: str
    source: Publication
    points: tuple[Point, ...]
    note: str | None

    def gmacs(self, point: Point) -> float | None:
        """Return the GMACs of one image: computed if the schedule is known, otherwise as in the source."""
        if point.schedule is None:
            return point.gmacs
        config = zoo.get(self.model).config
        return flops.gmacs(config, MergeSchedule.parse(point.schedule, config.depth))


def curves(model: str | None = None) -> tuple[Curve, ...]:
    """Return all curves, or those of one set of weights by its name in the zoo; () if none are published.

    The name of an architecture alone means the first of its weights in `published.json`.
    """
    if model is None:
        return _read()
    names = (curve.model for curve in _read())
    weights = next((name for name in names if model in (name, name.split(".")[0])), None)
    return tuple(curve for curve in _read() if curve.model == weights)


def points(model: str | None) -> dict[str, Point]:
    """Return the points of one set of weights by schedule; of several sources, the first in `published.json`."""
    found = [point for curve in curves(model or "") for point in curve.points]
    return {point.schedule: point for point in reversed(found) if point.schedule}


def fields(model: str | None, schedule: str) -> dict[str, float | None]:
    """Return the published fields of a result row: published_top1, a fraction like the row's, and published_gmacs."""
    point = points(model).get(schedule)
    top1, gmacs = (point.top1, point.gmacs) if point else (None, None)
    return {"published_top1": None if top1 is None else round(top1 / 100, 6), "published_gmacs": gmacs}


@cache
def _read() -> tuple[Curve, ...]:
    table = json.loads(Path(__file__).with_suffix(".json").read_text())
    sources = {name: Publication(name, **fields) for name, fields in table["sources"].items()}
    read = []
    for entry in table["curves"]:
        family = entry["family"]
        columns = (entry.get(key, [None] * len(entry["r"])) for key in ("r", "top1", "gmacs", "images_per_second"))
        named = tuple(Point(family, *values) for values in zip(*columns, strict=True))
        read.append(Curve(entry["model"], family, sources[entry["source"]], named, entry.get("note")))
    return tuple(read)
