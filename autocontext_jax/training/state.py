"""The training state and the jitted steps over it: one that trains, one that validates."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from autocontext_jax.models.pyramid import Pyramid
from autocontext_jax.runtime import compiler_options
from autocontext_jax.training.dice import overlap_counts
from autocontext_jax.training.losses import Loss, LossConfig, total_loss
from autocontext_jax.training.targets import CLASSES, Targets, predicted_numbers


@struct.dataclass
class TrainState:
    """Everything that training changes and a checkpoint holds.

    Attributes:
      step: steps done, int32 scalar.
      params: the pyramid's parameters, an `nnx.State`.
      batch_stats: running averages of the normalisation, an `nnx.State`.
      optimizer: the optimiser's state.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    optimizer: Any


@struct.dataclass
class Batch:
    """A batch of pyramid patches on the device.

    Attributes:
      images: for each level, coarsest first, [B, N, N, N, C] float32, as stored, see `images.spec`.
      labels: for each level [B, N, N, N], uint8.
      known: [B, K] bool, the classes that each sample's case annotates, see `targets`; None if all annotate everything.
    """

    images: tuple[jax.Array, ...]
    labels: tuple[jax.Array, ...]
    known: jax.Array | None = None


@struct.dataclass
class Metrics:
    """What one step measured.

    Attributes:
      loss: the total, scalar.
      losses: each level's own, [S].
      counts: each level's `overlap_counts`, [S, 3, K]; with regions [S, 3, R + 1].
      gradient_norm: of all gradients together, scalar; 0 where nothing learns.
    """

    loss: jax.Array
    losses: jax.Array
    counts: jax.Array
    gradient_norm: jax.Array


