"""Work in parallel processes, where the death of one of them never goes unnoticed.

The standard library's process pool shares a queue and its locks among its workers: a worker that is killed while it
holds one can leave the pool waiting for ever. Here each worker has a pipe of its own, which ends when the worker does.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from autocontext_jax.errors import UserError, counted
from autocontext_jax.runtime import starting_workers

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerDiedError(Exception):
    """The system ended a worker, likely for want of memory."""


def out_of_memory(job: str, workers: int) -> UserError:
    """What a user is told where the system ended one of a job's workers, of which so many were running."""
    remedy = f"run again with fewer, --config.data.workers={workers // 2}" if workers > 1 else "free some memory"
    return UserError(
        f"{job}: the system ended one of {counted(workers, 'worker')}, likely for want of memory: {remedy}"
    )


def in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], *, workers: int
) -> Iterator[tuple[Item, Result | UserError]]:
    """Calls a function with each item, in processes that hold one item at a time.

    Args:
      function: that a new process can import.
      items: that can be pickled, as what the function returns.
      workers: number of processes at most.

    Yields:
      Each item when it is done with, and what the function returned, or the mistake that ended it.

    Raises:
      WorkerDiedError: the system ended a process.
      RuntimeError: the function failed with another error, which the message shows.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(range(len(items)))[::-1]
    running: dict[Any, int] = {}
    processes = []
    try:
        for _ in range(min(workers, len(items))):
            ours, theirs = context.Pipe()
            with starting_workers():
                process = context.Process(target=_work, args=(function, theirs), daemon=True)
                process.start()
            processes.append(process)
            theirs.close()  # the worker's is then the only one, and its end is seen here
            running[ours] = waiting.pop()
        for pipe, number in running.items():
            _send(pipe, items[number])
        while running:
            for ready in multiprocessing.connection.wait(list(running)):
                connection: Any = ready
                try:
                    outcome, failure = connection.recv()
                except (EOFError, OSError):
                    raise WorkerDiedError from None
                if failure:
                    raise RuntimeError(f"a worker failed:\n{failure}")
                done = items[running.pop(connection)]
                if waiting:
                    running[connection] = waiting.pop()
                    _send(connection, items[running[connection]])
                else:
                    connection.close()  # which ends the worker
                yield done, outcome
    finally:
        for pipe in running:
            pipe.close()
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _send(connection: Any, item: Any) -> None:
    try:
        connection.send(item)
    except OSError:
        raise WorkerDiedError from None


def _work(function: Callable[[Any], Any], connection: Any) -> None:
    """A worker: its items one after the other, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            item = connection.recv()
        except (EOFError, OSError):
            return
        outcome, failure = None, ""
        try:
            outcome = function(item)
        except UserError as mistake:
            outcome = mistake
        except BaseException:  # as text: not every exception can be sent, and none keeps its traceback
            failure = traceback.format_exc()
        connection.send((outcome, failure))


def _end_with_parent() -> None:
    """Ends this worker when the run is killed: it would write while the next run does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
