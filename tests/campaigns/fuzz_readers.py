"""The readers that are fuzzed: for each the valid files that its inputs are made from, and how it reads them."""

import contextlib
import dataclasses
import hashlib
import json
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_dicom
import nibabel as nib
import numpy as np
from flax import nnx

from autocontext_jax.data import preparation
from autocontext_jax.data.datasets import Case, Dataset, read_dataset
from autocontext_jax.data.folds import read_fold
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.data.split import draw_validation, make_split, sides_of
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.errors import UserError
from autocontext_jax.files import write_json
from autocontext_jax.images import scans
from autocontext_jax.jobs import config_files as configuration
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.run_folder import read_split
from autocontext_jax.sections import as_dict

SIZE, LABELS = (6, 5, 4), ("background", "artery", "vein")


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader and its inputs.

    Attributes:
      share: of all inputs of a campaign.
      write: fills an empty folder with valid files.
      mutable: a pattern of the paths, in that folder, of the files that are changed.
      read: reads the folder; called in a process of its own.
      fresh: whether reading changes the folder, so that each input needs a new one.
    """

    share: float
    write: Callable[[Path], None]
    mutable: str
    read: Callable[[Path], object]
    fresh: bool = False


def write_scans(folder: Path, suffix: str) -> None:
    """An image, a label map on its grid, and an image of floats."""
    rng = np.random.default_rng(0)
    scans.write_scan(folder / f"image{suffix}", rng.integers(-1000, 1000, SIZE, np.int16), (2.5, 0.8, 0.7))
    scans.write_scan(folder / f"label{suffix}", rng.integers(0, 3, SIZE, np.uint8), (2.5, 0.8, 0.7))
    scans.write_scan(folder / f"float{suffix}", rng.normal(size=SIZE).astype(np.float32), (2.5, 0.8, 0.7))


def write_plain_scans(folder: Path, suffix: str) -> None:
    """The same, not compressed; .mhd with its voxels in a second file."""
    import SimpleITK as sitk

    write_scans(folder, ".mha")
    for path in sorted(folder.iterdir()):
        sitk.WriteImage(sitk.ReadImage(str(path)), str(path.with_suffix(suffix)), useCompression=False)
        if suffix != ".mha":
            path.unlink()


def read_scans(folder: Path, suffix: str) -> None:
    """All that is done with a scan's file: its grid, its voxels, and the label map on it."""
    scans.read_grid(folder / f"image{suffix}")
    scan = scans.read_scan(folder / f"image{suffix}")
    scans.read_label(folder / f"label{suffix}", values=range(3), like=scan.grid, case="a")
    scans.read_scan(folder / f"float{suffix}")


def write_second_scans(folder: Path, suffix: str) -> None:
    """The same in NIfTI-2."""
    write_scans(folder, suffix)
    for path in folder.iterdir():
        image: Any = nib.load(path, mmap=False)
        second: Any = nib.Nifti2Image(np.asanyarray(image.dataobj), image.affine)
        second.header.set_xyzt_units("mm")
        second.set_qform(image.affine, 1)
        nib.save(second, path)


def write_nnunet(folder: Path) -> None:
    """The nnU-Net v2 layout with empty scans, which no reader of layouts opens."""
    description = {"channel_names": {"0": "CT"}, "labels": {name: k for k, name in enumerate(LABELS)}}
    description |= {"numTraining": 2, "file_ending": ".nii.gz"}
    _write_layout(folder, description, "_0000")


def write_named(folder: Path) -> None:
    """The nnU-Net v2 layout whose `dataset.json` names the files."""
    write_nnunet(folder)
    path = folder / "dataset.json"
    files = {n: {"images": [f"imagesTr/{n}_0000.nii.gz"], "label": f"labelsTr/{n}.nii.gz"} for n in "ab"}
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"dataset": files}), encoding="utf-8")


def write_msd(folder: Path) -> None:
    """The Medical Segmentation Decathlon's layout, likewise."""
    pairs = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in "ab"]
    description = {"modality": {"0": "CT"}, "labels": {str(k): name for k, name in enumerate(LABELS)}}
    _write_layout(folder, description | {"training": pairs, "test": ["./imagesTs/c.nii.gz"]}, "")


