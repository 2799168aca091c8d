"""The training step: student and auxiliary network updated in one pure function.

Both updates use the adapters from before the step, as in the original, so fusing them changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from tsdsr_jax.objective import Base, Batch, Losses, Metrics, Student, draw
from tsdsr_jax.schedules import Schedule, ScheduleName, learning_rate
from tsdsr_jax.torch_weights import Tree

Optimizer = Literal["adamw", "muon"]

# Root mean square of Muon's updates over the learning rate: AdamW's is about this, so that the same rates suit both
# (Liu et al. 2025, "Muon is Scalable for LLM Training", §2.2).
MUON_RMS = 0.2
MATRICES = ("kernel", "a", "b")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Two optimisers, each with a gradient clip of its own; defaults of the published run.

    Attributes:
      optimizer: AdamW; or Muon, of momentum 0.95, for all kernels, and AdamW with Nesterov's momentum for the rest.
      learning_rate, learning_rate_auxiliary: peaks of the student's and the auxiliary network's schedules.
      schedule, warmup, steps, cycles, power: see `schedules.learning_rate`; steps are optimiser steps.
      max_grad_norm: global norm that gradients are clipped to; the student's is over both of its adapters.
      beta1, beta2, epsilon, weight_decay: AdamW's.
      ema_decay: of an exponential moving average of the student; None: none is kept.
    """

    optimizer: Optimizer = "adamw"
    learning_rate: float = 5e-6
    learning_rate_auxiliary: float = 1e-6
    schedule: ScheduleName = "cosine_with_restarts"
    warmup: int = 3000
    steps: int = 200_000
    cycles: int = 1
    power: float = 1.0
    max_grad_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    ema_decay: float | None = None

    def rate(self, peak: float) -> Schedule:
        return learning_rate(
            self.schedule, peak, warmup=self.warmup, steps=self.steps, cycles=self.cycles, power=self.power
        )

    def transformation(self, peak: float) -> optax.GradientTransformation:
        rate = self.rate(peak)
        if self.optimizer == "adamw":
            update = optax.adamw(rate, self.beta1, self.beta2, self.epsilon, weight_decay=self.weight_decay)
        else:
            update = optax.contrib.muon(
                rate,
                weight_decay=self.weight_decay,
                adam_b1=self.beta1,
                adam_b2=self.beta2,
                adam_weight_decay=self.weight_decay,
                adam_learning_rate=rate,
                muon_weight_dimension_numbers=matrices,
                consistent_rms=MUON_RMS,
            )
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), update)


def matrices(params: Tree) -> Tree:
    """Which axes Muon takes each kernel's matrix from; None, AdamW's, for biases, scales and tables.

    A dense kernel is (in, out), a stack of layers' (layers, in, out), a convolution's (h, w, in, out): its taps are inputs.
    An adapter's halves are like the kernels they adapt.
    """

    def axes(path: jax.tree_util.KeyPath, leaf: jax.Array) -> MuonDimensionNumbers | None:
        # By name: a stack of biases, (layers, features), looks like a matrix.
        if path[-1].key not in MATRICES:
            return None
        inputs = (leaf.ndim - 2,) if leaf.ndim < 4 else tuple(range(leaf.ndim - 1))
        return MuonDimensionNumbers(inputs, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


class LossScale(NamedTuple):
    """Dynamic loss scale of float16 training; stays at 1 otherwise.

    Gradients of the TSD loss lie below float16's smallest normal number. The scale doubles after `GROWTH_STEPS` good
    steps and halves when gradients overflow, and that step is skipped.
    """

    value: jax.Array
    good_steps: jax.Array

    @classmethod
    def first(cls, dynamic: bool) -> LossScale:
        return cls(jnp.float32(INITIAL_SCALE if dynamic else 1), jnp.int32(0))

    def after(self, finite: jax.Array) -> LossScale:
        """The next step's dynamic scale, where this one's gradients were finite or not."""
        grown = self.good_steps + 1 >= GROWTH_STEPS
        value = jnp.where(finite, jnp.where(grown, self.value * 2, self.value), self.value / 2)
        return LossScale(value, jnp.where(finite & ~grown, self.good_steps + 1, 0))


INITIAL_SCALE, GROWTH_STEPS = 65536.0, 2000
_HR_LATENTS = 2**31


class TrainState(NamedTuple):
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


class Trainer:
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

    def init(self, student: Student, auxiliary: Tree) -> TrainState:
        """The state before the first step; adapters become float32 masters."""
        student, auxiliary = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (student, auxiliary))
        return TrainState(
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
        self, state: TrainState, base: Base, batches: Batch, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
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
        new_state = TrainState(
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
        self, state: TrainState, base: Base, batches: Batch, key: jax.Array
    ) -> tuple[tuple[Student, Tree], Metrics]:
        """Mean gradients and metrics over the accumulation parts."""

        def of_part(part: jax.Array):
            batch = jax.tree.map(lambda leaf: leaf[part], batches)
            return self._part_gradients(state, base, batch, jax.random.fold_in(key, part))

        return accumulated(of_part, batches.lr.shape[0])

    def _part_gradients(
        self, state: TrainState, base: Base, batch: Batch, key: jax.Array
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


def accumulated(of_part: Callable[[jax.Array], Any], parts: int) -> Any:
    """The mean over gradient-accumulation parts of a tree that `of_part` gives for each part's number."""
    if parts == 1:
        return of_part(jnp.int32(0))
    shapes = jax.eval_shape(of_part, jnp.int32(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total = jax.lax.fori_loop(0, parts, lambda part, sums: jax.tree.map(jnp.add, sums, of_part(part)), zeros)
    return jax.tree.map(lambda leaf: leaf / parts, total)


def updates_done(optimizer_state: Any) -> jax.Array:
    """Adam's own count, in which skipped steps have no part."""
    return optax.tree_utils.tree_get(optimizer_state, "ScaleByAdamState").count


def average(decay: float | None, ema: Any, new: Any) -> Any:
    """The moving average after a step; as it is without a decay."""
    return (
        ema if decay is None else jax.tree.map(lambda mean, now: decay * mean + (1 - decay) * now, ema, new)
    )


def kept_where(finite: jax.Array, new: Any, old: Any) -> Any:
    """The new tree after a good step, the old one after a bad."""
    return jax.tree.map(lambda moved, stayed: jnp.where(finite, moved, stayed), new, old)


def with_new_scale(state: Any, dynamic: bool) -> Any:
    """A state of host arrays with the loss scale that training in another precision starts with."""
    value = INITIAL_SCALE if dynamic else 1
    scale = LossScale(
        jnp.full_like(state.loss_scale.value, value), jnp.zeros_like(state.loss_scale.good_steps)
    )
    return state._replace(loss_scale=scale)
