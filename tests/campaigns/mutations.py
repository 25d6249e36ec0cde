"""Changed copies of files: bits and slices, numbers in NIfTI headers, lines of text headers, DICOM elements, JSON."""

import contextlib
import gzip
import json
import random
import re
import struct
import zlib
from typing import Any

import numpy as np
from fuzz_dicom import elements

LARGEST = 2**20  # bytes of a changed copy

INTEGERS = (
    0, 1, 2, 3, 7, 8, 16, 127, 128, 255, 256, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1,
    2**64, 10**13, -1, -2, -128, -32768, -(2**31), -(2**63), 10**400,
)  # fmt: skip
FLOATS = (0.0, -0.0, 0.5, 1e-300, 1e-38, 1e10, 1e38, 1e300, 1e308, float("inf"), float("-inf"), float("nan"), -1.5)
TEXTS = (
    "", " ", "\0", "\n", "a\nb", "\u2028", "\ud800", "é", "..", "../a", "/", "/dev/zero", "LOCAL", "LIST", "a" * 300,
    "a" * 5000, "%s%n", "9" * 5000, "1e999", "nan", "-1", "None", "True", "()", "(1,)", "[[", "{}", "0 0 0", "1 1",
    ".nii.gz", "background", "ignore", "gzip", "raw", "bzip2", "ascii", "hex", "double", "block", "blosc", "zstd",
    "float64", "uint8", "bool", "complex128", "file:///dev/zero", "(" * 200 + ")" * 200, "1" + "**9" * 9,
    "99999999999999 1 1", "30000 30000 30000", "(1, 'a')", "('a', 2)", "{'a': 1}", "1e400", "-0",
)  # fmt: skip
NODES: tuple[Any, ...] = (
    *INTEGERS, *FLOATS, *TEXTS, None, True, False, [], {}, [[]], [0], [""], {"": 0}, [1, 2, 3], [1e13] * 3,
    [2**40] * 3, [-1, 4, 4], ["a"] * 3, {"train": [], "val": []}, {"image": 1}, {"name": "gzip"},
)  # fmt: skip
# Fields of a NIfTI-1 header: place and kind.
NIFTI = [
    (0, "i"), (39, "B"), *((40 + 2 * k, "h") for k in range(8)), (68, "h"), (70, "h"), (72, "h"), (74, "h"),
    *((76 + 4 * k, "f") for k in range(8)), (108, "f"), (112, "f"), (116, "f"), (123, "B"), (252, "h"), (254, "h"),
    *((256 + 4 * k, "f") for k in range(6)), *((280 + 4 * k, "f") for k in range(12)), (344, "i"), (348, "B"),
]  # fmt: skip
NIFTI_2 = [
    (0, "i"), (4, "i"), (12, "h"), (14, "h"), *((16 + 8 * k, "q") for k in range(8)),
    *((104 + 8 * k, "d") for k in range(8)), (168, "q"), (176, "d"), (184, "d"), (344, "i"), (348, "i"),
    *((352 + 8 * k, "d") for k in range(6)), *((400 + 8 * k, "d") for k in range(12)), (500, "i"), (540, "B"),
]  # fmt: skip
VRS = (b"DS", b"IS", b"US", b"SS", b"UL", b"OB", b"OW", b"SQ", b"UN", b"LO", b"UI", b"AT", b"FD", b"FL", b"UT", b"??")
# Values of DICOM elements: numbers that are none or too many, and what compression and colours are called.
VALUES = (
    *TEXTS, "1\\0\\0", "0\\0\\0\\0\\0\\0", "1\\0\\0\\0\\1\\0", "nan\\0\\0", "1e400\\0\\1", "0.0000001\\1", "-1\\-1",
    "0\\0", "1e-30\\1e-30", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2",
    "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5", "MONOCHROME1", "RGB", "YBR_FULL_422", "PALETTE COLOR", "LOCALIZER",
    "RTSTRUCT", "SEG", "2", "3", "1000000000", "ISO 2022 IR 87", "ISO_IR 192",
)  # fmt: skip


def mutate(rng: random.Random, path: str, content: bytes, other: bytes) -> bytes:
    """A changed copy of a file.

    Args:
      rng: of all choices.
      path: its suffix says what its parts are.
      content: of the file.
      other: of another input's file, to splice with.
    """
    if content[:2] == b"\x1f\x8b" and rng.random() < 0.7:
        with contextlib.suppress(OSError, EOFError, zlib.error):
            inner = mutate(rng, path.removesuffix(".gz"), gzip.decompress(content), b"")
            return gzip.compress(inner, 1, mtime=0)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if rng.random() < 0.3:
            content = _bytes(rng, content, other)
        elif path.endswith(".nii"):
            place, kind = rng.choice(NIFTI_2 if content[:2] in (b"\x1c\2", b"\0\0") else NIFTI)
            content = _put(rng, content, place, kind)
        elif path.endswith((".mha", ".mhd", ".nrrd", ".flags")):
            content = _lines(rng, content)
        elif path.endswith(".dcm"):
            content = _element(rng, content, other)
        elif content[:1] in (b"{", b"["):
            content = _tree(rng, content)
        else:
            content = _bytes(rng, content, other)
    return content[:LARGEST]


