"""Convolution, deconvolution, pooling and normalisation; the only file that knows a platform.

Shapes are [B, D, H, W, C]; kernels are [O, kd, kh, kw, C], as the libraries of GPUs read them, so that no step copies
them into another order. In 2D kernels are flat, kd = 1: each of the D slices is an image of its own. A layer
computes in its input's type; parameters are float32.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from autocontext_jax.geometry import halving, patch_shape
from autocontext_jax.models import onednn

# Added to a variance before its root is taken.
EPSILON = 1e-5


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
    """Of `direct_convolution` with respect to x and the kernel, from that with respect to its result."""
    return jax.vjp(direct_convolution, x, kernel)[1](gradient)


def planar_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same function as a sum of 2D convolutions, one for each plane of the kernel.

    XLA's CPU backend runs a 2D convolution several times as fast as a 3D one. Shifting the results along the depth,
    not the input, lets all of them read the same array and the shifts melt into the sum.
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
    """Of `planar_convolution` with respect to x and the kernel, from that with respect to its result."""
    # The convolution that takes gradients back: turned about its centre, inputs and outputs swapped.
    x_gradient = planar_convolution(gradient, kernel[:, ::-1, ::-1, ::-1].swapaxes(0, -1))
    if kernel.shape[1:4] == (3, 3, 3):
        return x_gradient, planar_filter_gradient(x, gradient)
    return x_gradient, direct_gradients(x, kernel, gradient)[1]


def planar_filter_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Gradient of `planar_convolution` with respect to a 3x3x3 kernel: one matrix product a plane of the volume.

    The 9 in-plane neighbours of one plane (a matrix that fits the cache) meet the gradients of the three planes that
    see it. XLA's own rule builds the neighbours of the whole volume and took two to three times as long with up to
    64 channels.

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
        # The product wants its left side transposed: that is the smaller of the two.
        left = seen_by.transpose(1, 4, 0, 2, 3).reshape(3 * outputs, -1)
        right = jnp.concatenate(neighbours, axis=-1).reshape(-1, 9 * channels)
        return total + jnp.matmul(left, right, preferred_element_type=jnp.float32)

    # The sum over planes is kept in float32 whatever the type of x, as XLA's own rule does.
    total = lax.fori_loop(0, depth, add_plane, jnp.zeros((3 * outputs, 9 * channels), jnp.float32))
    return total.reshape(3, outputs, 3, 3, channels).swapaxes(0, 1).astype(x.dtype)


def onednn_type(dtype: jnp.dtype) -> jnp.dtype | None:
    """The type in which oneDNN computes the CPU's convolutions of `dtype` here; None if they do not go through it.

    Where the processor multiplies bfloat16, two (AVX-512) to eight times (AMX) as many a second as float32, it stays
    bfloat16; elsewhere it is widened.
    """
    if onednn.version() is None or dtype not in (jnp.float32, jnp.bfloat16):
        return None
    return jnp.dtype(dtype if multiplies_bfloat16() else jnp.float32)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether Linux says so of this processor."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8") if info.exists() else ""
    return "amx_bf16" in flags or "avx512_bf16" in flags


def depth_is_split() -> bool:
    """Whether the mesh that is set (`jax.set_mesh`) splits the depth of volumes over devices."""
    return jax.sharding.get_abstract_mesh().shape.get("space", 1) > 1


def on_shares(
    function: Callable[..., jax.Array], *batches: jax.Array, whole: tuple[jax.Array, ...] = (), total: bool = False
) -> jax.Array:
    """A call that XLA cannot split, on each device's share of the batch where the mesh that is set splits it.

    Args:
      function: of the arrays; it gives a batch, or what is to be summed over the batch.
      batches: [B, ...] each.
      whole: further arguments, which every device has.
      total: whether results are summed.

    Raises:
      ValueError: the mesh's axis `data` does not divide B.
    """
    if jax.sharding.get_abstract_mesh().shape.get("data", 1) == 1:
        return function(*batches, *whole)
    share, copy = PartitionSpec("data"), PartitionSpec()

    def on_share(*arrays: jax.Array) -> jax.Array:
        return lax.psum(function(*arrays), "data") if total else function(*arrays)

    specs = (share,) * len(batches) + (copy,) * len(whole)
    # The check of what varies from device to device knows no foreign calls.
    split = jax.shard_map(on_share, in_specs=specs, out_specs=copy if total else share, check_vma=False)
    return split(*batches, *whole)


def cpu_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The fastest same-size convolution on the CPU here."""
    if depth_is_split():  # along the depth XLA splits only its own
        return direct_convolution(x, kernel)
    native = onednn_type(x.dtype)
    if native is None:
        return planar_convolution(x, kernel)
    y = on_shares(onednn.convolution, x.astype(native), whole=(kernel.astype(native),))
    return y.astype(x.dtype)


