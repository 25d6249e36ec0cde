"""How many pyramid patches a second does the jitted training step make on the devices here?

    python benchmarks/train_step.py [--width 32] [--edge 64] [--batch 1,2,3,6] [--dtype float32|bfloat16] [--levels 2]
        [--depth 4] [--data phantoms] [--peers] [--steps 10] [--rounds 3] [--device cpu]

The step is the real one (forward, total Dice loss, gradients, Adam) on one synthetic batch; every combination of the
comma-separated sizes is a row. Compilation is timed apart. FLOPs are counted by hand: two for each weight of a
convolution or deconvolution at each voxel, times three for forward and both gradients; XLA's own count changes with the
lowering. Memory is what the compiled program says (without the scratch of foreign calls).

--data FOLDER (a data set, or a prepared store) or `phantoms` runs blocks of steps on batches from the real pipeline,
augmented, in turn with blocks on the synthetic batch. What the loader read while others ran is used up before the clock
starts. `feed` is the fed rate over the synthetic one: 1 means that the step never waits.

--peers runs the same network, loss and Adam in eager PyTorch on the same device (a CPU with all its cores, or one GPU
with cuDNN's own benchmark of its algorithms), checks that both have the same loss, and takes the better of PyTorch's
two memory layouts; then the forward pass in eval mode likewise. Ratios above 1 mean that ours is faster. In bfloat16
PyTorch runs under autocast; in float32 on GPUs both multiply in TF32.
"""

import argparse
import importlib.util
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import machine, median_ratio, prepared_cases, report
from training_program import Calls, compile_training_step, in_turn

from autocontext_jax.data.augmentation_ranges import SpatialRanges
from autocontext_jax.data.loader import Loader, LoaderConfig
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.geometry import cube
from autocontext_jax.runtime import compiler_options, disable_asynchronous_dispatch, fuse_results, keep_freed_memory
from autocontext_jax.training.sharding import batch_sharding, make_mesh
from autocontext_jax.training.state import Batch, inference_model


def main() -> None:
    """Measures every combination of sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", "32"), ("edge", "64"), ("batch", "3")):
        parser.add_argument(f"--{name}", type=_numbers, default=default)
    for name, number in (("levels", 2), ("depth", 4), ("classes", 8), ("steps", 10), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--data", default="", help="a data set, a prepared store of as many levels, or `phantoms`")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--device", default="", help="JAX's name of a platform; its own choice unless given")
    flags = parser.parse_args()
    jax.config.update("jax_platforms", flags.device or None)
    # As the job does. PyTorch, in the same process, then finds its memory kept too.
    keep_freed_memory()
    if flags.dtype == "float32":
        fuse_results()
    disable_asynchronous_dispatch()
    peers = flags.peers and importlib.util.find_spec("torch") is not None
    if flags.peers and not peers:
        print("PyTorch is not installed (pip install torch): ours is measured alone")

    with tempfile.TemporaryDirectory() as folder:
        factors = tuple(2 ** (flags.levels - level) for level in range(flags.levels))
        cases = prepared_cases(flags.data, factors, Path(folder)) if flags.data else []
        sizes = itertools.product(flags.width, flags.edge, flags.batch)
        rows = [measure(*size, flags, cases=cases, peers=peers) for size in sizes]
    means = {}
    for program in ("train", "predict") if peers else ():
        means[program] = float(np.exp(np.mean([np.log(row[f"{program} ratio"]) for row in rows])))
    if means:
        means["both"] = float(np.sqrt(means["train"] * means["predict"]))
        print("geometric mean of the ratios:", ", ".join(f"{name} {mean:.3g}" for name, mean in means.items()))
    versions = machine(*(["torch"] if peers else []))
    report(rows, geometric_means=means, machine=versions, flags=vars(flags))


def measure(
    width: int, edge: int, batch: int, flags: Any, *, cases: Sequence[PreparedCase], peers: bool
) -> dict[str, Any]:
    """One row of the table."""
    classes = len(cases[0].labels) if cases else flags.classes
    program = compile_training_step(
        width=width, edge=edge, batch=batch, dtype=flags.dtype, depth=flags.depth, levels=flags.levels, classes=classes
    )
    rivals = None
    if peers:
        from torch_pyramid import training_and_prediction

        rivals = training_and_prediction(program.pyramid, program.images, program.labels, flags.dtype)
    frozen = jax.device_put((program.state.params, program.state.batch_stats), may_alias=False)
    first_loss = float(program.step())
    calls: Calls = {"ours": program.step}
    feed = None
    if cases:
        feed_config = LoaderConfig(batch_size=batch, patch_size=(edge,))
        sharding = batch_sharding(make_mesh(batch))
        feed = Loader(
            cases, feed_config, cube(edge, len(cases[0].shapes)), seed=0, sharding=sharding, spatial=SpatialRanges()
        )
        fed = iter(feed)
        calls["fed"] = lambda: program.step(Batch(*next(fed)))
    if rivals:
        losses = {name: float(call()) for name, call in rivals["train"].items()}
        # On GPUs float32 is multiplied in TF32, which has the precision of a float16.
        tolerance = 1e-4 if flags.dtype == "float32" and jax.default_backend() == "cpu" else 1e-2
        assert all(abs(loss - first_loss) < tolerance for loss in losses.values()), (first_loss, losses)
        calls |= rivals["train"]
    seconds = in_turn(calls, steps=flags.steps, lead_in=LoaderConfig.prefetch if feed else 0, rounds=flags.rounds)
    median = float(np.median(seconds["ours"]))
    row = {
        "width": width,
        "edge": edge,
        "batch": batch,
        "dtype": flags.dtype,
        "compile s": program.compile_seconds,
        "step s": median,
        "patches/s": batch / median,
        "GFLOP/s": program.flops / median / 1e9,
        "peak GB": program.compiled.memory_analysis().peak_memory_in_bytes / 1e9,
    }
    if feed:
        feed.close()
        row["feed"] = 1 / median_ratio(seconds["ours"], seconds["fed"])
    if rivals:
        row |= _against("train", seconds)
        predict = jax.jit(
            lambda weights, images: inference_model(program.graph, *weights)(images),
            compiler_options=compiler_options(jax.default_backend()),
        )
        calls = {"ours": lambda: predict(frozen, program.batch.images), **rivals["predict"]}
        row |= _against("predict", in_turn(calls, steps=flags.steps, lead_in=0, rounds=flags.rounds))
    return row


def _against(program: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Columns that compare a program with PyTorch in its faster layout."""
    layout = min(("NCDHW", "NDHWC"), key=lambda name: float(np.median(seconds[name])))
    ratio = median_ratio(seconds["ours"], seconds[layout])
    return {f"{program} torch s": float(np.median(seconds[layout])), "layout": layout, f"{program} ratio": ratio}


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
