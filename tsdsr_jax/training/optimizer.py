"""Optimizers, the loss scale of float16, gradient accumulation and the moving average: what a training step is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from tsdsr_jax.models.params import Tree
from tsdsr_jax.training.schedules import RateSchedule, ScheduleName, learning_rate

Optimizer = Literal["adamw", "muon"]

# Root mean square of Muon's updates over the learning rate: AdamW's is about this, so that the same rates suit both
# (Liu et al. 2025, "Muon is Scalable for LLM Training", §2.2).
MUON_RMS = 0.2
MATRICES = ("kernel", "a", "b")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer but for its peak learning rate; defaults of the published run.

    Attributes:
      optimizer: AdamW; or Muon, of momentum 0.95, for all kernels, and AdamW with Nesterov's momentum for the rest.
      schedule, warmup, steps, cycles, power: see `schedules.learning_rate`; steps are optimizer steps.
      max_grad_norm: global norm that gradients are clipped to; the student's is over both of its adapters.
      beta1, beta2, epsilon, weight_decay: AdamW's.
      ema_decay: of the exponential moving average; None: none is kept.
    """

    optimizer: Optimizer = "adamw"
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

    def rate(self, peak: float) -> RateSchedule:
        """Optimizer step -> learning rate."""
        return learning_rate(
            self.schedule, peak, warmup=self.warmup, steps=self.steps, cycles=self.cycles, power=self.power
        )

    def transformation(self, peak: float) -> optax.GradientTransformation:
        """The gradient clip and the optimizer with that peak learning rate."""
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

    def axes(path: tuple[Any, ...], leaf: jax.Array) -> MuonDimensionNumbers | None:
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


def accumulated(of_batch: Callable[[jax.Array], Any], count: int) -> Any:
    """The mean over `count` gradient-accumulation steps of the tree that `of_batch` gives for each step's index."""
    if count == 1:
        return of_batch(jnp.int32(0))
    shapes = jax.eval_shape(of_batch, jnp.int32(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total = jax.lax.fori_loop(
        0, count, lambda index, sums: jax.tree.map(jnp.add, sums, of_batch(index)), zeros
    )
    return jax.tree.map(lambda leaf: leaf / count, total)


def updates_done(optimizer_state: Any) -> jax.Array:
    """Adam's own count, in which skipped steps have no part."""
    return optax.tree_utils.tree_get(optimizer_state, "ScaleByAdamState").count


def average(decay: float, ema: Any, new: Any) -> Any:
    """The exponential moving average after a step."""
    return jax.tree.map(lambda mean, now: decay * mean + (1 - decay) * now, ema, new)


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
