"""A trained model: what `autocontext_jax.load` returns."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from autocontext_jax.errors import InvalidField, UserError
from autocontext_jax.files import full_path
from autocontext_jax.images import scans
from autocontext_jax.images.checks import numbers
from autocontext_jax.images.in_memory import Image, array_of_image, as_image, image_of_array
from autocontext_jax.images.intensity import looks_like_ct
from autocontext_jax.images.spec import ImageSpec
from autocontext_jax.inference.description import Description, MemberDescription
from autocontext_jax.inference.model_card import model_card
from autocontext_jax.inference.model_file import SUFFIX, check_weights, flat_name, read_model, write_model
from autocontext_jax.inference.predictor import Predictor
from autocontext_jax.inference.tile_programs import ONCE, Mirroring
from autocontext_jax.inference.tiling import PredictorConfig
from autocontext_jax.models.backbones import BACKBONES
from autocontext_jax.models.ensemble import Ensemble
from autocontext_jax.models.pyramid import Pyramid, check_size, divisor, make_pyramid
from autocontext_jax.training.state import inference_model

# By this factor the spacing of a scan may be outside the range of the training scans without a warning.
OUTSIDE = 1.1

log = logging.getLogger(__name__)


class Model:
    """A trained pyramid, or an ensemble of several, with all that its use needs. It predicts; nothing changes it.

    Attributes:
      description: classes, network, levels, and how it was trained and scored.
      tiling: how scans are divided into tiles.

    Args:
      description: see above.
      pyramids: one in inference mode, or the members of an ensemble in the order of `description.members`.
      config: becomes `tiling`.
    """

    def __init__(self, description: Description, pyramids: Sequence[Pyramid], config: PredictorConfig):
        self.description, self.tiling = description, config
        self._pyramid: Pyramid | Ensemble = Ensemble(pyramids) if len(pyramids) > 1 else pyramids[0]
        self._predictor = Predictor(
            self._pyramid,
            config,
            align=divisor(description.network.alone(), description.full_pyramid),
            mirroring=_mirroring(description),
        )

    @property
    def classes(self) -> dict[str, int]:
        """The value of each class in a mask, background first."""
        return {entry.name: entry.value for entry in self.description.classes}

    @property
    def members(self) -> list[tuple[MemberDescription, Pyramid]]:
        """What its maps are averages of; a single pyramid is its own only member."""
        own = self.description
        described = own.members or (MemberDescription(own.name, own.image, own.training, own.evaluation),)
        return list(zip(described, self._pyramids(), strict=True))

    def predict(
        self,
        scan: Any,
        *,
        spacing: Sequence[float] | None = None,
        direction: Sequence[Sequence[float]] | None = None,
        probabilities: bool = False,
        series: str | None = None,
        output: str | Path | None = None,
        progress: bool = True,
    ) -> Any:
        """The mask of a scan, on the scan's own grid.

        Args:
          scan: a path of a scan file or of a folder with a DICOM series; a `SimpleITK.Image`; or an array [D, H, W]. Of
            several channels: a sequence of paths, one for each channel, or the path of a 4D NIfTI file; an image with
            several values a voxel; or an array [C, D, H, W]. Values are HU of CT, and as files hold them of other
            channels.
          spacing: of an array: mm along its axes, (z, y, x).
          direction: of an array: [3, 3], column j is the unit vector of the array's axis j, rows are the patient's axes
            (z, y, x), which point to superior, posterior and left. None means that the array's axes point there.
          probabilities: whether the maps of the classes are returned too, of regions those without the background. They
            take 4 bytes for each voxel and class.
          series: of a DICOM folder with several series: the number, description or identifier of one.
          output: file that the mask is written to: .nii.gz, .nii, .mha or .nrrd, of one slice .png, .tif or .tiff too.
          progress: whether a bar on standard error shows the tiles that are done.

        Returns:
          The mask with the values of `classes`, uint8, or a longer type if one is larger than 255: of an array an
          array [D, H, W], otherwise a `SimpleITK.Image`. Of regions it has in each voxel the last that holds it.
          Of DICOM slices that a tilted gantry has shifted, or whose distances differ, it has one plane for each slice,
          see `as_image`.
          With `probabilities` a pair of the mask and the maps, float32: an array [D, H, W, K], or a `SimpleITK.Image`
          with K values a voxel.

        Raises:
          UserError: the scan cannot be read, or the mask not written: one line says why.
        """
        target = None if output is None else full_path(output)
        if target is not None:
            scans.check_writable_format(target)
            if any(path.resolve() == target.resolve() for path in _paths(scan)):
                raise UserError(f"output {output} would overwrite the scan; expected another file")
        with tqdm(desc="predict", unit="tile", disable=not progress, leave=False) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            given = _read(scan, spacing, direction, series, self.description.image)
            if target is not None:
                scans.check_writable_format(target, given.grid)
            self.check(given, "the scan")
            factors = self.description.levels.level_factors(given.spacing)
            if probabilities:
                mask, maps = self._predictor.mask_and_maps(given.voxels, factors, progress=show)
                mask = self._valued(mask)
                images = [as_image(mask, given.grid), as_image(maps, given.grid)]
            else:
                mask = self.mask(given, show)
                images = [as_image(mask, given.grid)]
        if target is not None:
            scans.write_mask(target, mask, given.grid)
        made = images if _paths(scan) or isinstance(scan, Image) else list(map(array_of_image, images))
        return tuple(made) if probabilities else made[0]

    def predict_many(self, items: Iterable[Any], **options: Any) -> Iterator[Any]:
        """The masks of many scans, one after the other, as `predict` gives them; memory holds one scan at a time.

        Args:
          items: scans, see `predict`.
          options: of `predict`, for all of them; `output` is not among them.

        Raises:
          UserError: as `predict`.
        """
        if "output" in options:
            raise UserError("output is given, but all masks would go there; expected predict(scan, output=FILE)")
        for scan in items:
            yield self.predict(scan, **options)

    def check(self, scan: scans.Scan, name: str) -> None:
        """Warns of a scan that is unlike those that the model was trained on; `name` is what the message calls it."""
        for channel in self.description.image.ct:
            values = scan.voxels[channel]
            if not looks_like_ct(values):
                log.warning("%s does not look like CT in HU: its values are %d to %d", name, values.min(), values.max())
        if self.description.levels.unit == "voxels" and self.description.trained_spacing:
            smallest, largest = self.description.trained_spacing
            limits = zip(smallest, scan.spacing, largest, strict=True)
            if not all(low / OUTSIDE <= mm <= high * OUTSIDE for low, mm, high in limits):
                log.warning(
                    "%s has the spacing %s mm (z, y, x), outside that of the training scans, %s to %s mm: this model's "
                    "levels are multiples of a scan's own voxels, and the mask may be poor",
                    name, numbers(scan.spacing), numbers(smallest), numbers(largest),
                )  # fmt: skip

    def mask(self, scan: scans.Scan, progress: Callable[[int, int], None] = lambda done, total: None) -> np.ndarray:
        """The finest level's mask of a scan, [D, H, W], canonical, with the values of `classes`."""
        factors = self.description.levels.level_factors(scan.spacing)
        return self._valued(self._predictor.masks(scan.voxels, factors, progress=progress)[len(factors)])

    def level_masks(self, scan: scans.Scan) -> dict[int, np.ndarray]:
        """Each level's mask of a scan on the scan's grid, {level: [D, H, W] uint8}, canonical; numbers of classes."""
        factors = self.description.levels.level_factors(scan.spacing)
        return self._predictor.masks(scan.voxels, factors, levels=tuple(range(1, len(factors) + 1)))

    def save(self, path: str | Path) -> None:
        """Writes the model file, see `model_file`; the model is named as the file.

        Raises:
          UserError: it cannot be written.
        """
        weights = {
            flat_name(keys, number): np.asarray(leaf)
            for number, pyramid in _numbered(self._pyramids())
            for state in nnx.split(pyramid, nnx.Param, ...)[1:]
            for keys, leaf in _leaves(state)
        }
        path = full_path(path)
        named = dataclasses.replace(self.description, name=path.name.removesuffix(SUFFIX))
        write_model(path, named, weights, model_card(named))

    def _pyramids(self) -> list[Pyramid]:
        return self._pyramid.members() if isinstance(self._pyramid, Ensemble) else [self._pyramid]

    def _valued(self, mask: np.ndarray) -> np.ndarray:
        """The values of classes in the place of their numbers."""
        return scans.label_values(mask, list(self.classes.values()))


