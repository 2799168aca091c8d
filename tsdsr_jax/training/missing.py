"""What a training run needs and does not find, in one message, before anything is loaded."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tsdsr_jax.errors import UserError
from tsdsr_jax.models.lpips import Network
from tsdsr_jax.weights.lpips_files import how_to_get_lpips
from tsdsr_jax.weights.prompt_files import load_prompt_embeds
from tsdsr_jax.weights.prompt_hints import how_to_encode

SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
_GET_SD3 = f"accept SD3's license on https://huggingface.co/{SD3} and run `hf auth login`"


def refuse_missing(found: Sequence[str], model: str, first_run: str) -> None:
    """Raises UserError for what is missing.

    Args:
      found: a text for each thing that is missing: which one, and how to get it.
      model: a checkpoint's folder or hub id; if more is missing, the message also says how to get it.
      first_run: a command that needs none of it.
    """
    if not found:
        return
    if len(found) == 1:
        raise UserError(found[0])
    listed = "".join(f"\n{index}. {line}" for index, line in enumerate([*found, *_not_downloaded(model)], 1))
    raise UserError(
        f"{len(found)} things are missing:{listed}\nA run that needs none of them:\n  {first_run}"
    )


def missing_model(name: str) -> list[str]:
    """For a model that is no folder, and no hub id either."""
    if Path(os.path.expanduser(name)).exists() or _is_hub_id(name):
        return []
    return [
        f"--pretrained_model_name_or_path {name}: no such folder, and not a hub id (owner/name); {_GET_SD3}, then pass {SD3}"
    ]


def _not_downloaded(name: str) -> list[str]:
    """A note about a model on the hub, if it is not on this machine and nobody is logged in."""
    if Path(os.path.expanduser(name)).exists() or not _is_hub_id(name):
        return []
    from huggingface_hub import get_token, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "transformer/config.json"), str) or get_token():
        return []
    return [f"{name} is not on this machine; the run downloads it. If it is SD3: {_GET_SD3}"]


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def missing_data(options: Any) -> list[str]:
    """For folders of photographs and prepared sets."""
    return [
        f"--{name} {folder}: no such folder; {what}"
        for name, what in (
            ("hr_dir", "expected one with photographs"),
            ("data_dir", "expected a prepared set, made by train/prepare.py"),
        )
        for folder in getattr(options, name)
        if not folder.is_dir()
    ]


def missing_lpips(path: Path) -> list[str]:
    if path.is_file():
        return []
    network: Network = "vgg" if "vgg" in path.name.lower() else "alex"
    return [
        f"--lpips_path {path}: not found; pass --lambda_lpips 0 to train without LPIPS, or make it: "
        + how_to_get_lpips(network, path)
    ]


def missing_teacher(path: Path | None) -> list[str]:
    """For the LoRA of the teacher; None if there is none."""
    if path is None or path.is_file() or (path / "teacher.safetensors").is_file():
        return []
    return [
        f"--teacher_lora_path {path}: not found; expected a LoRA, or a folder with teacher.safetensors. TSD-SR's authors "
        "publish one (https://github.com/Microtreei/TSD-SR), and train/teacher.py trains one. Without --use_teacher_lora "
        "the model itself is the teacher"
    ]


def missing_prompts(options: Any, default: bool) -> list[str]:
    """For the embeddings of the empty prompt and, if the run certainly needs it, of the default prompt."""
    model = options.pretrained_model_name_or_path
    maker = (
        dataclasses.replace(options, pretrained_model_name_or_path=SD3) if missing_model(model) else options
    )
    prompts: tuple[Literal["default", "null"], ...] = ("null", "default") if default else ("null",)
    found = []
    for prompt in prompts:
        folder = getattr(options, f"{prompt}_embedding_dir")
        try:
            load_prompt_embeds(folder)
        except UserError as error:
            found.append(f"--{prompt}_embedding_dir {error} {how_to_encode(maker, prompt, folder)}")
    return found


def lack_own_prompts(roots: Sequence[Path]) -> bool:
    """Whether no photograph in these folders can have a prompt of its own."""
    return bool(roots) and not any(next(root.rglob("*.safetensors"), None) for root in roots if root.is_dir())
