"""The augmentation against SciPy, against itself elsewhere in a batch, and at its ranges."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.interpolate import BSpline
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from autocontext_jax.data import augment
from autocontext_jax.data.augment import make_augment, make_flip_known
from autocontext_jax.data.augmentation_ranges import AugmentationConfig, IntensityRanges, SpatialRanges, crop_margins
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.geometry import cube

pytestmark = pytest.mark.usefixtures("compiled_quickly")

EDGE, LEVELS = 8, 2
PATCH = cube(EDGE, LEVELS)
SPACING = (2.5, 0.8, 0.7)
SPATIAL = SpatialRanges(rotation=8, translation=3, elastic_sigma=2, elastic_spacing=6)
MARGINS = crop_margins(PATCH, SPACING, SPATIAL)
KEY = 7
INTENSITY = IntensityRanges(noise=20, shift=50, scale=0.25)


def crops(samples: int, margins=MARGINS, seed: int = 0):
    """Random crops of every level: images, labels, spacing."""
    rng = np.random.default_rng(seed)
    shapes = [(samples, *(EDGE + 2 * m for m in margin)) for margin in margins]
    images = tuple(rng.integers(-1024, 3000, shape).astype(np.int16) for shape in shapes)
    labels = tuple(rng.integers(0, 5, shape).astype(np.uint8) for shape in shapes)
    return images, labels, np.array([SPACING] * samples, np.float32)


def numpy_augment(intensity: IntensityRanges):
    """(numbers, images, labels, spacing) -> augmented images, labels as numpy; compiled once a batch size."""
    run, key = make_augment(PATCH, MARGINS, SPATIAL, intensity), jax.random.key(KEY)

    def apply(numbers, images, labels, spacing):
        return augmented(run, key, numbers, spacing, images, labels)

    return apply


def augmented(run, key, numbers, spacing, images, labels):
    """As numpy arrays; of the one channel [B, ...], before and after."""
    channels = tuple(image[:, None] for image in images)
    image_out, label_out = run(key, np.asarray(numbers, np.uint32), spacing, channels, labels)
    return tuple(np.array(image)[..., 0] for image in image_out), tuple(map(np.array, label_out))


@pytest.fixture(scope="module")
def full():
    return numpy_augment(INTENSITY)


@pytest.fixture(scope="module")
def plain():
    return numpy_augment(IntensityRanges())


@pytest.mark.parametrize(
    ("spatial", "margins"),
    [(None, ((0, 0, 0),) * 2), (None, ((1, 2, 3), (4, 3, 1))), (SpatialRanges(0, 0, 0), ((1, 2, 3), (4, 3, 1)))],
    ids=["none", "margins alone", "zero ranges"],
)
def test_zero_limits_are_the_identity(spatial, margins):
    images, labels, spacing = crops(2, margins)
    run = make_augment(PATCH, margins, spatial, IntensityRanges())
    image_out, label_out = augmented(run, jax.random.key(0), np.arange(2, dtype=np.uint32), spacing, images, labels)
    for before, after in zip(images + labels, image_out + label_out, strict=True):
        margin = [(size - EDGE) // 2 for size in before.shape[1:]]
        inner = before[(slice(None), *(slice(m, m + EDGE) for m in margin))]
        assert after.dtype == (np.float32 if before.dtype == np.int16 else np.uint8)
        np.testing.assert_array_equal(after, inner)


@pytest.mark.parametrize("spacing", [1, 6, 7.5])
def test_spline_weights_are_scipys(spacing):
    reach = 24
    points = int(np.ceil(2 * reach / spacing)) + 3
    positions = np.concatenate([(np.arange(-reach, reach) + 0.5 + reach) / spacing, [0, 2 * reach / spacing]])
    weights = augment.spline_weights(positions, points)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    assert (weights >= 0).all()
    # Control point i is the centre of basis function i: position t lies at control point t + 1.
    reference = BSpline.design_matrix(positions, np.arange(-3.0, points + 1), 3).toarray()
    np.testing.assert_allclose(weights, reference, atol=1e-6)


def test_resampling_is_scipys():
    images, labels, _ = crops(1)
    image, label = images[0][0], labels[0][0]
    rng = np.random.default_rng(1)
    centre = (np.array(image.shape) - 1) / 2
    position = (rng.uniform(-0.7, 0.7, (3, EDGE, EDGE, EDGE)) * np.array(image.shape)[:, None, None, None]).astype("f4")
    position[:, 0, 0, :2] = np.stack([-centre, centre], axis=1)  # the very corners
    index = position.astype(np.float64) + centre[:, None, None, None]
    assert (index < 0).any()  # some beyond the crop: its border goes on
    moved, nearest = jax.jit(augment._resample)(image[None], label, list(position))
    expected = map_coordinates(image.astype(np.float64), index, order=1, mode="nearest")
    np.testing.assert_allclose(moved[..., 0], expected, atol=0.1)  # float32 positions, steps of 4000 HU
    inside = np.clip(np.rint(index), 0, np.array(image.shape)[:, None, None, None] - 1).astype(int)
    np.testing.assert_array_equal(nearest, label[tuple(inside)])


def mirrored(key: int, number: int, axes: str) -> dict[str, bool]:
    """Along which axes a sample is mirrored. These draws stay: a run that goes on repeats them."""
    own = jax.random.fold_in(jax.random.key(key), number)
    draws = {"x": 2, "y": 3, "z": 4}
    return {axis: axis in axes and bool(jax.random.bernoulli(jax.random.fold_in(own, draws[axis]))) for axis in "zyx"}


def positions(number: int, scale: int, flip: str = "") -> np.ndarray:
    """[3, N, N, N] finest voxels about the centre: the field of a sample's draws, by SciPy in float64."""
    key = jax.random.split(jax.random.fold_in(jax.random.key(KEY), number))[0]
    turn_key, shift_key, elastic_key = jax.random.split(key, 3)
    reach = EDGE * 2 ** (LEVELS - 1) / 2
    points = int(np.ceil(2 * reach / SPATIAL.elastic_spacing)) + 3
    z, y, x = np.deg2rad(SPATIAL.rotation) * np.array(jax.random.uniform(turn_key, (3,), minval=-1, maxval=1))
    shift = SPATIAL.translation * np.array(jax.random.uniform(shift_key, (3,), minval=-1, maxval=1))
    control = SPATIAL.elastic_sigma * np.array(jax.random.normal(elastic_key, (3, points, points, points)))

    offsets = (np.arange(EDGE) - (EDGE - 1) / 2) * scale
    elastic = control
    for axis in (1, 2, 3):
        spline = BSpline(np.arange(-3.0, points + 1), np.moveaxis(elastic, axis, 0), 3)
        elastic = np.moveaxis(spline((offsets + reach) / SPATIAL.elastic_spacing), 0, axis)
    mm = np.stack(np.meshgrid(offsets, offsets, offsets, indexing="ij"), axis=-1) * SPACING
    mm *= [-1 if mirror else 1 for mirror in mirrored(KEY, number, flip).values()]
    turned = mm @ Rotation.from_euler("xyz", [z, -y, x]).as_matrix().T / SPACING
    limit = SPATIAL.elastic_limit
    return np.moveaxis(turned + shift, -1, 0) + np.clip(elastic, -limit, limit)


