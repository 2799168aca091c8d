"""Reads samples ahead of training, in threads or in worker processes.

Workers send arrays through pipes. Shared memory would save no time (25 MB: 50 ms through a pipe, 54 ms through shared
memory), containers often have only 64 MB of it, and a killed process would leave it behind.

No jax here: Grain's workers import this.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

import cv2
import grain

from tsdsr_jax.errors import UserError

_READ_AHEAD = 4


def read_ahead(elements: Any, workers: int) -> Generator[Any]:
    """Yields the elements of a sequence in order; threads or worker processes make them ahead.

    Args:
      elements: has `__len__` and `__getitem__`. It is pickled for workers.
      workers: number of processes; 0: threads of this one.

    Raises:
      UserError: workers cannot be started, or one of them was killed.
    """
    dataset = grain.MapDataset.source(elements)
    threads = 1 if workers else 4
    stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_READ_AHEAD))
    if workers:
        _mark_flags_parsed()
        no_shared_memory = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        stream = grain.experimental.WithOptionsIterDataset(stream, no_shared_memory)
        options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers)
        stream = stream.mp_prefetch(options, worker_init_fn=_begin_worker)
    with _explained_failures(workers):
        iterator = iter(stream)
        try:
            yield from iterator
        finally:
            # Without this, worker processes would outlive it: Grain keeps the last elements in reference cycles.
            iterator.close()
            del iterator, stream, dataset
            gc.collect()


@contextmanager
def _explained_failures(workers: int) -> Iterator[None]:
    """Turns failures of the workers themselves into a UserError; errors of samples pass."""
    given = f"--dataloader_num_workers {workers}"
    try:
        yield
    except OSError as error:
        if not workers or error.filename is not None:  # a sample's file
            raise
        raise UserError(
            f"{given}: worker processes cannot be started ({error.strerror}). They need a few small files in /dev/shm: "
            "make room there, or pass --dataloader_num_workers 0"
        ) from None
    except RuntimeError as error:
        ended = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
        if not ended:
            raise
        raise UserError(
            f"{given}: {_ending(int(ended[1]))}; pass fewer workers, or --dataloader_num_workers 0"
        ) from None


def _ending(status: int) -> str:
    """How a worker ended, in words."""
    if status >= 0:
        return f"a worker process ended with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    reason = " (memory may have run out)" if -status == signal.SIGKILL else ""
    return f"a worker process was ended by {name}{reason}"


def _begin_worker(_worker: int, _workers: int) -> None:
    # Ctrl-C reaches every process in a terminal; the parent stops its workers after saving.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    # The workers already use all cores.
    cv2.setNumThreads(1)


def _end_with_parent() -> None:
    """Waits until the parent has ended, however it did, and ends this process, which would wait for it forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _mark_flags_parsed() -> None:
    """Marks absl's flags as parsed, because absl starts Grain's workers only in a process that has parsed them."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
