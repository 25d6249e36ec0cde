"""A plain fully convolutional network: the U-Net's paths without its shortcuts (after Long et al., 2015)."""

import jax
import jax.numpy as jnp
from flax import nnx

from autocontext_jax.models.blocks import ConvolutionBlock, NetworkConfig, UpsamplingBlock, analysis_path
from autocontext_jax.models.convolution import Convolution
from autocontext_jax.models.resizing import max_pool


class FCN(nnx.Module):
    """An analysis path of `depth` resolutions as in the U-Net, and a synthesis path without shortcut connections.

    Each resolution of the synthesis path has one deconvolution and one convolution. Detail that pooling removes is
    lost: compared with this network the U-Net shows the benefit of its shortcuts.
    """

    def __init__(self, inputs: int, classes: int, config: NetworkConfig, *, rngs: nnx.Rngs):
        self.dtype, self.steps = config.dtype, config.steps
        self.analysis = analysis_path(inputs, config, rngs)
        synthesis = []
        channels = config.channels[-1]
        for outputs, kernel, step in reversed(list(zip(config.channels, config.kernels, config.steps, strict=False))):
            up = UpsamplingBlock(channels, step, config, rngs)
            synthesis.append(nnx.List([up, ConvolutionBlock(channels, outputs, kernel, config, rngs)]))
            channels = outputs
        self.synthesis = nnx.List(synthesis)
        self.head = Convolution(channels, classes, (1, 1, 1), bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D, H, W, inputs] -> logits [B, D, H, W, K], float32."""
        x = x.astype(self.dtype)
        for resolution, (first, second) in enumerate(self.analysis):
            x = second(first(max_pool(x, self.steps[resolution - 1]) if resolution else x))
        for up, convolution in self.synthesis:
            x = convolution(up(x))
        return self.head(x).astype(jnp.float32)
