"""Target Score Distillation: the paper's losses, as functions of predictions, latents and random draws.

Nothing here depends on a particular network, device or file. A `Predict` is a velocity network with a fixed text:
(noisy latents (B, h, w, C), timesteps (B,)) -> velocities of the same shape. Every random draw is an argument.

Symbols: ẑ is the student's clean latent, z the high-resolution photograph's, v_ψ the teacher, v_φ the auxiliary ("fake
score") network, σ a noise level, n a point of the trajectory.
Source: Dong et al. 2025, §3.2 (target score matching) and §3.3 (distribution-aware sampling).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from tsdsr_jax.models.flow import STEPS, add_noise, euler_step, per_sample, timesteps, to_clean
from tsdsr_jax.models.guidance import Predict, interleave, separate

# Terms of the gradient are clipped to this value. Real ones are far smaller: velocities are of size 1 to 10, and guidance
# multiplies their differences by 7.5. The original clips to float16's maximum, 65504. Multiplied by
# the loss scale, that would overflow float16's backward pass, and one bad value would cost the whole step.
LARGEST_TERM = 1024.0

Weighting = Literal["logit_normal", "sigma_sqrt", "mode"]


@dataclasses.dataclass(frozen=True)
class TSDConfig:
    """The paper's constants.

    Attributes:
      balance: λ, the share of variational score distillation; the rest is target score matching.
      point_weights: γ of each trajectory point; with a single point there is no DASM.
      stride: schedule steps between points.
      first_index, last_index: range of the drawn schedule index, inclusive.
    """

    balance: float = 0.7
    point_weights: tuple[float, ...] = (1.0, 0.3, 0.3, 0.3)
    stride: int = 50
    first_index: int = 50
    last_index: int = 949

    def without_dasm(self) -> TSDConfig:
        return dataclasses.replace(self, point_weights=self.point_weights[:1])


def trajectory(index: jax.Array, bias: jax.Array, points: int, stride: int) -> jax.Array:
    """Returns the schedule indices of each sample's trajectory, (B, points + 1) int32.

    They are evenly spaced from `index` (B,) to index + stride·points + bias, but not past the end of the schedule, and
    truncated to integers.
    """
    last = jnp.minimum(index + stride * points + bias, STEPS - 1)
    steps = jnp.arange(points + 1, dtype=jnp.int32)
    return index[:, None] + (last - index)[:, None] * steps // points


_Pair = tuple[jax.Array, jax.Array]


def tsd_gradient(
    fake: jax.Array,
    real: jax.Array,
    noise: jax.Array,
    index: jax.Array,
    bias: jax.Array,
    teacher: Predict,
    auxiliary: Predict,
    schedule: jax.Array,
    config: TSDConfig,
) -> tuple[jax.Array, jax.Array]:
    """Computes the gradient for the student's latent: λ·g_VSD + (1 − λ)·g_TSM, summed over the trajectory.

    Both latents get the same noise. Along the trajectory they are denoised step by step, the fake one by the auxiliary
    network, the real one by the teacher. Each point n adds, weighted by σ_n²·γ_n,

        g_VSD += v_ψ(ẑ_n) − v_φ(ẑ_n)        g_TSM += v_ψ(ẑ_n) − v_ψ(z_n)

    Each sample has its own trajectory.

    Args:
      fake, real: ẑ and z, (B, h, w, C).
      noise: ε of the same shape, shared by both.
      index: (B,) schedule index of the first point.
      bias: (B,) schedule steps added to the trajectory's length.
      teacher: called with ẑ_n and z_n interleaved to 2B.
      auxiliary: called with ẑ_n.
      schedule: (1000,) noise levels.

    Returns:
      The gradient, (B, h, w, C) float32, which is constant to autodiff; and how many of its terms (a scalar) were not finite
      or above `LARGEST_TERM`. As in the original, NaN becomes 0 and infinity the largest value.
    """
    points = len(config.point_weights)
    levels = schedule[trajectory(index, bias, points, config.stride)].T  # (points + 1, B)
    weights = jnp.asarray(config.point_weights, jnp.float32)
    start_fake, start_real = (
        add_noise(jax.lax.stop_gradient(clean.astype(jnp.float32)), noise, levels[0])
        for clean in (fake, real)
    )

    def visit(noisy: _Pair, point: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[_Pair, _Pair]:
        fake_n, real_n = noisy
        sigma, following, weight = point
        pair = teacher(interleave(fake_n, real_n), timesteps(interleave(sigma, sigma)))
        teacher_fake, teacher_real = separate(pair.astype(jnp.float32))
        auxiliary_fake = auxiliary(fake_n, timesteps(sigma)).astype(jnp.float32)
        variational, matching = teacher_fake - auxiliary_fake, teacher_fake - teacher_real
        mixed = config.balance * variational + (1 - config.balance) * matching
        gradient, replaced = _bounded(per_sample(jnp.square(sigma), mixed) * weight * mixed)
        onward = (
            euler_step(fake_n, auxiliary_fake, sigma, following),
            euler_step(real_n, teacher_real, sigma, following),
        )
        return onward, (gradient, replaced)

    _, (gradients, replaced) = jax.lax.scan(
        visit, (start_fake, start_real), (levels[:-1], levels[1:], weights)
    )
    return jax.lax.stop_gradient(gradients.sum(0)), replaced.sum()


def _bounded(term: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Limits a term of the gradient to ±`LARGEST_TERM`, with NaN as 0; also returns how many values this changed."""
    # Clipped after NaN is gone, because a clip passes NaN on.
    bounded = jnp.clip(jnp.nan_to_num(term), -LARGEST_TERM, LARGEST_TERM)
    return bounded, jnp.sum(~(jnp.abs(term) <= LARGEST_TERM))


