"""Files that are there whole or not at all, and one line where the disk or the folder refuses them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from autocontext_jax.errors import UserError


def is_file(path: Path) -> bool:
    """Whether it is one; False for a name too long for any file, where Python raises an OSError."""
    try:
        return path.is_file()
    except OSError:
        return False


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write `path` (a full disk, a folder for reading only) into one line.

    Raises:
      UserError: the system refused.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): see that the disk has room and the folder lets you "
            "write; what was saved before is whole"
        ) from None


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, text in UTF-8; until all of it is written, what was there before stands.

    Raises:
      UserError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    with writing(path):
        try:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
