"""Normalisation and a ReLU as one function with a gradient of its own, which moves little memory."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

# Added to a variance before its square root is taken.
EPSILON = 1e-5
# Most channels of a group of group normalisation.
GROUP = 8


class BatchNormReLU(nnx.Module):
    """Batch normalisation followed by a ReLU, with statistics over the global batch, in float32.

    The formula is that of Ioffe and Szegedy (2015), "Batch normalization".

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
        y, mean, variance = norm_relu(x, self.scale[...], self.bias[...])
        self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * mean
        self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * variance
        return y


class GroupNormReLU(nnx.Module):
    """Group normalisation followed by a ReLU, with statistics of each sample, in float32.

    With groups of one channel it is instance normalisation. Nothing is remembered: training and inference are the same.
    The formula is that of Wu and He (2018), "Group normalization".

    Args:
      channels: C.
      group: channels of a group, a divisor of C; consecutive channels are a group.
      sample_axes: see `norm_relu`.
    """

    def __init__(self, channels: int, *, group: int, sample_axes: int):
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))
        self.group, self.sample_axes = group, sample_axes

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D, H, W, C] -> the same shape and type."""
        return norm_relu(x, self.scale[...], self.bias[...], self.sample_axes, self.group)[0]


def group_size(channels: int) -> int:
    """Channels of a group: the largest number up to `GROUP` that divides them.

    Groups of 8 channels do about as well as Wu and He's (2018, table 3) 32 groups, which narrow networks cannot have.
    """
    return max(size for size in range(1, GROUP + 1) if channels % size == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def norm_relu(
    x: jax.Array, scale: jax.Array, bias: jax.Array, sample_axes: int = 0, group: int = 1
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """relu((x - mean) / sqrt(variance + EPSILON) * scale + bias): batch, instance or group normalisation with a ReLU.

    A layer of the network moves its activations through memory eight times: three times forward (for the statistics,
    then in and out to normalise) and five times backward (the input and the gradient twice, the result once). Without
    the gradient defined here, the compiler keeps the ReLU's mask, the normalised values and partial gradients in
    memory, and needs up to twice as many passes.

    Args:
      x: [..., C].
      scale: [C], float32.
      bias: [C], float32.
      sample_axes: how many of the first axes of x count samples that have statistics of their own: 0 for batch
        normalisation, 1 if the first axis counts them, 2 if the second axis does too. Statistics are over the other
        axes, up to the last.
      group: number of consecutive channels that share their statistics, a divisor of C; 1 for batch and instance
        normalisation.

    Returns:
      The result in the shape and type of x; mean [*samples, C]; variance [*samples, C], biased; without samples [C].
      Channels of a group have the same ones. Only the first is differentiable.
    """
    mean, variance = _moments(x, sample_axes, group)
    slope, shift = _affine(mean, variance, scale, bias)
    return scale_shift_relu(x, _beside(slope, x), _beside(shift, x)), mean, variance


def _norm_relu_forward(x, scale, bias, sample_axes, group):
    y, mean, variance = norm_relu(x, scale, bias, sample_axes, group)
    return (y, mean, variance), (x, mean, variance, scale, bias)


def _norm_relu_backward(sample_axes, group, residuals, gradients):
    # The barriers make each of the two passes compute the ReLU's mask from x again. Without them the compiler would
    # keep it in memory.
    x, mean, variance, scale, bias = lax.optimization_barrier(residuals)
    slope, shift = _affine(mean, variance, scale, bias)

    def through_relu(wide):
        return jnp.where(wide * _beside(slope, x) + _beside(shift, x) > 0, gradients[0].astype(jnp.float32), 0)

    wide = x.astype(jnp.float32)
    gradient = through_relu(wide)
    total, moment = _sums(sample_axes, gradient, gradient * wide)
    x, total, moment = lax.optimization_barrier((x, total, moment))
    wide = x.astype(jnp.float32)
    gradient = through_relu(wide)
    inverse = lax.rsqrt(variance + EPSILON)
    scale_gradient = (moment - mean * total) * inverse
    count = _count(x, sample_axes)
    # slope * gradient, less its mean over voxels and group, less the normalised x times the mean of its product with
    # slope * gradient; collected by powers of x.
    linear = _group_mean(slope * inverse * scale_gradient, group) / count
    constant = linear * mean - _group_mean(slope * total, group) / count
    x_gradient = _beside(slope, x) * gradient - _beside(linear, x) * wide + _beside(constant, x)
    if samples := tuple(range(sample_axes)):
        scale_gradient, total = jnp.sum(scale_gradient, samples), jnp.sum(total, samples)
    return x_gradient.astype(x.dtype), scale_gradient, total


norm_relu.defvjp(_norm_relu_forward, _norm_relu_backward)


def _moments(x: jax.Array, sample_axes: int, group: int) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of x, [*samples, C], in float32 and in one pass."""
    wide = x.astype(jnp.float32)
    sums = _sums(sample_axes, wide, wide * wide)
    mean, square = (_group_mean(total * (1 / _count(x, sample_axes)), group) for total in sums)
    return mean, jnp.maximum(square - mean * mean, 0)


def _count(x: jax.Array, sample_axes: int) -> int:
    """Number of voxels of each sample and channel that statistics are over."""
    return math.prod(x.shape[sample_axes:-1])


def _sums(sample_axes: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Sums of several arrays over their voxels, in one pass: [*samples, ..., C] -> [*samples, C] each."""
    voxels = tuple(range(sample_axes, arrays[0].ndim - 1))

    def together(*arrays):
        zero = jnp.zeros((), jnp.float32)
        return tuple(lax.reduce(arrays, (zero,) * len(arrays), lambda a, b: jax.tree.map(jnp.add, a, b), voxels))

    def apart(*arrays):
        return tuple(jnp.sum(array, voxels) for array in arrays)

    # XLA does not vectorise a reduction of several arrays on the CPU. Over several devices it gathers the partial sums
    # of such a reduction on every device; sums of one array it adds up with an all-reduce.
    split = jax.sharding.get_abstract_mesh().size > 1
    return lax.platform_dependent(*arrays, cpu=apart, default=apart if split else together)


def _group_mean(values: jax.Array, group: int) -> jax.Array:
    """The mean over each group of channels in the place of each of its channels: [..., C] -> [..., C]."""
    if group == 1:
        return values
    groups = values.reshape(*values.shape[:-1], -1, group)
    return jnp.broadcast_to(jnp.mean(groups, axis=-1, keepdims=True), groups.shape).reshape(values.shape)


def _beside(values: jax.Array, x: jax.Array) -> jax.Array:
    """[*samples, C] -> [*samples, 1, ..., 1, C], with as many axes as x."""
    return lax.expand_dims(values, range(values.ndim - 1, x.ndim - 1))


def _affine(mean, variance, scale, bias) -> tuple[jax.Array, jax.Array]:
    """The slope and shift with which normalisation is slope * x + shift."""
    slope = scale * lax.rsqrt(variance + EPSILON)
    return slope, bias - slope * mean


def scale_shift_relu(x: jax.Array, slope: jax.Array, shift: jax.Array) -> jax.Array:
    """relu(slope * x + shift), computed in float32: [..., C], [C], [C] -> the shape and type of x."""
    return jax.nn.relu(x.astype(jnp.float32) * slope + shift).astype(x.dtype)
