"""A process that reads files for this one, with libraries that a damaged file can crash, hang or fill memory with.

`call` names a function of `_FUNCTIONS`, which runs in a process of its own. Through a socket comes one line of JSON,
then the voxels: two copies, which on Linux are faster than memory that both processes map, as that has no huge pages.
If the process dies, or takes too long or too much memory, one line says so, and the next call starts another.
"""

import atexit
import contextlib
import dataclasses
import json
import logging
import math
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from autocontext_jax.errors import UserError
from autocontext_jax.images.checks import DEFLATE, as_user_error
from autocontext_jax.images.grid import Grid
from autocontext_jax.images.stack import Stack

log = logging.getLogger(__name__)

UNREADABLE = "read: it is truncated, damaged or not what its name says; copy or export it again"

# A file may take these seconds, and one more for each of these bytes: many processes may share a slow disk.
SECONDS, BYTES_A_SECOND = 60.0, 500_000
# The process may take this memory beyond what it has at rest, and three times what the file's bytes can hold.
MEMORY = 4 << 30
_LARGEST = 1 << 36  # bytes: no file is thought to hold more
_START_SECONDS = 300.0  # to import the libraries, from a slow disk too
_START = f"from {__name__} import serve; serve()"  # what the process runs


def call(function: str, path: Path, *, held: int | None = None, **arguments: Any) -> dict[str, Any]:
    """Runs a function on a file or folder in the reading process.

    Args:
      function: of `_FUNCTIONS`.
      path: its first argument.
      held: bytes that are read, from which the limits of time and memory follow; by default those of the file, or of
        the files in the folder.
      arguments: further ones, as JSON has them.

    Returns:
      What the function returned; `voxels` is an array, `grid` a Grid. Its warnings have been logged.

    Raises:
      UserError: the function's own; or the process died, took too long or too much memory, or did not start.
    """
    try:
        folder = os.getcwd()
    except OSError:
        folder = ""
        if not path.is_absolute():
            raise UserError(f"{path} does not exist: the current folder was deleted; go to another one") from None
    held = _bytes(path) if held is None else held
    request = {
        "function": function,
        "path": str(path),
        "folder": folder,
        "seconds": SECONDS + held / BYTES_A_SECOND,
        "environment": {name: value for name, value in os.environ.items() if name.startswith("AUTOCONTEXT_")},
        "memory": MEMORY + 3 * min(held * DEFLATE, _LARGEST),
        "arguments": arguments,
    }
    with _lock:
        answer = _process().ask(request)
    for warning in answer["warnings"]:
        log.warning("%s", warning)
    if answer["mistake"] is not None:
        raise UserError(answer["mistake"])
    if answer["failure"] is not None:
        raise RuntimeError(f"the reading process failed:\n{answer['failure']}")
    return answer["result"]


class _Process:
    """One reading process, and the socket to and from it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        package = str(Path(__file__).resolve().parents[2])
        paths = [entry or package for entry in sys.path]  # "" is the current folder, which may have changed
        self.socket, theirs = socket.socketpair()
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-W", "ignore", "-c", _START],
                    stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                self.socket.close()
                raise UserError(f"the process that reads scans cannot be started ({error}): free some memory") from None
        try:
            self._line(time.monotonic() + _START_SECONDS)
        except BaseException as error:
            self.end()
            if not isinstance(error, TimeoutError | EOFError | ConnectionError):
                raise
            raise UserError(
                "the process that reads scans did not start: expected Python to import what it needs; "
                f'{sys.executable} -c "import {__name__}" says why it does not'
            ) from None

    def usable(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        path, seconds = request["path"], request["seconds"]
        stop = time.monotonic() + seconds
        try:
            self._wait_until(stop)
            self.socket.sendall(json.dumps(request).encode() + b"\n")
            line, more = self._line(stop)
            answer: dict[str, Any] = json.loads(line)
            result = answer["result"] or {}
            if "voxels" in result:
                result["voxels"] = self._voxels(more, stop, **result["voxels"])
        except TimeoutError:
            self.end()
            raise UserError(
                f"{path} is not read after {seconds:.0f} s: expected less for a file of its size; it is damaged, or "
                "its disk does not answer: copy or export it again"
            ) from None
        except (EOFError, ConnectionError):
            raise UserError(f"{path} cannot be read: {self._death()}") from None
        except BaseException:  # such as Ctrl-C: the next call must not take this one's answer for its own
            self.end()
            raise
        if "grid" in result:
            stack = result["grid"].pop("stack")
            fields: Any = {name: tuple(of) if isinstance(of, list) else of for name, of in result["grid"].items()}
            result["grid"] = Grid(**fields, stack=stack and _stack(**stack))
        return answer

    def _line(self, stop: float) -> tuple[bytes, bytes]:
        """A line of the process, and what came with it of that which follows.

        Raises:
          TimeoutError: it did not come by then.
          EOFError, ConnectionError: the process died.
        """
        parts: list[bytes] = []
        while not parts or b"\n" not in parts[-1]:
            self._wait_until(stop)
            parts.append(self.socket.recv(1 << 20))
            if not parts[-1]:
                raise EOFError
        line, _, more = b"".join(parts).partition(b"\n")
        return line, more

    def _voxels(self, begun: bytes, stop: float, *, shape: list[int], dtype: str) -> np.ndarray:
        """An array that follows a line; errors as in `_line`."""
        voxels = np.empty(shape, dtype)
        memory = memoryview(voxels.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        memory[: len(begun)] = begun
        filled = len(begun)
        while filled < len(memory):
            self._wait_until(stop)
            if not (count := self.socket.recv_into(memory[filled:])):
                raise EOFError
            filled += count
        return voxels

    def _wait_until(self, stop: float) -> None:
        self.socket.settimeout(max(0.01, stop - time.monotonic()))  # what is there already is taken in any case

    def _death(self) -> str:
        """Why the process died, and what to do."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        self.end()
        cause = -self.process.returncode
        if cause == signal.SIGKILL:
            return (
                "the process that read it was killed, as Linux does where memory runs out: free some memory, or use a "
                "machine with more"
            )
        name = signal.Signals(cause).name if cause in set(signal.Signals) else f"exit status {-cause}"
        return (
            f"the library that reads it crashed ({name}), as happens where a file is damaged: copy or export it again"
        )

    def end(self) -> None:
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
        else:  # a copy, in a forked process, of what is its parent's
            self.process.returncode = 0
        self.socket.close()


