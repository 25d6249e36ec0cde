"""The prepared data set: valid for others, exact for us, and never half of one."""

import dataclasses
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from autocontext_jax.data import preparation, resampling
from autocontext_jax.data.datasets import Case
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.data.store import format as store_format
from autocontext_jax.data.store import reader, writer
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.errors import UserError
from autocontext_jax.images import scans

LABELS = ("background", "artery", "portal vein", "pancreas")
SPACING, ORIGIN = (1.5, 0.75, 0.8125), (-100.0, 30.0, 5.5)  # exact in float32, as headers keep it
SIZE = (70, 75, 81)  # no multiple of a chunk; level 2 has an odd size along x
SETTINGS = LevelGrids((4, 2))


def write_case(folder: Path, name: str = "case 1", seed: int = 0, organs: bool = True) -> Case:
    """A noisy scan with a box of each organ."""
    rng = np.random.default_rng(seed)
    voxels = rng.integers(-1000, 1000, SIZE, np.int16)
    label = np.zeros(SIZE, np.uint8)
    for number in range(1, len(LABELS)):
        z, y, x = rng.integers(5, 40, 3)
        label[z : z + 20, y : y + 15, x : x + 25] = number * organs
    case = Case(name, (folder / f"{name}.nii.gz",), folder / f"{name}_label.nii.gz")
    scans.write_scan(case.images[0], voxels, SPACING, ORIGIN)
    scans.write_scan(case.label, label, SPACING, ORIGIN)
    return case


def expected_levels(case: Case) -> list[tuple[np.ndarray, np.ndarray]]:
    """Image and label of each level, coarsest first, straight from the files."""
    scan = scans.read_scan(case.images)
    label = scans.read_label(case.label, values=range(len(LABELS)), like=scan.grid, case=case.name)
    return [
        (
            resampling.downsample_image(scan.voxels, (f, f, f)),
            resampling.downsample_label(label, (f, f, f), len(LABELS)),
        )
        for f in SETTINGS.factors
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Case, str]:
    """One prepared case that no test writes to."""
    folder = tmp_path_factory.mktemp("prepared")
    case = write_case(folder)
    assert preparation.prepare_case(case, str(folder / "store"), SETTINGS, LabelSpec.plain(LABELS))
    return case, str(folder / "store")


@pytest.fixture
def own(tmp_path) -> tuple[Case, str]:
    """One prepared case to spoil."""
    case = write_case(tmp_path)
    assert preparation.prepare_case(case, str(tmp_path / "store"), SETTINGS, LabelSpec.plain(LABELS))
    return case, str(tmp_path / "store")


def test_others_read_what_was_written(prepared):
    zarr = pytest.importorskip("zarr")
    models = pytest.importorskip("ome_zarr_models")
    case, root = prepared
    group = zarr.open_group(f"{root}/{case.name}.ome.zarr", mode="r")
    image = models.open_ome_zarr(group)
    assert type(image) is models.v05.Image
    assert image.labels.label_paths == ["classes"]
    masks = models.v05.ImageLabel.from_zarr(group["labels/classes"])
    properties = masks.ome_attributes.image_label.properties
    assert [(entry.label_value, entry.name) for entry in properties] == list(enumerate(LABELS))[1:]

    for described in (image, masks):
        (multiscale,) = described.ome_attributes.multiscales
        axes = [(axis.name, axis.type) for axis in multiscale.axes]
        channel = [("c", "channel")] if described is image else []
        assert axes == [*channel, *((name, "space") for name in "zyx")]
        assert {axis.unit for axis in multiscale.axes[-3:]} == {"millimeter"}
        assert [dataset.path for dataset in multiscale.datasets] == ["level_2", "level_1"]  # finest first
        for dataset, factor in zip(multiscale.datasets, (2, 4), strict=True):
            scale, translation = dataset.coordinateTransformations
            ones, zeros = ([1], [0]) if channel else ([], [])
            np.testing.assert_allclose(scale.scale, [*ones, *np.multiply(SPACING, factor)])
            np.testing.assert_allclose(translation.translation, [*zeros, *np.multiply(SPACING, (factor - 1) / 2)])
    for level, (voxels, label) in enumerate(expected_levels(case), start=1):
        for path, expected in ((f"level_{level}", voxels), (f"labels/classes/level_{level}", label)):
            assert group[path].dtype == expected.dtype
            assert group[path].metadata.dimension_names == tuple("czyx"[-expected.ndim :])
            np.testing.assert_array_equal(group[path][:], expected)

    ours = group.attrs["autocontext_jax"]
    assert ours["native"]["size"] == list(SIZE)
    np.testing.assert_allclose(ours["native"]["spacing"], SPACING)
    np.testing.assert_allclose(ours["native"]["origin"], ORIGIN)


