"""Tiny random checkpoints made without PyTorch: what a user's folders look like, a few ten kilobytes each.

The parameters come from Flax; `torch_weights` lays them out as diffusers and PEFT would. Every parameter is random and
none of a group near zero, as in `oracle_models`, so that a network that drops one of them gives another picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental.compilation_cache import compilation_cache

from tsdsr_jax.models import lora as lora_lib
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import Config, Tree, abstract_params
from tsdsr_jax.models.vae import VAEConfig
from tsdsr_jax.weights.prompt_files import PromptEmbeds, save_prompt_embeds
from tsdsr_jax.weights.sd3_folder import TORCH_STEM, torch_config
from tsdsr_jax.weights.tensor_files import save_tensors
from tsdsr_jax.weights.torch_names import write_base, write_lora

TOKENS = 5


def tiny_mmdit_config(**overrides: object) -> MMDiTConfig:
    """Two blocks of width 16: one of each kind that SD3 has."""
    return MMDiTConfig.tiny(
        **dict(num_layers=2, num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16,
               joint_attention_dim=12, pooled_projection_dim=10) | overrides
    )  # fmt: skip


def tiny_vae_config(**overrides: object) -> VAEConfig:
    """Four levels, as the factor of 8 needs, of four channels; no more layers than a network of this kind must have."""
    return VAEConfig(
        **dict(block_out_channels=(4, 4, 4, 4), layers_per_block=0, norm_num_groups=2) | overrides
    )


def random_params(config: Config, seed: int) -> Tree:
    """Kernels ~ N(0, 1 / fan-in), biases ~ N(0, 0.1²), norm scales ~ N(1, 0.2²), the position table ~ N(0, 0.7²).

    An autoencoder's last convolutions are scaled: posterior deviations around 0.4, pictures that fill [-1, 1] with
    little beyond it.
    """
    generator = np.random.default_rng(seed)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = generator.standard_normal(leaf.shape, dtype=np.float32)
        kind = path.rpartition("/")[2]
        if kind == "kernel":
            fan_in = np.prod(leaf.shape[1 if path.startswith("blocks_") else 0 : -1])
            return noise / np.float32(np.sqrt(fan_in))
        return {"bias": 0.1 * noise, "scale": 1 + 0.2 * noise, "table": 0.7 * noise}[kind].astype(np.float32)

    leaves = {path: draw(path, leaf) for path, leaf in flatten_dict(abstract_params(config), sep="/").items()}
    if isinstance(config, VAEConfig):
        leaves["encoder/conv_out/kernel"][..., config.latent_channels :] *= 0.3
        leaves["encoder/conv_out/bias"][config.latent_channels :] -= 2
        leaves["decoder/conv_out/kernel"] *= 0.35
    return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in leaves.items()})


def random_lora(params: Tree, targets: Iterable[str], rank: int, seed: int, strength: float = 0.1) -> Tree:
    """An adapter whose A·B is about `strength` times as large as the kernels."""
    generator = np.random.default_rng(seed)
    init = partial(lora_lib.init, targets=tuple(targets), rank=rank)
    pairs = flatten_dict(jax.eval_shape(init, jax.random.key(0), params), sep="/")

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        stacked = path.startswith("blocks_")
        size = np.prod(shape[1 if stacked else 0 : -1]) if path.endswith("/a") else rank / strength**2
        return generator.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(size))

    return unflatten_dict({tuple(path.split("/")): draw(path, leaf.shape) for path, leaf in pairs.items()})


def random_prompt(config: MMDiTConfig, seed: int = 3) -> PromptEmbeds:
    generator = np.random.default_rng(seed)
    return PromptEmbeds(
        generator.standard_normal((TOKENS, config.joint_attention_dim), dtype=np.float32),
        generator.standard_normal((config.pooled_projection_dim,), dtype=np.float32),
    )


def save_network(
    folder: Path, config: Config, params: Tree, change: Callable[[dict], object] = lambda tensors: None
) -> None:
    """`folder/config.json` and diffusers' safetensors beside it; `change` may alter the tensors on the way."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(torch_config(config)))
    tensors = dict(write_base(params, config))
    change(tensors)
    save_tensors(folder / f"{TORCH_STEM}.safetensors", tensors, {"format": "pt"})


def save_checkpoint(folder: Path, transformer: MMDiTConfig, vae: VAEConfig) -> tuple[Tree, Tree]:
    """A diffusers SD3 folder; returns both networks' parameters."""
    params = random_params(transformer, 1), random_params(vae, 2)
    save_network(folder / "transformer", transformer, params[0])
    save_network(folder / "vae", vae, params[1])
    return params


def save_peft(path: Path, lora: Tree, config: Config) -> None:
    save_tensors(path, write_lora(lora, config), {"format": "pt"})


def save_everything(root: Path, rank: int = 2) -> None:
    """`root/sd3`, `root/lora` (PEFT's layout, both adapters of `rank`) and `root/prompt`, ready for the command line."""
    configs = tiny_mmdit_config(), tiny_vae_config()
    params = save_checkpoint(root / "sd3", *configs)
    adapters = {"transformer": lora_lib.STUDENT_TARGETS, "vae": lora_lib.VAE_ENCODER_TARGETS}
    for (part, targets), config, base in zip(adapters.items(), configs, params, strict=True):
        save_peft(root / "lora" / f"{part}.safetensors", random_lora(base, targets, rank, 5), config)
    save_prompt_embeds(root / "prompt", random_prompt(configs[0]))


def synthetic_photo(height: int, width: int, seed: int) -> np.ndarray:
    """(H, W, 3) uint8: slanted gradients, a bright disc and some noise, never flat."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0 : 1 : complex(height), 0 : 1 : complex(width)][..., None]
    slope = generator.uniform(-1, 1, (2, 3))
    image = 0.5 + 0.4 * (slope[0] * (rows - 0.5) + slope[1] * (columns - 0.5))
    centre = generator.uniform(0.2, 0.8, 2)
    image += 0.3 * ((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < 0.05)
    image += generator.normal(0, 0.04, (height, width, 3))
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


@contextmanager
def compiled_once(folder: Path) -> Iterator[None]:
    """Keeps compiled programs in `folder`: an equal network built anew then only has to be traced again."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
