"""Puts a checkpoint's two networks on the devices of a mesh, and checks that samples and prompts fit them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike
from tqdm import tqdm

from tsdsr_jax.data.batches import SampleShapes
from tsdsr_jax.data.options import DataOptions
from tsdsr_jax.data.record import Record
from tsdsr_jax.errors import UserError
from tsdsr_jax.exchange import from_first
from tsdsr_jax.models.guidance import Text
from tsdsr_jax.models.layers import Placement
from tsdsr_jax.models.lpips import LPIPS, minimum_side
from tsdsr_jax.models.mmdit import MMDiT, MMDiTConfig
from tsdsr_jax.models.params import Tree, abstract_params
from tsdsr_jax.models.stacks import take_apart
from tsdsr_jax.models.vae import AutoencoderKL, VAEConfig
from tsdsr_jax.training.agreement import check_agreement
from tsdsr_jax.training.batch import to_unit
from tsdsr_jax.training.checkpoint import Hash
from tsdsr_jax.training.sharding import base_shardings, global_array, placement, replicated
from tsdsr_jax.weights.prompt_files import PromptEmbeds, check_widths, load_prompt_embeds
from tsdsr_jax.weights.prompt_hints import how_to_encode
from tsdsr_jax.weights.sd3_folder import NetworkFiles


@dataclasses.dataclass(frozen=True)
class Networks:
    """A checkpoint's two networks, and the devices for their parameters.

    Attributes:
      transformer, vae: the networks' files.
      mesh: the devices.
      dtype: dtype of the frozen parameters and of computation.
      scan_layers: whether the transformer loops over stacks of layers; otherwise each layer has its own arrays.
    """

    transformer: NetworkFiles
    vae: NetworkFiles
    mesh: Mesh
    dtype: DTypeLike
    scan_layers: bool = True

    @property
    def mmdit_config(self) -> MMDiTConfig:
        config = self.transformer.config
        assert isinstance(config, MMDiTConfig)
        return config

    @property
    def vae_config(self) -> VAEConfig:
        config = self.vae.config
        assert isinstance(config, VAEConfig)
        return config

    @property
    def placement(self) -> Placement | None:
        """How the networks must place arrays; None unless their parameters are split over devices."""
        return placement(self.mesh) if self.mesh.shape["fsdp"] > 1 else None

    def mmdit(self, remat: bool = False) -> MMDiT:
        return MMDiT(
            self.mmdit_config,
            dtype=self.dtype,
            remat=remat,
            placement=self.placement,
            scanned=self.scan_layers,
        )

    def autoencoder(self, remat: bool = False) -> AutoencoderKL:
        return AutoencoderKL(self.vae_config, dtype=self.dtype, remat=remat, placement=self.placement)

    def load(self, parts: Iterable[NetworkFiles]) -> list[tuple[Tree, str]]:
        """Loads networks' parameters onto the mesh and hashes the stored values of each, whatever the file layout.

        Only the first process hashes all values. The others compare samples of their files' values with its.

        Raises:
          UserError: in every process, if files differ.
        """
        parts = list(parts)
        loaded = load_networks(parts, self.mesh, self.dtype)
        if self.scan_layers:
            return loaded
        return [
            (take_apart(self.mmdit_config, params) if part is self.transformer else params, digest)
            for part, (params, digest) in zip(parts, loaded, strict=True)
        ]


def load_networks(parts: Iterable[NetworkFiles], mesh: Mesh, dtype: DTypeLike) -> list[tuple[Tree, str]]:
    """Loads the parameters of any networks, with a progress bar; see `Networks.load`."""
    parts = list(parts)
    total = sum(int(np.prod(spec.shape)) for part in parts for spec in part.specs.values())
    quiet = True if jax.process_index() else None
    with tqdm(
        total=total, desc="loading", unit=" values", unit_scale=True, leave=False, disable=quiet
    ) as bar:
        return [_load(part, mesh, dtype, bar.update) for part in parts]


def _load(
    network: NetworkFiles, mesh: Mesh, dtype: DTypeLike, progress: Callable[[int], object]
) -> tuple[Tree, str]:
    shardings = flatten_dict(base_shardings(abstract_params(network.config), mesh), sep="/")
    if jax.process_count() > 1:
        check_agreement({f"values of the {network.part}": network.reader.fingerprint()}, "weights")
    digest, hashes = Hash(), jax.process_index() == 0

    def put(path: str, array: np.ndarray) -> jax.Array:
        if hashes:
            digest.add(path, array)
        return global_array(array, shardings[path])

    return network.load(dtype, put=put, progress=progress), from_first(digest.value)


def load_text(options: Any, prompt: Literal["default", "null"], config: MMDiTConfig) -> PromptEmbeds:
    """Loads --default_embedding_dir or --null_embedding_dir; raises UserError if it does not fit the transformer."""
    folder = getattr(options, f"{prompt}_embedding_dir")
    try:
        embeds = load_prompt_embeds(folder)
    except UserError as error:
        raise UserError(f"{error} {how_to_encode(options, prompt, folder)}") from None
    source = f"--{prompt}_embedding_dir {folder}"
    check_widths(embeds, config.joint_attention_dim, config.pooled_projection_dim, source)
    return embeds


def load_texts(
    options: DataOptions, networks: Networks, shapes: SampleShapes, with_default: bool
) -> tuple[PromptEmbeds, PromptEmbeds | None]:
    """Loads the empty prompt, and the default prompt if `with_default` or if the samples have no prompts.

    Raises:
      UserError: they do not fit the networks, the samples or each other.
    """
    config = networks.mmdit_config
    null = load_text(options, "null", config)
    default = None
    if with_default or not shapes.prompt:
        default = load_text(options, "default", config)
    if shapes.prompt:
        tokens = shapes.prompt[0]
    else:
        assert default is not None
        tokens = default.prompt.shape[0]
    check_tokens(tokens, f"--null_embedding_dir {options.null_embedding_dir}", null)
    if default:
        check_tokens(tokens, f"--default_embedding_dir {options.default_embedding_dir}", default)
    return null, default


def place_text(embeds: PromptEmbeds, networks: Networks) -> Text:
    """Puts a prompt on every device, as (1, S, D) and (1, P)."""
    whole = replicated(networks.mesh)
    parts = embeds.prompt, embeds.pooled
    states, pooled = (global_array(part[None].astype(networks.dtype), whole) for part in parts)
    return Text(states, pooled)


def text_hash(embeds: PromptEmbeds) -> str:
    digest = Hash()
    digest.add("prompt", embeds.prompt)
    digest.add("pooled", embeds.pooled)
    return digest.value()


def check_shapes(
    shapes: SampleShapes,
    networks: Networks,
    perceptual: LPIPS | None = None,
    what: str = "training images",
    prepared: bool = True,
) -> None:
    """Checks that samples fit the networks. `prepared`: they come from a prepared set, not from photographs during training.

    Raises:
      UserError: sizes, channels or widths differ; the message names both.
    """
    transformer, vae = networks.mmdit_config, networks.vae_config
    factor, patch = vae.factor, transformer.patch_size
    step = factor * patch
    if shapes.hr:
        height, width = shapes.hr[:2]
    else:
        assert shapes.latent_hr is not None, "samples have images or latents"
        height, width = (side * factor for side in shapes.latent_hr[:2])
    if height % step or width % step:
        raise UserError(f"the {what} are {width}×{height}; sides must be multiples of {step}")
    latent = (height // factor, width // factor, vae.latent_channels)
    if shapes.latent_hr is not None and shapes.latent_hr != latent:
        raise UserError(
            f"latent_hr has shape {_chw(shapes.latent_hr)}, but images of {width}×{height} have latents {_chw(latent)} "
            "with this model; was the set prepared with another model?"
        )
    longest = step * transformer.pos_embed_max_size
    if max(height, width) > longest:
        remedy = "prepare the set again with" if prepared else "pass"
        raise UserError(
            f"the {what} are {width}×{height}; this transformer's position table ends at {longest}: {remedy} --crop_size "
            f"{longest}"
        )
    widths = transformer.joint_attention_dim, transformer.pooled_projection_dim
    if shapes.prompt and shapes.pooled and (shapes.prompt[-1], shapes.pooled[-1]) != widths:
        raise UserError(
            f"the images' prompt embeddings have widths {shapes.prompt[-1]} and {shapes.pooled[-1]} (pooled), but the "
            f"transformer takes {transformer.joint_attention_dim} and {transformer.pooled_projection_dim}; encode the "
            "prompts with this model's text encoders"
        )
    if perceptual is not None and min(height, width) < minimum_side(perceptual.network):
        raise UserError(f"the {what} are {width}×{height}, too small for LPIPS; pass --lambda_lpips 0")


def _chw(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[2], shape[0], shape[1])


def check_tokens(tokens: int, source: str, embeds: PromptEmbeds) -> None:
    """Raises UserError if a prompt has another length than the images' prompts: one batch cannot hold both."""
    if embeds.prompt.shape[0] != tokens:
        raise UserError(
            f"{source}: its embedding has {embeds.prompt.shape[0]} tokens, the images' have {tokens}; encode both the "
            "same way"
        )


