"""What every backbone is built from: its size and numerics, and blocks of layer, normalisation and ReLU."""

import dataclasses

import jax
from flax import nnx

from autocontext_jax.errors import require
from autocontext_jax.models.convolution import Convolution, Deconvolution
from autocontext_jax.models.normalization import BatchNormReLU
from autocontext_jax.sections import DERIVED


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Size and numerics of a backbone.

    Attributes:
      base_channels: of the first convolution; 32 in the paper.
      depth: number of resolutions inside the network; 4 in the paper. A patch edge must be a multiple of 2^(depth - 1).
      norm: `batch` or `none`; without normalisation the 3^3 convolutions have a bias.
      momentum: of the running averages that inference uses.
      dtype: compute type of activations; parameters, statistics, softmax and loss stay float32. Accelerators multiply
        `float32` in a shorter type unless JAX_DEFAULT_MATMUL_PRECISION is `highest`: TF32 on GPUs, bfloat16 on TPUs.
      spatial_dims: number of spatial dimensions: 3, or 2 with kernels of 3^2 and 2^2 instead of 3^3 and 2^3.
    """

    base_channels: int = 32
    depth: int = 4
    norm: str = "batch"
    momentum: float = 0.99
    dtype: str = "float32"
    spatial_dims: int = dataclasses.field(default=3, metadata=DERIVED)

    def __post_init__(self):
        require(1 <= self.base_channels <= 4096, self, "base_channels", "a number from 1 to 4096")
        require(1 <= self.depth <= 10, self, "depth", "a number from 1 to 10")
        require(self.norm in ("batch", "none"), self, "norm", "one of batch, none")
        require(0 <= self.momentum < 1, self, "momentum", "a fraction in [0, 1)")
        require(self.dtype in ("float32", "bfloat16"), self, "dtype", "one of float32, bfloat16")

    def alone(self) -> "NetworkConfig":
        """The same without the fields that a section adds which extends this one."""
        return NetworkConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(NetworkConfig)})

    @property
    def divisor(self) -> int:
        """The edge of a patch or tile must be a multiple of this."""
        return 2 ** (self.depth - 1)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each resolution's result in the analysis path: 64, 128, 256, 512 in the paper."""
        return tuple(self.base_channels * 2 ** (resolution + 1) for resolution in range(self.depth))


class Block(nnx.Module):
    """A layer, its normalisation and a ReLU."""

    def __init__(self, layer: nnx.Module, channels: int, config: NetworkConfig):
        self.layer = layer
        batch = config.norm == "batch"
        self.norm = BatchNormReLU(channels, momentum=config.momentum) if batch else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D, H, W, C] -> the layer's result, normalised."""
        x = self.layer(x)
        return jax.nn.relu(x) if self.norm is None else self.norm(x)


def convolution_block(inputs: int, outputs: int, config: NetworkConfig, rngs: nnx.Rngs) -> Block:
    """A 3^3 convolution, normalisation and ReLU."""
    layer = Convolution(inputs, outputs, spatial_dims=config.spatial_dims, bias=config.norm == "none", rngs=rngs)
    return Block(layer, outputs, config)


def deconvolution_block(channels: int, config: NetworkConfig, rngs: nnx.Rngs) -> Block:
    """A 2^3 deconvolution of stride 2 that keeps its channels, normalisation and ReLU; `depth_to_space` must follow."""
    return Block(Deconvolution(channels, channels, spatial_dims=config.spatial_dims, rngs=rngs), channels, config)


def analysis_path(inputs: int, config: NetworkConfig, rngs: nnx.Rngs) -> nnx.List:
    """The U-Net's analysis path: for each resolution two 3^3 convolutions, the second with twice as many outputs."""
    path = []
    for outputs in config.channels:
        first = convolution_block(inputs, outputs // 2, config, rngs)
        path.append(nnx.List([first, convolution_block(outputs // 2, outputs, config, rngs)]))
        inputs = outputs
    return nnx.List(path)
