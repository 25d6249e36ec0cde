"""The model file NAME.autocontext: a zip of weights, a description of them, and a model card.

    model.json           `description.Description`, with the format's number and SHA-256 checksums of the other parts
    weights.safetensors  every parameter and running average, by its path in the network; of an ensemble those of each
                         member
    README.md            the model card, for people

Reading it executes nothing: safetensors holds numbers alone, JSON holds texts, and no name in it is imported.
"""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from autocontext_jax.errors import UserError
from autocontext_jax.files import exists, write_whole, writing
from autocontext_jax.inference.description import Description
from autocontext_jax.inference.tiling import PredictorConfig
from autocontext_jax.sections import as_dict, from_dict

FORMAT = 1  # raise it when what is written changes its meaning
SUFFIX = ".autocontext"

DESCRIPTION, WEIGHTS, CARD = "model.json", "weights.safetensors", "README.md"
LARGEST_TEXT = 2**24  # bytes of the description and of the card


def write_model(path: Path, description: Description, weights: Mapping[str, np.ndarray], card: str) -> None:
    """Writes a model file, whole or not at all; the same model gives the same bytes.

    Args:
      path: of the file.
      description: of the model.
      weights: arrays by name.
      card: Markdown.

    Raises:
      UserError: the file cannot be written; an array is of a type that NumPy lacks, such as bfloat16.
    """
    if other := [name for name, array in weights.items() if array.dtype.kind not in "biuf"]:
        raise UserError(f"the array {other[0]} is {weights[other[0]].dtype}; expected float32 or another NumPy type")
    parts = {WEIGHTS: safetensors.numpy.save(dict(weights)), CARD: card.encode()}
    model = as_dict(description)
    if not description.members:
        del model["members"]  # earlier versions do not know the key
    content = {"format": FORMAT, "model": model}
    content["parts"] = {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}
    parts = {DESCRIPTION: (json.dumps(content | {"checksum": _checksum(content)}, indent=1) + "\n").encode(), **parts}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, part in parts.items():
            # Weights do not shrink by packing; texts stay readable in the file too. The time is that of no clock.
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), part)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, packed.getvalue())


def read_model(path: Path) -> tuple[Description, dict[str, np.ndarray]]:
    """What `write_model` wrote, without the card.

    Raises:
      UserError: the file is missing, damaged, of another format or lacks a part.
    """
    parts = _read_parts(path, (DESCRIPTION, WEIGHTS, CARD))
    content = _read_json(path, parts[DESCRIPTION])
    checksums = content.get("parts")
    for name in (WEIGHTS, CARD):
        expected = checksums.get(name) if isinstance(checksums, dict) else None
        if hashlib.sha256(parts[name]).hexdigest() != expected:
            raise _damaged(path, f"its part {name} is not what was written")
    description = _described(path, content)
    try:
        return description, safetensors.numpy.load(parts[WEIGHTS])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"its weights cannot be read ({error})") from None


def read_description(path: Path) -> Description:
    """The description alone: the weights are neither read nor checked. Raises as `read_model`."""
    return _described(path, _read_json(path, _read_parts(path, (DESCRIPTION,))[DESCRIPTION]))


def _described(path: Path, content: dict[str, Any]) -> Description:
    model = content.get("model")
    if isinstance(model, dict) and isinstance(tiling := model.get("tiling"), dict):
        # The first files have other fields: their tiles were cubes that overlapped by a share of them, everywhere.
        for name in ("overlap", "plane"):
            tiling.pop(name, None)
        if isinstance(edge := tiling.get("tile"), int):
            tiling["tile"] = [edge]  # once the edge of cubes
        tiling.setdefault("margin", PredictorConfig.margin)
        tiling.setdefault("crop_to_body", False)
        tiling.setdefault("flip_axes", "x" if tiling.get("flip_classes") else "")  # once the only axis
    if isinstance(model, dict) and isinstance(levels := model.get("levels"), dict):
        levels.setdefault("anisotropic", False)  # networks and levels once halved all axes
    if isinstance(model, dict) and isinstance(pyramid := model.get("pyramid"), dict) and "window" in pyramid:
        window = pyramid.pop("window")  # the first files have CT and a fixed window
        if isinstance(window, list) and len(window) == 2 and all(isinstance(edge, int | float) for edge in window):
            low, high = window
            channel = {"name": "CT", "normalization": "CT", "window": window}
            channel |= {"mean": (low + high) / 2, "std": (high - low) / 2}
            model.setdefault("image", {"channels": [channel], "cut_out": False})
    if isinstance(model, dict):
        model.setdefault("members", [])
    classes = model.get("classes") if isinstance(model, dict) else None
    for entry in classes if isinstance(classes, list) else ():
        if isinstance(entry, dict):
            entry.setdefault("members", ())  # files from before there were regions have none
    return from_dict(Description, model, place=f"{path}: {DESCRIPTION}: key", prefix="model.")


def check_weights(path: Path, found: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> None:
    """Compares arrays with the shapes and types that the network has.

    Raises:
      UserError: they differ: names the first array that does.
    """
    for name in sorted({*found, *expected}):
        have, want = (f"{each[name].dtype}{list(each[name].shape)}" if name in each else "no such array"
                      for each in (found, expected))  # fmt: skip
        if have != want:
            raise UserError(
                f"{path}: the array {name} is {have}; expected {want}: the network of this name is not the one that "
                "was trained"
            )


def _read_parts(path: Path, requested: tuple[str, ...]) -> dict[str, bytes]:
    if not exists(path):
        raise UserError(f"{path} does not exist: expected a model file (NAME{SUFFIX}) or the folder of a run")
    parts = {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            for name in requested:
                if names.count(name) != 1:
                    raise _damaged(path, f"it has {names.count(name)} parts of the name {name}; expected one")
                info = archive.getinfo(name)
                # Parts are stored as they are, so none can be larger than the file.
                if info.compress_type != zipfile.ZIP_STORED or not (
                    info.file_size == info.compress_size <= path.stat().st_size
                ):
                    raise _damaged(path, f"its part {name} is packed")
                if name != WEIGHTS and info.file_size > LARGEST_TEXT:
                    raise _damaged(path, f"its part {name} has {info.file_size} bytes")
                parts[name] = archive.read(info)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): expected a model file") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        # What zipfile raises where bits are flipped: in its lists, a name, a version, the flag of encryption, the end.
        raise _damaged(path, str(error)) from None
    return parts


def _read_json(path: Path, text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its part {DESCRIPTION} is not JSON ({error})") from None
    if not isinstance(content, dict) or "format" not in content:
        raise _damaged(path, f"its part {DESCRIPTION} has no format")
    if content["format"] != FORMAT:
        raise UserError(
            f"{path} has the format {content['format']!r}; expected {FORMAT}: use the version of autocontext_jax that "
            "wrote it, or a newer one"
        )
    if content.pop("checksum", None) != _checksum(content):
        raise _damaged(path, f"its part {DESCRIPTION} is not what was written")
    return content


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is no whole model file ({reason}): copy or export it again")


def flat_name(keys: tuple[Any, ...], member: int = 0) -> str:
    """The name of an array in the file: "level_1/analysis/0/0/layer/kernel" of its path in the pyramid.

    Args:
      keys: the path.
      member: number, from 1, of the ensemble's member that has it; its name then begins with "member_1/". 0 of a single
        pyramid.
    """
    networks, number, *inner = keys
    assert networks == "networks", keys
    return "/".join([*[f"member_{member}"] * (member > 0), f"level_{number + 1}", *map(str, inner)])