def cpu_gradients(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of `cpu_convolution` with respect to x and the kernel, from that with respect to its result."""
    if depth_is_split():
        return direct_gradients(x, kernel, gradient)
    native = onednn_type(x.dtype)
    if native is None:
        return planar_gradients(x, kernel, gradient)
    own, kernel, gradient = (array.astype(native) for array in (x, kernel, gradient))
    of_size = functools.partial(onednn.filter_gradient, size=kernel.shape[1:4])
    x_gradient = on_shares(onednn.input_gradient, gradient, whole=(kernel,))
    kernel_gradient = on_shares(of_size, own, gradient, total=True)
    return x_gradient.astype(x.dtype), kernel_gradient.astype(x.dtype)


@jax.custom_vjp
def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3D convolution, zero-padded to the same size, by the fastest way on the platform it is compiled for.

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x: jax.Array, spatial_dims: int = 3) -> jax.Array:
    """Largest of each 2x2x2 block: [B, D, H, W, C] -> [B, D/2, H/2, W/2, C]; sizes must be even.

    In 2D blocks are 1x2x2 and D stays. The gradient goes to the first largest voxel of a block. Only that voxel's
    number is kept for it, a byte a block.
    """
    return _max_and_corner(x, spatial_dims)[0]


def _max_and_corner(x: jax.Array, spatial_dims: int) -> tuple[jax.Array, jax.Array]:
    """The largest voxel of each block and its number in the block, 0 to 7, uint8."""
    deep = halving(spatial_dims)[0]
    largest, chosen = x[:, ::deep, ::2, ::2], jnp.uint8(0)
    for number in range(1, 4 * deep):
        i, j, k = number // 4, number // 2 % 2, number % 2
        corner = x[:, i::deep, j::2, k::2]
        chosen = jnp.where(corner > largest, jnp.uint8(number), chosen)
        largest = jnp.maximum(largest, corner)
    return largest, chosen


def _max_pool_backward(spatial_dims, chosen, gradient):
    deep = halving(spatial_dims)[0]
    b, d, h, w, c = gradient.shape
    number = np.arange(4 * deep, dtype=np.uint8).reshape(1, 1, deep, 1, 2, 1, 2, 1)
    shape = (b, d, 1, h, 1, w, 1, c)
    blocks = jnp.where(chosen.reshape(shape) == number, gradient.reshape(shape), 0)
    return (blocks.reshape(b, deep * d, 2 * h, 2 * w, c),)


max_pool.defvjp(_max_and_corner, _max_pool_backward)


def from_blocks(blocks: jax.Array) -> jax.Array:
    """Lays 2x2x2 blocks out in space: [B, D, H, W, 8, C] -> [B, 2D, 2H, 2W, C]; or 1x2x2 blocks of 4 voxels."""
    b, d, h, w, size, c = blocks.shape
    deep = size // 4
    split = blocks.reshape(b, d, h, w, deep, 2, 2, c)
    return split.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, deep * d, 2 * h, 2 * w, c)


def upsample_by_two(x: jax.Array, spatial_dims: int = 3) -> jax.Array:
    """Doubles the grid by linear interpolation between voxel centres, consuming a halo of one voxel on each side.

    A coarse voxel i covers fine voxels 2i and 2i + 1, whose centres lie a quarter of a coarse voxel before and after
    its own. The halo makes the result exact up to the border, wherever the piece was cut from.

    Args:
      x: [B, n + 2, n + 2, n + 2, C].
      spatial_dims: 3; in 2D the first of the three axes stays as it is.

    Returns:
      [B, 2n, 2n, 2n, C].
    """
    for axis in (1, 2, 3)[3 - spatial_dims :]:
        n = x.shape[axis] - 2
        before, here, after = (lax.slice_in_dim(x, i, i + n, axis=axis) for i in range(3))
        halves = jnp.stack([0.25 * before + 0.75 * here, 0.75 * here + 0.25 * after], axis=axis + 1)
        x = halves.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
    return x


class Convolution(nnx.Module):
    """A k^3 convolution to the same size, He-initialised; in 2D 1 x k^2."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, *, spatial_dims: int = 3, bias: bool, rngs: nnx.Rngs):
        # The same fan-in as of the kernel's own shape; XLA compiles the flat draw five times as fast.
        flat = nnx.initializers.he_normal(in_axis=1, out_axis=0)(rngs.params(), (outputs, size**spatial_dims * inputs))
        self.kernel = nnx.Param(flat.reshape(outputs, *patch_shape(size, spatial_dims), inputs))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D, H, W, inputs] -> [B, D, H, W, outputs]."""
        y = convolution(x, self.kernel[...].astype(x.dtype))
        if self.bias is None:
            return y
        # In float32: the gradient of the bias is a sum over all voxels whose terms nearly cancel. Summed in bfloat16 on
        # CPUs, it was wrong by as much as itself.
        return (y.astype(jnp.float32) + self.bias[...]).astype(y.dtype)


class Deconvolution(nnx.Module):
    """A 2^3 transposed convolution of stride 2, without bias; in 2D 1 x 2^2.

    Kernel and stride are equal, so blocks of the output do not overlap: one matrix product to 8 values a voxel.
    (Written as an input-dilated convolution its gradient is tens of times slower on some backends.) Normalisation and
    ReLU come before the values are laid out in space, which then costs no pass of its own.
    """

    def __init__(self, inputs: int, outputs: int, *, spatial_dims: int = 3, rngs: nnx.Rngs):
        # Each output voxel sees `inputs` values, not 8 times as many: hence the flat shape for the initialiser.
        flat = nnx.initializers.he_normal(in_axis=1, out_axis=0)(rngs.params(), (2**spatial_dims * outputs, inputs))
        self.kernel = nnx.Param(flat.reshape(*halving(spatial_dims), outputs, inputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D, H, W, inputs] -> [B, D, H, W, 8 or 4, outputs]: each voxel's block, for `from_blocks` to lay out."""
        kernel = self.kernel[...].astype(x.dtype)
        flat = convolution(x, kernel.reshape(-1, 1, 1, 1, kernel.shape[-1]))
        return flat.reshape(*x.shape[:4], -1, kernel.shape[3])


