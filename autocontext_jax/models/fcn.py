"""A plain fully convolutional network: the U-Net's paths without its shortcuts (after Long et al., 2015)."""

import jax
import jax.numpy as jnp
from flax import nnx

from autocontext_jax.models import layers
from autocontext_jax.models.network import NetworkConfig, analysis_path, convolution_block, deconvolution_block


class FCN(nnx.Module):
    """Down through `depth` resolutions with two 3^3 convolutions each, up again with one deconvolution each.

    What is lost in pooling stays lost: against it the U-Net shows what shortcuts are worth.
    """

    def __init__(self, inputs: int, classes: int, config: NetworkConfig, *, rngs: nnx.Rngs):
        self.dtype, self.spatial_dims = config.dtype, config.spatial_dims
        self.analysis = analysis_path(inputs, config, rngs)
        synthesis = []
        channels = config.channels[-1]
        for outputs in reversed(config.channels[:-1]):
            up = deconvolution_block(channels, config, rngs)
            synthesis.append(nnx.List([up, convolution_block(channels, outputs, config, rngs)]))
            channels = outputs
        self.synthesis = nnx.List(synthesis)
        self.head = layers.Convolution(
            channels, classes, size=1, spatial_dims=config.spatial_dims, bias=True, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D, H, W, inputs] -> logits [B, D, H, W, K], float32."""
        x = x.astype(self.dtype)
        for resolution, (first, second) in enumerate(self.analysis):
            x = second(first(layers.max_pool(x, self.spatial_dims) if resolution else x))
        for up, convolution in self.synthesis:
            x = convolution(layers.from_blocks(up(x)))
        return self.head(x).astype(jnp.float32)
