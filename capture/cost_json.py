"""Values read from a file of measured costs, checked one by one."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

_Number = TypeVar("_Number", int, float)


def entry(data: Any, key: str, kind: type | tuple[type, ...], where: str = "") -> Any:
    """`data[key]`, which has to be of `kind`; ValueError names `where` and `key` if not."""
    if not isinstance(data, Mapping) or key not in data:
        raise refused(f"{where}{key}", "missing", "given")
    if not isinstance(data[key], kind):
        raise refused(f"{where}{key}", data[key], f"a {getattr(kind, '__name__', 'number')}")
    return data[key]


def number(
    data: Any, key: str | int, kind: type[_Number], where: str = "", least: int = 0
) -> _Number:
    """`data[key]` (in a list: its place), which has to be finite and at least `least`."""
    if isinstance(key, int):
        name, value = f"{where}[{key}]", data[key]
    else:
        name, value = f"{where}{key}", entry(data, key, object, where)
    allowed = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not math.isfinite(value):
        raise refused(name, value, "a whole number" if kind is int else "a finite number")
    if value < least:
        raise refused(name, value, f"at least {least}")
    return kind(value)


def refused(key: str, value: object, expected: str) -> ValueError:
    """The error of a file whose `key` holds `value`."""
    return ValueError(
        f"measured costs: {key} is {value!r}, not {expected}; delete the file and calibrate again"
    )
