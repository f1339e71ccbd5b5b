import pytest

from fcvit_jax.evaluation.families import family, point_label, rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("dense", ("dense", None)),
        ("tome_r13", ("tome", 13)),
        ("s2winc7_r16", ("s2winc7", 16)),
        ("dense:2,local:5:r16:w2x2,global:5:r16", ("dense:2,local:5:r:w2x2,global:5:r", 16)),
        ("local:7:r8:w2x2,global:5:r16", ("local:7:r:w2x2,global:5:r", None)),
        # Each rule is its own family; digits in names and options are not a rate.
        ("tome_r16@nearest", ("tome@nearest", 16)),
        ("s2winc7_r16@evit(fuse=true)", ("s2winc7@evit(fuse=true)", 16)),
        ("tome_r16@pitome(margin=0.9,r3=_r2)", ("tome@pitome(margin=0.9,r3=_r2)", 16)),
        ("tome_r4@mine_r2", ("tome@mine_r2", 4)),
        (
            "dense:2,local:5:r16:w2x2@nearest,global:5:r16@nearest",
            ("dense:2,local:5:r:w2x2@nearest,global:5:r@nearest", 16),
        ),
        (
            "global:6:r12@Mine(a=(1, 2), b=:r9),global:6:r12",
            ("global:6:r@Mine(a=(1, 2), b=:r9),global:6:r", 12),
        ),
        ("global:6:r12@nearest,global:6:r8", ("global:6:r@nearest,global:6:r", None)),
        ("diffrate_s_g2.9", ("diffrate_s", None)),
        ("tome_r16@diffrate(prune=0.4)", ("tome@diffrate(prune=0.4)", 16)),
        ("my own", ("my own", None)),
        # The schedules of a search at several budgets are a family; digits in its directory are not a rate.
        ("search:found_r16:0.6", ("search:found_r16", None)),
        ("search:/a:b/c@x_r2:2.8G", ("search:/a:b/c@x_r2", None)),
        ("search:found_r16", ("search:found_r16", None)),
        ("recommended:900/s", ("recommended", None)),
        ("recommended", ("recommended", None)),
    ],
)
def test_family_and_rate(schedule, expected):
    assert (family(schedule), rate(schedule)) == expected


def test_a_point_is_labelled_by_its_rate_or_its_budget():
    names = ("tome_r13", "search:found_r2:0.6", "recommended:1.7x", "search:found_r2", "recommended", "dense")
    assert list(map(point_label, names)) == ["r=13", "0.6", "1.7x", None, None, None]
