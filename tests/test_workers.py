"""Parallel processes: every item once, and no death of a process that nobody notices."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autocontext_jax.data.workers import WorkerDiedError, in_processes
from autocontext_jax.errors import UserError


def touch(path: Path) -> None:
    """What the workers do here; the name says what happens."""
    path.with_suffix(".begun").touch()
    if "wrong" in path.name:
        raise UserError(f"{path.name} is wrong")
    if "broken" in path.name:
        raise KeyError(path.name)
    if "killed" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "slow" in path.name:
        time.sleep(60)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_item_is_done_once_and_mistakes_are_its_own(tmp_path, workers):
    items = [tmp_path / name for name in ("a", "b wrong", "c", "d wrong")]
    done = dict(in_processes(touch, items, workers=workers))
    assert sorted(done) == items
    assert {item.name: str(error) for item, error in done.items() if error} == {
        "b wrong": "b wrong is wrong", "d wrong": "d wrong is wrong"
    }  # fmt: skip
    assert all(item.with_suffix(".begun").exists() for item in items)
    assert list(in_processes(touch, [], workers=workers)) == []


def test_what_the_function_returns_comes_back():
    """Text too, which is no failure."""
    items = ["b", "a", "", "c"]
    assert sorted(in_processes(repr, items, workers=2)) == [(item, repr(item)) for item in sorted(items)]


@pytest.mark.parametrize(("name", "error"), [("killed", WorkerDiedError), ("broken", RuntimeError)])
def test_a_failing_worker_ends_the_others(tmp_path, name, error):
    started = time.monotonic()
    with pytest.raises(error):
        list(in_processes(touch, [tmp_path / "slow", tmp_path / name], workers=2))
    assert time.monotonic() - started < 30


def test_a_worker_may_be_killed_at_any_moment(tmp_path):
    """Before, one that was killed while it held a lock of the pool left the run waiting."""
    script = tmp_path / "run.py"
    script.write_text(
        "import multiprocessing, os, signal, sys, threading, time\n"
        "from autocontext_jax.data.workers import WorkerDiedError, in_processes\n"
        "def kill_one():\n"
        "    while not (found := multiprocessing.active_children()): time.sleep(0.001)\n"
        "    time.sleep(float(sys.argv[1]))\n"
        "    os.kill(found[0].pid, signal.SIGKILL)\n"
        "threading.Thread(target=kill_one, daemon=True).start()\n"
        "try:\n"
        "    for _ in in_processes(abs, range(10**6), workers=1): pass\n"
        "except WorkerDiedError: sys.exit(7)\n",
        encoding="utf-8",
    )
    for delay in (0.0, 0.05, 0.25, 0.5):
        done = subprocess.run([sys.executable, script, str(delay)], capture_output=True, timeout=60, check=False)
        assert done.returncode == 7, done.stderr.decode()


@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_workers_do_not_outlive_a_killed_run(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal\n"
        "from autocontext_jax.data.workers import in_processes\n"
        'list(in_processes(eval, [\'(print(__import__("os").getpid(), flush=True), '
        '__import__("os").kill(__import__("os").getppid(), 9), __import__("time").sleep(60))\'], workers=1))\n',
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, script], capture_output=True, encoding="utf-8", timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    worker = Path("/proc") / done.stdout.strip()
    deadline = time.monotonic() + 10
    while worker.exists() and worker.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)