@pytest.mark.parametrize("flip", ["", "zyx"])
def test_a_batch_is_its_field_resampled(plain, flip):
    """The whole function against SciPy; first mirrored, then turned and bent."""
    images, labels, spacing = crops(3)
    numbers = [4, 5, 2]
    if flip:
        ranges = dataclasses.replace(SPATIAL, flip=flip, flip_classes=(0, 2, 1, 3, 4))
        assert crop_margins(PATCH, SPACING, ranges) == MARGINS
        run = make_augment(PATCH, MARGINS, ranges, IntensityRanges())
        image_out, label_out = augmented(run, jax.random.key(KEY), numbers, spacing, images, labels)
        each = [mirrored(KEY, number, flip) for number in numbers]
        assert {(axis, one[axis]) for one in each for axis in flip} == {(a, b) for a in flip for b in (False, True)}
    else:
        image_out, label_out = plain(numbers, images, labels, spacing)
    for sample, number in enumerate(numbers):
        for level, scale in enumerate((2, 1)):
            image, label = images[level][sample], labels[level][sample]
            middle = (np.array(image.shape)[:, None, None, None] - 1) / 2
            index = positions(number, scale, flip) / scale + middle
            assert (index >= 0).all()
            assert (index <= 2 * middle).all()
            expected = map_coordinates(image.astype(np.float64), index, order=1)
            np.testing.assert_allclose(image_out[level][sample], expected, atol=0.2)  # float32, steps of 4000 HU
            tie = (np.abs(index % 1 - 0.5) < 1e-4).any(axis=0)
            nearest = label[tuple(np.rint(index).astype(int))]
            if mirrored(KEY, number, flip)["x"]:
                nearest = np.array([0, 2, 1, 3, 4])[nearest]
            np.testing.assert_array_equal(label_out[level][sample][~tie], nearest[~tie])


