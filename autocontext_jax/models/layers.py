"""Convolution, deconvolution, pooling and normalisation; the only file that knows a platform.

Shapes are [B, D, H, W, C]. A layer computes in its input's type; parameters are float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


def direct_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """XLA's own 3D convolution, zero-padded to the same size.

    Args:
      x: [B, D, H, W, C].
      kernel: [k, k, k, C, O], k odd.

    Returns:
      [B, D, H, W, O].
    """
    return lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))


def planar_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same function as a sum of 2D convolutions, one for each plane of the kernel.

    XLA's CPU backend runs a 2D convolution several times as fast as a 3D one. Shifting the results along the depth,
    not the input, lets all of them read the same array and the shifts melt into the sum.
    """
    batch, depth, height, width, channels = x.shape
    reach = kernel.shape[0] // 2
    planes = x.reshape(batch * depth, height, width, channels)
    total = jnp.zeros((), x.dtype)
    for number, plane in enumerate(kernel):
        y = lax.conv_general_dilated(planes, plane, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        # This kernel plane takes x[z] into output z + reach - number; negative padding drops what falls outside.
        shift = reach - number
        shifted = ((0, 0, 0), (shift, -shift, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0))
        total = total + lax.pad(y.reshape(batch, depth, height, width, -1), jnp.zeros((), x.dtype), shifted)
    return total


def planar_filter_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Gradient of `planar_convolution` with respect to a 3x3x3 kernel: one matrix product a plane of the volume.

    The 9 in-plane neighbours of one plane (a matrix that fits the cache) meet the gradients of the three planes that
    see it. XLA's own rule builds the neighbours of the whole volume and took two to three times as long with up to
    64 channels.

    Args:
      x: [B, D, H, W, C], the convolution's input.
      gradient: [B, D, H, W, O], with respect to its output.

    Returns:
      [3, 3, 3, C, O].
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
    return total.reshape(3, outputs, 3, 3, channels).transpose(0, 2, 3, 4, 1).astype(x.dtype)


@jax.custom_vjp
def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3D convolution, zero-padded to the same size, by the fastest way on the platform it is compiled for.

    Args:
      x: [B, D, H, W, C].
      kernel: [k, k, k, C, O], k odd.

    Returns:
      [B, D, H, W, O].
    """
    return lax.platform_dependent(x, kernel, cpu=planar_convolution, default=direct_convolution)


def _convolution_forward(x, kernel):
    return convolution(x, kernel), (x, kernel)


def _convolution_backward(residuals, gradient):
    return lax.platform_dependent(*residuals, gradient, cpu=_planar_gradients, default=_direct_gradients)


def _direct_gradients(x, kernel, gradient):
    return jax.vjp(direct_convolution, x, kernel)[1](gradient)


def _planar_gradients(x, kernel, gradient):
    flipped = kernel[::-1, ::-1, ::-1].swapaxes(-1, -2)
    x_gradient = planar_convolution(gradient, flipped)
    # With many channels XLA's rule is one large matrix product already.
    if kernel.shape[0] != 3 or kernel.shape[-1] * kernel.shape[-2] >= 128**2:
        return x_gradient, jax.vjp(lambda k: planar_convolution(x, k), kernel)[1](gradient)[0]
    return x_gradient, planar_filter_gradient(x, gradient)


convolution.defvjp(_convolution_forward, _convolution_backward)


def max_pool(x: jax.Array) -> jax.Array:
    """Largest of each 2x2x2 block: [B, D, H, W, C] -> [B, D/2, H/2, W/2, C]; sizes must be even."""
    b, d, h, w, c = x.shape
    return x.reshape(b, d // 2, 2, h // 2, 2, w // 2, 2, c).max(axis=(2, 4, 6))


def upsample_by_two(x: jax.Array) -> jax.Array:
    """Doubles the grid by linear interpolation between voxel centres, consuming a halo of one voxel on each side.

    A coarse voxel i covers fine voxels 2i and 2i + 1, whose centres lie a quarter of a coarse voxel before and after
    its own. The halo makes the result exact up to the border, wherever the piece was cut from.

    Args:
      x: [B, n + 2, n + 2, n + 2, C].

    Returns:
      [B, 2n, 2n, 2n, C].
    """
    for axis in (1, 2, 3):
        n = x.shape[axis] - 2
        before, here, after = (lax.slice_in_dim(x, i, i + n, axis=axis) for i in range(3))
        halves = jnp.stack([0.25 * before + 0.75 * here, 0.75 * here + 0.25 * after], axis=axis + 1)
        x = halves.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
    return x


class Convolution(nnx.Module):
    """A k^3 convolution to the same size, He-initialised."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, *, bias: bool, rngs: nnx.Rngs):
        # The same fan-in as [size, size, size, inputs, outputs]; XLA compiles the flat draw five times as fast.
        flat = nnx.initializers.he_normal()(rngs.params(), (size**3 * inputs, outputs))
        self.kernel = nnx.Param(flat.reshape(size, size, size, inputs, outputs))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D, H, W, inputs] -> [B, D, H, W, outputs]."""
        kernel = self.kernel[...].astype(x.dtype)
        # A 1^3 kernel is a matrix product and needs no convolution.
        x = x @ kernel[0, 0, 0] if kernel.shape[0] == 1 else convolution(x, kernel)
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)


class Deconvolution(nnx.Module):
    """A 2^3 transposed convolution of stride 2, without bias.

    Kernel and stride are equal, so blocks of the output do not overlap: one matrix product to 8 values a voxel, laid
    out in space. (Written as an input-dilated convolution its gradient is tens of times slower on some backends.)
    """

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        # Each output voxel sees `inputs` values, not 8 times as many: hence the flat shape for the initialiser.
        flat = nnx.initializers.he_normal()(rngs.params(), (inputs, 8 * outputs))
        self.kernel = nnx.Param(flat.reshape(inputs, 2, 2, 2, outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D, H, W, inputs] -> [B, 2D, 2H, 2W, outputs]."""
        b, d, h, w, _ = x.shape
        kernel = self.kernel[...].astype(x.dtype)
        blocks = (x @ kernel.reshape(kernel.shape[0], -1)).reshape(b, d, h, w, 2, 2, 2, -1)
        return blocks.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, 2 * d, 2 * h, 2 * w, -1)


def normalisation(kind: str, channels: int, *, momentum: float, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
    """A normalisation layer by name: `batch` (statistics over the global batch, in float32) or `none` (None)."""
    if kind == "none":
        return None
    return nnx.BatchNorm(channels, momentum=momentum, epsilon=1e-5, dtype=dtype, rngs=rngs)
