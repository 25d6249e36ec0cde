"""Surveys of data sets that do not exist, for tests of what a plan makes of them."""

from autocontext_jax.data.survey import ClassSurvey, Range, Survey

# A class: (name, share of the voxels, extent in mm, thickness in mm), both along (z, y, x).
LIVER = ("liver", 0.03, (200, 200, 200), (60, 60, 60))
ARTERY = ("artery", 0.001, (200, 60, 60), (40, 7, 7))


def same(value):
    """A number that all cases share."""
    return Range(float(value), float(value), float(value))


def make_survey(shape, spacing, classes, *, cases=10, thin=None):
    """The survey of scans that are all alike; `thin` is the spacing's 10th percentile."""

    def axes(values):
        z, y, x = map(same, values)
        return z, y, x

    return Survey(
        cases=cases,
        shape=axes(shape),
        extent=axes(size * mm for size, mm in zip(shape, spacing, strict=True)),
        spacing=axes(spacing),
        spacing_p10=thin or tuple(map(float, spacing)),
        orientations=(("RAS", cases),),
        label_maps=cases,
        classes=tuple(
            ClassSurvey(name, cases, cases, share, same(1000), same(1), axes(extent), axes(thickness))
            for name, share, extent, thickness in classes
        ),
        made_from="these",
    )
