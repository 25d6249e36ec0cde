"""What every backbone is built from: its size and numerics, and blocks of layer, normalisation and ReLU."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from autocontext_jax.errors import require
from autocontext_jax.geometry import CUBES, Spacing, Triple, halvings, product
from autocontext_jax.models.convolution import Convolution, Deconvolution
from autocontext_jax.models.fixed_normalization import convolution_relu, deconvolution_relu
from autocontext_jax.models.normalization import BatchNormReLU, GroupNormReLU, group_size
from autocontext_jax.models.resizing import depth_to_space
from autocontext_jax.sections import DERIVED

NORMS = ("batch", "instance", "group", "none")


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Size and numerics of a backbone.

    Attributes:
      base_channels: of the first convolution; 32 in the paper.
      depth: number of resolutions inside the network; 4 in the paper. The size of a patch must be a multiple of
        2^(depth - 1), along the axis of thick slices of less.
      norm: the normalisation after each 3^3 convolution and deconvolution. `batch`: by statistics of the batch, at
        inference by running averages of them. `instance`: each sample's channels by their own mean and variance;
        `group`: each sample's groups of channels by theirs, of 8 channels or of the largest number below that divides
        them. Both are the same at inference. In 2D each slice is a sample. `none`: the 3^3 convolutions have a bias.
      momentum: of batch norm's running averages.
      dtype: compute type of activations; parameters, statistics, softmax and loss stay float32. Accelerators multiply
        `float32` in a shorter type unless JAX_DEFAULT_MATMUL_PRECISION is `highest`: TF32 on GPUs, bfloat16 on TPUs.
      spacing: of the network's input along (z, y, x), in any unit; infinite along an axis that it does not look along.
        Kernels and pooling follow from it.
    """

    base_channels: int = 32
    depth: int = 4
    norm: str = "batch"
    momentum: float = 0.99
    dtype: str = "float32"
    spacing: Spacing = dataclasses.field(default=CUBES, metadata=DERIVED)

    def __post_init__(self):
        require(1 <= self.base_channels <= 4096, self, "base_channels", "a number from 1 to 4096")
        require(1 <= self.depth <= 10, self, "depth", "a number from 1 to 10")
        require(self.norm in NORMS, self, "norm", f"one of {', '.join(NORMS)}")
        require(0 <= self.momentum < 1, self, "momentum", "a fraction in [0, 1)")
        require(self.dtype in ("float32", "bfloat16"), self, "dtype", "one of float32, bfloat16")

    def alone(self) -> "NetworkConfig":
        """The same without the fields that a section adds which extends this one."""
        return NetworkConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(NetworkConfig)})

    @property
    def steps(self) -> tuple[Triple, ...]:
        """By how much each resolution but the first has fewer voxels than the one before along each axis: 1 or 2."""
        return halvings(self.spacing, self.depth - 1)

    @property
    def kernels(self) -> tuple[Triple, ...]:
        """Sizes of the kernels at each resolution: 3 along the axes that are, or could be, pooled next; 1 along others.

        nnU-Net's rule (Isensee et al., 2021): flat as long as the voxels are twice as long along this axis.
        """
        flat = halvings(self.spacing, self.depth)
        return tuple((2 * z - 1, 2 * y - 1, 2 * x - 1) for z, y, x in flat)

    @property
    def divisor(self) -> Triple:
        """The size of a patch or tile along each axis must be a multiple of this."""
        return product(self.steps)

    @property
    def normalizes_by_sample(self) -> bool:
        """Whether statistics are those of each sample, at inference too: results then depend on a tile's size."""
        return self.norm in ("instance", "group")

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each resolution's result in the analysis path: 64, 128, 256, 512 in the paper."""
        return tuple(self.base_channels * 2 ** (resolution + 1) for resolution in range(self.depth))


def make_norm(channels: int, config: NetworkConfig) -> BatchNormReLU | GroupNormReLU | None:
    """The normalisation of so many channels, with its ReLU; None without one."""
    if config.norm == "none":
        return None
    if config.norm == "batch":
        return BatchNormReLU(channels, momentum=config.momentum)
    # In 2D each of the D slices is a sample, as no layer connects them.
    sample_axes = 2 if math.isinf(config.spacing[0]) else 1
    group = group_size(channels) if config.norm == "group" else 1
    return GroupNormReLU(channels, group=group, sample_axes=sample_axes)


class ConvolutionBlock(nnx.Module):
    """A convolution, normalisation and ReLU.

    Args:
      inputs: channels of the input; of several arrays together.
      outputs: channels of the result.
      kernel: size along (z, y, x).
      config: of the network.
      rngs: random keys for the parameters.
    """

    def __init__(self, inputs: int, outputs: int, kernel: Triple, config: NetworkConfig, rngs: nnx.Rngs):
        self.layer = Convolution(inputs, outputs, kernel, bias=config.norm == "none", rngs=rngs)
        self.norm = make_norm(outputs, config)

    def __call__(self, *xs: jax.Array) -> jax.Array:
        """Arrays [B, D, H, W, C], concatenated along their channels -> the layer's result, normalised."""
        if isinstance(self.norm, BatchNormReLU) and self.norm.use_running_average:
            return convolution_relu(xs, self.layer.kernel[...], *self.norm.affine())
        x = self.layer(jnp.concatenate(xs, axis=-1) if len(xs) > 1 else xs[0])
        return jax.nn.relu(x) if self.norm is None else self.norm(x)


class UpsamplingBlock(nnx.Module):
    """A deconvolution that keeps its channels, normalisation and ReLU: it brings the grid back that pooling halved.

    Args:
      channels: of the input and of the result.
      step: by how much the grid grows along (z, y, x), 1 or 2.
      config: of the network.
      rngs: random keys for the parameters.
    """

    def __init__(self, channels: int, step: Triple, config: NetworkConfig, rngs: nnx.Rngs):
        self.step = step
        self.layer = Deconvolution(channels, channels, step, rngs=rngs)
        self.norm = make_norm(channels, config)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D, H, W, C] -> [B, 2D, 2H, 2W, C], without the factor along an axis whose step is 1."""
        if isinstance(self.norm, BatchNormReLU) and self.norm.use_running_average:
            return deconvolution_relu(x, self.layer.kernel[...], *self.norm.affine())
        # Before depth-to-space, which then needs no pass of its own.
        blocks = self.layer(x)
        return depth_to_space(jax.nn.relu(blocks) if self.norm is None else self.norm(blocks), self.step)


def analysis_path(inputs: int, config: NetworkConfig, rngs: nnx.Rngs) -> nnx.List:
    """The U-Net's analysis path: for each resolution two convolutions, the second with twice as many outputs."""
    path = []
    for outputs, kernel in zip(config.channels, config.kernels, strict=True):
        first = ConvolutionBlock(inputs, outputs // 2, kernel, config, rngs)
        path.append(nnx.List([first, ConvolutionBlock(outputs // 2, outputs, kernel, config, rngs)]))
        inputs = outputs
    return nnx.List(path)
