"""The page of a report: surfaces, tables, and whether a real browser draws it."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from autocontext_jax.evaluation import page, pictures, published, report, surface_meshes

CLASSES = ("artery", "liver")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def ball(radius: float, shape: tuple[int, int, int] = (24, 32, 40)) -> np.ndarray:
    centre = [(size - 1) / 2 for size in shape]
    places = np.meshgrid(*(np.arange(size) - middle for size, middle in zip(shape, centre, strict=True)), indexing="ij")
    return np.sqrt(sum(along**2 for along in places)) <= radius


def volume(surface: surface_meshes.Surface) -> float:
    """mL inside, by the divergence theorem."""
    a, b, c = (surface.vertices[surface.faces[:, corner]].astype(float) for corner in range(3))
    return abs(float(np.sum(a * np.cross(b, c)))) / 6 / 1000


@pytest.mark.parametrize("largest", [72, 11])
def test_a_surface_lies_where_its_class_does(largest, monkeypatch):
    monkeypatch.setattr(surface_meshes, "LARGEST", largest)
    mask = np.zeros((24, 32, 40), np.uint8)
    mask[ball(9)] = 2
    spacing = (2.0, 1.0, 1.5)
    found = surface_meshes.class_surfaces(mask, CLASSES, spacing)
    assert list(found) == ["liver"]
    surface = found["liver"]
    assert volume(surface) == pytest.approx((mask == 2).sum() * np.prod(spacing) / 1000, rel=0.12)
    np.testing.assert_allclose(
        (surface.vertices.max(0) + surface.vertices.min(0)) / 2, np.array([11.5, 15.5, 19.5]) * spacing, atol=0.6
    )
    # Closed: every edge belongs to two triangles.
    edges = np.sort(surface.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    assert set(np.unique(edges, axis=0, return_counts=True)[1]) == {2}


def test_a_thin_vessel_keeps_its_surface(monkeypatch):
    monkeypatch.setattr(surface_meshes, "LARGEST", 10)
    mask = np.zeros((60, 8, 8), np.uint8)
    mask[:, 4, 4] = 1
    assert np.ptp(surface_meshes.class_surfaces(mask, CLASSES, (1, 1, 1))["artery"].vertices[:, 0]) > 50


def test_surfaces_as_a_picture(tmp_path):
    mask = ball(9).astype(np.uint8)
    one = surface_meshes.class_surfaces(mask, CLASSES, (1, 1, 1))
    surface_meshes.figure(tmp_path / "one.png", {"truth": one, "nothing": {}}, CLASSES, title="case")
    left, right = np.split(matplotlib.image.imread(tmp_path / "one.png")[60:, :, :3], 2, axis=1)
    painted = [np.mean(np.ptp(half, axis=-1) > 0.2) for half in (left, right)]
    assert painted[0] > 0.05
    assert painted[1] == 0


def scored(dice: float) -> dict[str, float]:
    names = ("jaccard", "volume_difference", "hausdorff_95", "surface_distance", "surface_dice")
    return {"dice": dice, **dict.fromkeys(names, math.nan if math.isnan(dice) else 0.5)}


CASES = {
    case: {
        level: {"artery": scored(dice - 0.1 * (level == "level_1")), "liver": scored(math.nan if dice > 0.8 else dice)}
        for level in ("level_1", "level_2")
    }
    for case, dice in (("a", 0.9), ("b", 0.7), ("c", 0.5))
}
RESULT = report.evaluation(CASES, CLASSES, cases_are="3 test cases", tolerance=2.0, pairs=[("level_2", "level_1")])


def test_published_rows_stand_beside_ones_own():
    text = report.beside_published({"level_2": {"artery": 0.5, "liver": None}, "on there": {"liver": 0.7}})
    lines = text.splitlines()
    assert lines[0] == "| Dice (%) | artery | liver | average |"
    assert lines[2] == "| Level 2 | 50.0 | – | 50.0 |"
    assert lines[3] == "| On there | – | 70.0 | 70.0 |"
    assert "| Roth et al. (2018), end-to-end, 340/37 | 83.0 | 96.9 | 90.0 |" in lines
    assert report.beside_published({"level_1": {"Larynx": 0.5}}).count("\n") == 3  # nothing published to compare with
    # The averages that the paper prints beside its rows.
    averages = [np.mean([value for value in row[2] if value is not None]) for row in published.TABLE_2]
    np.testing.assert_allclose(averages, [89.0, 86.3, 80.3, 65.0, 95.1, 78.8, 77.8], atol=0.051)


def test_a_box_of_missed_classes_is_seen(tmp_path):
    """A class that is missed in every scan has a Dice of 0 in all: a flat box at the bottom, with room below it."""
    cases = {name: {"level_1": {"artery": scored(0.0)}} for name in "abc"}
    result = report.evaluation(cases, ["artery"], cases_are="3 test cases", tolerance=2.0)
    pictures.boxes(tmp_path / "missed.png", result)
    empty = {name: {"level_1": {"artery": scored(math.nan)}} for name in "abc"}
    pictures.boxes(
        tmp_path / "empty.png", report.evaluation(empty, ["artery"], cases_are="3 test cases", tolerance=2.0)
    )
    missed, nothing = (matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3] for name in ("missed", "empty"))
    rows = np.flatnonzero(np.abs(missed - nothing).max(-1).mean(1) > 0.2)
    axis = np.flatnonzero((nothing.max(-1) < 0.1).mean(1) > 0.8)  # the frame: top and bottom
    assert rows.size
    assert axis.min() < rows.min()
    assert rows.max() + 3 < axis.max()


def test_box_plots(tmp_path):
    pictures.boxes(tmp_path / "dice.png", json.loads(json.dumps(RESULT).replace("NaN", "null")))
    pixels = matplotlib.image.imread(tmp_path / "dice.png")[..., :3] * 255
    for colour in pictures.PALETTE[:2]:
        shade = 0.6 * colour + 0.4 * 255
        assert np.mean(np.abs(pixels - shade).max(-1) < 4) > 0.003


@pytest.fixture
def written(tmp_path) -> Path:
    mask = ball(9).astype(np.uint8)
    mask[:8] *= 2
    columns = {
        name: surface_meshes.class_surfaces(mask, CLASSES, (1, 1, 1)) for name in ("truth", "level 1", "level 2")
    }
    picture = tmp_path / "slices.png"
    pictures.figure(picture, np.zeros(mask.shape, np.int16), {"truth": mask}, CLASSES, (1, 1, 1))
    rows = [{"step": step, "loss": 1 / step, "validation_dice_level_1": 0.1 * step} for step in (1, 2, 3)]
    cases = [page.Shown(f"<{name}>", picture.read_bytes(), columns) for name in "abc"]
    path = tmp_path / "report.html"
    page.write_page(
        path,
        title="A & B",
        tables=report.table(RESULT) + "\n<b>bold</b>\n",
        result=RESULT,
        curves={"": [{"step": 0}, *rows]},
        cases=cases,
    )
    return path


def test_the_page_marks_averages_that_leave_missed_scans_out(tmp_path):
    cases = {
        name: {"level_1": {"artery": {**scored(0.0), "hausdorff_95": distance, "surface_distance": distance / 2}}}
        for name, distance in (("a", math.inf), ("b", 2.0))
    }
    result = report.evaluation(cases, ["artery"], cases_are="3 test cases", tolerance=2.0)
    path = tmp_path / "report.html"
    page.write_page(path, title="", tables=report.table(result), result=result, curves={}, cases=[])
    text = path.read_text(encoding="utf-8")
    marked = re.findall(r'<td class="missed"[^>]*>([^<]*)</td>', text)
    assert marked == ["2.00 ± 0.00 (1 of 2 missed)", "1.00 ± 0.00 (1 of 2 missed)"]
    assert "td.missed {" in text
    assert "Missed by Level 1: artery in 1 of 2." in text


def test_the_page_needs_nothing_else(written):
    text = written.read_text(encoding="utf-8")
    body = text[text.index("</script></head>") :]
    assert not re.search(r"(src|href)\s*=\s*[\"']?(\w+:)?//", body)
    assert "<h1>A &amp; B</h1>" in body
    assert re.search(r"<tr>\s*<td>avg</td>", body)
    assert "&lt;b&gt;" in body
    assert '<option value="2">&lt;c&gt;</option>' in body
    assert sorted(path.name for path in written.parent.iterdir()) == ["report.html", "slices.png"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_draws_the_page(written, tmp_path):
    """It loads without errors, plots and surfaces are drawn, and the picker shows another case."""
    # The browser's clock jumps to the next timer, but drawing takes real time: the ticks give it some.
    probe = """<script>
      const ticks = setInterval(() => { for (let i = 0, sum = 0; i < 3e6; i++) sum += i; }, 20);
      async function painted(scene) {  // share of pixels that are neither white nor grey
        const image = new Image();
        image.src = await Plotly.toImage(scene, { format: "png", width: 200, height: 200 });
        await image.decode();
        const canvas = new OffscreenCanvas(200, 200).getContext("2d");
        canvas.drawImage(image, 0, 0);
        const data = canvas.getImageData(0, 0, 200, 200).data;
        let count = 0;
        for (let i = 0; i < data.length; i += 4)
          count += Math.max(data[i], data[i + 1], data[i + 2]) - Math.min(data[i], data[i + 1], data[i + 2]) > 40;
        return count / 40000;
      }
      async function look() {
        const row = document.getElementById("surfaces");
        const found = { points: document.querySelectorAll("#dice .point").length };
        found.curves = document.querySelectorAll("#training .lines").length;
        found.before = await painted(row.children[0]);
        const old = row.children[0];
        picker.value = "2";
        picker.dispatchEvent(new Event("change"));
        found.changed = old !== row.children[0];
        found.scenes = [];
        for (const scene of row.children) found.scenes.push(await painted(scene));
        found.slices = document.querySelector("#slices img").naturalWidth;
        found.errors = errors;
        clearInterval(ticks);
        document.body.innerHTML = "<pre>" + JSON.stringify(found) + "</pre>";
      }
      addEventListener("load", look);
    </script>"""
    text = written.read_text(encoding="utf-8")
    text = text.replace("<script>", "<script>const errors = []; onerror = e => errors.push(e);</script><script>", 1)
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("</body>", probe + "</body>"), encoding="utf-8")
    result = subprocess.run(
        [
            str(BROWSER), "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--use-angle=swiftshader",
            "--enable-unsafe-swiftshader", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=60000",
            "--dump-dom", probed.as_uri(),
        ],
        capture_output=True, encoding="utf-8", check=True, timeout=120,
    )  # fmt: skip
    match = re.search(r"<pre>(\{.*?\})</pre>", result.stdout, re.DOTALL)
    assert match, result.stdout[-2000:] + result.stderr[-2000:]
    found = json.loads(match[1])
    assert found["errors"] == []
    assert found["points"] == 10  # 2 levels of 3 arteries and 2 livers
    assert found["curves"] == 2
    assert found["before"] > 0.05
    assert found["changed"]
    assert len(found["scenes"]) == 3
    assert min(found["scenes"]) > 0.05
    assert found["slices"] > 100
