"""The auto-context pyramid: one network per level, which sees the coarser level's maps (Roth et al., section 2.2)."""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from autocontext_jax.errors import UserError, require
from autocontext_jax.geometry import CUBES, Spacing, Triple, along_axes, level_scales, level_steps, product, times
from autocontext_jax.images.spec import CT, ImageSpec
from autocontext_jax.models.activations import ACTIVATIONS, activate
from autocontext_jax.models.blocks import NetworkConfig
from autocontext_jax.models.resizing import upsample_by_two
from autocontext_jax.sections import DERIVED

CONTEXTS = ("softmax", "onehot", "none")

# (channels of the input, spacing of the input, random keys) -> a level's network
MakeNetwork = Callable[[int, Spacing, nnx.Rngs], nnx.Module]


@dataclasses.dataclass(frozen=True)
class PyramidConfig:
    """How the pyramid connects its networks.

    Attributes:
      levels: S.
      classes: K outputs of every network: classes, background first, or regions.
      context: what the next level sees of this level's prediction: its `softmax` maps, `onehot` maps, or `none`. With
        regions it sees their sigmoid maps in the place of softmax maps, and as onehot maps 1 where they exceed 0.5.
      stop_gradient: whether the gradient stops between levels, so that a level's loss trains that level alone.
      image: the channels of an image, and how they are normalised.
      spacing: of the finest level along (z, y, x), in any unit; infinite along z for networks that see slices. Which
        axes a level halves follows from it.
      activation: from logits to maps: `softmax` over classes, or one `sigmoid` a region.
    """

    levels: int = dataclasses.field(default=2, metadata=DERIVED)
    classes: int = dataclasses.field(default=2, metadata=DERIVED)
    context: str = "softmax"
    stop_gradient: bool = False
    image: ImageSpec = dataclasses.field(default=CT, metadata=DERIVED)
    spacing: Spacing = dataclasses.field(default=CUBES, metadata=DERIVED)
    activation: str = dataclasses.field(default="softmax", metadata=DERIVED)

    def __post_init__(self):
        require(self.context in CONTEXTS, self, "context", f"one of {', '.join(CONTEXTS)}")
        require(self.activation in ACTIVATIONS, self, "activation", f"one of {', '.join(ACTIVATIONS)}")

    @property
    def steps(self) -> tuple[Triple, ...]:
        """See `geometry.level_steps`."""
        return level_steps(self.spacing, self.levels)

    @property
    def spacings(self) -> tuple[Spacing, ...]:
        """Of each level along (z, y, x), coarsest first, in the unit of `spacing`."""
        return tuple(times(self.spacing, scale) for scale in level_scales(self.spacing, self.levels))


