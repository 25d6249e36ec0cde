"""Draws docs/pyramid.png: how the two levels of the pyramid work together.

    python docs/figures/pyramid.py

Every picture is one axial slice of a generated phantom. The softmax maps and the prediction are drawn from the
phantom's labels, at the resolution of their level; no network is trained for them.
"""

import io
import itertools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import colors, patches
from PIL import Image  # matplotlib requires it

from autocontext_jax.data.phantom.anatomy import ORGANS
from autocontext_jax.data.phantom.painting import make_phantom

WIDTH, HEIGHT = 1600, 800  # pixels
ROWS = {1: 618, 2: 222}  # y of each level's middle
PANEL = 190  # pixels, edge of a patch
PATCH, NETWORK, MAPS, MASK = {1: 424, 2: 590}, {1: 754, 2: 1226}, 882, 1362  # x: left edges, a network's middle
VOXELS = 64  # edge of a patch, the same at both levels
FACTORS = {1: 4, 2: 2}  # voxels of the scan per voxel of the level
CENTRE = (156, 205)  # of both patches, voxels of the scan (y, x)
SHOWN = (slice(14, 298), slice(6, 384))  # the part of the slice that is shown, (y, x)

LEVEL = {1: "#2F6DB5", 2: "#D9730D"}
INK, QUIET, GRADIENT = "#1F2933", "#5B6770", "#C2185B"
ORGAN_COLOURS = {
    "artery": "#E4483B", "portal_vein": "#3F7FD6", "liver": "#B9794A", "spleen": "#8E63C9", "stomach": "#E8A33D",
    "gallbladder": "#5FAE5B", "pancreas": "#2FB5A3",
}  # fmt: skip


def phantom_slice() -> tuple[np.ndarray, np.ndarray]:
    """HU and labels of one axial slice, [320, 384], voxels of 1 mm."""
    image, label = make_phantom(np.random.default_rng(3), size=(56, 320, 384), spacing=(4.0, 1.0, 1.0))
    return image[31].astype(np.float32), label[31]


