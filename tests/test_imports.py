"""The order of the package's files: who may import whom."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent / "autocontext_jax"

# A file imports only files of groups above its own, or of its own group if that is a folder ("*").
ORDER = [
    "errors", "sections", "files", "processes", "runtime", "geometry",
    "images/formats", "images/voxel_files", "images/stack", "images/grid", "images/spec", "images/checks",
    "images/intensity", "images/in_memory", "images/nifti", "images/itk",
    "images/dicom_planes", "images/dicom_voxels", "images/dicom_order", "images/dicom", "images/reader_process",
    "images/finding", "images/scans",
    "data/labels", "data/layouts", "data/datasets", "data/combination", "data/label_maps", "data/phantom/*",
    "data/resampling", "data/histograms", "data/store/*", "data/folds", "data/split", "data/workers",
    "data/class_sizes", "data/survey", "data/survey_table", "data/fingerprint", "data/body", "data/preparation",
    "data/sampling",
    "data/augmentation_ranges", "data/augment", "data/loader",
    "models/xla_ffi", "models/onednn_library", "models/onednn_operations", "models/onednn", "models/normalization",
    "models/convolution", "models/resizing", "models/fixed_normalization",
    "models/blocks", "models/unet", "models/residual_unet", "models/fcn", "models/backbones", "models/activations",
    "models/pyramid", "models/ensemble",
    "training/*",
    "inference/tiling", "inference/boxes", "inference/masks", "inference/context",
    "inference/tile_memory", "inference/scan_tiles", "inference/tile_programs", "inference/predictor",
    "inference/description", "inference/model_file", "inference/model_card", "inference/model", "inference/ensemble",
    "evaluation/*",
    "planning/*",
    "jobs/*",
    "api",
    "main",
]  # fmt: skip

FILES = sorted(path.relative_to(HOUSE).with_suffix("").as_posix() for path in HOUSE.rglob("*.py"))
MODULES = [name for name in FILES if not name.endswith("__init__")]


def group(name: str) -> str:
    folder = name.rpartition("/")[0] + "/*"
    return folder if folder in ORDER else name


def imported(name: str, *, at_once: bool = False) -> list[str]:
    """Dotted names of everything that a file imports, wherever in the file; `from a import b` gives a.b.

    With `at_once` only what is imported as soon as the file itself is.
    """
    found = []
    tree = ast.parse((HOUSE / f"{name}.py").read_text(encoding="utf-8"))
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def inside(name: str, *, at_once: bool = False) -> set[str]:
    """The house's files that a file imports."""
    files = set()
    for dotted in imported(name, at_once=at_once):
        package, *parts = dotted.split(".")
        if package == HOUSE.name:
            # The last part is a name inside a module or the module itself.
            candidates = ["/".join(parts), "/".join(parts[:-1])]
            files.add(next(file for file in candidates if file in FILES))
    return files


def outside(name: str) -> set[str]:
    return {dotted.split(".")[0] for dotted in imported(name)} - {HOUSE.name}


def test_every_file_has_its_place():
    assert [name for name in MODULES if group(name) not in ORDER] == []
    assert [place for place in ORDER if place not in {group(name) for name in MODULES}] == []


@pytest.mark.parametrize("name", MODULES)
def test_files_import_only_what_stands_above(name):
    own = ORDER.index(group(name))
    below = [
        other
        for other in inside(name)
        if ORDER.index(group(other)) > own or (group(other) == group(name) and not group(name).endswith("*"))
    ]
    assert below == []


def test_no_file_imports_itself_in_a_circle():
    graphlib.TopologicalSorter({name: inside(name) for name in MODULES}).prepare()


def test_packages_import_nothing():
    """But what the package exports, when it is used: worker processes import the package too."""
    assert [name for name in FILES if name.endswith("/__init__") and imported(name)] == []
    assert inside("__init__", at_once=True) == set()


@pytest.mark.parametrize(
    ("library", "places"),
    [
        ("SimpleITK", {"runtime", "images/itk", "images/scans", "images/in_memory"}),
        ("ml_collections", {"jobs/*", "api", "main"}),
        ("absl", {"runtime", "main"}),
    ],
)
def test_a_library_stays_in_its_place(library, places):
    users = {group(name) for name in MODULES if library in outside(name)}
    assert users
    assert users <= places


@pytest.mark.parametrize(
    "name", ["geometry", "data/preparation", "data/survey", "data/store/reader", "inference/tiling"]
)
def test_what_needs_no_device_is_free_of_jax(name):
    """The store's worker processes would otherwise start a backend each."""
    seen, waiting = set(), {name}
    while waiting:
        here = waiting.pop()
        seen.add(here)
        waiting |= inside(here, at_once=True) - seen
    libraries = {file: {dotted.split(".")[0] for dotted in imported(file, at_once=True)} for file in seen}
    assert {file for file in seen if libraries[file] & {"jax", "flax", "optax", "grain"}} == set()


def test_the_tests_that_docs_name_exist():
    root = HOUSE.parent
    tests = "".join(path.read_text(encoding="utf-8") for path in (root / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", (root / "docs/reading.md").read_text(encoding="utf-8")))
    assert len(named) > 80
    assert [name for name in sorted(named) if f"def {name}(" not in tests] == []
