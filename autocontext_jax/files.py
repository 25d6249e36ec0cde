"""Files that are there whole or not at all, and one line where the disk or the folder refuses them."""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autocontext_jax.errors import UserError


def is_file(path: Path) -> bool:
    """Whether it is one; False for a name too long for any file, where Python raises an OSError."""
    try:
        return path.is_file()
    except OSError:
        return False


def full_path(path: str | os.PathLike) -> Path:
    """A path that a user gave, with "~" replaced by the home folder.

    Raises:
      UserError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{os.fspath(path)}: {error}; expected a path") from None


def exists(path: Path) -> bool:
    """Whether there is something at a path; False for a name too long for any file, where Python raises an OSError."""
    try:
        return path.exists()
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
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # each writer has its own
    with writing(path):
        try:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object of JSON with a checksum of itself, whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    write_whole(path, json.dumps({**content, "checksum": _checksum(content)}, indent=2) + "\n")


def read_json(path: Path, format: int) -> dict[str, Any]:
    """Reads what `write_json` wrote, without its checksum.

    Args:
      path: of the file, which must exist.
      format: the number that must stand under the key `format`.

    Raises:
      UserError: the file cannot be read, is damaged, or is of another format.
    """
    remedy = "bring the file back, or choose another --workdir"
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): {remedy}") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, thousands of brackets
        raise UserError(f"{path} is not JSON ({error}); expected what a run wrote: {remedy}") from None
    if not isinstance(content, dict) or "checksum" not in content:
        raise UserError(f"{path} has no checksum; expected what a run wrote: {remedy}")
    if content.pop("checksum") != _checksum(content):
        raise UserError(f"{path} is damaged or was edited: its checksum does not match: {remedy}")
    if content.get("format") != format:
        raise UserError(f"{path} has the format {content.get('format')!r}; expected {format}: {remedy}")
    return content


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
