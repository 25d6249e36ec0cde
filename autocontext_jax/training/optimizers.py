"""The optimiser and its learning rate."""

import dataclasses

import jax
import optax

from autocontext_jax.errors import require

SCHEDULES = ("constant", "cosine", "polynomial")


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


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step, for a run of `steps` steps."""
    peak, decay_steps = config.learning_rate, max(1, steps - config.warmup)
    schedule = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
        "polynomial": optax.polynomial_schedule(peak, 0.0, 0.9, decay_steps),
    }[config.schedule]
    if not config.warmup:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, peak, config.warmup), schedule], [config.warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Adam as configured for a run of `steps` steps."""
    rate = learning_rate(config, steps)
    adam = (
        optax.adamw(rate, weight_decay=config.weight_decay, mask=_kernels) if config.weight_decay else optax.adam(rate)
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), adam) if config.clip else adam


def _kernels(params):
    """True for each kernel of a tree of parameters, False for the scales and biases, which have one axis."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
