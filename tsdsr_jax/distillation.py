"""TSD-SR's training put together: the frozen base on its devices, the adapters to train, the jitted step, the files.

`train/distill.py` is the command line to this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from tsdsr_jax import lora
from tsdsr_jax.checkpoint import Hash
from tsdsr_jax.dataset import LocalBatch, Shapes
from tsdsr_jax.errors import UserError
from tsdsr_jax.models.lpips import LPIPS, minimum_side
from tsdsr_jax.models.mmdit import MMDiT
from tsdsr_jax.models.vae import AutoencoderKL
from tsdsr_jax.objective import Base, LossConfig, Losses, Samples, Student, to_batch
from tsdsr_jax.pretrained import NetworkFiles, check_rank, load_lora
from tsdsr_jax.prompts import PromptEmbeds
from tsdsr_jax.sharding import base_shardings, batch_sharding, global_array, placement, replicated
from tsdsr_jax.torch_weights import Tree, abstract_params, write_lora
from tsdsr_jax.training import Trainer, TrainState
from tsdsr_jax.tsd import Text

STUDENT_FILES = {"transformer": "transformer.safetensors", "vae": "vae.safetensors"}
AUXILIARY_FILE = "transformer_reg.safetensors"


class Ranks(NamedTuple):
    """Ranks of the student's two adapters and of the auxiliary network's, with the flags that set them."""

    rank: int
    rank_vae: int
    rank_lora: int


@dataclasses.dataclass(frozen=True)
class Networks:
    """The two networks of a checkpoint, and where their parameters go.

    Attributes:
      transformer, vae: files of the checkpoint.
      mesh: the devices.
      dtype: of the frozen parameters and of computation.
    """

    transformer: NetworkFiles
    vae: NetworkFiles
    mesh: Mesh
    dtype: DTypeLike

    def load(self, network: NetworkFiles, progress: Callable[[int], object]) -> tuple[Tree, str]:
        """Loads one network's parameters onto the mesh; also the hash of what is stored, whatever the layout."""
        shardings = flatten_dict(base_shardings(abstract_params(network.config), self.mesh), sep="/")
        digest = Hash()

        def put(path: str, array: np.ndarray) -> jax.Array:
            digest.add(path, array)
            return global_array(array, shardings[path])

        return network.load(self.dtype, put=put, progress=progress), digest.value()

    def losses(self, config: LossConfig, perceptual: LPIPS | None, remat: bool) -> Losses:
        pinned = placement(self.mesh) if self.mesh.shape["fsdp"] > 1 else None
        return Losses(
            MMDiT(self.transformer.config, dtype=self.dtype, remat=remat, placement=pinned),
            AutoencoderKL(self.vae.config, dtype=self.dtype, remat=remat, placement=pinned),
            config,
            None if perceptual is None else partial(_distance, perceptual),
        )


def _distance(network: LPIPS, params: Tree, result: jax.Array, target: jax.Array) -> jax.Array:
    return network.apply({"params": params}, result, target)


def load_teacher(path: Path, networks: Networks) -> tuple[Tree, str]:
    """The teacher's adapter in the computation dtype, and its hash."""
    adapter, digest = load_lora(path, networks.transformer.config), Hash()
    for name, leaf in sorted(flatten_dict(adapter, sep="/").items()):
        digest.add(name, leaf)
    whole = replicated(networks.mesh)
    cast = jax.tree.map(lambda leaf: global_array(np.asarray(leaf).astype(networks.dtype), whole), adapter)
    return cast, digest.value()


def place_text(embeds: PromptEmbeds, networks: Networks) -> Text:
    """A prompt as (1, S, D) and (1, P) on every device."""
    whole = replicated(networks.mesh)
    return Text(
        *(global_array(part[None].astype(networks.dtype), whole) for part in (embeds.prompt, embeds.pooled))
    )


def text_hash(embeds: PromptEmbeds) -> str:
    digest = Hash()
    digest.add("prompt", embeds.prompt)
    digest.add("pooled", embeds.pooled)
    return digest.value()


