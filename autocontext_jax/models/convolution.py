"""Convolution and deconvolution, each computed in the way that is fastest on its platform.

On GPUs and TPUs XLA's own convolution is used, on x86 CPUs oneDNN's (`onednn.py`), on other CPUs a sum of 2D
convolutions. Only this file and `fixed_normalization.py` distinguish platforms for them.

Shapes are [B, D, H, W, C]. Kernels are [O, kd, kh, kw, C], the order that the GPUs' libraries read, so that no step
copies them into another one. A kernel that is flat along an axis has the size 1 there: with kd = 1 each of the D
slices is an image of its own. A layer computes in its input's type; parameters are float32.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from autocontext_jax.geometry import Triple
from autocontext_jax.models import onednn


def direct_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """XLA's own 3D convolution, zero-padded to the same size.

    Args:
      x: [B, D, H, W, C].
      kernel: [O, kd, kh, kw, C], odd sizes.

    Returns:
      [B, D, H, W, O].
    """
    if kernel.shape[1:4] == (1, 1, 1):  # a matrix product needs no convolution
        return x @ kernel[:, 0, 0, 0].T
    return lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "ODHWI", "NDHWC"))


def direct_gradients(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of `direct_convolution`.

    Args:
      x: [B, D, H, W, C], its input.
      kernel: [O, kd, kh, kw, C].
      gradient: [B, D, H, W, O], with respect to its result.

    Returns:
      The gradients with respect to x and to the kernel, in their shapes.
    """
    return jax.vjp(direct_convolution, x, kernel)[1](gradient)


def planar_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same function as `direct_convolution`, as a sum of 2D convolutions, one for each plane of the kernel.

    XLA's CPU backend runs a 2D convolution several times as fast as a 3D one. The results are shifted along the depth,
    not the input: then all 2D convolutions read the same array, and XLA fuses the shifts into the sum.

    Args:
      x: [B, D, H, W, C].
      kernel: [O, kd, kh, kw, C], odd sizes.

    Returns:
      [B, D, H, W, O].
    """
    if kernel.shape[1:4] == (1, 1, 1):
        return direct_convolution(x, kernel)
    batch, depth, height, width, channels = x.shape
    reach = kernel.shape[1] // 2
    planes = x.reshape(batch * depth, height, width, channels)
    total = jnp.zeros((), x.dtype)
    for number in range(kernel.shape[1]):
        layout = ("NHWC", "OHWI", "NHWC")
        y = lax.conv_general_dilated(planes, kernel[:, number], (1, 1), "SAME", dimension_numbers=layout)
        # This kernel plane takes x[z] into output z + reach - number; negative padding drops what falls outside.
        shift = reach - number
        shifted = ((0, 0, 0), (shift, -shift, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0))
        total = total + lax.pad(y.reshape(batch, depth, height, width, -1), jnp.zeros((), x.dtype), shifted)
    return total


def planar_gradients(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of `planar_convolution`; arguments and results are those of `direct_gradients`."""
    # The gradient of x is a convolution with the kernel flipped along its axes, inputs and outputs swapped.
    x_gradient = planar_convolution(gradient, kernel[:, ::-1, ::-1, ::-1].swapaxes(0, -1))
    if kernel.shape[1:4] == (3, 3, 3):
        return x_gradient, planar_filter_gradient(x, gradient)
    return x_gradient, direct_gradients(x, kernel, gradient)[1]


