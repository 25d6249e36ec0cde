"""The user's mistakes, told in one line; every other exception is a bug and keeps its traceback."""

from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """A mistake in the data, the configuration or the command line.

    Its message is one line: what is wrong, where, the value found, the value expected, what to do. `main.py` prints
    that line on standard error and ends with status 2.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """A text on one line: what it quotes may come from a broken file, and a name may hold a line end."""
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return line if len(line) <= 4000 else f"{line[:4000]} …"


def some(names: Iterable[str], *, separator: str = ", ", most: int = 5) -> str:
    """The first names, and how many more there are, on one line."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return one_line(separator.join(names[:most]) + more)


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun: "1 case", "2 cases"."""
    return f"{number} {one if number == 1 else many or one + 's'}"


class InvalidField(ValueError):
    """A field of a section of the configuration has a value that it cannot have.

    Attributes:
      field: its name within the section.
      expected: what it should have been.
    """

    def __init__(self, section: Any, field: str, expected: str):
        self.field, self.found, self.expected = field, getattr(section, field), expected
        super().__init__(f"{type(section).__name__}.{field} is {self.found!r}; expected {expected}")


def require(holds: bool, section: Any, field: str, expected: str) -> None:
    """Raises `InvalidField` unless the condition on a section's field holds."""
    if not holds:
        raise InvalidField(section, field, expected)
