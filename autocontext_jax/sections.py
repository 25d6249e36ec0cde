"""Sections: frozen dataclasses that come from, and go to, JSON and config files.

A section validates itself in `__post_init__`, with `errors.require`. Its docstring explains each field under
"Attributes:". Fields that another field or the data set determines are marked with `DERIVED`; they are in no file.
"""

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from autocontext_jax.errors import InvalidField, UserError

DERIVED = {"derived": True}  # metadata of a field

LARGEST = 2**31 - 1


def keys(kind: type) -> dict[str, Any]:
    """The fields of a section that a file may set, with their types."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if not field.metadata.get("derived")}


def explained(kind: type) -> dict[str, str]:
    """What the docstrings of a section and of its base classes say of each field, in one line each."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, attributes = (inspect.getdoc(base) or "").partition("Attributes:\n")
        for entry in re.split(r"\n(?=  \w)", attributes):
            names, colon, text = entry.partition(": ")
            if colon:
                found |= dict.fromkeys(names.replace(",", " ").split(), " ".join(text.split()))
    return found


def as_dict(section: Any) -> dict[str, Any]:
    """A section as nested dictionaries; tuples stay tuples."""
    return {name: _plain(getattr(section, name)) for name in keys(type(section))}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return as_dict(value)
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return value


def flat_keys(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted keys, such as "loader.batch_size"."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def from_dict(kind: Any, values: Any, *, place: str, prefix: str = "") -> Any:
    """The section that nested dictionaries describe, such as a ConfigDict or JSON gives them.

    Args:
      kind: class of the section.
      values: a value for each of its keys.
      place: what the keys are of, for messages, such as "config key".
      prefix: of the keys in messages, such as "loader.".

    Raises:
      UserError: a key is unknown or missing, or its value is of a wrong type or cannot be: names the key, the value
        found and the value expected.
    """
    expected = keys(kind)
    if not isinstance(values, dict):
        raise UserError(
            f"{place} {prefix.rstrip('.')} is {_shown(values)}; expected a section with the keys {', '.join(expected)}"
        )
    if unknown := [name for name in values if name not in expected]:
        raise UserError(f"{place} {prefix}{unknown[0]} is unknown; expected one of {', '.join(expected)}")
    if missing := [name for name in expected if name not in values]:
        raise UserError(f"{place} {prefix}{missing[0]} is missing; expected a value")
    made = {name: _value(place, prefix + name, values[name], type_) for name, type_ in expected.items()}
    try:
        return kind(**made)
    except InvalidField as error:
        raise UserError(f"{place} {prefix}{error.field} is {error.found!r}; expected {error.expected}") from None


def _value(place: str, key: str, value: Any, type_: Any) -> Any:
    """A value of a key's type; a whole number stands for a float, a list for a tuple."""
    if dataclasses.is_dataclass(type_):
        return from_dict(type_, value, place=place, prefix=f"{key}.")
    if get_origin(type_) is tuple:
        items: Sequence[Any] = get_args(type_)
        if not isinstance(value, tuple | list):
            raise UserError(f"{place} {key} is {_shown(value)}; expected a tuple")
        if items[-1] is Ellipsis:
            items = [items[0]] * len(value)
        if len(items) != len(value):
            raise UserError(f"{place} {key} is {_shown(value)}; expected {len(items)} items")
        return tuple(_value(place, key, item, kind) for item, kind in zip(value, items, strict=True))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if type_ is float and number:
        if not abs(value) <= LARGEST:  # also if it is not a number
            raise UserError(f"{place} {key} is {_shown(value)}; expected a number of at most {LARGEST}")
        return float(value)
    if type_ is int and number and value == int(value if abs(value) <= LARGEST else 0):
        return int(value)
    if type_ in (bool, str, dict) and isinstance(value, type_):
        return value
    names = {
        float: "a number",
        int: f"a whole number of at most {LARGEST}",
        bool: "True or False",
        str: "a text",
        dict: "an object",
    }
    raise UserError(f"{place} {key} is {_shown(value)}; expected {names[type_]}")


def _shown(value: Any) -> str:
    """A value as messages show it; of a huge integer, whose digits Python refuses to print, its size."""
    huge = isinstance(value, int) and abs(value) > LARGEST
    return f"a number of {value.bit_length()} bits" if huge else repr(value)
