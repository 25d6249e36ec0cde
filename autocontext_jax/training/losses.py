"""The total loss of a pyramid."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from autocontext_jax.errors import require
from autocontext_jax.training.targets import CLASSES, Targets, marginal_logits, soft_maps, truth_maps, valid_voxels

# A loss from outside the package: of one level's logits [B, D, H, W, K], float32, and labels [B, D, H, W], uint8; a
# scalar, differentiable with respect to the logits. It gets labels as they are stored: `labels.IGNORE` (255) where
# nobody labelled, the numbers that make up regions in the place of these, and background where a case does not
# annotate a class.
Loss = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is minimised at every level.

    Attributes:
      dice: weight of the Dice loss; 1 in the paper.
      log_dice: weight of the Dice loss's logarithm; 0 in the paper. A class that the network has nearly given up has
        hardly a gradient in the Dice itself; here it keeps it, and comes back. Little is enough: by itself, the
        logarithm makes classes too large.
      cross_entropy: weight of the mean voxelwise cross-entropy (nats), with regions of the mean binary one; 0 in the
        paper.
      extra: losses from outside the package with their weights, (("NAME", 0.5), ...): names under which they are passed
        to the Python functions, or `package.module:name`.
      per_sample: False sums overlaps over the batch before dividing, True averages each sample's own Dice.
      background: whether class 0 counts in the Dice loss, as in equation 1. Regions have no background.
      level_weights: factor of each level's loss in the total, coarsest first; () means 1 each, as in the paper.
    """

    dice: float = 1.0
    log_dice: float = 0.0
    cross_entropy: float = 0.0
    extra: tuple[tuple[str, float], ...] = ()
    per_sample: bool = False
    background: bool = True
    level_weights: tuple[float, ...] = ()

    def __post_init__(self):
        for name in ("dice", "log_dice", "cross_entropy"):
            require(getattr(self, name) >= 0, self, name, "0 or more")
        require(all(weight >= 0 for _, weight in self.extra), self, "extra", "weights of 0 or more")
        weights = self.dice, self.log_dice, self.cross_entropy, *(weight for _, weight in self.extra)
        require(any(weights), self, "dice", "a positive weight of it, of another loss or of both: all are 0")
        good = all(weight >= 0 for weight in self.level_weights) and (not self.level_weights or any(self.level_weights))
        require(good, self, "level_weights", "weights of 0 or more, one of them positive, or ()")


def dice_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    per_sample: bool = False,
    background: bool = True,
    logarithm: bool = False,
    targets: Targets = CLASSES,
    known: jax.Array | None = None,
) -> jax.Array:
    """Mean soft Dice over classes, negated: equation 1 of Roth et al. (2018).

        L = -1/K sum_k D_k,    D_k = (2 sum_i p_ik l_ik + eps) / (sum_i p_ik + sum_i l_ik + eps)

    or, with the logarithm, L = -1/K sum_k ln D_k over the classes that the labels hold: the Dice term of Wong et al.
    (MICCAI 2018) with exponent 1, without their pseudocount of a voxel and the absent classes that it stands for. With
    these every patch without a class pushes its maps down, in the end further than a patch with it pulls them up.

    The mean is over what is annotated. A class counts over the samples that know it; one that no sample knows is left
    out. With `per_sample` the mean is over all pairs of a sample and a class that it knows.

    Args:
      logits: [B, D, H, W, K], any float type; the softmax runs in float32. With regions [B, D, H, W, R], of sigmoids.
      labels: [B, D, H, W], integers: numbers in [0, K), or those of `targets`.
      per_sample: see `LossConfig`. If False, sums run over every voxel of the batch, so the value does not depend on
        how the batch is laid out over devices.
      background: see `LossConfig`.
      logarithm: of each class's Dice, as above.
      targets: what the labels mean.
      known: what each sample's case annotates, see `targets`; None means everything.

    Returns:
      Scalar in [-1, 0], or in [0, inf) with the logarithm. A class absent from labels and prediction counts as D = 1.
      0 if no sample knows any class that counts.
    """
    eps = 1e-5
    probabilities = soft_maps(logits, labels, targets, known)
    truth = truth_maps(labels, logits.shape[-1], targets, known)
    voxels = (1, 2, 3) if per_sample else (0, 1, 2, 3)
    overlap = jnp.sum(probabilities * truth, voxels)
    true = jnp.sum(truth, voxels)
    scores = (2 * overlap + eps) / (jnp.sum(probabilities, voxels) + true + eps)
    if logarithm:
        scores = jnp.where(true > 0, jnp.log(scores), 0)
    first = 0 if background or targets.regions else 1
    scores = scores[..., first:]
    if known is None:
        return -jnp.mean(scores)
    annotated = targets.annotated(known)[:, first:]
    return -_mean(scores, annotated if per_sample else jnp.any(annotated, axis=0))


