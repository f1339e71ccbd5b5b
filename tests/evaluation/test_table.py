import pytest

from fcvit_jax.evaluation import published
from fcvit_jax.evaluation.runs import Run
from fcvit_jax.evaluation.table import WIDTH, columns, differs, findings, format_table


def test_table(make_rows):
    lines = format_table(make_rows()).splitlines()
    head = ("schedule", "top-1 %", "95 % interval", "change", "agree %", "images", "GMACs", "images/s", "speed-up")
    assert lines[0].split() == " ".join(head).split()
    assert lines[2].split() == ["dense", "90.00", "88.00-91.70", "+0.00", "100.0", "1,000", "4.60", "100", "1.00x"]
    assert lines[4].split() == ["tome_r13", "85.00", "82.70-87.10", "-5.00*", "95.0", "1,000", "2.70", "170", "1.70x"]
    assert lines[6:9] == ["", "C on D; pixels: P", "float32, batch 8, 1 x X"]
    assert "* more than chance: McNemar's test on the same images, p < 0.05, each row by itself." in lines
    # Digits are aligned, with the mark and without.
    assert len({line.index(".", line.index("-", 20) + 9) for line in lines[3:6]}) == 1


def test_the_mark_needs_a_test_and_is_explained_only_if_it_is_used(make_rows):
    assert [differs(row) for row in make_rows()] == [False, False, True, False]
    assert not any(differs(row) for row in make_rows(mcnemar_p=None))
    assert "*" not in format_table(make_rows(mcnemar_p=0.05))


def test_a_field_that_no_row_has_is_left_out(make_rows):
    absent = ("top1_low", "top1_high", "mcnemar_p", "agreement", "kl", "images_per_second", "speedup")
    untimed = [{key: value for key, value in row.items() if key not in absent} for row in make_rows()[1:]]
    lines = format_table(untimed).splitlines()
    assert lines[0].split() == ["schedule", "top-1", "%", "images", "GMACs"]
    assert lines[2].split() == ["tome_r8", "88.00", "1,000", "3.40"]
    assert "images/s" not in "".join(lines)


def test_a_missing_value_is_a_dash(make_rows):
    rows = make_rows()
    rows[1] |= {"images_per_second": None, "speedup": None}
    assert format_table(rows).splitlines()[3].split()[-3:] == ["3.40", "-", "-"]


def test_a_sweep_stays_within_the_width(make_rows):
    dense, one, *_ = make_rows(num_images=50_000)
    explicit = "dense:2,local:5:r16:w2x2,global:5:r16"
    sweep = [{**one, "schedule": f"s2winc7_r{r}", "gmacs": 61.55, "images_per_second": 12345.6} for r in range(30)]
    merged = [{**one, "schedule": f"tome_r{r}"} for r in range(30)]
    lines = format_table([dense, *merged, *sweep, {**one, "schedule": explicit}]).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[2].startswith("dense")
    groups = [index for index, line in enumerate(lines) if not line]  # one ahead of each family, one of the remarks
    assert [lines[index + 1].split()[0] for index in groups[:3]] == ["tome_r0", "s2winc7_r0", explicit]
    assert lines[lines.index(explicit) + 1].split()[0] == "88.00"


NEAR = "Within a point of dense on these images"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, f"{NEAR}: s2winc7_r16 has the fewest GMACs (1.74x fewer), it is the fastest (1.60x)."),
        ({"speedup": None}, f"{NEAR}: s2winc7_r16 has the fewest GMACs (1.74x fewer)."),
        ({"images_excluded": 3}, "3 images are left out of all counts."),
        ({"images_skipped": 2}, "warning: 2 images were skipped, which could not be read: no count has them."),
        ({"images_per_second_spread": 0.4}, "timed blocks differed by up to 40%"),
        (
            {"reference_top1": 0.91, "reference_sigmas": -1.23},
            "dense has 90.00 %, published is 91.00 %, 1.2 standard errors apart.",
        ),
        (
            {"reference_top1": 0.91, "reference_sigmas": -3.01},
            "warning: dense has 90.00 %, published is 91.00 %, 3.0 standard errors apart (pixels: P).",
        ),
        ({"reference_top1": 0.91}, "dense has 90.00 %, published is 91.00 %."),
    ],
)
def test_findings(make_run, changes, expected):
    assert sum(expected in told for told in findings(make_run(**changes))) == 1


