"""MetaImage and NRRD files that are valid and seldom, written by hand as the formats say, and those that reach out."""

import bz2
import gzip

import numpy as np
import pytest

from autocontext_jax.errors import UserError
from autocontext_jax.images import scans

VOXELS = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7), np.int16)
RAW = VOXELS.tobytes()
SLICES = "".join(f"s{k:02}.raw\n" for k in range(5))
DIRECTIONS = "(0.7,0,0) (0,0.8,0) (0,0,2.5)"


def nrrd(*, extra="", data=RAW, **changed):
    fields = {
        "type": "short", "dimension": "3", "space": "left-posterior-superior", "sizes": "7 6 5",
        "space directions": DIRECTIONS, "kinds": "domain domain domain", "endian": "little", "encoding": "raw",
        "space origin": "(1,2,3)",
    } | {name.replace("_", " "): value for name, value in changed.items()}  # fmt: skip
    lines = "".join(f"{name}: {value}\n" for name, value in fields.items())
    return f"NRRD0004\n{lines}{extra}\n".encode() + data


def metaimage(place="LOCAL", *, data=RAW, axes=3, extra="", field="ElementDataFile = "):
    more = axes - 3
    matrix = " ".join(str(int(i == j)) for i in range(axes) for j in range(axes))
    return (
        f"ObjectType = Image\nNDims = {axes}\nBinaryData = True\nBinaryDataByteOrderMSB = False\n{extra}"
        f"TransformMatrix = {matrix}\nOffset = 1 2 3{' 0' * more}\nElementSpacing = 0.7 0.8 2.5{' 1' * more}\n"
        f"DimSize = 7 6 5{' 1' * more}\nElementType = MET_SHORT\n{field}{place}\n"
    ).encode() + data


def detached(place, **changed):
    return nrrd(data=b"", extra=f"data file: {place}\n", **changed)


