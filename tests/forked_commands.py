"""The command line in processes that are forked from one that has imported the package.

Importing is nearly all of the three seconds that a short command takes. A forked process is new in all else: it has no
flags, no device, no threads, and its own standard output. How commands import and how Python ends after them is tested
with processes that are started.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).parent
SECONDS = 300  # a command that takes longer hangs


class Forked:
    """A command that was started; as much of `subprocess.Popen` as tests need."""

    def __init__(self, commands: "ForkedCommands", pid: int, folder: Path):
        self.pid, self._commands, self._folder = pid, commands, folder
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        if self.returncode is None:
            self.returncode = self._commands.ask("poll", self.pid)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit status; it is killed if it hangs."""
        deadline = time.monotonic() + SECONDS
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, 9)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def ended(self) -> subprocess.CompletedProcess:
        """Waits; with what it wrote."""
        status = self.wait()
        out, errors = ((self._folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(str(self.pid), status, out, errors)


class ForkedCommands:
    """Starts commands; a context that ends the process that they are forked from.

    Args:
      root: the checkout, from which the package is imported.
      programs: where compiled programs are kept from one command to the next.

    Attributes:
      environment: of the commands.
    """

    def __init__(self, root: Path, *, programs: Path):
        self._root = root
        self._folder = tempfile.TemporaryDirectory()
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(root), str(HERE))),
            "JAX_COMPILATION_CACHE_DIR": str(programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._server = subprocess.Popen(
            [sys.executable, "-c", "import forked_commands; forked_commands.serve()"],
            env=self.environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip
        self._count = 0

    def __enter__(self) -> "ForkedCommands":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait(SECONDS)
        self._server.stdout.close()
        self._folder.cleanup()

    def ask(self, *question: object) -> int | None:
        """What the other process answers."""
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, *arguments: object, cwd: Path | None = None, **environment: str) -> Forked:
        """A command, with the flags of `python -m autocontext_jax.main`.

        Args:
          arguments: the flags.
          cwd: the current folder; without it the checkout.
          environment: more variables. Those that JAX reads when it is imported have no effect.
        """
        self._count += 1
        folder = Path(self._folder.name) / str(self._count)
        folder.mkdir()
        pid = self.ask("start", str(folder), str(cwd or self._root), environment, *map(str, arguments))
        assert pid is not None
        return Forked(self, pid, folder)

    def run(self, *arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
        """The same, ended."""
        return self.start(*arguments, cwd=cwd, **environment).ended()


def serve() -> None:
    """What the other process does: answers questions until there are no more."""
    for module in ("main", *(f"jobs.{job}" for job in ("evaluate", "export", "predict", "prepare", "report", "train"))):
        importlib.import_module(f"autocontext_jax.{module}")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    for line in sys.stdin:
        what, *rest = json.loads(line)
        if what == "poll":
            pid, status = os.waitpid(rest[0], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                answers.close()
                _become(*rest)
        print(json.dumps(answer), file=answers, flush=True)


def _become(folder: str, cwd: str, environment: dict[str, str], *arguments: str) -> None:
    """What `python -m autocontext_jax.main` does, in this process."""
    files = (os.devnull, f"{folder}/stdout", f"{folder}/stderr")
    for number, name in enumerate(files):
        opened = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(cwd)
    os.environ.update(environment)
    sys.argv = [str(HERE.parent / "autocontext_jax" / "main.py"), *arguments]
    import jax

    from autocontext_jax import main

    status = 1
    try:
        status = main.main(sys.argv)
    except BaseException:
        traceback.print_exc()
    finally:
        jax.distributed.shutdown()  # as at the exit of Python: the first process waits for the others
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # it would take seconds to take apart what has been imported
