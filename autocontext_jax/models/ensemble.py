"""Several trained pyramids as one, such as those of the folds of a cross-validation."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from autocontext_jax.models.activations import activate, logits_of
from autocontext_jax.models.pyramid import Pyramid


class Ensemble(nnx.Module):
    """Pyramids of one kind in inference mode, whose maps are averaged at each level.

    The average of a level is also the context that every member sees at the next one. For prediction it has the
    interface of a pyramid.

    Args:
      members: of the same networks. How they normalise CT may differ.

    Attributes:
      config: of the first member.
    """

    def __init__(self, members: Sequence[Pyramid]):
        self.config = members[0].config
        self._images = tuple(member.config.image for member in members)
        graphs, states = zip(*map(nnx.split, members), strict=True)
        # One pyramid, each variable of which holds those of all members.
        self.stacked = nnx.merge(graphs[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
        self.scaling = nnx.Variable(jnp.stack([np.stack(image.scaling()) for image in self._images]))

    def members(self) -> list[Pyramid]:
        """The pyramids that it was made of."""
        graph, state = nnx.split(self.stacked)
        made = []
        for number, image in enumerate(self._images):
            member = nnx.merge(graph, jax.tree.map(lambda leaf, number=number: leaf[number], state))
            member.config = dataclasses.replace(member.config, image=image)
            made.append(member)
        return made

    def level(self, level: int, image: jax.Array, maps: jax.Array | None) -> jax.Array:
        """Logits of the average maps of one level; arguments and result as `Pyramid.level`."""
        graph, state = nnx.split(self.stacked)
        activation = self.config.activation

        # One member after the other, so that it takes hardly more memory than one; the network is compiled once.
        def add_member(total: jax.Array, member: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
            state, scaling = member
            logits = nnx.merge(graph, state, copy=True).level(level, image, maps, scaling=scaling)
            return total + activate(logits, activation) / len(self._images), None

        total = jnp.zeros((*image.shape[:-1], self.config.classes), jnp.float32)
        return logits_of(lax.scan(add_member, total, (state, self.scaling[...]))[0], activation)