# In standard deviations of the latents. Encoding in bfloat16 is off by 0.014 to 0.019 (SD3's autoencoder with random
# weights, three photographs); the latents of another autoencoder are unrelated.
LATENT_TOLERANCE = 0.3


def check_latents(name: str, record: Record, networks: Networks, vae: Tree) -> None:
    """Checks on one sample that this autoencoder made the data set's latents, with the scaling factor.

    Args:
      name: name of the sample.
      record: the sample, with hr and latent_hr.
      networks: provides the autoencoder.
      vae: the autoencoder's parameters.

    Raises:
      UserError: the sample's latent is far from what the autoencoder makes of its photograph.
    """
    network = networks.autoencoder()

    @jax.jit
    def distance(vae: Tree, hr: jax.Array, latent: jax.Array) -> jax.Array:
        """RMS error in standard deviations of the latents, beyond the error that sampling from the posterior explains."""
        posterior: Any = network.apply({"params": vae}, to_unit(hr[None]), method="encode")
        scale = networks.vae_config.scaling_factor
        error = jnp.square(latent - posterior.mean[0] * scale)
        allowed = jnp.square(scale) * jnp.exp(posterior.logvar[0])
        return jnp.sqrt(jnp.maximum(error.mean() - 3 * allowed.mean(), 0)) / (scale * posterior.mean.std())

    assert record.hr is not None and record.latent_hr is not None
    whole = replicated(networks.mesh)
    found = float(distance(vae, global_array(record.hr, whole), global_array(record.latent_hr, whole)))
    if not found < LATENT_TOLERANCE:
        raise UserError(
            f"{name}: its latent_hr is not what this model's autoencoder makes of its photograph (off by {found:.2g} "
            f"standard deviations, expected below {LATENT_TOLERANCE}); was the set prepared with another model, or without "
            "the scaling factor?"
        )
