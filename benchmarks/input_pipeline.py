"""How many pyramid patches a second does one core read, and augment, and how do others compare?

    python benchmarks/input_pipeline.py [--data FOLDER] [--edge 64] [--batch 3] [--factors 4 2] [--batches 30]
        [--rounds 10] [--peers]

Everything runs on one core, threads of the libraries included. `host`: sample, read and decompress crops with their
margins from the store, and batch them. `feed`: the same, with the augmentation of the paper's configuration (rotation,
translation, B-spline elastic) behind it. `read`: one pyramid patch from the store, with a cold cache and a warm one.
--data is a data set's folder or a prepared store; without it phantoms are generated.

`augment`: one patch of image and label through rotation and elastic deformation, image linear, label nearest, in turn
with --peers: batchgeneratorsv2's SpatialTransform, MONAI's Rand3DElasticd, TorchIO's RandomAffine and
RandomElasticDeformation. Each moves one patch of one scale; ours is also timed for the whole pyramid patch.
"""

import argparse
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import machine, median_ratio, prepared_cases, report, side_by_side

from autocontext_jax.data.augment import IntensityLimits, make_augment
from autocontext_jax.data.pipeline import Feed, FeedConfig, host_batches, read_batch
from autocontext_jax.geometry import SpatialLimits, crop_margins
from autocontext_jax.training.sharding import batch_sharding, data_mesh

PEERS = ("batchgeneratorsv2", "monai", "torchio")
LIMITS = SpatialLimits()


def main() -> None:
    """Measures the parts one after the other, the augmentations in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="phantoms")
    parser.add_argument("--factors", type=float, nargs="+", default=[4.0, 2.0])
    for name, default in (("edge", 64), ("batch", 3), ("batches", 30), ("rounds", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peers", action="store_true")
    flags = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # libraries count the cores when they first run
    peers = [name for name in PEERS if flags.peers and importlib.util.find_spec(name)]
    if flags.peers and len(peers) < len(PEERS):
        print(f"not installed, so left out: {', '.join(set(PEERS) - set(peers))} (pip install -e '.[peers]')")

    with tempfile.TemporaryDirectory() as folder:
        cases = prepared_cases(flags.data, tuple(flags.factors), Path(folder))
        margins = crop_margins(flags.edge, len(flags.factors), [case.spacing for case in cases], LIMITS)
        config = FeedConfig(batch=flags.batch, edge=flags.edge, spatial=LIMITS)
        rows = []

        def add(part: str, seconds: float, **more: Any) -> None:
            rows.append(
                {"part": part, "ms a pair": seconds * 1e3, "pairs a second": 1 / seconds, "ours is": "", **more}
            )

        host = host_batches(cases, config, margins, seed=0)
        add("host", seconds_a_batch(lambda: next(host), flags.batches) / flags.batch)
        host.close()
        feed = Feed(cases, config, seed=0, sharding=batch_sharding(data_mesh(flags.batch)))
        add("feed", seconds_a_batch(lambda: jax.block_until_ready(next(feed)), flags.batches) / flags.batch)
        feed.close()
        for part, cold in (("read, cold cache", True), ("read, warm cache", False)):
            times = []
            for number in range(flags.batches):
                case = cases[number % len(cases)]
                case = type(case).open(case.root, case.name, 2**28) if cold else case
                centre = case.foreground_voxel(0 if not cold else number)
                started = time.perf_counter()
                read_batch([(case, centre)], flags.edge, margins)
                times.append(time.perf_counter() - started)
            add(part, float(np.median(times)), **{"95 % ms": float(np.percentile(times, 95)) * 1e3})

    calls = {"augment, pyramid": ours(flags.edge, len(flags.factors)), "augment, one patch": ours(flags.edge, 1)}
    calls |= {
        f"augment, {name}": {"monai": monai, "torchio": torchio}.get(name, batchgenerators)(flags.edge)
        for name in peers
    }
    seconds = side_by_side(calls, flags.rounds)
    for name, times in seconds.items():
        speed = median_ratio(seconds["augment, one patch"], times)
        add(
            name,
            float(np.median(times)),
            **{"ours is": f"{speed:.1f} times as fast" if name.split(", ")[1] in PEERS else ""},
        )
    report(rows, machine=machine(*peers), flags=vars(flags))


def seconds_a_batch(draw: Callable[[], Any], batches: int) -> float:
    """Seconds a batch over many, after what was read ahead of the clock has been used up."""
    for _ in range(FeedConfig.ahead + 1):
        draw()
    started = time.perf_counter()
    for _ in range(batches):
        draw()
    return (time.perf_counter() - started) / batches


def patch(edge: int, margin: tuple[int, int, int] = (0, 0, 0)) -> tuple[np.ndarray, np.ndarray]:
    """An image in HU, int16, and a label, uint8, with a margin on all sides."""
    rng = np.random.default_rng(0)
    shape = tuple(edge + 2 * m for m in margin)
    return rng.integers(-500, 500, shape, np.int16), rng.integers(0, 8, shape, np.uint8)


def ours(edge: int, levels: int) -> Callable[[], Any]:
    """The jitted augmentation of a batch of one."""
    spacing = (1.0, 1.0, 1.0)
    margins = crop_margins(edge, levels, [spacing], LIMITS)
    augment = make_augment(edge, margins, LIMITS, IntensityLimits())
    images, labels = zip(*(patch(edge, margin) for margin in margins), strict=True)
    images, labels = (tuple(jnp.asarray(array[None]) for array in arrays) for arrays in (images, labels))
    key, number, spacings = jax.random.key(0), jnp.zeros(1, jnp.uint32), jnp.ones((1, 3))
    return lambda: augment(key, number, spacings, images, labels)


def batchgenerators(edge: int) -> Callable[[], Any]:
    """nnU-Net's own transform, always rotating and deforming, reading from a crop as large as ours."""
    import torch
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

    torch.set_num_threads(1)
    angle = np.deg2rad(LIMITS.rotation)
    transform = SpatialTransform(
        (edge,) * 3,
        0,
        random_crop=False,
        p_elastic_deform=1,
        p_rotation=1,
        rotation=(-angle, angle),
        mode_seg="nearest",
    )
    image, label = (
        torch.from_numpy(array[None]) for array in patch(edge, crop_margins(edge, 1, [(1.0,) * 3], LIMITS)[0])
    )
    return lambda: transform(image=image.float(), segmentation=label.to(torch.int16))


