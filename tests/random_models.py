"""Models with random weights for tests."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def with_random_weights(make: Callable[[], nnx.Module], seed: int) -> nnx.Module:
    """The module that `make` returns, with weights drawn by numpy: XLA takes seconds to compile each initialiser.

    Kernels are He-normal; scales, offsets and running averages lie between 0.5 and 1, so that all of them matter.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = leaf.shape[-1] if leaf.shape[:3] == (2, 2, 2) else np.prod(leaf.shape[1:])
        values = rng.normal(0, np.sqrt(2 / fan_in), leaf.shape) if leaf.ndim > 1 else rng.uniform(0.5, 1, leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    graph, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, jax.tree.map(draw, state))
