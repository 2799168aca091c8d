"""Runs training steps on a mesh: puts the state and each batch on the devices, and calls the jitted step."""

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
    """What a run trains from the start.

    Attributes:
      create: `loaded` -> the trained parts; pure.
      loaded: arrays on their devices. They are donated, because a whole network would otherwise be in memory twice, and
        passed as an argument, so that they do not become constants of a program. Shapes are enough for a resumed run.
    """

    create: Callable[[Any], Parts]
    loaded: Any = ()


class Step:
    """A trainer's step on the devices of a mesh, bound to its frozen arrays and the run's key.

    Args:
      trainer: defines the step.
      mesh: the devices.
      base: frozen arrays, already on the devices.
      key: the run's key.
      beginning: what the first state is made from.
      split: split the state over the mesh's fsdp axis, like a base; otherwise every device holds all of it.
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
        """Creates the state before the first step. Call it only once: it donates the loaded arrays."""
        return self._make(self._loaded)

    def put_state(self, state: TrainState) -> TrainState:
        """Puts a state of host arrays on the devices."""
        return jax.tree.map(lambda leaf, where: global_array(np.asarray(leaf), where), state, self._shardings)

    def put(self, batch: LocalBatch) -> Record:
        """Puts this process's rows on its devices, as its part of the global batch."""
        return batch.records.map(partial(jax.make_array_from_process_local_data, self._rows))

    def __call__(self, state: TrainState, batches: Record) -> tuple[TrainState, Metrics]:
        """Takes one step. `state` is donated and cannot be used afterwards."""
        return self._step(state, self.base, batches, self.key)


def jit_step(trainer: Trainer, mesh: Mesh, shardings: Any) -> JittedStep:
    """Jits `trainer.step`; the state is donated and keeps its shardings."""
    return jax.jit(trainer.step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