def _write_layout(folder: Path, description: dict[str, Any], channel: str) -> None:
    for place in (f"imagesTr/a{channel}", f"imagesTr/b{channel}", "labelsTr/a", "labelsTr/b", f"imagesTs/c{channel}"):
        path = folder / f"{place}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")


def read_layout(folder: Path) -> None:
    """The layout and its split, as `jobs/prepare.py` takes them."""
    draw_validation(read_dataset(folder).training, fraction=0.5, seed=0)


def write_splits(folder: Path) -> None:
    """Two folds."""
    folds = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["b", "c"], "val": ["a"]}]
    (folder / "splits_final.json").write_text(json.dumps(folds), encoding="utf-8")


def read_splits(folder: Path) -> None:
    """Both folds."""
    cases = [Case(name, (Path(name),), None) for name in "abc"]
    for fold in range(2):
        read_fold(cases, folder / "splits_final.json", fold)


def write_store(folder: Path) -> None:
    """A prepared case of two levels."""
    size = (2 * SIZE[0], 2 * SIZE[1], 2 * SIZE[2])
    rng = np.random.default_rng(0)
    case = Case("a", (folder / "image.nii",), folder / "label.nii")
    scans.write_scan(case.images[0], rng.integers(-1000, 1000, size, np.int16), (2.5, 0.8, 0.7))
    scans.write_scan(folder / "label.nii", rng.integers(0, 3, size, np.uint8), (2.5, 0.8, 0.7))
    preparation.prepare_case(case, str(folder), LevelGrids((2, 1)), LabelSpec.plain(LABELS))


def read_store(folder: Path) -> None:
    """What the feed reads of a case: its description, a crop of each level, a voxel of each class."""
    case = PreparedCase.open(str(folder), "a")
    for level in range(1, len(case.shapes) + 1):
        case.read(level, (-2, 0, 1), (8, 8, 8)).result()
    for entry in (0, case.foreground_offsets[-1] - 1):
        case.foreground_voxel(entry)


def write_checkpoints(folder: Path) -> None:
    """Two checkpoints of a small state."""
    import jax
    import jax.numpy as jnp

    from autocontext_jax.training.checkpoints import Checkpoints

    checkpoints = Checkpoints(folder / "c")
    for step in (1, 2):
        state = {"kernel": jax.random.normal(jax.random.key(step), (3, 5)), "step": jnp.asarray(step, jnp.int32)}
        checkpoints.save(step, state, {"next_index": step}, dice=step / 3)
    checkpoints.close()


def read_checkpoints(folder: Path) -> None:
    """The newest is read or refused; then it is set aside if it is damaged, and the run goes on from what is whole."""
    import jax
    import jax.numpy as jnp

    from autocontext_jax.training.checkpoints import Checkpoints

    like = jax.eval_shape(lambda: {"kernel": jnp.zeros((3, 5)), "step": jnp.asarray(0, jnp.int32)})
    with contextlib.closing(Checkpoints(folder / "c")) as checkpoints:
        refusal = None
        try:
            checkpoints.restore(2, like)
        except UserError as error:
            refusal = error
        checkpoints.set_damaged_aside()
        checkpoints.restore(checkpoints.latest or 0, like)
        if refusal:
            raise refusal


def write_config_json(folder: Path) -> None:
    """The defaults."""
    configuration.write_config(RunConfig(), folder)


def read_config_json(folder: Path) -> None:
    """As a run does that goes on in the run folder."""
    saved = configuration.read_config(folder)
    if saved is not None:
        configuration.check_same_run(RunConfig(), saved, folder)


