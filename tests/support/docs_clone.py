"""A fresh clone in a temporary folder, with what the pages tell readers to bring: tiny and random, in the real layouts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

import tiny_checkpoint as tiny
import tiny_training
from tsdsr_jax.models import lora
from tsdsr_jax.models.params import abstract_params
from tsdsr_jax.places import CHECKOUT
from tsdsr_jax.weights.lpips_files import param_shapes, save_lpips
from tsdsr_jax.weights.sd3_folder import open_checkpoint
from tsdsr_jax.weights.torch_names import to_tree
from tsdsr_jax.weights.torch_pickle import write_tensor

CLONED = ("convert", "infer", "train", "weights")
HUB_ID = "stabilityai/stable-diffusion-3-medium-diffusers"
RANK = 64
TEST_SETS = (".", "DrealSRVal_crop128", "RealSRVal_crop128", "DIV2K_V2_val")


def bring(root: Path) -> None:
    """Makes everything that a reader brings, under the names that the pages use."""
    bring_models(root)
    bring_photos(root)
    bring_examples(root)
    generator = np.random.default_rng(0)
    half = generator.standard_normal((36, 36))
    np.savez(
        root / "niqe_pris_params.npz",
        mu_pris_param=generator.standard_normal((1, 36)),
        cov_pris_param=half @ half.T,
    )


def bring_models(root: Path) -> None:
    """SD3, LoRAs and prompts as published, the teacher's LoRA, LPIPS."""
    config = tiny.tiny_mmdit_config()
    tiny.save_checkpoint(root / "sd3", config, tiny.tiny_vae_config())
    shutil.copytree(root / "sd3", root / HUB_ID)
    for name in ("tsdsr", "tsdsr-mse"):
        bring_student(root / "checkpoint" / name, root / "sd3")
    bring_teacher(root / "checkpoint" / "teacher", root / "sd3")
    for seed, name in enumerate(("default", "null")):
        prompt = tiny.random_prompt(config, 10 + seed)
        write_tensor(root / "dataset" / name / "prompt_embeds.pt", prompt.prompt[None])
        write_tensor(root / "dataset" / name / "pool_embeds.pt", prompt.pooled[None])
    generator = np.random.default_rng(1)
    lpips = [
        (path, np.abs(generator.standard_normal(shape, np.float32)) * np.float32(0.01))
        for path, shape in param_shapes("alex").items()
    ]
    save_lpips(root / "checkpoint" / "lpips_alex.safetensors", "alex", to_tree(lpips))


def bring_student(folder: Path, model: Path) -> None:
    """LoRAs for a model as training or the authors leave them."""
    for part, targets in (("transformer", lora.STUDENT_TARGETS), ("vae", lora.VAE_ENCODER_TARGETS)):
        config = open_checkpoint(model).network(part).config
        adapter = tiny.random_lora(abstract_params(config), targets, RANK, 5, 0.01)
        tiny.save_peft(folder / f"{part}.safetensors", adapter, config)


def bring_teacher(folder: Path, model: Path) -> None:
    """A teacher's LoRA for a model."""
    bring_student(folder, model)
    (folder / "vae.safetensors").unlink()
    (folder / "transformer.safetensors").rename(folder / "teacher.safetensors")


def bring_trained(script: str, folder: Path, model: Path) -> None:
    """The LoRAs that a training script leaves in a folder."""
    bring = bring_teacher if script == "train/teacher.py" else bring_student
    bring(folder, model)


def bring_photos(root: Path) -> None:
    """Photographs to train on, and test sets with two pairs each."""
    tiny_training.save_photos(root / "photos", 2, (40, 52))
    for folder in TEST_SETS:
        for index in range(2):
            large = Image.fromarray(tiny.synthetic_photo(192, 96, index))
            for name, picture in (("test_HR", large), ("test_LR", large.resize((24, 48)))):
                path = root / folder / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)


def bring_examples(root: Path) -> None:
    """The repository's example photographs, reduced to 48 pixels a side."""
    (root / "examples" / "photos").mkdir(parents=True)
    for file in (CHECKOUT / "examples" / "photos").glob("*.[pj][np]g"):
        Image.open(file).resize((48, 48)).save(root / "examples" / "photos" / file.name)


def clone(folder: Path, brought: Path, made: set[str]) -> Path:
    """A working folder for one page; what its own commands make is not there beforehand."""
    folder.mkdir()
    for name in CLONED:
        (folder / name).symlink_to(CHECKOUT / name)
    for path in brought.iterdir():
        if path.name not in made:
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, folder / path.name)
    return folder
