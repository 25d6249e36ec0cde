"""A residual 3D U-Net: units with identity shortcuts inside the U-Net's paths (as Lee et al., 2017)."""

import jax
import jax.numpy as jnp
from flax import nnx

from autocontext_jax.models.blocks import ConvolutionBlock, NetworkConfig, UpsamplingBlock
from autocontext_jax.models.convolution import Convolution
from autocontext_jax.models.resizing import max_pool


class ResidualUnit(nnx.Module):
    """A 3^3 convolution to the unit's channels, and two more whose result is added to that of the first.

    The sum is not normalised: signal and gradient pass from unit to unit (He et al., 2016, "Identity mappings").
    """

    def __init__(self, inputs: int, outputs: int, config: NetworkConfig, rngs: nnx.Rngs):
        self.enter = ConvolutionBlock(inputs, outputs, config, rngs)
        self.inner = ConvolutionBlock(outputs, outputs, config, rngs)
        self.outer = Convolution(outputs, outputs, spatial_dims=config.spatial_dims, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D, H, W, inputs] -> [B, D, H, W, outputs]."""
        x = self.enter(x)
        return x + self.outer(self.inner(x))


class ResidualUNet(nnx.Module):
    """A residual unit for each resolution of the analysis and synthesis paths; shortcuts are added, not concatenated.

    With width 32 and depth 4: units of 32, 64, 128 and 256 channels in the analysis path. Each step of the synthesis
    path is a deconvolution that keeps its channels, a convolution to half of them, the sum with the shortcut, a unit.
    """

    def __init__(self, inputs: int, classes: int, config: NetworkConfig, *, rngs: nnx.Rngs):
        self.dtype, self.spatial_dims = config.dtype, config.spatial_dims
        analysis, synthesis = [], []
        channels = inputs
        for outputs in config.channels:
            analysis.append(ResidualUnit(channels, outputs // 2, config, rngs))
            channels = outputs // 2
        for outputs in reversed(config.channels[:-1]):
            up = UpsamplingBlock(channels, config, rngs)
            narrow = ConvolutionBlock(channels, outputs // 2, config, rngs)
            synthesis.append(nnx.List([up, narrow, ResidualUnit(outputs // 2, outputs // 2, config, rngs)]))
            channels = outputs // 2
        self.analysis = nnx.List(analysis)
        self.synthesis = nnx.List(synthesis)
        self.head = Convolution(channels, classes, size=1, spatial_dims=config.spatial_dims, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D, H, W, inputs] -> logits [B, D, H, W, K], float32."""
        x = x.astype(self.dtype)
        shortcuts: list[jax.Array] = []
        for down in self.analysis:
            x = down(max_pool(x, self.spatial_dims) if shortcuts else x)
            shortcuts.append(x)
        shortcuts.pop()
        for up, narrow, unit in self.synthesis:
            x = unit(narrow(up(x)) + shortcuts.pop())
        return self.head(x).astype(jnp.float32)