def new_adapters(networks: Networks, ranks: Ranks, key: jax.Array) -> tuple[Student, Tree]:
    """Adapters of student and auxiliary network that change nothing yet."""
    shapes = abstract_params(networks.transformer.config), abstract_params(networks.vae.config)
    keys = jax.random.split(key, 3)
    student = Student(
        lora.init(keys[0], shapes[0], lora.STUDENT_TARGETS, ranks.rank),
        lora.init(keys[1], shapes[1], lora.VAE_ENCODER_TARGETS, ranks.rank_vae),
    )
    return student, lora.init(keys[2], shapes[0], lora.AUXILIARY_TARGETS, ranks.rank_lora)


def load_adapters(folder: Path, networks: Networks, ranks: Ranks) -> tuple[Student, Tree | None]:
    """The student's adapters of a folder, as TSD-SR's authors publish them; the auxiliary network's where it has one.

    Raises:
      UserError: files are missing or do not fit; the message names tensors, modules or flags.
    """
    if not folder.is_dir():
        raise UserError(
            f"--checkpoint_path {folder}: no such folder; it holds {' and '.join(STUDENT_FILES.values())}"
        )
    student, auxiliary = jax.eval_shape(partial(new_adapters, networks, ranks), jax.random.key(0))

    def read(file: str, network: NetworkFiles, rank: int, flag: str, like: Tree) -> Tree:
        path = folder / file
        adapter = load_lora(path, network.config)
        check_rank(adapter, rank, path, flag)
        broken = [
            name for name, leaf in flatten_dict(adapter, sep="/").items() if not np.isfinite(leaf).all()
        ]
        if broken:
            raise UserError(f"{path}: has values that are NaN or infinite, in {', '.join(broken[:5])}")
        found, expected = set(lora.modules(adapter)), set(lora.modules(like))
        if found != expected:
            missing, extra = sorted(expected - found), sorted(found - expected)
            raise UserError(
                f"{path}: adapts other modules than are trained; missing: {', '.join(missing[:5]) or 'none'}, extra: "
                f"{', '.join(extra[:5]) or 'none'}"
            )
        return adapter

    loaded = Student(
        read(STUDENT_FILES["transformer"], networks.transformer, ranks.rank, "--rank", student.transformer),
        read(STUDENT_FILES["vae"], networks.vae, ranks.rank_vae, "--rank_vae", student.vae),
    )
    if not (folder / AUXILIARY_FILE).is_file():
        return loaded, None
    return loaded, read(AUXILIARY_FILE, networks.transformer, ranks.rank_lora, "--rank_lora", auxiliary)


def initial_state(
    trainer: Trainer,
    networks: Networks,
    ranks: Ranks,
    key: jax.Array,
    loaded: tuple[Student | None, Tree | None] = (None, None),
) -> TrainState:
    """The state before the first step, on every device: new adapters, or loaded ones in their place."""

    def create(loaded: tuple[Student | None, Tree | None]) -> TrainState:
        new = new_adapters(networks, ranks, key)
        student, auxiliary = (
            fresh if given is None else given for given, fresh in zip(loaded, new, strict=True)
        )
        return trainer.init(student, auxiliary)

    whole = replicated(networks.mesh)
    placed = jax.tree.map(lambda leaf: global_array(np.asarray(leaf), whole), loaded)
    return jax.jit(create, out_shardings=whole)(placed)


def adapter_files(networks: Networks, state: TrainState) -> dict[str, dict[str, np.ndarray]]:
    """File name -> tensors, in PEFT's layout; with an average, it too, in a folder of its own."""
    transformer, vae = networks.transformer.config, networks.vae.config

    def student(adapters: Student, folder: str) -> dict[str, dict[str, np.ndarray]]:
        return {
            folder + STUDENT_FILES["transformer"]: write_lora(
                jax.device_get(adapters.transformer), transformer
            ),
            folder + STUDENT_FILES["vae"]: write_lora(jax.device_get(adapters.vae), vae),
        }

    files = student(state.student, "")
    files[AUXILIARY_FILE] = write_lora(jax.device_get(state.auxiliary), transformer)
    if state.ema:
        files |= student(state.ema, "ema/")
    return files