def patch(plane: np.ndarray, factor: int) -> np.ndarray:
    """The patch of a level about CENTRE, averaged over the scan's voxels: [..., y, x] -> [..., VOXELS, VOXELS]."""
    y, x = (middle - VOXELS * factor // 2 for middle in CENTRE)
    cut = plane[..., y : y + VOXELS * factor, x : x + VOXELS * factor]
    return cut.reshape(*cut.shape[:-2], VOXELS, factor, VOXELS, factor).mean((-3, -1))


def blurred(maps: np.ndarray, times: int) -> np.ndarray:
    """Maps [K, y, x], smoothed: a network is not sure where organs end."""
    for _ in range(times):
        for axis in (1, 2):
            maps = 0.25 * np.roll(maps, 1, axis) + 0.5 * maps + 0.25 * np.roll(maps, -1, axis)
    return maps


def upsampled(maps: np.ndarray) -> np.ndarray:
    """The central half of maps [K, n, n], as `models/resizing.py` enlarges it: [K, n, n]."""
    n = maps.shape[-1]
    cut = maps[:, n // 4 - 1 : 3 * n // 4 + 1, n // 4 - 1 : 3 * n // 4 + 1]
    for axis in (1, 2):
        before, here, after = (np.take(cut, np.arange(i, i + n // 2), axis) for i in range(3))
        halves = np.stack([0.25 * before + 0.75 * here, 0.75 * here + 0.25 * after], axis + 1)
        cut = halves.reshape(*cut.shape[:axis], n, *cut.shape[axis + 1 :])
    return cut


def coloured(maps: np.ndarray) -> np.ndarray:
    """Maps [K, y, x] as one picture [y, x, 3]: each class in its colour, the background almost white."""
    palette = np.array([colors.to_rgb(colour) for colour in ("#F4F5F7", *(ORGAN_COLOURS[name] for name in ORGANS))])
    return np.tensordot(maps, palette, (0, 0)).clip(0, 1)


def grey(plane: np.ndarray) -> np.ndarray:
    """HU [y, x] as a picture [y, x, 3]."""
    return np.repeat(np.clip((plane + 170) / 400, 0, 1)[..., None], 3, -1)


class Canvas:
    """A white sheet of WIDTH x HEIGHT whose coordinates are pixels, from its lower left corner."""

    def __init__(self) -> None:
        self.figure = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))

    def text(self, x: float, y: float, words: str, size: float = 17, colour: str = INK, **rest) -> None:
        """Words with their middle at (x, y)."""
        self.axes.text(x, y, words, fontsize=size, color=colour, **{"ha": "center", "va": "center", **rest})

    def picture(self, pixels: np.ndarray, x: float, y: float, width: float, height: float, colour: str) -> None:
        """Pixels in a frame, with their lower left corner at (x, y)."""
        self.axes.imshow(pixels, extent=(x, x + width, y, y + height), interpolation="nearest", zorder=3)
        self.axes.add_patch(patches.Rectangle((x, y), width, height, fill=False, ec=colour, lw=2.5, zorder=4))

    def frame(self, x: float, y: float, edge: float, colour: str) -> None:
        """A square that marks a region, with its lower left corner at (x, y)."""
        for width, line in ((5.5, "white"), (3, colour)):
            self.axes.add_patch(patches.Rectangle((x, y), edge, edge, fill=False, ec=line, lw=width, zorder=6))

    def stack(self, pixels: np.ndarray, x: float, level: int, above: str, below: str) -> None:
        """A level's 3D patch or maps: one slice with others behind it, and words above and below."""
        bottom, colour = ROWS[level] - PANEL / 2, LEVEL[level]
        for behind in (2, 1):
            corner = (x + 8 * behind, bottom + 8 * behind)
            self.axes.add_patch(
                patches.Rectangle(corner, PANEL, PANEL, fc="#E9ECEF", ec=colour, lw=1.5, zorder=3 - 0.1 * behind)
            )
        self.picture(pixels, x, bottom, PANEL, PANEL, colour)
        self.text(x + PANEL / 2 + 8, bottom + PANEL + 42, above, 19, colour if "Level" in above else INK, weight="bold")
        self.text(x + PANEL / 2 + 8, bottom - 22, below, 16, QUIET)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], ways: str = "both") -> None:
        """The way of the `data`, the way of the `gradient`, or `both`: the gradient then goes back beside the data."""
        style: dict[str, Any] = {
            "arrowstyle": "-|>,head_length=8,head_width=4.5",
            "shrinkA": 0,
            "shrinkB": 0,
            "mutation_scale": 1,
        }
        along = np.subtract(end, start)
        aside = np.array([along[1], -along[0]]) / np.hypot(*along) * 8 * (ways == "both")
        if ways != "gradient":
            points = np.array(start) - aside, np.array(end) - aside
            self.axes.add_patch(patches.FancyArrowPatch(*points, color=INK, lw=2.6, zorder=5, **style))
        if ways != "data":
            points = (np.array(end) + aside, np.array(start) + aside)[:: -1 if ways == "gradient" else 1]
            self.axes.add_patch(
                patches.FancyArrowPatch(*points, color=GRADIENT, lw=2.2, ls=(0, (2.6, 1.4)), zorder=5, **style)
            )

    def network(self, x: float, level: int) -> None:
        """A U-Net about x: its feature maps at four resolutions, and grey skip connections between them."""
        colour, top = LEVEL[level], ROWS[level] + 58
        boxes = [(70 - 22 * depth if depth < 3 else 0, top - 42 * depth, 12 + 5 * depth, 54 - 12 * depth)
                 for depth in range(4)]  # fmt: skip
        for side in (-1, 1):
            for (offset, y, _, height), (next_offset, next_y, *_) in itertools.pairwise(boxes):
                ways = [x + side * offset, x + side * offset, x + side * next_offset], [y - height / 2, next_y, next_y]
                self.axes.plot(*ways, color=colour, lw=2.4, zorder=3, solid_joinstyle="round")
            for offset, y, width, height in boxes:
                corner = (x + side * offset - width / 2, y - height / 2)
                self.axes.add_patch(
                    patches.FancyBboxPatch(
                        corner, width, height, boxstyle="round,pad=0,rounding_size=3", fc=colour, ec="none", zorder=4
                    )
                )
        for offset, y, *_ in boxes[:3]:
            self.axes.plot([x - offset, x + offset], [y, y], color="#B4BCC4", lw=2, zorder=3)
        self.text(x, ROWS[level] + PANEL / 2 + 42, "3D U-Net", 19, weight="bold")

    def badge(self, x: float, y: float, words: str, colour: str, width: float = 156, height: float = 66) -> None:
        """Words in a round box with its middle at (x, y)."""
        box = patches.FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=14", fc="white",
            ec=colour, lw=2.5, zorder=4,
        )  # fmt: skip
        self.axes.add_patch(box)
        self.text(x, y, words, colour=colour, weight="bold", zorder=6, linespacing=1.25)

    def save(self, path: Path) -> None:
        """Writes the sheet as PNG."""
        self.axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="auto")
        self.axes.axis("off")
        with io.BytesIO() as whole:
            self.figure.savefig(whole, dpi=100, facecolor="white")
            # 256 colours need a third of the bytes; none is off by more than 18 of 255.
            few = Image.open(whole).convert("RGB")
            few = few.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
            few.save(path, optimize=True)