def test_a_sample_depends_on_key_and_number_alone(full, plain):
    images, labels, spacing = crops(3)
    first = full([5, 6, 7], images, labels, spacing)
    # The intensity augmentation does not change the field.
    without_intensity = plain([5, 6, 7], images, labels, spacing)
    jax.tree.map(np.testing.assert_array_equal, first[1], without_intensity[1])
    again = full([5, 6, 7], images, labels, spacing)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    order = [2, 0, 1]
    turned = full([7, 5, 6], *jax.tree.map(lambda array: array[order], (images, labels, spacing)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), first, turned)
    # A device that holds one sample: the same up to rounding of float32 (and of a position to its nearest voxel).
    image_out, label_out = full([6], *jax.tree.map(lambda array: array[1:2], (images, labels, spacing)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1:2], b, atol=0.1), first[0], image_out)
    assert all((a[1:2] == b).mean() > 0.99 for a, b in zip(first[1], label_out, strict=True))
    # Another number moves the same crop elsewhere.
    others = full([5, 8, 9], images, labels, spacing)
    for level in range(LEVELS):
        np.testing.assert_array_equal(first[0][level][0], others[0][level][0])
        assert np.abs(first[0][level][1:] - others[0][level][1:]).mean() > 50
        assert (first[1][level][1:] != others[1][level][1:]).mean() > 0.2


def test_two_samples_of_one_crop_differ(full):
    images, labels, spacing = jax.tree.map(lambda array: np.repeat(array, 3, axis=0), crops(1))
    image_out, _ = full([0, 1, 2], images, labels, spacing)
    for image in image_out:
        assert np.abs(image[0] - image[1]).mean() > 50
        assert np.abs(image[1] - image[2]).mean() > 50