def test_a_whole_point_below_dense_is_within_a_point(make_run):
    run = make_run()
    for row in run.rows:
        row["top1"] = 0.84 if row["schedule"] == "dense" else 0.83  # apart by 1.0000000000000009 points
    assert any(told.startswith(NEAR) for told in findings(run))


def test_rules_are_groups_of_their_own(make_rows):
    dense, one, *_ = make_rows()
    merged = [{**one, "schedule": f"tome_r{r}{rule}"} for rule in ("", "@nearest") for r in range(6)]
    lines = format_table([dense, *merged]).splitlines()
    assert lines[lines.index("") + 1].startswith("tome_r0 ")
    assert lines[lines.index("", lines.index("") + 1) + 1].startswith("tome_r0@nearest ")


def test_no_schedule_within_a_point(make_run):
    run = make_run()
    assert findings(Run("r", run.rows[:3])) == []
    assert findings(Run("r", run.rows[1:])) == []


def test_columns_of_several_runs_are_the_same(make_run):
    timed, untimed = make_run("a"), make_run("b", images_per_second=None, speedup=None, kl=None)
    titles = [[column.title for column in columns(run, [timed, untimed])] for run in (timed, untimed)]
    assert titles[0] == titles[1]
    alone = Run("c", untimed.rows[1:])  # without dense, so that there are no changes
    assert "change" not in [column.title for column in columns(alone)]
    assert [column.title for column in columns(alone, [timed, alone])] == titles[0]
    assert {"KL", "images/s"} <= set(titles[0])
    assert "KL" not in [column.title for column in columns(untimed)]
    values = {column.title: column.value(timed.rows[2]) for column in columns(timed)}
    assert values["top-1 %"] == pytest.approx(85)
    assert values["change"] == pytest.approx(-5)
    assert values["tokens"] == 41


def costs(*rows, model):
    keys = ("schedule", "gmacs", "tokens_out")
    common = {"checkpoint": "C", "model": model}
    return [{**dict(zip(keys, row, strict=True)), **published.fields(model, row[0]), **common} for row in rows]


def test_costs_are_shown_beside_the_published_ones():
    rows = costs(("dense", 4.6, 197), ("s2dfe_r18", 2.78, 18), ("s2dfe_r17", 2.876, 27), model="vit_small_patch16_224")
    lines = format_table(rows).splitlines()
    assert lines[2].split() == ["dense", "197", "4.60", "1.00x", "-", "81.41"]
    assert lines[3].split() == ["s2dfe_r18", "18", "2.78", "1.65x", "2.79", "79.73"]
    assert lines[4].split() == ["s2dfe_r17", "27", "2.88", "1.60x", "-", "-"]
    assert any(line.startswith("published:") for line in lines)


def test_measured_accuracies_are_shown_beside_the_published_ones(make_rows, make_run):
    rows = [row | published.fields("vit_small_patch16_224", row["schedule"]) for row in make_rows()]
    lines = format_table(rows).splitlines()
    assert lines[0].split()[-4:] == ["GMACs", "published", "images/s", "speed-up"]
    assert [line.split()[-3] for line in lines[2:6]] == ["81.41", "80.73", "79.32", "80.53"]
    assert max(map(len, lines)) <= WIDTH
    assert any(line.startswith("published:") for line in lines)
    assert "published" not in format_table(make_rows())
    titles = [column.title for column in columns(Run("r", tuple(rows)))]
    assert titles[titles.index("GMACs") :][:4] == ["GMACs", "saved", "GMACs, published", "published"]
    assert "published" not in [column.title for column in columns(make_run())]


def test_costs_of_a_model_that_nobody_published():
    lines = format_table(costs(("tome_r8", 0.0123, 9), model=None)).splitlines()
    assert lines[0].split() == ["schedule", "tokens", "GMACs"]
    assert lines[2].split() == ["tome_r8", "9", "0.0123"]
    assert not any(line.startswith("published:") for line in lines)
