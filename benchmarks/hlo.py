"""What a compiled program moves and computes, read from the text of its scheduled HLO.

`parse` gives a `Module`; `costs` gives the price of each instruction that runs as a kernel of its own. An instruction
reads its operands from memory and writes its outputs to it, once each: that is exact for fusions, whose inner values
never leave the chip, and a lower bound for convolutions, whose library may read more than once. What lies in a cache or
in a TPU's vector memory (memory space S(1)) is not told apart from what is read again, except that S(1) is free.

The format is XLA's, which is no public interface: names here are those of jaxlib 0.10.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

FORWARD, DATA, FILTER = "convolution forward", "convolution backward data", "convolution backward filter"
PRODUCT, ELEMENTWISE, LAYOUT = "matrix products", "normalisation and elementwise", "layout changes and copies"
COLLECTIVE = "collectives"
KINDS = (FORWARD, DATA, FILTER, PRODUCT, ELEMENTWISE, LAYOUT, COLLECTIVE)

CUDNN = {"__cudnn$convForward": FORWARD, "__cudnn$convBackwardInput": DATA, "__cudnn$convBackwardFilter": FILTER}

CUBLAS = "__cublas$"

# Move nothing: they name, regroup or wait for what is already there.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id",
    "replica-id", "add-dependency", "domain", "get-dimension-size", "AllocateBuffer", "ConcatBitcast",
}  # fmt: skip
# A fusion of nothing but these changes where values lie, or their type, not the values.
MOVING = FREE | {
    "copy", "copy-start", "transpose", "reshape", "broadcast", "iota", "convert", "slice", "slice-start",
    "dynamic-slice", "pad", "concatenate", "dynamic-update-slice", "reverse", "fusion",
}  # fmt: skip
SLICING = ("slice", "dynamic-slice", "gather")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


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
        return _find(r'op_name="([^"]*)"', self.rest)


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
        if frame := _find(r"stack_frame_id=(\d+)", instruction.rest):
            return self.frames.get(int(frame), ())
        file, line = _find(r'source_file="([^"]*)"', instruction.rest), _find(r"source_line=(\d+)", instruction.rest)
        return ((file, int(line), ""),) if file and line else ()


@dataclasses.dataclass(frozen=True)
class Cost:
    """The price of one instruction.

    Attributes:
      instruction: whose.
      origin: the instruction whose metadata tells where it comes from: itself, one fused into it, or what it copies.
      kind: one of `KINDS`.
      bytes: read and written in the device's main memory, times how often it runs.
      flops: of its convolutions and matrix products, two a multiply-add, also at the padded border; times how often it
        runs.
      dtype: type that those multiply.
      link_bytes: that leave each device, in a collective.
    """

    instruction: Instruction
    origin: Instruction
    kind: str
    bytes: int
    flops: int
    dtype: str
    link_bytes: int


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


def costs(module: Module) -> list[Cost]:
    """Prices of all instructions that run, loops times their trip count, in the order of the schedule."""
    return list(_costs(module, module.entry, 1))


def _costs(module: Module, name: str, times: int) -> Iterator[Cost]:
    computation = module.computations[name]
    for instruction in computation.values():
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith(("-done", "-update")) or _target(instruction) in FREE:
            continue
        if opcode in ("while", "call", "conditional", "async-start"):
            trips = int(_find(r'known_trip_count":\{"n":"(\d+)"', instruction.rest) or 1)
            branches = [list(_costs(module, inner, times * trips)) for inner in instruction.calls]
            # Of a conditional's branches one runs: the dearest is counted.
            yield from max(branches, key=lambda costs: sum(cost.bytes for cost in costs), default=[])
            continue
        work = [(_flops(where, inner), inner, where) for where, inner in _walk(module, computation, instruction)]
        _, heaviest, where = max(work, key=lambda item: item[0])
        link = 0
        if opcode.startswith(COLLECTIVES):
            link = sum(array.size for operand in instruction.operands for array in computation[operand].outputs)
        yield Cost(
            instruction,
            _origin(module, computation, instruction),
            _kind(where, heaviest, [inner.opcode for _, inner, _ in work]),
            times * _bytes(module, computation, instruction),
            times * sum(flops for flops, _, _ in work),
            where[heaviest.operands[0]].outputs[0].dtype if heaviest.operands else "",
            times * link,
        )


def _walk(
    module: Module, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    """An instruction and all that is fused into it, each with the computation it stands in."""
    yield computation, instruction
    for name in instruction.calls:
        for inner in module.computations[name].values():
            yield from _walk(module, module.computations[name], inner)


def _origin(module: Module, computation: Computation, instruction: Instruction) -> Instruction:
    inside = [inner for _, inner in _walk(module, computation, instruction)]
    named = next((inner for inner in (inside[0], *reversed(inside)) if module.source(inner)), None)
    if named is None and instruction.operands and instruction.opcode in MOVING:
        return _origin(module, computation, computation[instruction.operands[0]])
    return named or instruction


def _kind(computation: Computation, heaviest: Instruction, opcodes: list[str]) -> str:
    target = _target(heaviest)
    if opcodes[0].startswith(COLLECTIVES):
        return COLLECTIVE
    if target in CUDNN:
        return CUDNN[target]
    if heaviest.opcode == "dot" or target.startswith(CUBLAS):
        return PRODUCT
    if heaviest.opcode == "convolution":
        return _convolution_kind(computation, heaviest)
    return LAYOUT if set(opcodes) <= MOVING else ELEMENTWISE


def _convolution_kind(computation: Computation, instruction: Instruction) -> str:
    """Which of the three a plain convolution is: the backward filter's window is as large as the volume."""
    space = _space(computation, instruction)
    if all(1 in sizes for sizes in space):  # along no axis does anything slide
        return PRODUCT
    if math.prod(window for _, window, _ in space) > math.prod(output for _, _, output in space):
        return FILTER
    return DATA if "transpose(" in instruction.op_name else FORWARD


