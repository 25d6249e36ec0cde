"""Writes a prepared case from a scan's voxels and labels; the files are described in `format.py`."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from autocontext_jax.data import resampling
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
from autocontext_jax.data.store.level_grids import AIR, LevelGrids, Triple, times
from autocontext_jax.errors import counted

log = logging.getLogger(__name__)


def write_case(
    root: str,
    name: str,
    voxels: np.ndarray,
    label: np.ndarray,
    spacing: Triple,
    grids: LevelGrids,
    labels: LabelSpec,
    *,
    origin: Triple = (0.0, 0.0, 0.0),
    direction: Sequence[float] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
    known: Sequence[bool] = (),
    digest: str = "",
) -> None:
    """Writes one case's levels; an older case of this name is replaced.

    A label may be background alone. A label that is too small for the finest level's grid is named in a warning.

    Args:
      root: folder or URL of the store.
      name: the case's.
      voxels: [D, H, W] int16, HU.
      label: [D, H, W] uint8, numbers.
      spacing: mm of the scan, (z, y, x).
      grids: of the levels.
      labels: what the numbers are.
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
    arrays = {"foreground/": foreground[np.argsort(found, kind="stable")].astype(np.uint32)}
    for level, (image, mask) in enumerate(zip(images, masks, strict=True), start=1):
        arrays |= {f"level_{level}/": image, f"labels/classes/level_{level}/": mask}
    properties = [{"label-value": number, "name": title} for number, title in enumerate(labels.number_names) if number]
    properties += [{"label-value": IGNORE, "name": "ignore"}] if ignore else []
    about = {"image-label": {"version": "0.5", "properties": properties, "source": {"image": "../../"}}}
    native = {"size": voxels.shape, "spacing": spacing, "origin": origin, "direction": direction}
    offsets = np.cumsum(np.bincount(found, minlength=numbers)).tolist()
    ours = {"format": FORMAT, "case": name, "hash": digest, "native": native, "factors": factors}
    ours |= {"labels": labels.classes, "known": list(known) or [True] * len(labels.classes)}
    ours |= {"shapes": [image.shape for image in images], "numbers": numbers, "foreground_offsets": offsets}
    ours |= {"crc": checksum(ours)}
    groups: dict[str, Any] = {  # in this order: the root's metadata mark a complete case
        "labels/": {"ome": {"version": "0.5", "labels": ["classes"]}},
        "labels/classes/": {"ome": _multiscales("classes", "majority", spacing, factors) | about},
        "": {"ome": _multiscales(name, "mean", spacing, factors), OURS: ours},
    }
    with storage_errors(root, name, "written", "see that the disk has room and the folder lets you write"):
        _write(case_url(root, name), arrays, groups)


def _warn_of_lost_labels(name: str, label: np.ndarray, finest: np.ndarray, names: Sequence[str], mm: Triple) -> None:
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


def _write(url: str, arrays: Mapping[str, np.ndarray], groups: Mapping[str, Any]) -> None:
    """Replaces what is at the URL; arrays and groups by path."""
    store = ts.KvStore.open(url).result()
    store.write("zarr.json", None).result()  # before all else: from here on the case is incomplete
    store.delete_range(ts.KvStore.KeyRange()).result()
    for write in [_write_array(url + path, array) for path, array in arrays.items()]:
        write.result()
    for path, attributes in groups.items():
        metadata = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        store.write(f"{path}zarr.json", json.dumps(metadata, indent=1)).result()


def _write_array(url: str, array: np.ndarray) -> Any:
    """Starts to write an image, a label or the foreground; returns the future."""
    chunk, shard, names = (CHUNK, SHARD, [*"zyx"]) if array.ndim == 3 else (INDEX_CHUNK, INDEX_SHARD, ["entry"])
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    # CT in 32^3 chunks: bitshuffle packs it 2.2 times (bytes 1.8), zstd 2.4 times but takes half as long again to read.
    # A label packs 50 times without, and is then read twice as fast.
    shuffle = "noshuffle" if array.dtype == np.uint8 else "bitshuffle"
    blosc = {"name": "blosc", "configuration": {"cname": "lz4", "clevel": 5, "shuffle": shuffle}}
    sharding = {
        "chunk_shape": [chunk] * array.ndim,
        "codecs": [little, blosc, {"name": "crc32c"}],
        "index_codecs": [little, {"name": "crc32c"}],
    }
    file = [min(shard, max(1, -(-size // chunk)) * chunk) for size in array.shape]
    metadata = {
        "shape": array.shape,
        "data_type": array.dtype.name,
        "fill_value": AIR if array.dtype == np.int16 else 0,
        "dimension_names": names,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": file}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    store = ts.open(array_spec(url) | {"metadata": metadata}, create=True).result()
    return store.write(array, can_reference_source_data_indefinitely=True)


def _multiscales(name: str, method: str, spacing: Triple, factors: Sequence[Triple]) -> dict[str, Any]:
    """OME-Zarr's description of the levels; mm from the centre of the native grid's first voxel."""
    datasets: list[dict[str, Any]] = []
    for level, factor in enumerate(factors, start=1):
        shift = times(spacing, ((factor[0] - 1) / 2, (factor[1] - 1) / 2, (factor[2] - 1) / 2))
        scale = {"type": "scale", "scale": times(spacing, factor)}
        translation = {"type": "translation", "translation": shift}
        datasets.insert(0, {"path": f"level_{level}", "coordinateTransformations": [scale, translation]})
    axes = [{"name": axis, "type": "space", "unit": "millimeter"} for axis in "zyx"]
    return {"version": "0.5", "multiscales": [{"name": name, "type": method, "axes": axes, "datasets": datasets}]}