def test_description(prepared):
    case, root = prepared
    opened = PreparedCase.open(root, case.name)
    assert (opened.name, opened.labels) == (case.name, LABELS)
    assert opened.factors == ((4, 4, 4), (2, 2, 2))
    assert opened.shapes == tuple(label.shape for _, label in expected_levels(case))
    assert [channel.normalization for channel in opened.image.channels] == ["CT"]
    np.testing.assert_allclose(opened.spacing, np.multiply(SPACING, 2))


@pytest.mark.parametrize("cache_bytes", [0, 10**7])
def test_crops_equal_a_padded_scan(prepared, cache_bytes):
    case, root = prepared
    opened = PreparedCase.open(root, case.name, cache_bytes)
    margin = 60
    size = (17, 8, 33)
    for level, (image, label) in enumerate(expected_levels(case), start=1):
        padded = np.pad(image[0], margin, constant_values=-1024)[None], np.pad(label, margin)
        # Along each axis: beyond on either side, across either border, inside, and larger than the scan.
        starts = [(-50, -16, -3, 0, 5, n - 4, n, n + 20) for n in label.shape]
        crops = [(start, size, opened.read(level, start, size)) for start in itertools.product(*starts)]
        whole = tuple(n + 20 for n in label.shape)
        crops.append(((-10, -10, -10), whole, opened.read(level, (-10, -10, -10), whole)))
        for start, edges, crop in crops:
            box = tuple(slice(margin + first, margin + first + n) for first, n in zip(start, edges, strict=True))
            for found, expected in zip(crop.result(), padded, strict=True):
                assert found.dtype == expected.dtype
                np.testing.assert_array_equal(found, expected[(..., *box)], err_msg=f"level {level} at {start}")


def test_reads_from_threads_and_after_pickling(prepared):
    case, root = prepared
    opened = PreparedCase.open(root, case.name)
    expected, label = expected_levels(case)[1]
    copy = pickle.loads(pickle.dumps(opened))
    found: list[np.ndarray] = []
    readers = [
        threading.Thread(target=lambda handle=handle: found.append(handle.read(2, (0, 0, 0), label.shape).result()[0]))
        for handle in (opened, copy) * 4
    ]
    for thread in readers:
        thread.start()
    for thread in readers:
        thread.join()
    assert len(found) == 8
    for image in [*found, pickle.loads(pickle.dumps(opened)).read(2, (0, 0, 0), label.shape).result()[0]]:
        np.testing.assert_array_equal(image, expected)


def test_foreground_lists_each_class(prepared):
    case, root = prepared
    opened = PreparedCase.open(root, case.name)
    _, label = expected_levels(case)[-1]
    assert len(opened.foreground_offsets) == len(LABELS)
    assert opened.foreground_offsets[0] == 0
    assert opened.foreground_offsets[-1] == np.count_nonzero(label)
    for number in range(1, len(LABELS)):
        entries = range(*opened.foreground_offsets[number - 1 : number + 1])
        assert [list(opened.foreground_voxel(entry)) for entry in entries] == np.argwhere(label == number).tolist()


def test_second_run_skips(own):
    case, root = own
    before = times(Path(root))
    assert not preparation.prepare_case(case, root, SETTINGS, LabelSpec.plain(LABELS))
    assert not preparation.prepare_case(case, root, LevelGrids((4.0, 2.0)), LabelSpec.plain(LABELS))  # the same numbers
    assert times(Path(root)) == before


