"""The optimiser and its learning rate."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from autocontext_jax.errors import require

# Shares of the peak, by the progress of the run after warmup, from 0 to 1.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "polynomial": lambda progress: (1 - progress) ** 0.9,
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam and its learning rate.

    Attributes:
      learning_rate: the peak; 1e-3 in the paper's authors' study of the Dice loss.
      schedule: `constant` (the paper), `cosine` to zero, or `polynomial` to zero with power 0.9 (nnU-Net's).
      warmup: steps of linear rise from zero.
      weight_decay: decoupled (AdamW), of kernels alone: scales and biases do not decay; 0 is plain Adam.
      clip: largest global norm of a gradient; 0 does not clip.
    """

    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 0.0

    def __post_init__(self):
        require(self.learning_rate > 0, self, "learning_rate", "a number above 0")
        require(self.schedule in SCHEDULES, self, "schedule", f"one of {', '.join(SCHEDULES)}")
        for name in ("warmup", "weight_decay", "clip"):
            require(getattr(self, name) >= 0, self, name, "0 or more")


def learning_rate(config: OptimizerConfig, steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the step, counted from 0, for a run of `steps` steps."""

    def rate(step: int) -> float:
        if step < config.warmup:
            return config.learning_rate * step / config.warmup
        progress = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
        return config.learning_rate * SCHEDULES[config.schedule](progress)

    return rate


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Adam as configured. Its `update` takes the learning rate as `rate`.

    The rate is an argument of the training step, not a part of its program: runs of other lengths, and a schedule that
    is tried out, compile nothing anew.
    """
    decay = [optax.add_decayed_weights(config.weight_decay, _kernels)] if config.weight_decay else []
    adam = optax.chain(optax.scale_by_adam(), *decay, _scale_by_rate())
    return optax.chain(optax.clip_by_global_norm(config.clip), adam) if config.clip else adam


def _scale_by_rate() -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by -`rate`. Its state is that of `optax.scale_by_schedule`, as in older checkpoints."""

    def init(params: Any) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, *, rate: Any, **others: Any) -> tuple[Any, Any]:
        del params, others
        scaled = jax.tree.map(lambda leaf: -jnp.asarray(rate, leaf.dtype) * leaf, updates)
        return scaled, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def _kernels(params):
    """True for each kernel of a tree of parameters, False for the scales and biases, which have one axis."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
