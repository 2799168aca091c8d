"""Measures how long the full-size programs take to compile, with layers scanned and unrolled, on a CPU from shapes alone.

python bench/compile.py                 # scanned, then unrolled; some minutes
python bench/compile.py --no_unrolled
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import timing
import training_program

from tsdsr_jax import cli
from tsdsr_jax.models.folded import FoldedMMDiT, fold
from tsdsr_jax.models.mmdit import MMDiT, MMDiTConfig
from tsdsr_jax.models.params import abstract_params
from tsdsr_jax.models.vae import AutoencoderKL, VAEConfig
from tsdsr_jax.training.sharding import make_mesh

TOKENS = 333
LATENT = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    unrolled: bool = True
    """Also compile with all layers unrolled."""
    training: bool = True
    """Also compile the training step: 2 images, DASM, LPIPS, gradient checkpointing, bf16."""
    json: Path | None = None
    """JSON file for the results."""


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    rows: dict[str, dict[str, float]] = {}
    for name, seconds in programs(options):
        rows[name] = {"scanned": seconds()}
        line = f"{name}: {rows[name]['scanned']:.1f} s"
        if options.unrolled and "autoencoder" not in name:
            jax.clear_caches()
            with unrolled():
                rows[name]["unrolled"] = seconds()
            line += f", unrolled {rows[name]['unrolled']:.1f} s"
        print(line, flush=True)
    if options.json:
        found = {"versions": timing.versions(), "seconds": rows}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


@contextmanager
def unrolled() -> Iterator[None]:
    """Makes Flax's scans run all layers in one iteration."""
    scan = nn.scan

    def at_once(*arguments: Any, **how: Any) -> Any:
        return scan(*arguments, **(how | {"unroll": how["length"]}))

    nn.scan = at_once
    try:
        yield
    finally:
        nn.scan = scan


def programs(options: Options) -> Iterator[tuple[str, Callable[[], float]]]:
    """Yields (name, function that compiles the program and returns the seconds)."""
    config, vae = MMDiTConfig.sd3_medium(), VAEConfig.sd3()
    params, autoencoder = abstract_params(config), abstract_params(vae)
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    latents, context = shape((1, LATENT, LATENT, 16)), shape((1, TOKENS, config.joint_attention_dim))
    pooled, timestep = shape((1, config.pooled_projection_dim)), shape((1,))
    yield "transformer", lambda: compiled(
        lambda params, *inputs: MMDiT(config).apply({"params": params}, *inputs),
        params, latents, timestep, context, pooled,
    )  # fmt: skip
    folding = partial(fold, config, timestep=1000.0, dtype=jnp.float32)
    left = jax.eval_shape(folding, params, shape(context.shape[1:]), shape(pooled.shape[1:]))
    tokens = (LATENT // config.patch_size) ** 2
    patches = shape((1, tokens, config.patch_size**2 * config.in_channels))
    positions = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    yield (
        "transformer, folded",
        lambda: compiled(
            lambda params, *inputs: FoldedMMDiT(config).apply({"params": params}, *inputs),
            left,
            patches,
            positions,
        ),
    )
    for method, x in (("encode", shape((1, 8 * LATENT, 8 * LATENT, 3))), ("decode", latents)):
        run = partial(AutoencoderKL(vae).apply, method=method)
        yield f"autoencoder, {method}", lambda run=run, x=x: compiled(run, {"params": autoencoder}, x)
    if options.training:
        yield "training step", training_step


def training_step() -> float:
    lowered = training_program.lower(training_program.StepOptions(checkpointing=True), make_mesh())
    start = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - start


def compiled(function: Callable, *shapes: Any) -> float:
    start = time.perf_counter()
    jax.jit(function).lower(*shapes).compile()
    return time.perf_counter() - start


if __name__ == "__main__":
    cli.run(main)
