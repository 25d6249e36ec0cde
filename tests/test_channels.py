"""Data sets of several channels, of pictures and of colours: from their folder to masks of scans not seen before."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from channel_sets import case_of, write_decathlon, write_pictures

import autocontext_jax as ac
from autocontext_jax.data.datasets import read_dataset
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.data.layouts import Case
from autocontext_jax.data.loader import read_batch
from autocontext_jax.data.preparation import prepare_case
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.errors import UserError
from autocontext_jax.geometry import cube
from autocontext_jax.images import scans
from autocontext_jax.images.finding import find_scans
from autocontext_jax.images.spec import AIR, Channel, ImageSpec, image_spec
from autocontext_jax.jobs.config_files import default_config, from_config_dict
from autocontext_jax.jobs.run import Paths, run
from autocontext_jax.jobs.run_folder import read_fingerprint

pytestmark = pytest.mark.usefixtures("compiled_once", "prepared_here")

BRAIN = ("FLAIR", "T1w", "t1gd", "T2w")


def small_config(root: Path, *, steps: int, spatial_dims: int = 3):
    config = default_config()
    config.data.root, config.data.workers, config.data.validation_fraction = str(root), 1, 0.1
    config.levels.factors, config.levels.spatial_dims = (1,), spatial_dims
    config.loader.patch_size, config.loader.batch_size, config.loader.background_fraction = (16,), 4, 0.3
    config.augmentation.probability = 0.0
    config.model.base_channels, config.model.depth, config.model.momentum = 4, 2, 0.9
    config.loss.cross_entropy = 0.5
    config.optimizer.learning_rate, config.optimizer.schedule = 1e-2, "cosine"
    config.train.steps = config.train.checkpoint_every = steps
    config.train.validation_patches = 4
    return config


def dice(mask: np.ndarray, truth: np.ndarray) -> float:
    return 2 * np.sum((mask > 0) & (truth > 0)) / (np.sum(mask > 0) + np.sum(truth > 0))


@pytest.mark.parametrize("modality", [BRAIN, ("T2", "ADC")], ids=["brain", "prostate"])
def test_what_one_of_several_channels_shows_is_learned(modality, tmp_path):
    """The Decathlon's 4D files, from folder to model file; with two channels exchanged the masks are worthless."""
    root = write_decathlon(tmp_path / "data", modality, training=8, test=2)
    config = from_config_dict(small_config(root, steps=120))
    workdir = tmp_path / "run"
    assert run("all", config, Paths(workdir))
    evaluation = json.loads((workdir / "evaluation.json").read_bytes())
    assert evaluation["cases_are"] == "2 test cases"
    assert evaluation["summary"]["level_1"]["tumour"]["dice"]["min"] > 0.7
    known = read_fingerprint(config, workdir).image
    assert [(c.name, c.normalization) for c in known.channels] == [(name, "zscore") for name in modality]

    assert run("export", config, Paths(workdir, target=tmp_path / "model.autocontext"))
    model = ac.load(tmp_path / "model.autocontext")
    voxels, label = case_of(77, len(modality), 1)
    spacing = (1.2, 1.0, 1.0)
    mask = model.predict(voxels, spacing=spacing, progress=False)
    assert dice(mask, label) > 0.7
    exchanged = [1, 0, *range(2, len(modality))]
    assert dice(model.predict(voxels[exchanged], spacing=spacing, progress=False), label) < 0.3

    # The same scan as a file for each channel, as a 4D file and as an image: the same mask.
    (tmp_path / "in").mkdir()
    files = [tmp_path / "in" / f"case_{number:04d}.nii.gz" for number in range(len(modality))]
    for path, channel in zip(files, voxels, strict=True):
        nib.save(nib.Nifti1Image(channel.transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.2, 1.0])), path)
    nib.save(nib.Nifti1Image(voxels.transpose(3, 2, 1, 0), np.diag([-1.0, -1.0, 1.2, 1.0])), tmp_path / "4d.nii")
    image = sitk.GetImageFromArray(np.moveaxis(voxels, 0, -1), isVector=True)
    image.SetSpacing(spacing[::-1])
    for given in (files, tmp_path / "4d.nii", image):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(model.predict(given, progress=False)), mask)
    # The command finds a scan's channels by their names.
    for source, written in ((tmp_path / "in", "out/case.nii.gz"), (files[0], "one.nii.gz")):
        target = tmp_path / written
        place = target.parent if source.is_dir() else target
        assert run("predict", config, Paths(workdir, source=source, target=place))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(target))), mask)
    with pytest.raises(UserError, match=rf"holds 1 channel; expected {len(modality)}: {', '.join(modality)}"):
        model.predict(files[0], progress=False)


