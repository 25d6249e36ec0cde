"""The model card: a page of Markdown for people, in every model file."""

from collections.abc import Mapping
from typing import Any

from autocontext_jax.errors import counted
from autocontext_jax.inference.description import Description

USE = """```python
import autocontext_jax as ac

model = ac.load("{name}.autocontext")
mask = model.predict("scan.nii.gz")
```

```bash
autocontext --mode predict --model {name}.autocontext \\
    --input scan.nii.gz --output mask.nii.gz
```"""

LIMITS = """A research model. It is no medical device: nobody has approved it for diagnosis or treatment. On scanners,
protocols, patients or diseases that it has not learned from it can fail without a sign. Look at every mask before you
use it."""


def model_card(description: Description) -> str:
    """The card of a model."""
    levels = description.levels
    grids = (
        f"{' × '.join(f'{mm:g}' for mm in levels.finest_spacing)} mm (z, y, x) at the finest level, whatever the scan's"
        if levels.unit == "mm"
        else f"{', '.join(f'{factor:g}' for factor in levels.factors)} of the scan's voxels for a voxel of each level"
    )
    networks = counted(len(levels.factors), f"{description.network.name} network")
    pyramid = f"of {networks} with auto-context"
    members = len(description.members)
    what = f"An ensemble of {members} pyramids, each {pyramid}" if members else f"A pyramid {pyramid}"
    parts = [
        f"# {description.name}",
        f"{what} (Roth et al., MICCAI 2018), trained with autocontext_jax.",
        "## Use\n\n" + USE.format(name=description.name),
        f"## Input\n\n{_channels(description)}\n\nResolution: {grids}.",
        "## Classes\n\n" + _classes(description),
        "## Training\n\n" + _listed(description.training) + _members(description),
        "## Evaluation\n\n" + (_evaluation(description.evaluation) or "It was not evaluated."),
        f"## Limits\n\n{LIMITS}",
        f"## License\n\n{description.license or 'Nobody has said under which license these weights may be used.'}",
    ]
    return "\n\n".join(parts) + "\n"


def _channels(description: Description) -> str:
    image = description.image
    several = any(member.image != image for member in description.members)
    clipped = [
        "" if not channel.is_ct
        else "clipped by each member to a range of its own" if several
        else f"clipped to [{channel.window[0]:g}, {channel.window[1]:g}] HU"
        for channel in image.channels
    ]  # fmt: skip
    if [channel.normalization for channel in image.channels] == ["CT"]:
        return f"A CT scan in HU, one value a voxel. Intensities are {clipped[0]}."
    rows = ["| channel | name | normalization |", "| ---: | --- | --- |"]
    for number, channel in enumerate(image.channels):
        window = f", {clipped[number]}" if clipped[number] else ""
        rows.append(f"| {number} | {channel.name} | {channel.normalization}{window} |")
    return "\n".join(rows)


def _classes(description: Description) -> str:
    rows = ["| value | class | color | code |", "| ---: | --- | --- | --- |"]
    if description.regions:
        rows = [
            "The classes are regions, which may overlap: a mask has in each voxel the value of the last that holds it.",
            "",
            *rows,
        ]
    for entry in description.classes:
        color = "#" + "".join(f"{part:02x}" for part in entry.color) if entry.color else ""
        rows.append(f"| {entry.value} | {entry.name} | {color} | {entry.code} |")
    return "\n".join(rows)


def _listed(values: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in values.items())


def _members(description: Description) -> str:
    """What differs between the members of an ensemble, a row each; "" without members."""
    if not description.members:
        return ""
    rows = []
    for member in description.members:
        own = {name: value for name, value in member.training.items() if name not in description.training}
        if member.image.ct:
            windows = (member.image.channels[number].window for number in member.image.ct)
            own["HU"] = ", ".join(f"{low:g} to {high:g}" for low, high in windows)
        rows.append({"member": member.name} | own)
    names = list(dict.fromkeys(name for row in rows for name in row))
    titles = [name.replace("_", " ") for name in names]
    lines = [titles, ["---"] * len(names), *([str(row.get(name, "")) for name in names] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"\n\nThe maps of the members are averaged at each level.\n\n{table}"


def _evaluation(result: Mapping[str, Any]) -> str:
    if not result:
        return ""
    rows = ["| class | Dice (%), average ± std | cases | missed in |", "| --- | ---: | ---: | ---: |"]
    for name, dice in result["dice"].items():
        number = "–" if dice["avg"] is None else f"{100 * dice['avg']:.1f} ± {100 * dice['std']:.1f}"
        rows.append(f"| {name} | {number} | {dice['cases']} | {dice['missed']} |")
    return f"{result['cases_are']}.\n\n" + "\n".join(rows)
