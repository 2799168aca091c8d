"""The training step of a single network with a single loss: the teacher, or an autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tsdsr_jax.models.params import Tree
from tsdsr_jax.training.batch import Metrics
from tsdsr_jax.training.optimizer import (
    LossScale,
    OptimizerConfig,
    accumulated,
    average,
    kept_where,
    updates_done,
)
from tsdsr_jax.training.sharding import base_shardings, replicated

# (what is trained, frozen arrays, batch, key) -> (loss, metrics); pure.
Objective = Callable[[Tree, Any, Any, jax.Array], tuple[jax.Array, Metrics]]


class TrainState(NamedTuple):
    """Everything that changes while training, all of it float32 or int32.

    Attributes:
      step: steps taken, skipped ones included.
      bad_steps: skipped steps in a row.
      trained: parameters: an adapter's or a network's.
      optimizer: optax state.
      ema: moving average of what is trained, or {}.
      loss_scale: see `LossScale`.
    """

    step: jax.Array
    bad_steps: jax.Array
    trained: Tree
    optimizer: Any
    ema: Tree
    loss_scale: LossScale


class Trainer:
    """`step` is pure and meant to be jitted with its state donated.

    Args:
      objective: the loss, and what else to log.
      config: of the optimiser.
      dynamic_scale: scale the loss, for float16.
    """

    def __init__(self, objective: Objective, config: OptimizerConfig, *, dynamic_scale: bool = False):
        self.objective, self.config, self.dynamic_scale = objective, config, dynamic_scale
        self._rate = config.rate(config.learning_rate)
        self._optimizer = config.transformation(config.learning_rate)

    def init(self, trained: Tree) -> TrainState:
        """The state before the first step; what is trained becomes float32 masters."""
        trained = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), trained)
        return TrainState(
            step=jnp.int32(0),
            bad_steps=jnp.int32(0),
            trained=trained,
            optimizer=self._optimizer.init(trained),
            # A copy: a buffer may be donated only once.
            ema=jax.tree.map(jnp.copy, trained) if self.config.ema_decay is not None else {},
            loss_scale=LossScale.first(self.dynamic_scale),
        )

    def prepared(
        self, create: Callable[[Tree], Tree], loaded: Tree, mesh: Mesh, *, split: bool
    ) -> tuple[Callable[[], TrainState], Any]:
        """What makes the state before the first step, once, and where its leaves go.

        Args:
          create: `loaded` -> what is trained; pure.
          loaded: arrays, donated: a whole network would otherwise be there twice. Or their shapes, where a checkpoint takes
            the new state's place.
          mesh: the devices.
          split: whether the mesh's fsdp axis shares the leaves, as it does a base's.
        """

        def make(loaded: Tree) -> TrainState:
            return self.init(create(loaded))

        shapes = jax.eval_shape(make, loaded)
        whole = jax.tree.map(lambda leaf: replicated(mesh), shapes)
        shardings = base_shardings(shapes, mesh) if split else whole
        return partial(jax.jit(make, out_shardings=shardings, donate_argnums=0), loaded), shardings

    def step(self, state: TrainState, base: Any, batches: Any, key: jax.Array) -> tuple[TrainState, Metrics]:
        """One optimiser step.

        Args:
          state: donate it.
          base: what is frozen.
          batches: with a leading axis of gradient-accumulation parts, (A, B, ...) on every leaf.
          key: the run's key; the step number and the part are folded in.

        Returns:
          The new state, and the objective's metrics with the step's own. Where a gradient or an update is not finite only
          the counters and the loss scale change.
        """
        rate = self._rate(updates_done(state.optimizer))
        key = jax.random.fold_in(key, state.step)
        parts = jax.tree.leaves(batches)[0].shape[0]

        def of_part(part: jax.Array) -> tuple[Metrics, Tree]:
            batch = jax.tree.map(lambda leaf: leaf[part], batches)
            return self._gradient(state, base, batch, jax.random.fold_in(key, part))

        metrics, gradient = accumulated(of_part, parts)
        gradient_norm = optax.global_norm(gradient)
        # A branch, not a choice between two results: those would both be there, a network's moments among them.
        trained, optimizer, ema, update_norm = jax.lax.cond(
            jnp.isfinite(gradient_norm), self._update, _keep, state, gradient
        )
        finite = jnp.isfinite(gradient_norm) & jnp.isfinite(update_norm)
        scale = state.loss_scale.after(finite) if self.dynamic_scale else state.loss_scale
        bad_steps = jnp.where(finite, 0, state.bad_steps + 1)
        metrics = metrics | {
            "gradient_norm": gradient_norm,
            "update_norm": jnp.where(finite, update_norm, 0),
            "norm": optax.global_norm(trained),
            "learning_rate": rate,
            "bad_steps": bad_steps,
            "loss_scale": state.loss_scale.value,
        }
        return TrainState(state.step + 1, bad_steps, trained, optimizer, ema, scale), metrics

    def _update(self, state: TrainState, gradient: Tree) -> tuple[Tree, Any, Tree, jax.Array]:
        """The state after the optimiser, unless that made NaN of a finite gradient; and the norm that tells."""
        updates, optimizer = self._optimizer.update(gradient, state.optimizer, state.trained)
        update_norm = optax.global_norm(updates)
        if self.config.optimizer == "adamw" and jax.default_backend() != "cpu":
            # AdamW's updates are cheap. Computed again once their norm is known, they need not be kept until then, which
            # would take three quarters of the network's memory on a GPU.
            (state, gradient), update_norm = jax.lax.optimization_barrier(((state, gradient), update_norm))
            updates, optimizer = self._optimizer.update(gradient, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        moved = trained, optimizer, average(self.config.ema_decay, state.ema, trained)
        *kept, _ = _keep(state, gradient)
        return *kept_where(jnp.isfinite(update_norm), moved, tuple(kept)), update_norm

    def _gradient(self, state: TrainState, base: Any, batch: Any, key: jax.Array) -> tuple[Metrics, Tree]:
        scale = state.loss_scale.value

        def scaled(trained: Tree) -> tuple[jax.Array, Metrics]:
            value, metrics = self.objective(trained, base, batch, key)
            return value * scale, metrics

        (_, metrics), gradient = jax.value_and_grad(scaled, has_aux=True)(state.trained)
        return metrics, jax.tree.map(lambda leaf: leaf / scale, gradient)


def _keep(state: TrainState, gradient: Tree) -> tuple[Tree, Any, Tree, jax.Array]:
    return state.trained, state.optimizer, state.ema, jnp.zeros(())
