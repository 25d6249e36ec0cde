"""The anatomy of a generated patient: a table of parts, and how patients differ.

Each part is a tube of varying radius about a smooth curve. It is measured in mm in the body's frame, whose origin lies
in front of the first lumbar vertebra; z grows to the head, y to the back, x to the patient's left.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

ORGANS = ("artery", "portal_vein", "liver", "spleen", "stomach", "gallbladder", "pancreas")

AIR, FAT, MUSCLE = -1000.0, -100.0, 50.0  # HU
# HU, more in an early scan.
_EARLY = {
    "artery": 35,
    "other artery": 35,
    "heart": 20,
    "portal_vein": -15,
    "vein": -15,
    "other vein": -15,
    "liver": -8,
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A tube of varying radius about a smooth curve: a vessel, an organ, a bone.

    Attributes:
      name: parts of one name move and enhance together; it gives the label where it stands in `ORGANS`.
      hu: mean intensity.
      curve: [points, 4], rows (z, y, x, radius) in mm.
      flat: reach along (z, y, x) for each mm of radius; an ellipsoid is a short tube with unequal ones.
      wall: (thickness in mm, HU) of the outermost layer.
      gas: mm that air reaches back from the most anterior point of the content.
      rind: mm of fat that keep it apart from the parts before it.
      loose: how freely it varies; 0 for the body's frame, which alone may reach beyond the cavity.
    """

    name: str
    hu: float
    curve: np.ndarray
    flat: tuple[float, float, float] = (1, 1, 1)
    wall: tuple[float, float] = (0, 0)
    gas: float = 0
    rind: float = 0
    loose: float = 1


def _part(name: str, hu: float, *rows: tuple[float, ...], **rest) -> Part:
    return Part(name, hu, np.array(rows, float), **rest)


def _both(name: str, hu: float, *rows: tuple[float, ...], **rest) -> list[Part]:
    """A part on the patient's left and its mirror image on the right."""
    sides = {"left": 1, "right": -1}.items()
    return [_part(f"{side} {name}", hu, *((z, y, sign * x, r) for z, y, x, r in rows), **rest) for side, sign in sides]


def _tree(name: str, hu: float, *curves: list[tuple[float, ...]]) -> list[Part]:
    """Vessels that meet where their curves end; they vary little, lest they leave what they feed."""
    return [_part(name, hu, *curve, loose=0.35) for curve in curves]


def _vertebra(z: float) -> list[Part]:
    """Body, arch and processes; from the thorax up a pair of ribs, which run forwards and down in the wall."""
    bone = {"loose": 0, "wall": (2, 380)}
    turns = np.radians(np.arange(-75, 0.55 * z - 20, 8)) if z > 0 else np.empty(0)
    rib = [(z - 32 * (t + 1.3), -85 * np.sin(t), 133 * np.cos(t), 4.5) for t in turns]
    return [
        _part("bone", 190, (z - 7, 38, 0, 22), (z + 7, 38, 0, 22), flat=(0.3, 0.8, 1), **bone),
        _part("bone", 300, (z, 66, 0, 16), flat=(0.8, 0.8, 1), **bone),
        _part("bone", 250, (z - 2, 76, 0, 5), (z - 14, 96, 0, 4), **bone),
        *_both("bone", 250, (z, 62, 12, 5), (z, 68, 38, 4), **bone),
        *(_both("bone", 220, *rib, **bone) if rib else []),
    ]


def _small_bowel(rng: np.random.Generator) -> Iterator[Part]:
    """Loops at random below the organs; inside and wall look like the stomach's or the gallbladder's."""
    for _ in range(8):
        centres = rng.uniform((-175, -62, -75), (-40, 8, 100), (6, 3))
        radius = np.full((6, 1), rng.uniform(8, 13))
        yield Part(
            "bowel",
            rng.uniform(5, 45),
            np.hstack([centres, radius]),
            wall=(2.5, 95),
            gas=np.float64(rng.choice([0, 0, 14])),
        )


def _look_alikes(rng: np.random.Generator, count: int) -> Iterator[Part]:
    """What only its place in the body tells from an organ, `count` of each kind anywhere between the organs.

    Cysts are filled and walled as the gallbladder, loops of bowel as the stomach; vessels as the artery and the portal
    vein cross the cavity, so that a patch rarely shows where they come from.
    """
    for _ in range(count):
        start = rng.uniform((-160, -60, -95), (70, 40, 95))
        cyst = np.vstack([start, start + rng.uniform(-25, 25, 3)])
        yield Part("cyst", 10, np.hstack([cyst, rng.uniform(8, 17, (2, 1))]), wall=(1.5, 60), rind=1)
        loop = rng.uniform((-110, -60, -90), (40, 20, 110), (4, 3))
        radius = np.full((4, 1), rng.uniform(12, 20))
        yield Part("loop", 40, np.hstack([loop, radius]), wall=(4, 75), gas=np.float64(rng.choice([0, 14])), rind=3)
        for name, hu, thickness in (("other artery", 210, (2, 6)), ("other vein", 185, (4, 7))):
            course = rng.uniform((-190, -55, -100), (90, 45, 100), (4, 3))
            yield Part(name, hu, np.hstack([course, np.full((4, 1), rng.uniform(*thickness))]))


