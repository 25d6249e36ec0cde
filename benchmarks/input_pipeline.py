"""How many pyramid patches a second does one core read, and augment, and how do others compare?

    python benchmarks/input_pipeline.py [--data FOLDER] [--cases 4] [--size 200 256 256] [--spacing 1.5 1.5 1.5]
        [--factors 2 1] [--edge 64] [--batch 3] [--batches 30] [--rounds 10] [--peers]

Everything runs on one core, threads of the libraries included. `host`: sample, read and decompress crops with their
margins from the store, and batch them. `feed`: the same, with the augmentation of the paper's configuration (rotation,
translation, B-spline elastic) behind it. `read`: a crop with its margin of one level. What is not called cached decodes
every chunk anew, as in a data set larger than memory; the compressed files lie in the system's cache. CPU ms are those
of all threads: work of others on the core does not count. --data is a data set's folder or a prepared store; without it
phantoms are generated whose levels by factors 2 and 1 are those of scans of 400 x 512 x 512 by the paper's 4 and 2.

`augment`: one patch of image and label through rotation and elastic deformation, image linear, label nearest, in turn
with --peers: batchgeneratorsv2's SpatialTransform (also with labels as nnU-Net moves them, linear a class), MONAI's
Rand3DElasticd, TorchIO's RandomAffine and RandomElasticDeformation. Each moves one patch of one scale, the same one,
with a margin; ours is also timed for the whole pyramid patch.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import machine, median_ratio, prepared_cases, report, side_by_side

from autocontext_jax.data.augment import make_augment
from autocontext_jax.data.augmentation_ranges import IntensityRanges, SpatialRanges, crop_margins
from autocontext_jax.data.loader import Loader, LoaderConfig, case_margins, host_batches, largest_margins, read_batch
from autocontext_jax.data.phantom.dataset import write_dataset
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.geometry import cube
from autocontext_jax.training.sharding import batch_sharding, make_mesh

PEERS = ("batchgeneratorsv2", "monai", "torchio")
RANGES = SpatialRanges()

Arrays = tuple[np.ndarray, ...]  # [1, D, H, W] of each level, coarsest first


def main() -> None:
    """Measures the parts one after the other, the augmentations in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--size", type=int, nargs=3, default=(200, 256, 256), help="voxels of the phantoms, z y x")
    parser.add_argument("--spacing", type=float, nargs=3, default=(1.5, 1.5, 1.5), help="mm of the phantoms, z y x")
    parser.add_argument("--factors", type=float, nargs="+", default=(2.0, 1.0))
    for name, default in (("cases", 4), ("edge", 64), ("batch", 3), ("batches", 30), ("rounds", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peers", action="store_true")
    flags = parser.parse_args()
    for thread in os.listdir("/proc/self/task"):  # those to come inherit it; libraries count the cores at first use
        os.sched_setaffinity(int(thread), {min(os.sched_getaffinity(0))})
    peers = [name for name in PEERS if flags.peers and importlib.util.find_spec(name)]
    if flags.peers and len(peers) < len(PEERS):
        print(f"not installed, so left out: {', '.join(set(PEERS) - set(peers))} (pip install -e '.[peers]')")

    with tempfile.TemporaryDirectory() as folder:
        data = flags.data
        if data is None:
            data, size, spacing = f"{folder}/phantoms", tuple(flags.size), tuple(flags.spacing)
            write_dataset(Path(data), training=flags.cases, test=0, size=size, spacing=spacing, seed=0)
        cached = prepared_cases(data, tuple(flags.factors), Path(folder))
        cases = [dataclasses.replace(case, cache_bytes=0) for case in cached]
        sizes = flags.edge, flags.batch, flags.batches
        rows = measure_loader(cases, *sizes, "") + measure_loader(cached, *sizes, ", cached")
        patch = cube(flags.edge, len(flags.factors))
        margins = crop_margins(patch, (1.0, 1.0, 1.0), RANGES)
        pair = read_batch([(*draw_centre(cases, np.random.default_rng(0)), margins)], patch, margins)

    images, labels = pair["images"], pair["labels"]
    calls = {"augment, pyramid": ours(flags.edge, images, labels)}
    calls["augment, one patch"] = ours(flags.edge, images[-1:], labels[-1:])
    one = images[-1][0], labels[-1]  # [1, D, H, W] each, the label's batch axis of one as its channel
    if "batchgeneratorsv2" in peers:
        calls["augment, batchgeneratorsv2"] = batchgenerators(flags.edge, *one, "nearest")
        calls["augment, batchgeneratorsv2, labels linear"] = batchgenerators(flags.edge, *one, "bilinear")
    for name, other in (("monai", monai), ("torchio", torchio)):
        if name in peers:
            calls[f"augment, {name}"] = other(flags.edge, *one)
    seconds = side_by_side(calls, flags.rounds)
    for name, times in seconds.items():
        speed = median_ratio(seconds["augment, one patch"], times)
        theirs = any(peer in name for peer in PEERS)
        rows.append(row(name, times) | {"ours is": f"{speed:.1f} times as fast" if theirs else ""})
    report(rows, machine=machine(*peers), flags=vars(flags))


def row(part: str, seconds: Sequence[float], cpu: float | None = None) -> dict[str, Any]:
    """A line of the table from the seconds, and the mean CPU seconds, that a pair took."""
    middle, slow = (1e3 * np.percentile(seconds, (50, 95))).tolist()
    spread = slow if len(seconds) > 1 else ""
    cpu_ms = "" if cpu is None else cpu * 1e3
    return {
        "part": part,
        "pairs a second": 1e3 / middle,
        "ms": middle,
        "95 % ms": spread,
        "CPU ms": cpu_ms,
        "ours is": "",
    }


def measure_loader(cases: list[PreparedCase], edge: int, batch: int, batches: int, about: str) -> list[dict[str, Any]]:
    """Lines of the table for the host part, the whole feed, and the read of a crop of each level."""
    patch = cube(edge, len(cases[0].shapes))
    every = [case_margins(case, patch, RANGES) for case in cases]
    margins = largest_margins(every)
    config = LoaderConfig(batch_size=batch, patch_size=(edge,))
    sources: dict[str, Callable[[], Any]] = {
        "host": lambda: host_batches(cases, config, patch, every, seed=0),
        "feed": lambda: Loader(cases, config, patch, seed=0, sharding=batch_sharding(make_mesh(batch)), spatial=RANGES),
    }
    rows = []
    for part, make in sources.items():
        source = make()
        seconds, cpu = timed(functools.partial(next, source), batches)
        source.close()
        # The mean: what was read ahead makes some batches quick and the next ones slow.
        rows.append(row(part + about, [float(np.mean(seconds)) / batch], cpu / batch))
    rng = np.random.default_rng(0)
    for level, margin in enumerate(margins, start=1):

        def read(level: int = level, margin: tuple[int, int, int] = margin or (0, 0, 0)) -> None:
            case, centre = draw_centre(cases, rng)
            z, y, x = np.subtract(patch.starts(centre)[level - 1], margin).tolist()
            depth, height, width = (edge + 2 * m for m in margin)
            case.read(level, (z, y, x), (depth, height, width)).result()

        rows.append(row(f"read, level {level}{about}", *timed(read, batches)))
    return rows


def timed(call: Callable[[], Any], count: int) -> tuple[list[float], float]:
    """Seconds of each call and CPU seconds of all threads a call, after what was read ahead has been used up."""
    for _ in range(LoaderConfig.prefetch + 1):
        jax.block_until_ready(call())
    seconds, cpu = [], time.process_time()
    for _ in range(count):
        started = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return seconds, (time.process_time() - cpu) / count


def draw_centre(cases: list[PreparedCase], rng: np.random.Generator) -> tuple[PreparedCase, tuple[int, int, int]]:
    """A case and a voxel of its foreground."""
    case = cases[rng.integers(len(cases))]
    return case, case.foreground_voxel(int(rng.integers(case.foreground_offsets[-1])))


def ours(edge: int, images: Arrays, labels: Arrays) -> Callable[[], Any]:
    """The jitted augmentation of a batch of one: a pyramid patch, or its finest level alone."""
    margins = tuple(tuple((size - edge) // 2 for size in label.shape[1:]) for label in labels)
    augment = make_augment(cube(edge, len(labels)), margins, RANGES, IntensityRanges())
    arrays = [tuple(map(jnp.asarray, level)) for level in (images, labels)]
    key, number, spacings = jax.random.key(0), jnp.zeros(1, jnp.uint32), jnp.ones((1, 3))
    return lambda: augment(key, number, spacings, *arrays)


def batchgenerators(edge: int, image: np.ndarray, label: np.ndarray, mode: str) -> Callable[[], Any]:
    """nnU-Net's own transform, always rotating and deforming."""
    import torch
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

    torch.set_num_threads(1)
    angle = np.deg2rad(RANGES.rotation)
    transform = SpatialTransform(
        (edge,) * 3, 0, random_crop=False, p_elastic_deform=1, p_rotation=1, rotation=(-angle, angle), mode_seg=mode
    )
    voxels, organs = torch.from_numpy(image), torch.from_numpy(label.astype(np.int16))
    return lambda: transform(image=voxels.float(), segmentation=organs)


def monai(edge: int, image: np.ndarray, label: np.ndarray) -> Callable[[], Any]:
    """Rotation, translation and a smoothed random field in one resampling."""
    import torch
    from monai.transforms import Rand3DElasticd

    torch.set_num_threads(1)
    angle, shift = np.deg2rad(RANGES.rotation), RANGES.translation
    transform = Rand3DElasticd(
        ("image", "label"), sigma_range=(5, 8), magnitude_range=(50, 150), spatial_size=(edge,) * 3, prob=1,
        rotate_range=(angle,) * 3, translate_range=(shift,) * 3, mode=("bilinear", "nearest"), padding_mode="border",
    )  # fmt: skip
    voxels, organs = torch.from_numpy(image), torch.from_numpy(label)
    return lambda: transform({"image": voxels.float(), "label": organs})


def torchio(edge: int, image: np.ndarray, label: np.ndarray) -> Callable[[], Any]:
    """Affine and B-spline deformation, one after the other; both keep the size, so it gets no margin."""
    import torch
    import torchio as tio

    torch.set_num_threads(1)
    points = edge // RANGES.elastic_spacing + 3
    transform = tio.Compose(
        [
            tio.RandomAffine(scales=0, degrees=RANGES.rotation, translation=RANGES.translation),
            tio.RandomElasticDeformation(num_control_points=max(5, points), max_displacement=RANGES.elastic_sigma),
        ]
    )
    depth, height, width = (slice((size - edge) // 2, (size + edge) // 2) for size in image.shape[1:])
    voxels, organs = (torch.from_numpy(array[:, depth, height, width].copy()) for array in (image, label))
    return lambda: transform(
        tio.Subject(image=tio.ScalarImage(tensor=voxels.float()), label=tio.LabelMap(tensor=organs))
    )


if __name__ == "__main__":
    main()