class Step:
    """The jitted training step over a mesh.

    Args:
      trainer: the pure step.
      mesh: the devices.
      base: frozen arrays, in place.
      key: the run's key.
    """

    def __init__(self, trainer: Trainer, mesh: Mesh, base: Base, key: jax.Array):
        self.mesh, self.base, self.key = mesh, base, key
        self._rows = batch_sharding(mesh, axis=1)
        self._step = jit_step(trainer, mesh)

    def put_state(self, state: TrainState) -> TrainState:
        """A state of host arrays on every device."""
        whole = replicated(self.mesh)
        return jax.tree.map(lambda leaf: global_array(np.asarray(leaf), whole), state)

    def put(self, batch: LocalBatch) -> Samples:
        """This process's rows as its part of the global batch."""
        record = batch.records
        place = partial(jax.make_array_from_process_local_data, self._rows)
        return Samples(
            place(record.lr),
            place(record.hr),
            place(record.latent_hr),
            Text(place(record.prompt), place(record.pooled)),
        )

    def __call__(self, state: TrainState, samples: Samples) -> tuple[TrainState, dict[str, jax.Array]]:
        """`state` is donated: it is gone afterwards."""
        return self._step(state, self.base, samples, self.key)


def jit_step(trainer: Trainer, mesh: Mesh) -> Any:
    """`(state, base, samples, key) -> (state, metrics)`; samples have the leading axes (A, B)."""

    def step(state: TrainState, base: Base, samples: Samples, key: jax.Array):
        return trainer.step(state, base, to_batch(samples, base.default), key)

    return jax.jit(step, donate_argnums=0, out_shardings=replicated(mesh))


def check_shapes(shapes: Shapes, networks: Networks, perceptual: LPIPS | None) -> None:
    """Refuses a data set that does not fit the networks.

    Raises:
      UserError: sizes, channels or widths differ; the message names both.
    """
    transformer, vae = networks.transformer.config, networks.vae.config
    factor, patch = vae.factor, transformer.patch_size
    height, width = shapes.image[:2]
    step = factor * patch
    if height % step or width % step:
        raise UserError(f"the training images are {width}×{height}; sides must be multiples of {step}")
    latent = (height // factor, width // factor, vae.latent_channels)
    if shapes.latent != latent:
        raise UserError(
            f"latent_hr has shape {_chw(shapes.latent)}, but images of {width}×{height} have latents {_chw(latent)} "
            "with this model; was the set prepared with another one?"
        )
    if max(latent[:2]) > patch * transformer.pos_embed_max_size:
        raise UserError(
            f"the training images are {width}×{height}; this transformer's position table ends at "
            f"{step * transformer.pos_embed_max_size}"
        )
    if (
        shapes.prompt[-1] != transformer.joint_attention_dim
        or shapes.pooled[-1] != transformer.pooled_projection_dim
    ):
        raise UserError(
            f"the images' prompt embeddings have widths {shapes.prompt[-1]} and {shapes.pooled[-1]} (pooled), but the "
            f"transformer takes {transformer.joint_attention_dim} and {transformer.pooled_projection_dim}; encode the "
            "prompts with this model's text encoders"
        )
    if perceptual is not None and min(height, width) < minimum_side(perceptual.network):
        raise UserError(
            f"the training images are {width}×{height}, too small for LPIPS; pass --lambda_lpips 0"
        )


def _chw(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[2], shape[0], shape[1])


def check_tokens(shapes: Shapes, source: str, embeds: PromptEmbeds) -> None:
    """Refuses a prompt of another length than the images', which could not share a batch with them."""
    if embeds.prompt.shape[0] != shapes.prompt[0]:
        raise UserError(
            f"{source}: its embedding has {embeds.prompt.shape[0]} tokens, the images' have {shapes.prompt[0]}; encode both "
            "in the same way"
        )
