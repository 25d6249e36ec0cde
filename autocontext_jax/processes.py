"""Several processes, one a host: how they find, wait for and tell each other; one process alone does none of it."""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from autocontext_jax.errors import UserError

Item = TypeVar("Item")

# Seconds that processes wait for each other where their shares of work differ: preparing, evaluating.
PATIENCE = 24 * 3600


def start(coordinator: str = "", count: int = 0, index: int = -1) -> None:
    """Makes this process one of several; before any other call of JAX.

    Args:
      coordinator: HOST:PORT of process 0; "" finds all three from SLURM's, Open MPI's, Kubernetes' or a Cloud TPU's
        environment.
      count: of processes.
      index: of this one, from 0.

    Raises:
      ValueError, RuntimeError: the environment says nothing, or process 0 cannot be reached.
    """
    # XLA's schedule for the CPU lets each process begin its sums over all processes in an order of its own, which Gloo
    # cannot match ("Received data size doesn't match"); as an option of one compilation this has no effect in jax 0.10.
    schedule = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {schedule}"
    if coordinator:
        jax.distributed.initialize(coordinator, count, index)
    else:
        jax.distributed.initialize()


def is_first() -> bool:
    """Whether this process writes what is written once: logs, tables, pictures."""
    return jax.process_index() == 0


def mine(items: Sequence[Item]) -> Sequence[Item]:
    """This process's share of items that are worked on one by one."""
    return items[jax.process_index() :: jax.process_count()]


def wait(name: str) -> None:
    """Waits until every process has called this function with this name; each name may be used once."""
    if jax.process_count() > 1:
        multihost.sync_global_processes(name, timeout=PATIENCE, processes=set(range(jax.process_count())))


def agree(action: Callable[[], Item]) -> Item:
    """Does something in every process; if one meets a user's mistake, all raise it, and none waits for it in vain.

    Raises:
      UserError: that of the first process that met one.
    """
    found, error = None, ""
    try:
        found = action()
    except UserError as mistake:
        if jax.process_count() == 1:
            raise
        error = str(mistake)
    if errors := [message for message in gather(error) if message]:
        raise UserError(errors[0])
    return found  # type: ignore[return-value] # no process raised


def first_does(action: Callable[[], None]) -> None:
    """Does something in the first process while the others wait for it; its mistake is raised in all.

    Raises:
      UserError: that of the first process.
    """
    agree(action if is_first() else lambda: None)


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order, in every process; values must be JSON."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    padded = multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - text.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(padded, sizes, strict=True)]
