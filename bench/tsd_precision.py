"""How exact the gradient of Target Score Distillation is in 16 bits, compared with float32.

    python bench/tsd_precision.py                          # minutes on two cores
    python bench/tsd_precision.py --size half --points 1

Each term of the gradient is a difference of velocities that are almost equal, and guidance multiplies their roundings. The
network has random weights; the auxiliary network is the teacher with low-rank changes. `off` is the root mean square of the
error divided by that of the gradient.
"""

from __future__ import annotations

import dataclasses
import zlib
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tsdsr_jax import cli
from tsdsr_jax.devices import DTYPES, matmul_precision
from tsdsr_jax.distillation.tsd import TSDConfig, tsd_gradient
from tsdsr_jax.models import flow, lora
from tsdsr_jax.models.guidance import Text, guided
from tsdsr_jax.models.mmdit import MMDiT, MMDiTConfig
from tsdsr_jax.models.params import Tree, init_params

SIZES = {
    "tiny": MMDiTConfig.tiny(),
    "deep": MMDiTConfig.tiny(num_layers=24),  # as many layers as SD3-medium
    "half": MMDiTConfig(
        num_layers=12, num_attention_heads=12, caption_projection_dim=768, joint_attention_dim=2048,
        pooled_projection_dim=1024,
    ),
}  # fmt: skip
BATCH, SIDE, TOKENS, RANK = 2, 16, 24, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    size: Literal["tiny", "deep", "half"] = "deep"
    """Size of the transformer: three layers of width 64, 24 layers of width 64, or 12 layers of width 768."""
    points: int = 4
    """Points of the trajectory."""
    guidance_scale: float = 7.5
    """Guidance of both networks."""
    change: float = 0.05
    """Size of the auxiliary network's low-rank changes, relative to the weights'."""
    seed: int = 0
    """Seed of all random numbers."""


def changed(config: MMDiTConfig, params: Tree, size: float, key: jax.Array) -> Tree:
    """Adds a random product of rank `RANK` to every kernel that adapters of the student change."""
    adapter = lora.init(key, params, lora.STUDENT_TARGETS, RANK)

    def drawn(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        values = jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), leaf.shape)
        # Kernels have a variance of 1 / inputs; A's inputs are the kernel's, and B's are the RANK columns of A.
        return values / np.sqrt(leaf.shape[-2]) * (size if name.endswith("['b']") else 1)

    return lora.merge(params, jax.tree_util.tree_map_with_path(drawn, adapter))


def gradient_in(dtype: DTypeLike, options: Options, teacher: Tree, auxiliary: Tree) -> np.ndarray:
    """Computes the gradient with both networks in `dtype`, (B, h, w, C)."""
    config = SIZES[options.size]
    network = MMDiT(config, dtype=dtype)
    random = np.random.default_rng(options.seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    def text() -> Text:
        return Text(
            normal(BATCH, TOKENS, config.joint_attention_dim), normal(BATCH, config.pooled_projection_dim)
        )

    def velocity(params: Tree, latents: jax.Array, timestep: jax.Array, text: Text) -> jax.Array:
        found = network.apply({"params": params}, latents, timestep, *text)
        assert isinstance(found, jax.Array)
        return found.astype(jnp.float32)

    prompt, null = text(), text()
    latents = BATCH, SIDE, SIDE, config.in_channels
    real = normal(*latents)
    fake, noise = real + 0.3 * normal(*latents), normal(*latents)
    index, bias = jnp.asarray([600, 200]), jnp.asarray([3, -10])
    tsd = dataclasses.replace(TSDConfig(), point_weights=(1.0,) + (0.3,) * (options.points - 1))

    @jax.jit
    def gradient(teacher: Tree, auxiliary: Tree) -> jax.Array:
        predict = (
            guided(partial(velocity, params), prompt, null, options.guidance_scale)
            for params in (teacher, auxiliary)
        )
        found, _ = tsd_gradient(fake, real, noise, index, bias, *predict, jnp.asarray(flow.sigmas(3.0)), tsd)
        return found

    with matmul_precision(dtype):
        return np.asarray(gradient(teacher, auxiliary))


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    cli.at_least(options, 1, "points")
    cli.at_least(options, 0, "seed")
    config, key = SIZES[options.size], jax.random.key(options.seed)
    teacher = jax.jit(partial(init_params, config))(key)
    auxiliary = changed(config, teacher, options.change, key)
    exact = gradient_in(jnp.float32, options, teacher, auxiliary)
    for name in ("fp16", "bf16"):
        error = gradient_in(DTYPES[name], options, teacher, auxiliary) - exact
        off = np.sqrt(np.mean(np.square(error)) / np.mean(np.square(exact)))
        print(f"{options.size}, {options.points} points, {name}: {100 * off:.1f} % off", flush=True)


if __name__ == "__main__":
    cli.run(main)
