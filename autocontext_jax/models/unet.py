"""The 3D U-Net of Çiçek et al. (2016) with same padding, as Roth et al. (2018) stack it."""

import jax
import jax.numpy as jnp
from flax import nnx

from autocontext_jax.models.blocks import ConvolutionBlock, NetworkConfig, UpsamplingBlock, analysis_path
from autocontext_jax.models.convolution import Convolution
from autocontext_jax.models.resizing import max_pool


class UNet(nnx.Module):
    """Analysis and synthesis paths of `depth` resolutions with shortcut connections.

    With width 32 and depth 4: convolutions C→32→64, 64→64→128, 128→128→256, 256→256→512; deconvolutions that keep their
    channels; convolutions (512+256)→256→256, (256+128)→128→128, (128+64)→64→64; a 1^3 convolution to K. Kernels are
    3^3 and 2^3, or flat along the axis of thick slices, see `NetworkConfig.kernels`.
    """

    def __init__(self, inputs: int, classes: int, config: NetworkConfig, *, rngs: nnx.Rngs):
        self.dtype, self.steps = config.dtype, config.steps
        self.analysis = analysis_path(inputs, config, rngs)
        synthesis = []
        channels = config.channels[-1]
        for outputs, kernel, step in reversed(list(zip(config.channels, config.kernels, config.steps, strict=False))):
            up = UpsamplingBlock(channels, step, config, rngs)
            first = ConvolutionBlock(channels + outputs, outputs, kernel, config, rngs)
            second = ConvolutionBlock(outputs, outputs, kernel, config, rngs)
            synthesis.append(nnx.List([up, first, second]))
            channels = outputs
        self.synthesis = nnx.List(synthesis)
        self.head = Convolution(channels, classes, (1, 1, 1), bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D, H, W, inputs] -> logits [B, D, H, W, K], float32."""
        x = x.astype(self.dtype)
        shortcuts: list[jax.Array] = []
        for resolution, (first, second) in enumerate(self.analysis):
            x = second(first(max_pool(x, self.steps[resolution - 1]) if resolution else x))
            shortcuts.append(x)
        shortcuts.pop()
        for up, first, second in self.synthesis:
            x = second(first(up(x), shortcuts.pop()))
        return self.head(x).astype(jnp.float32)
