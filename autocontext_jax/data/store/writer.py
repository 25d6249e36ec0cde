"""Writes a prepared case from a scan's voxels and labels; the files are described in `format.py`."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from autocontext_jax.data import resampling
from autocontext_jax.data.histograms import histograms
from autocontext_jax.data.labels import IGNORE, LabelSpec
from autocontext_jax.data.store.format import (
    CHUNK,
    FORMAT,
    INDEX_CHUNK,
    INDEX_SHARD,
    OURS,
    SHARD,
    array_spec,
    case_url,
    checksum,
    storage_errors,
)
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.errors import counted
from autocontext_jax.geometry import Spacing, times
from autocontext_jax.images.spec import CT, ImageSpec

log = logging.getLogger(__name__)


def write_case(
    root: str,
    name: str,
    voxels: np.ndarray,
    label: np.ndarray,
    spacing: Spacing,
    grids: LevelGrids,
    labels: LabelSpec,
    *,
    image: ImageSpec = CT,
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
    direction: Sequence[float] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
    known: Sequence[bool] = (),
    digest: str = "",
) -> None:
    """Writes one case's levels; an older case of this name is replaced.

    A label may be background alone. A label that is too small for the finest level's grid is named in a warning.

    Args:
      root: folder or URL of the store.
      name: the case's.
      voxels: [C, D, H, W], see `images.spec`.
      label: [D, H, W] uint8, numbers.
      spacing: mm of the scan, (z, y, x).
      grids: of the levels.
      labels: what the numbers are.
      image: of the channels.
      origin: of the scan's first voxel, mm; recorded only.
      direction: cosines of the scan's axes, nine numbers row by row; recorded only.
      known: [K] whether the case annotates each class; () means that it annotates all.
      digest: says what the case was made from; recorded only.

    Raises:
      UserError: the store cannot be written.
    """
    factors = grids.level_factors(spacing)
    numbers, ignore = len(labels.values), labels.ignore >= 0
    masks = [resampling.downsample_label(label, level, numbers, ignore=ignore) for level in factors]
    images = [resampling.downsample_image(voxels, level) for level in factors]
    foreground = np.flatnonzero((masks[-1] != 0) & (masks[-1] != IGNORE) if ignore else masks[-1])
    found = masks[-1].ravel()[foreground]
    _warn_of_lost_labels(name, label, masks[-1], labels.number_names, times(spacing, factors[-1]))
    arrays = {
        "foreground/": foreground[np.argsort(found, kind="stable")].astype(np.uint32),
        "intensities/": histograms([voxels[channel] for channel in image.ct], label).ravel(),
    }
    for level, (volume, mask) in enumerate(zip(images, masks, strict=True), start=1):
        arrays |= {f"level_{level}/": volume, f"labels/classes/level_{level}/": mask}
    properties = [{"label-value": number, "name": title} for number, title in enumerate(labels.number_names) if number]
    properties += [{"label-value": IGNORE, "name": "ignore"}] if ignore else []
    about = {"image-label": {"version": "0.5", "properties": properties, "source": {"image": "../../"}}}
    native = {"size": label.shape, "spacing": spacing, "origin": origin, "direction": direction}
    offsets = np.cumsum(np.bincount(found, minlength=numbers)).tolist()
    ours = {"format": FORMAT, "case": name, "hash": digest, "native": native, "factors": factors}
    ours |= {"labels": labels.classes, "known": list(known) or [True] * len(labels.classes)}
    ours |= {"shapes": [mask.shape for mask in masks], "numbers": numbers, "foreground_offsets": offsets}
    ours |= {"channels": image.stored_as[:-1]}
    ours |= {"crc": checksum(ours)}
    groups: dict[str, Any] = {  # in this order: the root's metadata mark a complete case
        "labels/": {"ome": {"version": "0.5", "labels": ["classes"]}},
        "labels/classes/": {"ome": _multiscales("classes", "majority", spacing, factors, channels=False) | about},
        "": {"ome": _multiscales(name, "mean", spacing, factors, channels=True), OURS: ours},
    }
    with storage_errors(root, name, "written", "see that the disk has room and the folder lets you write"):
        _write(case_url(root, name), arrays, groups, image)


def _warn_of_lost_labels(name: str, label: np.ndarray, finest: np.ndarray, names: Sequence[str], mm: Spacing) -> None:
    """Names the labels that are too small for the finest level's grid."""
    if finest is label:
        return
    native, left = np.zeros((2, IGNORE + 1), np.int64)
    for mask, counts in ((label, native), (finest, left)):
        for plane in mask:  # a plane at a time: counting takes 8 bytes a voxel
            counts += np.bincount(plane.ravel(), minlength=IGNORE + 1)
    for number in np.flatnonzero((native > 0)[: len(names)] & (left == 0)[: len(names)]).tolist():
        log.warning(
            "case %s: %s has %s, and none is left at the finest level's %s mm",
            name, names[number], counted(int(native[number]), "voxel"), " × ".join(f"{length:g}" for length in mm),
        )  # fmt: skip


