"""TSD-SR's adapters: creates new ones, loads them from files, and exports them for a checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from tsdsr_jax.distillation.adversary import Adversary
from tsdsr_jax.distillation.losses import AUXILIARY, STUDENT, LossConfig, Losses, Student
from tsdsr_jax.errors import UserError
from tsdsr_jax.models import lora
from tsdsr_jax.models.discriminator import DISCRIMINATOR, new_discriminator_params
from tsdsr_jax.models.lpips import LPIPS
from tsdsr_jax.models.params import Tree, abstract_params
from tsdsr_jax.training.checkpoint import Hash
from tsdsr_jax.training.networks import Networks
from tsdsr_jax.training.sharding import global_array, replicated
from tsdsr_jax.training.step import Beginning, Parts, TrainState
from tsdsr_jax.weights.lora_files import check_rank, check_start, load_lora
from tsdsr_jax.weights.sd3_folder import NetworkFiles
from tsdsr_jax.weights.torch_names import write_lora

STUDENT_FILES = {"transformer": "transformer.safetensors", "vae": "vae.safetensors"}
AUXILIARY_FILE = "transformer_reg.safetensors"

# Makes the key of a new discriminator from the run's.
_DISCRIMINATOR = 2**31


class Ranks(NamedTuple):
    """Ranks of the student's two adapters and the auxiliary network's, named like the flags that set them."""

    rank: int
    rank_vae: int
    rank_lora: int


def make_losses(
    networks: Networks, config: LossConfig, perceptual: LPIPS | None, adversary: Adversary | None, remat: bool
) -> Losses:
    distance = None if perceptual is None else partial(_distance, perceptual)
    return Losses(networks.mmdit(remat), networks.autoencoder(remat), config, distance, adversary)


def _distance(network: LPIPS, params: Tree, result: jax.Array, target: jax.Array) -> jax.Array:
    distances: Any = network.apply({"params": params}, result, target)
    return distances


def load_teacher(path: Path, networks: Networks) -> tuple[Tree, str]:
    """Loads the teacher's adapter in the computation dtype, and hashes it."""
    adapter, digest = load_lora(path, networks.transformer.config), Hash()
    for name, leaf in sorted(flatten_dict(adapter, sep="/").items()):
        digest.add(name, leaf)
    whole = replicated(networks.mesh)
    cast = jax.tree.map(lambda leaf: global_array(np.asarray(leaf).astype(networks.dtype), whole), adapter)
    return cast, digest.value()


def new_adapters(networks: Networks, ranks: Ranks, key: jax.Array) -> tuple[Student, Tree]:
    """Creates adapters for the student and the auxiliary network, which at first change nothing."""
    shapes = abstract_params(networks.transformer.config), abstract_params(networks.vae.config)
    keys = jax.random.split(key, 3)
    student = Student(
        lora.init(keys[0], shapes[0], lora.STUDENT_TARGETS, ranks.rank),
        lora.init(keys[1], shapes[1], lora.VAE_ENCODER_TARGETS, ranks.rank_vae),
    )
    return student, lora.init(keys[2], shapes[0], lora.AUXILIARY_TARGETS, ranks.rank_lora)


def load_adapters(folder: Path, networks: Networks, ranks: Ranks) -> tuple[Student, Tree | None]:
    """Loads the student's adapters from a folder, as TSD-SR's authors publish them, and the auxiliary network's, if present.

    Raises:
      UserError: files are missing or do not fit; the message names tensors, modules or flags.
    """
    if not folder.is_dir():
        raise UserError(
            f"--checkpoint_path {folder}: no such folder; expected one with {' and '.join(STUDENT_FILES.values())}"
        )
    student, auxiliary = jax.eval_shape(partial(new_adapters, networks, ranks), jax.random.key(0))

    def read(file: str, network: NetworkFiles, rank: int, flag: str, like: Tree) -> Tree:
        path = folder / file
        adapter = load_lora(path, network.config)
        check_rank(adapter, rank, path, flag)
        check_start(adapter, like, path)
        return adapter

    loaded = Student(
        read(STUDENT_FILES["transformer"], networks.transformer, ranks.rank, "--rank", student.transformer),
        read(STUDENT_FILES["vae"], networks.vae, ranks.rank_vae, "--rank_vae", student.vae),
    )
    if not (folder / AUXILIARY_FILE).is_file():
        return loaded, None
    return loaded, read(AUXILIARY_FILE, networks.transformer, ranks.rank_lora, "--rank_lora", auxiliary)


def beginning(
    networks: Networks,
    ranks: Ranks,
    loaded: tuple[Student | None, Tree | None] = (None, None),
    adversary: Adversary | None = None,
) -> Beginning:
    """Starts from new adapters or from loaded ones, on every device; an adversary's discriminator is always new."""

    def create(key: jax.Array, loaded: tuple[Student | None, Tree | None]) -> Parts:
        student, auxiliary = new_adapters(networks, ranks, key)
        parts: Parts = {
            STUDENT: student if loaded[0] is None else loaded[0],
            AUXILIARY: auxiliary if loaded[1] is None else loaded[1],
        }
        if adversary:
            judge = jax.random.fold_in(key, _DISCRIMINATOR)
            parts[DISCRIMINATOR] = new_discriminator_params(adversary.discriminator, judge)
        return parts

    whole = replicated(networks.mesh)
    return Beginning(create, jax.tree.map(lambda leaf: global_array(np.asarray(leaf), whole), loaded))


def student_files(networks: Networks, state: TrainState) -> dict[str, dict[str, np.ndarray]]:
    """Makes the files of every adapter, in PEFT's layout; the student's moving average has its own folder."""
    transformer, vae = networks.transformer.config, networks.vae.config
    files = {AUXILIARY_FILE: write_lora(state.trained[AUXILIARY], transformer)}
    for folder, student in state.exported(STUDENT).items():
        files[folder + STUDENT_FILES["transformer"]] = write_lora(student.transformer, transformer)
        files[folder + STUDENT_FILES["vae"]] = write_lora(student.vae, vae)
    return files
