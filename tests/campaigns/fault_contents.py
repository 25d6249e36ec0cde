"""What a work directory holds, read in a process of its own: the campaign's process must not start a device."""

import dataclasses
import hashlib
import multiprocessing
import warnings
from pathlib import Path
from typing import Any


class ContentReader:
    """The process that reads; it lives as long as the campaign."""

    def __init__(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        context.Process(target=_answer, args=(theirs,), daemon=True).start()
        theirs.close()

    def arrays(self, workdir: Path, steps: tuple[int, ...]) -> dict[str, Any]:
        """Digests of every array of the checkpoints of these steps, and of every predicted mask.

        If anything cannot be read, the only key is `unreadable` and its value says why.
        """
        self._connection.send(("arrays", workdir, steps))
        return self._connection.recv()

    def prepared_case(self, folder: Path, name: str) -> tuple[str, list[bytes]]:
        """All that can be read of a prepared case, and the line of error with which reading ended, or ""."""
        self._connection.send(("prepared_case", folder, name))
        return self._connection.recv()


def _answer(connection: Any) -> None:
    warnings.simplefilter("ignore")  # orbax warns that the devices are not those of the run
    functions: dict[str, Any] = {"arrays": _arrays, "prepared_case": _prepared_case}
    while True:
        try:
            name, *arguments = connection.recv()
        except EOFError:  # the campaign is over
            return
        connection.send(functions[name](*arguments))


def _arrays(workdir: Path, steps: tuple[int, ...]) -> dict[str, Any]:
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    import SimpleITK as sitk

    found: dict[str, Any] = {}
    checkpointer = ocp.PyTreeCheckpointer()
    try:
        for step in steps:
            path = (workdir / "checkpoints" / str(step) / "state").absolute()
            # As plain arrays: the devices of several processes are not those of this one.
            names = checkpointer.metadata(path).item_metadata.tree
            plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
            state = checkpointer.restore(path, restore_args=plain)
            leaves = jax.tree_util.tree_leaves_with_path(state)
            found[f"checkpoint {step}"] = {str(path): _digest(leaf) for path, leaf in leaves}
        for path in sorted((workdir / "predictions").rglob("*.nii.gz")):
            image = sitk.ReadImage(path)
            place = (image.GetOrigin(), image.GetDirection(), image.GetSpacing())
            found[f"mask {path.relative_to(workdir)}"] = (_digest(sitk.GetArrayFromImage(image)), place)
    except Exception as error:  # whatever is wrong, the campaign reports it and goes on
        return {"unreadable": f"{type(error).__name__}: {error}"}
    return found


def _prepared_case(folder: Path, name: str) -> tuple[str, list[bytes]]:
    from autocontext_jax.data.store.reader import PreparedCase
    from autocontext_jax.errors import UserError

    found = []
    try:
        case = PreparedCase.open(str(folder), name)
        for level, shape in enumerate(case.shapes, start=1):
            found += [array.tobytes() for array in case.read(level, (-1, 0, 2), shape).result()]
        found += [repr([case.foreground_voxel(n) for n in range(0, case.foreground_offsets[-1], 7)]).encode()]
        return "", [*found, repr(dataclasses.replace(case, root="")).encode()]
    except UserError as error:
        return f"error: {error}", []
    except Exception as error:  # an answer too, and not the one line that is expected
        return f"{type(error).__name__}: {error}", []


def _digest(array: Any) -> str:
    import numpy as np

    array = np.asarray(array)
    return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"
