"""The order in which a run sees its samples.

The order is a pure function: position -> epoch and place -> sample, with a new permutation each epoch. So one number, the
position, says where a run is in its data, and the number of workers, devices or hosts may change when it resumes. Counted
from where the run began, row r of part a of step s has position ((s·A) + a)·B + r; each host reads adjacent rows.

No jax here: Grain's workers import this.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tsdsr_jax.data.record import Record, Source
from tsdsr_jax.errors import UserError

# How many samples are tried, starting at a bad one, before giving up.
TRIES = 16


@dataclasses.dataclass(frozen=True)
class SampleShapes:
    """The shapes of every record in a run; programs are compiled for one shape. None for parts that records lack."""

    lr: tuple[int, ...] | None
    hr: tuple[int, ...] | None
    latent_hr: tuple[int, ...] | None
    prompt: tuple[int, ...] | None
    pooled: tuple[int, ...] | None
    text_dtype: np.dtype | None

    @classmethod
    def of(cls, record: Record) -> SampleShapes:
        lr, hr, latent_hr, prompt, pooled = (None if part is None else part.shape for part in record)
        return cls(lr, hr, latent_hr, prompt, pooled, None if record.prompt is None else record.prompt.dtype)

    @classmethod
    def of_source(cls, source: Source) -> SampleShapes:
        """The shapes of the first sample that can be read."""
        return cls.of(first_sample(source)[1])

    def difference(self, record: Record) -> str:
        """How a record differs, in words; empty if it does not."""
        found = SampleShapes.of(record)
        for part, words in _PARTS.items():
            if getattr(found, part) != getattr(self, part):
                return f"its {words} has shape {getattr(found, part)}; the run's samples have {getattr(self, part)}"
        return ""

    def check(self, record: Record, source: Source, index: int) -> None:
        """Raises UserError, naming the sample and the first part that differs."""
        # The name last, because some sources have to read for it.
        if difference := self.difference(record):
            raise UserError(f"{source.name(index)}: {difference}")

    def cast(self, record: Record) -> Record:
        """The record with its embeddings in the run's dtype."""
        if record.prompt is None or record.pooled is None:
            return record
        prompt, pooled = (part.astype(self.text_dtype, copy=False) for part in (record.prompt, record.pooled))
        return record._replace(prompt=prompt, pooled=pooled)


_PARTS = {
    "lr": "degraded image",
    "hr": "image",
    "latent_hr": "HR latent",
    "prompt": "prompt embedding",
    "pooled": "pooled embedding",
}


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """The positions that a process reads for each step.

    Attributes:
      start: position of the first row of the first step.
      steps: number of steps to come.
      parts: A, gradient-accumulation parts per step.
      batch: B, rows per part, over all processes.
      process, processes: this process's index, and the number of processes that share the rows evenly.
    """

    start: int
    steps: int
    parts: int
    batch: int
    process: int = 0
    processes: int = 1

    @property
    def local(self) -> int:
        """Rows per part that this process reads."""
        return self.batch // self.processes

    def positions(self, step: int) -> np.ndarray:
        """(A, local) positions of a step; step 0 is the first to come."""
        part = self.start + (step * self.parts + np.arange(self.parts)) * self.batch
        return part[:, None] + self.process * self.local + np.arange(self.local)


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch, (count,).

    It uses a bit generator's raw output, which NumPy promises never to change, so that a run keeps its order when it resumes
    under another version.
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(keys, kind="stable")


def sample_at(position: int, seed: int, count: int) -> int:
    """The index of the sample at a position."""
    epoch, place = divmod(position, count)
    return int(permutation(seed, epoch, count)[place])


class LocalBatch(NamedTuple):
    """The samples of one step in this process.

    Attributes:
      records: all samples stacked; each part that exists is (A, local, ...).
      problems: name -> what is wrong, for samples that were left out.
    """

    records: Record
    problems: dict[str, str]


class Batches:
    """The steps to come, as a sequence for Grain; item k is the batch of step k.

    A sample that cannot be used is replaced by the next of its epoch, so that batches stay full and every process takes
    the same number of steps.

    Args:
      source: the samples.
      shapes: the shapes that each sample must have.
      rows: which positions to read.
      seed: seed of the order.
    """

    def __init__(self, source: Source, shapes: SampleShapes, rows: RowPlan, seed: int):
        self.source, self.shapes, self.rows, self.seed = source, shapes, rows, seed

    def __len__(self) -> int:
        return self.rows.steps

    def __getitem__(self, step: int) -> LocalBatch:
        if not 0 <= step < len(self):
            raise IndexError(step)
        positions = self.rows.positions(int(step))
        problems: dict[str, str] = {}
        records = [self.read(int(position), problems) for position in positions.ravel()]
        stacked = (
            None if leaves[0] is None else np.stack(leaves).reshape(*positions.shape, *leaves[0].shape)
            for leaves in zip(*records, strict=True)
        )
        return LocalBatch(Record(*stacked), problems)

    def read(self, position: int, problems: dict[str, str]) -> Record:
        """The sample at a position, or the next one that can be used.

        Raises:
          UserError: too many in a row cannot.
        """
        count = len(self.source)
        epoch, place = divmod(position, count)
        tries = min(TRIES, count)
        for offset in range(tries):
            index = sample_at(epoch * count + (place + offset) % count, self.seed, count)
            try:
                record = self.source.read(index, epoch)
                self.shapes.check(record, self.source, index)
            except UserError as error:
                problems[self.source.name(index)] = str(error)
            else:
                return self.shapes.cast(record)
        listed = "\n".join(f"  {problem}" for problem in list(problems.values())[-tries:])
        raise UserError(f"{tries} samples in a row cannot be used:\n{listed}")


def first_sample(source: Source, tries: int = TRIES) -> tuple[str, Record]:
    """The first sample that can be read, with its name.

    Raises:
      UserError: none of the first few samples can be read.
    """
    problems = []
    for index in range(min(tries, len(source))):
        try:
            return source.name(index), source.read(index)
        except UserError as error:
            problems.append(str(error))
    raise UserError("none of the first samples can be used:\n" + "\n".join(f"  {line}" for line in problems))


class BadSamples:
    """Counts the samples that this process has left out since it started, and stops the run if they are too many.

    Args:
      total: number of samples in the set.
      fraction: fraction of them that may be bad.
    """

    def __init__(self, total: int, fraction: float):
        self.total, self.fraction = total, fraction
        self.names: list[str] = []

    def add(self, problems: dict[str, str]) -> list[str]:
        """Adds a batch's problems; returns the messages of new ones.

        Raises:
          UserError: more than the allowed fraction is bad.
        """
        new = {name: message for name, message in problems.items() if name not in self.names}
        self.names += new
        if new and len(self.names) > self.fraction * self.total:
            latest = "".join(f"\n  {message}" for message in new.values())
            raise UserError(
                f"{len(self.names)} of {self.total} samples cannot be used, more than --max_bad_samples "
                f"{self.fraction:g} of them; the latest:{latest}"
            )
        return list(new.values())