def write_model_file(folder: Path) -> None:
    """The smallest model of the package, and beside it its parts, packed only when they are read."""
    import jax

    from autocontext_jax.images.spec import CT
    from autocontext_jax.inference.description import ClassDescription, Description, NetworkDescription, Tiling
    from autocontext_jax.inference.model import Model
    from autocontext_jax.inference.tiling import PredictorConfig
    from autocontext_jax.models.pyramid import PyramidConfig, make_pyramid
    from autocontext_jax.models.unet import UNet
    from autocontext_jax.training.state import inference_model

    description = Description(
        name="small",
        license="CC0-1.0",
        classes=tuple(ClassDescription(name, value) for value, name in enumerate(LABELS)),
        network=NetworkDescription(base_channels=1, depth=1),
        pyramid=PyramidConfig(),
        image=CT,
        levels=LevelGrids((2.0, 1.0)),
        trained_spacing=((1.0, 1.0, 1.0), (2.0, 2.0, 2.0)),
        tiling=Tiling((8,), 4, crop_to_body=True, flip=False),
        training={"steps": 1},
        evaluation={},
    )
    pyramid = make_pyramid(UNet, description.network.alone(), description.full_pyramid, seed=0)
    with jax.disable_jit():
        pyramid = inference_model(*nnx.split(pyramid, nnx.Param, ...))
    Model(description, [pyramid], PredictorConfig((8,))).save(folder / "small.autocontext")
    with zipfile.ZipFile(folder / "small.autocontext") as archive:
        archive.extractall(folder / "parts")


def read_model_file(folder: Path) -> None:
    """As `load` does, up to the arrays; those that arrive whole must be the network's."""
    from autocontext_jax.inference.model import load_file

    load_file(folder / "small.autocontext", {}, {})


def read_model_parts(folder: Path) -> None:
    """The same of parts that were changed before they were packed, with checksums that are right."""
    from autocontext_jax.inference.model_file import CARD, DESCRIPTION, WEIGHTS, _checksum

    parts = {name: (folder / "parts" / name).read_bytes() for name in (DESCRIPTION, WEIGHTS, CARD)}
    with contextlib.suppress(ValueError, RecursionError, AttributeError, TypeError):  # no JSON, or no object
        content = json.loads(parts[DESCRIPTION])
        content.pop("checksum", None)
        content["parts"] = {name: hashlib.sha256(parts[name]).hexdigest() for name in (WEIGHTS, CARD)}
        parts[DESCRIPTION] = json.dumps(content | {"checksum": _checksum(content)}).encode()
    with zipfile.ZipFile(folder / "small.autocontext", "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    read_model_file(folder)


def write_split_json(folder: Path) -> None:
    """A split of three training cases and a test case."""
    cases = []
    for name in "abcd":
        (folder / name).write_text(name, encoding="utf-8")
        cases.append(Case(name, (folder / name,), folder / name))
    dataset = Dataset(folder, LabelSpec.plain(LABELS), ("CT",), tuple(cases[:3]), (cases[3],))
    split = make_split(dataset, sides_of(dataset, cases[:2], cases[2:3]))
    write_json(folder / "split.json", split.to_json())


def read_split_json(folder: Path) -> None:
    """As every start of a run does."""
    read_split(folder)


def write_overrides(folder: Path) -> None:
    """Every key with its default as on a command line, five an argument list."""
    lines = []
    for key, value in configuration.default_config().to_dict().items():
        section = value if isinstance(value, dict) else {"": value}
        lines += [f"--config.{key}{'.' * bool(inner)}{inner}={item}" for inner, item in section.items()]
    for start in range(0, len(lines), 5):
        (folder / f"{start:03}.flags").write_text("\n".join(lines[start : start + 5]), encoding="utf-8")
    (folder / "config.py").write_text("from autocontext_jax.jobs.config_files import default_config as get_config\n")


def read_overrides(folder: Path) -> None:
    """Parses the command line, checks the configuration and takes it apart as the jobs do."""
    from absl import flags

    from autocontext_jax import main

    changed = max(folder.glob("*.flags"), key=lambda path: path.stat().st_mtime_ns)
    lines = [line for line in changed.read_text("utf-8", "replace").split("\n") if line.startswith("--config.")]
    sys.argv = ["main", f"--config={folder / 'config.py'}", f"--workdir={folder}", *lines]  # where ml_collections looks
    flags.FLAGS.unparse_flags()
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)
    main._parse(sys.argv)
    config = configuration.from_config_dict(main.CONFIG.value)
    factors = config.levels.with_spacing((2.5, 0.8, 0.7)).level_factors((2.5, 0.8, 0.7))
    assert len(factors) == len(config.levels.factors)
    for phase in config.phases():
        config.phase_loss(phase)
    config.augmentation.spatial(LabelSpec.plain(LABELS))
    json.dumps(as_dict(config))


