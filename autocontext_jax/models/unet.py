"""The 3D U-Net of Çiçek et al. (2016) with same padding, as Roth et al. (2018) stack it."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from autocontext_jax.models import layers


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Size and numerics of a U-Net.

    Attributes:
      width: channels of the first convolution; 32 in the paper.
      depth: resolution levels inside the network; 4 in the paper. A patch edge must divide by 2^(depth - 1).
      norm: `batch` or `none`; without it the 3^3 convolutions have a bias.
      momentum: of the running averages that inference uses.
      dtype: compute type of activations; parameters, statistics, softmax and loss stay float32.
    """

    width: int = 32
    depth: int = 4
    norm: str = "batch"
    momentum: float = 0.99
    dtype: str = "float32"

    @property
    def divisor(self) -> int:
        """What a patch or tile edge must be a multiple of."""
        return 2 ** (self.depth - 1)


class Block(nnx.Module):
    """A layer, its normalisation and a ReLU."""

    def __init__(self, layer: nnx.Module, channels: int, config: UNetConfig):
        self.layer = layer
        batch = config.norm == "batch"
        self.norm = layers.BatchNormReLU(channels, momentum=config.momentum) if batch else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D, H, W, C] -> what the layer gives."""
        x = self.layer(x)
        return jax.nn.relu(x) if self.norm is None else self.norm(x)


class UNet(nnx.Module):
    """Analysis and synthesis paths of `depth` resolutions with shortcut connections.

    With width 32 and depth 4: convolutions C→32→64, 64→64→128, 128→128→256, 256→256→512; deconvolutions that keep their
    channels; convolutions (512+256)→256→256, (256+128)→128→128, (128+64)→64→64; a 1^3 convolution to K.
    """

    def __init__(self, inputs: int, classes: int, config: UNetConfig, *, rngs: nnx.Rngs):
        def conv(channels_in: int, channels_out: int) -> Block:
            layer = layers.Convolution(channels_in, channels_out, bias=config.norm == "none", rngs=rngs)
            return Block(layer, channels_out, config)

        def deconv(channels: int) -> Block:
            return Block(layers.Deconvolution(channels, channels, rngs=rngs), channels, config)

        self.dtype = config.dtype
        analysis, synthesis = [], []
        channels = inputs
        for resolution in range(config.depth):
            inner = config.width * 2**resolution
            analysis.append(nnx.List([conv(channels, inner), conv(inner, 2 * inner)]))
            channels = 2 * inner
        for resolution in reversed(range(config.depth - 1)):
            outer = config.width * 2 ** (resolution + 1)
            synthesis.append(nnx.List([deconv(channels), conv(channels + outer, outer), conv(outer, outer)]))
            channels = outer
        self.analysis = nnx.List(analysis)
        self.synthesis = nnx.List(synthesis)
        self.head = layers.Convolution(channels, classes, size=1, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D, H, W, inputs] -> logits [B, D, H, W, K], float32."""
        x = x.astype(self.dtype)
        shortcuts: list[jax.Array] = []
        for first, second in self.analysis:
            if shortcuts:
                x = layers.max_pool(x)
            x = second(first(x))
            shortcuts.append(x)
        for up, first, second in self.synthesis:
            shortcuts.pop()
            x = second(first(jnp.concatenate([layers.from_blocks(up(x)), shortcuts[-1]], axis=-1)))
        return self.head(x).astype(jnp.float32)
