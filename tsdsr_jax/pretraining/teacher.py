"""The flow-matching loss on photographs' latents, to train the teacher's LoRA or all weights of a transformer.

TSD-SR's teacher is SD3 with a LoRA that was fine-tuned on high-resolution photographs with this loss only. The authors have
not released that training code. Noise levels follow SD3 (Esser et al. 2024, §3.1): logit-normal in the schedule's index.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from tsdsr_jax.data.record import Record
from tsdsr_jax.models import flow, lora
from tsdsr_jax.models.guidance import Text
from tsdsr_jax.models.mmdit import MMDiT, MMDiTConfig, sincos_table
from tsdsr_jax.models.params import Tree, init_params
from tsdsr_jax.models.stacks import variables
from tsdsr_jax.models.vae import AutoencoderKL
from tsdsr_jax.training.batch import Metrics, latents_of, text_of

# The position table: checkpoints store it, but it is never trained.
FIXED = ("pos_embed/table",)


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Settings of the loss.

    Attributes:
      shift: shift of the noise schedule.
      logit_mean, logit_std: parameters of the logit-normal distribution of the schedule's index; index 0 is pure noise.
      prompt_dropout: probability of using the empty prompt instead of the photograph's, which makes guidance possible.
    """

    shift: float = 3.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    prompt_dropout: float = 0.1


class FlowBase(NamedTuple):
    """Everything that stays constant during training.

    Attributes:
      transformer: the transformer's parameters that are not trained.
      vae: the autoencoder's parameters.
      null: text of the empty prompt, (1, S, D) and (1, P).
      default: text for photographs without prompts; None if they have their own.
    """

    transformer: Tree
    vae: Tree
    null: Text
    default: Text | None = None


class FlowDraws(NamedTuple):
    """Every random number of a step.

    Attributes:
      noise: (B, h, w, C) standard normal.
      index: (B,) schedule indices.
      dropped: (B,) whether the empty prompt replaces the sample's own.
    """

    noise: jax.Array
    index: jax.Array  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    dropped: jax.Array

    @classmethod
    def from_key(cls, key: jax.Array, latent_shape: tuple[int, ...], config: FlowConfig) -> FlowDraws:
        """Draws all random numbers for latents (B, h, w, C), separately for each sample."""
        keys = jax.random.split(key, 3)
        batch = latent_shape[:1]
        uniform = jax.nn.sigmoid(config.logit_mean + config.logit_std * jax.random.normal(keys[1], batch))
        index = jnp.minimum((flow.STEPS * uniform).astype(jnp.int32), flow.STEPS - 1)
        dropped = jax.random.bernoulli(keys[2], config.prompt_dropout, batch)
        return cls(jax.random.normal(keys[0], latent_shape), index, dropped)


@dataclasses.dataclass(frozen=True)
class FlowLoss:
    """The loss as a function of the trained parameters. Holds the modules but no parameters.

    Attributes:
      mmdit, vae: SD3's networks, in the computation dtype.
      config: see `FlowConfig`.
      adapter: whether a LoRA is trained, or the transformer's own parameters.
    """

    mmdit: MMDiT
    vae: AutoencoderKL
    config: FlowConfig
    adapter: bool = True

    def velocity(
        self, trained: Tree, base: FlowBase, latents: jax.Array, timestep: jax.Array, text: Text
    ) -> jax.Array:
        """Evaluates the transformer with the trained parameters; returns float32."""
        if self.adapter:
            given = variables(self.mmdit, base.transformer, trained)
        else:
            given = {"params": joined(trained, base.transformer)}
        velocity: Any = self.mmdit.apply(given, latents, timestep, *text)
        return velocity.astype(jnp.float32)

    def __call__(
        self, trained: Tree, base: FlowBase, latents: jax.Array, text: Text, draws: FlowDraws
    ) -> jax.Array:
        """Computes the flow-matching loss at the drawn noise levels, with some prompts dropped."""
        sigma = jnp.asarray(flow.sigmas(self.config.shift))[draws.index]
        noisy = flow.add_noise(latents, draws.noise, sigma)
        text = Text(
            *(jnp.where(flow.per_sample(draws.dropped, own), null.astype(own.dtype), own)
              for own, null in zip(text, base.null, strict=True))
        )  # fmt: skip
        velocity = self.velocity(trained, base, noisy, flow.timesteps(sigma), text)
        return flow.matching_loss(velocity, latents, draws.noise)

    def of_batch(
        self, trained: Tree, base: FlowBase, record: Record, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Computes the loss of a batch at random noise levels, and the values to log."""
        keys = jax.random.split(key)
        latents = latents_of(self.vae, base.vae, record, keys[0])
        draws = FlowDraws.from_key(keys[1], latents.shape, self.config)
        value = self(trained, base, latents, text_of(record, base.default), draws)
        return value, {"flow": value}


# --- trained parameters ---------------------------------------------------------------------------


def new_adapter(shapes: Tree, rank: int, key: jax.Array) -> Tree:
    """Creates the teacher's adapter, for the same modules as the student's; at first it changes nothing."""
    return lora.init(key, shapes, lora.STUDENT_TARGETS, rank)


def new_transformer_params(config: MMDiTConfig, key: jax.Array) -> Tree:
    """Initializes a transformer's parameters.

    Modulations and the last layer start at 0, so that every block is the identity and the velocity is 0 (Peebles & Xie 2023,
    §3.2). All others use LeCun's normal initialization.
    """
    leaves = flatten_dict(init_params(config, key), sep="/")
    zeroed = {path: jnp.zeros_like(leaf) if _starts_at_zero(path) else leaf for path, leaf in leaves.items()}
    return unflatten_dict(zeroed, sep="/")


def _starts_at_zero(path: str) -> bool:
    # Modules named `linear` are modulations; those of embeddings are named linear_1 and linear_2.
    return path.startswith("proj_out/") or "/linear/" in path


def split_fixed(params: Tree) -> tuple[Tree, Tree]:
    """Splits a transformer's parameters into those that are trained and those that never are."""
    leaves = flatten_dict(params, sep="/")
    parts = (
        {path: leaf for path, leaf in leaves.items() if (path in FIXED) == fixed} for fixed in (False, True)
    )
    trained, fixed = (unflatten_dict(part, sep="/") for part in parts)
    return trained, fixed


def fixed_params(config: MMDiTConfig) -> Tree:
    """Creates the parameters of a new transformer that are never trained, as host arrays."""
    return unflatten_dict({FIXED[0]: sincos_table(config)}, sep="/")


def joined(trained: Tree, fixed: Tree) -> Tree:
    return unflatten_dict(flatten_dict(trained) | flatten_dict(fixed))