class Pyramid(nnx.Module):
    """S networks, coarsest first.

    The state of a pyramid is its parameters and running averages. Random keys in the networks, such as those of
    `nnx.Dropout`, are removed from it: they must be set with `reseed` before a call that uses them.

    Args:
      config: how the networks are connected.
      network: makes one level's network from its number of input channels, the spacing of its input and the random
        keys.
      rngs: random keys for the parameters.
    """

    def __init__(self, config: PyramidConfig, network: MakeNetwork, *, rngs: nnx.Rngs):
        self.config = config
        channels = len(config.image.channels)
        context_channels = 0 if config.context == "none" else config.classes
        self.networks = nnx.List(
            [
                network(channels + (context_channels if number else 0), spacing, rngs)
                for number, spacing in enumerate(config.spacings)
            ]
        )
        for stream in _random_streams(self):
            stream.shape = stream.key.shape
            del stream.key, stream.count

    def reseed(self, key: jax.Array) -> None:
        """Sets the keys of all random streams in the networks, each to a key of its own.

        Args:
          key: a typed key, such as `jax.random.key(0)`. The same key gives the same random numbers again.
        """
        for number, stream in enumerate(_random_streams(self)):
            own = jax.random.fold_in(key, number)
            # The stream of a module that `nnx.vmap` made has a key for each of its copies.
            stream.key = nnx.RngKey(jax.random.split(own, stream.shape) if stream.shape else own, tag=stream.tag)
            stream.count = nnx.RngCount(jnp.zeros(stream.shape, jnp.uint32), tag=stream.tag)

    def __call__(self, images: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Logits of every level of a batch of pyramid patches, differentiable end to end.

        Args:
          images: for each level, coarsest first, [B, D, H, W, C], as `images.spec` says that they are stored.

        Returns:
          For each level logits [B, D, H, W, K], float32.
        """
        logits: list[jax.Array] = []
        for level, image in enumerate(images, start=1):
            step, activation = self.config.steps[level - 1], self.config.activation
            maps = None if level == 1 else context_of(logits[-1], step, activation)
            logits.append(self.level(level, image, maps))
        return tuple(logits)

    def level(
        self, level: int, image: jax.Array, maps: jax.Array | None, *, scaling: jax.Array | None = None
    ) -> jax.Array:
        """Logits of one level.

        Args:
          level: 1 = coarsest.
          image: [B, D, H, W, C], as it is stored.
          maps: the coarser level's maps over the same region with a halo of one coarse voxel,
            [B, D/2 + 2, H/2 + 2, W/2 + 2, K]; the size itself along an axis that the level does not halve. None at
            level 1.
          scaling: [5, C], how the stored values are normalised, see `ImageSpec.scaling`; None means as `config.image`
            says.

        Returns:
          [B, D, H, W, K], float32.
        """
        x = image.astype(jnp.float32)
        if self.config.image.ct:
            low, gain, offset, bottom, top = self.config.image.scaling() if scaling is None else scaling
            x = jnp.clip((x - low) * gain + offset, bottom, top)
        if level > 1 and self.config.context != "none":
            assert maps is not None, "levels after the first need the maps of the level before"
            if self.config.context == "onehot":
                if self.config.activation == "softmax":
                    maps = jax.nn.one_hot(jnp.argmax(maps, axis=-1), self.config.classes)
                else:
                    maps = maps > 0.5
            if self.config.stop_gradient:
                maps = jax.lax.stop_gradient(maps)
            maps = upsample_by_two(maps.astype(jnp.float32), self.config.steps[level - 1])
            x = jnp.concatenate([x, maps], axis=-1)
        return self.networks[level - 1](x)


def make_pyramid(network: Any, config: Any, pyramid: PyramidConfig, *, seed: int) -> Pyramid:
    """A pyramid with fresh parameters.

    Args:
      network: class of every level's network, (inputs, classes, config, *, rngs).
      config: of the networks, `blocks.NetworkConfig`; each gets it with the spacing of its level.
      pyramid: how the networks are connected.
      seed: of the parameters.
    """

    def make(inputs: int, spacing: Spacing, rngs: nnx.Rngs) -> nnx.Module:
        return network(inputs, pyramid.classes, dataclasses.replace(config, spacing=spacing), rngs=rngs)

    return Pyramid(pyramid, make, rngs=nnx.Rngs(seed))


def divisor(network: NetworkConfig, pyramid: PyramidConfig) -> Triple:
    """What the size of a patch or tile along each axis must be a multiple of, so that every network can pool it."""
    z, y, x = (max(along) for along in zip(*_divisors(network, pyramid), strict=True))  # powers of two
    return z, y, x


def _divisors(network: NetworkConfig, pyramid: PyramidConfig) -> list[Triple]:
    """Of each level's network."""
    return [dataclasses.replace(network, spacing=spacing).divisor for spacing in pyramid.spacings]


def size_unit(network: NetworkConfig, pyramid: PyramidConfig) -> Triple:
    """What the size of a patch or tile must be a multiple of, so that levels too can halve it.

    Along an axis that levels halve, the finer patch starts a quarter of its size into the coarser one.
    """
    halved = zip(divisor(network, pyramid), product(pyramid.steps), strict=True)
    z, y, x = (max(unit, 4 if by > 1 else 1) for unit, by in halved)
    return z, y, x


def check_size(name: str, size: tuple[int, ...], network: NetworkConfig, pyramid: PyramidConfig) -> None:
    """A patch or tile must halve as often as levels and networks halve it along each axis.

    Args:
      name: what a message calls the size, such as "config key predict.tile".
      size: voxels (z, y, x), or one number, see `geometry.along_axes`.
      network: of every level.
      pyramid: how the levels are connected, with the spacing of the finest.

    Raises:
      UserError: it does not halve so often; in 2D z is not 1; with instance normalisation a single voxel would be left.
    """
    flat = math.isinf(pyramid.spacing[0])
    shape = along_axes(size, 2 if flat else 3)
    if flat and shape[0] != 1:
        raise UserError(
            f"{name} is {shape}; expected 1 along z, since levels.spatial_dims is 2: choose {(1, *shape[1:])}"
        )
    expected = size_unit(network, pyramid)
    if any(along % unit for along, unit in zip(shape, expected, strict=True)):
        nearest = tuple(unit * max(1, along // unit) for along, unit in zip(shape, expected, strict=True))
        raise UserError(
            f"{name} is {shape}; expected multiples of {expected} along (z, y, x), since model.depth is "
            f"{network.depth}: choose {nearest}"
        )
    fewest = min(math.prod(map(operator.floordiv, shape, own)) for own in _divisors(network, pyramid))
    if network.norm == "instance" and fewest == 1:
        larger = tuple(along if flat and axis == 0 else 2 * along for axis, along in enumerate(shape))
        raise UserError(
            f"{name} is {shape}; expected a larger one, since model.norm is instance and at the lowest resolution of "
            f"model.depth {network.depth} it is a single voxel, which has no variance: choose {larger}"
        )


def _random_streams(model: nnx.Module) -> list[Any]:
    """Every `nnx.RngStream` in the networks; in a pyramid they have an attribute `shape` besides their own."""
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.RngStream)]


def context_of(logits: jax.Array, step: Triple = (2, 2, 2), activation: str = "softmax") -> jax.Array:
    """Maps over the next level's patch with a halo of one voxel: [B, N, N, N, K] -> [B, (N/2 + 2)^3, K].

    Along an axis that the next level halves (step 2) its patch starts N/4 voxels into this one
    (`geometry.next_level_start`); along the others both patches are the same, and there is no halo.
    """
    z, y, x = (
        slice(size // 4 - 1, 3 * size // 4 + 1) if by == 2 else slice(None)
        for size, by in zip(logits.shape[1:4], step, strict=True)
    )
    # The depth is cropped last: if it is split over devices, they then exchange less.
    return activate(logits[:, :, y, x], activation)[:, z]