def _bytes(rng: random.Random, content: bytes, other: bytes) -> bytes:
    place = rng.randrange(len(content) + 1)
    length = min(rng.choice((1, 2, 4, 8, 16, 64, 1024)), len(content) - place)
    before, cut, after = content[:place], content[place : place + length], content[place + length :]
    kind = rng.randrange(8)
    if kind == 0 and cut:
        return before + bytes([cut[0] ^ (1 << rng.randrange(8))]) + cut[1:] + after
    if kind == 1:
        return before  # cut short
    if kind == 2:
        return before + after
    if kind == 3:
        return before + cut * rng.choice((2, 3, 50)) + after
    if kind == 4:
        return before + rng.randbytes(length) + after
    if kind == 5:
        return before + other[rng.randrange(len(other) + 1) :]
    if kind == 6:
        return before + rng.choice(TEXTS).encode("utf-8", "surrogatepass") + after
    return _put(rng, content, place, rng.choice("BhifqdQ"))


def _put(rng: random.Random, content: bytes, place: int, kind: str) -> bytes:
    """Writes an extreme number, of one of struct's kinds, over what is there."""
    size = struct.calcsize(kind)
    if kind in "fd":
        with np.errstate(over="ignore"):
            packed = np.array(rng.choice(FLOATS)).astype(f"<{kind}").tobytes()
    else:
        packed = (rng.choice(INTEGERS) % 256**size).to_bytes(size, rng.choice(("little", "little", "big")))
    return content[:place] + packed + content[place + size :]


def _lines(rng: random.Random, content: bytes) -> bytes:
    """Changes a line of a text header or of an argument list, or a word of its value."""
    head, end, tail = content, b"", b""
    for mark in (b"ElementDataFile = LOCAL\n", b"\n\n"):
        if mark in content:
            head, end, tail = content.partition(mark)
            break
    lines = (head + end).split(b"\n")
    number = rng.randrange(len(lines))
    kind = rng.randrange(6)
    if kind == 0:
        del lines[number]
    elif kind == 1:
        lines.insert(rng.randrange(len(lines) + 1), lines[number])
    elif kind == 2:
        other = rng.randrange(len(lines))
        lines[number], lines[other] = lines[other], lines[number]
    else:
        key, mark, value = re.fullmatch(rb"([^=:]*)([=:]*\s?)(.*)", lines[number], re.DOTALL).groups()  # type: ignore[union-attr]
        nasty = str(rng.choice((rng.choice(TEXTS), rng.choice(FLOATS), rng.choice(INTEGERS[:-1]))))
        words = re.split(rb"(\s+|,\s*)", value) if kind > 3 else [value]
        words[rng.randrange(len(words))] = nasty.encode("utf-8", "surrogatepass")
        lines[number] = key + mark + b"".join(words)
    return b"\n".join(lines) + tail


def _element(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """Changes a DICOM element: its value with a length that is right, or its tag, its VR, its length."""
    if not (found := elements(content)):
        return _bytes(rng, content, other)
    tag, value, length, field = rng.choice(found)
    end = value + length
    kind = rng.randrange(10)
    if kind == 0:
        return content[:tag] + content[end:]
    if kind == 1:
        return content[:end] + content[tag:end] * rng.choice((1, 1, 100)) + content[end:]
    if kind == 2:
        extreme = rng.choice((*INTEGERS, length + 1, length + 2, length - 2, 0x00FFFFFF, 0xFFFFFFFE)) % 256**field
        return content[: value - field] + extreme.to_bytes(field, "little") + content[value:]
    if kind == 3:
        return content[: tag + 4] + rng.choice(VRS) + content[tag + 6 :]
    if kind == 4:
        from_tag = rng.choice(found)[0]
        return content[:tag] + content[from_tag : from_tag + 4] + content[tag + 4 :]
    if kind == 5:
        _, from_value, from_length, _ = rng.choice(found)
        new = content[from_value : from_value + from_length]
    elif kind == 6:
        place = rng.randrange(max(0, length) + 1)
        return _put(rng, content, value + place, rng.choice("BhifqdQ"))
    else:
        new = rng.choice((rng.choice(VALUES), str(rng.choice(FLOATS)), str(rng.choice(INTEGERS[:-1])))).encode(
            "utf-8", "surrogatepass"
        )
        new += b" " * (len(new) % 2)
    new = new[: 256**field - 2]
    return content[: value - field] + len(new).to_bytes(field, "little") + new + content[end:]


def _tree(rng: random.Random, content: bytes) -> bytes:
    """Changes a node of a JSON tree; now and then so deep that a parser runs out of stack."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return _bytes(rng, content, b"")
    places: list[tuple[Any, Any]] = []
    todo = [tree]
    while todo:
        node = todo.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        places += [(node, key) for key in keys]
        todo += [node[key] for key in keys]
    kind = rng.randrange(12)
    if kind == 0 or not places:
        tree = rng.choice(NODES)
    else:
        node, key = rng.choice(places)
        if kind == 1:
            del node[key]
        elif kind == 2:
            node[key] = [node[key]]
        elif kind == 3 and isinstance(node, dict):
            node[rng.choice(TEXTS)] = node.pop(key)
        elif kind == 4 and isinstance(node, list):
            node.insert(key, node[key])
        elif kind == 5:
            source, name = rng.choice(places)
            node[key] = json.loads(json.dumps(source[name]))
        elif kind == 6 and rng.random() < 0.2:
            node[key] = "@"
            depth = rng.choice((300, 900, 100_000))
            return json.dumps(tree).encode().replace(b'"@"', b"[" * depth + b"]" * depth)
        elif kind == 7 and isinstance(node[key], float | int) and abs(node[key]) < 1e300:
            node[key] = rng.choice((-1, 10, 1e6, 1e-9, 0.5)) * node[key]
        else:
            node[key] = rng.choice(NODES)
    try:
        return json.dumps(tree).encode()
    except (ValueError, RecursionError):  # 10^400 has too many digits for none; a tree of an earlier input, too deep
        return content
