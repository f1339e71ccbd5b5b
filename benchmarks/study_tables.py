"""The tables of the study, made from its stored rows.

A value is the mean over the seeds with the half width of its 95 % interval (Student's t). A difference is taken seed by
seed; its p is that of the paired t-test. Intervals and tests are over the seeds of training: the test images are always
the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from fcvit_jax.evaluation.families import family, rate
from fcvit_jax.evaluation.statistics import mcnemar
from study import ARMS

TITLES = {
    "adamw": "AdamW",
    "adamw_twice": "AdamW, twice as long",
    "sam": "SAM",
    "sam_twice": "SAM, twice as long",
    "asam": "ASAM",
    "gsam": "GSAM",
    "sam_last25": "SAM, last 25 %",
    "sam_last10": "SAM, last 10 %",
    "msam": "MSAM",
}
MEASURES = {
    "worst": "worst case, radius",
    "worst_adaptive": "worst case, adaptive, radius",
    "average": "average case, noise",
    "average_adaptive": "average case, adaptive, noise",
    "keskar": "Keskar's, %, epsilon",
}

Rows = Sequence[dict[str, Any]]


def select(rows: Rows, setting: str) -> Rows:
    return [row for row in rows if row["setting"] == setting]


def by_arm(rows: Rows) -> dict[str, Rows]:
    """Group the rows by arm, in the order of the seeds."""
    arms = {arm: sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["seed"]) for arm in ARMS}
    return {arm: members for arm, members in arms.items() if members}


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def mean(values: Sequence[float], form: str) -> str:
    """Format the mean and the half width of its interval."""
    middle = format(float(np.mean(values)), form)
    return f"{middle} ± {half_width(values):{form.lstrip('+')}}" if len(values) > 1 else middle


def half_width(values: Sequence[float]) -> float:
    """Compute half of the width of the 95 % interval of the mean over the seeds."""
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))


# The values of a run that are compared. merged: over all schedules but dense.
def dense(row: dict[str, Any]) -> float:
    return 100 * row["schedules"][0]["top1"]


def merged(row: dict[str, Any]) -> float:
    return float(np.mean([100 * each["top1"] for each in row["schedules"][1:]]))


def drop(row: dict[str, Any]) -> float:
    return dense(row) - merged(row)


def divergence(row: dict[str, Any]) -> float:
    return float(np.mean([each["kl"] for each in row["schedules"][1:]]))


def conditions(rows: Rows) -> str:
    arms = by_arm(rows)
    body = [
        [
            TITLES[arm],
            f"{members[0]['config']['sam']['rho']:g}",
            f"{members[0]['config']['epochs']:g}",
            f"{members[0]['gradients']:,}",
            ", ".join(str(row["seed"]) for row in members),
        ]
        for arm, members in arms.items()
    ]
    return markdown(["", "radius", "epochs", "gradients", "seeds"], body)


def per_schedule(value: Callable[[dict[str, Any], int], float], form: str) -> Callable[[Rows], str]:
    """Make a table with a line for each schedule and a column for each arm."""

    def table(rows: Rows) -> str:
        arms = by_arm(rows)
        body = [
            [
                f"`{each['schedule']}`",
                f"{each['gmacs']:.4g}",
                *(mean([value(row, index) for row in members], form) for members in arms.values()),
            ]
            for index, each in enumerate(rows[0]["schedules"])
        ]
        return markdown(["schedule", "GMACs", *(TITLES[arm] for arm in arms)], body)

    return table


def measures(row: dict[str, Any]) -> dict[str, float]:
    """Return every measure of flatness of a run, by its title."""
    flatness = row["flatness"]
    named = {"largest eigenvalue": flatness["eigenvalue"], "trace": flatness["trace"]}
    for name, title in MEASURES.items():
        named |= {f"{title} {radius}": value for radius, value in flatness["curves"][name].items()}
    return named


def worst_case(row: dict[str, Any]) -> str:
    """Return the title of the worst case at the largest radius."""
    return [title for title in measures(row) if title.startswith(MEASURES["worst"] + " ")][-1]


def flatness(rows: Rows) -> str:
    arms = by_arm(rows)
    facts = {
        "loss on training images": lambda row: row["flatness"]["loss"],
        "norm of the weights": lambda row: row["flatness"]["weight_norm"],
    }
    facts |= {title: (lambda row, title=title: measures(row)[title]) for title in measures(rows[0])}
    body = [
        [title, *(mean([value(row) for row in members], ".3g") for members in arms.values())]
        for title, value in facts.items()
    ]
    verdicts = ["verdict against AdamW, seed by seed"]
    for members in arms.values():
        said = [row["against_adamw"]["verdict"] for row in members if row["against_adamw"]]
        verdicts.append(", ".join(f"{said.count(each)} {each}" for each in dict.fromkeys(said)) or "-")
    return markdown(["", *(TITLES[arm] for arm in arms)], [*body, verdicts])


def paired(rows: Rows) -> str:
    """Compare the other arms with both AdamWs, over the seeds that both have."""
    arms, body = by_arm(rows), []
    columns = {"dense, points": dense, "merged, points": merged, "drop, points": drop, "ln KL": log_divergence}
    for arm in (*(arm for arm in arms if not arm.startswith("adamw")), "adamw_twice"):
        for base in ("adamw", "adamw_twice"):
            if arm == base or arm not in arms or base not in arms:
                continue
            theirs = {row["seed"]: row for row in arms[base]}
            pairs = [(row, theirs[row["seed"]]) for row in arms[arm] if row["seed"] in theirs]
            cells = [difference([value(a) - value(b) for a, b in pairs]) for value in columns.values()]
            body.append([f"{TITLES[arm]} less {TITLES[base]}", str(len(pairs)), *cells])
    return markdown(["", "seeds", *columns], body)


def log_divergence(row: dict[str, Any]) -> float:
    return float(np.log(divergence(row)))


def ratio(logarithms: Sequence[float]) -> str:
    """Format the geometric mean of ratios and its 95 % interval over the seeds."""
    middle = float(np.mean(logarithms))
    if len(logarithms) < 2 or np.ptp(logarithms) < 1e-9:
        return f"{np.exp(middle):.2f}"
    half = half_width(logarithms)
    return f"{np.exp(middle):.2f} ({np.exp(middle - half):.2f} to {np.exp(middle + half):.2f})"


def difference(values: Sequence[float]) -> str:
    told = mean(values, "+.2f")
    if len(values) < 2 or np.ptp(values) < 1e-9:  # without a spread there is no test
        return told
    found: Any = stats.ttest_1samp(values, 0.0)
    return f"{told} (p {found.pvalue:.2g})"


def relation(rows: Rows) -> str:
    """Compute Spearman's rank correlation over all runs of the setting, whatever the arm."""
    if len(rows) < 4:
        return ""
    body = []
    facts = {"loss on training images": [row["flatness"]["loss"] for row in rows]}
    facts |= {title: [measures(row)[title] for row in rows] for title in measures(rows[0])}
    for title, values in facts.items():
        cells = []
        for value in (drop, divergence, merged):
            found: Any = stats.spearmanr(values, [value(row) for row in rows])
            cells.append(f"{found.statistic:+.2f} (p {found.pvalue:.2g})")
        body.append([title, *cells])
    return markdown([f"over {len(rows)} runs", "drop of top-1", "KL to dense", "merged top-1"], body)


