"""The reading process of a campaign: it notes which lines of the package each request reaches."""

import resource
import sys
from pathlib import Path
from typing import Any

from autocontext_jax.images import reader_process

PACKAGE = str(Path(reader_process.__file__).parent)


def serve(notes: str) -> None:
    """As `reader_process.serve`.

    Args:
      notes: a file, to which lines that this process had not reached before are appended as "file:line".
    """
    answer = reader_process._answer
    seen: set[tuple[str, int]] = set()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def traced(*arguments: Any) -> Any:
        hits: set[tuple[str, int]] = set()

        def local(frame: Any, event: str, _: Any) -> Any:
            if event == "line":
                hits.add((frame.f_code.co_filename, frame.f_lineno))
            return local

        sys.settrace(lambda frame, event, _: local if frame.f_code.co_filename.startswith(PACKAGE) else None)
        try:
            return answer(*arguments)
        finally:
            sys.settrace(None)
            if new := hits - seen:
                seen.update(new)
                with Path(notes).open("a", encoding="utf-8") as file:
                    file.writelines(f"{Path(name).name}:{line}\n" for name, line in new)

    reader_process._answer = traced  # type: ignore[assignment]
    reader_process.serve()