def draw(path: Path) -> None:
    """Draws the figure, left to right in the order of the data."""
    image, label = phantom_slice()
    one_hot = (label == np.arange(len(ORGANS) + 1)[:, None, None]).astype(np.float32)
    maps = blurred(patch(one_hot, FACTORS[1]), 2)
    finest = blurred(patch(one_hot, FACTORS[2]), 1).argmax(0)
    finest_maps = (finest == np.arange(len(ORGANS) + 1)[:, None, None]).astype(np.float32)
    fine_image = grey(patch(image, FACTORS[2]))
    mask = np.where(finest[..., None] > 0, 0.25 * fine_image + 0.75 * coloured(finest_maps), fine_image)
    canvas = Canvas()
    draw_scan(canvas, image)
    draw_levels(canvas, grey(patch(image, FACTORS[1])), maps, fine_image, mask)
    draw_losses(canvas)
    draw_legend(canvas, sorted(set(label[label > 0])))
    canvas.save(path)


def draw_scan(canvas: Canvas, image: np.ndarray) -> None:
    """The scan, and what each level sees of it."""
    left, scale = 24, 0.9
    height, width = (scale * (cut.stop - cut.start) for cut in SHOWN)
    bottom = (ROWS[1] + ROWS[2]) / 2 - height / 2 + 28
    canvas.picture(grey(image[SHOWN]), left, bottom, width, height, INK)
    canvas.text(left + width / 2, bottom + height + 26, "CT scan", 19, weight="bold")
    canvas.text(left + width / 2, bottom - 22, "voxels of 1 mm", 16, QUIET)
    for level, factor in FACTORS.items():
        edge = scale * VOXELS * factor
        x = left + scale * (CENTRE[1] - SHOWN[1].start) - edge / 2
        y = bottom + height - scale * (CENTRE[0] - SHOWN[0].start) - edge / 2
        canvas.frame(x, y, edge, LEVEL[level])
        for up in (0, 1):
            canvas.axes.plot(
                [x + edge, PATCH[level]], [y + up * edge, ROWS[level] + (up - 0.5) * PANEL], color=LEVEL[level], lw=1.6,
                ls=(0, (1, 1.5)), zorder=5,
            )  # fmt: skip