def test_outside_is_air_and_background(plain):
    """A crop half of which is air, as the store reads beyond a scan: what is read there is air and background."""
    images, labels, spacing = crops(3)
    for image, label in zip(images, labels, strict=True):
        image[:], label[:] = 500, 1
        image[:, :, : image.shape[2] // 2] = -1024
        label[:, :, : label.shape[2] // 2] = 0
    image_out, label_out = plain([0, 1, 2], images, labels, spacing)
    for image, label in zip(image_out, label_out, strict=True):
        assert ((image >= -1024) & (image <= 500)).all()
        assert (image == -1024).mean() > 0.2
        assert (image == 500).mean() > 0.2
        assert (label[image == -1024] == 0).all()
        # The label changes where the image is half air: they are read at one place.
        np.testing.assert_array_equal(label, image > (500 - 1024) / 2)


@pytest.mark.parametrize("flip", ["y", "zyx"])
def test_half_of_the_patches_are_mirrored_along_each_axis_with_their_classes(flip):
    """All levels alike; x by the same draws whatever else is mirrored; and only then do classes change."""
    classes = (0, 2, 1, 3, 4) if "x" in flip else ()
    ranges = SpatialRanges(0, 0, 0, flip=flip, flip_classes=classes)
    margins = crop_margins(PATCH, SPACING, ranges)
    assert margins == ((0, 0, 0),) * LEVELS
    images, labels, spacing = crops(60, margins)
    run = make_augment(PATCH, margins, ranges, IntensityRanges())
    moved = augmented(run, jax.random.key(0), np.arange(60, dtype=np.uint32), spacing, images, labels)
    found = []
    for sample in range(60):
        along = mirrored(0, sample, flip)
        turned = tuple(number for number, mirror in enumerate(along.values()) if mirror)
        for before, after in zip(images + labels, moved[0] + moved[1], strict=True):
            expected = np.flip(before[sample], turned)
            if before.dtype == np.uint8 and along["x"]:
                expected = np.array(classes)[expected]
            np.testing.assert_array_equal(after[sample], expected)
        found.append(turned)
    for axis in flip:
        assert 20 < sum("zyx".index(axis) in turned for turned in found) < 40
    assert len(set(found)) == 2 ** len(flip)


def test_ignored_voxels_stay_ignored_and_what_is_annotated_changes_sides_where_x_is_mirrored():
    names = LabelSpec.plain(("background", "right", "left", "liver"), ignore=9)
    config = AugmentationConfig(0.0, 0.0, 0.0, 0.0, flip="xz", flip_pairs=("right=left",))
    ranges = config.spatial(names)
    margins = crop_margins(PATCH, SPACING, ranges)
    images, labels, spacing = crops(40, margins)
    labels = tuple(np.where(label == 4, 255, label).astype(np.uint8) for label in labels)
    numbers = np.arange(40, dtype=np.uint32)
    run = make_augment(PATCH, margins, ranges, IntensityRanges())
    _, moved = run(jax.random.key(0), numbers, spacing, images, labels)
    table = np.arange(256)
    table[[1, 2]] = 2, 1
    known = np.tile([True, True, False, True], (40, 1))
    known_then = np.array(make_flip_known(ranges.flip_classes)(jax.random.key(0), numbers, known))
    seen = set()
    for sample, (before, after) in enumerate(zip(labels[0], moved[0], strict=True)):
        images_of = {
            (z, x): before[:: -1 if z else 1, :, :: -1 if x else 1] for z in (False, True) for x in (False, True)
        }
        (place,) = [
            (z, x) for (z, x), image in images_of.items() if np.array_equal(after, table[image] if x else image)
        ]
        assert known_then[sample].tolist() == ([True, False, True, True] if place[1] else known[sample].tolist())
        seen.add(place)
    assert len(seen) == 4


@pytest.mark.parametrize("flip_classes", [(), (0, 1, 2)])
def test_where_no_class_changes_sides_neither_does_what_is_annotated(flip_classes):
    known = np.array([[True, False, True]])
    assert make_flip_known(flip_classes)(jax.random.key(0), np.zeros(1, np.uint32), known) is known


def test_a_share_of_the_patches_stays_to_the_last_bit_and_the_others_move_as_without_it():
    ranges = dataclasses.replace(SPATIAL, scaling=0.1, flip="x", flip_classes=(0, 2, 1, 3, 4))
    margins = crop_margins(PATCH, SPACING, ranges)
    images, labels, spacing = crops(40, margins)

    def moved(unmoved: float):
        run = make_augment(PATCH, margins, dataclasses.replace(ranges, probability=1 - unmoved), IntensityRanges())
        arrays = augmented(run, jax.random.key(0), np.arange(40, dtype=np.uint32), spacing, images, labels)
        return jax.tree.map(np.array, arrays)

    none, half, whole = (jax.tree.leaves(moved(share)) for share in (0.0, 0.5, 1.0))
    for before, after in zip(images + labels, whole, strict=True):
        margin = [(size - EDGE) // 2 for size in before.shape[1:]]
        inner = before[(slice(None), *(slice(m, m + EDGE) for m in margin))]
        other = inner[..., ::-1] if before.dtype == np.int16 else np.array(ranges.flip_classes)[inner[..., ::-1]]
        for place, mirror, found in zip(inner, other, after, strict=True):
            assert np.array_equal(found, place) or np.array_equal(found, mirror)
    stays = [all(np.array_equal(a[n], b[n]) for a, b in zip(half, whole, strict=True)) for n in range(40)]
    moves = [all(np.array_equal(a[n], b[n]) for a, b in zip(half, none, strict=True)) for n in range(40)]
    assert all(stay != move for stay, move in zip(stays, moves, strict=True))
    assert 10 < sum(stays) < 30


def test_scaling_is_the_same_along_all_axes_at_all_levels_and_within_limits():
    ranges = SpatialRanges(0, 0, 0, scaling=0.25)
    margins = crop_margins(PATCH, SPACING, ranges)
    samples, images = 60, []
    for margin in margins:
        z, y, x = (400.0 * (np.arange(EDGE + 2 * m) - (EDGE - 1) / 2 - m) for m in margin)  # 0 HU in the middle
        ramp = z[:, None, None] + y[:, None] / 2 - x / 4
        images.append(np.repeat(ramp[None].astype(np.int16), samples, axis=0))
    labels = tuple(np.zeros(image.shape, np.uint8) for image in images)
    run = make_augment(PATCH, margins, ranges, IntensityRanges())
    spacing = np.array([SPACING] * samples, np.float32)
    moved, _ = augmented(run, jax.random.key(1), np.arange(samples, dtype=np.uint32), spacing, tuple(images), labels)
    sizes = np.array(moved[0])[:, -1, -1, -1] / (400 * (EDGE - 1) / 2 * (1 + 1 / 2 - 1 / 4))
    assert 0.7499 < sizes.min() < 0.78
    assert 1.22 < sizes.max() < 1.2501
    for image, level in zip(images, moved, strict=True):
        m = (image.shape[1] - EDGE) // 2
        inner = image[:, m : m + EDGE, m : m + EDGE, m : m + EDGE]
        np.testing.assert_allclose(level, sizes[:, None, None, None] * inner, atol=0.1)  # of some 2000 HU


def test_intensity_changes_are_the_same_for_all_levels_and_within_limits():
    samples = 200
    shape = (samples, EDGE, EDGE, EDGE)
    image = np.zeros(shape, np.int16)
    image[..., EDGE // 2 :] = 1000  # halves of 0 and 1000 HU
    labels = (np.zeros(shape, np.uint8),) * 2
    run = make_augment(PATCH, ((0, 0, 0),) * 2, None, IntensityRanges(shift=50, scale=0.25))
    numbers, spacing = np.arange(samples, dtype=np.uint32), np.array([SPACING] * samples, np.float32)
    coarse, fine = augmented(run, jax.random.key(1), numbers, spacing, (image, image), labels)[0]
    np.testing.assert_array_equal(coarse, fine)
    shift = np.array(fine[:, 0, 0, 0])
    scale = (np.array(fine[:, 0, 0, -1]) - shift) / 1000
    np.testing.assert_allclose(fine, image * scale[:, None, None, None] + shift[:, None, None, None], atol=1e-3)
    for values, low, high in ((shift, -50, 50), (scale, 0.75, 1.25)):
        assert ((values >= low) & (values <= high)).all()
        reached = (values.min() - low) / (high - low), (values.max() - low) / (high - low)
        assert reached[0] < 0.05  # the whole range is drawn from
        assert reached[1] > 0.95
    assert abs(np.corrcoef(shift, scale)[0, 1]) < 0.3


def test_noise_is_of_one_strength_and_independent():
    samples = 60
    shape = (samples, EDGE, EDGE, EDGE)
    image, label = np.full(shape, 100, np.int16), np.zeros(shape, np.uint8)
    run = make_augment(PATCH, ((0, 0, 0),) * 2, None, IntensityRanges(noise=20))
    numbers, spacing = np.arange(samples, dtype=np.uint32), np.array([SPACING] * samples, np.float32)
    image_out, label_out = augmented(run, jax.random.key(1), numbers, spacing, (image, image), (label, label))
    coarse, fine = (np.array(out) - 100 for out in image_out)
    strength = np.stack([coarse, fine]).std(axis=(2, 3, 4))  # of 512 voxels: within 4 x 3 %
    np.testing.assert_allclose(strength[0], strength[1], rtol=0.2)
    assert strength.max() < 20 * 1.12
    assert np.ptp(strength) > 15
    assert abs(np.corrcoef(coarse.ravel(), fine.ravel())[0, 1]) < 0.03
    assert not any(np.array(out).any() for out in label_out)


def test_positions_are_computed_in_full_float32_on_every_platform():
    """GPUs would otherwise multiply in TF32 and TPUs in bfloat16: positions up to a quarter of a voxel off."""
    images, labels, spacing = crops(2)
    run = make_augment(PATCH, MARGINS, SPATIAL, INTENSITY)
    channels = tuple(image[:, None] for image in images)
    program = str(jax.make_jaxpr(run)(jax.random.key(KEY), np.arange(2, dtype=np.uint32), spacing, channels, labels))
    products = program.count("dot_general[")
    assert products >= 3  # the elastic field along z, y, x at least
    assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products