@pytest.mark.parametrize(
    ("ending", "channels"),
    [(".png", {"0": "rgb_to_0_1", "1": "rgb_to_0_1", "2": "rgb_to_0_1"}), (".tif", {"0": "brightness"})],
    ids=["colour", "grey"],
)
def test_pictures_train_and_their_masks_are_pictures(ending, channels, tmp_path):
    root = write_pictures(tmp_path / "data", channels, training=8, test=2, ending=ending)
    config = from_config_dict(small_config(root, steps=100, spatial_dims=2))
    workdir = tmp_path / "run"
    assert run("all", config, Paths(workdir))
    evaluation = json.loads((workdir / "evaluation.json").read_bytes())
    assert evaluation["summary"]["level_1"]["cell"]["dice"]["min"] > 0.7
    for number in (8, 9):
        mask = sitk.ReadImage(str(workdir / f"predictions/cell_{number}{ending}"))
        truth = sitk.ReadImage(str(root / f"labelsTs/cell_{number}{ending}"))
        assert mask.GetSize() == truth.GetSize() == (40, 48)
        assert set(np.unique(sitk.GetArrayFromImage(mask))) == {0, 1}
    assert run("predict", config, Paths(workdir, source=root / "imagesTs", target=tmp_path / "out"))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"cell_8{ending}", f"cell_9{ending}"]


def test_pictures_that_are_no_slice_or_have_other_channels_are_refused(tmp_path):
    rgba = sitk.GetImageFromArray(np.zeros((5, 6, 4), np.uint8), isVector=True)
    sitk.WriteImage(rgba, str(tmp_path / "a.png"))
    colour = ImageSpec((Channel("R", "rgb_to_0_1"), Channel("G", "rgb_to_0_1"), Channel("B", "rgb_to_0_1")))
    with pytest.raises(UserError, match=r"a\.png holds 4 channels; expected 3: R, G, B"):
        scans.read_scan(tmp_path / "a.png", colour)
    with pytest.raises(
        UserError, match=r"a\.png is a 3D image of 6 × 5 × 1 with 4 value\(s\) a voxel: expected .* one"
    ):
        scans.read_scan(tmp_path / "a.png")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 5, 6), np.uint8)), str(tmp_path / "a.tif"))
    with pytest.raises(UserError, match=r"a\.tif holds 3 pictures: expected one slice"):
        scans.read_scan(tmp_path / "a.tif")
    grid = scans.read_grid(tmp_path / "a.png")
    assert (grid.size, grid.spacing) == ((6, 5, 1), (1, 1, 1))
    with pytest.raises(UserError, match=r"b\.png cannot hold a mask of 2 slices"):
        scans.write_scan(tmp_path / "b.png", np.zeros((2, 5, 6), np.uint8), (1, 1, 1))
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(UserError, match=r"cut\.png cannot be read"):
        scans.read_scan(tmp_path / "cut.png", colour)


# ---- channels and their files ----


def files_of(folder: Path, *shapes: tuple[int, int, int], spacing: float = 1.0) -> tuple[Path, ...]:
    """Files of one channel each; the values of channel c are 100 c, but one."""
    paths = []
    for number, shape in enumerate(shapes):
        path = folder / f"case_{number:04d}.nii.gz"
        voxels = np.full(shape, 100.0 * number)
        voxels[0, 0, 0] = -500
        scans.write_scan(path, voxels.astype(np.int16), (1.0 + number * (spacing - 1), 1.0, 1.0))
        paths.append(path)
    return tuple(paths)


def test_channels_on_different_grids_are_refused_with_both(tmp_path):
    spec = image_spec(["T1", "T2"], (), ())
    with pytest.raises(UserError, match=r"_0001.*: its size .* is \(4, 5, 7\), that of .*_0000.* is \(4, 5, 6\)"):
        scans.read_scan(files_of(tmp_path, (4, 5, 6), (4, 5, 7)), spec)
    with pytest.raises(UserError, match=r"_0001.*: its spacing .* is \(1.5, 1, 1\), that of .*_0000.* is \(1, 1, 1\)"):
        scans.read_scan(files_of(tmp_path, (4, 5, 6), (4, 5, 6), spacing=1.5), spec)


