"""The engine's programs for the full-size SD3 from shapes alone: for plans, nothing of it runs."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from described_gpu import placed
from jax.sharding import NamedSharding

from tsdsr_jax.devices import DTYPES, matmul_precision
from tsdsr_jax.models.eight_bits import EightBits
from tsdsr_jax.models.folded import fold
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import STUDENT_TIMESTEP, abstract_params
from tsdsr_jax.models.vae import VAEConfig
from tsdsr_jax.upscaling.engine import Bands, Engine, LoadedNetworks

TOKENS = 333


@dataclasses.dataclass(frozen=True)
class InferenceOptions:
    """What decides on the programs of a batch.

    Attributes:
      batch: images.
      size: side of the result; the transformer sees tiles of 64 latent pixels.
      precision: of computation.
      weights: of the transformer's blocks; None: in `precision`.
      bands: whether the autoencoder computes in bands.
    """

    batch: int = 8
    size: int = 512
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    weights: EightBits | None = None
    bands: bool = False


def planned_engine(options: InferenceOptions, device: jax.Device, whole: NamedSharding) -> Engine:
    """An engine whose parameters are shapes."""
    configs, dtype = (MMDiTConfig.sd3_medium(), VAEConfig.sd3()), DTYPES[options.precision]
    float32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    folded = jax.eval_shape(
        partial(fold, configs[0], timestep=STUDENT_TIMESTEP, dtype=dtype, eight_bits=options.weights),
        abstract_params(configs[0]),
        float32((TOKENS, configs[0].joint_attention_dim)),
        float32((configs[0].pooled_projection_dim,)),
    )
    networks = object.__new__(LoadedNetworks)
    networks.devices, networks.shared, networks.split = [device], whole, whole
    networks.transformer_config, networks.vae_config = configs
    networks.transformer = placed(folded, whole)
    networks.vae = placed(abstract_params(configs[1]), whole, dtype)
    bands = Bands(encoder=512, decoder=64) if options.bands else Bands()
    return Engine(networks, bands, dtype)


def lower(program: str, options: InferenceOptions, engine: Engine) -> jax.stages.Lowered:
    """Traces "encode", "transformer" or "decode"."""
    networks, batch, latent = engine.networks, options.batch, options.size // 8

    def shape(*sides: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *sides), dtype, sharding=networks.shared)

    latents = shape(latent, latent, 16)
    with matmul_precision(engine.dtype):
        if program == "encode":
            return engine.encode.lower(networks.vae, shape(options.size, options.size, 3), latents, None)
        if program == "decode":
            return engine.decode.lower(networks.vae, latents, shape(latent, latent, 17), None)
        patches, positions = shape(1024, 64), shape(1024, dtype=jnp.int32)
        return engine.velocity.lower(networks.transformer, patches, positions, None)