def planar_filter_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Gradient of `planar_convolution` with respect to a 3x3x3 kernel: one matrix product per plane of the volume.

    The 9 in-plane neighbours of each voxel of one plane form a matrix that fits the cache. It is multiplied with the
    gradients of the three output planes that depend on it. XLA's own rule builds such a matrix of the whole volume and
    took two to three times as long with up to 64 channels.

    Args:
      x: [B, D, H, W, C], the convolution's input.
      gradient: [B, D, H, W, O], with respect to its output.

    Returns:
      [O, 3, 3, 3, C].
    """
    _, depth, height, width, channels = x.shape
    outputs = gradient.shape[-1]
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    above_and_below = jnp.pad(gradient, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))

    def add_plane(z: jax.Array, total: jax.Array) -> jax.Array:
        plane = lax.dynamic_index_in_dim(padded, z, axis=1, keepdims=False)
        neighbours = [plane[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        # Kernel plane 0 takes x[z] into output z + 1, plane 2 into output z - 1.
        seen_by = lax.dynamic_slice_in_dim(above_and_below, z, 3, axis=1)[:, ::-1]
        # The matrix product transposes its left operand, which is the smaller of the two.
        left = seen_by.transpose(1, 4, 0, 2, 3).reshape(3 * outputs, -1)
        right = jnp.concatenate(neighbours, axis=-1).reshape(-1, 9 * channels)
        return total + jnp.matmul(left, right, preferred_element_type=jnp.float32)

    # The sum over planes is kept in float32 whatever the type of x, as XLA's own rule does.
    total = lax.fori_loop(0, depth, add_plane, jnp.zeros((3 * outputs, 9 * channels), jnp.float32))
    return total.reshape(3, outputs, 3, 3, channels).swapaxes(0, 1).astype(x.dtype)


def onednn_type(dtype: jnp.dtype) -> jnp.dtype | None:
    """The type in which oneDNN computes convolutions of `dtype` on this CPU; None if oneDNN is not used for them.

    Some processors multiply bfloat16 faster than float32: two times with AVX-512, eight times with AMX. There bfloat16
    stays as it is; elsewhere it is converted to float32.
    """
    if onednn.version() is None or dtype not in (jnp.float32, jnp.bfloat16):
        return None
    return jnp.dtype(dtype if multiplies_bfloat16() else jnp.float32)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions that multiply bfloat16, according to Linux."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8") if info.exists() else ""
    return "amx_bf16" in flags or "avx512_bf16" in flags


def depth_is_split() -> bool:
    """Whether the current mesh (`jax.set_mesh`) splits the depth of volumes over several devices."""
    return jax.sharding.get_abstract_mesh().shape.get("space", 1) > 1


def on_batch_shards(
    function: Callable[..., jax.Array], *batches: jax.Array, whole: tuple[jax.Array, ...] = (), total: bool = False
) -> jax.Array:
    """Calls a function that XLA cannot split, on each device's shard of the batch if the current mesh splits it.

    Args:
      function: takes `batches`, then `whole`; returns a batch, or a value to be summed over the batch.
      batches: arrays [B, ...], split along their first axis.
      whole: further arrays, copied to every device.
      total: whether the devices' results are summed, instead of concatenated along their first axis.

    Raises:
      ValueError: B is not a multiple of the size of the mesh's axis `data`.
    """
    if jax.sharding.get_abstract_mesh().shape.get("data", 1) == 1:
        return function(*batches, *whole)
    shard, copy = PartitionSpec("data"), PartitionSpec()

    def on_shard(*arrays: jax.Array) -> jax.Array:
        return lax.psum(function(*arrays), "data") if total else function(*arrays)

    specs = (shard,) * len(batches) + (copy,) * len(whole)
    # JAX's check of which values differ between devices does not support foreign calls.
    split = jax.shard_map(on_shard, in_specs=specs, out_specs=copy if total else shard, check_vma=False)
    return split(*batches, *whole)


def cpu_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The fastest same-size convolution on this CPU; arguments and result are those of `convolution`."""
    if depth_is_split():  # XLA can split only its own convolution along the depth
        return direct_convolution(x, kernel)
    native = onednn_type(x.dtype)
    if native is None:
        return planar_convolution(x, kernel)
    y = on_batch_shards(onednn.convolution, x.astype(native), whole=(kernel.astype(native),))
    return y.astype(x.dtype)