_lock = threading.Lock()
_running: list[_Process] = []


def _process() -> _Process:
    if _running and not _running[0].usable():
        _end()
    if not _running:
        _running.append(_Process())
    return _running[0]


@atexit.register
def _end() -> None:
    while _running:
        _running.pop().end()


def _forget() -> None:
    """In a forked process: the reading process is its parent's, and another thread may have held the lock."""
    global _lock
    _lock = threading.Lock()
    _end()


os.register_at_fork(after_in_child=_forget)


def _bytes(path: Path) -> int:
    """Of a file, or of the files in a folder."""
    try:
        files = path.iterdir() if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files if file.is_file())
    except OSError:
        return 0


def _stack(heights: Any, offsets: Any, size: Any, spacing: Any) -> Stack:
    return Stack(tuple(heights), tuple((i, j) for i, j in offsets), tuple(size), tuple(spacing))


# What follows runs in the reading process.


def serve() -> None:
    """Answers requests, which come through the socket that is its standard input, until that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    connection = socket.socket(fileno=os.dup(0))
    connection.setblocking(True)
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))  # what a patient's scan left in memory stays off the disk
    limits = resource.getrlimit(resource.RLIMIT_AS)
    _end_first()
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    package = logging.getLogger("autocontext_jax")
    package.addHandler(handler)
    package.propagate = False
    connection.sendall(b"\n")
    for line in connection.makefile("rb"):
        request = json.loads(line)
        warnings.clear()
        # Linux ends this process by itself if the other one is not there any more to do so.
        signal.alarm(math.ceil(request["seconds"]) + 5)
        _limit_memory(request["memory"], limits)
        for name in [name for name in os.environ if name.startswith("AUTOCONTEXT_")]:
            del os.environ[name]
        os.environ.update(request["environment"])
        answer, voxels = _answer(request, warnings)
        signal.alarm(0)  # the other process may be stopped for a while, as by Ctrl-Z
        try:
            connection.sendall(answer)
            if voxels is not None:
                connection.sendall(memoryview(voxels.reshape(-1).view(np.uint8)))  # type: ignore[arg-type]
        except ConnectionError:  # the other process does not want it any more
            return
        del voxels


def _answer(request: dict[str, Any], warnings: list[str]) -> tuple[bytes, np.ndarray | None]:
    """One line of JSON, and the voxels that follow it."""
    answer: dict[str, Any] = {"result": None, "mistake": None, "failure": None, "warnings": warnings}
    path = Path(request["path"])  # as the user gave it, for the messages
    try:
        with as_user_error(path, UNREADABLE):
            if not path.is_absolute():
                os.chdir(request["folder"])
            result = _FUNCTIONS[request["function"]](path, **request["arguments"])
        voxels = result.get("voxels")
        if voxels is not None:
            voxels = np.ascontiguousarray(voxels)
            result["voxels"] = {"shape": voxels.shape, "dtype": voxels.dtype.str}
        if "grid" in result:
            result["grid"] = dataclasses.asdict(result["grid"])
        return json.dumps(answer | {"result": result}).encode() + b"\n", voxels
    except UserError as mistake:
        answer["mistake"] = str(mistake)
    except BaseException:
        answer["failure"] = traceback.format_exc()
    finally:
        os.chdir("/")  # a disk can be taken out
    return json.dumps(answer).encode() + b"\n", None


def _limit_memory(more: int, limits: tuple[int, int]) -> None:
    """Beyond what the process has now, no more than these bytes, nor than what it was allowed when it started."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = [pages * mmap.PAGESIZE + more, *(limit for limit in limits if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(most), limits[1]))


def _end_first() -> None:
    """Where memory runs out, Linux ends this process, not the one that trains."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _itk(path: Path, *, header_only: bool, several: bool) -> dict[str, Any]:
    from autocontext_jax.images.itk import read_itk

    voxels, grid = read_itk(path, header_only=header_only, several=several)
    return {"grid": grid} | ({} if voxels is None else {"voxels": voxels})


def _dicom(path: Path, *, series: str | None, header_only: bool) -> dict[str, Any]:
    from autocontext_jax.images.dicom import read_series

    voxels, grid = read_series(path, series, header_only=header_only)
    return {"grid": grid} | ({} if voxels is None else {"voxels": voxels})


def _list_series(path: Path) -> dict[str, Any]:
    from autocontext_jax.images.dicom import list_series

    return list_series(path)


_FUNCTIONS: dict[str, Callable[..., dict[str, Any]]] = {"itk": _itk, "dicom": _dicom, "list_series": _list_series}
