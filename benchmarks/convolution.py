"""How long does one convolution take on this processor, and each of its gradients?

    python benchmarks/convolution.py [--shapes 3x64x8x16,1x32x64x256] [--dtype float32,bfloat16] [--repeats 9] [--peers]

A shape is size x edge x inputs x outputs: of a kernel of size^3 and a volume of edge^3 voxels, batch 1. Ours is oneDNN
as `models/convolution.py` calls it, `XLA` is what that file does without the library; --peers adds PyTorch, channels
last. `ms` is ours; the columns after it say how many times as fast it is as each other way, taken in turn.
"""

import argparse
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from common import machine, median_ratio, report, side_by_side

from autocontext_jax.models import convolution, onednn
from autocontext_jax.runtime import disable_asynchronous_dispatch, keep_freed_memory

# What a U-Net of width 8 to 32 has of them, finest first; the last is a deconvolution's.
SHAPES = "3x64x8x16,3x64x16x16,3x64x32x32,3x32x32x32,3x16x128x128,3x8x512x512,3x4x512x512,1x32x64x256"
KINDS = ("convolution", "input gradient", "filter gradient")

Calls = dict[str, Callable[[], Any]]  # by kind


def main() -> None:
    """Measures every shape in every type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--dtype", type=lambda text: text.split(","), default="float32,bfloat16")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peers", action="store_true")
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    keep_freed_memory()
    disable_asynchronous_dispatch()
    peers = flags.peers and importlib.util.find_spec("torch") is not None
    if flags.peers and not peers:
        print("PyTorch is not installed (pip install torch): ours is measured alone")
    rows = []
    for dtype in flags.dtype:
        for shape in flags.shapes.split(","):
            size, edge, inputs, outputs = (int(number) for number in shape.split("x"))
            row: dict[str, Any] = {"type": dtype, "kernel": size, "edge": edge, "channels": f"{inputs} to {outputs}"}
            rng = np.random.default_rng(0)
            shapes = (1, *(edge,) * 3, inputs), (outputs, *(size,) * 3, inputs), (1, *(edge,) * 3, outputs)
            arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
            ways = {"ours": ours(arrays, dtype), "XLA": xlas(arrays, dtype)}
            if peers:
                ways["PyTorch"] = torchs(arrays, dtype)
            for kind in KINDS:
                seconds = side_by_side({way: calls[kind] for way, calls in ways.items()}, flags.repeats)
                row[f"{kind} ms"] = 1e3 * float(np.median(seconds["ours"]))
                row |= {
                    f"{kind}, {way}": median_ratio(seconds["ours"], seconds[way]) for way in seconds if way != "ours"
                }
            rows.append(row)
    report(rows, machine=machine(*(["torch"] if peers else [])), onednn=onednn.version(), flags=vars(flags))


def ours(arrays: list[np.ndarray], dtype: str) -> Calls:
    """As the layers call it; x, kernel and gradient are [1, D, H, W, C], [O, k, k, k, C] and [1, D, H, W, O]."""
    return _compiled(convolution.cpu_convolution, convolution.cpu_gradients, arrays, dtype)


def xlas(arrays: list[np.ndarray], dtype: str) -> Calls:
    """Without oneDNN."""
    return _compiled(convolution.planar_convolution, convolution.planar_gradients, arrays, dtype)


def _compiled(convolution: Callable, gradients: Callable, arrays: list[np.ndarray], dtype: str) -> Calls:
    x, kernel, gradient = (jax.numpy.asarray(array, dtype) for array in arrays)
    # Of both gradients the compiler leaves out the one that is not asked for.
    programs = (
        jax.jit(lambda *arrays: convolution(*arrays[:2])),
        jax.jit(lambda *arrays: gradients(*arrays)[0]),
        jax.jit(lambda *arrays: gradients(*arrays)[1]),
    )
    calls = (lambda program=program: program(x, kernel, gradient) for program in programs)
    return dict(zip(KINDS, calls, strict=True))


def torchs(arrays: list[np.ndarray], dtype: str) -> Calls:
    """PyTorch's on all cores of this process."""
    import torch
    from torch.nn import functional, grad

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    kind = getattr(torch, dtype)
    x, kernel, gradient = (
        torch.from_numpy(np.moveaxis(array, -1, 1)).to(kind, memory_format=torch.channels_last_3d) for array in arrays
    )
    padding = kernel.shape[-1] // 2
    return {
        "convolution": lambda: functional.conv3d(x, kernel, padding=padding),
        "input gradient": lambda: grad.conv3d_input(x.shape, kernel, gradient, padding=padding),
        "filter gradient": lambda: grad.conv3d_weight(x, kernel.shape, gradient, padding=padding),
    }


if __name__ == "__main__":
    main()