def cpu_gradients(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of `cpu_convolution`; arguments and results are those of `direct_gradients`."""
    if depth_is_split():
        return direct_gradients(x, kernel, gradient)
    native = onednn_type(x.dtype)
    if native is None:
        return planar_gradients(x, kernel, gradient)
    native_x, kernel, gradient = (array.astype(native) for array in (x, kernel, gradient))
    filter_gradient = functools.partial(onednn.filter_gradient, size=kernel.shape[1:4])
    x_gradient = on_batch_shards(onednn.input_gradient, gradient, whole=(kernel,))
    kernel_gradient = on_batch_shards(filter_gradient, native_x, gradient, total=True)
    return x_gradient.astype(x.dtype), kernel_gradient.astype(x.dtype)


@jax.custom_vjp
def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3D convolution, zero-padded to the same size, in the fastest way on the platform that it is compiled for.

    Args:
      x: [B, D, H, W, C].
      kernel: [O, kd, kh, kw, C], odd sizes.

    Returns:
      [B, D, H, W, O].
    """
    return lax.platform_dependent(x, kernel, cpu=cpu_convolution, default=direct_convolution)


def _convolution_forward(x, kernel):
    return convolution(x, kernel), (x, kernel)


def _convolution_backward(residuals, gradient):
    return lax.platform_dependent(*residuals, gradient, cpu=cpu_gradients, default=direct_gradients)


convolution.defvjp(_convolution_forward, _convolution_backward)


class Convolution(nnx.Module):
    """A convolution to the same size, He-initialised.

    Args:
      inputs: channels of the input.
      outputs: channels of the result.
      size: of the kernel along (z, y, x), odd.
      bias: whether a bias is added.
      rngs: random keys for the kernel.
    """

    def __init__(self, inputs: int, outputs: int, size: Triple = (3, 3, 3), *, bias: bool, rngs: nnx.Rngs):
        # The fan-in is that of the kernel's own shape. XLA compiles the draw of a matrix five times as fast.
        flat = nnx.initializers.he_normal(in_axis=1, out_axis=0)(rngs.params(), (outputs, math.prod(size) * inputs))
        self.kernel = nnx.Param(flat.reshape(outputs, *size, inputs))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D, H, W, inputs] -> [B, D, H, W, outputs]."""
        y = convolution(x, self.kernel[...].astype(x.dtype))
        if self.bias is None:
            return y
        # Added in float32, because the gradient of the bias is then summed in float32. Its terms, one per voxel, nearly
        # cancel: summed in bfloat16 on CPUs, the error was as large as the gradient.
        return (y.astype(jnp.float32) + self.bias[...]).astype(y.dtype)


class Deconvolution(nnx.Module):
    """A transposed convolution without bias, whose kernel and stride are both `step`.

    So blocks of the output do not overlap: it is one matrix product to the values of a voxel's block, followed by
    `resizing.depth_to_space`. (Written as an input-dilated convolution its gradient is tens of times slower on some
    backends.) Normalisation and ReLU come between the two, so that depth-to-space needs no pass of its own.

    Args:
      inputs: channels of the input.
      outputs: channels of the result.
      step: by how much the grid grows along (z, y, x), 1 or 2.
      rngs: random keys for the kernel.
    """

    def __init__(self, inputs: int, outputs: int, step: Triple = (2, 2, 2), *, rngs: nnx.Rngs):
        # Each output voxel depends on `inputs` values, not on 8 times as many. As a matrix the kernel has that fan-in.
        flat = nnx.initializers.he_normal(in_axis=1, out_axis=0)(rngs.params(), (math.prod(step) * outputs, inputs))
        self.kernel = nnx.Param(flat.reshape(*step, outputs, inputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D, H, W, inputs] -> the values of each voxel's block, [B, D, H, W, block, outputs]."""
        kernel = self.kernel[...].astype(x.dtype)
        flat = convolution(x, kernel.reshape(-1, 1, 1, 1, kernel.shape[-1]))
        return flat.reshape(*x.shape[:4], -1, kernel.shape[3])
