"""The training step: student and auxiliary network updated in one pure function.

Both updates use the adapters from before the step, as in the original, so fusing them changes nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from tsdsr_jax.distillation.losses import Base, Batch, Losses, Student, draw
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

_HR_LATENTS = 2**31


class DistillState(NamedTuple):
    """Everything that changes while training, all of it float32 or int32.

    Attributes:
      step: steps taken, skipped ones included.
      bad_steps: skipped steps in a row.
      student, auxiliary: adapters.
      student_optimizer, auxiliary_optimizer: optax states.
      ema: moving average of the student, or {}.
      loss_scale: see `LossScale`.
    """

    step: jax.Array
    bad_steps: jax.Array
    student: Student
    auxiliary: Tree
    student_optimizer: Any
    auxiliary_optimizer: Any
    ema: Student | dict[str, Any]
    loss_scale: LossScale


class DistillTrainer:
    """The step for one objective; `step` is pure and meant to be jitted with its state donated.

    Args:
      losses: the objective.
      config: of the optimisers.
      dynamic_scale: scale the loss, for float16.
    """

    def __init__(self, losses: Losses, config: OptimizerConfig, *, dynamic_scale: bool = False):
        self.losses, self.config, self.dynamic_scale = losses, config, dynamic_scale
        self._rate = config.rate(config.learning_rate)
        self._student_optimizer = config.transformation(config.learning_rate)
        self._auxiliary_optimizer = config.transformation(config.learning_rate_auxiliary)

    def init(self, student: Student, auxiliary: Tree) -> DistillState:
        """The state before the first step; adapters become float32 masters."""
        student, auxiliary = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (student, auxiliary))
        return DistillState(
            step=jnp.int32(0),
            bad_steps=jnp.int32(0),
            student=student,
            auxiliary=auxiliary,
            student_optimizer=self._student_optimizer.init(student),
            auxiliary_optimizer=self._auxiliary_optimizer.init(auxiliary),
            # A copy: a buffer may be donated only once.
            ema=jax.tree.map(jnp.copy, student) if self.config.ema_decay is not None else {},
            loss_scale=LossScale.first(self.dynamic_scale),
        )

    def step(
        self, state: DistillState, base: Base, batches: Batch, key: jax.Array
    ) -> tuple[DistillState, Metrics]:
        """One optimiser step of both networks.

        Args:
          state: donate it.
          base: frozen parameters.
          batches: with a leading axis of gradient-accumulation parts, (A, B, ...) on every leaf; without HR latents they
            are encoded here.
          key: the run's key; the step number and the part are folded in.

        Returns:
          The new state and scalar metrics. Where a gradient or an update is not finite the adapters and optimisers stay
          as they are.
        """
        rate = self._rate(updates_done(state.student_optimizer))
        gradients, metrics = self._gradients(state, base, batches, jax.random.fold_in(key, state.step))
        student_norm, auxiliary_norm = (optax.global_norm(gradient) for gradient in gradients)
        student_updates, student_optimizer = self._student_optimizer.update(
            gradients[0], state.student_optimizer, state.student
        )
        auxiliary_updates, auxiliary_optimizer = self._auxiliary_optimizer.update(
            gradients[1], state.auxiliary_optimizer, state.auxiliary
        )
        # Of the updates, too: an optimiser can make NaN of finite gradients.
        update_norms = [optax.global_norm(updates) for updates in (student_updates, auxiliary_updates)]
        finite = jnp.isfinite(jnp.stack([student_norm, auxiliary_norm, *update_norms])).all()
        student = optax.apply_updates(state.student, student_updates)
        auxiliary = optax.apply_updates(state.auxiliary, auxiliary_updates)
        moved = (
            student,
            auxiliary,
            student_optimizer,
            auxiliary_optimizer,
            average(self.config.ema_decay, state.ema, student),
        )
        stayed = state.student, state.auxiliary, state.student_optimizer, state.auxiliary_optimizer, state.ema
        student, auxiliary, student_optimizer, auxiliary_optimizer, ema = kept_where(finite, moved, stayed)
        new_state = DistillState(
            step=state.step + 1,
            bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
            student=student,
            auxiliary=auxiliary,
            student_optimizer=student_optimizer,
            auxiliary_optimizer=auxiliary_optimizer,
            ema=ema,
            loss_scale=state.loss_scale.after(finite) if self.dynamic_scale else state.loss_scale,
        )
        norms = {
            "student_gradient_norm": student_norm,
            "auxiliary_gradient_norm": auxiliary_norm,
            "student_update_norm": jnp.where(finite, update_norms[0], 0),
            "student_norm": optax.global_norm(student),
            "learning_rate": rate,
            "bad_steps": new_state.bad_steps,
            "loss_scale": state.loss_scale.value,
        }
        return new_state, metrics | norms

    def _gradients(
        self, state: DistillState, base: Base, batches: Batch, key: jax.Array
    ) -> tuple[tuple[Student, Tree], Metrics]:
        """Mean gradients and metrics over the accumulation parts."""

        def of_part(part: jax.Array):
            batch = jax.tree.map(lambda leaf: leaf[part], batches)
            return self._part_gradients(state, base, batch, jax.random.fold_in(key, part))

        return accumulated(of_part, batches.lr.shape[0])

    def _part_gradients(
        self, state: DistillState, base: Base, batch: Batch, key: jax.Array
    ) -> tuple[tuple[Student, Tree], Metrics]:
        # `draw` splits the key; a large number folded in is none of its parts.
        batch = self.losses.with_latents(base, batch, jax.random.fold_in(key, _HR_LATENTS))
        draws = draw(key, batch.latent_hr.shape, self.losses.config)
        scale = state.loss_scale.value

        def student_loss(student: Student):
            loss, extra = self.losses.student(student, base, state.auxiliary, batch, draws)
            return loss * scale, extra

        def auxiliary_loss(auxiliary: Tree, fake: jax.Array):
            return self.losses.auxiliary(auxiliary, base, fake, batch, draws) * scale

        (total, (fake, metrics)), student = jax.value_and_grad(student_loss, has_aux=True)(state.student)
        value, auxiliary = jax.value_and_grad(auxiliary_loss)(state.auxiliary, fake)
        metrics = metrics | {"student": total / scale, "auxiliary": value / scale}
        return jax.tree.map(lambda gradient: gradient / scale, (student, auxiliary)), metrics
