"""What a training step needs on the device at hand: it is compiled and run."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autocontext_jax.planning.compiled import TrainingStep, needed_bytes
from autocontext_jax.planning.step_size import Measured

RUNS = 3  # that are timed, after a first one that is not: the fastest counts, since nothing makes a step faster


def measure_step(program: TrainingStep, device: Any) -> Measured | None:
    """Compiles a step for one device and runs it on zeros, whose values change nothing of its time.

    Args:
      program: the step.
      device: of this process.

    Returns:
      None where the device has not the memory for it.
    """
    try:
        executable = program.lower(np.array([device]))[0].compile()  # with the options of the training itself
        ((state, batch), _) = executable.in_avals
        shardings, _ = executable.input_shardings
        state, batch = jax.tree.map(_zeros, (state, batch), tuple(shardings))
        seconds = []
        for _ in range(RUNS + 1):
            started = time.perf_counter()
            state, metrics = executable(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - started)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    return Measured(min(seconds[1:]), needed_bytes(executable))


def _zeros(like: Any, sharding: Any) -> jax.Array:
    return jax.device_put(jnp.zeros(like.shape, like.dtype), sharding)
