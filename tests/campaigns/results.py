"""How a campaign prints its results: a table, then one line of JSON with the machine, the versions and the commit.

It does not import JAX, as campaigns start processes by forking.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def print_results(rows: Sequence[dict[str, Any]], *, packages: Sequence[str], **about: Any) -> None:
    """Prints the rows as a Markdown table, and everything as one line of JSON.

    Args:
      rows: the columns are the keys of the first.
      packages: whose versions are given beside those of JAX and Flax.
      about: more for the line of JSON.
    """
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |")
    print(json.dumps({"machine": _machine(packages), **about, "rows": list(rows)}))


def _machine(packages: Sequence[str]) -> dict[str, str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": f"{processor or platform.processor()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "flax", *packages)},
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit that is checked out, marked if files of the project differ from it; "" without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=, with changes"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
