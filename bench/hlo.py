"""Reads the text of a compiled XLA program (`compiled.as_text()`) as computations of instructions."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

_BYTES = {
    "pred": 1,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
    "token": 0,
}  # the others by the number in their name
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_SHAPE = re.compile(r"\b([a-z]+[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")


class Shape(NamedTuple):
    """An array's dtype and shape."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.sizes)

    @property
    def nbytes(self) -> int:
        return self.count * dtype_bytes(self.dtype)


def dtype_bytes(dtype: str) -> int:
    """Bytes of an element, for example 2 of "bf16" and 1 of "f8e4m3fn"."""
    if dtype in _BYTES:
        return _BYTES[dtype]
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation.

    Attributes:
      name: unique in its computation.
      type: of the result; a tuple's begins with "(".
      code: such as "fusion", "custom-call" or "while".
      operands: names of instructions of the same computation.
      literal: what stands between the parentheses.
      attributes: what follows them.
      root: whether it is the computation's result.
    """

    name: str
    type: str
    code: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    @cached_property
    def shapes(self) -> list[Shape]:
        """The result's arrays; several if it is a tuple."""
        return shapes_in(self.type)

    def attribute(self, pattern: str) -> str:
        """The first group of the first match in the attributes, or ""."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    @cached_property
    def calls(self) -> str:
        """The computation that this fusion, call or loop runs, or ""."""
        found = _CALLED.search(self.attributes)
        return found[1] if found else ""

    @cached_property
    def target(self) -> str:
        """The library function of a custom call, or ""."""
        return self.attribute(r'custom_call_target="([^"]+)"')

    @cached_property
    def source(self) -> str:
        """Where the instruction comes from: JAX's stack of names."""
        return self.attribute(r'op_name="([^"]*)"')


Computation = dict[str, Instruction]


class Program:
    """All computations of a program.

    Attributes:
      computations: by name.
      entry: the name of the one that runs.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation | None = None
        for line in text.splitlines():
            if current is None:
                if head := _HEAD.match(line.rstrip()):
                    current = self.computations.setdefault(head[2], {})
                    self.entry = head[2] if head[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif " = " in line:
                instruction = _parsed(line.strip())
                current[instruction.name] = instruction

    def inside(self, name: str) -> Iterator[tuple[Computation, Instruction]]:
        """Yields the instructions of a computation and of those that it calls, each with its computation."""
        computation = self.computations.get(name, {})
        for instruction in computation.values():
            yield computation, instruction
            if instruction.calls and instruction.code in ("fusion", "call", "async-start"):
                yield from self.inside(instruction.calls)


def shapes_in(text: str) -> list[Shape]:
    """The arrays named in a type."""
    return [
        Shape(found[1], tuple(int(size) for size in found[2].split(",") if size))
        for found in _SHAPE.finditer(text)
    ]


def _parsed(line: str) -> Instruction:
    root = line.startswith("ROOT ")
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    begin = rest.index("(")
    end = _closing(rest, begin)
    literal = rest[begin + 1 : end]
    operands = tuple(re.findall(r"%([\w.\-]+)", literal))
    return Instruction(name.lstrip("%"), kind, rest[:begin], operands, literal, rest[end + 1 :], root)


def _closing(text: str, begin: int) -> int:
    """The index of the parenthesis that closes the one at `begin`."""
    depth = 0
    for match in re.finditer(r"[()]", text[begin:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return begin + match.start()
    raise ValueError(f"no closing parenthesis: {text[:200]}")
