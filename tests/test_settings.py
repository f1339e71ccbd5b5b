"""The validator: what each annotation takes, what it becomes, and the message for everything else."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fcvit_jax.errors import InputError
from fcvit_jax.settings import check_settings, setting


@dataclass(frozen=True)
class Inner:
    depth: int = 1


@dataclass(frozen=True)
class Example:
    count: int = setting(3, low=1, help="how many")
    share: float = setting(0.5, low=0, below=1)
    rate: float = setting(0.1, above=0)
    flip: float = setting(0.5, low=0, high=1, hint="a probability")
    decay: float | None = setting(None, above=0, high=1)
    mode: str = setting("fast", choices=("fast", "slow"))
    name: str = ""
    verbose: bool = False
    size: tuple[int, int] = setting((2, 2), low=1)
    radii: tuple[float, ...] = setting((0.1, 1.0), above=0, rising=True)
    inner: Inner | None = None
    anything: Any = None

    def __post_init__(self):
        check_settings(self, "example.")


def test_defaults_pass_and_metadata_stays():
    example = Example()
    assert example == Example(**{field.name: getattr(example, field.name) for field in dataclasses.fields(example)})
    assert dataclasses.fields(Example)[0].metadata["help"] == "how many"


@pytest.mark.parametrize(
    ("field", "given", "kept"),
    [
        ("count", np.int64(5), 5),
        ("share", 0, 0.0),
        ("share", np.float32(0.25), 0.25),
        ("decay", None, None),
        ("decay", 1, 1.0),
        ("size", [3, 4], (3, 4)),
        ("radii", [1, 2, 3], (1.0, 2.0, 3.0)),
        ("radii", (5,), (5.0,)),
        ("inner", Inner(2), Inner(2)),
        ("anything", {"x": 1}, {"x": 1}),
    ],
)
def test_values_are_converted_to_the_annotated_type(field, given, kept):
    found = getattr(Example(**{field: given}), field)
    assert found == kept
    assert type(found) is type(kept)
    if isinstance(kept, tuple):
        assert [type(part) for part in found] == [type(part) for part in kept]


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("count", 0, "it must be a whole number, 1 or more"),
        ("count", 2.0, "it must be a whole number, 1 or more"),
        ("count", True, "it must be a whole number, 1 or more"),
        ("count", "3", "it must be a whole number, 1 or more"),
        ("count", None, "it must be a whole number, 1 or more"),
        ("share", 1, "it must be a number, 0 or more and below 1"),
        ("share", -0.1, "it must be a number, 0 or more and below 1"),
        ("share", False, "it must be a number, 0 or more and below 1"),
        ("rate", 0, "it must be a number, above 0"),
        ("rate", math.nan, "it must be a number, above 0"),
        ("rate", math.inf, "it must be a number, above 0"),
        ("flip", 50, "it must be a number from 0 to 1 (a probability)"),
        ("decay", 2, "it must be a number, above 0 and 1 or less, or none"),
        ("decay", "many", "it must be a number, above 0 and 1 or less, or none"),
        ("mode", "medium", "choose one of fast, slow"),
        ("mode", None, "choose one of fast, slow"),
        ("name", 3, "it must be text"),
        ("verbose", 1, "it must be true or false"),
        ("size", (2, 0), "it must be 2 whole numbers, 1 or more"),
        ("size", (2, 2, 2), "it must be 2 whole numbers, 1 or more"),
        ("size", 2, "it must be 2 whole numbers, 1 or more"),
        ("radii", (), "it must be numbers, above 0, in rising order"),
        ("radii", (1.0, 0.1), "it must be numbers, above 0, in rising order"),
        ("radii", (1.0, 1.0), "it must be numbers, above 0, in rising order"),
        ("radii", (0.0, 1.0), "it must be numbers, above 0, in rising order"),
        ("inner", {"depth": 2}, "it must be Inner, or none"),
    ],
)
def test_errors_name_the_value_and_what_would_fit(field, value, wanted):
    with pytest.raises(InputError, match=f"^{re.escape(f'example.{field} is {value!r}: {wanted}')}$"):
        Example(**{field: value})


def test_the_first_wrong_field_is_named():
    with pytest.raises(InputError, match=r"example\.count is 0"):
        Example(mode="?", count=0)


def test_none_may_be_typed_where_it_is_allowed():
    found = Example(decay="none", inner="None", name="none")  # pyright: ignore[reportArgumentType]
    assert (found.decay, found.inner, found.name) == (None, None, "none")
    for field in ("rate", "count"):
        with pytest.raises(InputError, match=f"example.{field} is 'none': it must be"):
            Example(**{field: "none"})  # pyright: ignore[reportArgumentType]
