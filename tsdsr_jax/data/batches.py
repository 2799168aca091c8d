"""Which samples each step sees, and reading them ahead of it with Grain.

The order is a pure function: position -> epoch and place -> sample, with a new permutation each epoch. A run's place in
its data is therefore one number, the position, whatever the number of workers, devices or hosts, and any of them may be
another after a resume. Row r of part a of step s is position ((s·A) + a)·B + r in every arrangement; hosts read
neighbouring rows.

No jax here: Grain's workers import this.
"""

from __future__ import annotations

import dataclasses
import gc
import signal
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import grain
import numpy as np

from tsdsr_jax.data.record import Record, Source
from tsdsr_jax.errors import UserError

# How many samples in place of a bad one are tried before giving up.
TRIES = 16
_READ_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class SampleShapes:
    """What every record of a run looks like: programs are compiled for one shape. None for parts that are not there."""

    lr: tuple[int, ...] | None
    hr: tuple[int, ...] | None
    latent_hr: tuple[int, ...] | None
    prompt: tuple[int, ...] | None
    pooled: tuple[int, ...] | None
    text_dtype: np.dtype | None

    @classmethod
    def of(cls, record: Record) -> SampleShapes:
        return cls(*record.map(np.shape), None if record.prompt is None else record.prompt.dtype)

    @classmethod
    def of_source(cls, source: Source) -> SampleShapes:
        """Of the first sample that can be read."""
        return cls.of(first_sample(source)[1])

    def difference(self, record: Record) -> str:
        """What is different about a record, in words; empty where nothing is."""
        found = SampleShapes.of(record)
        for part, words in _PARTS.items():
            if getattr(found, part) != getattr(self, part):
                return f"its {words} has shape {getattr(found, part)}; the run's samples have {getattr(self, part)}"
        return ""

    def check(self, record: Record, source: Source, index: int) -> None:
        """Raises UserError, naming the sample and the first part that differs."""
        # The name last: some sources have to read for it.
        if difference := self.difference(record):
            raise UserError(f"{source.name(index)}: {difference}")

    def cast(self, record: Record) -> Record:
        """The record with its texts in the run's dtype."""
        if record.prompt is None:
            return record
        texts = (text.astype(self.text_dtype, copy=False) for text in (record.prompt, record.pooled))
        return Record(record.lr, record.hr, record.latent_hr, *texts)


_PARTS = {
    "lr": "degraded image",
    "hr": "image",
    "latent_hr": "HR latent",
    "prompt": "prompt embedding",
    "pooled": "pooled embedding",
}


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Which positions a process reads for each of its batches.

    Attributes:
      start: position of the first row of the first step.
      steps: steps to come.
      parts: A, gradient-accumulation parts of a step.
      batch: B, rows of a part, of all processes together.
      process, processes: this one's index, and how many share the rows evenly.
    """

    start: int
    steps: int
    parts: int
    batch: int
    process: int = 0
    processes: int = 1

    @property
    def local(self) -> int:
        """Rows of a part that this process reads."""
        return self.batch // self.processes

    def positions(self, step: int) -> np.ndarray:
        """(A, local) positions of a step counted from the first to come."""
        part = self.start + (step * self.parts + np.arange(self.parts)) * self.batch
        return part[:, None] + self.process * self.local + np.arange(self.local)


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch, (count,).

    From a bit generator's raw output, which NumPy promises never to change, so that a run resumes in the same order
    under another version.
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(keys, kind="stable")


def sample_at(position: int, seed: int, count: int) -> int:
    """The sample at a position of the stream."""
    epoch, place = divmod(position, count)
    return int(permutation(seed, epoch, count)[place])


class LocalBatch(NamedTuple):
    """One step's samples of this process.

    Attributes:
      records: every part that is there (A, local, ...).
      problems: sample name -> what is wrong with it, for those that were left out.
    """

    records: Record
    problems: dict[str, str]


class Batches:
    """The steps to come as a sequence for Grain: item k is step k's samples, stacked.

    A sample that cannot be used is replaced by the next of its epoch, so that batches stay full and every process takes
    the same number of steps.

    Args:
      source: the samples.
      shapes: what each has to look like.
      rows: which positions to read.
      seed: of the order.
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
        """The sample at a position, or the nearest after it that can be used.

        Raises:
          UserError: many in a row cannot.
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
    """The first sample that can be read, with its name: it tells what all look like.

    Raises:
      UserError: none of the first few can.
    """
    problems = []
    for index in range(min(tries, len(source))):
        try:
            return source.name(index), source.read(index)
        except UserError as error:
            problems.append(str(error))
    raise UserError("none of the first samples can be used:\n" + "\n".join(f"  {line}" for line in problems))


def read_ahead(elements: Any, workers: int) -> Iterator[Any]:
    """The elements of a sequence in order, each made by a thread, or by worker processes.

    Args:
      elements: has `__len__` and `__getitem__`, and named tuples of arrays as elements; pickled for workers.
      workers: processes; 0: threads of this one.
    """
    dataset = grain.MapDataset.source(elements)  # pyrefly: ignore
    threads = 1 if workers else 4
    stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_READ_AHEAD))
    if workers:
        _mark_flags_parsed()
        options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers)
        stream = stream.mp_prefetch(options, worker_init_fn=_begin_worker)
    iterator = iter(stream)
    try:
        for element in iterator:
            # Copied out of the memory shared with a worker, which is then free for the next.
            yield _owned(element) if workers else element
    finally:
        # Or worker processes and the memory they share with this one would outlive it; Grain's references to the last
        # elements form cycles.
        iterator.close()
        del iterator, stream, dataset
        element = None
        gc.collect()


def _owned(element: Any) -> Any:
    """With copies of all arrays."""
    if isinstance(element, tuple):
        return type(element)(*map(_owned, element))
    return np.array(element) if isinstance(element, np.ndarray) else element


def _begin_worker(_worker: int, _workers: int) -> None:
    # Ctrl-C reaches every process of a terminal; the parent stops its workers itself, after saving.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Workers share the cores among themselves already.
    cv2.setNumThreads(1)


def _mark_flags_parsed() -> None:
    """Grain's workers are started through absl, which refuses to unless the process has parsed its flags by absl."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


class BadSamples:
    """The samples that this process has left out since it started; stops the run when they are too many.

    Args:
      total: samples in the set.
      fraction: share of them that may be bad.
    """

    def __init__(self, total: int, fraction: float):
        self.total, self.fraction = total, fraction
        self.names: list[str] = []

    def add(self, problems: dict[str, str]) -> list[str]:
        """Notes a batch's problems; returns the messages of those not seen before.

        Raises:
          UserError: more than the fraction is bad.
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