def load_file(path: Path, networks: Mapping[str, Any], options: Mapping[str, Any]) -> Model:
    """The model of a model file. Nothing that the file names is imported.

    Args:
      path: of the file.
      networks: classes from outside the package that the file may name.
      options: fields of `PredictorConfig` and of `Tiling` that the caller changes.

    Raises:
      UserError: the file is damaged; its network is not known; a wrong option.
    """
    description, weights = read_model(path)
    description, config = tiled(description, options)
    known = {**BACKBONES, **networks}
    name = description.network.name
    if name not in known:
        raise UserError(
            f"{path} needs the network {name}, which is not in the package: pass its class, "
            f'load(PATH, networks={{"{name}": {name}}}), or on the command line --network package.module:{name}'
        )

    def make() -> Pyramid:
        return make_pyramid(known[name], description.network.alone(), description.full_pyramid, seed=0)

    graph, *like = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    images = _numbered([member.image for member in description.members] or [description.image])
    leaves = [(keys, leaf) for state in like for keys, leaf in _leaves(state)]
    check_weights(path, weights, {flat_name(keys, number): leaf for number, _ in images for keys, leaf in leaves})

    def filled(number: int, image: ImageSpec) -> Pyramid:
        def fill(state: Any) -> Any:
            return nnx.from_flat_state(
                (keys, leaf.replace(jnp.asarray(weights[flat_name(keys, number)])))
                for keys, leaf in nnx.to_flat_state(state)
            )

        pyramid = inference_model(graph, *map(fill, like))
        pyramid.config = dataclasses.replace(pyramid.config, image=image)
        return pyramid

    return Model(description, [filled(number, image) for number, image in images], config)