def _anatomy(rng: np.random.Generator, look_alikes: int) -> list[Part]:
    """Every part of one patient before it varies; a later one lies over an earlier one."""
    stomach, bladder = rng.uniform(0.8, 1.2), rng.uniform(0.9, 1.35)  # how full
    dome = {"flat": (1, 1.1, 1), "wall": (3, MUSCLE), "loose": 0.5}
    # fmt: off
    return [
        # chest; the mesentery's fat ends the domes below
        *_both("lung", -850, (20, 45, 72, 18), (70, 8, 70, 55), (220, 5, 68, 60), flat=(1, 1.25, 1), loose=0.5),
        _part("heart", 150, (104, -28, 38, 38), (140, -22, 8, 42), rind=4, wall=(9, 110)),
        _part("mediastinum", MUSCLE, (60, 8, 12, 6), (110, 14, 8, 9), (220, 10, 0, 20), loose=0.3),
        _part("right diaphragm", FAT, (-60, -8, -72, 60), (24, -8, -70, 66), **dome),
        _part("left diaphragm", FAT, (-60, -8, 72, 60), (18, -8, 70, 64), **dome),
        _part("mesentery", FAT, (-300, 0, 0, 50), (0, 0, 0, 50), flat=(0.1, 1.8, 2.8), loose=0.3),
        # bowel
        *_small_bowel(rng),
        *_look_alikes(rng, look_alikes),
        _part("colon", 20, (-175, 22, -98, 22), (-90, 25, -102, 20), (-58, 0, -98, 19), wall=(3, 80), gas=12),
        _part("colon", 0, (-58, 0, -98, 18), (-72, -48, -55, 17), (-84, -58, 0, 16), (-58, -48, 60, 16),
              (5, 20, 112, 15), wall=(3, 80), gas=16),
        _part("colon", 30, (5, 20, 112, 14), (-60, 35, 110, 13), (-175, 25, 98, 14), wall=(3, 80)),
        # organs; the veins in the liver are the hepatic ones, told from the portal vein by where they go
        _part("liver", 110, (-50, 12, -98, 22), (-8, 8, -88, 48), (30, 4, -76, 60), (46, -18, -34, 42),
              (48, -42, 12, 25), (46, -52, 52, 12), flat=(1.05, 1.1, 1), loose=0.8),
        *_tree("vein", 175, [(82, 8, -22, 5), (66, 10, -58, 4), (38, 18, -90, 2.5)],
               [(82, 6, -22, 5), (64, -16, -48, 4), (38, -30, -72, 2.5)],
               [(82, 4, -20, 5), (62, -26, -12, 3.5), (52, -44, 12, 2.5)]),
        _part("spleen", 120, (60, 44, 64, 17), (46, 40, 84, 28), (20, 32, 92, 27), (-2, 24, 97, 15),
              flat=(1.1, 1.2, 0.9), rind=3, loose=0.8),
        _part("stomach", 40, (54, 16, 58, 24 * stomach), (22, -20, 76, 27 * stomach), (-18, -42, 62, 24 * stomach),
              (-34, -54, 20, 18 * stomach), (-20, -44, -16, 11), wall=(4, 75), gas=14 * stomach, rind=3, loose=0.8),
        *_both("kidney", 185, (4, 47, 52, 19), (-27, 46, 60, 25), (-60, 40, 64, 19), wall=(7, 205), rind=5),
        *_both("kidney", -60, (-6, 42, 48, 6), (-27, 38, 46, 9), (-45, 36, 52, 6)),
        _part("duodenum", 30, (-20, -44, -16, 9), (-18, -26, -48, 13), (-40, -4, -56, 12), (-66, 0, -40, 11),
              (-66, 0, 0, 10), (-40, -16, 34, 11), wall=(3, 90), loose=0.6),
        _part("gallbladder", 10, (-40, -52, -64, 14 * bladder), (-22, -38, -58, 12 * bladder), (0, -22, -48, 4),
              wall=(1.5, 60), rind=1),
        _part("pancreas", 92, (-36, -6, -34, 9), (-20, -14, -28, 14), (-6, -27, -4, 9), (10, -20, 26, 10.5),
              (20, 8, 56, 9), (26, 27, 80, 6), flat=(1.1, 1, 1), rind=2, loose=0.6),
        # spine, and the muscles along it: psoas, crura of the diaphragm, erector spinae
        _part("disc", 85, (-250, 38, 0, 20), (250, 38, 0, 20), flat=(1, 0.8, 1), loose=0),
        *_both("muscle", 55, (20, 36, 26, 7), (-50, 38, 38, 16), (-180, 30, 58, 24), loose=0),
        *_both("muscle", 55, (90, 14, 14, 5), (30, 20, 20, 6), (-30, 24, 16, 3), loose=0),
        *_both("muscle", 52, (-250, 78, 32, 25), (250, 78, 30, 21), flat=(1, 0.7, 1), loose=0),
        *(part for level in range(-6, 7) for part in _vertebra(34 * level)),
        _part("canal", 30, (-250, 62, 0, 8), (250, 62, 0, 8), loose=0),
        # vessels
        *_tree("cava", 140, [(-180, 14, -22, 9), (0, 10, -24, 10), (60, 4, -26, 11), (88, 2, -24, 12)]),
        *_tree("portal_vein", 185,
               [(-120, -30, -2, 4), (-50, -18, -10, 6), (-8, -11, -8, 8), (8, -10, -22, 8), (28, -10, -46, 8)],
               [(-8, -11, -8, 7), (8, -7, 24, 5.5), (16, 18, 56, 5), (26, 36, 82, 3.5)],  # splenic vein
               [(28, -10, -46, 7.5), (32, 2, -70, 5.5), (14, 14, -96, 3)],  # right branch, behind and in front
               [(32, 2, -70, 5.5), (48, 2, -88, 4), (58, 10, -104, 3)],
               [(28, -10, -46, 7), (40, -26, -26, 5.5), (46, -42, -4, 4), (48, -44, 16, 3)]),  # left branch
        *_tree("artery", 210,
               [(250, 12, 16, 12), (60, 9, 10, 11), (-105, 8, 6, 8.5)],  # aorta, iliac arteries
               [(-105, 8, 6, 7), (-180, 14, -30, 5)], [(-105, 8, 6, 7), (-180, 14, 38, 5)],
               [(20, 8, 9, 4), (20, -12, 8, 3.5)],  # celiac trunk, to hepatic and splenic
               [(20, -12, 8, 3), (16, -20, -14, 2.5), (30, -18, -46, 2), (44, -14, -62, 1.5)],
               [(20, -12, 8, 3), (26, -12, 28, 2.5), (22, 6, 48, 2.5), (34, 20, 66, 2), (32, 38, 84, 1.5)],
               [(4, 8, 9, 4), (-8, -12, 7, 3.5), (-50, -22, 6, 3), (-120, -34, 14, 1.7)],  # superior mesenteric
               [(-8, 8, 8, 3.5), (-14, 16, 28, 2.5), (-26, 38, 44, 2)],  # renal
               [(-8, 8, 8, 3.5), (-14, 18, -12, 2.5), (-26, 38, -44, 2)]),
    ]
    # fmt: on


