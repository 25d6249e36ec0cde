"""The real training step on one synthetic batch, compiled and ready to be timed, and how programs are timed in turn."""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from common import make_pyramid

from autocontext_jax.models.pyramid import Pyramid
from autocontext_jax.training.losses import LossConfig
from autocontext_jax.training.sharding import batch_sharding, make_mesh, replicated
from autocontext_jax.training.state import Batch, TrainState, create_state, make_train_step

Calls = dict[str, Callable[[], Any]]


@dataclasses.dataclass
class TrainingProgram:
    """A compiled training step with the state it changes.

    Attributes:
      pyramid: the model as it was before the first step, on the device.
      graph: its static part.
      compiled: the program (state, batch) -> (state, metrics).
      state: where the next step starts.
      batch: the synthetic batch, on the device.
      images: the same batch on the host, for each level [B, N, N, N, 1] float32.
      labels: for each level [B, N, N, N] uint8.
      flops: FLOPs of one step, see `convolution_flops`; three times the forward pass.
      compile_seconds: from the lowered program to the compiled one.
    """

    pyramid: Pyramid
    graph: Any
    compiled: Any
    state: TrainState
    batch: Batch
    images: tuple[np.ndarray, ...]
    labels: tuple[np.ndarray, ...]
    flops: int
    compile_seconds: float

    def step(self, batch: Batch | None = None) -> jax.Array:
        """Takes one step, on the synthetic batch unless another is given, and returns its loss."""
        self.state, metrics = self.compiled(self.state, self.batch if batch is None else batch)
        return metrics.loss


def compile_training_step(
    *,
    width: int,
    edge: int,
    batch: int,
    dtype: str,
    depth: int = 4,
    levels: int = 2,
    classes: int = 8,
    deterministic: bool = False,
) -> TrainingProgram:
    """Compiles the training step of a pyramid of U-Nets with Adam and the Dice loss, as the training job does.

    Args:
      width: channels of the first convolution.
      edge: N, voxels along a patch.
      batch: B, pyramid patches a step over all devices.
      dtype: of the network's computations.
      depth: resolutions of the network.
      levels: S.
      classes: K.
      deterministic: see `make_train_step`.
    """
    pyramid = make_pyramid(levels=levels, classes=classes, width=width, depth=depth, dtype=dtype)
    rng = np.random.default_rng(0)
    shape = (batch, *(edge,) * 3)
    images = tuple(rng.uniform(-500, 500, (*shape, 1)).astype(np.float32) for _ in range(levels))
    labels = tuple(rng.integers(0, classes, shape, np.uint8) for _ in range(levels))
    mesh = make_mesh(batch)
    sharding = batch_sharding(mesh)
    synthetic = Batch(jax.device_put(images, sharding), jax.device_put(labels, sharding))
    optimizer = optax.adam(1e-3)
    graph, state = create_state(pyramid, optimizer)
    # A copy even where nothing moves: the first step takes its arguments' memory.
    state = jax.device_put(state, replicated(mesh), may_alias=False)
    with jax.set_mesh(mesh):  # the layers look at it
        lowered = make_train_step(graph, optimizer, LossConfig(), deterministic=deterministic).lower(state, synthetic)
        started = time.perf_counter()
        compiled = lowered.compile()
    seconds = time.perf_counter() - started
    flops = 3 * batch * convolution_flops(pyramid, edge)
    return TrainingProgram(pyramid, graph, compiled, state, synthetic, images, labels, flops, seconds)


def in_turn(calls: Calls, *, steps: int, lead_in: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each kind, in blocks of `steps` calls, A B A B ...

    Only a block's end waits for the device, as a training run hardly ever does. Before each block come `lead_in` calls
    that are not timed; before the first, one of each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        wait_for(call())
    for _ in range(rounds):
        for name, call in calls.items():
            wait_for([call() for _ in range(lead_in)])
            started = time.perf_counter()
            wait_for([call() for _ in range(steps)])
            seconds[name].append((time.perf_counter() - started) / steps)
    return seconds


def wait_for(results: Any) -> None:
    """Returns when the results, JAX's or PyTorch's, have been computed."""
    jax.block_until_ready(results)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def convolution_flops(pyramid: Pyramid, edge: int) -> int:
    """FLOPs in convolutions and deconvolutions of one pyramid patch's forward pass: two a multiplication."""
    total = 0
    networks: Sequence[Any] = pyramid.networks
    for network in networks:
        for resolution, blocks in enumerate(network.analysis):
            total += sum(block.layer.kernel[...].size for block in blocks) * (edge >> resolution) ** 3
        for resolution, (up, *blocks) in enumerate(reversed(network.synthesis)):
            # An eighth of a deconvolution's weights acts on each of its output voxels.
            kernels = sum(block.layer.kernel[...].size for block in blocks) + up.layer.kernel[...].size // 8
            total += kernels * (edge >> resolution) ** 3
        total += network.head.kernel[...].size * edge**3
    return 2 * total