def tiled(description: Description, options: Mapping[str, Any]) -> tuple[Description, PredictorConfig]:
    """The description with a caller's options, and what the predictor takes.

    Raises:
      UserError: an unknown option, a wrong value.
    """
    tiling = description.tiling
    own: dict[str, Any] = {"tile": tiling.tile, "margin": tiling.margin, "crop_to_body": tiling.crop_to_body}
    allowed = [field.name for field in dataclasses.fields(PredictorConfig)]
    if unknown := [name for name in options if name not in (*allowed, "flip")]:
        raise UserError(f"option {unknown[0]} is unknown; expected one of {', '.join([*allowed, 'flip'])}")
    values = own | {name: value for name, value in options.items() if name != "flip"}
    if description.network.normalizes_by_sample and values["tile"] == PredictorConfig.tile:
        values["tile"] = tiling.tile
    try:
        config = PredictorConfig(**values)
    except InvalidField as error:
        raise UserError(f"option {error.field} is {error.found!r}; expected {error.expected}") from None
    if not config.boxes:
        check_size("option tile", config.tile, description.network.alone(), description.full_pyramid)
    flip = bool(options.get("flip", tiling.flip))
    if flip and not tiling.flip_axes:
        raise UserError("option flip is True; expected False: the network has not learned from mirrored patches")
    used = {name: getattr(config, name) for name in own}
    new = dataclasses.replace(tiling, flip=flip, **used)
    return dataclasses.replace(description, tiling=new), config


def _mirroring(description: Description) -> Mirroring:
    """Of the network's outputs, which are regions without the background, or classes."""
    tiling = description.tiling
    if not tiling.flip:
        return ONCE
    flipped = tiling.flip_classes
    return Mirroring(tiling.flip_axes, tuple(number - 1 for number in flipped[1:]) if description.regions else flipped)


def _paths(scan: Any) -> list[Path]:
    """The files of a scan that is given by its path or paths; none of one in memory."""
    if isinstance(scan, str | Path):
        return [full_path(scan)]
    several = isinstance(scan, list | tuple) and scan and all(isinstance(path, str | Path) for path in scan)
    return [full_path(path) for path in scan] if several else []


def _read(scan: Any, spacing: Any, direction: Any, series: str | None, image: ImageSpec) -> scans.Scan:
    paths = _paths(scan)
    if series is not None and len(paths) != 1:
        raise UserError(
            "series is given, but the scan is not the path of one folder; expected it with the path of a DICOM folder "
            "alone"
        )
    if paths or isinstance(scan, Image):
        if spacing is not None or direction is not None:
            raise UserError("spacing or direction is given, but the scan has its own; expected them with arrays alone")
        return scans.read_scan(paths, image, series=series) if paths else scans.scan_of_image(scan, image)
    if spacing is None:
        raise UserError("an array is given without its spacing; expected spacing=(z, y, x) in mm")
    return scans.scan_of_image(image_of_array(scan, spacing, direction), image)


def _numbered(members: Sequence[Any]) -> list[tuple[int, Any]]:
    """The members of an ensemble with their numbers, from 1; a single one has the number 0, see `flat_name`."""
    return list(enumerate(members, start=1 if len(members) > 1 else 0))


def _leaves(state: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """(path, array) of every variable of a state."""
    return [(keys, leaf.get_value()) for keys, leaf in nnx.to_flat_state(state)]