def fit(rows: Rows) -> str:
    """Show how well each arm fits when it stops, beside the AdamW of its seed, and after how many steps."""
    arms, body = by_arm(rows), []
    theirs = {row["seed"]: row["gradients"] for row in arms["adamw"]}
    for arm, members in arms.items():
        apart = [row["fit"]["loss"] / row["fit"]["target"] - 1 for row in members if row["fit"]["target"]]
        late = [row for row in members if row["fit"]["target"] and row["fit"]["loss"] > row["fit"]["target"]]
        body.append(
            [
                TITLES[arm],
                f"{members[0]['config']['sam']['rho']:g}",
                mean([row["steps"] for row in members], ".0f"),
                mean([row["gradients"] / theirs[row["seed"]] for row in members], ".2f"),
                mean([row["fit"]["loss"] for row in members], ".4f"),
                f"{100 * max(apart, key=abs):+.1f} %" if apart else "",
                str(len(late)) if apart else "",
                ", ".join(str(row["seed"]) for row in members),
            ]
        )
    head = ["", "radius", "steps", "gradients, of AdamW's", "loss on training images", "furthest from AdamW's"]
    return markdown([*head, "never got there", "seeds"], body)


def pairs(rows: Rows, arm: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pair the runs of an arm with the AdamW of their seed."""
    arms = by_arm(rows)
    theirs = {row["seed"]: row for row in arms["adamw"]}
    return [(row, theirs[row["seed"]]) for row in arms[arm] if row["seed"] in theirs]


def against_adamw(values: Callable[[dict[str, Any]], dict[str, float]], first: str) -> Callable[[Rows], str]:
    """Make a table of differences from AdamW, seed by seed: one line per value, one column per arm."""

    def table(rows: Rows) -> str:
        others = [arm for arm in by_arm(rows) if arm != "adamw"]
        body = []
        for name in values(rows[0]):
            found = [[values(a)[name] - values(b)[name] for a, b in pairs(rows, arm)] for arm in others]
            body.append([name, *map(difference, found)])
        return markdown([first, *(TITLES[arm] for arm in others)], body)

    return table


def each_top1(row: dict[str, Any]) -> dict[str, float]:
    return {f"`{each['schedule']}`": 100 * each["top1"] for each in row["schedules"]}


def each_log_kl(row: dict[str, Any]) -> dict[str, float]:
    return {f"`{each['schedule']}`": float(np.log(each["kl"])) for each in row["schedules"][1:]}


def log_measures(row: dict[str, Any]) -> dict[str, float]:
    return {title: float(np.log(value)) for title, value in measures(row).items()}


def halfway(rows: Rows) -> str:
    """Show how far each arm goes from AdamW's sharpness to SAM's: 0 as sharp as AdamW, 1 as flat as SAM.

    Means are over the seeds that all arms have.
    """
    arms = by_arm(rows)
    common = set.intersection(*({row["seed"] for row in members} for members in arms.values()))
    arms = by_arm([row for row in rows if row["seed"] in common])
    others = [arm for arm in arms if arm not in ("adamw", "sam")]
    body = []
    for title in measures(rows[0]):
        means = {arm: np.mean([measures(row)[title] for row in members]) for arm, members in arms.items()}
        way = means["sam"] - means["adamw"]
        body.append([title, f"{means['sam'] / means['adamw']:.2f}"])
        body[-1] += [f"{(means[arm] - means['adamw']) / way:.2f}" for arm in others]
    return markdown(["", "SAM's, of AdamW's", *(f"{TITLES[arm]}: share of the way" for arm in others)], body)


METHODS = {"adamw": "AdamW", "msam": "MSAM", "sam_last25": "SAM-last-25%", "sam": "SAM", "asam": "SAM"}  # of cost rows


def choice(rows: Rows, costs: Rows) -> str:
    """Show what each method costs and gains, beside AdamW; means over the seeds."""
    arms, body = by_arm(rows), []
    sharpest = worst_case(rows[0])
    for arm, method in METHODS.items():
        if arm not in arms:
            continue
        both = pairs(rows, arm)
        kl = [log_divergence(a) - log_divergence(b) for a, b in both]
        sharpness = [log_measures(a)[sharpest] - log_measures(b)[sharpest] for a, b in both]
        body.append(
            [
                TITLES[arm],
                next((f"{row['ratio']:.2f} ± {row['half']:.2f}" for row in costs if row["method"] == method), ""),
                f"{np.mean([a['gradients'] / b['gradients'] for a, b in both]):.2f}",
                ratio(sharpness),
                ratio(kl),
                f"{np.mean([dense(row) for row in arms[arm]]):.1f}",
                f"{np.mean([merged(row) for row in arms[arm]]):.1f}",
            ]
        )
    head = [
        "method",
        "time of a run",
        "gradients to fit as well",
        sharpest,
        "KL when merged",
        "dense, %",
        "merged, %",
    ]
    return markdown(head, body)


TABLES: dict[str, Callable[[Rows], str]] = {
    "fit": fit,
    "paired_top1": against_adamw(each_top1, "top-1, points"),
    "paired_kl": against_adamw(each_log_kl, "ln KL"),
    "paired_flatness": against_adamw(log_measures, "ln"),
    "halfway": halfway,
    "conditions": conditions,
    "accuracy": per_schedule(lambda row, i: 100 * row["schedules"][i]["top1"], ".2f"),
    "drop": per_schedule(lambda row, i: dense(row) - 100 * row["schedules"][i]["top1"], "+.2f"),
    "divergence": per_schedule(lambda row, i: row["schedules"][i]["kl"], ".2g"),
    "flatness": flatness,
    "paired": paired,
    "relation": relation,
}


def families(names: Sequence[str]) -> Callable[[Rows], str]:
    """Make a table of images right and GMACs: one line per rate, one column per family."""

    def table(rows: Rows) -> str:
        found = {(family(row["schedule"]), rate(row["schedule"])): row for row in rows}
        rates = sorted({r for name, r in found if name in names and r is not None})
        body = [
            [str(r), *(cell(found[name, r]) if (name, r) in found else "" for name in names)]
            for r in rates
            if sum((name, r) in found for name in names) > 1
        ]
        return markdown(["r", *(f"`{name}`" for name in names)], body)

    return table


def cell(row: dict[str, Any]) -> str:
    return f"{row['correct']} at {row['gmacs']:.2f}"


def ablation_full(rows: Rows) -> str:
    """List every schedule, the most expensive first."""
    body = [
        [
            f"`{row['schedule']}`",
            f"{row['gmacs']:.2f}",
            f"{row['correct']}",
            f"{100 * row['top1']:.1f} ({100 * row['top1_low']:.1f} to {100 * row['top1_high']:.1f})",
            f"{row['gained']} / {row['lost']}",
            f"{mcnemar(row['gained'], row['lost']):.2g}",
            f"{row['agreement']:.1%}",
            f"{row['kl']:.2g}",
        ]
        for row in sorted(rows, key=lambda row: -row["gmacs"])
    ]
    head = ["schedule", "GMACs", f"right of {rows[0]['num_images']}", "top-1, %", "gained / lost", "p", "agree", "KL"]
    return markdown(head, body)


ABLATIONS: dict[str, Callable[[Rows], str]] = {
    "prefix": families(["tome", "s1dfe", "s2dfe", "s3dfe", "s4dfe"]),
    "switch": families(["s1dfe", "s2winc3", "s2winc5", "s2winc7", "s2winc9", "s2winc12"]),
    "all": ablation_full,
}
