"""The parts of upscaling that `inference.py` times, in both frameworks, on the same random inputs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests" / "support")]
from torch_networks import TOKENS, TorchNetworks, synchronized

from tsdsr_jax import devices
from tsdsr_jax.images.resize import bicubic
from tsdsr_jax.models import attention
from tsdsr_jax.models.mmdit import MMDiTConfig, grid_positions, patchify
from tsdsr_jax.models.params import LATENT_FACTOR
from tsdsr_jax.models.vae import AutoencoderKL, VAEConfig
from tsdsr_jax.upscaling.engine import Engine, Prepared
from tsdsr_jax.upscaling.planning import Settings, batch_size, slices

Part = Literal["encode", "transformer", "decode", "end"]


class Work(NamedTuple):
    """Attributes:
    run: does the work and returns (B, H, W, C); done when it returns.
    planned: bytes that it takes beyond weights and inputs, if it is a single program.
    """

    run: Callable[[], Any]
    planned: Callable[[], int] | None = None


class Parts:
    """Args:
    engine: ours.
    settings: for whole photographs.
    configs: of both networks.
    side: of the results, in pixels.
    """

    def __init__(self, engine: Engine, settings: Settings, configs: tuple[MMDiTConfig, VAEConfig], side: int):
        self.engine, self.settings, self.configs, self.side = engine, settings, configs, side
        self.latent = side // LATENT_FACTOR

    def inputs(self, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draws enlarged photographs (B, H, W, 3) in [−1, 1], latents and noise (B, h, w, C)."""
        random = np.random.default_rng(batch)
        shape = (batch, self.latent, self.latent, self.configs[1].latent_channels)
        images = np.stack([self._enlarged(photo) for photo in self._photos(batch)])
        latents, noise = (random.standard_normal(shape).astype(np.float32) for _ in range(2))
        return images, latents, noise

    def _photos(self, batch: int) -> np.ndarray:
        """Draws photographs, (B, H/4, W/4, 3) uint8."""
        shape = (batch, self.side // 4, self.side // 4, 3)
        return np.random.default_rng(batch + 1).integers(0, 256, shape, np.uint8)

    def _enlarged(self, photo: np.ndarray) -> np.ndarray:
        image = bicubic(photo.astype(np.float32) / 255, self.side, self.side)
        return np.clip(image * 2 - 1, -1, 1)

    def ours(self, part: Part, batch: int) -> Work:
        engine = self.engine
        if part == "end":
            return Work(self._whole(batch))
        images, latents, noise = map(jnp.asarray, self.inputs(batch))
        if part == "encode":
            return self._program(engine.encode, engine.networks.vae, images, noise, None)
        if part == "decode":
            nothing = jnp.zeros((*latents.shape[:3], latents.shape[3] + 1))
            return self._program(engine.decode, engine.networks.vae, latents, nothing, None)
        config = self.configs[0]
        positions = jnp.tile(jnp.asarray(grid_positions(config, self.latent, self.latent)), (batch, 1))
        patches = patchify(latents, config.patch_size)
        return self._program(engine.velocity, engine.networks.transformer, patches, positions, None)

    def _program(self, function: Any, *inputs: Any) -> Work:
        """Of a function that was jitted; of several results the first counts."""
        dtype = self.engine.dtype

        def run() -> jax.Array:
            with devices.matmul_precision(dtype):
                found = function(*inputs)
            return jax.block_until_ready(found[0] if isinstance(found, tuple) else found)

        def planned() -> int:
            with devices.matmul_precision(dtype):
                memory = function.lower(*inputs).compile().memory_analysis()
            return memory.temp_size_in_bytes + memory.output_size_in_bytes

        return Work(run, planned)

    def _whole(self, batch: int) -> Callable[[], list[np.ndarray]]:
        """Host to host, in the batches that infer/upscale.py makes."""
        engine, settings, side = self.engine, self.settings, (self.side, self.side)
        plan = settings.plan((self.side // 4, self.side // 4))
        noise = np.zeros((self.latent, self.latent, engine.latent_channels), np.float32)
        photos = [Prepared(plan, photo, noise) for photo in self._photos(batch)]

        def run() -> list[np.ndarray]:
            size = batch_size(len(photos), 1, engine.largest_batch(side, settings))
            launched = [engine.launch(some, side, settings, batch=size) for some in slices(photos, size)]
            return [picture for item in launched for picture in item.results()]

        return run

    def theirs(self, part: Part, batch: int, networks: TorchNetworks) -> Work:
        device, dtype = networks.text.pooled.device, networks.text.pooled.dtype

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device, dtype).permute(0, 3, 1, 2)

        photos = self._photos(batch)
        images, latents, noise = map(tensor, self.inputs(batch))

        def whole() -> torch.Tensor:
            small = tensor(photos).div(255)
            enlarged = torch.nn.functional.interpolate(small, (self.side, self.side), mode="bicubic")
            found = networks.encode((enlarged * 2 - 1).clamp(-1, 1), torch.zeros_like(noise))
            return networks.decode(found - networks.velocity(found)).cpu()

        run = {
            "encode": lambda: networks.encode(images, noise),
            "transformer": lambda: networks.velocity(latents),
            "decode": lambda: networks.decode(latents),
            "end": whole,
        }[part]
        return Work(synchronized(device.type, run))

    def apart(self, part: Part, ours: Any, theirs: torch.Tensor) -> float:
        """Root mean square of the difference, relative to PyTorch's result."""
        wanted = theirs.float().cpu().numpy().transpose(0, 2, 3, 1)
        if part == "transformer":
            wanted = np.asarray(patchify(jnp.asarray(wanted), self.configs[0].patch_size))
        found = np.stack(ours) if isinstance(ours, list) else np.asarray(ours)
        return float(np.sqrt(np.square(found.astype(np.float32) - wanted).mean() / np.square(wanted).mean()))

    def flop(self, part: Part) -> float:
        """FLOPs per image; a multiplication and an addition count as two. Our autoencoder, with shortened up-sampling."""
        if part == "end":
            return sum(self.flop(part) for part in ("encode", "transformer", "decode"))
        if part == "transformer":
            return transformer_flop(self.configs[0], (self.latent // self.configs[0].patch_size) ** 2)
        images, latents, _ = self.inputs(1)
        network = AutoencoderKL(self.configs[1])

        def run(params: Any, x: jax.Array) -> Any:
            return network.apply({"params": params}, x, method=part)

        x = images if part == "encode" else latents
        with whole_attention():
            return jax.jit(run).lower(self.engine.networks.vae, x).cost_analysis()["flops"]


@contextmanager
def whole_attention() -> Iterator[None]:
    """Computes the autoencoder's attention without chunks, because XLA counts a loop's body once."""
    before = attention._LOOP_QUERIES
    attention._LOOP_QUERIES = 2**62
    try:
        yield
    finally:
        attention._LOOP_QUERIES = before


def transformer_flop(config: MMDiTConfig, tokens: int) -> float:
    """FLOPs of the joint blocks; includes the last block's text queries, which PyTorch computes."""
    square = config.width**2
    image = 12 * config.num_layers * square * 2 * tokens
    text = (12 * (config.num_layers - 1) + 3) * square * 2 * TOKENS
    attention = config.num_layers * 4 * (tokens + TOKENS) ** 2 * config.width
    return image + text + attention
