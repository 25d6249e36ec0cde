"""No broken file crashes, hangs or exhausts a reader: inputs that once did, and some hundreds more a reader."""

import functools
import json
import struct

import fuzz
import pytest
from fuzz_process import Worker
from fuzz_readers import READERS, write_scans

from autocontext_jax.errors import UserError
from autocontext_jax.images import scans

INFINITE = struct.pack("<f", float("inf"))
TINY = struct.pack("<f", 1e-30)
DEEP = b"[" * 100_000


def swap(old: bytes, new: bytes):
    """Replaces what must be there."""

    def change(content: bytes) -> bytes:
        assert old in content
        return content.replace(old, new, 1)

    return change


def put(place: int, *parts: bytes):
    """Overwrites from a place on."""
    new = b"".join(parts)
    return lambda content: content[:place] + new + content[place + len(new) :]


def both(first, second):
    return lambda content: second(first(content))


def whole(new: bytes):
    return lambda _: new


def node(*path, value):
    """Sets a node of a JSON tree."""

    def change(content: bytes) -> bytes:
        tree = json.loads(content)
        functools.reduce(lambda inner, key: inner[key], path[:-1], tree)[path[-1]] = value
        return json.dumps(tree).encode()

    return change


OURS = ("attributes", "autocontext_jax")
ARRAY = "a.ome.zarr/level_2/zarr.json"
# Reader -> what it was -> the file and its change. Each once crashed, hung, took all memory or left a traceback.
ONCE_FAILED = {
    "scan .nii": {
        "ITK did not come back: no finite quaternion": ("image.nii", put(256, INFINITE)),
        "ITK did not come back: no finite matrix": ("image.nii", put(280, INFINITE)),
        "ITK did not come back: a flat matrix": ("image.nii", put(280, TINY * 12)),
        "read(-1): voxels before the file": ("image.nii", both(put(108, INFINITE), put(344, b"ni1"))),
        "ITK did not come back: a header of no known size": ("image.nii", put(0, b"\x08")),
        "ten terabytes": ("image.nii", put(42, struct.pack("<hhh", 17_500, 17_500, 17_500))),
    },
    "scan .mha": {
        "segmentation fault: -2^31 axes": ("image.mha", swap(b"NDims = 3", b"NDims = -2147483648")),
        "segmentation fault: 2^31 axes": ("image.mha", swap(b"NDims = 3", b"NDims = 21474483648")),
        "segmentation fault: no number of axes": ("image.mha", swap(b"NDims = 3\n", b"")),
        "memory: 10^300 packed bytes": ("image.mha", swap(b"CompressedDataSize = ", b"CompressedDataSize = 1e300")),
        "memory: -2^31 packed bytes": (
            "image.mha",
            swap(b"CompressedDataSize = ", b"CompressedDataSize = -2147483648"),
        ),
        "memory: 2^32 planes": ("image.mha", swap(b"DimSize = 4 5 6", b"DimSize = 4 5 4294967295")),
        "ten terabytes": ("image.mha", swap(b"DimSize = 4 5 6", b"DimSize = 17500 17500 17500")),
    },
    "scan .mha, plain": {
        "FileNotFoundError: a pattern in a folder that is not there": (
            "image.mha",
            swap(b"ElementDataFile = LOCAL", b"ElementDataFile = a/%d.raw 1 3 1"),
        ),
    },
    "DICOM, one file, RLE": {
        "BytesLengthException: colours of another kind": ("0.dcm", swap(b"\x28\0\x04\0CS", b"\x28\0\x04\0FD")),
    },
    "DICOM, one file, implicit VR": {
        "OverflowError: frames without end": (
            "0.dcm",
            swap(b"\x28\0\x08\0\2\0\0\x003 ", b"\x28\0\x08\0\6\0\0\x001e1000"),
        ),
    },
    "scan .mhd": {
        "segmentation fault: axes": ("image.mhd", swap(b"NDims = 3", b"NDims = -32768")),
        "a header that is its own voxels": ("image.mhd", swap(b"image.raw", b"/dev/zero")),
    },
    "scan .nrrd": {
        "segmentation fault: a word of 300": ("float.nrrd", swap(b"kinds: domain", b"kinds: " + b"a" * 300)),
        "segmentation fault: a space of 5000": ("image.nrrd", swap(b"space: left", b"space: " + b"9" * 5000)),
        "segmentation fault: a vector of 300": ("image.nrrd", swap(b",0,0)", b",0,0" + b"a" * 300)),
        "segmentation fault, some files later: no field": (
            "label.nrrd",
            swap(b"sizes: 4 5 6", b"sizem.org/" + b"a" * 5000),
        ),
        "segmentation fault: a hundred vectors": (
            "label.nrrd",
            swap(b",0,0) ", b",0,0) " + b"(0,0.8,0) (0,0,2.ons: (0.7,0,0) " * 100),
        ),
        "memory: 2^32 columns": ("label.nrrd", swap(b"sizes: 4 5 6", b"sizes: 4294967295 5 6")),
        "ten terabytes": ("image.nrrd", swap(b"sizes: 4 5 6", b"sizes: 17500 17500 17500")),
    },
    "scan .nii, NIfTI-2": {
        "KeyError: a datatype that nibabel does not have": ("image.nii", put(12, struct.pack("<h", 7))),
    },
    "DICOM, plain": {
        "BytesLengthException: an identifier of another kind": ("0.dcm", swap(b"\x20\0\x0e\0UI", b"\x20\0\x0e\0FL")),
        "BytesLengthException: a modality that is a sequence": ("2.dcm", swap(b"\x08\0\x60\0CS", b"\x08\0\x60\0SQ")),
        "TypeError: columns that are two numbers": (
            "2.dcm",
            swap(b"\x28\0\x11\0US\2\0\x0a\0", b"\x28\0\x11\0US\4\0\x0a\0\x0a\0"),
        ),
        "TypeError: rows that are two numbers": (
            "0.dcm",
            swap(b"\x28\0\x10\0US\2\0\x0c\0", b"\x28\0\x10\0US\4\0\x0c\0\x0c\0"),
        ),
        "ValueError: a position of two numbers": ("1.dcm", swap(b"0.0\\0.0\\2.5", b"0.0\\0.0 2.5")),
        "ValueError: a position that is no number": ("1.dcm", swap(b"0.0\\0.0\\2.5", b"0.0\\0.0\\2.\xff")),
        "memory: an element of 457 MiB": ("0.dcm", swap(b"OB\0\0\2\0\0\0", b"OB\0\0\2\0\x90\x1c")),
    },
    "dataset.json nnU-Net": {
        "RecursionError: deep": ("dataset.json", whole(DEEP)),
        "ValueError: 5000 digits": ("dataset.json", swap(b'"background": 0', b'"background": ' + b"9" * 5000)),
        "ValueError: 5000 digits in a text": ("dataset.json", node("labels", "background", value="9" * 5000)),
        "two lines: a label's name": ("dataset.json", node("labels", value={"a\nb": 0, "c": 1})),
        "not UTF-8": ("dataset.json", whole(b"\xff\xfe{}")),
    },
    "dataset.json nnU-Net, files named": {
        "OSError: a name of 5000 letters": ("dataset.json", node("dataset", "a", "label", value="a" * 5000)),
        "a name with a zero byte": ("dataset.json", node("dataset", "a", "label", value="/a\0b")),
        "a name with half a character": ("dataset.json", node("dataset", "a", "images", 0, value="/\ud800")),
        "two lines: a case's name": ("dataset.json", node("dataset", value={"a\nb": 3})),
    },
    "dataset.json MSD": {
        "OSError: a name of 5000 letters": ("dataset.json", node("training", 0, "image", value="a" * 5000)),
        "a name with a zero byte": ("dataset.json", node("training", 0, "image", value="a\0b")),
        "a name with half a character": ("dataset.json", node("training", 0, "image", value="\ud800")),
    },
    "splits_final.json": {
        "RecursionError: deep": ("splits_final.json", whole(DEEP)),
        "two lines: a case's name": ("splits_final.json", node(0, "train", 0, value="a\u2028b")),
    },
    "store": {
        "TypeError: no attributes": ("a.ome.zarr/zarr.json", whole(b"[]")),
        "TypeError: attributes of another kind": ("a.ome.zarr/zarr.json", node(*OURS, value=3)),
        "RecursionError: deep": ("a.ome.zarr/zarr.json", whole(DEEP)),
        "TypeError: a factor for three": ("a.ome.zarr/zarr.json", node(*OURS, "factors", 0, value=2.0)),
        "UFuncTypeError: a size that is a text": ("a.ome.zarr/zarr.json", node(*OURS, "shapes", 0, 1, value="5")),
        "ValueError: a size of lists": ("a.ome.zarr/zarr.json", node(*OURS, "shapes", 0, 1, value=[1])),
        "ValueError: a spacing of two": ("a.ome.zarr/zarr.json", node(*OURS, "native", "spacing", value=[1, 1])),
        "KeyError: no format": ("a.ome.zarr/zarr.json", node(*OURS, value={"hash": ""})),
        "segmentation fault: an array's description, deep": (ARRAY, whole(DEEP)),
        "ten terabytes": (ARRAY, node("shape", value=[1, *[17_500] * 3])),
        "memory: a piece of 2^40 voxels": (
            ARRAY,
            node("codecs", 0, "configuration", "chunk_shape", value=[1, 2**20, 2**20, 1]),
        ),
    },
    "config.json": {
        "TypeError: a list": ("config.json", whole(b"[]")),
        "KeyError: without data": ("config.json", whole(b"{}")),
        "TypeError: data of another kind": ("config.json", node("data", value=0.5)),
        "RecursionError: deep": ("config.json", whole(DEEP)),
        "RecursionError: deep where a number was": (
            "config.json",
            swap(b'"seed": 0', b'"seed": ' + b"[" * 900 + b"]" * 900),
        ),
    },
    "overrides": {
        "a window of one number": ("000.flags", whole(b"--config.data.window=(1,)")),
        "a window of three": ("000.flags", whole(b"--config.data.window=(1, 2, 3)")),
        "a level's factor that is a text": ("000.flags", whole(b"--config.levels.factors=('a', 2)")),
        "ValueError: a number too long to be written": ("000.flags", whole(b"--config.model.depth=" + b"9" * 4000)),
        "ZeroDivisionError: a depth far below 0": ("000.flags", whole(b"--config.model.depth=-2000000000")),
        "endless: a patch of 2^31 voxels": (
            "000.flags",
            whole(b"--config.loader.patch_size=2147483640\n--config.mesh.space=0"),
        ),
        "MemoryError: 200 brackets": (
            "000.flags",
            whole(b"--config.experiment=(" + b"(" * 200 + b"1" + b")" * 200 + b",)"),
        ),
        "two lines: a zero byte in a value": ("000.flags", whole(b"--config.model.momentum=0.9\0")),
    },
}


