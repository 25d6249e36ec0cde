"""What a training step needs on the device at hand: it is compiled and run."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autocontext_jax.planning.compiled import TrainingStep, compile_program
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
        compiled = compile_program(program, np.array([device]))
        ((state, batch), _) = compiled.executable.in_avals
        shardings, _ = compiled.executable.input_shardings
        state, batch = jax.tree.map(_zeros, (state, batch), tuple(shardings))
        seconds = []
        for _ in range(RUNS + 1):
            started = time.perf_counter()
            state, metrics = compiled.executable(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - started)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    return Measured(min(seconds[1:]), compiled.needed_bytes)


def _zeros(like: Any, sharding: Any) -> jax.Array:
    return jax.device_put(jnp.zeros(like.shape, like.dtype), sharding)
