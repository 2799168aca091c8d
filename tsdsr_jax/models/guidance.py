"""Text conditioning and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Predict = Callable[[jax.Array, jax.Array], jax.Array]


class Text(NamedTuple):
    """Text conditioning: states (B, S, D) and pooled vector (B, P)."""

    states: jax.Array
    pooled: jax.Array


def interleave(first: jax.Array, second: jax.Array) -> jax.Array:
    """Two (B, ...) arrays -> (2B, ...), with each sample's two values side by side.

    Concatenation would put the two on different devices, so every activation would have to move.
    """
    return jnp.stack([first, second], axis=1).reshape(2 * first.shape[0], *first.shape[1:])


def separate(both: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Undoes `interleave`."""
    pairs = both.reshape(-1, 2, *both.shape[1:])
    return pairs[:, 0], pairs[:, 1]


def guided(
    network: Callable[[jax.Array, jax.Array, Text], jax.Array],
    prompt: Text,
    null: Text,
    scale: float,
    split: bool = False,
) -> Predict:
    """Classifier-free guidance, v_null + scale·(v_prompt − v_null).

    Args:
      network: (latents, timesteps, text) -> velocities.
      prompt, null: texts of batch B or of a divisor of B; each is then repeated for neighboring samples, in the order
        of `interleave`.
      scale: guidance scale; at 1 only the prompt is evaluated.
      split: two evaluations of B instead of one of 2B; half the memory.
    """

    def predict(latents: jax.Array, timestep: jax.Array) -> jax.Array:
        batch = latents.shape[0]
        # jnp.repeat, not tile: the copies of a sample's text must be side by side, as its latents are.
        with_prompt, without = (
            Text(*(jnp.repeat(part, batch // part.shape[0], axis=0) for part in text))
            for text in (prompt, null)
        )
        if scale == 1:
            return network(latents, timestep, with_prompt)
        if split:
            v_null = network(latents, timestep, without)
            v_prompt = network(latents, timestep, with_prompt)
        else:
            both = Text(*map(interleave, without, with_prompt))
            v_null, v_prompt = separate(
                network(interleave(latents, latents), interleave(timestep, timestep), both)
            )
        return v_null + scale * (v_prompt - v_null)

    return predict