@pytest.mark.parametrize("name", ONCE_FAILED)
def test_what_once_failed_is_refused(tmp_path, name):
    reader = READERS[name]
    reader.write(tmp_path)
    inputs = {
        what: {path: change((tmp_path / path).read_bytes())} for what, (path, change) in ONCE_FAILED[name].items()
    }
    worker = Worker(name, tmp_path)
    outcomes = {}
    for what, changed in inputs.items():
        outcomes[what] = worker.outcome(changed)
        assert outcomes[what].kind == "refused", (what, outcomes[what].text)
    assert worker.outcome({}).kind == "read"  # what was written is good
    worker.close()
    for what, outcome in outcomes.items():
        assert what != "ten terabytes" or "17500" in outcome.text


@pytest.mark.parametrize("name", READERS)
def test_a_short_campaign(tmp_path, name):
    row, failures = fuzz.fuzz(
        name, 3 if name == "checkpoint" else 30 if name.startswith("DICOM") else 80, seed=7, folder=tmp_path
    )
    assert not failures
    assert row["failed"] == 0
    assert row["read"] + row["refused with one line"] == row["inputs"]
    assert name == "checkpoint" or (row["refused with one line"] and row["kept for new coverage"])


def test_the_same_seed_makes_the_same_inputs(tmp_path):
    rows = []
    for number in range(2):
        row, _ = fuzz.fuzz("splits_final.json", 200, seed=3, folder=tmp_path / str(number))
        rows.append([row[key] for key in ("read", "refused with one line", "kept for new coverage")])
    assert rows[0] == rows[1]


