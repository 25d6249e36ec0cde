"""Spatial and intensity augmentation of a batch of pyramid patches, jitted on the device.

One smooth field moves all levels of a patch: it is a function of the position about the patch's centre, evaluated on
each level's own grid, so the levels stay aligned. Positions are voxels of the finest level until a level's crop is
read.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from autocontext_jax.data.augmentation_ranges import AXES, IntensityRanges, SpatialRanges, turning_axes
from autocontext_jax.geometry import PyramidPatch, Triple
from autocontext_jax.runtime import compiler_options

# Accelerators otherwise multiply float32 in TF32 or bfloat16, which moves positions by up to a quarter of a voxel.
EXACT = lax.Precision.HIGHEST

# A sample's key gives one draw for each axis that may be mirrored: its key is folded in with these numbers. A saved run
# repeats its patches only if they stay.
FLIP_DRAWS = {"x": 2, "y": 3, "z": 4}

Augment = Callable[..., tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]]


def make_augment(
    patch: PyramidPatch,
    margins: tuple[Triple | None, ...],
    spatial: SpatialRanges | None,
    intensity: IntensityRanges,
    sharding: jax.sharding.Sharding | None = None,
    *,
    deterministic: bool = False,
) -> Augment:
    """The augmentation of a batch, jitted.

    Args:
      patch: of all levels, with [D, H, W] voxels.
      margins: of each level's crops, coarsest first: `augmentation_ranges.crop_margins` of the same ranges. None at a
        level that is not trained: it has no place in images and labels.
      spatial: None only cuts the margins off.
      intensity: see there.
      sharding: of the result's axes [B, D] over devices; None leaves it to the compiler.
      deterministic: see `runtime.compiler_options`.

    Returns:
      augment(key, numbers, spacing, images, labels) -> (images, labels), where
        key is a typed key;
        numbers [B] are the samples' numbers in the run: a sample's randomness depends on key and number alone, not on
          its place in the batch or on the device;
        spacing [B, 3] is the finest level's, mm;
        images and labels hold for each trained level [B, C, D + 2 m_z, H + 2 m_y, W + 2 m_x] as it is stored and
          [B, D + 2 m_z, H + 2 m_y, W + 2 m_x] uint8;
      and the result holds for each level [B, D, H, W, C] float32 and [B, D, H, W] uint8.
    """
    trained = [(scale, margin) for scale, margin in zip(patch.scales, margins, strict=True) if margin is not None]

    def draw_sample(key, spacing):
        if spatial is None:
            return (None,) * len(trained)
        signs = [jnp.where(_flipped(key, axis), -1, 1) if axis in spatial.flip else 1 for axis in AXES]
        field = _draw_field(jax.random.split(key)[0], spatial, patch, signs)
        return tuple(
            [along / step for along, step in zip(field(spacing, scale), scale, strict=True)] for scale, _ in trained
        )

    def move_sample(key, positions, images, labels):
        image_out, label_out = [], []
        for image, label, position, (_, margin) in zip(images, labels, positions, trained, strict=True):
            if position is None:
                moved = jnp.moveaxis(_centre(image, patch.shape, margin), 0, -1), _centre(label, patch.shape, margin)
            else:
                moved = _resample(image, label, position)
            image_out.append(moved[0].astype(jnp.float32))
            label_out.append(moved[1])
        if spatial is not None and spatial.flip_classes:
            table = jnp.asarray(spatial.flip_numbers or spatial.flip_classes, jnp.uint8)
            label_out = [jnp.where(_flipped(key, "x"), table[label], label) for label in label_out]
        return _change_intensity(jax.random.split(key)[1], image_out, intensity), tuple(label_out)

    def draw(key, numbers, spacing):
        return jax.vmap(draw_sample)(_sample_keys(key, numbers), spacing)

    def move(key, numbers, *arrays):
        return jax.vmap(move_sample)(_sample_keys(key, numbers), *arrays)

    options = compiler_options(jax.default_backend(), deterministic=deterministic)
    draw, move = (jax.jit(program, out_shardings=sharding, compiler_options=options) for program in (draw, move))

    def augment(key, numbers, spacing, images, labels):
        # Two programs: in one, XLA would compute each voxel's position anew for each of the nine reads that need it.
        return move(key, numbers, draw(key, numbers, spacing), images, labels)

    return augment


def make_flip_known(
    flip_classes: tuple[int, ...], sharding: jax.sharding.Sharding | None = None
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """What the samples' cases annotate, after the left and right sides of some are exchanged by `make_augment`.

    Args:
      flip_classes: see `SpatialRanges`.
      sharding: of the result's axis B over devices.

    Returns:
      A function (key, numbers, known) -> known, [B, K] bool each; key and numbers as in `make_augment`.
    """
    if flip_classes == tuple(range(len(flip_classes))):
        return lambda key, numbers, known: known
    table = np.array(flip_classes)

    def flip(key, numbers, known):
        flipped = jax.vmap(lambda own: _flipped(own, "x"))(_sample_keys(key, numbers))
        return jnp.where(flipped[:, None], known[:, table], known)

    return jax.jit(flip, out_shardings=sharding)


def _sample_keys(key: jax.Array, numbers: jax.Array) -> jax.Array:
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)


def _flipped(key: jax.Array, axis: str) -> jax.Array:
    """Whether a sample is mirrored along an axis, if the ranges allow it."""
    return jax.random.bernoulli(jax.random.fold_in(key, FLIP_DRAWS[axis]))


def _draw_field(key: jax.Array, ranges: SpatialRanges, patch: PyramidPatch, signs: Sequence[Any]):
    """A random field as a function (spacing, scale) -> source positions.

    `signs` are those of z, y and x: -1 mirrors the patch along the axis, about its centre, which all levels share.

    It is evaluated on the grid of a patch whose voxels are `scale` (z, y, x) finest voxels wide. Positions and their
    result are voxels of the finest level about the centre, three arrays of the patch's shape.
    """
    # What is drawn for directions that a 2D patch does not have goes unused. The size, and whether the patch
    # moves at all, have keys of their own, so that drawing them changes nothing else.
    moves = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 4), 1 - ranges.probability), 0, 1)
    thickness = np.array(patch.thickness)
    turning, moving = moves * np.array(turning_axes(patch)), moves / thickness
    turn_key, shift_key, elastic_key = jax.random.split(key, 3)
    angles = jax.random.uniform(turn_key, (3,), minval=-1, maxval=1) * np.deg2rad(ranges.rotation) * turning
    shift = jax.random.uniform(shift_key, (3,), minval=-1, maxval=1) * ranges.translation * moving
    size = 1 + moves * ranges.scaling * jax.random.uniform(jax.random.fold_in(key, 3), minval=-1, maxval=1)
    # The control grid spans the coarsest patch; a cubic spline needs one point before and two after the last interval.
    reach = np.array(patch.shape) * patch.scales[0] / 2
    distance = np.where(np.isfinite(thickness), ranges.elastic_spacing / thickness, ranges.elastic_spacing)
    points = (np.ceil(2 * reach / distance).astype(int) + 3).tolist()
    control = ranges.elastic_sigma * jax.random.normal(elastic_key, (3, *points))

    def field(spacing: jax.Array, scale: Triple):
        offsets = [(np.arange(size) + 0.5 - size / 2) * step for size, step in zip(patch.shape, scale, strict=True)]
        weights = [
            spline_weights((along + before) / apart, count)
            for along, before, apart, count in zip(offsets, reach, distance, points, strict=True)
        ]
        elastic = jnp.einsum("cijk,zi,yj,xk->czyx", control, *weights, optimize=True, precision=EXACT)
        elastic = jnp.clip(elastic, -ranges.elastic_limit, ranges.elastic_limit) * moving[:, None, None, None]
        # Rotate in millimetres: voxels need not be cubes.
        turn = size * _rotation(angles) * spacing / spacing[:, None]
        z, y, x = signs[0] * offsets[0][:, None, None], signs[1] * offsets[1][:, None], signs[2] * offsets[2]
        return [turn[i, 0] * z + turn[i, 1] * y + turn[i, 2] * x + shift[i] + elastic[i] for i in range(3)]

    return field


def spline_weights(positions: np.ndarray, points: int) -> np.ndarray:
    """Uniform cubic B-spline basis (the standard four polynomials).

    Args:
      positions: [n], in control intervals; 0 lies at control point 1, so that position t is moved by points
        floor(t) ... floor(t) + 3.
      points: number of control points.

    Returns:
      [n, points], rows sum to 1.
    """
    first = np.clip(np.floor(positions).astype(int), 0, points - 4)
    t = positions - first
    basis = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
    weights = np.zeros((len(positions), points), np.float32)
    for tap in range(4):
        weights[np.arange(len(positions)), first + tap] = basis[tap]
    return weights


def _rotation(angles: jax.Array) -> jax.Array:
    """`augmentation_ranges.rotation_matrix` of traced angles: about z, then y, then x."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    one, zero = jnp.ones(()), jnp.zeros(())
    about_z = jnp.array([[one, zero, zero], [zero, cos[0], -sin[0]], [zero, sin[0], cos[0]]])
    about_y = jnp.array([[cos[1], zero, -sin[1]], [zero, one, zero], [sin[1], zero, cos[1]]])
    about_x = jnp.array([[cos[2], -sin[2], zero], [sin[2], cos[2], zero], [zero, zero, one]])
    return jnp.matmul(jnp.matmul(about_x, about_y, precision=EXACT), about_z, precision=EXACT)