@pytest.fixture
def folder(tmp_path):
    """With voxels in files of their own."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("v.raw", "in/v.raw", "in/sub/v.raw", "in/a b.raw", "in/é.raw"):
        (tmp_path / name).write_bytes(RAW)
    for k in range(5):
        (tmp_path / "in" / f"s{k:02}.raw").write_bytes(VOXELS[k].tobytes())
    return tmp_path / "in"


AXIS = {"dimension": "4", "sizes": "7 6 5 1", "space_directions": f"{DIRECTIONS} none"}
FIRST = {"dimension": "4", "sizes": "1 7 6 5", "space_directions": f"none {DIRECTIONS}"}
VALID = {
    "plain.nrrd": nrrd(),
    "capital letters.nrrd": nrrd().replace(b"type", b"Type").replace(b"sizes", b"Sizes").replace(b"enc", b"Enc"),
    "ENDING.NRRD": nrrd(),
    "value of 10,000.seg.nrrd": nrrd(extra=f"Segment0_Tags:={'Segmentation category~SCT^85756007|' * 300}\n"),
    "value of a million.nrrd": nrrd(extra=f"key:={'x' * 10**6}\n"),
    "key of 10,000.nrrd": nrrd(extra=f"{'k' * 10_000}:=v\n"),
    "comment of 10,000.nrrd": nrrd(extra=f"# {'x' * 10_000}\n"),
    "5000 keys.nrrd": nrrd(extra="".join(f"Segment{k}_ID:=Segment_{k}\n" for k in range(5000))),
    "an axis of 1, list.nrrd": nrrd(**AXIS, kinds="domain domain domain list"),
    "an axis of 1, first.nrrd": nrrd(**FIRST, kinds="list domain domain domain"),
    "an axis of 1, vector.nrrd": nrrd(**FIRST, kinds="vector domain domain domain"),
    "gzip.nrrd": nrrd(encoding="gzip", data=gzip.compress(RAW)),
    "text.nrrd": nrrd(encoding="ascii", data=" ".join(map(str, VOXELS.ravel())).encode()),
    "hex.nrrd": nrrd(encoding="hex", data=RAW.hex().encode()),
    "lines of Windows.nrrd": nrrd(data=b"").replace(b"\n", b"\r\n") + RAW,
    "big end.nrrd": nrrd(endian="big", data=VOXELS.astype(">i2").tobytes()),
    "detached.nrrd": detached("v.raw"),
    "detached below.nrrd": detached("sub/v.raw"),
    "detached, space.nrrd": detached("a b.raw"),
    "detached, accent.nrrd": detached("é.raw"),
    "detached, capitals.nrrd": detached("./v.raw").replace(b"data file", b"Data File"),
    "detached, a list.nrrd": nrrd(data=SLICES.encode(), extra="data file: LIST\n")[::1].replace(b"LIST\n\n", b"LIST\n"),
    "detached, a pattern.nrrd": detached("s%02d.raw 0 4 1"),
    "plain.mha": metaimage(),
    "ENDING.MHA": metaimage(),
    "an axis of 1.mha": metaimage(axes=4),
    "two axes of 1.mha": metaimage(axes=5),
    "comment of 400.mha": metaimage(extra=f"Comment = {'x' * 400}\n"),
    "own field of 10,000.mha": metaimage(extra=f"Segmentation = {'x' * 10_000}\n"),
    "detached.mhd": metaimage("v.raw", data=b""),
    "ENDING.MHD": metaimage("v.raw", data=b""),
    "detached below.mhd": metaimage("sub/v.raw", data=b""),
    "detached, space.mhd": metaimage("a b.raw", data=b""),
    "detached, accent.mhd": metaimage("é.raw", data=b""),
    "detached, a list.mhd": metaimage("LIST", data=SLICES.encode()),
    "detached, a pattern.mhd": metaimage("s%02d.raw 0 4 1", data=b""),
}


@pytest.mark.parametrize("name", VALID)
def test_valid_files_are_read(folder, name):
    (folder / name).write_bytes(VALID[name])
    scan = scans.read_scan(folder / name)
    np.testing.assert_array_equal(scan.voxels[0], VOXELS)
    np.testing.assert_allclose(scan.spacing, (2.5, 0.8, 0.7))
    np.testing.assert_allclose(scan.origin, (3.0, 2.0, 1.0))
    assert scans.read_grid(folder / name) == scan.grid


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.nrrd", nrrd().replace(f"space directions: {DIRECTIONS}\n".encode(), b"")),
        ("a.mha", metaimage().replace(b"ElementSpacing = 0.7 0.8 2.5\n", b"")),
    ],
)
def test_a_spacing_that_is_not_said_is_named(folder, caplog, name, content):
    (folder / name).write_bytes(content.replace(b"space origin: (1,2,3)\n", b""))
    assert scans.read_scan(folder / name).spacing == (1.0, 1.0, 1.0)
    assert "does not say the size of its voxels" in caplog.text


def test_a_space_that_is_not_a_patients_is_named(folder, caplog):
    (folder / "a.nrrd").write_bytes(nrrd(space="scanner-xyz"))
    scans.read_scan(folder / "a.nrrd")
    assert "does not say how its patient lies (space 'scanner-xyz')" in caplog.text


def test_a_complete_header_gives_no_warning(folder, caplog):
    for name, content in (("a.nrrd", nrrd(extra='space units: "mm" "mm" "mm"\n')), ("a.mha", metaimage())):
        (folder / name).write_bytes(content)
        scans.read_scan(folder / name)
    assert caplog.messages == []


OUTSIDE = "expected a file in its own folder; move the file there and correct the header"
REFUSED = {
    "climbs.mhd": (metaimage("../v.raw", data=b""), OUTSIDE),
    "climbs, a pattern.mhd": (metaimage("../s%02d.raw 0 4 1", data=b""), OUTSIDE),
    "climbs, a list.mhd": (metaimage("LIST", data=b"../v.raw\n"), OUTSIDE),
    "climbs below.mhd": (metaimage("sub/../../v.raw", data=b""), OUTSIDE),
    "absolute.mhd": (metaimage("/dev/zero", data=b""), OUTSIDE),
    "absolute, a colon.mhd": (metaimage("/dev/zero", data=b"", field="ElementDataFile: "), OUTSIDE),
    "absolute, spaces.mhd": (metaimage("/dev/zero", data=b"", field="  ElementDataFile   =  "), OUTSIDE),
    "absolute, carriage return.mhd": (metaimage("/dev/zero", data=b"", field="A = 1\rElementDataFile = "), OUTSIDE),
    "absolute.mha": (metaimage("/dev/zero", data=b""), OUTSIDE),
    "not there.mhd": (metaimage("w.raw", data=b""), "'w.raw', which does not exist: copy that file too"),
    "climbs.nrrd": (detached("../v.raw"), OUTSIDE),
    "climbs, capitals.nrrd": (detached("../v.raw").replace(b"data file", b"DATA FILE"), OUTSIDE),
    "climbs, one word.nrrd": (detached("../v.raw").replace(b"data file", b"datafile"), OUTSIDE),
    "climbs, a pattern.nrrd": (detached("../s%02d.raw 0 4 1"), OUTSIDE),
    "climbs, a list.nrrd": (nrrd(data=b"", extra="data file: LIST\n../v.raw\n"), OUTSIDE),
    "absolute.nrrd": (detached("/dev/zero"), OUTSIDE),
    "micrometres.nrrd": (nrrd(extra='space units: "um" "um" "um"\n'), "lengths in um: expected mm"),
    "centimetres.mha": (metaimage(extra="DistanceUnits = cm\n"), "lengths in cm: expected mm"),
    "not there.nrrd": (detached("w.raw"), "'w.raw', which does not exist: copy that file too"),
    "a comment of 600.mha": (metaimage(extra=f"Comment = {'x' * 600}\n"), "a line of 610 bytes"),
    "packed.nrrd": (nrrd(encoding="bzip2", data=bz2.compress(RAW)), "packed with bzip2, which ITK does not read"),
    "several values.nrrd": (nrrd(dimension="4", sizes="2 7 6 5", space_directions=f"none {DIRECTIONS}",
                                 kinds="vector domain domain domain", data=RAW * 2), r"2 value\(s\) a voxel"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(folder, name):
    content, message = REFUSED[name]
    (folder / name).write_bytes(content)
    for read in (scans.read_scan, scans.read_grid):
        if read is scans.read_grid and name == "packed.nrrd":
            continue  # its header is as good as any
        with pytest.raises(UserError, match=message) as caught:
            read(folder / name)
        assert name in str(caught.value)
