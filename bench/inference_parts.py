"""The parts of upscaling that `inference.py` and `lease/` time, on random inputs. PyTorch's are in `torch_parts.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from inputs import TOKENS, photographs, upscaling_inputs

from tsdsr_jax import devices
from tsdsr_jax.models import attention
from tsdsr_jax.models.mmdit import MMDiTConfig, grid_positions, patchify, unpatchify
from tsdsr_jax.models.params import LATENT_FACTOR
from tsdsr_jax.models.vae import AutoencoderKL
from tsdsr_jax.upscaling.engine import Engine, Prepared
from tsdsr_jax.upscaling.planning import Settings, batch_size, slices

Part = Literal["encode", "transformer", "decode", "end"]


class Work(NamedTuple):
    """Attributes:
    launch: starts the work and returns (B, H, W, C), which the device may still be computing.
    planned: bytes that it takes beyond weights and inputs, if it is a single program.
    """

    launch: Callable[[], Any]
    planned: Callable[[], int] | None = None

    def run(self) -> Any:
        """Does the work; done when it returns."""
        return jax.block_until_ready(self.launch())


class Parts:
    """Args:
    engine: ours.
    side: of the results, in pixels.
    at_a_time: photographs and tiles that are computed together.
    """

    def __init__(self, engine: Engine, side: int, at_a_time: int):
        self.engine, self.side, self.latent = engine, side, side // LATENT_FACTOR
        self.settings = Settings(
            latent_tile=min(128, self.latent),
            process_size=64,
            sample=False,
            tile_batch=at_a_time,
            photo_batch=at_a_time,
        )

    def inputs(self, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return upscaling_inputs(batch, self.side, self.engine.latent_channels)

    def ours(self, part: Part, batch: int) -> Work:
        engine = self.engine
        if part == "end":
            return Work(self._whole(batch))
        networks = engine.networks
        images, latents, noise = self.inputs(batch)
        # Placed as `launch` places them, so that the same programs run.
        if part == "encode":
            return self._program(engine.encode, networks.vae, *self._split(images, noise), None)
        if part == "decode":
            nothing = np.zeros((*latents.shape[:3], latents.shape[3] + 1), np.float32)
            whole = jax.device_put((latents, nothing), networks.shared)
            return self._program(engine.decode, networks.vae, *whole, None)
        config = networks.transformer_config
        positions = np.tile(grid_positions(config, self.latent, self.latent), (batch, 1))
        patches = np.asarray(patchify(jnp.asarray(latents), config.patch_size))
        return self._program(engine.velocity, networks.transformer, *self._split(patches, positions), None)

    def _split(self, *arrays: np.ndarray) -> tuple[jax.Array, ...]:
        return jax.device_put(arrays, self.engine.networks.split)

    def _program(self, function: Any, *inputs: Any) -> Work:
        """Of a function that was jitted; of several results the first counts."""
        dtype = self.engine.dtype

        def launch() -> jax.Array:
            with devices.matmul_precision(dtype):
                found = function(*inputs)
            return found[0] if isinstance(found, tuple) else found

        def planned() -> int:
            with devices.matmul_precision(dtype):
                memory = function.lower(*inputs).compile().memory_analysis()
            return memory.temp_size_in_bytes + memory.output_size_in_bytes

        return Work(launch, planned)

    def _photos(self, batch: int) -> list[Prepared]:
        plan = self.settings.plan((self.side // 4, self.side // 4))
        noise = np.zeros((self.latent, self.latent, self.engine.latent_channels), np.float32)
        return [Prepared(plan, photo, noise) for photo in photographs(batch, self.side)]

    def _whole(self, batch: int) -> Callable[[], list[np.ndarray]]:
        """Host to host, in the batches that infer/upscale.py makes."""
        engine, settings, side = self.engine, self.settings, (self.side, self.side)
        photos = self._photos(batch)

        def run() -> list[np.ndarray]:
            size = batch_size(len(photos), 1, engine.largest_batch(side, settings))
            launched = [engine.launch(some, side, settings, batch=size) for some in slices(photos, size)]
            return [picture for item in launched for picture in item.results()]

        return run

    def stream(self, batch: int, count: int) -> Callable[[], list[np.ndarray]]:
        """Host to host, `count` batches: each is launched before the one before it is fetched, as in infer/upscale.py."""
        photos, side = self._photos(batch), (self.side, self.side)

        def run() -> list[np.ndarray]:
            pictures, before = [], None
            for _ in range(count):
                launched = self.engine.launch(photos, side, self.settings, batch=batch)
                if before:
                    pictures += before.results()
                before = launched
            return pictures + before.results()

        return run

    def as_array(self, part: Part, result: Any) -> np.ndarray:
        """A result of `ours` as (B, h, w, C) float32 on the host."""
        if part == "transformer":
            result = unpatchify(
                result, self.latent, self.latent, self.engine.networks.transformer_config.patch_size
            )
        return np.asarray(result, np.float32)

    def flop(self, part: Part) -> float:
        """FLOPs per image; a multiplication and an addition count as two. Our autoencoder, with shortened up-sampling."""
        if part == "end":
            return sum(self.flop(part) for part in ("encode", "transformer", "decode"))
        if part == "transformer":
            config = self.engine.networks.transformer_config
            return transformer_flop(config, (self.latent // config.patch_size) ** 2)
        images, latents, _ = self.inputs(1)
        network = AutoencoderKL(self.engine.networks.vae_config)

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


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Root mean square of the difference, relative to PyTorch's result."""
    return float(np.sqrt(np.square(ours - theirs).mean() / np.square(theirs).mean()))