@pytest.mark.parametrize("change", ["image", "label", "factors", "spacing", "names", "values", "annotated"])
def test_a_change_prepares_again(own, tmp_path, change):
    case, root = own
    settings, labels = SETTINGS, LabelSpec.plain(LABELS)
    if change in ("image", "label"):
        other = write_case(tmp_path, "other", seed=1)
        old, new = ((each.images[0], each.label)[change == "label"] for each in (case, other))
        os.replace(new, old)
    elif change == "factors":
        settings = LevelGrids((2, 1))
    elif change == "spacing":
        settings = LevelGrids((4, 2), "mm", (3.0, 1.5, 1.5))
    elif change == "values":  # the file does not change, and what it means does
        labels = LabelSpec.plain(("background", *LABELS[:0:-1]), (0, 1, 2, 3))
    elif change == "annotated":
        case = dataclasses.replace(case, annotated=LABELS[1:2])
    else:
        labels = LabelSpec.plain(("background", "vessel", *LABELS[2:]))
    assert preparation.prepare_case(case, root, settings, labels)
    preparation.prepare_case(case, str(tmp_path / "clean"), settings, labels)
    assert contents(Path(root)) == contents(tmp_path / "clean")


def test_without_its_mark_a_case_is_prepared_again(own):
    case, root = own
    clean = contents(Path(root))
    (Path(root) / f"{case.name}.ome.zarr/zarr.json").unlink()
    (Path(root) / f"{case.name}.ome.zarr/level_1/stray").write_text("left by someone else", encoding="utf-8")
    with pytest.raises(UserError, match=r"case 1\.ome\.zarr is missing, incomplete .*prepare the case again"):
        PreparedCase.open(root, case.name)
    assert preparation.prepare_case(case, root, SETTINGS, LabelSpec.plain(LABELS))
    assert contents(Path(root)) == clean


KILLED = f"""
import os, signal, sys
from pathlib import Path
from autocontext_jax.data import preparation
from autocontext_jax.data.datasets import Case
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.data.store import writer
from autocontext_jax.data.store.level_grids import LevelGrids

real, calls = writer.ts.open, 0

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def open_then_die(*args, **keywords):
    global calls
    calls += 1
    return die() if calls == int(sys.argv[4]) else real(*args, **keywords)

if sys.argv[4] == "0":
    writer.ts.KvStore.KeyRange = die
writer.ts.open = open_then_die
case = Case(sys.argv[1], (Path(sys.argv[2] + ".nii.gz"),), Path(sys.argv[2] + "_label.nii.gz"))
preparation.prepare_case(case, sys.argv[3], LevelGrids((4, 2)), LabelSpec.plain({LABELS!r}))
"""


@pytest.mark.parametrize("arrays", [0, 1, 2, 5])  # what it had begun to write; with 0 the old ones still stand
def test_killed_while_writing_is_prepared_again(own, tmp_path, arrays):
    case, root = own
    clean = contents(Path(root))
    write_case(tmp_path, seed=3)  # the same name and files: now the prepared case is out of date
    arguments = [case.name, str(tmp_path / case.name), root, str(arrays)]
    process = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, timeout=60)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    with pytest.raises(UserError, match="incomplete"):
        PreparedCase.open(root, case.name)

    write_case(tmp_path)  # the first content again: what the killed run left must not show
    assert preparation.prepare_case(case, root, SETTINGS, LabelSpec.plain(LABELS))
    assert contents(Path(root)) == clean


