"""A tiny SD3, prompts and a prepared training set in the original's layout; all a training script needs, without torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import tiny_checkpoint as tiny
from tsdsr_jax.images.resize import bicubic
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import Tree
from tsdsr_jax.models.vae import AutoencoderKL, VAEConfig
from tsdsr_jax.weights.prompt_files import save_prompt_embeds
from tsdsr_jax.weights.torch_pickle import write_tensor

RANK = 2


def save_models(root: Path) -> tuple[Tree, Tree]:
    """`root/sd3`, `root/default` and `root/null`; returns the parameters of transformer and autoencoder."""
    transformer = tiny.tiny_mmdit_config()
    params = tiny.save_checkpoint(root / "sd3", transformer, tiny.tiny_vae_config())
    for seed, name in enumerate(("default", "null")):
        save_prompt_embeds(root / name, tiny.random_prompt(transformer, 10 + seed))
    return params


def with_shift(model: Path, copy: Path, shift: float) -> Path:
    """A copy of a checkpoint folder with another noise schedule."""
    shutil.copytree(model, copy)
    (copy / "scheduler").mkdir()
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({"shift": shift}))
    return copy


def save_set(
    root: Path,
    vae: Tree,
    count: int,
    size: tuple[int, int] = (32, 32),
    seed: int = 0,
    names: Sequence[str] | None = None,
    config: MMDiTConfig | None = None,
    vae_config: VAEConfig | None = None,
) -> Path:
    """Photographs, degraded fourfold, with latents at the posterior's mean and a random prompt each."""
    config, vae_config = config or tiny.tiny_mmdit_config(), vae_config or tiny.tiny_vae_config()
    network = AutoencoderKL(vae_config)
    encode = jax.jit(lambda image: network.apply({"params": vae}, image, method="encode").mean)
    for index in range(count):
        name = names[index] if names else f"photo {index:02d}"
        hr = tiny.synthetic_photo(*size, seed * 1000 + index)
        small = hr.reshape(size[0] // 4, 4, size[1] // 4, 4, 3).mean((1, 3)).astype(np.float32)
        lr = np.clip(np.round(bicubic(small, *size)), 0, 255).astype(np.uint8)
        for folder, image in (("gt", hr), ("lr_bicubic", lr)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / folder / f"{name}.png")
        latent = np.asarray(encode(hr[None].astype(np.float32) / 127.5 - 1)) * vae_config.scaling_factor
        write_tensor(root / "latent_hr" / f"{name}.pt", latent.transpose(0, 3, 1, 2))
        prompt = tiny.random_prompt(config, 100 + index)
        write_tensor(root / "prompt_embeds" / f"{name}.pt", prompt.prompt[None].astype(np.float16))
        write_tensor(root / "pool_embeds" / f"{name}.pt", prompt.pooled[None].astype(np.float16))
    return root


def save_photos(folder: Path, count: int, size: tuple[int, int] = (40, 52)) -> Path:
    """Photographs as a user has them."""
    for index in range(count):
        path = folder / f"{index % 3}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tiny.synthetic_photo(*size, index)).save(path)
    return folder


def flags(root: Path, output: Path, *more: str) -> list[str]:
    """A short training run in float32 on `root`; later flags win."""
    data = [] if "--hr_dir" in more else ["--data_dir", str(root / "set")]
    return [
        "--pretrained_model_name_or_path", str(root / "sd3"), *data,
        "--default_embedding_dir", str(root / "default"), "--null_embedding_dir", str(root / "null"),
        "--output_dir", str(output), "--use_default_prompt", "--use_dasm", "--dasm_points", "2", "--guidance_scale", "3",
        "--rank", str(RANK), "--rank_vae", str(RANK), "--rank_lora", str(RANK), "--lambda_lpips", "0",
        "--train_batch_size", "2", "--learning_rate", "1e-3", "--learning_rate_reg", "1e-3",
        "--mixed_precision", "no", "--max_train_steps", "6", "--checkpointing_steps", "2", "--validation_steps", "6", *more,
    ]  # fmt: skip


TEACHER_RANK = 2


def teacher_flags(root: Path, output: Path, *more: str) -> list[str]:
    """The flags of a short run of train/teacher.py in float32 on `root`; later flags win."""
    data = [] if "--hr_dir" in more else ["--data_dir", str(root / "set")]
    return [
        "--pretrained_model_name_or_path", str(root / "sd3"), *data, "--output_dir", str(output),
        "--default_embedding_dir", str(root / "default"), "--null_embedding_dir", str(root / "null"),
        "--rank", str(TEACHER_RANK), "--learning_rate", "1e-3", "--train_batch_size", "2", "--mixed_precision", "no",
        "--max_train_steps", "4", "--checkpointing_steps", "2", "--validation_steps", "4", "--sampling_steps", "3",
        "--num_validation_images", "2", *more,
    ]  # fmt: skip
