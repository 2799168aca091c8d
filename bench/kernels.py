"""What a compiled GPU program does, kernel by kernel: arithmetic, memory traffic, and the time that both take at least.

A kernel's modelled time is the larger of FLOP / peak and bytes / bandwidth, and a program's is the sum over its kernels.
Bytes are those of operands and results, from and to memory: of an operand that a fusion only slices, the slices count, and
of a result that is updated in place, the update. Caches, occupancy, launches and what autotuning would choose are left out.
Attention counts 4·B·N·Q·K·H FLOP forward and 10 backward.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from hlo import Computation, Instruction, Program, Shape

PRODUCT, CONVOLUTION = "matrix product", "convolution"
ATTENTION, ATTENTION_BACKWARD = "attention", "attention backward"
MOVE = "copy"
COLLECTIVES = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"}

_NO_KERNEL = {
    "parameter", "get-tuple-element", "constant", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier",
}  # fmt: skip
_MOVES = {"copy", "transpose", "slice", "dynamic-slice", "concatenate", "convert", "pad", "reverse"}
_NEUTRAL = {
    "parameter", "get-tuple-element", "constant", "tuple", "bitcast", "reshape", "broadcast", "iota", "compare", "select",
    "add", "and", "clamp",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch on the GPU.

    Attributes:
      name: the instruction's.
      kind: what it does, in words.
      source: JAX's stack of names.
      times: how often it runs.
      flop: arithmetic of products, convolutions and attention; 0 for the others.
      dtype: of that arithmetic, such as "f16" or "f8e4m3fn"; "" without any.
      read, written: bytes.
      origins: for copies, the program's parameters that it copies.
    """

    name: str
    kind: str
    source: str
    times: int
    flop: float
    dtype: str
    read: int
    written: int
    origins: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.read + self.written


@dataclasses.dataclass(frozen=True)
class Card:
    """What a GPU reaches in practice: FLOP/s in 16 bits, 8 bits and TF32, and bytes/s."""

    name: str
    half: float
    eight: float
    tf32: float
    bandwidth: float

    def seconds(self, kernel: Kernel) -> float:
        """The modelled time of one launch."""
        return max(kernel.flop / self._peak(kernel.dtype), kernel.nbytes / self.bandwidth)

    def arithmetic_seconds(self, kernel: Kernel) -> float:
        """The same if memory were infinitely fast."""
        return kernel.flop / self._peak(kernel.dtype)

    def _peak(self, dtype: str) -> float:
        if dtype.startswith(("f8", "s8", "s32")):
            return self.eight
        return self.tf32 if dtype.startswith("f32") else self.half


def _reached(name: str, half: float, eight: float, tf32: float, bandwidth: float) -> Card:
    """A card by its data sheet (dense TFLOP/s, TB/s): an H200 reached 0.8 of its arithmetic, and cards reach 0.9 of their
    bandwidth."""
    return Card(name, 0.8e12 * half, 0.8e12 * eight, 0.8e12 * tf32, 0.9e12 * bandwidth)


CARDS = {
    card.name: card
    for card in (
        _reached("H200", 989, 1979, 494, 4.8),
        _reached("H100", 989, 1979, 494, 3.35),
        _reached("A100", 312, 312, 156, 2.04),  # no fp8: computed in 16 bits
        _reached("L40S", 362, 733, 183, 0.864),
        _reached("RTX4090", 165, 330, 82.6, 1.008),
    )
}


def kernels(program: Program) -> list[Kernel]:
    """All kernels in the order in which they run; those of loops once, with their number."""
    return [_kernel(program, *found) for found in _walk(program, program.entry, 1, _Origins(program))]


class Collective(NamedTuple):
    """An operation in which all devices take part.

    Attributes:
      code: such as "all-reduce".
      dtype: of what is sent.
      nbytes: size of its result on each device, together for all of a tuple.
      times: how often it runs.
    """

    code: str
    dtype: str
    nbytes: int
    times: int

    def sent(self, devices: int) -> float:
        """Bytes that each device sends, as a ring does it."""
        share = (devices - 1) / devices
        return (
            self.times * self.nbytes * share * {"all-reduce": 2, "reduce-scatter": devices}.get(self.code, 1)
        )