def spoil(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "flip":
        data[len(data) // 3] ^= 4
        file.write_bytes(data)
    elif how == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()


def read_all(opened: PreparedCase) -> None:
    opened.read(2, (0, 0, 0), opened.shapes[1]).result()
    for number in range(opened.foreground_offsets[-1]):
        opened.foreground_voxel(number)


@pytest.mark.parametrize("how", ["flip", "cut", "lose"])
@pytest.mark.parametrize("array", ["level_2", "labels/classes/level_2", "foreground"])
def test_damage_is_an_error_not_data(own, array, how):
    case, root = own
    (file,) = (path for path in (Path(root) / f"{case.name}.ome.zarr" / array / "c").rglob("*") if path.is_file())
    spoil(file, how)
    opened = PreparedCase.open(root, case.name)
    with pytest.raises(UserError, match=r"case 1\.ome\.zarr cannot be read .*delete that folder") as caught:
        read_all(opened)
    assert "\n" not in str(caught.value)


def test_a_description_that_is_not_what_was_written_is_refused_and_mended(own):
    case, root = own
    folder = Path(root) / f"{case.name}.ome.zarr"
    mark = folder / "zarr.json"
    described = json.loads(mark.read_bytes())
    described["attributes"]["autocontext_jax"]["factors"][0][0] += 1  # still a description, of other grids
    mark.write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(UserError, match=r"case 1\.ome\.zarr is missing, incomplete or damaged: delete that folder"):
        PreparedCase.open(root, case.name)
    assert preparation.prepare_case(case, root, SETTINGS, LabelSpec.plain(LABELS))
    PreparedCase.open(root, case.name)

    array = folder / "level_1" / "zarr.json"
    described = json.loads(array.read_bytes())
    described["shape"][0] += 1
    array.write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot be read \(level_1/zarr\.json has .*: delete that folder"):
        read_all(PreparedCase.open(root, case.name))


def test_other_formats_and_no_store_are_named(own, monkeypatch):
    case, root = own
    with pytest.raises(UserError, match=r"nowhere/case 1\.ome\.zarr is missing"):
        PreparedCase.open(f"{root}/nowhere", case.name)
    with pytest.raises(UserError, match=r"gopher.*give a folder"):
        PreparedCase.open("gopher://host", case.name)
    later = store_format.FORMAT + 1
    for module in (store_format, reader, preparation, writer):
        monkeypatch.setattr(module, "FORMAT", later)
    with pytest.raises(
        UserError, match=rf"case 1\.ome\.zarr has the format {later - 1}, expected {later}: delete that folder"
    ):
        PreparedCase.open(root, case.name)
    assert preparation.prepare_case(case, root, SETTINGS, LabelSpec.plain(LABELS))  # and mends it


def test_finest_spacing_holds_for_every_scanner():
    settings = LevelGrids((4, 2), "mm", (1.0, 1.0, 1.0))
    assert settings.level_factors((2.0, 0.5, 0.5)) == ((1.0, 4.0, 4.0), (0.5, 2.0, 2.0))
    assert settings.level_factors((1.0, float(np.float32(0.8)), 1.0))[1] == (1.0, 1.25, 1.0)
    assert LevelGrids((4, 2)).level_factors((2.0, 0.5, 0.5)) == ((4, 4, 4), (2, 2, 2))


def test_bad_cases_are_collected_and_the_others_prepared(tmp_path):
    root = str(tmp_path / "store")
    small, good = write_case(tmp_path, "small", organs=False), write_case(tmp_path, "good")
    scans.write_scan(small.label, np.zeros((5, 5, 5), np.uint8), SPACING, ORIGIN)
    unlabelled, lost = (
        Case("unlabelled", (good.images[0],), None),
        Case("lost", (tmp_path / "lost.nii.gz",), good.label),
    )
    done: list[str] = []
    cases = [small, unlabelled, good, lost]
    bad = preparation.prepare_cases(cases, root, SETTINGS, LabelSpec.plain(LABELS), workers=2, progress=done.append)
    assert sorted(done) == ["good", "lost", "small", "unlabelled"]
    assert [case for case, _ in bad] == [small, unlabelled, lost]
    for (case, message), expected in zip(bad, ("5", "no label", "lost.nii.gz"), strict=True):
        assert message.startswith(f"case {case.name}: ")
        assert expected in message
    assert not preparation.prepare_case(good, root, SETTINGS, LabelSpec.plain(LABELS))  # it is there
    assert sorted(path.name for path in Path(root).iterdir()) == ["good.ome.zarr"]


def test_workers_import_no_jax():
    script = "import sys; import autocontext_jax.data.preparation; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
