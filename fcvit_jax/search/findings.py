"""The findings of a search: judged on images that chose nothing, written, and plotted."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fcvit_jax.evaluation.families import family
from fcvit_jax.evaluation.statistics import ratio_of_means
from fcvit_jax.figures import COLOURS, WIDTH, blank_figure, plain, png
from fcvit_jax.files import write_whole

FILES = ("search.json", "search.png")
FEWEST = 32  # images; with fewer, a bootstrap mistakes chance for better too often


@dataclass(frozen=True)
class Judgement:
    """The comparison of a found schedule with a simple one, on the same images.

    ratio: of the mean scores, found over simple, with its 95 % interval (paired bootstrap over images). better: beyond
    chance. reason: why, in words.
    """

    ratio: float
    low: float
    high: float
    better: bool
    reason: str


def judge(found: Sequence[float], simple: Sequence[float], seed: int) -> Judgement:
    """Compare the scores of two schedules, image by image."""
    count, (ratio, low, high) = len(found), ratio_of_means(found, simple, seed)
    within = f"{ratio:.2f} of it, 95 % interval {low:.2f} to {high:.2f}"
    if count < FEWEST:
        reason = f"{count} images are too few to judge, so a simple schedule is taken: give at least {2 * FEWEST}"
        return Judgement(ratio, low, high, False, reason)
    better = high < 1
    reason = f"better: {within}" if better else f"not better beyond chance: {within}"
    return Judgement(ratio, low, high, better, reason)


@dataclass(frozen=True)
class Correction:
    """The head corrected for a schedule against the unchanged head, under that schedule, on the images that judge.

    strength: of the ridge; None: the mean shift alone. checkpoint: where it was written; None if it is not better.
    """

    schedule: str
    strength: float | None
    judgement: Judgement
    checkpoint: str | None


@dataclass(frozen=True)
class Found:
    """The outcome at one budget.

    recommended: `schedule` if it is better than the best simple family beyond chance, otherwise that family's. score,
    simple_score: of both on the judging images. families: name of a simple schedule -> its score. costs: GMACs, by the
    same names and "found". gmacs, speedup: of the recommended one; the speed-up is measured for speed budgets alone.
    """

    budget: str
    recommended: str
    schedule: str
    score: float
    simple: str
    simple_score: float
    families: Mapping[str, float]
    judgement: Judgement
    costs: Mapping[str, float]
    gmacs: float
    share: float
    speedup: float | None = None
    images_per_second: float | None = None

    @property
    def name(self) -> str:
        """The name of the recommended schedule in `costs`."""
        return "found" if self.recommended == self.schedule else self.simple


@dataclass(frozen=True)
class SearchReport:
    """All findings of a search. measure: "KL" or "1 - cosine". candidates: all trials, as JSON-able rows.

    correction: None unless one was tried.
    """

    conditions: Mapping[str, Any]
    measure: str
    found: tuple[Found, ...]
    candidates: tuple[Mapping[str, Any], ...]
    correction: Correction | None = None

    @property
    def recommended(self) -> dict[str, str]:
        """The explicit form of the recommended schedule, by budget."""
        return {each.budget: each.recommended for each in self.found}

    def write(self, workdir: Path) -> None:
        """Write search.json and search.png."""
        text = {"format": 1, "recommended": self.recommended, **asdict(self)}
        write_whole(workdir / "search.json", (json.dumps(text, indent=1, allow_nan=False) + "\n").encode())
        write_whole(workdir / "search.png", plot_search(self))

    def __str__(self) -> str:
        where = self.conditions
        lines = [
            f"{where['checkpoint']} on {where['images']}: "
            f"{where['chosen_by']} images chose, {where['judged_by']} judge",
            "",
            *_table(self),
            "",
        ]
        for each in self.found:
            lines.append(f"budget {each.budget}: {each.judgement.reason.replace('of it', f'of {each.simple}')}")
            lines.append(f"  recommended: {each.recommended}")
        if self.correction:
            reason = self.correction.judgement.reason.replace("of it", "of the unchanged head")
            lines.append(f"corrected head: {reason}")
            lines.append(f"  {self.correction.checkpoint or 'not'} written")
        return "\n".join(lines)


def _table(report: SearchReport) -> list[str]:
    rows = [("budget", "schedule", "GMACs", "of dense", report.measure, "speed-up")]
    dense = report.conditions["dense_gmacs"]
    for each in report.found:
        chosen, scores = each.name, {"found": each.score} | dict(each.families)
        for name in (chosen, *(name for name in scores if name != chosen)):
            gmacs = each.costs[name]
            cells = f"{gmacs:.3g}", f"{gmacs / dense:.2f}", f"{scores[name]:.4g}"
            if name == chosen:
                rows.append((each.budget, f"{name} *", *cells, f"{each.speedup:.2f}x" if each.speedup else "-"))
            else:
                rows.append(("", name, *cells, ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:], "* recommended"]


def plot_search(report: SearchReport) -> bytes:
    """Plot the score of every candidate and simple family over GMACs, with the recommended ones marked; PNG."""
    figure = blank_figure(WIDTH, 5)
    axes = figure.subplots()
    whole = [row for row in report.candidates if row["images"] == report.conditions["chosen_by"]]
    for rows, alpha, label in (
        (report.candidates, 0.25, "candidates, on some of the images that choose"),
        (whole, 0.9, "on all of them"),
    ):
        x, y = [row["gmacs"] for row in rows], [max(row["score"], 1e-9) for row in rows]
        axes.scatter(x, y, s=14, color=COLOURS[5] if alpha < 0.5 else COLOURS[0], alpha=alpha, label=label, linewidth=0)
    for index, name in enumerate(dict.fromkeys(family(text) for each in report.found for text in each.families)):
        points = [
            (each.costs[text], max(score, 1e-9))
            for each in report.found
            for text, score in each.families.items()
            if family(text) == name
        ]
        axes.plot(*zip(*points, strict=True), f"{'s^v'[index % 3]}--", color=COLOURS[1], alpha=0.8, label=name)
    judged = [
        (each.gmacs, max(each.score if each.name == "found" else each.simple_score, 1e-9)) for each in report.found
    ]
    axes.plot(*zip(*judged, strict=True), "k*", markersize=12, label="recommended, on the images that judge")
    axes.set_yscale("log")
    axes.set_xlabel("GMACs an image (fewer is cheaper)")
    axes.set_ylabel(f"{report.measure} from dense")
    plain(axes)
    axes.legend(fontsize=8, frameon=False)
    title = f"{report.conditions['checkpoint']} on {report.conditions['images']}"
    figure.suptitle(title, fontsize=9, parse_math=False)
    return png(figure)
