"""What goes to the devices and back, and when: as little as possible, while they compute something else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tiny_checkpoint import (
    random_params,
    synthetic_photo,
    tiny_mmdit_config,
    tiny_vae_config,
)
from tsdsr_jax.upscaling import tiling
from tsdsr_jax.upscaling.batch_run import upscale_groups
from tsdsr_jax.upscaling.engine import Bands, Engine, LoadedNetworks, Prepared
from tsdsr_jax.upscaling.jobs import Report
from tsdsr_jax.upscaling.planning import Settings, SizePlan, plan_groups
from tsdsr_jax.upscaling.targets import find_jobs

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTINGS = Settings(photo_batch=8, tile_batch=8)


class Fetched:
    """Stands in for a result on the device; knows whether its copy to the host has been started."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape, self.started = array, array.shape, False

    def copy_to_host_async(self) -> None:
        self.started = True

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return self.array


def encode(params: object, images: jax.Array, noise: jax.Array, valid: jax.Array | None) -> jax.Array:
    assert images.dtype == jnp.float32 and images.shape[1] == 8 * noise.shape[1]
    return noise


def velocity(params: object, patches: jax.Array, positions: jax.Array, lengths: object) -> jax.Array:
    return patches


def decode(params: object, latents: jax.Array, sums: jax.Array, valid: object) -> tuple[Fetched, Fetched]:
    batch, height, width, _ = latents.shape
    return Fetched(np.zeros((batch, 8 * height, 8 * width, 3), np.uint8)), Fetched(np.ones(batch, bool))


@pytest.fixture
def engine() -> Engine:
    """An engine whose networks compute nothing."""
    configs = tiny_mmdit_config(num_layers=1), tiny_vae_config()
    networks = [(config, random_params(config, 0)) for config in configs]
    loaded = LoadedNetworks(*networks, jax.local_devices()[:1])
    engine = Engine(loaded, Bands(), jnp.float32)
    engine.__dict__.update(encode=encode, velocity=velocity, decode=decode)
    return engine


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each array that is sent. Sending without `device_put` is an error."""
    sizes: list[int] = []
    put = jax.device_put

    def counting(arrays: object, *more: object) -> object:
        sizes.extend(leaf.nbytes for leaf in jax.tree.leaves(arrays) if isinstance(leaf, np.ndarray))
        return put(arrays, *more)

    monkeypatch.setattr(jax, "device_put", counting)
    with jax.transfer_guard_host_to_device("disallow"):
        yield sizes


def photographs(sizes: list[tuple[int, int]]) -> list[Prepared]:
    plans = [SETTINGS.plan(size) for size in sizes]
    return [
        Prepared(plan, synthetic_photo(*plan.source, 0), np.zeros((*plan.latent, 16), np.float32))
        for plan in plans
    ]


def bytes_of_tiles(plans: list[SizePlan], latent_size: tuple[int, int], engine: Engine) -> int:
    """Indices, weights, positions, and lengths if they are needed."""
    calls = tiling.pack_batches(
        tiling.cut_batch(plans, SETTINGS), SETTINGS, 1, latent_size, engine.networks.transformer_config
    )
    return sum(
        call.pixels.nbytes
        + call.weights.nbytes
        + call.positions.nbytes
        + call.needs_lengths * call.lengths.nbytes
        for call in calls
    )


@pytest.mark.parametrize(
    ("sizes", "bucket"),
    [
        ([(128, 128)] * 8, (512, 512)),
        ([(256, 256)] * 2, (1024, 1024)),  # in tiles
        ([(160, 128)] * 3, (512, 640)),  # portraits
        ([(128, 130), (140, 150), (150, 180)], (608, 720)),  # masked
        ([(60, 90)], (512, 768)),  # enlarged to the smallest size
    ],
)
def test_photographs_noise_and_tiles_are_sent_once(engine, sent, sizes, bucket):
    photos = photographs(sizes)
    batch, latent_size = len(photos), (bucket[0] // 8, bucket[1] // 8)
    photo_bytes = batch * 3 * bucket[0] * bucket[1] // 4**2
    noise_bytes = batch * 16 * 4 * latent_size[0] * latent_size[1]
    tile_bytes = bytes_of_tiles([photo.plan for photo in photos], latent_size, engine)

    engine.launch(photos, bucket, SETTINGS, batch=batch)
    assert sum(sent) <= 1.1 * (photo_bytes + noise_bytes) + tile_bytes
    assert photo_bytes in sent and noise_bytes in sent
    # Tiles follow from the sizes: the next batch of the same sizes has the same.
    sent.clear()
    engine.launch(photos, bucket, SETTINGS, batch=batch)
    assert sum(sent) <= 1.1 * (photo_bytes + noise_bytes)
    # Less than the enlarged photographs would take in 8 bits, let alone in float32.
    assert sum(sent) <= noise_bytes + 16 * photo_bytes / 2


def test_tiles_of_other_sizes_and_settings_are_not_mixed_up(engine):
    latents = jnp.ones((1, 64, 96, 16))
    for size, settings in (
        ((128, 192), SETTINGS),
        ((128, 128), SETTINGS),
        ((192, 128), SETTINGS),
        ((128, 192), dataclasses.replace(SETTINGS, latent_overlap=32)),
        ((128, 192), SETTINGS),
    ):
        plan = settings.plan(size)
        weights = np.asarray(engine.denoise(latents, [plan], settings))[0, ..., -1]
        expected = np.zeros((64, 96), np.float32)
        for tile in tiling.cut_batch([plan], settings):
            window = expected.T if tile.portrait else expected
            window = window[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
            window += tiling.tile_weights(tile.height, tile.width)
        np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_only_a_few_batches_tiles_stay_on_the_devices(engine):
    for width in range(128, 192, 4):
        engine.denoise(jnp.ones((1, 64, 96, 16)), [SETTINGS.plan((128, width))], SETTINGS)
    assert engine._tiles.cache_info().currsize <= 4


def test_results_are_copied_as_soon_as_they_are_there(engine):
    launched = engine.launch(photographs([(128, 128)]), (512, 512), SETTINGS)
    assert launched.images.started and launched.finite.started


# --- the order of a run -------------------------------------------------------------------------


@dataclasses.dataclass
class Recorded:
    """A batch of the recorder's; asking for its results is recorded."""

    number: int
    plans: list[SizePlan]
    events: list[str]
    batch: int = 1

    def results(self) -> list[np.ndarray]:
        self.events.append(f"results {self.number}")
        return [np.zeros((*plan.padded, 3), np.uint8) for plan in self.plans]