def monai(edge: int) -> Callable[[], Any]:
    """Rotation, translation and a smoothed random field in one resampling."""
    import torch
    from monai.transforms import Rand3DElasticd

    torch.set_num_threads(1)
    angle, shift = np.deg2rad(LIMITS.rotation), LIMITS.translation
    transform = Rand3DElasticd(
        ("image", "label"), sigma_range=(5, 8), magnitude_range=(50, 150), spatial_size=(edge,) * 3, prob=1,
        rotate_range=(angle,) * 3, translate_range=(shift,) * 3, mode=("bilinear", "nearest"), padding_mode="border",
    )  # fmt: skip
    image, label = (
        torch.from_numpy(array[None]) for array in patch(edge, crop_margins(edge, 1, [(1.0,) * 3], LIMITS)[0])
    )
    return lambda: transform({"image": image.float(), "label": label})


def torchio(edge: int) -> Callable[[], Any]:
    """Affine and B-spline deformation, one after the other."""
    import torch
    import torchio as tio

    torch.set_num_threads(1)
    transform = tio.Compose(
        [
            tio.RandomAffine(scales=0, degrees=LIMITS.rotation, translation=LIMITS.translation),
            tio.RandomElasticDeformation(
                num_control_points=max(5, edge // LIMITS.elastic_spacing + 3), max_displacement=4
            ),
        ]
    )
    image, label = (torch.from_numpy(array[None]) for array in patch(edge))
    return lambda: transform(tio.Subject(image=tio.ScalarImage(tensor=image.float()), label=tio.LabelMap(tensor=label)))


if __name__ == "__main__":
    main()
