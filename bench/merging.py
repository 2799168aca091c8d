"""Compares LoRA beside the weights with LoRA merged inside the scan, layer by layer, in passes without gradients.

    python bench/merging.py --size half --device cpu
    python bench/merging.py                                # SD3-medium on a GPU

A step of DASM evaluates teacher and auxiliary network 24 times per image. Merging costs a product of A and B and a copy of
the kernel per layer and pass, and saves two thin products per token. But a weight in bfloat16 has 8 bits, and an adapter may
add less than the last of them. `kept` is how much of the adapter's change of the velocity remains when kernels (or, beside
them, A and B) are rounded to bfloat16 and everything else is float32: 1 minus the root mean square of the error divided by
that of the change. B starts at zero and moves by at most about the learning rate per step: 1e-6 for the auxiliary network.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import timing
from inputs import TOKENS
from torch_networks import Size, configs

from tsdsr_jax import cli, devices
from tsdsr_jax.errors import UserError
from tsdsr_jax.models import lora
from tsdsr_jax.models.layers import Dense
from tsdsr_jax.models.mmdit import MMDiT, MMDiTConfig
from tsdsr_jax.models.params import Tree, abstract_params

GUIDED = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    size: Size = "full"
    """Size of the transformer."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Device."""
    mixed_precision: Literal["fp16", "bf16", "fp32"] | None = None
    """Precision of the timing. Default: bf16 on a GPU, fp32 on a CPU."""
    side: int = 512
    """Side of the images, in pixels."""
    batch: int = 2
    """Images; each is evaluated with the empty and with the real prompt."""
    rank: int = 64
    """Rank of the adapter."""
    std: tuple[float, ...] = (1e-5, 1e-4, 1e-3)
    """Standard deviations of B for which to print `kept`; repeat for several."""
    seconds: float = 5.0
    """Least number of seconds to time each for."""
    json: Path | None = None
    """JSON file for the results."""


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    cli.at_least(options, 1, "batch", "rank")
    largest = 8 * configs(options.size)[0].patch_size * configs(options.size)[0].pos_embed_max_size
    if options.side % 16 or not 64 <= options.side <= largest:
        raise UserError(f"--side {options.side}: expected a multiple of 16 from 64 to {largest}")
    if not all(std > 0 for std in options.std):
        raise UserError("--std: expected more than 0")
    if options.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    timing.check_device(options.device)
    precision = options.mixed_precision or ("fp32" if options.device == "cpu" else "bf16")
    config = configs(options.size)[0]
    given = inputs(options, config)
    base, dtype = random_base(config), devices.DTYPES[precision]
    adapter = random_adapter(base, options.rank, options.std[-1])
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype), base)
    runs = {how: passes(config, dtype, how, rounded, adapter, given) for how in ("beside", "merged")}
    times = {how: timing.median(found) for how, found in timing.in_turn(runs, options.seconds).items()}
    ratio = times["beside"] / times["merged"]
    print(
        f"{jax.devices()[0].device_kind}, {precision}, {options.size}, {options.batch} × {options.side}², guided, rank "
        f"{options.rank}: beside {times['beside'] * 1e3:.1f} ms, merged {times['merged'] * 1e3:.1f} (ratio {ratio:.2f})"
    )
    del base, adapter, rounded, runs
    kept = [exactness(config, std, options, given) for std in options.std]
    if options.json:
        found = {"precision": precision, "seconds": times, "ratio": ratio, "kept": kept}
        options.json.write_text(json.dumps(found | {"versions": timing.versions()}, indent=2) + "\n")


def exactness(
    config: MMDiTConfig, std: float, options: Options, given: tuple[jax.Array, ...]
) -> dict[str, float]:
    """The fraction of the adapter's effect that remains in bfloat16, beside and merged."""
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), random_base(config))
    adapter = random_adapter(base, options.rank, std)
    wanted = passes(config, jnp.float32, "beside", base, adapter, given)()
    without = passes(config, jnp.float32, "beside", base, {}, given)()
    change = jnp.sqrt(jnp.square(wanted - without).mean())
    found: dict[str, float] = {"std": std}
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), adapter)
    got = {
        "beside": passes(config, jnp.float32, "beside", base, rounded, given)(),
        "merged": passes(config, jnp.float32, "merged", base, adapter, given, kernels=jnp.bfloat16)(),
    }
    for how, velocity in got.items():
        found[how] = float(1 - jnp.sqrt(jnp.square(velocity - wanted).mean()) / change)
    print(f"  B of deviation {std:g}: kept {found['beside']:.3f} beside, {found['merged']:.3f} merged")
    return found


def passes(
    config: MMDiTConfig,
    dtype: Any,
    how: str,
    base: Tree,
    adapter: Tree,
    given: tuple[jax.Array, ...],
    kernels: Any = None,
) -> Callable[[], jax.Array]:
    """A jitted pass; merged kernels are rounded to `kernels`, by default to `dtype`."""

    def merging(
        call: Callable, arguments: tuple, named: dict, context: nn.module.InterceptorContext
    ) -> jax.Array:
        layer = context.module
        if not isinstance(layer, Dense) or not layer.has_variable("lora", "a"):
            return call(*arguments, **named)
        kernel, bias = (layer.get_variable("params", name) for name in ("kernel", "bias"))
        pair = (layer.get_variable("lora", name) for name in ("a", "b"))
        kernel = lora.merge_kernel(kernel, *pair, dtype=kernels or dtype)
        return arguments[0].astype(dtype) @ kernel.astype(dtype) + bias.astype(dtype)

    @jax.jit
    def run(base: Tree, adapter: Tree, *given: jax.Array) -> jax.Array:
        if how == "beside":
            return MMDiT(config, dtype).apply({"params": base, "lora": adapter}, *given)
        with nn.intercept_methods(merging):
            return MMDiT(config, dtype).apply({"params": base, "lora": adapter}, *given)

    def ready() -> jax.Array:
        with devices.matmul_precision(dtype):
            return jax.block_until_ready(run(base, adapter, *given))

    return ready


def inputs(options: Options, config: MMDiTConfig) -> tuple[jax.Array, ...]:
    """Latents, timesteps, text and pooled text of a guided pass."""
    rows, latent = options.batch * GUIDED, options.side // 8
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (rows, latent, latent, config.in_channels)),
        jnp.full((rows,), 500.0),
        jax.random.normal(keys[1], (rows, TOKENS, config.joint_attention_dim)),
        jax.random.normal(keys[2], (rows, config.pooled_projection_dim)),
    )


def random_base(config: MMDiTConfig) -> Tree:
    """Kernels of unit gain, small biases, scales of one."""

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, key = path[-1].key, jax.random.key(zlib.crc32(jax.tree_util.keystr(path).encode()))
        noise = jax.random.normal(key, leaf.shape)
        if name == "kernel":
            return noise * leaf.shape[-2] ** -0.5
        return 1 + 0.1 * noise if name == "scale" else 0.1 * noise

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def random_adapter(base: Tree, rank: int, std: float) -> Tree:
    adapter = lora.init(jax.random.key(1), base, lora.AUXILIARY_TARGETS, rank)

    def draw(path: Any, leaf: jax.Array) -> jax.Array:
        return std * jax.random.normal(jax.random.key(2), leaf.shape) if path[-1].key == "b" else leaf

    return jax.tree_util.tree_map_with_path(draw, adapter)


if __name__ == "__main__":
    cli.run(main)
