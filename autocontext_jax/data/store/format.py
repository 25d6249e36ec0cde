"""How a prepared case lies on disk, and what its reader and its writer share.

    <root>/<case>.ome.zarr/
      zarr.json                 the levels, and ours under "autocontext_jax"; written last: it marks a complete case
      level_2, level_1, ...     [C, D, H, W] finest level first: int16 HU of CT alone, else float32, see `images.spec`
      labels/classes/level_2 ... [D, H, W] uint8: numbers, see `data/labels.py`
      foreground                [voxels of number 1 to V - 1] uint32: flat indices into the finest level, by number
      intensities               [channels of CT * 65536] uint32: how many labelled voxels have each HU

The root is a local folder or the URL of any of TensorStore's key-value stores (gs://, s3://). Every chunk carries a
checksum and none is left out: damage and loss are errors, never data. Free of jax, as worker processes import it.
"""

import contextlib
import json
import urllib.parse
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorstore as ts

from autocontext_jax.errors import UserError

FORMAT = 4  # of the store: raise it when what is written changes, and every case is prepared again

OURS = "autocontext_jax"  # our attributes' key
CHUNK, SHARD = 32, 256  # edges in voxels: what is decompressed, what is one file
INDEX_CHUNK, INDEX_SHARD = 4096, 2**20  # the same of the foreground and the intensities
REMEDY = "delete that folder and prepare the case again"


def case_path(root: str, name: str) -> str:
    """Where a case lies, as a user would write it."""
    return f"{root.rstrip('/')}/{name}.ome.zarr"


def case_url(root: str, name: str) -> str:
    """Where a case lies, as TensorStore takes it."""
    base = root.rstrip("/") if "://" in root else Path(root).absolute().as_uri()
    return f"{base}/{urllib.parse.quote(name)}.ome.zarr/"


@contextlib.contextmanager
def storage_errors(root: str, name: str, failure: str, remedy: str = REMEDY) -> Iterator[None]:
    """Turns TensorStore's errors, ValueError or IndexError, into one line."""
    try:
        yield
    except (ValueError, IndexError) as error:
        reason = str(error).partition(" [")[0].replace("\0", "/")  # what follows repeats the whole specification
        raise UserError(f"{case_path(root, name)} cannot be {failure} ({reason}): {remedy}") from None


def read_attributes(root: str, name: str) -> dict[str, Any]:
    """Our attributes of a complete case; empty if there is none."""
    with storage_errors(root, name, "read", "give a folder, or a URL that TensorStore knows"):
        mark = ts.KvStore.open(case_url(root, name)).result().read("zarr.json").result()
    try:
        ours = json.loads(mark.value)["attributes"][OURS]
        crc = ours.pop("crc", None)
        return {} if ours["format"] == FORMAT and crc != checksum(ours) else ours
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # not JSON, or not of a case
        return {}


def checksum(ours: dict[str, Any]) -> int:
    """Of our attributes, which unlike the chunks carry no checksum of the format's own."""
    return zlib.crc32(json.dumps(ours, sort_keys=True).encode())


def array_spec(url: str) -> dict[str, Any]:
    """Every chunk is written, also one of air alone, so that a chunk that is not there is an error."""
    return {"driver": "zarr3", "kvstore": url, "store_data_equal_to_fill_value": True, "fill_missing_data_reads": False}
