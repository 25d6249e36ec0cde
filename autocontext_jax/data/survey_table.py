"""A survey as text, for the log: a table of the scans and one of the classes."""

from collections.abc import Sequence

from autocontext_jax.data.survey import ClassSurvey, Range, Survey
from autocontext_jax.errors import counted, one_line


def survey_table(survey: Survey) -> str:
    """The survey in lines of text, each class in one; "–" where nothing is known."""
    orientations = ", ".join(f"{name} in {number}" for name, number in survey.orientations)
    scans = [
        ["scans", "z", "y", "x"],
        ["voxels", *map(_range, survey.shape)],
        ["extent, mm", *map(_range, survey.extent)],
        ["spacing, mm", *map(_range, survey.spacing)],
        ["10th percentile, mm", *map(_number, survey.spacing_p10)],
    ]
    columns = ["class", "cases", "share", "voxels", "volume, ml", "extent, mm", "largest, mm", "thickness, mm"]
    read = "all label maps" if survey.label_maps == survey.cases else f"{survey.label_maps} label maps, drawn at random"
    return "\n".join(
        [
            f"{counted(survey.cases, 'labelled case')}, orientation {orientations}; median (smallest to largest):",
            *_aligned(scans),
            "",
            f"classes in {read}; medians over the cases that have the class, lengths along z × y × x:",
            *_aligned([columns, *map(_row, survey.classes)]),
        ]
    )


def _row(found: ClassSurvey) -> list[str]:
    """Of a class; its cases are those that have it, of those that annotate it."""
    return [
        one_line(found.name),
        f"{found.cases} of {found.annotated}",
        "–" if found.share is None else f"{_number(100 * found.share)} %",
        _range(found.voxels),
        _range(found.volume),
        _lengths([each.median for each in found.extent or ()]),
        _lengths([each.largest for each in found.extent or ()]),
        _lengths([each.median for each in found.thickness or ()]),
    ]


def _range(found: Range | None) -> str:
    if found is None:
        return "–"
    same = found.smallest == found.largest
    return _number(found.median) + f" ({_number(found.smallest)} to {_number(found.largest)})" * (not same)


def _lengths(lengths: Sequence[float]) -> str:
    return " × ".join(map(_number, lengths)) or "–"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines whose columns begin below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
