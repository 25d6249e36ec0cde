"""A process that reads files for this one, with libraries that a damaged file can crash, hang or fill memory with.

`call` names a function of `_FUNCTIONS`, which runs in a process of its own. Voxels come back in memory that both
processes can map, everything else as one line of JSON. If the process dies, or takes too long or too much memory, one
line says so, and the next call starts another.
"""

import array
import atexit
import contextlib
import dataclasses
import errno
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autocontext_jax.errors import UserError
from autocontext_jax.images.checks import DEFLATE, one_line
from autocontext_jax.images.grid import Grid
from autocontext_jax.images.stack import Stack

log = logging.getLogger(__name__)

UNREADABLE = "read: it is truncated, damaged or not what its name says; copy or export it again"

# A file may take these seconds, and one more for each of these bytes.
SECONDS, BYTES_A_SECOND = 60.0, 2_000_000
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
        ready = b""
        try:
            with contextlib.suppress(TimeoutError):
                ready, _ = self._line(time.monotonic() + _START_SECONDS)
        finally:
            if not ready.endswith(b"\n"):
                self.end()
        if not ready.endswith(b"\n"):
            raise UserError(
                "the process that reads scans did not start: expected Python to import what it needs; "
                f'{sys.executable} -c "import {__name__}" says why it does not'
            )

    def usable(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        path, seconds = request["path"], request["seconds"]
        stop = time.monotonic() + seconds
        try:
            line, files = self._exchange(json.dumps(request).encode() + b"\n", stop)
        except TimeoutError:
            self.end()
            raise UserError(
                f"{path} is not read after {seconds:.0f} s: expected less for a file of its size; it is damaged, or "
                "its disk does not answer: copy or export it again"
            ) from None
        except BaseException:  # such as Ctrl-C: the next call must not take this one's answer for its own
            self.end()
            raise
        try:
            if not line.endswith(b"\n"):
                raise UserError(f"{path} cannot be read: {self._death()}")
            answer: dict[str, Any] = json.loads(line)
            result = answer["result"] or {}
            if "voxels" in result:
                result["voxels"] = _mapped(files[0], **result["voxels"])
        finally:
            for file in files:
                os.close(file)
        if "grid" in result:
            stack = result["grid"].pop("stack")
            fields: Any = {name: tuple(of) if isinstance(of, list) else of for name, of in result["grid"].items()}
            result["grid"] = Grid(**fields, stack=stack and _stack(**stack))
        return answer

    def _exchange(self, request: bytes, stop: float) -> tuple[bytes, list[int]]:
        try:
            self.socket.settimeout(max(0.01, stop - time.monotonic()))
            self.socket.sendall(request)
        except (BrokenPipeError, ConnectionResetError):
            return b"", []
        return self._line(stop)

    def _line(self, stop: float) -> tuple[bytes, list[int]]:
        """A line of the process, without its end if the process died; and the files that came with it.

        Raises:
          TimeoutError: it did not come by then.
        """
        line, files = b"", array.array("i")
        room = socket.CMSG_SPACE(files.itemsize)
        try:
            while not line.endswith(b"\n"):
                self.socket.settimeout(max(0.01, stop - time.monotonic()))
                try:
                    more, ancillary, _, _ = self.socket.recvmsg(1 << 20, room, socket.MSG_CMSG_CLOEXEC)
                except ConnectionResetError:
                    break
                for _, _, content in ancillary:
                    files.frombytes(content)
                if not more:
                    break
                line += more
        except BaseException:
            for file in files:
                os.close(file)
            raise
        return line, files.tolist()

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


def _mapped(file: int, *, shape: list[int], dtype: str) -> np.ndarray:
    """Memory of the other process: what is written to it stays this process's own."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    mapped = mmap.mmap(file, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return np.frombuffer(mapped, dtype).reshape(shape)


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
    memory = _Memory()
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
        answer = _answer(request, warnings, memory)
        signal.alarm(0)
        if memory.file is None:
            connection.sendall(answer)
        else:
            sent = socket.send_fds(connection, [answer], [memory.file])
            connection.sendall(answer[sent:])
        memory.free()


def _answer(request: dict[str, Any], warnings: list[str], memory: "_Memory") -> bytes:
    """One line of JSON."""
    answer: dict[str, Any] = {"result": None, "mistake": None, "failure": None, "warnings": warnings}
    path = Path(request["path"])  # as the user gave it, for the messages
    try:
        with one_line(path, UNREADABLE):
            if not path.is_absolute():
                os.chdir(request["folder"])
            result = _FUNCTIONS[request["function"]](path, memory, **request["arguments"])
        if "voxels" in result:
            result["voxels"] = memory.hold(result["voxels"])
        if "grid" in result:
            result["grid"] = dataclasses.asdict(result["grid"])
        return json.dumps(answer | {"result": result}).encode() + b"\n"
    except UserError as mistake:
        answer["mistake"] = str(mistake)
    except MemoryError:
        answer["mistake"] = f"{path} needs more memory than there is: it is damaged, or too large for this machine"
    except BaseException:
        answer["failure"] = traceback.format_exc()
    finally:
        os.chdir("/")  # a disk can be taken out
    memory.free()
    return json.dumps(answer).encode() + b"\n"


class _Memory:
    """An array in memory that the other process can map.

    Attributes:
      file: its descriptor; None if there is no array.
    """

    def __init__(self) -> None:
        self.file: int | None = None
        self._array: np.ndarray | None = None

    def allocate(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """An array of zeros; an earlier one is not sent any more."""
        self.free()
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        self.file = os.memfd_create("voxels")
        try:
            os.ftruncate(self.file, size)
            mapped = mmap.mmap(self.file, size)
        except OSError as error:
            raise MemoryError if error.errno == errno.ENOMEM else error from None
        self._array = np.frombuffer(mapped, dtype).reshape(shape)
        return self._array

    def hold(self, voxels: np.ndarray) -> dict[str, Any]:
        """How the other process is to see an array, which is copied there unless it is the one that lies there."""
        if voxels is not self._array:
            np.copyto(self.allocate(voxels.shape, voxels.dtype), voxels)
        return {"shape": list(voxels.shape), "dtype": voxels.dtype.str}

    def free(self) -> None:
        """Closes it here; the other process keeps what it has mapped."""
        self._array = None
        if self.file is not None:
            os.close(self.file)
            self.file = None


def _limit_memory(more: int, limits: tuple[int, int]) -> None:
    """Beyond what the process has now, no more than these bytes, nor than what it was allowed when it started."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = [pages * mmap.PAGESIZE + more, *(limit for limit in limits if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(most), limits[1]))


def _end_first() -> None:
    """Where memory runs out, Linux ends this process, not the one that trains."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _itk(path: Path, memory: _Memory, *, header_only: bool) -> dict[str, Any]:
    from autocontext_jax.images.itk import read_itk

    voxels, grid = read_itk(path, header_only=header_only, allocate=memory.allocate)
    return {"grid": grid} | ({} if voxels is None else {"voxels": voxels})


def _dicom(path: Path, memory: _Memory, *, series: str | None, header_only: bool) -> dict[str, Any]:
    from autocontext_jax.images.dicom import read_series

    voxels, grid = read_series(path, series, header_only=header_only)
    return {"grid": grid} | ({} if voxels is None else {"voxels": voxels})


def _list_series(path: Path, memory: _Memory) -> dict[str, Any]:
    from autocontext_jax.images.dicom import list_series

    return list_series(path)


_FUNCTIONS: dict[str, Callable[..., dict[str, Any]]] = {"itk": _itk, "dicom": _dicom, "list_series": _list_series}
