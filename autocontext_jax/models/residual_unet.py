"""A residual 3D U-Net: units with identity shortcuts inside the U-Net's paths (as Lee et al., 2017)."""

import jax
import jax.numpy as jnp
from flax import nnx

from autocontext_jax.geometry import Triple
from autocontext_jax.models.blocks import ConvolutionBlock, NetworkConfig, UpsamplingBlock
from autocontext_jax.models.convolution import Convolution
from autocontext_jax.models.resizing import max_pool


class ResidualUnit(nnx.Module):
    """A convolution to the unit's channels, and two more whose result is added to that of the first.

    The sum is not normalised: signal and gradient pass from unit to unit (He et al., 2016, "Identity mappings").
    """

    def __init__(self, inputs: int, outputs: int, kernel: Triple, config: NetworkConfig, rngs: nnx.Rngs):
        self.enter = ConvolutionBlock(inputs, outputs, kernel, config, rngs)
        self.inner = ConvolutionBlock(outputs, outputs, kernel, config, rngs)
        self.outer = Convolution(outputs, outputs, kernel, bias=True, rngs=rngs)

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
        self.dtype, self.steps = config.dtype, config.steps
        analysis, synthesis = [], []
        channels = inputs
        for outputs, kernel in zip(config.channels, config.kernels, strict=True):
            analysis.append(ResidualUnit(channels, outputs // 2, kernel, config, rngs))
            channels = outputs // 2
        for outputs, kernel, step in reversed(list(zip(config.channels, config.kernels, config.steps, strict=False))):
            up = UpsamplingBlock(channels, step, config, rngs)
            narrow = ConvolutionBlock(channels, outputs // 2, kernel, config, rngs)
            synthesis.append(nnx.List([up, narrow, ResidualUnit(outputs // 2, outputs // 2, kernel, config, rngs)]))
            channels = outputs // 2
        self.analysis = nnx.List(analysis)
        self.synthesis = nnx.List(synthesis)
        self.head = Convolution(channels, classes, (1, 1, 1), bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D, H, W, inputs] -> logits [B, D, H, W, K], float32."""
        x = x.astype(self.dtype)
        shortcuts: list[jax.Array] = []
        for resolution, down in enumerate(self.analysis):
            x = down(max_pool(x, self.steps[resolution - 1]) if resolution else x)
            shortcuts.append(x)
        shortcuts.pop()
        for up, narrow, unit in self.synthesis:
            x = unit(narrow(up(x)) + shortcuts.pop())
        return self.head(x).astype(jnp.float32)
