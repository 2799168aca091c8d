"""A training step over a mesh: jitted with its state donated, and what carries samples and states to the devices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tsdsr_jax.data.batches import LocalBatch
from tsdsr_jax.training.batch import Metrics, Samples, to_samples
from tsdsr_jax.training.sharding import batch_sharding, global_array, replicated

# (state, base, samples, key) -> (state, metrics)
JittedStep = Callable[[Any, Any, Samples, jax.Array], tuple[Any, Metrics]]


def jitted(step: JittedStep, mesh: Mesh, shardings: Any = None) -> JittedStep:
    """`step` with its state donated.

    Args:
      step: pure.
      mesh: the devices.
      shardings: of the state's leaves; None: whole on every device.
    """
    whole = replicated(mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings or whole, whole))


class Step:
    """A jitted step with what stays the same from step to step.

    Args:
      step: see `jitted`.
      mesh: the devices.
      base: frozen arrays, in place.
      key: the run's key.
      shardings: of the state's leaves; None: whole on every device.
    """

    def __init__(self, step: JittedStep, mesh: Mesh, base: Any, key: jax.Array, shardings: Any = None):
        self.mesh, self.base, self.key, self.shardings = mesh, base, key, shardings
        self._rows = batch_sharding(mesh, axis=1)
        self._step = step

    def put_state(self, state: Any) -> Any:
        """A state of host arrays on its devices."""
        shardings = self.shardings or jax.tree.map(lambda leaf: replicated(self.mesh), state)
        return jax.tree.map(lambda leaf, where: global_array(np.asarray(leaf), where), state, shardings)

    def put(self, batch: LocalBatch) -> Samples:
        """This process's rows as its part of the global batch."""
        place = partial(jax.make_array_from_process_local_data, self._rows)
        return to_samples(batch.records.map(place))

    def __call__(self, state: Any, samples: Samples) -> tuple[Any, Metrics]:
        """`state` is donated: it is gone afterwards."""
        return self._step(state, self.base, samples, self.key)