class Links(NamedTuple):
    """How GPUs are connected, in bytes per second and direction, as NCCL reaches it.

    Attributes:
      inside: of one GPU to the others of its machine.
      outside: of a whole machine to the other machines.
      machine: GPUs of a machine.
    """

    inside: float
    outside: float
    machine: int = 8

    def all_reduce_seconds(self, nbytes: float, devices: int) -> float:
        """Time to add up arrays of this size over all devices.

        Within a machine, devices first add up what each of them is to send (reduce-scatter) and at last share the sums
        (all-gather); between these, machines add up these parts in a ring.
        """
        inside = min(devices, self.machine)
        machines = devices // inside
        within = 2 * nbytes * (inside - 1) / inside / self.inside
        between = 2 * nbytes * (machines - 1) / machines / self.outside
        return within + between


# An H200's NVLink has 450 GB/s in each direction; 0.8 of that and 0.9 of a network are assumed to be reached.
_NVLINK, _NETWORK = 0.8 * 450e9, 0.9 * 400e9 / 8
LINKS = {
    "400 Gb/s a machine": Links(_NVLINK, _NETWORK),
    "400 Gb/s a GPU": Links(_NVLINK, 8 * _NETWORK),
}


def collectives(program: Program) -> list[Collective]:
    """All collective operations of a program, in the order in which they run."""
    found = []
    for _, instruction, times, _ in _walk(program, program.entry, 1, _Origins(program)):
        code = instruction.code.removesuffix("-start")
        if code in COLLECTIVES:
            shapes = instruction.shapes
            # A started gather's result has its operands first.
            own = shapes[len(shapes) // 2 :] if instruction.code == "all-gather-start" else shapes
            found.append(Collective(code, own[0].dtype, sum(shape.nbytes for shape in own), times))
    return found


def copies_weights(kernel: Kernel) -> bool:
    """Whether a kernel only moves a network's kernels about."""
    return kernel.kind == MOVE and any("kernel" in origin for origin in kernel.origins)


def place(kernel: Kernel) -> str:
    """The part of the network that a kernel belongs to, with layers numbered alike."""
    names = re.sub(
        r"jit\([^)]*\)/|transpose\(|jvp\(|rematted_computation/|checkpoint/|closed_call/|\)",
        "",
        kernel.source,
    )
    return re.sub(r"(layers|blocks|resnets|down_blocks|up_blocks)_\d+", r"\1", names)


def _walk(
    program: Program, name: str, times: int, origins: _Origins
) -> Iterator[tuple[Computation, Instruction, int, _Origins]]:
    """Yields what runs, with its computation, how often it runs, and what its operands are."""
    computation = program.computations[name]
    for instruction in computation.values():
        if instruction.code == "while":
            trips = int(instruction.attribute(r'"known_trip_count":\{"n":"(\d+)"') or 1)
            inner = origins.inside_loop(computation, instruction)
            yield from _walk(program, instruction.attribute(r"body=%?([\w.\-]+)"), times * trips, inner)
        elif instruction.code in ("call", "async-start"):
            yield from _walk(program, instruction.calls, times, _Origins(program))
        elif instruction.code == "conditional":
            branches = instruction.attribute(r"branch_computations=\{%?([\w.\-]+)")
            branch = branches or instruction.attribute(r"true_computation=%?([\w.\-]+)")
            yield from _walk(program, branch, times, _Origins(program))
        elif instruction.code not in _NO_KERNEL and not instruction.code.endswith(("-done", "-update")):
            yield computation, instruction, times, origins


class _Origins:
    """Tells which of the program's parameters an instruction is, unchanged."""

    def __init__(self, program: Program, elements: dict[int, str] | None = None):
        self.program = program
        self.elements = elements  # in a loop: the parameter that each element of its state is

    def of(self, computation: Computation, name: str) -> str:
        """The parameter's name, or ""."""
        instruction = computation[name]
        if instruction.code == "bitcast":
            return self.of(computation, instruction.operands[0])
        if instruction.code == "parameter" and self.elements is None:
            return instruction.source or name
        if instruction.code != "get-tuple-element" or self.elements is None:
            return ""
        if computation[instruction.operands[0]].code == "parameter":
            return self.elements.get(int(instruction.attribute(r"index=(\d+)")), "")
        return ""

    def inside_loop(self, computation: Computation, loop: Instruction) -> _Origins:
        start = computation[loop.operands[0]]
        if start.code != "tuple":
            return _Origins(self.program, {})
        found = {index: self.of(computation, name) for index, name in enumerate(start.operands)}
        body = self.program.computations[loop.attribute(r"body=%?([\w.\-]+)")]
        root = next(instruction for instruction in body.values() if instruction.root)
        return _Origins(
            self.program, {index: name for index, name in found.items() if _kept(body, root, index)}
        )


def _kept(body: Computation, root: Instruction, index: int) -> bool:
    """Whether a loop passes an element of its state on as it was."""
    if root.code != "tuple":
        return False
    element = body[root.operands[index]]
    return element.code == "get-tuple-element" and f"index={index}," in f"{element.attributes},".replace(
        " ", ""
    )


def _kernel(
    program: Program, computation: Computation, instruction: Instruction, times: int, origins: _Origins
) -> Kernel:
    fused = instruction.calls if instruction.code.startswith("fusion") else ""
    inside = list(program.inside(fused)) if fused else [(computation, instruction)]
    work = [found for where, inner in inside if (found := _arithmetic(where, inner))]
    flop = sum(found[1] for found in work)
    kind, dtype = (work[0][0], work[0][2]) if work else (_kind({inner.code for _, inner in inside}), "")
    read, written = _traffic(program, computation, instruction, fused)
    moved = ()
    if kind == MOVE:
        moved = tuple(filter(None, (origins.of(computation, name) for name in instruction.operands)))
    return Kernel(instruction.name, kind, instruction.source, times, flop, dtype, read, written, moved)


def _kind(codes: set[str]) -> str:
    """What a kernel without products does, by the codes in it."""
    if "dynamic-update-slice" in codes:
        return "update in place"
    if codes & {"reduce", "reduce-window"}:
        return "reduction"
    for code in ("scatter", "gather", "sort", "rng-bit-generator"):
        if code in codes:
            return code
    if (moves := codes & _MOVES) and not codes - _MOVES - _NEUTRAL:
        return MOVE if moves - {"convert"} else "conversion"
    if {code.removesuffix("-start") for code in codes} & COLLECTIVES:
        return "communication"
    return "elementwise" if codes - _NEUTRAL or "add" in codes else "fill"


# --- arithmetic -----------------------------------------------------------------------------------


def _arithmetic(computation: Computation, instruction: Instruction) -> tuple[str, float, str] | None:
    """(kind, FLOP, dtype) of a product, convolution or attention; None for all others."""
    operands = [computation[name].shapes[0] for name in instruction.operands if computation[name].shapes]
    target = instruction.target
    if instruction.code == "dot" or target.startswith("__cublas"):
        return _product(instruction, operands)
    if instruction.code == "convolution" or target.startswith("__cudnn$conv"):
        return _convolution(instruction, operands)
    if target.startswith("__cudnn$fmha"):
        return _attention(instruction, operands)
    return None


def _product(instruction: Instruction, operands: list[Shape]) -> tuple[str, float, str]:
    left = operands[0]
    contracted = instruction.attribute(r'"?lhs_contracting_dim(?:ension)?s"?[=:][\[{]([^\]}]*)[\]}]')
    depth = math.prod(left.sizes[int(axis)] for axis in re.findall(r"\d+", contracted))
    return PRODUCT, 2.0 * instruction.shapes[0].count * depth, left.dtype


def _convolution(instruction: Instruction, operands: list[Shape]) -> tuple[str, float, str]:
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", instruction.attributes)
    assert labels is not None
    image, kernel, out, kernel_labels = operands[0], operands[1], instruction.shapes[0], labels[2]
    if "BackwardFilter" in instruction.target:
        out, kernel = operands[1], instruction.shapes[0]
    elif "BackwardInput" in instruction.target:
        out = operands[0]
    per_output = kernel.count / kernel.sizes[kernel_labels.index("o")]
    return CONVOLUTION, 2.0 * out.count * per_output, image.dtype


def _attention(instruction: Instruction, operands: list[Shape]) -> tuple[str, float, str]:
    backward = "Backward" in instruction.target
    scores = instruction.attribute(r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[([^\]]*)\]')
    count = math.prod(int(size) for size in re.findall(r"\d+", scores))
    # Operands may be transposed: (B, tokens, N, H) or (B, N, H, tokens). Queries and results have B·N·tokens·H elements.
    sizes = [int(size) for size in re.findall(r"\d+", scores)]
    head = operands[0].count // math.prod(sizes[:3])
    factor = 10 if backward else 4
    return (
        ATTENTION_BACKWARD if backward else ATTENTION,
        float(factor * count * head),
        operands[0].dtype,
    )


# --- memory traffic -------------------------------------------------------------------------------


def _traffic(
    program: Program, computation: Computation, instruction: Instruction, fused: str
) -> tuple[int, int]:
    """Bytes read and written."""
    operands = [computation[name] for name in dict.fromkeys(instruction.operands)]
    results = _results(instruction)
    if fused:
        return _fusion_traffic(program.computations[fused], results)
    if instruction.code == "dynamic-update-slice":
        update = _nbytes(computation[instruction.operands[1]])
        return update, update
    if instruction.code in ("dynamic-slice", "slice", "gather"):
        return sum(shape.nbytes for shape in results), sum(shape.nbytes for shape in results)
    return sum(_nbytes(operand) for operand in operands), sum(shape.nbytes for shape in results)


def _results(instruction: Instruction) -> list[Shape]:
    """What a kernel writes; a library's workspace, its last result in bytes, does not count."""
    shapes = instruction.shapes
    if instruction.target and len(shapes) > 1 and shapes[-1].dtype in ("s8", "u8"):
        return shapes[:-1]
    return shapes


def _nbytes(instruction: Instruction) -> int:
    return sum(shape.nbytes for shape in instruction.shapes)


def _fusion_traffic(fused: Computation, results: list[Shape]) -> tuple[int, int]:
    users = defaultdict(list)
    for instruction in fused.values():
        for name in instruction.operands:
            users[name].append(instruction)
    updated: dict[str, int] = {}  # results that are updated in place, and the update's bytes
    read = 0
    for parameter in fused.values():
        if parameter.code != "parameter":
            continue
        sliced, whole = 0, False
        for via, user in _uses(users, parameter.name):
            if user.code in ("dynamic-slice", "slice", "gather") and user.operands[0] == via:
                sliced += _nbytes(user)
            elif user.code == "dynamic-update-slice" and user.operands[0] == via:
                updated[user.name] = _nbytes(fused[user.operands[1]])
            else:
                whole = True
        read += _nbytes(parameter) if whole else min(_nbytes(parameter), sliced)
    return read, _fusion_writes(fused, updated, results)


def _uses(users: dict[str, list[Instruction]], name: str) -> Iterator[tuple[str, Instruction]]:
    """Yields an instruction's users, those of its bitcasts and conversions in their place."""
    for user in users[name]:
        if user.code in ("bitcast", "reshape", "convert") and not user.root:
            yield from _uses(users, user.name)
        else:
            yield name, user


def _fusion_writes(fused: Computation, updated: dict[str, int], results: list[Shape]) -> int:
    root = next(instruction for instruction in fused.values() if instruction.root)
    written = 0
    for name in root.operands if root.code == "tuple" else (root.name,):
        made = fused[name]
        while made.code in ("bitcast", "reshape") and made.operands:
            made = fused[made.operands[0]]
        if made.target:
            written += sum(shape.nbytes for shape in _results(made))
        elif not (made.shapes and made.shapes[0].dtype == "s8" and len(made.shapes[0].sizes) == 1):
            written += updated.get(made.name, _nbytes(made))
    return min(written, sum(shape.nbytes for shape in results)) if not updated else written
