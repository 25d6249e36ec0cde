"""A process that reads files on behalf of this one, for libraries that a damaged file can crash, hang or fill memory "
"with.

`call` names a function of `_FUNCTIONS`, which runs in a process of its own. Voxels come back in memory that both
processes see, everything else as one line of JSON. If the process dies, takes too long or too much memory, one line
says so, and the next call starts another.
"""

import atexit
import contextlib
import dataclasses
import json
import logging
import mmap
import os
import resource
import selectors
import signal
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
from autocontext_jax.images.checks import DEFLATE, one_line
from autocontext_jax.images.grid import Grid
from autocontext_jax.images.stack import Stack

log = logging.getLogger(__name__)

UNREADABLE = "read: it is truncated, damaged or not what its name says; copy or export it again"

# A file may take these seconds, and one more for each of these bytes.
SECONDS, BYTES_A_SECOND = 60, 2_000_000
# The process may take this memory beyond what it has at rest, and what the file's bytes can hold.
_MEMORY = 4 << 30


def call(function: str, path: Path, **arguments: Any) -> dict[str, Any]:
    """Runs a function on a file or folder in the reading process.

    Args:
      function: of `_FUNCTIONS`.
      path: its first argument.
      arguments: further ones, as JSON has them.

    Returns:
      What the function returned; `voxels` is an array, `grid` a Grid. Its warnings have been logged.

    Raises:
      UserError: the function's own; or the process died, or took too long.
    """
    with _lock:
        answer = _process().ask(function, path, arguments)
    for warning in answer["warnings"]:
        log.warning("%s", warning)
    if answer["mistake"] is not None:
        raise UserError(answer["mistake"])
    if answer["failure"] is not None:
        raise RuntimeError(f"the reading process failed:\n{answer['failure']}")
    return answer["result"]


class _Process:
    """One reading process, and the pipes to and from it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
            start_new_session=True,
        )  # fmt: skip

    def usable(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def ask(self, function: str, path: Path, arguments: dict[str, Any]) -> dict[str, Any]:
        held = _bytes(path)
        stop = time.monotonic() + SECONDS + held / BYTES_A_SECOND
        request = {"function": function, "path": str(path), "folder": os.getcwd(), "held": held}
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request | {"arguments": arguments}).encode() + b"\n")
            self.process.stdin.flush()
            line = self._line(stop)
        except OSError:
            line = b""
        if line is None:
            self.end()
            raise UserError(
                f"{path} is not read after {SECONDS + held / BYTES_A_SECOND:.0f} s: it is damaged, or on a disk that "
                "does not answer; copy or export it again"
            )
        if not line.endswith(b"\n"):
            self.end()
            raise UserError(
                f"{path} cannot be read: the library that reads it crashed or ran out of memory: it is damaged: "
                "copy or export it again"
            )
        answer: dict[str, Any] = json.loads(line)
        result = answer["result"] or {}
        if "voxels" in result:
            result["voxels"] = self._shared(**result["voxels"])
        if "grid" in result:
            stack = result["grid"].pop("stack")
            fields: Any = {name: tuple(of) if isinstance(of, list) else of for name, of in result["grid"].items()}
            result["grid"] = Grid(**fields, stack=stack and _stack(**stack))
        return answer

    def _line(self, stop: float) -> bytes | None:
        """One line of the process; without its end if the process died; None after the time."""
        assert self.process.stdout is not None
        line, file = b"", self.process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(file, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, stop - time.monotonic())):
                    return None
                if not (more := os.read(file, 1 << 20)):
                    return line
                line += more
        return line

    def _shared(self, *, file: int, shape: list[int], dtype: str) -> np.ndarray:
        """Memory of the process, mapped: what is written to it stays this process's own."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        with open(f"/proc/{self.process.pid}/fd/{file}", "rb") as memory:
            mapped = mmap.mmap(memory.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return np.frombuffer(mapped, dtype).reshape(shape)

    def end(self) -> None:
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not yet sent
                    pipe.close()


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
    """Answers requests until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print
    _end_first()
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    package = logging.getLogger("autocontext_jax")
    package.addHandler(handler)
    package.propagate = False
    for line in sys.stdin.buffer:
        _free()
        request = json.loads(line)
        warnings.clear()
        answer: dict[str, Any] = {"result": None, "mistake": None, "failure": None, "warnings": warnings}
        path = Path(request["path"])  # as the user gave it, for the messages
        _limit_memory(request["held"])
        try:
            os.chdir(request["folder"])
            with one_line(path, UNREADABLE):
                result = _FUNCTIONS[request["function"]](path, **request["arguments"])
            if "voxels" in result:
                result["voxels"] = _share(result["voxels"])
            if "grid" in result:
                result["grid"] = dataclasses.asdict(result["grid"])
            answer["result"] = result
        except UserError as mistake:
            answer["mistake"] = str(mistake)
        except MemoryError:
            answer["mistake"] = f"{path} needs more memory than there is: it is damaged, or too large for this machine"
        except BaseException:
            answer["failure"] = traceback.format_exc()
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


_given: list[tuple[int, np.ndarray]] = []


def _shared_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """As np.empty, in memory that the other process can map: what is made there needs no copy."""
    memory = os.memfd_create("voxels")
    size = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    os.ftruncate(memory, size)
    try:
        mapped = mmap.mmap(memory, size)
    except OSError:
        os.close(memory)
        raise MemoryError from None
    array = np.frombuffer(mapped, dtype, int(np.prod(shape))).reshape(shape)
    _given.append((memory, array))
    return array


def _share(voxels: np.ndarray) -> dict[str, Any]:
    """Voxels in memory that the other process can map."""
    if not any(array is voxels for _, array in _given):
        np.copyto(_shared_empty(voxels.shape, voxels.dtype), voxels)
        voxels = _given[-1][1]
    memory = next(memory for memory, array in _given if array is voxels)
    return {"file": memory, "shape": list(voxels.shape), "dtype": voxels.dtype.str}


def _free() -> None:
    """Gives back what was shared for the last request; the other process has mapped it by now."""
    while _given:
        os.close(_given.pop()[0])


def _limit_memory(held: int) -> None:
    """Beyond what the process has now, no more than what the file can hold: its voxels, unpacked, and copies of "
    "them.
    """
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * mmap.PAGESIZE + _MEMORY + 3 * min(held * DEFLATE, 1 << 36)
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def _end_first() -> None:
    """Where memory runs out, Linux ends this process, not the one that trains."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _itk(path: Path, *, header_only: bool) -> dict[str, Any]:
    from autocontext_jax.images.itk import read_itk

    voxels, grid = read_itk(path, header_only=header_only)
    return {"grid": grid} | ({} if voxels is None else {"voxels": voxels})


def _dicom(path: Path, *, series: str | None, header_only: bool) -> dict[str, Any]:
    from autocontext_jax.images.dicom import read_series

    voxels, grid = read_series(path, series, header_only=header_only, empty=_shared_empty)
    return {"grid": grid} | ({} if voxels is None else {"voxels": voxels})


def _list_series(path: Path) -> dict[str, Any]:
    from autocontext_jax.images.dicom import list_series

    return list_series(path)


_FUNCTIONS: dict[str, Callable[..., dict[str, Any]]] = {"itk": _itk, "dicom": _dicom, "list_series": _list_series}
