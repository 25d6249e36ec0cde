"""The auto-context pyramid: a network a level, each seeing the maps of the level before (Roth et al., section 2.2)."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from autocontext_jax.errors import require
from autocontext_jax.models import layers

CONTEXTS = ("softmax", "onehot", "none")


@dataclasses.dataclass(frozen=True)
class PyramidConfig:
    """What the pyramid adds to its networks.

    Attributes:
      levels: S.
      classes: K, background first.
      context: what the next level sees of this level's prediction: its `softmax` maps, `onehot` maps, or `none`.
      stop_gradient: True keeps a level's loss from training the levels before it.
      window: HU that map to -1 and 1; beyond, intensities are clipped.
      spatial_dims: 3, or 2 for images that are seen slice by slice: D below is then any number of slices, the same at
        every level.
    """

    levels: int = 2
    classes: int = 2
    context: str = "softmax"
    stop_gradient: bool = False
    window: tuple[float, float] = (-500.0, 500.0)
    spatial_dims: int = 3

    def __post_init__(self):
        require(self.context in CONTEXTS, self, "context", f"one of {', '.join(CONTEXTS)}")
        low, high = self.window
        require(low < high, self, "window", "(low, high) in HU with low < high")


class Pyramid(nnx.Module):
    """S networks, coarsest first.

    Args:
      config: see there.
      network: makes one level's network from its number of input channels and the random keys.
      rngs: keys for the parameters.
    """

    def __init__(self, config: PyramidConfig, network: Callable[[int, nnx.Rngs], nnx.Module], *, rngs: nnx.Rngs):
        self.config = config
        context_channels = 0 if config.context == "none" else config.classes
        self.networks = nnx.List(
            [network(1 if level == 0 else 1 + context_channels, rngs) for level in range(config.levels)]
        )

    def __call__(self, images: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Logits of every level of a batch of pyramid patches, differentiable end to end.

        Args:
          images: for each level, coarsest first, [B, N, N, N] in HU.

        Returns:
          For each level logits [B, N, N, N, K], float32.
        """
        logits: list[jax.Array] = []
        for level, image in enumerate(images, start=1):
            maps = None if level == 1 else context_of(logits[-1], self.config.spatial_dims)
            logits.append(self.level(level, image, maps))
        return tuple(logits)

    def level(self, level: int, image: jax.Array, maps: jax.Array | None) -> jax.Array:
        """Logits of one level.

        Args:
          level: 1 = coarsest.
          image: [B, D, H, W] in HU.
          maps: the coarser level's softmax maps over the same region with a halo of one coarse voxel,
            [B, D/2 + 2, H/2 + 2, W/2 + 2, K], in 2D [B, D, H/2 + 2, W/2 + 2, K]; None at level 1.

        Returns:
          [B, D, H, W, K], float32.
        """
        low, high = self.config.window
        x = jnp.clip((image.astype(jnp.float32) - low) * (2 / (high - low)) - 1, -1, 1)[..., None]
        if level > 1 and self.config.context != "none":
            assert maps is not None, "levels after the first need the maps of the level before"
            if self.config.context == "onehot":
                maps = jax.nn.one_hot(jnp.argmax(maps, axis=-1), self.config.classes)
            if self.config.stop_gradient:
                maps = jax.lax.stop_gradient(maps)
            maps = layers.upsample_by_two(maps.astype(jnp.float32), self.config.spatial_dims)
            x = jnp.concatenate([x, maps], axis=-1)
        return self.networks[level - 1](x)


def context_of(logits: jax.Array, spatial_dims: int = 3) -> jax.Array:
    """Softmax maps over the next level's patch with a halo of one voxel: [B, N, N, N, K] -> [B, (N/2 + 2)^3, K].

    The next level's patch starts N/4 voxels into this one (`geometry.next_level_start`). In 2D D stays.
    """
    edge = logits.shape[2]
    inner = slice(edge // 4 - 1, 3 * edge // 4 + 1)
    # The depth last: where it is split over devices, they exchange the less.
    maps = jax.nn.softmax(logits[:, :, inner, inner])
    return maps[:, inner] if spatial_dims == 3 else maps