def cross_entropy_loss(
    logits: jax.Array, labels: jax.Array, *, targets: Targets = CLASSES, known: jax.Array | None = None
) -> jax.Array:
    """Mean over voxels of -log p of the true class, nats; arguments as of `dice_loss`.

    With regions the mean over voxels and regions of the binary cross-entropy: the mean over regions too, as nnU-Net
    takes it, so that its size beside the Dice loss does not depend on how many regions there are. (Where a data set has
    ignored voxels, nnU-Net 2.8.1 takes the sum over regions.) What is ignored or not annotated is in neither mean; 0 if
    nothing counts.
    """
    logits = logits.astype(jnp.float32)
    if targets.regions:
        return _binary_cross_entropy(logits, labels, targets, known)
    log_probabilities = jax.nn.log_softmax(logits if known is None else marginal_logits(logits, known))
    likelihood = jnp.sum(log_probabilities * truth_maps(labels, logits.shape[-1], targets, known), axis=-1)
    return -(_mean(likelihood, valid_voxels(labels)) if targets.ignore else jnp.mean(likelihood))


def _binary_cross_entropy(logits: jax.Array, labels: jax.Array, targets: Targets, known: jax.Array | None) -> jax.Array:
    """Mean over voxels and regions of what counts."""
    truth = truth_maps(labels, logits.shape[-1], targets, known)
    entropy = -(truth * jax.nn.log_sigmoid(logits) + (1 - truth) * jax.nn.log_sigmoid(-logits))
    counted = jnp.ones((), bool)
    if targets.ignore:
        counted &= valid_voxels(labels)[..., None]
    if known is not None:
        counted &= targets.annotated(known)[:, None, None, None]
    return _mean(entropy, counted)


def _mean(values: jax.Array, counted: jax.Array) -> jax.Array:
    """Mean of the values that count, 0 if none does; `counted` is bool and is broadcast to the values."""
    counted = jnp.broadcast_to(counted, values.shape)
    return jnp.sum(jnp.where(counted, values, 0)) / jnp.maximum(jnp.sum(counted), 1)


def total_loss(
    logits: Sequence[jax.Array],
    labels: Sequence[jax.Array],
    config: LossConfig,
    extra: Mapping[str, Loss] | None = None,
    *,
    targets: Targets = CLASSES,
    known: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Loss of a pyramid: the sum of its levels' losses (section 2.2).

    Args:
      logits: for each level [B, N, N, N, K].
      labels: for each level [B, N, N, N].
      config: see there.
      extra: the functions that `config.extra` names.
      targets: what the labels mean.
      known: what each sample's case annotates, see `targets`; None means everything.

    Returns:
      The scalar total and the levels' own losses [S], before their weights.
    """
    losses = []
    for level_logits, level_labels in zip(logits, labels, strict=True):
        loss = jnp.zeros(())
        for weight, logarithm in ((config.dice, False), (config.log_dice, True)):
            if weight:
                loss += weight * dice_loss(
                    level_logits,
                    level_labels,
                    per_sample=config.per_sample,
                    background=config.background,
                    logarithm=logarithm,
                    targets=targets,
                    known=known,
                )
        if config.cross_entropy:
            loss += config.cross_entropy * cross_entropy_loss(level_logits, level_labels, targets=targets, known=known)
        for name, weight in config.extra:
            assert extra is not None, "config.extra names losses that were not given"
            loss += weight * extra[name](level_logits, level_labels)
        losses.append(loss)
    stacked = jnp.stack(losses)
    weights = jnp.asarray(config.level_weights or [1.0] * len(losses))
    return jnp.sum(weights * stacked), stacked
