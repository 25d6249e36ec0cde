"""How long does a whole scan take, and how much memory?

    python benchmarks/predict_scan.py [--slices 100 300 800] [--size 512] [--width 32] [--factors 1] [--tile 96]
        [--overlap 0.5] [--network unet|trivial] [--peers monai nnunet] [--repeats 1] [--device cpu|gpu]

From the scan's voxels in memory to its mask on the same grid. The peers (MONAI's SlidingWindowInferer, Gaussian, and
nnU-Net's nnUNetPredictor without mirroring) run a PyTorch network with the same weights on tiles of the same size and
overlap at native resolution; their intensities are scaled beforehand and the network is seen to give our logits. With
--factors 1 --tile 96 all compute the same tiles; without --tile ours are those that it chooses, and overlap less. With
--factors 4 2 ours is the whole pyramid: what a user gets for the same grid of voxels. --network trivial computes logits
by one multiplication and shows the tiling machinery alone.

Each measurement is a process of its own, in turn, so that its largest resident memory is its own. Compilation is not
counted: for peers a small scan goes first, for ours, whose tiles follow from the scan's size, one of the same size.
With --cold nothing goes before ours, and its compilation counts. `per_scan_byte` is how much more memory the longest
scan takes than the shortest, in units of int16 scan; what does not grow with the scan is the rest.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import machine, make_pyramid, median_ratio, peak_gb, report
from flax import nnx

from autocontext_jax.inference.predictor import Predictor
from autocontext_jax.inference.tiling import PredictorConfig
from autocontext_jax.models.pyramid import Pyramid, PyramidConfig
from autocontext_jax.runtime import fuse_results
from autocontext_jax.training.state import inference_model

PEERS = {"monai": "monai", "nnunet": "nnunetv2"}
WINDOW = 500  # HU that become 1


def main() -> None:
    """Measures every method at every length, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, nargs="+", default=[100, 300, 800])
    for name, default in (("size", 512), ("width", 32), ("classes", 8), ("tile", 96), ("repeats", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--our-tile", type=int, default=0, help="edge of cubes; 0: boxes, as by default")
    parser.add_argument(
        "--memory", type=float, default=0.0, help="GB that a box of ours may take; 0: see PredictorConfig"
    )
    parser.add_argument("--cold", action="store_true", help="count our compilation too")
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0])
    parser.add_argument("--network", default="unet", choices=["unet", "trivial"])
    parser.add_argument("--peers", nargs="*", default=[], choices=list(PEERS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--only", choices=["ours", *PEERS], help="measure this one here, once: what the others start")
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cuda,cpu" if flags.device == "gpu" else "cpu")
    if flags.only:
        fuse_results()  # as the job does
        print(json.dumps(measure(flags)))
        return

    missing = [peer for peer in flags.peers if importlib.util.find_spec(PEERS[peer]) is None]
    for peer in missing:
        print(f"{peer} is not installed: pip install {PEERS[peer]}")
    methods = ["ours", *(peer for peer in flags.peers if peer not in missing)]
    rows = []
    for slices in flags.slices:
        found: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
        for _ in range(flags.repeats):
            for method in methods:
                command = [sys.executable, *sys.argv, "--only", method, "--slices", str(slices)]
                run = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
                found[method].append(json.loads(run.stdout.splitlines()[-1]))
        ours = [run["seconds"] for run in found["ours"]]
        for method, runs in found.items():
            seconds = [run["seconds"] for run in runs]
            rows.append(
                {
                    "method": method,
                    "scan": f"{slices}x{flags.size}x{flags.size}",
                    "scan_gb": 2 * slices * flags.size**2 / 1e9,
                    "seconds": float(np.median(seconds)),
                    "ours_is_faster": median_ratio(ours, seconds),
                    "peak_gb": max(run["peak_gb"] for run in runs),
                }
            )
    growth = {}
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        shortest, longest = (choose(own, key=lambda row: row["scan_gb"]) for choose in (min, max))
        if longest is not shortest:
            growth[method] = (longest["peak_gb"] - shortest["peak_gb"]) / (longest["scan_gb"] - shortest["scan_gb"])
            print(f"{method}: {growth[method]:.2f} bytes more for each byte of int16 scan")
    report(rows, per_scan_byte=growth, machine=machine(), flags=vars(flags))


def measure(flags: argparse.Namespace) -> dict[str, float]:
    """Seconds and peak memory of one method on one scan."""
    rng = np.random.default_rng(0)
    shape = (flags.slices[0], flags.size, flags.size)
    model = make_model(flags)
    predict = our_predictor(flags, model) if flags.only == "ours" else peer(flags, model)
    if flags.only != "ours" or not flags.cold:
        first = shape if flags.only == "ours" else (8, 8, 8)  # peers have nothing to compile: one tile
        predict(rng.integers(-WINDOW, WINDOW, first, dtype=np.int16))
    voxels = rng.integers(-WINDOW, WINDOW, shape, dtype=np.int16)
    started = time.perf_counter()
    mask = predict(voxels)
    seconds = time.perf_counter() - started
    assert mask.shape == shape
    return {"seconds": seconds, "peak_gb": peak_gb()}


class Trivial(nnx.Module):
    """Logits by one multiplication."""

    def __init__(self, levels: int, classes: int):
        self.config = PyramidConfig(levels=levels, classes=classes)
        self.slope = nnx.Param(jnp.linspace(-2.0, 3.0, classes))

    def level(self, level: int, image: jax.Array, maps: jax.Array | None) -> jax.Array:
        """[B, D, H, W, 1] HU -> [B, D, H, W, K]."""
        return jnp.clip(image.astype(jnp.float32) / WINDOW, -1, 1) * self.slope[...]


def make_model(flags: argparse.Namespace) -> Any:
    """The model to predict with."""
    if flags.network == "trivial":
        return Trivial(len(flags.factors), flags.classes)
    pyramid = make_pyramid(levels=len(flags.factors), classes=flags.classes, width=flags.width)
    return inference_model(*nnx.split(pyramid, nnx.Param, ...))


def our_predictor(flags: argparse.Namespace, model: Pyramid) -> Callable[[np.ndarray], np.ndarray]:
    """From [D, H, W] int16 to its mask."""
    config = PredictorConfig((flags.our_tile,), memory=flags.memory)
    predictor = Predictor(model, config, align=(8, 8, 8))
    factors = tuple((factor,) * 3 for factor in flags.factors)
    return lambda voxels: predictor.masks(voxels[None], factors)[len(factors)]


def peer(flags: argparse.Namespace, model: Any) -> Callable[[np.ndarray], np.ndarray]:
    """The same with MONAI or nnU-Net: level 1's network, which sees the image alone."""
    import torch

    device = torch.device("cuda" if flags.device == "gpu" else "cpu")
    if flags.network == "trivial":
        slope = torch.linspace(-2.0, 3.0, flags.classes, device=device)[:, None, None, None]
        network = torch_module(lambda x: x * slope)
    else:
        from torch_pyramid import to_torch

        network = to_torch(model).networks[0].to(device).eval()
        check_same_function(model, network, device)

    def scaled(voxels: np.ndarray):
        return torch.from_numpy(voxels).float().div_(WINDOW).clamp_(-1, 1)[None]

    if flags.only == "monai":
        from monai.inferers import SlidingWindowInferer

        inferer = SlidingWindowInferer((flags.tile,) * 3, 1, flags.overlap, mode="gaussian")

        def logits(voxels: np.ndarray):
            return inferer(scaled(voxels)[None].to(device), network)[0]

    else:
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        predictor = nnUNetPredictor(
            tile_step_size=1 - flags.overlap,
            use_mirroring=False,
            perform_everything_on_device=flags.device == "gpu",
            device=device,
            allow_tqdm=False,
        )
        # What `manual_initialization` takes from a plans file.
        predictor.network = network
        predictor.configuration_manager = SimpleNamespace(patch_size=(flags.tile,) * 3)
        predictor.label_manager = SimpleNamespace(num_segmentation_heads=flags.classes)

        def logits(voxels: np.ndarray):
            return predictor.predict_sliding_window_return_logits(scaled(voxels))

    def predict(voxels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return logits(voxels).argmax(0).to(torch.uint8).cpu().numpy()

    return predict


def torch_module(function: Callable) -> Any:
    """A function of one tensor as a PyTorch module."""
    import torch

    class Module(torch.nn.Module):
        def forward(self, x):
            return function(x)

    return Module().eval()


def check_same_function(model: Pyramid, network: Any, device: Any) -> None:
    """Both give the same logits of level 1 to a thousandth of their spread."""
    import torch

    image = np.random.default_rng(1).integers(-WINDOW, WINDOW, (1, 16, 16, 16)).astype(np.float32)
    ours = np.array(jax.jit(lambda x: model.level(1, x, None))(image))
    with torch.inference_mode():
        theirs = network(torch.from_numpy(image[None] / WINDOW).to(device)).cpu().numpy().transpose(0, 2, 3, 4, 1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3 * ours.std())


if __name__ == "__main__":
    main()
