"""Where arrays lie: batches split over all devices, parameters on each."""

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh(batch: int) -> Mesh:
    """As many devices as divide a batch evenly, on one axis, `data`."""
    count = math.gcd(batch, jax.device_count())
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
