"""An evaluation that several processes share: each leaves its part in a file beside the logs; who comes last joins them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tsdsr_jax.atomic import replacing
from tsdsr_jax.evaluation.measure import FilePair, Measured

# Measurements by the method's name.
_Found = Mapping[str, Measured]


@dataclasses.dataclass(frozen=True)
class SharedEvaluation:
    """The files of an evaluation's parts.

    Attributes:
      folder, name: where the logs are, and what they are called.
      of: number of parts.
      pairs: method -> all of its pairs.
      metrics: names of the metrics.
    """

    folder: Path
    name: str
    of: int
    pairs: Mapping[str, Sequence[FilePair]]
    metrics: Sequence[str]

    def share(self, method: str, index: int) -> Sequence[FilePair]:
        """The pairs that a part measures."""
        return self.pairs[method][index :: self.of]

    def write(self, index: int, found: _Found) -> None:
        """Leaves what a part has measured."""
        content = {
            "of": self._identity(),
            "methods": {
                method: {"values": measured.values, "problems": measured.problems, "notes": measured.notes}
                for method, measured in found.items()
            },
        }
        with replacing(self._file(index)) as temporary:
            temporary.write_text(json.dumps(content))

    def joined(self) -> dict[str, Measured] | None:
        """All measurements, still without metrics of folders; None while parts are missing.

        A file that an evaluation of other pictures or metrics has left counts as missing.
        """
        contents = [self._read(index) for index in range(self.of)]
        if not all(contents):
            return None
        found = {}
        for method, pairs in self.pairs.items():
            parts = [content[method] for content in contents if content]
            values = {name: figures for part in parts for name, figures in part["values"].items()}
            found[method] = Measured(
                pairs=[pair for pair in pairs if pair.name in values],
                values=values,
                problems=[line for part in parts for line in part["problems"]],
                notes=[line for part in parts for line in part["notes"]],
            )
        return found

    def remove(self) -> None:
        for index in range(self.of):
            self._file(index).unlink(missing_ok=True)

    def _file(self, index: int) -> Path:
        return self.folder / f"{self.name}.part-{index}-of-{self.of}.json"

    def _read(self, index: int) -> dict[str, Any] | None:
        with suppress(OSError, ValueError):
            content = json.loads(self._file(index).read_text())
            if content["of"] == self._identity():
                return content["methods"]
        return None

    def _identity(self) -> str:
        """A hash of the metrics and of every file's name, size and time."""
        digest = hashlib.sha256(json.dumps([*self.metrics]).encode())
        for method, pairs in self.pairs.items():
            digest.update(method.encode("utf-8", "backslashreplace"))
            for pair in pairs:
                stats = [path.stat() for path in (pair.result, pair.reference) if path]
                text = [pair.name, *((stat.st_size, stat.st_mtime_ns) for stat in stats)]
                digest.update(json.dumps(text).encode())
        return digest.hexdigest()
