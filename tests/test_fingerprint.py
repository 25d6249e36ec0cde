"""What a run learns from its training scans: the spacing of its levels, whatever the spacing of a scan."""

import dataclasses
import json

import numpy as np
import pytest
import SimpleITK as sitk

from autocontext_jax.data.datasets import Case
from autocontext_jax.data.fingerprint import Fingerprint, fingerprint, made_from
from autocontext_jax.data.phantom.dataset import write_dataset
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.errors import InvalidField, UserError
from autocontext_jax.images import scans
from autocontext_jax.images.spec import CT, ct_image
from autocontext_jax.jobs.config_files import default_config, from_config_dict
from autocontext_jax.jobs.prepare import prepare
from autocontext_jax.jobs.run_folder import open_data, read_fingerprint


def test_median_and_range_along_the_patient_axes(tmp_path):
    spacings = [(5.0, 0.7, 0.7), (2.5, 0.8, 0.8), (1.0, 0.9, 0.8), (2.5, 1.0, 0.9)]
    cases = []
    for number, spacing in enumerate(spacings):
        image = sitk.GetImageFromArray(np.zeros((4, 5, 6), np.int16))
        image.SetSpacing(spacing[::-1])
        if number == 1:  # the same scan with its axes stored in another order
            image = sitk.PermuteAxes(image, [2, 0, 1])
        path = tmp_path / f"{number}.nii.gz"
        sitk.WriteImage(image, path)
        cases.append(Case(str(number), (path,), None))
    found = fingerprint(cases, CT)
    assert found == Fingerprint((2.5, 0.85, 0.8), (1.0, 0.7, 0.7), (5.0, 1.0, 0.9), CT, made_from(cases, CT))
    written = json.loads(json.dumps(found.to_json()))
    assert Fingerprint.from_json(written, place="", default=ct_image((0.0, 1.0))) == found
    del written["image"], written["made_from"]  # as the first runs wrote it
    assert Fingerprint.from_json(written, place="", default=CT) == dataclasses.replace(found, made_from="")
    (tmp_path / "0.nii.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"0\.nii\.gz is empty"):
        fingerprint(cases, CT)


def test_grids_in_mm_take_the_median():
    grids = LevelGrids((4.0, 2.0), "mm").with_spacing((1.5, 0.8, 0.8))
    assert grids.finest_spacing == (3.0, 1.6, 1.6)
    assert grids.level_factors((1.5, 0.8, 0.8)) == ((4, 4, 4), (2, 2, 2))
    assert grids.level_factors((3.0, 0.4, 0.8)) == ((2, 8, 4), (1, 4, 2))
    assert grids.with_spacing((9.0, 9.0, 9.0)) == grids  # once known it stays
    own = LevelGrids((4.0, 2.0), "voxels")
    assert own.with_spacing((2.5, 0.8, 0.8)) == own
    with pytest.raises(InvalidField, match="unit is 'cm'"):
        LevelGrids((4.0, 2.0), "cm")
    with pytest.raises(InvalidField, match=r"finest_spacing .* where levels\.unit is voxels"):
        LevelGrids((4.0, 2.0), "voxels", (1.0, 1.0, 1.0))


def test_a_run_writes_it_once(tmp_path):
    """Scans that come later do not change the grid that the network has learned on."""
    root = tmp_path / "data"
    write_dataset(root, training=4, test=0, size=(24, 24, 24), spacing=(4.0, 3.0, 3.0), seed=0)
    config = default_config()
    config.data.root, config.data.new_cases = str(root), "train"
    typed = from_config_dict(config)
    assert typed.levels.unit == "mm"
    assert open_data(typed, tmp_path / "run").fingerprint.spacing == (4.0, 3.0, 3.0)
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    before = (tmp_path / "run" / "fingerprint.json").read_bytes()

    for folder, ending in (("imagesTr", "_0000"), ("labelsTr", "")):
        source = sitk.ReadImage(root / folder / f"phantom_000{ending}.nii.gz")
        source.SetSpacing((9.0, 9.0, 9.0))
        sitk.WriteImage(source, root / folder / f"phantom_900{ending}.nii.gz")
    description = json.loads((root / "dataset.json").read_bytes())
    (root / "dataset.json").write_text(json.dumps(description | {"numTraining": 5}), encoding="utf-8")
    data = open_data(typed, tmp_path / "run")
    assert "phantom_900" in {case.name for case in data.training}
    assert (tmp_path / "run" / "fingerprint.json").read_bytes() == before
    (tmp_path / "run" / "fingerprint.json").write_bytes(before.replace(b"4.0", b"5.0", 1))
    with pytest.raises(UserError, match=r"fingerprint\.json is damaged or was edited"):
        read_fingerprint(typed, tmp_path / "run")
    with pytest.raises(UserError, match=r"has no fingerprint\.json"):
        read_fingerprint(typed, tmp_path)


def test_scan_headers_alone_are_read(tmp_path, monkeypatch):
    write_dataset(tmp_path, training=2, test=0, size=(24, 24, 24), spacing=(4.0, 3.0, 3.0), seed=0)
    monkeypatch.setattr(scans, "read_scan", None)
    cases = [Case(str(path), (path,), None) for path in sorted((tmp_path / "imagesTr").iterdir())]
    assert fingerprint(cases, CT).smallest == (4.0, 3.0, 3.0)


def test_it_is_made_anew_until_something_is_trained(tmp_path):
    """What CT is normalised by follows corrected labels and another configuration, up to the first checkpoint."""
    root, workdir = tmp_path / "data", tmp_path / "run"
    write_dataset(root, training=3, test=0, size=(24, 24, 24), spacing=(12.0, 12.0, 12.0), seed=0)
    config = default_config()
    config.data.root, config.data.workers, config.levels.factors = str(root), 1, (1.0,)
    learned = prepare(from_config_dict(config), workdir).image
    assert learned.learned
    assert prepare(from_config_dict(config), workdir).image == learned
    for path in (root / "labelsTr").iterdir():  # all of the scan, air too
        label = sitk.ReadImage(path)
        sitk.WriteImage(label * 0 + 1, path)
    corrected = prepare(from_config_dict(config), workdir).image
    assert corrected.channels[0].window[0] < learned.channels[0].window[0]
    config.data.window = (-500.0, 500.0)
    assert prepare(from_config_dict(config), workdir).image == CT
    config.data.window = ()
    assert (
        prepare(from_config_dict(config), workdir).image == corrected
    )  # a fixed window is not taken for a learned one

    (workdir / "checkpoints" / "1").mkdir(parents=True)
    config.data.window = (-500.0, 500.0)  # training refuses it; what is trained keeps its normalisation
    assert prepare(from_config_dict(config), workdir).image == corrected
    description = json.loads((root / "dataset.json").read_bytes())
    (root / "dataset.json").write_text(json.dumps(description | {"channel_names": {"0": "MR"}}), encoding="utf-8")
    config.data.window = ()
    with pytest.raises(UserError, match=r"has the channels \('MR',\); expected \('CT',\), with which the run began"):
        prepare(from_config_dict(config), workdir)
