"""Where arrays lie: batches split over the mesh's axis `data`, the depth of every volume over its axis `space`.

XLA splits the programs accordingly: gradients and the normalisation's sums are reduced over all devices, convolutions
fetch the planes that they miss from their neighbours along `space`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from autocontext_jax.errors import require


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The section `mesh` of a configuration: how devices share the work.

    Attributes:
      space: devices that share the depth of one patch; the others share the batch.
      split_optimizer: whether each device that shares the batch holds a share of the optimiser's state, not a copy.
    """

    space: int = 1
    split_optimizer: bool = False

    def __post_init__(self):
        require(self.space >= 1, self, "space", "at least 1")


def make_mesh(batch: int, space: int = 1) -> Mesh:
    """The mesh `data` x `space` of as many devices as divide the work evenly, those of one process side by side.

    Args:
      batch: B, which `data` divides.
      space: devices that share the depth of one patch.

    Raises:
      ValueError: fewer devices than `space`.
    """
    if space > jax.device_count():
        raise ValueError(f"space is {space}; expected at most the {jax.device_count()} devices that there are")
    data = math.gcd(batch, jax.device_count() // space)
    shape, axes = (data, space), ("data", "space")
    return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: data * space])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of patches and whatever has their first axes, [B, D, ...]."""
    return NamedSharding(mesh, PartitionSpec("data", "space"))


def sample_sharding(batch: NamedSharding) -> NamedSharding:
    """Of what a sample has without a depth, [B, ...], from that of its patches."""
    return NamedSharding(batch.mesh, PartitionSpec(*batch.spec[:1]))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, state: Any, *, split_optimizer: bool = False) -> Any:
    """Where each leaf of a `TrainState` lies: a copy on every device, or of the optimiser's state a share on each.

    With the shares XLA reduces each gradient to the device that updates its share of the parameters, and gathers these
    (the first stage of Rajbhandari et al., ZeRO, 2020).

    Args:
      mesh: see `make_mesh`.
      state: arrays or their shapes.
      split_optimizer: whether to split the optimiser's state.
    """
    whole = replicated(mesh)
    everywhere = jax.tree.map(lambda leaf: whole, state)
    if not split_optimizer:
        return everywhere

    def share(leaf: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % mesh.shape["data"] == 0]
        if not axes:
            return whole
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*(None,) * longest, "data"))

    return everywhere.replace(optimizer=jax.tree.map(share, state.optimizer))


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process holds whole, laid out over the devices of all."""
    part: Callable[[Any], np.ndarray] = array.__getitem__
    return jax.make_array_from_callback(array.shape, sharding, part)
