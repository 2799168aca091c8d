"""Upscales the example photographs four times and lays the results out beside bicubic interpolation.

    make demo        (or: python examples/demo.py)

The checkpoint is made here: SD3's architecture, small, WITH RANDOM WEIGHTS, in the layout SD3 is published in. It goes
through the real conversion and upscaling scripts, so the demo shows that everything runs, and not what SD3 can do.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from tsdsr_jax import lora
from tsdsr_jax.images import IMAGE_SUFFIXES
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.vae import VAEConfig
from tsdsr_jax.pretrained import TORCH_STEM, Part, torch_config
from tsdsr_jax.prompts import PromptEmbeds, save_prompt_embeds
from tsdsr_jax.sheet import comparison_sheet
from tsdsr_jax.tensor_files import save_tensors
from tsdsr_jax.torch_weights import Config, Tree, abstract_params, write_base, write_lora

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT / "examples" / "photos"
OUTPUT = ROOT / "demo"
RANK = 4
CONFIGS: dict[Part, Config] = {
    "transformer": MMDiTConfig.tiny(pos_embed_max_size=64),
    "vae": VAEConfig.tiny(),
}
TARGETS = {"transformer": lora.STUDENT_TARGETS, "vae": lora.VAE_ENCODER_TARGETS}


def main() -> None:
    start = time.monotonic()
    # This process makes small random weights; the GPU, if there is one, is for the scripts it starts.
    jax.config.update("jax_platforms", "cpu")
    print(
        "This demo runs SD3's architecture, small, with RANDOM weights: its pictures are noise in the right colours."
    )
    make_checkpoint(OUTPUT / "checkpoint")
    run("convert/sd3.py", "-i", OUTPUT / "checkpoint", "-o", OUTPUT / "converted", "--overwrite")
    run(
        *("infer/upscale.py", "--pretrained_model_name_or_path", OUTPUT / "converted"),
        *("--lora_dir", OUTPUT / "lora", "--rank", RANK, "--rank_vae", RANK),
        *("--embedding_dir", OUTPUT / "prompt", "-i", PHOTOS, "-o", OUTPUT / "results", "--overwrite"),
    )
    photos = sorted(path for path in PHOTOS.iterdir() if path.suffix in IMAGE_SUFFIXES)
    sheet = comparison_sheet(
        [compare(path) for path in photos], ["input", "bicubic", "result (random weights)"]
    )
    sheet.save(OUTPUT / "comparison.png")
    print(f"Look at {OUTPUT / 'comparison.png'}  ({time.monotonic() - start:.0f} s)")


def make_checkpoint(folder: Path) -> None:
    """Random weights in diffusers' layout, LoRAs in PEFT's, and embeddings for the prompt."""
    generator = np.random.default_rng(0)
    for part, config in CONFIGS.items():
        params = random_params(config, generator)
        save_tensors(folder / part / f"{TORCH_STEM}.safetensors", dict(write_base(params, config)))
        (folder / part / "config.json").write_text(json.dumps(torch_config(config), indent=2))
        adapter = lora.init(jax.random.key(0), params, TARGETS[part], RANK)
        save_tensors(OUTPUT / "lora" / f"{part}.safetensors", write_lora(adapter, config))
    widths = CONFIGS["transformer"].joint_attention_dim, CONFIGS["transformer"].pooled_projection_dim
    prompt = PromptEmbeds(
        *(generator.standard_normal(shape, np.float32) for shape in ((333, widths[0]), widths[1:]))
    )
    save_prompt_embeds(OUTPUT / "prompt", prompt)


def random_params(config: Config, generator: np.random.Generator) -> Tree:
    """Kernels of variance 1 / inputs, scales 1, biases 0."""

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name == "bias":
            return np.zeros(shape, np.float32)
        if name == "scale":
            return np.ones(shape, np.float32)
        # A stacked dense kernel has three axes, the first of them the layer; a table has three as well.
        fan_in = np.prod(shape[:-1]) if len(shape) != 3 else shape[1]
        return generator.standard_normal(shape, np.float32) / np.sqrt(fan_in, dtype=np.float32)

    leaves = flatten_dict(abstract_params(config))
    return unflatten_dict({path: draw(path[-1], leaf.shape) for path, leaf in leaves.items()})


def run(script: str, *arguments: object) -> None:
    """Runs one of the project's scripts as a user would."""
    command = [script, *map(str, arguments)]
    print(f"\n$ python {' '.join(shorten(word) for word in command)}", flush=True)
    result = subprocess.run([sys.executable, *command], cwd=ROOT)
    if result.returncode:
        sys.exit(f"{script} failed")


def shorten(word: str) -> str:
    return word.removeprefix(f"{ROOT}/")


def compare(path: Path) -> list[Image.Image]:
    photo = Image.open(path).convert("RGB")
    bicubic = photo.resize((4 * photo.width, 4 * photo.height), Image.Resampling.BICUBIC)
    return [photo, bicubic, Image.open(OUTPUT / "results" / f"{path.stem}.png")]


if __name__ == "__main__":
    main()
