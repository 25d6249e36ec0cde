"""What a plan chooses beside the size of a step: a function a topic, each key with a sentence of reason.

The numbers are those of the configurations in `configs/`, which were found by trial on real scans.
"""

from autocontext_jax.data.augmentation_ranges import AugmentationConfig
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.data.survey import ClassSurvey, Survey
from autocontext_jax.errors import UserError, some
from autocontext_jax.images.spec import ImageSpec
from autocontext_jax.planning.grids import SHARE_SEEN, Geometry, target_spacing
from autocontext_jax.planning.laterality import find_laterality
from autocontext_jax.planning.plan import Choices

MOST = 0.5  # share of a scan from which on a patch sees most of it
RARE = 0.01  # share of the annotated voxels below which a class may vanish from the maps early in training
FEW = 5_000  # steps: running averages must follow faster in a short run


def choose_grids(choices: Choices, survey: Survey, made: Geometry) -> None:
    """Levels, patch and depth."""
    _, from_thin = target_spacing(survey)
    count, levels = len(made.levels.factors), made.levels
    if levels.spatial_dims == 2:
        choices.choose("levels.spatial_dims", 2, "Every scan is one slice.")
    if levels.unit == "mm":
        where = "the median of the scans, but the 10th percentile along thick slices" if from_thin else "the median"
        reason = f"Spacing of the finest level in mm, (z, y, x): {where}"
        if levels.factors[-1] > 1:
            reason += f" times {levels.factors[-1]:g} along axes that are halved, which resolves every class"
        choices.choose("levels.finest_spacing", made.spacing, reason + ".")
    finest, coarsest = (f"{100 * share:.0f} %" for share in made.share)
    whole = "a slice of the median scan" if levels.spatial_dims == 2 else "the median scan"
    seen = f"A patch of the finest level holds {finest} of {whole}"
    if count > 1:
        seen += f", one of the coarsest of {count} levels {coarsest}"
    choices.choose("levels.factors", levels.factors, seen + ".")
    if levels.unit == "mm" and len(set(levels.scales[0])) > 1 and levels.spatial_dims == 3:
        choices.choose("levels.anisotropic", True, "Slices are thick: coarser levels halve the finer axes first.")
    scan = " x ".join(f"{size:.0f}" for size in made.scan)
    choices.choose(
        "loader.patch_size", made.patch, f"Of the median scan's {scan} voxels (z, y, x) at the finest level."
    )
    choices.choose("model.depth", made.depth, "So many resolutions as a patch of this size can be halved.")


def choose_flip(choices: Choices, labels: LabelSpec, made: Geometry) -> None:
    """Mirroring, in training and in prediction.

    Args:
      choices: of the plan.
      labels: of the data set.
      made: the geometry.
    """
    sides = find_laterality(labels.classes[1:])
    if sides.unpaired:
        reason = f"Not mirrored: {some(sides.unpaired)} names one side, and no class its other side."
        axes = choices.choose("augmentation.flip", "", reason)
    elif sides.pairs and not _exchangeable(labels, sides.pairs):
        reason = "Not mirrored: regions of several values, or which hold one side alone, cannot exchange their names."
        axes = choices.choose("augmentation.flip", "", reason)
    elif sides.pairs:
        reason = "Left and right are exchanged, with the names of the classes that have a side."
        axes = choices.choose("augmentation.flip", "x", reason)
    elif made.share[0] >= MOST:
        axes = choices.choose(
            "augmentation.flip", "x", "No name of a class has a side, and a patch sees most of a scan."
        )
    else:
        reason = "Not mirrored: no class is one of a pair of left and right, and an organ's side tells it from others."
        axes = choices.choose("augmentation.flip", "", reason)
    if "x" in axes and sides.pairs:
        choices.choose("augmentation.flip_pairs", sides.pairs, "The pairs of left and right among the classes' names.")
    if axes:
        choices.choose("predict.flip", True, "Predictions of a scan and of its mirror image are averaged.")


def _exchangeable(labels: LabelSpec, pairs: tuple[str, ...]) -> bool:
    try:
        AugmentationConfig(flip="x", flip_pairs=pairs).flip_classes(labels)
    except UserError:
        return False
    return True


