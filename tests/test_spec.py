"""Channels of images: which normalisation they get, what is stored of them, and what networks make of it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import ndimage

from autocontext_jax.data.histograms import ct_statistics, histograms
from autocontext_jax.data.phantom.painting import make_phantom
from autocontext_jax.errors import InvalidField, UserError
from autocontext_jax.images.intensity import share_shown, stored_voxels
from autocontext_jax.images.spec import (
    AIR,
    CT,
    Channel,
    ImageSpec,
    ct_image,
    image_spec,
    with_statistics,
)
from autocontext_jax.models.pyramid import Pyramid, PyramidConfig
from autocontext_jax.sections import as_dict, from_dict


def spec_of(*normalization: str, cut_out: bool = False) -> ImageSpec:
    return ImageSpec(tuple(Channel(name, name) for name in normalization), cut_out)


def mr(seed: int = 0, largest: float = 1_700_000.0) -> np.ndarray:
    return (np.random.default_rng(seed).gamma(2.0, 0.1, (12, 15, 17)) * largest).astype(np.float64)


# ---- which normalisation ----


@pytest.mark.parametrize(
    ("name", "normalization"),
    [
        ("CT", "CT"), ("ct", "CT"), ("MRI", "zscore"), ("T2", "zscore"), ("ADC", "zscore"), ("PET", "zscore"),
        ("noNorm", "noNorm"), ("nonorm", "noNorm"), ("rescale_to_0_1", "rescale_to_0_1"), ("zscore", "zscore"),
        ("RGB_to_0_1", "rgb_to_0_1"), ("", "zscore"), ("CT_arterial", "zscore"),
    ],
)  # fmt: skip
def test_the_name_of_a_channel_chooses_as_in_nnunet(name, normalization):
    assert image_spec([name], (), ()).channels == (Channel(name, normalization),)


def test_the_configuration_chooses_instead_and_sets_the_window_of_ct():
    image = image_spec(["arterial", "T2"], ("CT", "rescale_to_0_1"), (-100.0, 300.0))
    assert image.channels == (
        Channel("arterial", "CT", (-100.0, 300.0), 100.0, 200.0),
        Channel("T2", "rescale_to_0_1"),
    )
    assert image.learned
    assert not image_spec(["CT"], (), ()).learned
    with pytest.raises(UserError, match=r"data\.normalization is \('CT',\); expected one for each of the 2 channels"):
        image_spec(["a", "b"], ("CT",), ())
    with pytest.raises(UserError, match=r"data\.window is .* no channel of the data set is CT \(T2\)"):
        image_spec(["T2"], (), (0.0, 1.0))
    with pytest.raises(InvalidField, match="normalization is 'HU'"):
        Channel("CT", "HU")
    with pytest.raises(InvalidField, match="window is"):
        Channel("CT", "CT", (3.0, 3.0))


def test_a_spec_is_read_back():
    declared = image_spec(["CT", "T2"], (), ())
    known = with_statistics(declared, {0: (-900.0, 200.0, 30.0, 90.0)})
    assert known.channels[0] == Channel("CT", "CT", (-900.0, 200.0), 30.0, 90.0)
    read = from_dict(ImageSpec, json.loads(json.dumps(as_dict(known))), place="file")
    assert read == known
    assert known.stored_as == declared.stored_as  # what is stored does not depend on the window


# ---- what is stored ----


def test_ct_alone_is_stored_in_hu():
    voxels = np.array([[[-1500.4, 0.5, 1.5, 40000.0]]])
    stored = stored_voxels("scan", [voxels], CT)
    assert stored.dtype == np.int16
    assert stored.tolist() == [[[[-1500, 0, 2, 32767]]]]
    two = stored_voxels("scan", [voxels, -voxels], spec_of("CT", "CT"))
    assert two.dtype == np.int16
    assert two[1].tolist() == [[[1500, 0, -2, -32768]]]
    assert ct_image().padding.ravel().tolist() == [AIR]


def test_zscore_is_nnunets():
    """Its formula, in float64: over the box of what is not 0; with a mask of that where the background is cut out."""
    voxels = mr()
    stored = stored_voxels("scan", [voxels], spec_of("zscore"))
    assert stored.dtype == np.float32
    np.testing.assert_allclose(stored[0], (voxels - voxels.mean()) / voxels.std(), atol=1e-4)
    padded = np.pad(voxels, 4)  # its box is that of the voxels
    np.testing.assert_allclose(stored_voxels("scan", [padded], spec_of("zscore"))[0][4:-4, 4:-4, 4:-4], stored[0])

    ball = np.linalg.norm(np.stack(np.meshgrid(*(np.arange(n) - n / 2 for n in padded.shape), indexing="ij")), axis=0)
    skull = np.where(ball < 7, padded + 1, 0)
    skull[9:11, 9:11, 9:11] = 0  # a hole inside belongs to it
    mask = ndimage.binary_fill_holes(skull != 0)
    found = stored_voxels("scan", [skull], spec_of("zscore", cut_out=True))[0]
    np.testing.assert_allclose(found[mask], (skull[mask] - skull[mask].mean()) / skull[mask].std(), atol=1e-4)
    assert not found[~mask].any()


def test_channels_are_normalised_each_by_its_own():
    channels = [mr(seed) for seed in range(4)] + [np.full((12, 15, 17), 255, np.uint8)]
    spec = spec_of("zscore", "rescale_to_0_1", "noNorm", "CT", "rgb_to_0_1")
    scored, rescaled, plain, hounsfield, colour = stored_voxels("scan", channels, spec)
    np.testing.assert_allclose(scored.mean(), 0, atol=1e-5)
    np.testing.assert_allclose(scored.std(), 1, atol=1e-5)
    assert (rescaled.min(), rescaled.max()) == (0, 1)
    np.testing.assert_array_equal(plain, channels[2].astype(np.float32))
    np.testing.assert_array_equal(hounsfield, channels[3].astype(np.float32))
    assert (colour == 1).all()
    assert spec.padding.ravel().tolist() == [0, 0, 0, AIR, 0]


@pytest.mark.parametrize("constant", [0.0, 7.0])
def test_a_constant_image_becomes_0(constant):
    for normalization in ("zscore", "rescale_to_0_1"):
        for cut_out in (False, True):
            spec = spec_of(normalization, cut_out=cut_out)
            stored = stored_voxels("scan", [np.full((3, 4, 5), constant)], spec)
            assert not stored.any()


def test_values_that_no_normalisation_takes_are_refused():
    for wrong in (np.nan, np.inf, 1e300):  # the last has no float32
        with pytest.raises(UserError, match="scan holds 1 voxels that are not finite"):
            stored_voxels("scan", [np.array([[[0, wrong]]])], spec_of("zscore"))
    for wrong in (-1, 256):
        with pytest.raises(UserError, match=r"the channel rgb_to_0_1 has values from .*; expected 0 to 255"):
            stored_voxels("scan", [np.array([[[0, wrong]]], np.int16)], spec_of("rgb_to_0_1"))


def test_the_share_of_what_a_scan_shows():
    voxels = np.zeros((2, 10, 10, 10))
    assert share_shown(voxels) == 1  # nothing at all
    voxels[0, 2:7, :, 5:] = 1
    assert share_shown(voxels) == 0.25
    voxels[1, 0, 0, 0] = 1
    assert share_shown(voxels) == 0.7


# ---- what CT is normalised by ----


def test_statistics_of_ct_weigh_cases_equally_as_nnunet_draws_them():
    rng = np.random.default_rng(0)
    label = np.zeros((3, 40, 60, 60), np.uint8)
    voxels, drawn = [], []
    for case, (size, mean) in enumerate(((4, 40), (20, 120), (40, -700))):  # very different numbers of voxels
        label[case, :size] = 1 + case
        voxels.append(rng.normal(mean, 30, label[case].shape).astype(np.int16))
        drawn.append(rng.choice(voxels[-1][label[case] > 0], 400_000))
    counted = [histograms(image[None], mask)[0] for image, mask in zip(voxels, label, strict=True)]
    assert [int(counts.sum()) for counts in counted] == [int((mask > 0).sum()) for mask in label]
    low, high, mean, std = ct_statistics([*counted, np.zeros_like(counted[0])])  # a case without labels counts nothing
    sample = np.concatenate(drawn)
    np.testing.assert_allclose((mean, std), (sample.mean(), sample.std()), rtol=2e-3)
    np.testing.assert_allclose((low, high), np.percentile(sample, (0.5, 99.5)), atol=1.5)
    assert ct_statistics(counted[:1])[2] == pytest.approx(voxels[0][label[0] > 0].mean())


def test_a_single_intensity_has_statistics_too():
    counts = histograms(np.full((1, 2, 2, 2), 40, np.int16), np.ones((2, 2, 2), np.uint8))
    assert ct_statistics(counts) == (40.0, 41.0, 40.0, 1.0)
    assert histograms(np.full((1, 1, 1, 2), [4e4, -4e4], np.float32), np.ones((1, 1, 2), np.uint8)).sum() == 2


def test_networks_see_ct_as_nnunet_does_and_other_channels_as_they_are_stored():
    class Through(nnx.Module):
        def __call__(self, x):
            return x

    spec = with_statistics(image_spec(["CT", "T2"], (), ()), {0: (-100.0, 300.0, 33.0, 71.0)})
    model = Pyramid(PyramidConfig(1, 2, image=spec), lambda inputs, spacing, rngs: Through(), rngs=nnx.Rngs(0))
    voxels = np.random.default_rng(0).normal(0, 400, (1, 4, 4, 4, 2)).astype(np.float32)
    (seen,) = model((jnp.asarray(voxels),))
    np.testing.assert_allclose(seen[..., 0], (np.clip(voxels[..., 0], -100, 300) - 33) / 71, atol=1e-4)
    np.testing.assert_array_equal(seen[..., 1], voxels[..., 1])


def test_nnunet_itself_gives_the_same_statistics_and_voxels():
    """Of phantoms of CT, and of the same as if they were MR; where nnU-Net is installed."""
    fingerprints = pytest.importorskip("nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor")
    schemes = pytest.importorskip("nnunetv2.preprocessing.normalization.default_normalization_schemes")
    cropping = pytest.importorskip("nnunetv2.preprocessing.cropping.cropping")
    phantoms = [
        make_phantom(np.random.default_rng(number), size=(40, 48, 44), spacing=(6.0, 6.0, 6.0)) for number in range(4)
    ]
    extractor = fingerprints.DatasetFingerprintExtractor
    drawn = [
        extractor.collect_foreground_intensities(label[None], voxels[None].astype(np.float32), num_samples=10_000_000)[
            0
        ]
        for voxels, label in phantoms
    ]
    theirs = np.concatenate([intensities[0] for intensities in drawn])
    percentiles = np.percentile(theirs, (0.5, 99.5))
    low, high, mean, std = ct_statistics(histograms(voxels[None], label)[0] for voxels, label in phantoms)
    np.testing.assert_allclose((mean, std), (theirs.mean(dtype=float), theirs.std(dtype=float)), rtol=1e-3)
    np.testing.assert_allclose((low, high), percentiles, rtol=1e-3)

    properties = {"mean": mean, "std": std, "percentile_00_5": low, "percentile_99_5": high}
    spec = with_statistics(image_spec(["CT"], (), ()), {0: (low, high, mean, std)})
    start, gain, offset, bottom, top = spec.scaling()
    for voxels, _ in phantoms:
        expected = schemes.CTNormalization(False, properties).run(voxels.astype(np.float32))
        np.testing.assert_allclose(np.clip((voxels - start) * gain + offset, bottom, top), expected, atol=1e-4)
        mr_like = voxels.astype(np.float32) + 1025  # no voxel is 0
        scored = schemes.ZScoreNormalization(False, {}).run(mr_like.copy())
        np.testing.assert_allclose(stored_voxels("mr", [mr_like], spec_of("zscore"))[0], scored, atol=1e-4)
        cut = np.where(voxels > -500, mr_like, 0)
        data, seg, box = cropping.crop_to_nonzero(cut[None].copy())
        masked = schemes.ZScoreNormalization(True, {}).run(data[0], seg[0])
        ours = stored_voxels("mr", [cut], spec_of("zscore", cut_out=True))[0]
        np.testing.assert_allclose(ours[tuple(slice(*edges) for edges in box)], masked, atol=1e-4)
