"""What the gradients of the autoencoder's adapters lose when devices add them up in 16 bits, compared with float32.

    python bench/gradient_sums.py                          # minutes on two cores

Each simulated device has photographs of its own and computes in 16 bits. Their gradients are added one after the other, as
in a ring, which rounds a sum once for every device. `off` is the root mean square of the error, divided by that of the
gradient in float32. Weights and photographs are random.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.typing import DTypeLike

from tsdsr_jax import cli
from tsdsr_jax.devices import DTYPES, matmul_precision
from tsdsr_jax.errors import UserError
from tsdsr_jax.models import lora
from tsdsr_jax.models.params import Tree, init_params
from tsdsr_jax.models.vae import AutoencoderKL, VAEConfig

CONFIG = VAEConfig(block_out_channels=(32, 64, 128, 128))
# float16's keeps sums of 64 devices below 65504, as the dynamic loss scale would.
LOSS_SCALES = {"fp16": 2.0**10, "bf16": 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    devices: tuple[int, ...] = (8, 64)
    """Numbers of devices."""
    batch: int = 2
    """Photographs per device."""
    side: int = 64
    """Side of the photographs."""
    rank: int = 16
    """Rank of the adapters."""
    seed: int = 0
    """Seed of all random numbers."""


def gradients(
    dtype: DTypeLike, loss_scale: float, options: Options, params: Tree, adapter: Tree
) -> np.ndarray:
    """Computes each device's gradient, (devices, values), in the dtype in which it would be sent."""
    autoencoder = AutoencoderKL(CONFIG, dtype=dtype)

    @jax.jit
    def gradient(adapter: Tree, photos: jax.Array, targets: jax.Array) -> jax.Array:
        def loss(adapter: Tree) -> jax.Array:
            posterior = autoencoder.apply(
                {"params": params, "lora": adapter}, photos, method=AutoencoderKL.encode
            )
            return loss_scale * jnp.square(posterior.mean - targets).mean()

        # Rounded before the derivative is taken: as in the network, which rounds them where it uses them.
        rounded = jax.tree.map(lambda leaf: leaf.astype(dtype), adapter)
        return ravel_pytree(jax.grad(loss)(rounded))[0]

    found = []
    with matmul_precision(dtype):
        for device in range(max(options.devices)):
            random = np.random.default_rng([options.seed, device])
            photos = random.uniform(-1, 1, (options.batch, options.side, options.side, 3))
            latent = options.side // CONFIG.factor
            targets = random.standard_normal((options.batch, latent, latent, CONFIG.latent_channels))
            found.append(np.asarray(gradient(adapter, jnp.float32(photos), jnp.float32(targets))))
    return np.stack(found)


def ring_sum(parts: np.ndarray) -> np.ndarray:
    """Adds up the rows in their own dtype. As in a ring, each piece of the values begins at another device."""
    rows = len(parts)
    pieces = np.array_split(parts, rows, axis=1)
    return np.concatenate([_one_by_one(np.roll(piece, first, axis=0)) for first, piece in enumerate(pieces)])


def _one_by_one(parts: np.ndarray) -> np.ndarray:
    total = parts[0]
    for part in parts[1:]:
        total = (total + part).astype(parts.dtype)
    return total


def off(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(found - exact)) / np.mean(np.square(exact))))


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    cli.at_least(options, 1, "batch", "rank")
    if options.side < CONFIG.factor or options.side % CONFIG.factor:
        raise UserError(f"--side {options.side}: expected a multiple of {CONFIG.factor}")
    if min(options.devices, default=0) < 1:
        raise UserError(f"--devices {min(options.devices, default=0)}: expected at least 1")
    key = jax.random.key(options.seed)
    params = jax.jit(partial(init_params, CONFIG))(key)
    fresh = lora.init(key, params, lora.VAE_ENCODER_TARGETS, options.rank)
    # B is not 0 after the first step; then A has a gradient, too.
    adapter = jax.tree.map(lambda leaf: leaf + 0.02 * jax.random.normal(key, leaf.shape), fresh)
    exact = gradients(jnp.float32, 1, options, params, adapter).astype(np.float64)
    for name, loss_scale in LOSS_SCALES.items():
        sent = gradients(DTYPES[name], loss_scale, options, params, adapter)
        for devices in options.devices:
            truth = exact[:devices].sum(0)
            half = ring_sum(sent[:devices]).astype(np.float64) / loss_scale
            assert np.isfinite(half).all(), "overflow: lower the loss scale"
            wide = sent[:devices].astype(np.float64).sum(0) / loss_scale
            print(
                f"{devices} devices, {name}: {100 * off(half, truth):.3f} % off, summed in float32"
                f" {100 * off(wide, truth):.3f} %, one from the other {100 * off(half, wide):.3f} %",
                flush=True,
            )


if __name__ == "__main__":
    cli.run(main)