def create_state(
    model: Pyramid, optimizer: optax.GradientTransformation, learning: Collection[int] | None = None
) -> tuple[nnx.GraphDef, TrainState]:
    """Splits a new model into its static graph and the state of step 0.

    Args:
      model: the pyramid.
      optimizer: of the parameters that learn.
      learning: the model's levels that do, from 1 = its coarsest; None means all. In the graph the others compute what
        they compute at inference: they normalise with their running averages, without dropout.
    """
    graph, params, statistics = _split(model)
    if learning is not None:
        model = nnx.merge(graph, params, statistics, copy=True)
        for level, network in enumerate(model.networks, start=1):
            if level not in learning:
                model.networks[level - 1] = _inference_view(network)
        graph, _, _ = _split(model)
    learned, _ = _learned(params, learning)
    return graph, TrainState(jnp.zeros((), jnp.int32), params, statistics, optimizer.init(learned))


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss: LossConfig,
    learning: Collection[int] | None = None,
    sharding: Any = None,
    *,
    extra_losses: Mapping[str, Loss] | None = None,
    targets: Targets = CLASSES,
    seed: int = 0,
    deterministic: bool = False,
) -> Any:
    """The jitted training step (state, batch, rate) -> (state, metrics): forward, total loss, gradients, update.

    A step whose loss or gradients are not finite changes nothing but the step's number. Layers look at the mesh that
    is set (`jax.set_mesh`), which must be the batch's where several devices share it. Random numbers in the networks,
    such as dropout's, are a function of `seed` and `state.step` alone: a resumed run repeats them.

    `rate` is the learning rate, for an optimizer of `make_optimizer`; others need none.
    Its state argument is donated: use the returned one. A batch of fewer levels than the model has runs the coarsest
    ones. `graph` and `learning` are those of `create_state`; `sharding` is that of the new state and of the metrics,
    None leaves it to the compiler; `extra_losses` are those that `loss.extra` names; `targets` says what the labels
    mean; `deterministic` is that of `compiler_options`.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def step(state: TrainState, batch: Batch, rate: jax.Array | None = None) -> tuple[TrainState, Metrics]:
        learned, frozen = _learned(state.params, learning)

        def objective(learned):
            model = nnx.merge(graph, nnx.merge_state(learned, frozen), state.batch_stats, copy=True)
            model.reseed(jax.random.fold_in(jax.random.key(seed), state.step))
            logits = model(batch.images)
            total, losses = total_loss(logits, batch.labels, loss, extra_losses, targets=targets, known=batch.known)
            _, _, statistics = _split(model)
            return total, (losses, _counts(logits, batch, targets), statistics)

        (total, aux), gradients = jax.value_and_grad(objective, has_aux=True)(learned)
        losses, counts, statistics = aux
        norm = optax.tree.norm(gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, learned, rate=rate)
        params = nnx.merge_state(optax.apply_updates(learned, updates), frozen)
        after = TrainState(state.step + 1, params, statistics, optimizer_state)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        before = TrainState(state.step + 1, state.params, state.batch_stats, state.optimizer)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
        return after, Metrics(total, losses, counts, norm)

    return jax.jit(
        step,
        donate_argnames="state",
        out_shardings=sharding,
        compiler_options=compiler_options(jax.default_backend(), deterministic=deterministic),
    )


def make_validation_step(
    graph: nnx.GraphDef,
    loss: LossConfig,
    sharding: Any = None,
    *,
    extra_losses: Mapping[str, Loss] | None = None,
    targets: Targets = CLASSES,
    deterministic: bool = False,
) -> Callable[[TrainState, Batch], tuple[Metrics, tuple[jax.Array, ...]]]:
    """Forward pass with the running averages and without dropout; the state stays as it is.

    Besides the metrics it gives each level's predicted classes in the patches' middle slices, [B, N, N] uint8; of
    regions, see `predicted_numbers`. `sharding` is that of both; `targets` and `deterministic` as of `make_train_step`.
    """

    def step(state: TrainState, batch: Batch) -> tuple[Metrics, tuple[jax.Array, ...]]:
        logits = inference_model(graph, state.params, state.batch_stats)(batch.images)
        total, losses = total_loss(logits, batch.labels, loss, extra_losses, targets=targets, known=batch.known)
        slices = tuple(predicted_numbers(level[:, level.shape[1] // 2], targets) for level in logits)
        return Metrics(total, losses, _counts(logits, batch, targets), jnp.zeros(())), slices

    options = compiler_options(jax.default_backend(), deterministic=deterministic)
    return jax.jit(step, out_shardings=sharding, compiler_options=options)


def freeze_batch_stats(graph: nnx.GraphDef, params: Any, statistics: Any) -> nnx.GraphDef:
    """The graph of a pyramid that trains on with its running averages in place of batch statistics."""
    model = nnx.merge(graph, params, statistics, copy=True)
    return nnx.graphdef(nnx.view(model, use_running_average=True, raise_if_not_found=False))


def inference_model(graph: nnx.GraphDef, params: Any, statistics: Any) -> Pyramid:
    """The pyramid with its running averages in place of batch statistics, and without dropout."""
    return _inference_view(nnx.merge(graph, params, statistics, copy=True))


def _inference_view(module: Any) -> Any:
    """The module with `use_running_average` and `deterministic` set, wherever it or a part of it has them."""
    return nnx.view(module, use_running_average=True, deterministic=True, raise_if_not_found=False)


def _split(model: Pyramid) -> tuple[nnx.GraphDef, Any, Any]:
    """Static graph, parameters, and running averages of the normalisation; without keys that `reseed` has set."""
    # mypy: the stub hides how many parts there are.
    graph, params, _, statistics = nnx.split(model, nnx.Param, nnx.RngState, ...)  # type: ignore[misc]
    return graph, params, statistics


def _learned(params: Any, learning: Collection[int] | None) -> tuple[Any, Any]:
    """The parameters that learn and those that do not."""
    # The path of a parameter begins with "networks" and the network's place, which counts from 0.
    learned, frozen = nnx.split_state(params, lambda path, _: learning is None or path[1] + 1 in learning, ...)
    return learned, frozen


def _counts(logits: tuple[jax.Array, ...], batch: Batch, targets: Targets) -> jax.Array:
    levels = zip(logits, batch.labels, strict=True)
    return jnp.stack([overlap_counts(*level, targets=targets, known=batch.known) for level in levels])
