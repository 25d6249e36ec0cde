"""Convolutions and deconvolutions whose normalisation has fixed statistics, as at inference: with it and the ReLU.

On x86 CPUs each is one operation of oneDNN, which writes its result once: a whole scan takes less time and less memory.
Elsewhere the compiler fuses what follows the convolution. Gradients are those of the separate operations.

Shapes are [B, D, H, W, C].
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from autocontext_jax.models import onednn
from autocontext_jax.models.convolution import convolution, depth_is_split, on_batch_shards, onednn_type
from autocontext_jax.models.normalization import scale_shift_relu
from autocontext_jax.models.resizing import depth_to_space


@jax.custom_vjp
def convolution_relu(xs: Sequence[jax.Array], kernel: jax.Array, slope: jax.Array, shift: jax.Array) -> jax.Array:
    """relu(slope * convolution + shift).

    Args:
      xs: [B, D, H, W, C] each; they are convolved as if concatenated along their channels.
      kernel: [O, kd, kh, kw, sum of C], odd sizes, float32.
      slope: [O], float32.
      shift: [O], float32.

    Returns:
      [B, D, H, W, O], in the type of `xs`.
    """
    arguments = xs, kernel, slope, shift
    return lax.platform_dependent(*arguments, cpu=_cpu_convolution_relu, default=_separate_convolution)


def _separate_convolution(xs, kernel, slope, shift):
    x = jnp.concatenate(xs, axis=-1) if len(xs) > 1 else xs[0]
    return scale_shift_relu(convolution(x, kernel.astype(x.dtype)), slope, shift)


def _cpu_convolution_relu(xs, kernel, slope, shift):
    native = onednn_type(xs[0].dtype)
    if depth_is_split() or native is None:
        return _separate_convolution(xs, kernel, slope, shift)
    scaled = (kernel * slope[:, None, None, None, None]).astype(native)
    kernels = jnp.split(scaled, np.cumsum([x.shape[-1] for x in xs])[:-1], axis=-1)

    def on_shard(*arrays: jax.Array) -> jax.Array:
        return onednn.convolution_relu(arrays[: len(xs)], arrays[len(xs) : -1], arrays[-1])

    y = on_batch_shards(on_shard, *(x.astype(native) for x in xs), whole=(*kernels, shift))
    return y.astype(xs[0].dtype)


@jax.custom_vjp
def deconvolution_relu(x: jax.Array, kernel: jax.Array, slope: jax.Array, shift: jax.Array) -> jax.Array:
    """relu(slope * deconvolution + shift), the deconvolution of `convolution.Deconvolution`, as voxels.

    Args:
      x: [B, D, H, W, C].
      kernel: [kd, kh, kw, O, C], sizes of 1 or 2; float32.
      slope: [O], float32.
      shift: [O], float32.

    Returns:
      [B, kd D, kh H, kw W, O], in the type of x.
    """
    arguments = x, kernel, slope, shift
    return lax.platform_dependent(*arguments, cpu=_cpu_deconvolution_relu, default=_separate_deconvolution)


def _separate_deconvolution(x, kernel, slope, shift):
    flat = kernel.astype(x.dtype).reshape(-1, 1, 1, 1, kernel.shape[-1])
    blocks = convolution(x, flat).reshape(*x.shape[:4], -1, kernel.shape[3])
    deep, high, wide = kernel.shape[:3]
    return depth_to_space(scale_shift_relu(blocks, slope, shift), (deep, high, wide))


def _cpu_deconvolution_relu(x, kernel, slope, shift):
    native = onednn_type(x.dtype)
    if depth_is_split() or native is None:
        return _separate_deconvolution(x, kernel, slope, shift)
    scaled = (kernel * slope[:, None]).astype(native)
    return on_batch_shards(onednn.deconvolution_relu, x.astype(native), whole=(scaled, shift)).astype(x.dtype)


convolution_relu.defvjp(
    functools.partial(jax.vjp, _separate_convolution), lambda pullback, gradient: pullback(gradient)
)
deconvolution_relu.defvjp(
    functools.partial(jax.vjp, _separate_deconvolution), lambda pullback, gradient: pullback(gradient)
)