def draw_levels(canvas: Canvas, coarse: np.ndarray, maps: np.ndarray, fine: np.ndarray, mask: np.ndarray) -> None:
    """Both networks with what goes in and comes out, and the context between them."""
    box = patches.FancyBboxPatch(
        (PATCH[2] - 16, ROWS[2] - 186), MAPS + PANEL + 48 - PATCH[2], 350, boxstyle="round,pad=0,rounding_size=18",
        fc="#FFF6EC", ec="#F0C79B", lw=1.5, zorder=0,
    )  # fmt: skip
    canvas.axes.add_patch(box)

    canvas.stack(coarse, PATCH[1], 1, "Level 1 patch", "64³ voxels of 4 mm")
    canvas.network(NETWORK[1], 1)
    canvas.stack(coloured(maps), MAPS, 1, "Softmax maps", "")
    canvas.frame(MAPS + PANEL / 4, ROWS[1] - PANEL / 4, PANEL / 2, LEVEL[2])
    canvas.arrow((PATCH[1] + PANEL + 24, ROWS[1]), (NETWORK[1] - 84, ROWS[1]))
    canvas.arrow((NETWORK[1] + 84, ROWS[1]), (MAPS - 8, ROWS[1]))

    x, middle = MAPS + PANEL / 2, (ROWS[1] + ROWS[2]) / 2 + 34
    canvas.arrow((x, ROWS[1] - PANEL / 2 - 10), (x, ROWS[2] + 172))
    canvas.text(x + 26, middle, "centre crop,\nupsample × 2", ha="left", linespacing=1.3)
    canvas.text(
        x - 26, middle, "gradients flow back\nthrough the context", colour=GRADIENT, ha="right", linespacing=1.3
    )

    canvas.stack(fine, PATCH[2], 2, "Level 2 patch", "64³ voxels of 2 mm")
    between = (PATCH[2] + PANEL + 16 + MAPS) / 2
    canvas.text(between, ROWS[2] + 6, "+", 34, weight="bold")
    canvas.stack(coloured(upsampled(maps)), MAPS, 2, "Context", "level 1's maps")
    canvas.network(NETWORK[2], 2)
    canvas.text((PATCH[2] + MAPS + PANEL + 16) / 2, ROWS[2] - 158, "concatenated: level 2's input", 17, LEVEL[2])
    canvas.stack(mask, MASK, 2, "", "")
    canvas.text(MASK + PANEL / 2, ROWS[2] - PANEL / 2 - 26, "Finest prediction", 19, weight="bold")
    canvas.arrow((MAPS + PANEL + 36, ROWS[2]), (NETWORK[2] - 84, ROWS[2]))
    canvas.arrow((NETWORK[2] + 84, ROWS[2]), (MASK - 8, ROWS[2]))


def draw_losses(canvas: Canvas) -> None:
    """The Dice loss of each level, and their sum."""
    x, between = MASK + PANEL / 2, (ROWS[1] + ROWS[2]) / 2 + 34
    canvas.badge(NETWORK[2], ROWS[1], "Dice loss,\nlevel 1", LEVEL[1])
    canvas.badge(x, between, "Dice loss,\nlevel 2", LEVEL[2])
    canvas.badge(x, ROWS[1], "Total loss:\ntheir sum", INK)
    canvas.arrow((MAPS + PANEL + 22, ROWS[1]), (NETWORK[2] - 86, ROWS[1]))
    canvas.arrow((NETWORK[2] + 86, ROWS[1]), (x - 86, ROWS[1]))
    canvas.arrow((x, ROWS[2] + PANEL / 2 + 24), (x, between - 40))
    canvas.arrow((x, between + 40), (x, ROWS[1] - 40))


def draw_legend(canvas: Canvas, organs: list[int]) -> None:
    """The colours of the organs, and the two kinds of arrows."""
    for number, value in enumerate(organs):
        x, y = 30 + 178 * (number % 3), 116 - 38 * (number // 3)
        name = ORGANS[value - 1]
        canvas.axes.add_patch(patches.Circle((x + 9, y), 9, color=ORGAN_COLOURS[name]))
        canvas.text(x + 28, y, name.replace("_", " "), 16, ha="left")
    canvas.arrow((30, 32), (84, 32), ways="data")
    canvas.text(98, 32, "data", 16, ha="left")
    canvas.arrow((262, 32), (208, 32), ways="gradient")
    canvas.text(276, 32, "gradients", 16, ha="left")


if __name__ == "__main__":
    draw(Path(__file__).parent.parent / "pyramid.png")
