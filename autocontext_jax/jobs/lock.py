"""A run folder is written by one process at a time."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from autocontext_jax.errors import UserError
from autocontext_jax.files import writing


@contextlib.contextmanager
def locked(workdir: Path, what: str = "run") -> Iterator[None]:
    """Holds a lock meanwhile; the system releases it however the process ends.

    Args:
      workdir: the run folder.
      what: is written there: the `run`, by training, or an `evaluation`, which may be made beside it.

    Raises:
      UserError: another process holds the lock, or the run folder cannot be written.
    """
    path = workdir / f".{what}.lock"
    try:
        lock = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--workdir {workdir} cannot be written ({error.strerror}): choose another folder or change its permissions"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"--workdir {workdir} is in use by process {lock.read().strip() or '(unknown)'}: wait for it, stop it "
                "or choose another folder"
            ) from None
        except OSError:  # some network file systems know no locks
            pass
        with writing(path):
            lock.truncate(0)
            os.write(lock.fileno(), f"{os.getpid()}\n".encode())  # not into a buffer, which closing would write again
        yield
