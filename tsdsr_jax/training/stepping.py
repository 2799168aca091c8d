"""A training step over a mesh: its state on the devices from the first step or a checkpoint on, and batches as they come."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from tsdsr_jax.data.batches import LocalBatch
from tsdsr_jax.data.record import Record
from tsdsr_jax.training.batch import Metrics
from tsdsr_jax.training.sharding import base_shardings, batch_sharding, global_array, replicated
from tsdsr_jax.training.step import Parts, Trainer, TrainState

# (state, base, batches, key) -> (state, metrics)
JittedStep = Callable[[TrainState, Any, Record, jax.Array], tuple[TrainState, Metrics]]


class Beginning(NamedTuple):
    """What a run begins from.

    Attributes:
      create: `loaded` -> the trained parts; pure.
      loaded: arrays on their devices, donated: a whole network would otherwise be there twice. They are an argument, so
        that they are no constants of a program. Where a checkpoint takes their place, their shapes are enough.
    """

    create: Callable[[Any], Parts]
    loaded: Any = ()


class Step:
    """A trainer's step on the devices of a mesh, bound to its frozen arrays and to the run's key.

    Args:
      trainer: what a step does.
      mesh: the devices.
      base: frozen arrays, in place.
      key: the run's key.
      beginning: what the state before the first step is made from.
      split: whether the mesh's fsdp axis shares the state, as it does a base; otherwise it is whole on every device.
    """

    def __init__(
        self,
        trainer: Trainer,
        mesh: Mesh,
        base: Any,
        key: jax.Array,
        beginning: Beginning,
        *,
        split: bool = False,
    ):
        self.base, self.key, self._loaded = base, key, beginning.loaded
        self._rows = batch_sharding(mesh, axis=1)

        def make(loaded: Any) -> TrainState:
            return trainer.init(beginning.create(loaded))

        self.shapes: TrainState = jax.eval_shape(make, beginning.loaded)
        whole = jax.tree.map(lambda leaf: replicated(mesh), self.shapes)
        self._shardings = base_shardings(self.shapes, mesh) if split else whole
        self._make = jax.jit(make, out_shardings=self._shardings, donate_argnums=0)
        self._step = jit_step(trainer, mesh, self._shardings)

    def new_state(self) -> TrainState:
        """The state before the first step; to be called once, because what was loaded is donated."""
        return self._make(self._loaded)

    def put_state(self, state: TrainState) -> TrainState:
        """A state of host arrays on its devices."""
        return jax.tree.map(lambda leaf, where: global_array(np.asarray(leaf), where), state, self._shardings)

    def put(self, batch: LocalBatch) -> Record:
        """This process's rows as its part of the global batch."""
        return batch.records.map(partial(jax.make_array_from_process_local_data, self._rows))

    def __call__(self, state: TrainState, batches: Record) -> tuple[TrainState, Metrics]:
        """One step; `state` is donated: it is gone afterwards."""
        return self._step(state, self.base, batches, self.key)


def jit_step(trainer: Trainer, mesh: Mesh, shardings: Any) -> JittedStep:
    """`trainer.step`, its state donated and kept under its shardings."""
    return jax.jit(trainer.step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
