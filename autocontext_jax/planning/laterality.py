"""Which classes are the left and the right one of a pair, as far as their names say it.

A network may learn from patches whose left and right are exchanged only if such classes exchange their names with it,
see `AugmentationConfig.flip_pairs`.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Sequence

# The words of a name: "RightParotid" and "LKidney" have two each, "L5" is one.
WORDS = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[^\W\d_A-Z]+\d*|[A-Z]+\d*|\d+")

# A word, in lower case, that names a side, and what remains of it: "left", "left2", "leftkidney". No "leftover".
NAMED = re.compile(r"(?P<side>left|right)(?P<rest>(?!over)\w*)|(?P<short>lt?|rt?)")

# One that may name a side: "kidneyleft", "L5", "lkidney".
PERHAPS = re.compile(r"(?P<before>\w+)(?P<word>left|right)|(?P<letter>[lr])(?P<after>\d*|[^\W\d]{3,})")

OTHER = {"left": "right", "right": "left", "l": "r", "r": "l"}


@dataclasses.dataclass(frozen=True)
class Laterality:
    """What the names of classes say of sides.

    Attributes:
      pairs: as `AugmentationConfig.flip_pairs` takes them: ("right_kidney=left_kidney", ...).
      unpaired: names with a side whose partner is missing, or not the only one, or which `flip_pairs` cannot say, since
        they hold a "=". While there are any, left and right must not be exchanged.
    """

    pairs: tuple[str, ...]
    unpaired: tuple[str, ...]


def find_laterality(classes: Sequence[str]) -> Laterality:
    """The pairs of left and right among names of classes, and the names of one side alone.

    A side is a word of its own: left, right, L, R, Lt or Rt; also as part of "LeftParotid", or at the beginning of
    "leftkidney". What may mean something else counts only where the same name with the other side exists: "lkidney" and
    "rkidney", "rib_L5" and "rib_R5". So "cleft", "lung" and the vertebra "L5" have no side. Partners differ in nothing
    but the side and its place in the name: "lung_middle_lobe_right" has none.

    Names do not say that the liver lies on one side, nor that the two ventricles of the heart are no mirror images of
    each other. Regions of several values may be among the pairs, which `flip_pairs` refuses.

    Args:
      classes: names, in the order of the classes; with the background or without.
    """
    words = {name: tuple(WORDS.findall(unicodedata.normalize("NFC", name))) for name in classes}
    found: list[tuple[list[str], list[str]]] = []
    certain: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}
    perhaps: dict[tuple[str, ...], str] = {}
    for name in classes:
        read = _certain_side(words[name])
        if read is None:
            perhaps[tuple(word.lower() for word in words[name])] = name
            continue
        side, rest = read
        if rest not in certain:
            certain[rest] = ([], [])
            found.append(certain[rest])
        certain[rest][side == "right"].append(name)
    for own, name in perhaps.items():
        for place in range(len(own)):
            side, other = _with_other_side(own, place)
            if side == "left" and other in perhaps:
                found.append(([name], [perhaps[other]]))
    pairs, unpaired = {}, set()
    for left, right in found:
        if len(left) == len(right) == 1 and "=" not in left[0] + right[0]:
            pairs[right[0]] = left[0]
        else:
            unpaired |= {*left, *right}
    return Laterality(
        tuple(f"{right}={left}" for right, left in pairs.items()), tuple(name for name in classes if name in unpaired)
    )


def _certain_side(words: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
    """The first side that the words of a name say, and the rest of the name, which partners share; None if none."""
    first, rest = "", []
    for place, word in enumerate(words):
        lower, following = word.lower(), words[place + 1 : place + 2]
        match = NAMED.fullmatch(lower)
        if match is None or (lower in ("l", "r") and following and following[0].isdigit()):  # "vertebra L 5"
            rest.append(lower)
            continue
        side = match["side"] or {"l": "left", "r": "right"}[lower[0]]
        if first:
            rest.append("same side" if side == first else "other side")
        first = first or side
        rest += [match["rest"]] if match["rest"] else []
    return (first, tuple(rest)) if first else None


def _with_other_side(words: tuple[str, ...], place: int) -> tuple[str, tuple[str, ...]]:
    """The side that one word of a name may say, and the words with the other side in its place; "" if it says none."""
    match = PERHAPS.fullmatch(words[place])
    if match is None:
        return "", ()
    own = match["word"] or match["letter"]
    other = (match["before"] or "") + OTHER[own] + (match["after"] or "")
    return {"l": "left", "r": "right"}[own[0]], (*words[:place], other, *words[place + 1 :])
