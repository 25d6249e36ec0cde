"""A compiled program as data: the parser of the text of XLA's scheduled HLO.

The format is XLA's, which is no public interface: names are those of jaxlib 0.10.
"""

import dataclasses
import functools
import math
import re


@dataclasses.dataclass(frozen=True)
class Array:
    """Type, dimensions and layout of one array: the text between its braces."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def elements(self) -> int:
        """How many."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes in the device's main memory; 0 in any other memory."""
        return 0 if re.search(r"S\([1-9]", self.layout) else self.size

    @property
    def size(self) -> int:
        """Bytes in whatever memory, with the padding of a tiled layout."""
        dims = list(self.dims)
        order = _integers(self.layout.partition(":")[0])
        if tile := re.search(r"T\((\d+(?:,\d+)*)\)", self.layout):
            for axis, size in zip(order, reversed(_integers(tile[1])), strict=False):
                dims[axis] = -(-dims[axis] // size) * size
        return -(-math.prod(dims) * _bits(self.dtype) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `operands` and `calls` are names, `rest` is the text after the operands."""

    name: str
    opcode: str
    outputs: tuple[Array, ...]
    operands: tuple[str, ...]
    argument: str
    rest: str
    root: bool

    @functools.cached_property
    def calls(self) -> tuple[str, ...]:
        """Computations that run as part of this instruction; `to_apply` of a reduction is none of them."""
        pattern = r"(?:calls|body|true_computation|false_computation|called_computations|branch_computations)="
        if self.opcode == "call":
            pattern = r"to_apply="
        found = re.findall(pattern + r"(\{[^}]*\}|%[\w.\-]+)", self.rest)
        return tuple(name for group in found for name in re.findall(r"%([\w.\-]+)", group))

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from, e.g. `jit(step)/transpose(jvp())/conv_general_dilated`."""
        return self.find(r'op_name="([^"]*)"')

    @property
    def target(self) -> str:
        """The library function that a custom call calls, such as `__cudnn$convForward`; "" for all else."""
        return self.find(r'custom_call_target="([^"]*)"')

    def find(self, pattern: str) -> str:
        """The first group of a pattern in the text after the operands; "" if it is not there."""
        return _find(pattern, self.rest)


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A parsed program.

    Attributes:
      computations: by name, each its instructions by name in the order of the schedule.
      entry: name of the one that runs.
      frames: by stack frame id, the source lines of a call, innermost first, each (file, line, function).
    """

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[tuple[str, int, str], ...]]

    def source(self, instruction: Instruction) -> tuple[tuple[str, int, str], ...]:
        """Source lines that an instruction comes from, innermost first; empty if the compiler made it up."""
        if frame := instruction.find(r"stack_frame_id=(\d+)"):
            return self.frames.get(int(frame), ())
        file, line = instruction.find(r'source_file="([^"]*)"'), instruction.find(r"source_line=(\d+)")
        return ((file, int(line), ""),) if file and line else ()


def parse(text: str) -> Module:
    """Reads what `compiled.as_text()` gives."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if match := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
                current = computations[match[2]] = {}
                entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif " = " in line:
            instruction = parse_instruction(line)
            current[instruction.name] = instruction
    return Module(computations, entry, _frames(text))


def parse_instruction(line: str) -> Instruction:
    """Reads one line, e.g. `ROOT %a.1 = f32[8]{0} add(%b, %c), metadata={...}`."""
    left, _, right = re.sub(r"/\*.*?\*/", "", line).strip().partition(" = ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    start = right.index("(", end)
    stop = _closing(right, start)
    argument = right[start + 1 : stop]
    return Instruction(
        name=left.removeprefix("ROOT ").removeprefix("%"),
        opcode=right[end:start].strip(),
        outputs=tuple(
            Array(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), layout)
            for dtype, dims, layout in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?", right[:end])
        ),
        operands=tuple(re.findall(r"%([\w.\-]+)", argument)),
        argument=argument,
        rest=right[stop + 1 :],
        root=left.startswith("ROOT "),
    )


def _frames(text: str) -> dict[int, tuple[tuple[str, int, str], ...]]:
    """The stack frame table at the head of the text; empty where the compiler wrote none."""

    def table(title: str) -> dict[int, str]:
        rows = _find(rf"^{title}\n((?:\d+ .*\n)+)", text).splitlines()
        return {int(row.split(" ", 1)[0]): row.split(" ", 1)[1] for row in rows}

    def number(key: str, row: str) -> int:
        return int(_find(rf"{key}=(\d+)", row) or 0)

    files, functions, locations, rows = (
        table(title) for title in ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
    )
    frames: dict[int, tuple[tuple[str, int, str], ...]] = {0: ()}
    for frame, row in rows.items():
        place = locations[number("file_location_id", row)]
        file, function = files[number("file_name_id", place)], functions[number("function_name_id", place)]
        # Ids count from 1; a parent's is written one too large, so that 1 means none.
        parent = frames[number("parent_frame_id", row) - 1]
        frames[frame] = ((file.strip('"'), number("line", place), function.strip('"')), *parent)
    return frames


def _integers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    return match[1] if match else ""


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"no closing parenthesis in {text[start : start + 80]!r}")


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    return int(_find(r"^[a-z]+(\d+)", dtype) or 0)
