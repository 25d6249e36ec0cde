"""The process in which a reader reads changed files: how it is limited, watched and started again."""

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from fuzz_readers import READERS, Reader

import autocontext_jax
from autocontext_jax.errors import UserError
from autocontext_jax.images import reader_process

PACKAGE = str(Path(autocontext_jax.__file__).parent)
SECONDS, GROWTH, ADDRESSES = 10.0, 2**26, 2**30  # the limits of one input: s, bytes, bytes
READING_SECONDS = 2.0  # those of one call of the reading process
LIMITED = "needs more memory than there is"  # than the reading process is allowed; it was not taken
FILES = 3  # that may be open after an input beyond those before the first: what Python's collector has not closed yet

# What is written over a part of the reader's folder: path -> bytes.
Input = dict[str, bytes]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an input.

    Attributes:
      kind: `read`, `refused` or `failed`.
      text: the refusal, or how it failed.
      seconds: that the reader took.
      lines: of the package, as "file:line", that this process had not reached before.
    """

    kind: str
    text: str = ""
    seconds: float = 0.0
    lines: frozenset[str] = frozenset()


def work(connection: multiprocessing.connection.Connection, name: str, folder: Path) -> None:
    """Reads one input after the other until the other end is closed.

    Args:
      connection: gives inputs, takes outcomes.
      name: of the reader.
      folder: holds the valid files.
    """
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reader = READERS[name]
    valid = {path: (folder / path).read_bytes() for path in files_in(folder)}
    notes = folder.parent / "lines"
    reader_process._START = f"from fuzz_serving import serve; serve({str(notes)!r})"
    reader.read(folder)  # all that is imported or kept by the first call is no input's fault
    if reader.fresh:
        _restore(folder, valid)
    limit = _memory("VmSize") + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))  # the reading process has its own
    reader_process.SECONDS = READING_SECONDS
    seen: set[str] = set()
    rest = {process: (_memory("VmRSS", process), _open_files(process)) for process in _processes()}
    with contextlib.suppress(EOFError):
        while True:
            changed: Input = connection.recv()
            for path, content in changed.items():
                (folder / path).write_bytes(content)
            connection.send(_observe(reader, folder, seen, notes, max(rest.values())))
            if reader.fresh:
                _restore(folder, valid)
            else:
                for path in changed:
                    (folder / path).write_bytes(valid[path])


def _observe(reader: Reader, folder: Path, seen: set[str], notes: Path, rest: tuple[int, int]) -> Outcome:
    hits: set[tuple[str, int]] = set()

    def local(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            hits.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    def trace(frame: Any, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = {process: _memory("VmRSS", process) for process in _processes()}
    for process in before:
        Path(f"/proc/{process}/clear_refs").write_text("5", encoding="ascii")  # begins to measure the peak anew
    outcome = Outcome("read")
    started = time.perf_counter()
    sys.settrace(trace)
    try:
        reader.read(folder)
    except UserError as error:
        sys.settrace(None)
        text = str(error)
        outcome = Outcome("refused", text)
        if len(text.splitlines()) != 1 or not text.isprintable():
            outcome = Outcome("failed", f"not one line: {text!r}")
        elif re.search(
            r"bad_?alloc|(of|more) memory|allocate\b|allocation",
            text.replace(str(folder), "").replace(LIMITED, ""),
            re.IGNORECASE,
        ):
            outcome = Outcome("failed", f"took memory before it refused: {text}")
    except Exception as error:  # whatever escapes a reader is what is looked for
        sys.settrace(None)
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if frame.filename.startswith(PACKAGE)]
        place = ours[-1] if ours else "none of our lines"
        outcome = Outcome("failed", f"{type(error).__name__} at {place}: {str(error)[-1500:]}")
    finally:
        sys.settrace(None)
    seconds = time.perf_counter() - started
    for process in _processes():
        # A reading process that was started for this input took what it has at rest for itself.
        growth = _memory("VmHWM", process) - before.get(process, max(rest[0], _memory("VmRSS", process)))
        if growth > GROWTH and outcome.kind != "failed":
            outcome = Outcome("failed", f"grew by {growth / 2**20:.0f} MiB: {outcome.text}")
        if _open_files(process) > rest[1] + FILES and outcome.kind != "failed":
            outcome = Outcome("failed", f"left files open, {_open_files(process)} in all: {outcome.text}")
    lines = {f"{Path(file).name}:{line}" for file, line in hits}
    if notes.exists():
        lines |= {f"reading {line}" for line in notes.read_text("utf-8").splitlines()}
        notes.unlink()
    new = lines - seen
    seen |= new
    return dataclasses.replace(outcome, seconds=seconds, lines=frozenset(new))


def _processes() -> list[int]:
    """This process and the reading process, if it runs."""
    return [os.getpid(), *(one.process.pid for one in reader_process._running if one.process.poll() is None)]


def _memory(key: str, process: int | None = None) -> int:
    """Bytes, as the system counts them for a process, or for this one."""
    status = Path(f"/proc/{process or 'self'}/status").read_text("utf-8")
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(key)), 0)


def _open_files(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


def files_in(folder: Path) -> list[str]:
    """Paths of all files in a folder, at any depth, relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _restore(folder: Path, valid: Input) -> None:
    shutil.rmtree(folder)
    for path, content in valid.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


class Worker:
    """The process that reads, started again when it died or hung."""

    def __init__(self, name: str, folder: Path):
        self._name, self._folder = name, folder
        self._valid = {path: (folder / path).read_bytes() for path in files_in(folder)}
        self._process: Any = None

    def outcome(self, changed: Input) -> Outcome:
        """Of one input."""
        if self._process is None:
            _restore(self._folder, self._valid)
            context = multiprocessing.get_context("forkserver")  # of a process that has no threads yet
            context.set_forkserver_preload(
                ["autocontext_jax.jobs.config_files", "autocontext_jax.training.checkpoints"]
            )
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=work, args=(theirs, self._name, self._folder), daemon=True)
            self._process.start()
            theirs.close()
            self._waited = 60.0  # until it is there
        started = time.perf_counter()
        try:
            self._connection.send(changed)
            if self._connection.poll(SECONDS + self._waited):
                self._waited = 0.0
                return self._connection.recv()
        except (EOFError, ConnectionError):
            pass
        hung = self._process.is_alive() and time.perf_counter() - started > SECONDS
        self.close()
        text = f"took more than {SECONDS:g} s" if hung else f"the process ended ({self._ended})"
        return Outcome("failed", text, time.perf_counter() - started)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._connection.close()
            self._process.join(1)
            self._process.kill()
            self._process.join()
            self._ended, self._process = self._process.exitcode, None
