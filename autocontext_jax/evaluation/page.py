"""`report.html`: tables, training curves, slices and surfaces in a single file that needs no network."""

import base64
import dataclasses
import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import plotly.graph_objects as go
from markdown_it import MarkdownIt
from plotly.offline import get_plotlyjs

from autocontext_jax.evaluation.pictures import PALETTE
from autocontext_jax.evaluation.surface_meshes import Surface
from autocontext_jax.files import write_whole

TEMPLATE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .15em .7em; } th:first-child { text-align: left; }
th { border-bottom: 1px solid #888; }
td.missed { background: #fde7c8; }
img { max-width: 100%; } .row { display: flex; flex-wrap: wrap; } .row > div { flex: 1 1 340px; height: 420px; }
</style>
<script>$plotly</script></head><body>
<h1>$title</h1>
$tables
<h2>Dice per class</h2><div id="dice"></div>
<h2>Training</h2><div id="training"></div>
<h2>Cases</h2>
<p>The best, the median and the worst by mean Dice: <select id="case">$options</select></p>
<div id="slices"></div>
<p>Drag with the mouse to rotate the surfaces.</p><div id="surfaces" class="row"></div>
<script id="figures" type="application/json">$figures</script>
<script>
const figures = JSON.parse(document.getElementById("figures").textContent);
const plain = { responsive: true, displaylogo: false };
Plotly.newPlot("dice", figures.dice.data, figures.dice.layout, plain);
Plotly.newPlot("training", figures.training.data, figures.training.layout, plain);
const picker = document.getElementById("case");
function show() {
  const shown = figures.cases[picker.value];
  document.getElementById("slices").innerHTML = '<img alt="slices" src="' + shown.slices + '">';
  const row = document.getElementById("surfaces");
  for (const old of row.children) Plotly.purge(old);
  row.replaceChildren(...shown.surfaces.map(() => document.createElement("div")));
  shown.surfaces.forEach((scene, i) => Plotly.newPlot(row.children[i], scene.data, scene.layout, plain));
}
if (picker.value) { picker.addEventListener("change", show); show(); }
</script></body></html>
""")


@dataclasses.dataclass(frozen=True)
class Shown:
    """A case that the page shows.

    Attributes:
      name: text for the list of cases, for example with the score.
      slices: content of a PNG file.
      surfaces: {title of the column: result of `surfaces.class_surfaces`}.
    """

    name: str
    slices: bytes
    surfaces: Mapping[str, Mapping[str, Surface]]


def write_page(
    path: Path,
    *,
    title: str,
    tables: str,
    result: Mapping[str, Any],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    cases: Sequence[Shown],
) -> None:
    """Writes the page, whole or not at all.

    Args:
      path: of the HTML file.
      title: of the page.
      tables: Markdown, for example of `report.table`.
      result: of `report.evaluation`, or the same read from `evaluation.json`; for the plot of all Dice scores.
      curves: {name of a run: rows of its `metrics.jsonl`}.
      cases: the cases to show.
    """
    classes = result["classes"]
    figures = {
        "dice": _figure(_boxes(result)),
        "training": _figure(_curves(curves)),
        "cases": [
            {
                "slices": "data:image/png;base64," + base64.b64encode(case.slices).decode(),
                "surfaces": [_figure(scene) for scene in _scenes(case.surfaces, classes)],
            }
            for case in cases
        ],
    }
    text = TEMPLATE.substitute(
        title=html.escape(title),
        plotly=get_plotlyjs(),
        tables=_html(tables),
        options="".join(f'<option value="{i}">{html.escape(case.name)}</option>' for i, case in enumerate(cases)),
        figures=json.dumps(figures).replace("</", "<\\/"),  # text in the data must not close <script>
    )
    write_whole(path, text)


def _html(tables: str) -> str:
    """Converts Markdown to HTML and colours the cells whose average leaves missed scans out.

    HTML in the Markdown is shown as text, since names of classes and cases come from the user's files.
    """
    text = MarkdownIt("js-default").render(tables)
    return re.sub(r"<td( [^>]*)?>(?=[^<]* missed\)</td>)", r'<td class="missed"\1>', text)


def _figure(figure: go.Figure) -> dict[str, Any]:
    """A figure in the form that Plotly's JavaScript takes."""
    return json.loads(figure.to_json())


def _boxes(result: Mapping[str, Any]) -> go.Figure:
    """Box plots of the Dice for each class and block, with a point for each case."""
    figure = go.Figure()
    for block in result["summary"]:
        points = [
            (name, scores[block][name]["dice"]) for scores in result["cases"].values() for name in result["classes"]
        ]
        x, y = zip(*points, strict=True)
        figure.add_box(x=x, y=y, name=block.replace("_", " ").capitalize(), boxpoints="all", pointpos=0, jitter=0.3)
    figure.update_layout(template="plotly_white", boxmode="group", yaxis={"title": "Dice", "range": [-0.03, 1.03]})
    return figure


def _curves(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> go.Figure:
    """For each run the training loss, the validation loss, and the validation Dice of each level."""
    figure = go.Figure()
    for run, rows in curves.items():
        prefix = f"{run}: " if run else ""
        for key in dict.fromkeys(key for row in rows for key in row):
            loss = key in ("loss", "validation_loss")
            level = key.removeprefix("validation_dice_level_")
            if not loss and not level.isdigit():
                continue
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            x, y = zip(*points, strict=True)
            name = prefix + (key.replace("_", " ") if loss else f"validation Dice, level {level}")
            lines = {"width": 1, "dash": "solid" if key == "loss" else "dot"} if loss else {"width": 2}
            opacity = 0.5 if key == "loss" else 1
            figure.add_scatter(x=x, y=y, name=name, line=lines, opacity=opacity, yaxis="y" if loss else "y2")
    figure.update_layout(
        template="plotly_white",
        xaxis={"title": "step"},
        yaxis={"title": "loss"},
        yaxis2={
            "title": "Dice",
            "range": [0, 1],
            "overlaying": "y",
            "side": "right",
            "showgrid": False,
            "tickmode": "auto",
        },
        legend={"orientation": "h", "yanchor": "top", "y": -0.25},  # below the plot: it can be long
    )
    return figure


def _scenes(columns: Mapping[str, Mapping[str, Surface]], classes: Sequence[str]) -> Iterator[go.Figure]:
    """A 3D figure for each column, all to the same scale; the camera starts at the patient's front."""
    vertices = [surface.vertices for surfaces in columns.values() for surface in surfaces.values()]
    everything = np.concatenate(vertices or [np.zeros((1, 3), np.float32)])
    low, size = everything.min(0) - 1, np.ptp(everything, axis=0) + 2
    scene: dict[str, Any] = {"aspectmode": "manual", "aspectratio": {}}
    for name, start, length in zip("zyx", low.tolist(), size.tolist(), strict=True):
        scene[f"{name}axis"] = {"visible": False, "range": [start, start + length]}
        scene["aspectratio"][name] = 1.5 * length / float(size.max())
    for title, surfaces in columns.items():
        yield _scene(title, surfaces, classes, scene)


def _scene(title: str, surfaces: Mapping[str, Surface], classes: Sequence[str], scene: Mapping[str, Any]) -> go.Figure:
    figure = go.Figure()
    for name, surface in surfaces.items():
        z, y, x = surface.vertices.T
        i, j, k = surface.faces.T
        r, g, b = PALETTE[classes.index(name) % len(PALETTE)].astype(int)
        figure.add_mesh3d(x=x, y=y, z=z, i=i, j=j, k=k, color=f"rgb({r},{g},{b})", name=name, hoverinfo="name")
    camera = {"eye": {"x": 0.0, "y": -2.0, "z": 0.3}, "projection": {"type": "orthographic"}}
    figure.update_layout(
        template="plotly_white",
        title=title,
        margin={"l": 0, "r": 0, "b": 0, "t": 40},
        scene={**scene, "camera": camera},
    )
    return figure
