"""Prints how much memory upscaling with SD3 takes beyond its weights on a CPU, without running it.

    python bench/inference_memory.py                                   # 512² to 4096², whole and in bands; a minute
    python bench/inference_memory.py --side 4096 --band 256

Programs are compiled for CPUs from shapes alone, and the figures are XLA's plans. They lack the scores of attention, which
XLA's library allocates itself on CPUs: 67 MB for the autoencoder at 512², 15 MB for a tile in the transformer. CPUs compute
half precision in float32; gpu_plan.py prints what a GPU takes. The last line for each size is the free memory from which
infer/upscale.py computes an image of that size whole on a GPU.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import timing

from tsdsr_jax import cli
from tsdsr_jax.devices import DTYPES
from tsdsr_jax.errors import UserError
from tsdsr_jax.models.folded import FoldedMMDiT, fold
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import LATENT_FACTOR, abstract_params
from tsdsr_jax.models.vae import AutoencoderKL, VAEConfig, whole_image_bytes

GB = 1e9
TOKENS = 333
# In latent pixels.
TILE = 64
CONFIGS = MMDiTConfig.sd3_medium(), VAEConfig.sd3()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    side: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Side of the results, in pixels; repeat for several."""
    band: int = 512
    """Side, in pixels, of the area computed at a time when an image is not computed whole: --vae_encoder_tiled_size of
    infer/upscale.py, and eight times its --vae_decoder_tiled_size."""
    mixed_precision: Literal["fp16", "bf16", "fp32"] = "fp32"
    """Precision of computation and weights."""
    json: Path | None = None
    """JSON file for the results."""


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    if any(side % 16 or side < 64 for side in (*options.side, options.band)):
        raise UserError("--side, --band: expected multiples of 16 from 64")
    jax.config.update("jax_platforms", "cpu")
    rows = []
    for row in measured(options):
        rows.append(row)
        print(f"{row['what']:>28} {row['gb']:7.2f} GB", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"versions": timing.versions(), "rows": rows}, indent=2) + "\n")


def measured(options: Options) -> Iterator[dict[str, Any]]:
    """Yields the figures: {"what", "gb"}."""
    dtype = DTYPES[options.mixed_precision]
    yield from of_the_transformer(options, dtype)
    vae = kept(abstract_params(CONFIGS[1]), dtype)
    yield told("autoencoder", size(vae))
    for side in options.side:
        latent, channels = side // LATENT_FACTOR, CONFIGS[1].latent_channels
        areas = options.band**2, (options.band // LATENT_FACTOR) ** 2
        image, latents = shape(1, side, side, CONFIGS[1].in_channels), shape(1, latent, latent, channels)
        for part, x, area in (("encode", image, areas[0]), ("decode", latents, areas[1])):
            for how, band in (("whole", None), ("in bands", area)):
                yield told(f"{part} {side}², {how}", planned(autoencoder(dtype, part, band), vae, x))
        allowed = whole_image_bytes(CONFIGS[1], dtype, "gpu") * side**2
        yield told(f"{side}² whole where there are", allowed)


def of_the_transformer(options: Options, dtype: Any) -> Iterator[dict[str, Any]]:
    """The transformer's weights, whole and in eight bits, and what a tile takes beyond them."""
    config = CONFIGS[0]
    params = kept(abstract_params(config), dtype)
    context = shape(TOKENS, config.joint_attention_dim), shape(config.pooled_projection_dim)
    tokens = (TILE // config.patch_size) ** 2
    inputs = shape(1, tokens, config.patch_size**2 * config.in_channels), shape(1, tokens, dtype=jnp.int32)
    for kind in (None, "int8"):
        folded = jax.eval_shape(
            partial(fold, config, timestep=1000.0, dtype=dtype, eight_bits=kind), params, *context
        )
        yield told(f"transformer, {kind or options.mixed_precision}", size(folded))
        network = FoldedMMDiT(config, dtype)
        yield told(f"  a tile of {TILE}×{TILE}", planned(network.apply, {"params": folded}, *inputs))


def autoencoder(dtype: Any, part: str, band: int | None) -> Callable[[Any, jax.Array], Any]:
    network = AutoencoderKL(CONFIGS[1], dtype)
    return lambda params, x: network.apply({"params": params}, x, None, band, method=part)


def shape(*sides: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sides, dtype)


def kept(params: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)


def size(params: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def planned(run: Callable[..., Any], *shapes: Any) -> int:
    """Peak bytes of a program beyond its arguments, results included."""
    found = jax.jit(run).lower(*shapes).compile().memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes


def told(what: str, taken: float) -> dict[str, Any]:
    return {"what": what, "gb": taken / GB}


if __name__ == "__main__":
    cli.run(main)