class Recorder:
    """Stands in for the engine, and records what is asked of it."""

    devices, latent_channels, dtype = ("one",), 16, np.dtype(np.float32)

    def __init__(self) -> None:
        self.events: list[str] = []

    def largest_batch(self, bucket: tuple[int, int], settings: Settings) -> int:
        return settings.photos_at_a_time(bucket)

    def launch(self, photos: list[Prepared], bucket: tuple[int, int], *_: object, **more: object) -> Recorded:
        assert more["progress"] is None  # it would make `launch` wait for the device
        launched = Recorded(
            sum("launch" in event for event in self.events), [photo.plan for photo in photos], self.events
        )
        self.events.append(f"launch {launched.number}")
        return launched


def test_the_next_batch_is_launched_before_waiting_for_the_last(tmp_path):
    """And never more than two are under way, because each holds memory."""
    (tmp_path / "in").mkdir()
    for index in range(8):
        Image.fromarray(synthetic_photo(32, 32, index)).save(tmp_path / f"in/{index}.png")
    settings = Settings(2, process_size=64, latent_tile=8, latent_overlap=2, photo_batch=2)
    recorder, report = Recorder(), Report(print)
    jobs = find_jobs([tmp_path / "in"], tmp_path / "out").jobs
    upscale_groups(recorder, plan_groups(jobs, settings, 1, report), settings, report)
    assert report.written == 8 and not report.failures
    assert recorder.events == [
        *("launch 0", "launch 1", "results 0", "launch 2", "results 1", "launch 3"),
        *("results 2", "results 3"),
    ]