def test_ct_beside_other_channels_keeps_its_hu_and_is_padded_by_air(tmp_path):
    """One case through store and batch: float32, each channel with its own padding."""
    files = files_of(tmp_path, (8, 9, 10), (8, 9, 10))
    label = np.zeros((8, 9, 10), np.uint8)
    label[3:6, 4:6, 2:7] = 1
    scans.write_scan(tmp_path / "label.nii.gz", label, (1.0, 1.0, 1.0))
    spec = image_spec(["CT", "PET"], (), ())
    case = Case("case", files, tmp_path / "label.nii.gz")
    assert prepare_case(case, str(tmp_path), LevelGrids((2, 1)), LabelSpec.plain(("background", "organ")), spec)
    assert not prepare_case(case, str(tmp_path), LevelGrids((2, 1)), LabelSpec.plain(("background", "organ")), spec)
    prepared = PreparedCase.open(str(tmp_path), "case")
    assert [channel.normalization for channel in prepared.image.channels] == ["CT", "zscore"]
    assert prepared.intensities().shape == (1, 65536)
    assert prepared.intensities()[0, 32768] == label.sum()  # of CT, all labelled voxels are 0 HU
    batch = read_batch([(prepared, (4, 4, 5), ((0, 0, 0),) * 2)], cube(16, 2), ((0, 0, 0),) * 2)
    fine = batch["images"][1][0]
    assert fine.dtype == np.float32
    assert fine.shape == (2, 16, 16, 16)
    stored = scans.read_scan(files, spec).voxels
    starts = cube(16, 2).starts((4, 4, 5))[1]
    inside = tuple(slice(-first, n - first) for first, n in zip(starts, (8, 9, 10), strict=True))
    np.testing.assert_array_equal(fine[(slice(None), *inside)], stored)
    outside = np.ones((16, 16, 16), bool)
    outside[inside] = False
    assert (fine[0][outside] == AIR).all()
    assert (fine[1][outside] == 0).all()
    # Another normalisation makes another case.
    assert prepare_case(
        case,
        str(tmp_path),
        LevelGrids((2, 1)),
        LabelSpec.plain(("background", "organ")),
        image_spec(["CT", "noNorm"], (), ()),
    )


def test_find_scans_groups_channels_by_their_names(tmp_path):
    for name in ("a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz", "four.nii.gz"):
        (tmp_path / name).write_bytes(b"")
    found = find_scans(tmp_path, channels=2)
    assert [(str(source.name), [path.name for path in source.files]) for source in found] == [
        ("a", ["a_0000.nii.gz", "a_0001.nii.gz"]),
        ("b", ["b_0000.nii.gz", "b_0001.nii.gz"]),
        ("four", ["four.nii.gz"]),
    ]
    (alone,) = find_scans(tmp_path / "b_0000.nii.gz", channels=2)
    assert alone == found[1]


def test_channels_of_a_data_set_are_one_file_each_or_all_in_one(tmp_path):
    def described(names: list[str], channels: int) -> list[list[str]]:
        for folder in ("imagesTr", "labelsTr"):
            (tmp_path / folder).mkdir(exist_ok=True)
            for old in (tmp_path / folder).iterdir():
                old.unlink()
        for name in names:
            (tmp_path / "imagesTr" / f"{name}.nii.gz").write_bytes(b"")
            (tmp_path / "labelsTr" / f"{name[:-5]}.nii.gz").write_bytes(b"")
        description = {
            "channel_names": {str(number): f"T{number}" for number in range(channels)},
            "labels": {"background": 0, "organ": 1},
            "file_ending": ".nii.gz",
        }
        (tmp_path / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
        dataset = read_dataset(tmp_path)
        assert dataset.channels == tuple(f"T{number}" for number in range(channels))
        return [[path.name for path in case.images] for case in dataset.training]

    assert described(["a_0000", "a_0001"], 2) == [["a_0000.nii.gz", "a_0001.nii.gz"]]
    assert described(["a_0000"], 3) == [["a_0000.nii.gz"]]
    for names, channels in ((["a_0000", "a_0002"], 2), (["a_0000", "a_0001"], 3), (["a_0000", "a_0001"], 1)):
        with pytest.raises(UserError, match=f"case a: its images in .* are .*: expected .*{channels or 'one'}|one"):
            described(names, channels)
    description = json.loads((tmp_path / "dataset.json").read_bytes())
    for channels in ({}, {"1": "CT"}, {"0": "CT", "2": "T1"}):
        (tmp_path / "dataset.json").write_text(json.dumps(description | {"channel_names": channels}), encoding="utf-8")
        with pytest.raises(UserError, match=r'"channel_names" is .*: expected channels with the numbers "0", "1"'):
            read_dataset(tmp_path)


def test_pictures_among_scans_are_left_out_and_surplus_channels_are_no_scan(tmp_path, caplog):
    for name in ("a_0000.nii.gz", "a_0001.nii.gz", "a_0002.nii.gz", "preview.png"):
        (tmp_path / name).write_bytes(b"")
    found = find_scans(tmp_path, channels=2)
    assert "pictures among scans" in caplog.text
    assert [len(source.files) for source in found] == [1, 1, 1]  # each is refused by itself: it has one channel
    for name in ("a_0000.nii.gz", "a_0001.nii.gz", "a_0002.nii.gz"):
        (tmp_path / name).unlink()
    assert [source.path.name for source in find_scans(tmp_path)] == ["preview.png"]


def test_noise_in_units_of_ct_is_refused_beside_other_channels(tmp_path):
    root = write_decathlon(tmp_path / "data", ("CT", "PET"), training=3, test=0)
    config = small_config(root, steps=2)
    config.augmentation.noise = 10.0
    with pytest.raises(UserError, match=r"augmentation\.noise .* are 10 and 0; expected 0, as the channels CT, PET"):
        run("train", from_config_dict(config), Paths(tmp_path / "run"))
