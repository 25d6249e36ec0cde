"""What each instruction of a compiled program computes, moves and sends, and how long that takes at least.

An instruction reads its operands from memory and writes its outputs to it, once each. That is exact for fusions, whose
inner values never leave the chip, and a lower bound for convolutions, whose library may read more than once. What lies
in a cache is counted as if it were read from memory again. A TPU's vector memory, memory space S(1), costs nothing.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from autocontext_jax.planning.devices import Accelerator
from autocontext_jax.planning.hlo_text import Array, Computation, Instruction, Module

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


def instruction_costs(module: Module) -> list[Cost]:
    """Prices of all instructions that run, loops times their trip count, in the order of the schedule."""
    return list(_costs(module, module.entry, 1))


def _costs(module: Module, name: str, times: int) -> Iterator[Cost]:
    computation = module.computations[name]
    for instruction in computation.values():
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith(("-done", "-update")) or instruction.target in FREE:
            continue
        if opcode in ("while", "call", "conditional", "async-start"):
            trips = int(instruction.find(r'known_trip_count":\{"n":"(\d+)"') or 1)
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
    target = heaviest.target
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
    labels = re.findall(r"\w+", instruction.find(r"dim_labels=(\w+->\w+)").replace("_", " "))
    arrays = [computation[name].outputs[0] for name in instruction.operands] + [instruction.outputs[0]]
    axes = [letter for letter in labels[2] if letter.isdigit()]
    return [tuple(array.dims[label.index(axis)] for array, label in zip(arrays, labels, strict=True)) for axis in axes]


def _flops(computation: Computation, instruction: Instruction) -> int:
    """Two a multiply-add of one convolution or matrix product; 0 for all else."""
    target = instruction.target
    arrays = [array for name in instruction.operands for array in computation[name].outputs]
    kernel = instruction.find(r"dim_labels=\w+_(\w+)->")
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
        axes = instruction.find(r'lhs_contracting_dim(?:s=\{|ensions":\[)([^\]}]*)')
        return (
            2
            * instruction.outputs[0].elements
            * math.prod(arrays[0].dims[axis] for axis in map(int, re.findall(r"\d+", axes)))
        )
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


def roofline_seconds(cost: Cost, accelerator: Accelerator, count: int) -> float:
    """The longest of computing, moving and sending: the least time that one instruction takes.

    Args:
      cost: of the instruction.
      accelerator: on which it runs.
      count: of the devices that take part in a collective. In a ring each share passes all other devices twice.
    """
    peak = accelerator.peak.get(cost.dtype, min(accelerator.peak.values()))
    sending = 2 * (count - 1) / count * cost.link_bytes / accelerator.link
    return max(cost.flops / peak, cost.bytes / accelerator.bandwidth, sending)