def _write(url: str, arrays: Mapping[str, np.ndarray], groups: Mapping[str, Any], image: ImageSpec) -> None:
    """Replaces what is at the URL; arrays and groups by path."""
    store = ts.KvStore.open(url).result()
    store.write("zarr.json", None).result()  # before all else: from here on the case is incomplete
    store.delete_range(ts.KvStore.KeyRange()).result()
    for write in [_write_array(url + path, array, image) for path, array in arrays.items()]:
        write.result()
    for path, attributes in groups.items():
        metadata = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        store.write(f"{path}zarr.json", json.dumps(metadata, indent=1)).result()


def _write_array(url: str, array: np.ndarray, image: ImageSpec) -> Any:
    """Starts to write an image, a label, the foreground or the intensities; returns the future."""
    chunk, shard, names = {
        4: ([len(array), *[CHUNK] * 3], [len(array), *[SHARD] * 3], [*"czyx"]),
        3: ([CHUNK] * 3, [SHARD] * 3, [*"zyx"]),
        1: ([INDEX_CHUNK], [INDEX_SHARD], ["entry"]),
    }[array.ndim]
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    # CT in 32^3 chunks: bitshuffle packs it 2.2 times (bytes 1.8), zstd 2.4 times but takes half as long again to read.
    # A label packs 50 times without, and is then read twice as fast.
    shuffle = "noshuffle" if array.dtype == np.uint8 else "bitshuffle"
    blosc = {"name": "blosc", "configuration": {"cname": "lz4", "clevel": 5, "shuffle": shuffle}}
    sharding = {
        "chunk_shape": chunk,
        "codecs": [little, blosc, {"name": "crc32c"}],
        "index_codecs": [little, {"name": "crc32c"}],
    }
    file = [min(s, max(1, -(-size // c)) * c) for size, c, s in zip(array.shape, chunk, shard, strict=True)]
    metadata = {
        "shape": array.shape,
        "data_type": array.dtype.name,
        "fill_value": image.padding.item(0) if array.ndim == 4 else 0,
        "dimension_names": names,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": file}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    store = ts.open(array_spec(url) | {"metadata": metadata}, create=True).result()
    return store.write(array, can_reference_source_data_indefinitely=True)


def _multiscales(
    name: str, method: str, spacing: Spacing, factors: Sequence[Spacing], *, channels: bool
) -> dict[str, Any]:
    """OME-Zarr's description of the levels; mm from the centre of the native grid's first voxel."""
    first, step = ([1.0], [0.0]) if channels else ([], [])
    datasets: list[dict[str, Any]] = []
    for level, factor in enumerate(factors, start=1):
        shift = times(spacing, ((factor[0] - 1) / 2, (factor[1] - 1) / 2, (factor[2] - 1) / 2))
        scale = {"type": "scale", "scale": [*first, *times(spacing, factor)]}
        translation = {"type": "translation", "translation": [*step, *shift]}
        datasets.insert(0, {"path": f"level_{level}", "coordinateTransformations": [scale, translation]})
    axes = [{"name": "c", "type": "channel"}] * channels
    axes += [{"name": axis, "type": "space", "unit": "millimeter"} for axis in "zyx"]
    return {"version": "0.5", "multiscales": [{"name": name, "type": method, "axes": axes, "datasets": datasets}]}
