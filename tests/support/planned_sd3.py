"""An SD3 folder at full width whose weights have names and shapes and no values: for programs that never run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import Config
from tsdsr_jax.models.vae import VAEConfig
from tsdsr_jax.weights.prompt_files import PromptEmbeds, save_prompt_embeds
from tsdsr_jax.weights.sd3_folder import TORCH_STEM, torch_config
from tsdsr_jax.weights.torch_names import base_entries

TOKENS = 333  # 77 of CLIP and 256 of T5


def save(root: Path, transformer: MMDiTConfig, vae: VAEConfig) -> Path:
    """`root/sd3`, and prompts in `root/default` and `root/null`."""
    for part, config in (("transformer", transformer), ("vae", vae)):
        folder = root / "sd3" / part
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(torch_config(config)))
        _save_weights(folder / f"{TORCH_STEM}.safetensors", config)
    states = np.zeros((TOKENS, transformer.joint_attention_dim), np.float16)
    for name in ("default", "null"):
        save_prompt_embeds(
            root / name, PromptEmbeds(states, np.zeros(transformer.pooled_projection_dim, np.float16))
        )
    return root


def layers(count: int) -> MMDiTConfig:
    """SD3-medium with fewer layers."""
    return dataclasses.replace(MMDiTConfig.sd3_medium(), num_layers=count)


def _save_weights(path: Path, config: Config) -> None:
    """Zeros in float16, in a file with a hole in place of the data."""
    header, end = {}, 0
    for entry in base_entries(config):
        for name in entry.names:
            begin, end = end, end + 2 * int(np.prod(entry.torch_shape))
            header[name] = {"dtype": "F16", "shape": entry.torch_shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