def tsd_loss(fake: jax.Array, gradient: jax.Array) -> jax.Array:
    """Computes ½·mean‖ẑ − sg(ẑ − g)‖², whose value is ½·mean g² and whose gradient in ẑ is g / numel.

    Computing ẑ − (ẑ − g) in floating point would round g to ẑ's precision. So the value is computed directly, and a term
    that is zero carries the gradient.
    """
    fake, gradient = fake.astype(jnp.float32), jax.lax.stop_gradient(gradient)
    through = (fake - jax.lax.stop_gradient(fake)) * gradient
    return 0.5 * jnp.mean(jnp.square(gradient)) + jnp.mean(through)


def auxiliary_loss(
    fake: jax.Array,
    noise: jax.Array,
    sigma: jax.Array,
    sample_weight: jax.Array,
    auxiliary: Predict,
) -> jax.Array:
    """Computes the denoising loss that makes the auxiliary network follow the student's distribution.

    It is the mean over samples of ½·w_b·mean‖x₀ − sg(ẑ)‖², where x₀ is the auxiliary network's prediction from x_σ and w_b
    the sample's weight.

    Args:
      fake: ẑ (B, h, w, C); no gradient flows into it.
      noise: fresh ε.
      sigma: (B,) noise levels.
      sample_weight: (B,), see `sample_weights`.
      auxiliary: the network without guidance, with the images' prompts.
    """
    fake = jax.lax.stop_gradient(fake.astype(jnp.float32))
    noisy = add_noise(fake, noise, sigma)
    predicted = to_clean(noisy, auxiliary(noisy, timesteps(sigma)).astype(jnp.float32), sigma)
    errors = jnp.square(predicted - fake).mean(tuple(range(1, fake.ndim)))
    return 0.5 * jnp.mean(sample_weight * errors)


def sample_weights(
    scheme: Weighting,
    sigma: jax.Array,
    normal: jax.Array,
    uniform: jax.Array,
    *,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> jax.Array:
    """Computes one weight per sample for the auxiliary loss.

    Args:
      scheme: "logit_normal": sigmoid of a normal draw; "mode": 1 − u − scale·(cos²(πu/2) − 1 + u) of a uniform draw;
        "sigma_sqrt": σ⁻².
      sigma: (B,) noise levels.
      normal, uniform: (B,) standard draws; each scheme uses one, or none.

    Raises:
      ValueError: the scheme is unknown.
    """
    if scheme == "logit_normal":
        return jax.nn.sigmoid(logit_mean + logit_std * normal)
    if scheme == "mode":
        return 1 - uniform - mode_scale * (jnp.cos(jnp.pi * uniform / 2) ** 2 - 1 + uniform)
    if scheme == "sigma_sqrt":
        return sigma**-2.0
    raise ValueError(f"weighting scheme {scheme!r}; known are logit_normal, sigma_sqrt and mode")