def test_seeds_are_added_up():
    first = {"reader": "store", "inputs": 1, "read": 1, "refused with one line": 0, "of these crashed": 0,
             "out of time": 0, "out of memory": 0, "failed": 0, "kept for new coverage": 1, "slowest ms": 5.0,
             "ms each": 5.0}  # fmt: skip
    second = first | {"inputs": 3, "read": 0, "refused with one line": 3, "of these crashed": 2, "slowest ms": 2.0,
                      "ms each": 1.0}  # fmt: skip
    assert fuzz.total([first, second], "all") == {
        "reader": "all", "inputs": 4, "read": 1, "refused with one line": 3, "of these crashed": 2, "out of time": 0,
        "out of memory": 0, "failed": 0, "kept for new coverage": 2, "slowest ms": 5.0, "ms each": 2.0,
    }  # fmt: skip


def test_the_most_voxels_can_be_raised(tmp_path, monkeypatch):
    write_scans(tmp_path, ".nii")
    path = tmp_path / "image.nii"
    assert scans.read_scan(path).voxels[0].size == 120
    monkeypatch.setenv("AUTOCONTEXT_MAX_VOXELS", "119")
    with pytest.raises(UserError, match=r"image\.nii promises 4 × 5 × 6 = 120 voxels: expected at most 119; .*set"):
        scans.read_grid(path)
    monkeypatch.setenv("AUTOCONTEXT_MAX_VOXELS", "120")
    assert scans.read_scan(path).voxels[0].size == 120
    monkeypatch.setenv("AUTOCONTEXT_MAX_VOXELS", "1e9")
    with pytest.raises(UserError, match=r"AUTOCONTEXT_MAX_VOXELS is '1e9': expected a number of voxels"):
        scans.read_scan(path)


def test_a_message_is_one_line():
    assert str(UserError("a\nb\u2028\0 é")) == "a\\nb\\u2028\\x00 é"