def _resample(image: jax.Array, label: jax.Array, position: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Reads a level's crop at `position`: the image linearly, the label at the nearest voxel.

    Args:
      image: [C, D, H, W], of any type; D may be 1.
      label: [D, H, W], uint8.
      position: three arrays of the patch's shape, voxels of this level about the crop's centre.

    Returns:
      image [..., C] float32 and label uint8, where ... is the shape of the positions.
    """
    shape = label.shape
    base, fraction, nearest = [], [], []
    for along, size in zip(position, shape, strict=True):
        index = jnp.clip(along + (size - 1) / 2, 0, size - 1)
        low = jnp.minimum(jnp.floor(index), max(0, size - 2))
        base.append(low.astype(jnp.int32))
        fraction.append(index - low)
        nearest.append(jnp.round(index).astype(jnp.int32))
    strides = (shape[1] * shape[2], shape[2], 1)

    def flat(indices):
        return sum(index * stride for index, stride in zip(indices, strides, strict=True))

    corner, depths = flat(base), range(min(2, shape[0]))

    def lerp(low, high, weight):
        return low + weight * (high - low)

    def interpolated(channel: jax.Array) -> jax.Array:
        voxels = channel.ravel()

        def corner_value(dz: int, dy: int, dx: int) -> jax.Array:
            offset = dz * strides[0] + dy * strides[1] + dx
            return voxels.at[corner + offset].get(mode="promise_in_bounds").astype(jnp.float32)

        rows = [[lerp(corner_value(i, j, 0), corner_value(i, j, 1), fraction[2]) for j in (0, 1)] for i in depths]
        # The axis of channels is added before the last operation: after it, XLA would copy the image once more.
        planes = [lerp(row[0], row[1], fraction[1])[..., None] for row in rows]
        return planes[0] if len(planes) == 1 else lerp(planes[0], planes[1], fraction[0][..., None])

    labels = label.ravel().at[flat(nearest)].get(mode="promise_in_bounds")
    # A channel at a time: XLA would write all eight corners of several to memory before it interpolates between them.
    return jnp.concatenate([interpolated(channel) for channel in image], axis=-1), labels


def _centre(array: jax.Array, shape: Triple, margin: Triple) -> jax.Array:
    """Without the margins: [..., D + 2 m_z, H + 2 m_y, W + 2 m_x] -> [..., D, H, W]."""
    inside = (slice(m, m + size) for m, size in zip(margin, shape, strict=True))
    return array[..., *inside]


def _change_intensity(key: jax.Array, images: list[jax.Array], ranges: IntensityRanges) -> tuple[jax.Array, ...]:
    """The same shift and contrast for all levels of a sample; noise of the same strength, but independent.

    Each channel of the images, [D, H, W, C], has its own.
    """
    if ranges == IntensityRanges():
        return tuple(images)
    scale_key, shift_key, strength_key, noise_key = jax.random.split(key, 4)
    channels = images[0].shape[-1:]
    scale = 1 + ranges.scale * jax.random.uniform(scale_key, channels, minval=-1, maxval=1)
    shift = ranges.shift * jax.random.uniform(shift_key, channels, minval=-1, maxval=1)
    strength = ranges.noise * jax.random.uniform(strength_key, channels)
    return tuple(
        image * scale + shift + strength * jax.random.normal(level_key, image.shape)
        for level_key, image in zip(jax.random.split(noise_key, len(images)), images, strict=True)
    )