def _scan_reader(suffix: str, share: float, write: Callable[[Path, str], None] = write_scans) -> Reader:
    pattern = r".*\.(mhd|raw)" if suffix == ".mhd" else f".*{re.escape(suffix)}"
    return Reader(share, lambda folder: write(folder, suffix), pattern, lambda folder: read_scans(folder, suffix))


def _series_reader(syntax: str, share: float) -> Reader:
    return Reader(share, lambda folder: fuzz_dicom.write_series(folder, syntax), r".*\.dcm", fuzz_dicom.read_series)


def _frames_reader(syntax: str, share: float, read: Callable[[Path], object]) -> Reader:
    return Reader(share, lambda folder: fuzz_dicom.write_enhanced(folder, syntax), r".*\.dcm", read)


READERS = {
    "scan .nii": _scan_reader(".nii", 0.05),
    "scan .nii.gz": _scan_reader(".nii.gz", 0.04),
    "scan .mha": _scan_reader(".mha", 0.03),
    "scan .mha, plain": _scan_reader(".mha", 0.03, write_plain_scans),
    "scan .mhd": _scan_reader(".mhd", 0.03, write_plain_scans),
    "scan .nrrd": _scan_reader(".nrrd", 0.03),
    "scan .nrrd, plain": _scan_reader(".nrrd", 0.03, write_plain_scans),
    "scan .nii, NIfTI-2": _scan_reader(".nii", 0.04, write_second_scans),
    "scan .nii.gz, NIfTI-2": _scan_reader(".nii.gz", 0.04, write_second_scans),
    "DICOM, plain": _series_reader("explicit", 0.04),
    "DICOM, implicit VR": _series_reader("implicit", 0.03),
    "DICOM, RLE": _series_reader("RLE", 0.03),
    "DICOM, JPEG-LS": _series_reader("JPEG-LS", 0.03),
    "DICOM, JPEG": _series_reader("JPEG", 0.03),
    "DICOM, JPEG 2000": _series_reader("JPEG 2000", 0.03),
    "DICOM, many frames": _frames_reader("explicit", 0.04, fuzz_dicom.read_series),
    "DICOM, many frames, JPEG-LS": _frames_reader("JPEG-LS", 0.03, fuzz_dicom.read_series),
    "DICOM, one file, RLE": _frames_reader("RLE", 0.03, fuzz_dicom.read_frames),
    "DICOM, one file, implicit VR": _frames_reader("implicit", 0.03, fuzz_dicom.read_frames),
    "dataset.json nnU-Net": Reader(0.13, write_nnunet, "dataset.json", read_layout),
    "dataset.json nnU-Net, files named": Reader(0.12, write_named, "dataset.json", read_layout),
    "dataset.json MSD": Reader(0.13, write_msd, "dataset.json", read_layout),
    "splits_final.json": Reader(0.16, write_splits, "splits_final.json", read_splits),
    "store": Reader(0.03, write_store, r"a\.ome\.zarr/.*", read_store),
    "checkpoint": Reader(0.0015, write_checkpoints, r"c/2/.*", read_checkpoints, fresh=True),
    "config.json": Reader(0.12, write_config_json, r"config\.json", read_config_json),
    "model file": Reader(0.05, write_model_file, r"small\.autocontext", read_model_file),
    "model file, checksums right": Reader(0.05, write_model_file, r"parts/(model\.json|weights.*)", read_model_parts),
    "split.json": Reader(0.01, write_split_json, r"split\.json", read_split_json),
    "overrides": Reader(0.03, write_overrides, r".*\.flags", read_overrides),
}