class BatchNormReLU(nnx.Module):
    """Batch normalisation and a ReLU in one, with statistics over the global batch, in float32.

    A layer of the network moves its activations through memory eight times: three forward (statistics, and in and out
    to normalise), five backward (twice the input and the gradient, once the result). Left to itself, the compiler keeps
    the mask, the normalised values and partial gradients, and needs up to twice as many.

    Args:
      channels: C.
      momentum: of the running averages, which `nnx.view(model, use_running_average=True)` puts in their place.
    """

    def __init__(self, channels: int, *, momentum: float):
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(channels)), nnx.BatchStat(jnp.ones(channels))
        self.momentum = momentum
        self.use_running_average = False

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `nnx.view` calls."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D, H, W, C] -> the same shape and type."""
        if self.use_running_average:
            return _scale_shift_relu(x, *_affine(self.mean[...], self.var[...], self.scale[...], self.bias[...]))
        y, mean, variance = batch_norm_relu(x, self.scale[...], self.bias[...])
        self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * mean
        self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * variance
        return y


@jax.custom_vjp
def batch_norm_relu(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """relu((x - mean) / sqrt(variance + EPSILON) * scale + bias) over all but the last axis (Ioffe and Szegedy, 2015).

    Args:
      x: [..., C].
      scale: [C], float32.
      bias: [C], float32.

    Returns:
      The result in the shape and type of x; mean [C]; variance [C], biased. Gradients flow through the first alone.
    """
    mean, variance = _moments(x)
    return _scale_shift_relu(x, *_affine(mean, variance, scale, bias)), mean, variance


def _batch_norm_relu_forward(x, scale, bias):
    y, mean, variance = batch_norm_relu(x, scale, bias)
    return (y, mean, variance), (x, mean, variance, scale, bias)


def _batch_norm_relu_backward(residuals, gradients):
    # The barriers have each of two passes work the mask out from x: the compiler would else keep it in memory.
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
    # slope * (gradient - total / n - normalised x * scale_gradient / n), gathered by powers of x.
    linear = slope * inverse * scale_gradient / count
    x_gradient = slope * gradient - linear * wide + (linear * mean - slope * total / count)
    return x_gradient.astype(x.dtype), scale_gradient, total


batch_norm_relu.defvjp(_batch_norm_relu_forward, _batch_norm_relu_backward)


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of each channel, in float32 and in one pass."""
    wide = x.astype(jnp.float32)
    mean, square = (total * (x.shape[-1] / x.size) for total in _sums(wide, wide * wide))
    return mean, jnp.maximum(square - mean * mean, 0)


def _sums(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Sums of several arrays over all but the last axis, in one pass: [..., C] -> [C] each."""
    voxels = tuple(range(arrays[0].ndim - 1))

    def together(*arrays):
        zero = jnp.zeros((), jnp.float32)
        return tuple(lax.reduce(arrays, (zero,) * len(arrays), lambda a, b: jax.tree.map(jnp.add, a, b), voxels))

    def apart(*arrays):
        return tuple(jnp.sum(array, voxels) for array in arrays)

    # A reduction of several arrays is not vectorised on the CPU, and gathers what devices have added up before it adds.
    split = jax.sharding.get_abstract_mesh().size > 1
    return lax.platform_dependent(*arrays, cpu=apart, default=apart if split else together)


def _affine(mean, variance, scale, bias) -> tuple[jax.Array, jax.Array]:
    """Normalisation as slope * x + shift."""
    slope = scale * lax.rsqrt(variance + EPSILON)
    return slope, bias - slope * mean


def _scale_shift_relu(x: jax.Array, slope: jax.Array, shift: jax.Array) -> jax.Array:
    return jax.nn.relu(x.astype(jnp.float32) * slope + shift).astype(x.dtype)