def _smooth(curve: np.ndarray, step: float = 8) -> np.ndarray:
    """Catmull-Rom: a finer polyline through the same points, about `step` mm apart; [points, 4] to [more points, 4]."""
    if len(curve) < 3:
        return curve
    pieces = round(np.linalg.norm(np.diff(curve[:, :3], axis=0), axis=1).max() / step)
    ends = 2 * curve[[0, -1]] - curve[[1, -2]]
    knots = np.vstack([ends[:1], curve, ends[1:]])
    t = np.linspace(0, 1, pieces, endpoint=False)
    basis = 0.5 * np.stack([-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2], 1)
    spans = np.stack([knots[i : len(knots) - 3 + i] for i in range(4)], 1)
    return np.vstack([(basis @ spans).reshape(-1, 4), curve[-1:]])


def small_rotation(rng: np.random.Generator, degrees: float) -> np.ndarray:
    """Random small rotation, [3, 3]: Cayley's map of a skew matrix."""
    a, b, c = np.radians(degrees) / 2 * rng.standard_normal(3)
    skew = np.array([[0, a, b], [-a, 0, c], [-b, -c, 0]])
    return np.linalg.solve(np.eye(3) - skew, np.eye(3) + skew)


def individual(rng: np.random.Generator, look_alikes: int) -> list[Part]:
    """One patient's anatomy: each name's parts moved, turned, grown and enhanced together, each curve bent a little."""
    early, poses, parts = rng.uniform(-1, 1), {}, []
    for part in _anatomy(rng, look_alikes):
        if part.name not in poses:
            turn, shift = small_rotation(rng, 6 * part.loose), 4 * part.loose * rng.standard_normal(3)
            growth = np.exp(0.08 * part.loose * rng.standard_normal())
            hu = early * _EARLY.get(part.name, 0) + 6 * part.loose * rng.standard_normal()
            poses[part.name] = growth * turn, part.curve[:, :3].mean(0), shift, growth, hu
        affine, pivot, shift, growth, hu = poses[part.name]
        centres = (part.curve[:, :3] - pivot) @ affine.T + pivot + shift
        bend = 2.5 * min(1, 2 * part.loose)
        centres[1:-1] += bend * rng.standard_normal(centres[1:-1].shape)  # not the ends, where vessels meet
        curve = _smooth(np.hstack([centres, growth * part.curve[:, 3:]]))
        parts.append(dataclasses.replace(part, curve=curve, hu=float(part.hu + hu)))
    return parts
