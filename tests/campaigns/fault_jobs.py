"""The command line as a process that a fault can strike, and what its end must look like."""

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A run of seconds: phantoms of 24³ voxels, three to train on, 12 steps, a checkpoint every 4.
SMALL = (
    "--config.phantom.training=3", "--config.phantom.test=1", "--config.phantom.size=(24, 24, 24)",
    "--config.phantom.spacing=(12.0, 12.0, 12.0)", "--config.loader.patch_size=8", "--config.loader.batch_size=1",
    "--config.model.base_channels=2", "--config.model.depth=1", "--config.train.steps=12",
    "--config.train.checkpoint_every=4", "--config.train.log_every=1", "--config.train.keep=3",
    "--config.train.validation_patches=2", "--config.predict.tile=16",
    "--config.predict.checkpoint=latest", "--config.augmentation.elastic_sigma=0.0",
)  # fmt: skip
TIME_LIMIT = 120  # seconds; a job that takes longer hangs
RUNNING: set[int] = set()  # process ids of the jobs that have not been waited for


class Wrong(Exception):
    """The fault was not survived."""


class NotPossible(Exception):
    """The fault cannot be made on this machine, or with this version of the package."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """A job that has ended.

    Attributes:
      status: its exit status; negative for a signal.
      text: what it wrote on standard output and standard error.
    """

    status: int
    text: str

    @property
    def error(self) -> str:
        """Its one line of error, or "" after success.

        Raises:
          Wrong: the job ended in any other way.
        """
        if self.status == 0 and "Traceback" not in self.text:
            return ""
        if self.status == 1 and "Traceback" not in self.text and "scans could not be" in self.text:
            return " ".join(self.text.splitlines())  # some of many scans failed: a line for each
        lines = [line for line in self.text.splitlines() if line.startswith("error: ")]
        if self.status != 2 or len(lines) != 1 or "Traceback" in self.text:
            raise Wrong(f"status {self.status}; expected 0, or 2 with one line of error:\n{self.text}")
        return lines[0]


class Job:
    """One command line in a process of its own.

    The process is forked from this one, which has imported the package but has started no device. So a job does not
    spend seconds on imports.

    Args:
      workdir: of the run.
      mode: of the command line.
      more: further flags.
    """

    def __init__(self, workdir: Path, mode: str, *more: object):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `wait`
        config = str(ROOT / "configs" / "quickstart.py")
        arguments = ["main", "--config", config, "--workdir", str(workdir), "--mode", mode, *SMALL, *map(str, more)]
        self.pid = os.fork()
        if self.pid == 0:
            self._run(arguments)
        RUNNING.add(self.pid)

    def _run(self, arguments: list[str]) -> None:
        """In the child: what `python -m autocontext_jax.main` does."""
        from autocontext_jax.main import main

        status = 1
        try:
            os.setpgid(0, 0)
            os.dup2(self._log.fileno(), 1)
            os.dup2(self._log.fileno(), 2)
            sys.argv = arguments  # where absl looks for the configuration's flags
            status = main(arguments)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):
                    stream.flush()
            os._exit(status)

    def runs(self) -> bool:
        """Whether it has not ended yet."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def until(self, condition: Callable[[], bool], seconds: float = TIME_LIMIT) -> bool:
        """Waits until a condition holds; False if the job ended, or the seconds passed, before it did."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.runs():
            if condition():
                return True
            time.sleep(0.0005)
        return False

    def kill(self, group: bool = False) -> None:
        """Sends SIGKILL to the process alone, or also to those that it started."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, signal.SIGKILL)

    def pause(self) -> None:
        """Stops the process and those that it started, until `resume`."""
        os.killpg(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Lets a paused process go on."""
        os.killpg(self.pid, signal.SIGCONT)

    def wait(self) -> Ended:
        """Waits until the job ends.

        Raises:
          Wrong: it hangs; it is then killed.
        """
        if self.until(lambda: False) or self.runs():
            self.kill(group=True)
            os.waitpid(self.pid, 0)
            RUNNING.discard(self.pid)
            raise Wrong(f"hangs:\n{self._text()}")
        _, status = os.waitpid(self.pid, 0)
        RUNNING.discard(self.pid)
        return Ended(os.waitstatus_to_exitcode(status), self._text())

    def _text(self) -> str:
        with self._log as log:
            log.seek(0)
            return log.read().decode(errors="replace").replace("\r", "\n")

    def children(self) -> list[int]:
        """Process ids of the workers that it started."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, ValueError):
                parent = int(path.read_text().rpartition(")")[2].split()[1])
                if parent == self.pid and b"spawn_main" in (path.parent / "cmdline").read_bytes():
                    found.append(int(path.parent.name))
        return found


def start(workdir: Path, mode: str, *, processes: int = 1) -> list[Job]:
    """Starts one run as one or as several processes.

    Args:
      workdir: of the run.
      mode: of the command line.
      processes: how many share the run. Each has one device and takes one patch of the batch.
    """
    if processes == 1:
        return [Job(workdir, mode)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = (f"--config.loader.batch_size={processes}", "--coordinator", address, "--processes", processes)
    return [Job(workdir, mode, *flags, "--process", number) for number in range(processes)]
