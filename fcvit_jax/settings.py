"""The validator of all configuration dataclasses: types come from annotations, bounds and choices from the field."""

import argparse
import contextlib
import dataclasses
import difflib
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fcvit_jax.errors import InputError

_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "low": (operator.ge, "{} or more"),
    "above": (operator.gt, "above {}"),
    "high": (operator.le, "{} or less"),
    "below": (operator.lt, "below {}"),
}
_NOUNS = {int: "whole number", float: "number"}


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str = "",
    choices: Sequence[str] = (),
    rising: bool = False,
    hint: str = "",
    **bounds: float,
) -> Any:
    """Declare a dataclass field that `check_settings` limits.

    bounds: any of low (>=), above (>), high (<=), below (<); for a tuple they hold for every element. rising: the
    elements of a tuple must increase. help: one line for a command line. hint: ends the message of an error.
    """
    limits = {"help": help, "choices": tuple(choices), "rising": rising, "hint": hint, "bounds": bounds}
    return dataclasses.field(default=default, metadata=limits)


def add_options(parser: Any, config: type) -> None:
    """Add an option for each field of a configuration to an argparse parser or group: its help, type and default.

    Numbers of a tuple are separated by commas; a field whose default is None takes a whole number.
    """
    for field in dataclasses.fields(config):
        default = field.default
        kind: Any = _numbers if isinstance(default, tuple) else int if default is None else type(default)
        shown = ",".join(f"{x:g}" for x in default) if isinstance(default, tuple) else default
        metavar = "X" if kind in (_numbers, float) else "N" if kind is int else "NAME"
        text = field.metadata["help"] + ("" if default is None else f" (default: {shown})")
        parser.add_argument(f"--{field.name}", type=kind, default=default, metavar=metavar, help=text)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.05,0.2") from None


def check_settings(config: Any, where: str = "") -> None:
    """Check every field of a frozen dataclass, in its `__post_init__`.

    Lists become tuples and whole numbers floats if the annotation requires it. where: put before the field's name, such
    as "sam.". Raises InputError that names the first field of a wrong type or out of bounds.
    """
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        kind, value, limits = kinds[field.name], getattr(config, field.name), field.metadata
        try:
            object.__setattr__(config, field.name, _fit(value, kind, limits))
        except (TypeError, ValueError):
            wanted = _wanted(kind, limits.get("bounds", {})) + ", in rising order" * limits.get("rising", False)
            fix = f"choose one of {', '.join(limits['choices'])}" if limits.get("choices") else f"it must be {wanted}"
            hint = f" ({limits['hint']})" if limits.get("hint") else ""
            raise InputError(f"{where}{field.name} is {value!r}: {fix}{hint}") from None


def from_fields(cls: Any, fields: Mapping[str, Any], where: str = "") -> Any:
    """Build a configuration dataclass from a mapping; nested mappings become nested dataclasses.

    where: put before a field's name, such as "sam.". Raises InputError that names an unknown or missing field.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for name, value in fields.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(known)}"
            raise InputError(f"{where}{name}: there is no such field; {hint}")
        nested = nested_class(known[name])
        is_nested = nested is not None and isinstance(value, Mapping)
        values[name] = from_fields(nested, value, f"{where}{name}.") if is_nested else value
    for name, field in known.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}{name} is missing")
    return cls(**values)


def nested_class(field: dataclasses.Field) -> Any:
    """Return the dataclass that a field holds, even an optional one; None for other fields."""
    return next((kind for kind in (field.type, *typing.get_args(field.type)) if dataclasses.is_dataclass(kind)), None)


def _fit(value: Any, kind: Any, limits: Mapping[str, Any]) -> Any:
    """Convert a value to its annotated type. Raises TypeError or ValueError if it does not fit."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if type(None) in inner and isinstance(value, str) and value.lower() == "none":
            return None
        for each in inner:
            with contextlib.suppress(TypeError, ValueError):
                return _fit(value, each, limits)
        raise TypeError
    if origin is tuple:
        if not isinstance(value, list | tuple) or not value:
            raise TypeError
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        fitted = tuple(_fit(part, each, limits) for part, each in zip(value, kinds, strict=True))
        if limits.get("rising") and list(fitted) != sorted(set(fitted)):
            raise ValueError
        return fitted
    if kind is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        value = int(value)
    elif kind is float and isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
        value = float(value)
    elif kind in (int, float) or not (kind is Any or isinstance(value, origin or kind)):
        raise TypeError
    if value is not None:
        inside = all(_BOUNDS[name][0](value, bound) for name, bound in limits.get("bounds", {}).items())
        if not inside or (limits.get("choices") and value not in limits["choices"]):
            raise ValueError
    return value


def _wanted(kind: Any, bounds: dict[str, float]) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    limits = [_BOUNDS[name][1].format(f"{bound:g}") for name, bound in bounds.items()]
    limited = ", " + " and ".join(limits) if limits else ""
    if bounds.keys() == {"low", "high"}:
        limited = f" from {bounds['low']:g} to {bounds['high']:g}"
    if origin in (types.UnionType, typing.Union):
        several = " or ".join(_wanted(each, bounds) for each in inner if each is not type(None))
        return f"{several}, or none" if type(None) in inner else several
    if origin is tuple:
        count = "" if inner[-1] is Ellipsis else f"{len(inner)} "
        return f"{count}{_NOUNS.get(inner[0], inner[0].__name__)}s{limited}"
    if kind in _NOUNS:
        return f"a {_NOUNS[kind]}{limited}"
    return {bool: "true or false", str: "text"}.get(kind) or getattr(kind, "__name__", str(kind))
