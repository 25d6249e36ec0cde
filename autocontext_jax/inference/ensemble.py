"""Several trained models as one, whose maps are averaged."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from autocontext_jax.errors import UserError
from autocontext_jax.inference.description import Description
from autocontext_jax.inference.model import Model
from autocontext_jax.models.pyramid import Pyramid
from autocontext_jax.sections import as_dict, flat_keys


def ensemble(models: Sequence[Model], *, name: str = "", evaluation: dict[str, Any] | None = None) -> Model:
    """One model whose maps are the average of those of several, at each level.

    A scan takes nearly as many times longer as there are models. `Model.save` writes all into one model file.

    Args:
      models: of the same classes, network, levels, channels and tiling. How they normalise CT may differ. Each member
        of an ensemble counts as one.
      name: of the new model; that of the first unless given.
      evaluation: how the new model was scored, see `Description`; it was not unless given.

    Raises:
      UserError: there is none, or they differ in what must be the same.
    """
    models = list(models)
    if not models or not all(isinstance(model, Model) for model in models):
        raise UserError(f"an ensemble of {models}; expected one or more models that autocontext_jax.load returns")
    first = models[0].description
    for model in models[1:]:
        _check_alike(first, model.description)
    members = [member for model in models for member in model.members]
    described, pyramids = zip(*members, strict=True)
    _check_networks(pyramids)
    spacings = [model.description.trained_spacing for model in models]
    return Model(
        dataclasses.replace(
            first,
            name=name or first.name,
            license=_joined([model.description.license for model in models]),
            trained_spacing=_widest(spacings) if all(spacings) else (),
            training=_in_common([member.training for member in described]),
            evaluation=evaluation or (first.evaluation if len(models) == 1 else {}),
            members=described if len(described) > 1 else (),
        ),
        pyramids,
        models[0].tiling,
    )


def _check_alike(first: Description, other: Description) -> None:
    """Raises a UserError if masks of two models have another meaning, or their maps other grids."""
    expected, found = _kind(first), _kind(other)
    for name in expected:
        if found[name] != expected[name]:
            raise UserError(
                f"{name} of model {other.name} is {found[name]}; expected {expected[name]}, as of model {first.name}: "
                "an ensemble is of models of the same kind"
            )


def _kind(model: Description) -> dict[str, Any]:
    """All that the models of an ensemble must have in common."""
    parts: dict[str, Any] = {"classes": [(entry.name, entry.value, entry.members) for entry in model.classes]}
    parts["channels"] = [(channel.name, channel.normalization) for channel in model.image.channels]
    parts["image.cut_out"] = model.image.cut_out
    for name in ("network", "pyramid", "levels", "tiling"):
        parts |= flat_keys(as_dict(getattr(model, name)), f"{name}.")
    # These matter in training alone.
    return {key: value for key, value in parts.items() if key not in ("network.momentum", "pyramid.stop_gradient")}


def _check_networks(pyramids: Sequence[Pyramid]) -> None:
    """Raises a UserError if networks of one name, which the caller gave, are not the same."""

    def kind(pyramid: Pyramid) -> Any:
        leaves = nnx.to_flat_state(nnx.state(pyramid))
        shapes = {keys: (leaf.get_value().shape, leaf.get_value().dtype) for keys, leaf in leaves}
        return [type(network) for network in pyramid.networks], shapes

    if any(kind(pyramid) != kind(pyramids[0]) for pyramid in pyramids):
        raise UserError("models of an ensemble have different networks of the same name; expected one class for all")


def _widest(spacings: Sequence[Any]) -> Any:
    """The smallest and the largest spacing along each axis of several pairs of them."""
    both = np.array(spacings)  # [models, 2, 3]
    return tuple(both[:, 0].min(0).tolist()), tuple(both[:, 1].max(0).tolist())


def _joined(licenses: Sequence[str]) -> str:
    """Each license once; "" if one model has none."""
    each = dict.fromkeys(part for text in licenses for part in text.split("; "))
    return "" if "" in each else "; ".join(each)


def _in_common(trainings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What holds of every member."""
    first, *others = trainings
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
