"""Pictures of scans with masks laid over them, and box plots of Dice scores."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from autocontext_jax.files import write_whole

# Okabe and Ito's palette, which colour-blind readers can tell apart, then lighter shades. RGB; row k is class k + 1.
PALETTE = np.array(
    [
        (213, 94, 0), (0, 114, 178), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (204, 121, 167),
        (255, 150, 120), (130, 160, 255), (120, 220, 190),
    ],
    np.float32,
)  # fmt: skip


SOFT_TISSUE = (-160.0, 240.0)  # HU shown as black and as white


def class_color(value: int) -> tuple[int, int, int]:
    """(red, green, blue), 0 to 255, of a class in all pictures, from its number: 1, 2, ..."""
    red, green, blue = (int(part) for part in PALETTE[(value - 1) % len(PALETTE)])
    return red, green, blue


def overlay(image: np.ndarray, mask: np.ndarray, *, window: tuple[float, float] | None = None) -> np.ndarray:
    """A slice in grey values under its mask: outlines in opaque colour, areas in faint colour.

    Args:
      image: [H, W].
      mask: [H, W], integers; 0 is background.
      window: the values shown as black and as white; by default those of soft tissue in HU.

    Returns:
      [H, W, 3] uint8.
    """
    low, high = window or SOFT_TISSUE
    grey = np.clip((image.astype(np.float32) - low) / (high - low), 0, 1)[..., None] * np.full(3, 255, np.float32)
    colour = PALETTE[(mask.astype(int) - 1) % len(PALETTE)]
    padded = np.pad(mask, 1, mode="edge")
    inner = (
        (padded[:-2, 1:-1] == mask)
        & (padded[2:, 1:-1] == mask)
        & (padded[1:-1, :-2] == mask)
        & (padded[1:-1, 2:] == mask)
    )
    strength = np.where(mask == 0, 0.0, np.where(inner, 0.3, 1.0))[..., None]
    return np.round(grey * (1 - strength) + colour * strength).astype(np.uint8)


def contrast(image: np.ndarray) -> tuple[float, float]:
    """The values of an image, of any shape, that are shown as black and as white where they are no HU."""
    low, high = np.percentile(image, (0.5, 99.5)).tolist()
    return low, max(high, low + 1e-6)


def side_by_side(pictures: Sequence[np.ndarray], *, gap: int = 2) -> np.ndarray:
    """Joins pictures in one row, with white gaps between them.

    Args:
      pictures: [H, W, 3] uint8 each, of equal height.
      gap: pixels.

    Returns:
      [H, sum of widths and gaps, 3] uint8.
    """
    white = np.full((pictures[0].shape[0], gap, 3), 255, np.uint8)
    row = [part for picture in pictures for part in (picture, white)]
    return np.concatenate(row[:-1], axis=1)


def figure(
    path: Path,
    image: np.ndarray,
    masks: Mapping[str, np.ndarray],
    classes: Sequence[str],
    spacing: tuple[float, float, float],
    *,
    title: str = "",
    hu: bool = True,
) -> None:
    """Writes a PNG: a row for each plane (axial, coronal, sagittal), a column for each mask, a legend of the classes.

    The slices pass through the centre of the first mask's foreground, in radiological orientation. Of CT, the air
    around the body is cropped.

    Args:
      path: of the PNG.
      image: [D, H, W], in canonical orientation.
      masks: {title of the column: [D, H, W], integers}.
      classes: names without the background; value k is `classes[k - 1]`.
      spacing: mm, (z, y, x).
      title: of the figure.
      hu: whether the image is CT in HU; otherwise its own values set the contrast.
    """
    window = SOFT_TISSUE if hu else contrast(image)
    truth = next(iter(masks.values()))
    foreground = np.nonzero(truth) if truth.any() else np.nonzero(np.ones_like(truth))
    centre = [int(np.median(along)) for along in foreground]
    body = _body(image) if hu else tuple(slice(0, size) for size in image.shape)
    centre = [min(max(0, at - span.start), span.stop - span.start - 1) for at, span in zip(centre, body, strict=True)]
    image, masks = image[body], {name: mask[body] for name, mask in masks.items()}
    depth, height, width = (size * mm for size, mm in zip(image.shape, spacing, strict=True))
    shapes = [(height, width), (depth, width), (depth, height)]  # mm of each plane's picture
    rows = [tall / wide for tall, wide in shapes]
    canvas = Figure(figsize=(3 * len(masks), 3 * sum(rows) + 1), layout="constrained", facecolor="white")
    axes = canvas.subplots(len(rows), len(masks), squeeze=False, height_ratios=rows)
    for column, (name, mask) in enumerate(masks.items()):
        for axis, plane in enumerate(("axial", "coronal", "sagittal")):
            image_slice, mask_slice = (np.take(volume, centre[axis], axis=axis) for volume in (image, mask))
            # Canonical z grows towards the head, the rows of a picture grow downwards.
            picture = overlay(image_slice, mask_slice, window=window)
            picture = picture if axis == 0 else picture[::-1]
            tall, wide = [mm for i, mm in enumerate(spacing) if i != axis]
            axes[axis, column].imshow(picture, aspect=tall / wide, interpolation="nearest")
            axes[axis, column].set(xticks=[], yticks=[], title=name if axis == 0 else "")
            if column == 0:
                axes[axis, column].set_ylabel(plane)
    handles = [Patch(color=PALETTE[k % len(PALETTE)] / 255, label=name) for k, name in enumerate(classes)]
    canvas.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    canvas.suptitle(title)
    save(path, canvas)


def boxes(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a PNG with box plots of the Dice over cases: a group for each class, a colour for each block.

    Args:
      path: of the PNG.
      result: of `report.evaluation`, or the same read from `evaluation.json`.
    """
    classes, blocks = result["classes"], list(result["summary"])
    canvas = Figure(figsize=(max(6, 1.3 * len(classes)), 4), layout="constrained", facecolor="white")
    axes = canvas.subplots()
    width = 0.8 / len(blocks)
    for number, block in enumerate(blocks):
        dice = [[scores[block][name]["dice"] for scores in result["cases"].values()] for name in classes]
        # A class in neither mask has no Dice: NaN, in JSON null. A missed class has a Dice of 0 and is drawn.
        found = [[value for value in values if value is not None and not math.isnan(value)] for values in dice]
        places = np.arange(len(classes)) + (number - (len(blocks) - 1) / 2) * width
        colour = PALETTE[number % len(PALETTE)] / 255
        axes.boxplot(
            found, positions=places, widths=0.85 * width, patch_artist=True, label=block.replace("_", " ").capitalize(),
            boxprops={"facecolor": colour, "alpha": 0.6}, medianprops={"color": "black"}, flierprops={"markersize": 3},
        )  # fmt: skip
    # The axis begins below 0: otherwise it would hide the flat box of a class that is missed in every scan.
    axes.set(xticks=np.arange(len(classes)), xticklabels=classes, ylabel="Dice", ylim=(-0.03, 1.03))
    axes.grid(axis="y", alpha=0.3)
    canvas.legend(loc="outside lower center", ncols=len(blocks), frameon=False)
    save(path, canvas)


def save(path: Path, canvas: Figure) -> None:
    """Writes a figure as PNG, whole or not at all."""
    png = io.BytesIO()
    canvas.savefig(png, format="png", dpi=100)
    write_whole(path, png.getvalue())


def _body(image: np.ndarray) -> tuple[slice, slice, slice]:
    """Bounding box of everything above -500 HU with a margin of 3 voxels; the whole image if there is only air."""
    dense = image > -500
    spans = []
    for axis, size in enumerate(image.shape):
        along = np.flatnonzero(dense.any(axis=tuple(i for i in range(3) if i != axis)))
        spans.append(slice(max(0, along[0] - 3), min(size, along[-1] + 4)) if along.size else slice(0, size))
    return spans[0], spans[1], spans[2]
