"""The parts of a training step: optimizers, float16's loss scale, gradient accumulation and the moving average."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from tsdsr_jax.models.params import Tree
from tsdsr_jax.training.schedules import RateSchedule, ScheduleName, learning_rate
from tsdsr_jax.training.sharding import global_array

Optimizer = Literal["adamw", "muon"]

# Root mean square of Muon's updates, relative to the learning rate. AdamW's is about the same, so the same learning rates
# suit both (Liu et al. 2025, "Muon is Scalable for LLM Training", §2.2).
MUON_RMS = 0.2
MATRICES = ("kernel", "a", "b")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of an optimizer, except its peak learning rate. The defaults are those of the published run.

    Attributes:
      optimizer: "adamw"; or "muon": Muon (momentum 0.95) for all kernels, AdamW with Nesterov momentum for the rest.
      schedule, warmup, steps, cycles, power: see `schedules.learning_rate`; steps are optimizer steps.
      max_grad_norm: global norm that gradients are clipped to; the student's norm covers both of its adapters.
      beta1, beta2, epsilon, weight_decay: AdamW's.
      ema_decay: decay of the exponential moving average; None keeps no average.
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
        """Returns the schedule: optimizer step -> learning rate."""
        return learning_rate(
            self.schedule, peak, warmup=self.warmup, steps=self.steps, cycles=self.cycles, power=self.power
        )

    def transformation(self, peak: float) -> optax.GradientTransformation:
        """Returns gradient clipping followed by the optimizer with this peak learning rate."""
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
    """Tells Muon which axes of each kernel form a matrix; None for biases, scales and tables, which AdamW trains.

    A dense kernel is (in, out), stacked layers' are (layers, in, out), a convolution's is (h, w, in, out), with h and w
    counted as inputs. An adapter's two halves are shaped like the kernels they adapt.
    """

    def axes(path: tuple[Any, ...], leaf: jax.Array) -> MuonDimensionNumbers | None:
        # By name, because a stack of biases, (layers, features), looks like a matrix.
        if path[-1].key not in MATRICES:
            return None
        inputs = (leaf.ndim - 2,) if leaf.ndim < 4 else tuple(range(leaf.ndim - 1))
        return MuonDimensionNumbers(inputs, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


class LossScale(NamedTuple):
    """The dynamic loss scale of float16 training; 1 in other precisions.

    Without it, gradients of the TSD loss would lie below float16's smallest normal number. The scale doubles after
    `GROWTH_STEPS` good steps. When gradients overflow, it halves and the step is skipped.
    """

    value: jax.Array
    good_steps: jax.Array

    @classmethod
    def first(cls, dynamic: bool) -> LossScale:
        return cls(jnp.float32(INITIAL_SCALE if dynamic else 1), jnp.int32(0))

    def after(self, finite: jax.Array) -> LossScale:
        """Returns the next step's scale, given whether this step's gradients were finite."""
        grown = self.good_steps + 1 >= GROWTH_STEPS
        value = jnp.where(finite, jnp.where(grown, self.value * 2, self.value), self.value / 2)
        return LossScale(value, jnp.where(finite & ~grown, self.good_steps + 1, 0))


INITIAL_SCALE, GROWTH_STEPS = 65536.0, 2000


def accumulated(of_batch: Callable[[jax.Array], Any], count: int) -> Any:
    """Averages the tree `of_batch(index)` over `count` gradient-accumulation steps."""
    if count == 1:
        return of_batch(jnp.int32(0))
    shapes = jax.eval_shape(of_batch, jnp.int32(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total = jax.lax.fori_loop(
        0, count, lambda index, sums: jax.tree.map(jnp.add, sums, of_batch(index)), zeros
    )
    return jax.tree.map(lambda leaf: leaf / count, total)


def updates_done(optimizer_state: Any) -> jax.Array:
    """Returns Adam's own step count, which does not count skipped steps."""
    return optax.tree_utils.tree_get(optimizer_state, "ScaleByAdamState").count


def average(decay: float, ema: Any, new: Any) -> Any:
    """Updates the exponential moving average."""
    return jax.tree.map(lambda mean, now: decay * mean + (1 - decay) * now, ema, new)


def kept_where(finite: jax.Array, new: Any, old: Any) -> Any:
    """Returns the new tree if the step was finite, otherwise the old one."""
    return jax.tree.map(lambda moved, stayed: jnp.where(finite, moved, stayed), new, old)


def with_new_scale(state: Any, dynamic: bool) -> Any:
    """Resets the loss scale of a state, to continue training in another precision."""
    fresh = LossScale.first(dynamic)
    placed = jax.tree.map(
        lambda new, old: global_array(np.asarray(new), old.sharding), fresh, state.loss_scale
    )
    return state._replace(loss_scale=placed)
