"""Batch normalisation and a ReLU as one function with a gradient of its own, which moves little memory."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

# Added to a variance before its square root is taken.
EPSILON = 1e-5


class BatchNormReLU(nnx.Module):
    """Batch normalisation followed by a ReLU, with statistics over the global batch, in float32.

    A layer of the network moves its activations through memory eight times: three times forward (for the statistics,
    then in and out to normalise) and five times backward (the input and the gradient twice, the result once). Without
    the gradient defined here, the compiler keeps the ReLU's mask, the normalised values and partial gradients in
    memory, and needs up to twice as many passes.

    Args:
      channels: C.
      momentum: of the running averages. They replace the batch's statistics after
        `nnx.view(model, use_running_average=True)`.
    """

    def __init__(self, channels: int, *, momentum: float):
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(channels)), nnx.BatchStat(jnp.ones(channels))
        self.momentum = momentum
        self.use_running_average = False

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Called by `nnx.view`; None changes nothing."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def affine(self) -> tuple[jax.Array, jax.Array]:
        """The slope [C] and shift [C] with which the running averages normalise."""
        return _affine(self.mean[...], self.var[...], self.scale[...], self.bias[...])

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D, H, W, C] -> the same shape and type."""
        if self.use_running_average:
            return scale_shift_relu(x, *self.affine())
        y, mean, variance = batch_norm_relu(x, self.scale[...], self.bias[...])
        self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * mean
        self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * variance
        return y


@jax.custom_vjp
def batch_norm_relu(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """relu((x - mean) / sqrt(variance + EPSILON) * scale + bias), normalised over all axes but the last.

    The formula is that of Ioffe and Szegedy (2015), "Batch normalization".

    Args:
      x: [..., C].
      scale: [C], float32.
      bias: [C], float32.

    Returns:
      The result in the shape and type of x; mean [C]; variance [C], biased. Only the first is differentiable.
    """
    mean, variance = _moments(x)
    return scale_shift_relu(x, *_affine(mean, variance, scale, bias)), mean, variance


def _batch_norm_relu_forward(x, scale, bias):
    y, mean, variance = batch_norm_relu(x, scale, bias)
    return (y, mean, variance), (x, mean, variance, scale, bias)


def _batch_norm_relu_backward(residuals, gradients):
    # The barriers make each of the two passes compute the ReLU's mask from x again. Without them the compiler would
    # keep it in memory.
    x, mean, variance, scale, bias = lax.optimization_barrier(residuals)
    slope, shift = _affine(mean, variance, scale, bias)

    def through_relu(wide):
        return jnp.where(wide * slope + shift > 0, gradients[0].astype(jnp.float32), 0)

    wide = x.astype(jnp.float32)
    gradient = through_relu(wide)
    total, moment = _sums(gradient, gradient * wide)
    x, total, moment = lax.optimization_barrier((x, total, moment))
    wide = x.astype(jnp.float32)
    gradient = through_relu(wide)
    inverse = lax.rsqrt(variance + EPSILON)
    scale_gradient = (moment - mean * total) * inverse
    count = x.size // x.shape[-1]
    # slope * (gradient - total / n - normalised x * scale_gradient / n), collected by powers of x.
    linear = slope * inverse * scale_gradient / count
    x_gradient = slope * gradient - linear * wide + (linear * mean - slope * total / count)
    return x_gradient.astype(x.dtype), scale_gradient, total


batch_norm_relu.defvjp(_batch_norm_relu_forward, _batch_norm_relu_backward)


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean [C] and variance [C] of x, [..., C], in float32 and in one pass."""
    wide = x.astype(jnp.float32)
    mean, square = (total * (x.shape[-1] / x.size) for total in _sums(wide, wide * wide))
    return mean, jnp.maximum(square - mean * mean, 0)


def _sums(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Sums of several arrays over all axes but the last, in one pass: [..., C] -> [C] each."""
    voxels = tuple(range(arrays[0].ndim - 1))

    def together(*arrays):
        zero = jnp.zeros((), jnp.float32)
        return tuple(lax.reduce(arrays, (zero,) * len(arrays), lambda a, b: jax.tree.map(jnp.add, a, b), voxels))

    def apart(*arrays):
        return tuple(jnp.sum(array, voxels) for array in arrays)

    # XLA does not vectorise a reduction of several arrays on the CPU. Over several devices it gathers the partial sums
    # of such a reduction on every device; sums of one array it adds up with an all-reduce.
    split = jax.sharding.get_abstract_mesh().size > 1
    return lax.platform_dependent(*arrays, cpu=apart, default=apart if split else together)


def _affine(mean, variance, scale, bias) -> tuple[jax.Array, jax.Array]:
    """The slope and shift with which normalisation is slope * x + shift."""
    slope = scale * lax.rsqrt(variance + EPSILON)
    return slope, bias - slope * mean


def scale_shift_relu(x: jax.Array, slope: jax.Array, shift: jax.Array) -> jax.Array:
    """relu(slope * x + shift), computed in float32: [..., C], [C], [C] -> the shape and type of x."""
    return jax.nn.relu(x.astype(jnp.float32) * slope + shift).astype(x.dtype)