def _space(computation: Computation, instruction: Instruction) -> list[tuple[int, int, int]]:
    """Sizes of a plain convolution's input, window and output along each of its spatial axes."""
    labels = re.findall(r"\w+", _find(r"dim_labels=(\w+->\w+)", instruction.rest).replace("_", " "))
    arrays = [computation[name].outputs[0] for name in instruction.operands] + [instruction.outputs[0]]
    axes = [letter for letter in labels[2] if letter.isdigit()]
    return [tuple(array.dims[label.index(axis)] for array, label in zip(arrays, labels, strict=True)) for axis in axes]


def _flops(computation: Computation, instruction: Instruction) -> int:
    """Two a multiply-add of one convolution or matrix product; 0 for all else."""
    target = _target(instruction)
    arrays = [array for name in instruction.operands for array in computation[name].outputs]
    kernel = _find(r"dim_labels=\w+_(\w+)->", instruction.rest)
    if target in CUDNN:
        # Each value of the forward convolution's output takes the products of one output feature's filter.
        forward = (instruction.outputs[0], arrays[1])
        output, filters = {FORWARD: forward, DATA: (arrays[0], arrays[1])}.get(CUDNN[target], (arrays[1], forward[0]))
        return 2 * output.elements * filters.elements // filters.dims[kernel.index("o")]
    if instruction.opcode == "convolution":
        space = _space(computation, instruction)
        # Along an axis, two of the places in input, window and output settle the third: products with what lies
        # between dilated values, or with nothing but padding, are none.
        pairs = math.prod(min(image * window, image * output, window * output) for image, window, output in space)
        outputs = instruction.outputs[0].elements // math.prod(output for _, _, output in space)
        return 2 * outputs * pairs * arrays[1].dims[kernel.index("i")]
    if instruction.opcode == "dot" or target.startswith(CUBLAS):
        axes = _find(r'lhs_contracting_dim(?:s=\{|ensions":\[)([^\]}]*)', instruction.rest)
        return 2 * instruction.outputs[0].elements * math.prod(arrays[0].dims[axis] for axis in _integers(axes))
    return 0


def _bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes that one instruction reads and writes."""
    opcode, outputs = instruction.opcode, instruction.outputs
    if opcode == "fusion":
        inner = instruction.calls[0]
        read: dict[str, int] = {}
        for number, name in enumerate(instruction.operands):
            read[name] = max(read.get(name, 0), _parameter_bytes(module, inner, number))
        return sum(read.values()) + _written_bytes(module, inner)
    operands = [array for name in dict.fromkeys(instruction.operands) for array in computation[name].outputs]
    if opcode in SLICING:
        return _part(operands[0], outputs[0]) + outputs[0].bytes
    if opcode == "dynamic-update-slice":
        return 2 * operands[1].bytes
    if opcode == "copy-start":  # gives (copy, original, context)
        return operands[0].bytes + outputs[0].bytes
    if opcode == "slice-start":  # gives (original, slice, context)
        return _part(operands[0], outputs[1]) + outputs[1].bytes
    if opcode.endswith("-start"):  # of a collective; its outputs name its operands again
        return 2 * sum(array.bytes for array in operands)
    return sum(array.bytes for array in (*operands, *outputs))


def _part(array: Array, piece: Array) -> int:
    """Bytes of a piece of an array, at most all of it."""
    return min(array.bytes, piece.elements * array.bytes // max(1, array.elements))


def _parameter_bytes(module: Module, name: str, number: int) -> int:
    """Bytes that a fused computation reads of one parameter: no more than its slices, if it is only sliced."""
    computation = module.computations[name]
    parameter = next(i for i in computation.values() if i.opcode == "parameter" and i.argument == str(number))
    (array,) = parameter.outputs
    return min(array.bytes, _read_bytes(module, computation, parameter.name, array))


def _read_bytes(module: Module, computation: Computation, name: str, array: Array) -> int:
    total = 0
    for user in computation.values():
        for position, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.opcode in SLICING and position == 0:
                total += _part(array, user.outputs[0])
            elif user.opcode == "bitcast":
                total += _read_bytes(module, computation, user.name, array)
            elif user.opcode == "fusion":
                total += _parameter_bytes(module, user.calls[0], position)
            elif not (user.opcode == "dynamic-update-slice" and position == 0):
                return array.bytes
    return total


def _written_bytes(module: Module, name: str) -> int:
    """Bytes that a fused computation writes: of a dynamic-update-slice, which works in place, only the update."""
    computation = module.computations[name]
    (root,) = (i for i in computation.values() if i.root)
    total = 0
    for result in [computation[name] for name in root.operands] if root.opcode == "tuple" else [root]:
        while result.opcode == "bitcast":
            result = computation[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            result = computation[result.operands[1]]
        total += sum(array.bytes for array in result.outputs)
    return total


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


def _target(instruction: Instruction) -> str:
    return _find(r'custom_call_target="([^"]*)"', instruction.rest)


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
