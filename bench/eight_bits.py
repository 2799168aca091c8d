"""Measures how far eight-bit weights are from full ones: layer by layer, in the velocities, and in the pictures.

python bench/eight_bits.py                                             # the bundled model on the example photographs
python bench/eight_bits.py --model sd3 --lora checkpoint/tsdsr --prompt dataset/default

Everything computes in float32. A layer's error is that of its products for the inputs that it has with full weights, without
the bias; errors of layers and velocities are root mean squares, relative to the correct results. The last column is the
largest input of these layers, of 448·scale; above 1 it is clipped.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tsdsr_jax import Upscaler, cli
from tsdsr_jax.images.search import find_photographs
from tsdsr_jax.models.eight_bits import E4M3_MAX, StoredDense, normalized_scale
from tsdsr_jax.models.folded import FoldedMMDiT
from tsdsr_jax.models.params import Tree

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "photos"


@dataclasses.dataclass(frozen=True)
class Options:
    model: str | None = None
    """SD3: a diffusers folder, a hub id, or a folder written by convert/sd3.py. Default: the small bundled model."""
    lora: str | None = None
    """Folder of TSD-SR's LoRAs, or "none"."""
    prompt: str | None = None
    """Folder with the prompt's embedding."""
    photos: Path = EXAMPLES
    """Folder of photographs."""
    upscale: float = 4.0
    """Factor by which both sides are enlarged."""
    tiles: int = 8
    """Number of tiles to measure layers and velocities with."""


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    photos = find_photographs(options.photos).files
    full, tiles = load(options, "full"), list[Any]()
    network = full.engine.velocity

    def remember(*arguments: Any) -> jax.Array:
        tiles.append(arguments[1:3])
        return network(*arguments)

    full.engine.__dict__["velocity"] = remember
    wanted = [picture(full, photo, options) for photo in photos]
    chosen = tiles[:: -(-len(tiles) // options.tiles)]
    patches, positions = (jnp.concatenate(parts) for parts in zip(*chosen, strict=True))
    config, params = full.engine.networks.transformer_config, full.engine.networks.transformer
    velocity, inputs = watched(FoldedMMDiT(config), params, patches, positions)
    for kind in ("int8", "fp8"):
        stored = load(options, kind)
        eight = stored.engine.networks.transformer
        print_layers(inputs, params, eight)
        made = FoldedMMDiT(config).apply({"params": eight}, patches, positions)
        print(f"{kind} velocities: {relative(made, velocity):.4f}")
        for photo, reference in zip(photos, wanted, strict=True):
            apart = picture(stored, photo, options) - reference
            psnr = 10 * np.log10(255**2 / max(np.square(apart).mean(), 1e-10))
            print(f"{kind} {photo.name}: {psnr:.1f} dB, at most {np.abs(apart).max():.0f} levels", flush=True)


def load(options: Options, weights: Any) -> Upscaler:
    return Upscaler.from_pretrained(
        options.model, lora=options.lora, prompt=options.prompt, dtype="fp32", weights=weights
    )


def picture(upscaler: Upscaler, photo: Path, options: Options) -> np.ndarray:
    return np.asarray(upscaler(photo, scale=options.upscale), np.float64)


def watched(
    network: FoldedMMDiT, params: Tree, patches: jax.Array, positions: jax.Array
) -> tuple[jax.Array, dict[tuple[str, ...], jax.Array]]:
    """The network's velocities, and the inputs of its layers by path."""
    inputs = {}

    def watch(call: Any, arguments: Any, keywords: Any, context: Any) -> Any:
        if isinstance(context.module, StoredDense):
            inputs[context.module.path] = arguments[0]
        return call(*arguments, **keywords)

    with nn.intercept_methods(watch):
        velocity = network.apply({"params": params}, patches, positions)
    assert isinstance(velocity, jax.Array)
    return velocity, inputs


def print_layers(inputs: dict[tuple[str, ...], jax.Array], params: Tree, eight: Tree) -> None:
    """Prints the mean and largest error of layers of the same name."""
    errors, largest = defaultdict[str, list[float]](list), defaultdict[str, float](float)
    for path, x in inputs.items():
        layers = (at(params, path), at(eight, path))
        made, wanted = (product(layer, x) for layer in layers[::-1])
        name = "/".join(path[1:])
        errors[name].append(relative(made, wanted))
        if layers[1]["kernel"].dtype != jnp.int8:
            scale = layers[1].get("input_scale", normalized_scale(x.shape[-1]))
            largest[name] = max(largest[name], float(jnp.abs(x).max() / (E4M3_MAX * scale)))
    for name, found in errors.items():
        told = f", inputs up to {largest[name]:.2f}" if name in largest else ""
        print(f"  {name:20} {np.mean(found):.4f}, at most {max(found):.4f}{told}")


def at(tree: Tree, path: tuple[str, ...]) -> Tree:
    for name in path:
        tree = tree[name]
    return tree


def product(layer: Tree, x: jax.Array) -> jax.Array:
    without_bias = {**layer, "bias": jnp.zeros_like(layer["bias"])}
    made = StoredDense(jnp.float32).apply({"params": without_bias}, x)
    assert isinstance(made, jax.Array)
    return made


def relative(made: Any, wanted: Any) -> float:
    return float(jnp.sqrt(jnp.square(made - wanted).mean() / jnp.square(wanted).mean()))


if __name__ == "__main__":
    cli.run(main)
