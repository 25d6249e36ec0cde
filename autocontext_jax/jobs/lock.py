"""A run folder is written by one process at a time."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from autocontext_jax import processes
from autocontext_jax.errors import UserError
from autocontext_jax.files import writing

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked_by_first(workdir: Path, what: str = "run", *, wait: bool = False) -> Iterator[None]:
    """`locked` by the first of several processes of one run, which agree on whether they may go on."""
    with contextlib.ExitStack() as held:
        processes.first_does(lambda: held.enter_context(locked(workdir, what, wait=wait)))
        yield


def is_locked(workdir: Path, what: str = "run") -> bool:
    """Whether a lock of `locked` is held, by another process or by this one."""
    try:
        with (workdir / f".{what}.lock").open(encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or the file system knows no locks
        pass
    return False


@contextlib.contextmanager
def locked(workdir: Path, what: str = "run", *, wait: bool = False) -> Iterator[None]:
    """Holds a lock meanwhile; the system releases it however the process ends.

    Args:
      workdir: the run folder.
      what: is written there: the `run`, by training; an `evaluation`, which may be made beside it; or the `folds` of a
        cross-validation, what they share.
      wait: whether to wait for another process that holds the lock, instead of refusing.

    Raises:
      UserError: another process holds the lock, unless it is waited for; or the run folder cannot be written.
    """
    path = workdir / f".{what}.lock"
    try:
        lock = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{workdir} cannot be written ({error.strerror}): choose another folder or change its permissions"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = f"{workdir} is in use by process {lock.read().strip() or '(unknown)'}"
            if not wait:
                raise UserError(f"{holder}: wait for it, stop it or choose another folder") from None
            log.info("%s: waiting for it", holder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # some network file systems know no locks
            pass
        with writing(path):
            lock.truncate(0)
            os.write(lock.fileno(), f"{os.getpid()}\n".encode())  # not into a buffer, which closing would write again
        yield
