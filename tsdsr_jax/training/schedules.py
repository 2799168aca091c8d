"""Learning-rate schedules, with the names and curves of diffusers' `get_scheduler`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

ScheduleName = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]
# step (int array, from 0) -> learning rate
RateSchedule = Callable[[jax.Array], jax.Array]

_POLYNOMIAL_END = 1e-7


def learning_rate(
    name: ScheduleName, peak: float, *, warmup: int, steps: int, cycles: int = 1, power: float = 1.0
) -> RateSchedule:
    """Returns the learning rate as a function of the optimizer step.

    All schedules except "constant" rise linearly from 0 over `warmup` steps, so the first update has a rate of 0.

    Args:
      name: the curve after the warmup.
      peak: the highest rate.
      warmup: number of warmup steps.
      steps: total number of steps.
      cycles: number of cycles of "cosine_with_restarts".
      power: exponent of "polynomial", which falls to 1e-7.

    Raises:
      ValueError: the name is unknown.
    """
    curves: dict[str, Callable[[jax.Array], jax.Array]] = {
        "constant": jnp.ones_like,
        "constant_with_warmup": jnp.ones_like,
        "linear": lambda progress: 1 - progress,
        "cosine": lambda progress: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
        "cosine_with_restarts": lambda progress: jnp.where(
            progress < 1, 0.5 * (1 + jnp.cos(jnp.pi * ((cycles * progress) % 1))), 0
        ),
        "polynomial": lambda progress: (
            ((peak - _POLYNOMIAL_END) * (1 - progress) ** power + _POLYNOMIAL_END) / (peak or 1.0)
        ),
    }
    if name not in curves:
        raise ValueError(f"learning-rate schedule {name!r}; known are {', '.join(curves)}")
    curve, warmup = curves[name], 0 if name == "constant" else warmup

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(1, steps - warmup), 0, 1)
        return peak * jnp.where(step < warmup, step / max(1, warmup), curve(progress))

    return schedule
