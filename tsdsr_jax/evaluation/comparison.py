"""What a report shows: pictures to compare, with their values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Layer:
    """One picture of an entry, such as the input, a method's result or the reference."""

    title: str
    path: Path


@dataclass(frozen=True)
class Column:
    """A value that every entry may have.

    Attributes:
      name: its key in `Comparison.values`. In "method · PSNR", the part before the dot becomes a column of the card's table.
      better: which values are better; None: unknown.
      decimals: number of decimals shown.
    """

    name: str
    better: Literal["higher", "lower"] | None
    decimals: int = 4


@dataclass(frozen=True)
class Comparison:
    """One entry of the report, shown as a card.

    Attributes:
      name: unique, because links to an open image contain it.
      layers: the viewer starts with the first on the left and the second on the right, scaled to one size.
      values: column's name -> value; None or NaN if there is none.
      facts: other facts to show, such as {"size": "128×128 → 512×512"}.
    """

    name: str
    layers: tuple[Layer, ...]
    values: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """A table of texts; the first cell of each row is its heading."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