def choose_augmentation(choices: Choices, image: ImageSpec, made: Geometry) -> None:
    """How far patches are moved, and how their intensities change."""
    choices.choose("augmentation.rotation", 10.0, "Degrees by which patients lie differently.")
    choices.choose("augmentation.scaling", 0.1, "Patients differ in size.")
    choices.choose("augmentation.translation", 4.0, "Voxels; patches are drawn at random places anyway.")
    sigma = 2.0 if min(made.patch[1:]) >= 48 else 1.0
    choices.choose("augmentation.elastic_sigma", sigma, "A little, so that small patches show no unnatural shapes.")
    reason = "Half of the patches stay as they are: moving blurs a little, which scans never are when predicted."
    choices.choose("augmentation.probability", 0.5, reason)
    # Channels in different units, and those of unknown ones, stay as they are.
    schemes = {channel.normalization for channel in image.channels}
    if schemes == {"CT"}:
        choices.choose("augmentation.noise", 10.0, "HU, of white noise.")
        choices.choose("augmentation.intensity_shift", 10.0, "HU.")
    elif schemes == {"zscore"}:
        choices.choose("augmentation.noise", 0.1, "Standard deviations of a scan, of white noise.")
        choices.choose("augmentation.intensity_shift", 0.1, "Standard deviations of a scan.")
    elif schemes <= {"rescale_to_0_1", "rgb_to_0_1"}:
        choices.choose("augmentation.noise", 0.02, "Of white noise; intensities lie from 0 to 1.")
        choices.choose("augmentation.intensity_shift", 0.02, "Intensities lie from 0 to 1.")
    choices.choose("augmentation.intensity_scale", 0.1, "Contrast differs between scanners.")


def choose_sampling(choices: Choices, made: Geometry) -> None:
    """Where patches are drawn."""
    choices.choose("loader.sampling", "classes", "Small classes are drawn as often as large ones.")
    if _seen(made) < SHARE_SEEN:
        reason = "Patches from anywhere: what lies far from every class would else never be seen."
        choices.choose("loader.background_fraction", 0.2, reason)
    else:
        reason = "A patch holds so much of a scan that the background is seen with the classes."
        choices.choose("loader.background_fraction", 0.0, reason)


def choose_loss(choices: Choices, survey: Survey, made: Geometry) -> None:
    """What is minimised."""
    choices.choose(
        "loss.cross_entropy", 0.5, "Patches without a class teach by it alone: the Dice hardly has a gradient."
    )
    if rare := [each.name for each in survey.classes if _is_rare(each)]:
        reason = f"Rare classes can vanish from the maps early and not come back: {some(rare)}."
        choices.choose("loss.log_dice", 0.1, reason)
    elif _seen(made) >= MOST and _always_there(survey):
        reason = "Every case has every class and a patch sees most of a scan: each sample's own Dice is averaged."
        choices.choose("loss.per_sample", True, reason)
        choices.choose("loss.background", False, "The classes alone: the background has the largest Dice anyway.")


def _seen(made: Geometry) -> float:
    """Share of the median scan that a patch of the finest level holds; a slice holds little of a volume."""
    return made.share[0] / (made.scan[0] if made.levels.spatial_dims == 2 else 1.0)


def _is_rare(found: ClassSurvey) -> bool:
    return found.share is not None and 0 < found.share < RARE


def _always_there(survey: Survey) -> bool:
    return all(each.cases == survey.label_maps for each in survey.classes)


def choose_norm(choices: Choices) -> None:
    """The normalisation, as `benchmarks/normalization.py` measured it."""
    reason = "With few patches a step, batch norm had a higher Dice in whole scans than instance and group norm."
    choices.choose("model.norm", "batch", reason)


def choose_optimizer(choices: Choices, channels: int) -> None:
    """Adam and its schedule, whatever the number of steps."""
    rate = 1e-3 if channels >= 32 else 2e-3
    choices.choose("optimizer.learning_rate", rate, "Of Adam; smaller networks learn at a higher rate.")
    choices.choose("optimizer.schedule", "cosine", "Falls to 0 at the end of the run.")


def choose_steps(choices: Choices, steps: int, reason: str) -> None:
    """The number of steps, and what follows from it.

    Args:
      choices: of the plan.
      steps: of a phase.
      reason: for so many.
    """
    steps = choices.choose("train.steps", steps, reason)
    choices.choose("optimizer.warmup", max(1, min(50, steps // 10)), "Steps in which the learning rate rises from 0.")
    momentum = 0.98 if steps < FEW else 0.99
    choices.choose("model.momentum", momentum, "Of batch norm's running averages: lower in short runs.")
    reason = "A checkpoint and a validation for each tenth of the run."
    choices.choose("train.checkpoint_every", max(1, -(-steps // 10)), reason)
    reason = "At the end batch norm is that of inference: the statistics of few patches are far from it."
    choices.choose("train.frozen_batch_stats", 0.3, reason)
    reason = "The cases that are scored have then chosen nothing."
    choices.choose("predict.checkpoint", "latest", reason)
