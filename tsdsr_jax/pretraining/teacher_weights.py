"""The teacher's weights: creates or loads them for the start of training, and exports them for a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tsdsr_jax.models.params import Tree, abstract_params
from tsdsr_jax.pretraining.teacher import (
    fixed_params,
    joined,
    new_adapter,
    new_transformer_params,
    split_fixed,
)
from tsdsr_jax.training.checkpoint import Files
from tsdsr_jax.training.networks import Networks
from tsdsr_jax.training.sharding import global_array, replicated
from tsdsr_jax.training.step import NETWORK, Beginning, Parts, TrainState
from tsdsr_jax.weights.lora_files import check_rank, check_start, load_lora
from tsdsr_jax.weights.sd3_folder import TORCH_STEM, torch_config
from tsdsr_jax.weights.torch_names import base_tensors, to_tree, write_lora

TEACHER_FILE = "teacher.safetensors"


class TransformerStart(NamedTuple):
    """The transformer at the start of training.

    Attributes:
      beginning: what is trained.
      frozen: the other parameters.
      digest: a hash of the whole transformer.
    """

    beginning: Beginning
    frozen: Tree
    digest: str


def start_lora(networks: Networks, rank: int, lora: Tree | None) -> TransformerStart:
    """Loads the frozen transformer; trains the given LoRA, or a new one."""
    ((frozen, digest),) = networks.load([networks.transformer])
    if lora is None:
        beginning = Beginning(lambda key, _: {NETWORK: _new_lora(networks, rank, key)})
        return TransformerStart(beginning, frozen, digest)
    whole = replicated(networks.mesh)
    placed = jax.tree.map(lambda leaf: global_array(np.asarray(leaf, np.float32), whole), lora)
    return TransformerStart(Beginning(_as_network, placed), frozen, digest)


def start_from_scratch(networks: Networks) -> TransformerStart:
    """Creates a transformer with new weights; all of them are trained."""
    config, whole = networks.mmdit_config, replicated(networks.mesh)
    frozen = jax.tree.map(lambda leaf: global_array(leaf, whole), fixed_params(config))
    digest = f"new, {json.dumps(dataclasses.asdict(config), sort_keys=True)}"
    beginning = Beginning(lambda key, _: {NETWORK: split_fixed(new_transformer_params(config, key))[0]})
    return TransformerStart(beginning, frozen, digest)


def start_from_base(networks: Networks, new: bool) -> TransformerStart:
    """Loads a transformer; all weights are trained. A resumed run (not `new`) keeps only their shapes."""
    # Master weights are float32, whatever the computation dtype is.
    ((params, digest),) = dataclasses.replace(networks, dtype=jnp.float32).load([networks.transformer])
    trained, frozen = split_fixed(params)
    loaded = trained if new else jax.eval_shape(lambda: trained)
    return TransformerStart(Beginning(_as_network, loaded), frozen, digest)


def _as_network(_key: jax.Array, loaded: Tree) -> Parts:
    return {NETWORK: loaded}


def _new_lora(networks: Networks, rank: int, key: jax.Array) -> Tree:
    return new_adapter(abstract_params(networks.transformer.config), rank, key)


def teacher_file(path: Path) -> Path:
    """Returns the file of a teacher's LoRA: the path itself, or `TEACHER_FILE` in this folder."""
    return path / TEACHER_FILE if path.is_dir() else path


def load_starting_lora(path: Path, networks: Networks, rank: int) -> Tree:
    """Loads a LoRA to continue training from.

    Raises:
      UserError: its modules or ranks differ from those to be trained.
    """
    adapter = load_lora(path, networks.transformer.config)
    check_rank(adapter, rank, path, "--rank")
    check_start(adapter, jax.eval_shape(partial(_new_lora, networks, rank), jax.random.key(0)), path)
    return adapter


def teacher_files(networks: Networks, state: TrainState) -> Files:
    """Exports the LoRA in PEFT's layout; its moving average has its own folder."""
    return {
        folder + TEACHER_FILE: write_lora(tree, networks.transformer.config)
        for folder, tree in state.exported().items()
    }


def model_files(networks: Networks, shift: float, fixed: Tree, state: TrainState) -> Files:
    """Exports a checkpoint folder in diffusers' layout, with the unchanged autoencoder, and a second one for the moving
    average.

    Args:
      shift: shift of the noise schedule.
      fixed: the transformer's parameters that are not trained.
    """
    vae = base_tensors(to_tree(networks.vae.leaves()), networks.vae.config)
    files: dict[str, Any] = {}
    for folder, tree in state.exported().items():
        files |= {
            f"{folder}transformer/{TORCH_STEM}.safetensors": base_tensors(joined(tree, fixed), networks.transformer.config),
            f"{folder}transformer/config.json": _json(torch_config(networks.transformer.config)),
            f"{folder}vae/{TORCH_STEM}.safetensors": vae,
            f"{folder}vae/config.json": _json(torch_config(networks.vae.config)),
            f"{folder}scheduler/scheduler_config.json": _json({
                "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": shift,
            }),
        }  # fmt: skip
    return files


def _json(values: Any) -> str:
    return json.dumps(values, indent=2) + "\n"
