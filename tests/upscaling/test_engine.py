"""The engine on its devices: few programs, exact padding and tiles, results that depend on nothing they should not."""

import dataclasses
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tiny_checkpoint import (
    random_params,
    random_prompt,
    synthetic_photo,
    tiny_mmdit_config,
    tiny_vae_config,
)
from tsdsr_jax.cli import Share
from tsdsr_jax.images.buckets import plan_buckets
from tsdsr_jax.images.resize import bicubic, reflect_pad
from tsdsr_jax.models import layers
from tsdsr_jax.models.folded import fold
from tsdsr_jax.models.mmdit import MMDiT
from tsdsr_jax.models.params import STUDENT_TIMESTEP
from tsdsr_jax.upscaling import engine as engine_module
from tsdsr_jax.upscaling import tiling
from tsdsr_jax.upscaling.batch_run import latent_noise, upscale_groups
from tsdsr_jax.upscaling.engine import Bands, Engine, LoadedNetworks, Prepared
from tsdsr_jax.upscaling.jobs import Report
from tsdsr_jax.upscaling.planning import Settings, SizePlan, plan_groups, unfinished
from tsdsr_jax.upscaling.targets import find_jobs

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Small pictures: 64 pixels are processed as they are, tiles span 64 pixels.
SMALL = Settings(upscale=2, process_size=64, latent_tile=8, latent_overlap=2, align="nofix", max_pixels=10**7)
WHOLE = Bands()
NETWORKS = (tiny_mmdit_config(), tiny_vae_config(layers_per_block=1))
# With fewer layers still, for what asks little of them and compiles much.
BARE_NETWORKS = (tiny_mmdit_config(num_layers=1), tiny_vae_config())


def make_params(networks: tuple) -> tuple:
    return tuple(random_params(config, seed) for config, seed in zip(networks, (1, 2), strict=True))


PARAMS, BARE_PARAMS = make_params(NETWORKS), make_params(BARE_NETWORKS)


def make_engine(
    bands: Bands = WHOLE,
    devices: int = 1,
    dtype: object = jnp.float32,
    params: tuple = PARAMS,
    configs: tuple = NETWORKS,
) -> Engine:
    transformer, vae = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    prompt = random_prompt(NETWORKS[0])
    folded = fold(configs[0], transformer, prompt.prompt, prompt.pooled, STUDENT_TIMESTEP, dtype)
    networks = LoadedNetworks((configs[0], folded), (configs[1], vae), jax.local_devices()[:devices])
    return Engine(networks, bands, jnp.dtype(dtype))


@pytest.fixture(scope="module")
def engine(quick_compilation: None) -> Engine:
    return make_engine()


def save_photos(folder: Path, sizes: dict[str, tuple[int, int]]) -> Path:
    for seed, (name, size) in enumerate(sizes.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(synthetic_photo(*size, seed)).save(folder / name)
    return folder


# Landscapes, portraits and squares, of one tile and of several, and one below the smallest side. Two buckets.
SIZES = {
    "a.png": (32, 32), "b.png": (33, 52), "c.png": (36, 56), "d.png": (20, 33), "e.png": (56, 36), "f.png": (32, 56),
    "g.png": (56, 32), "h.png": (33, 20), "i.png": (32, 32), "j.png": (33, 53),
}  # fmt: skip
BUCKET = (72, 112)


def run(engine: Engine, source: Path, output: Path, settings: Settings = SMALL) -> Report:
    report = Report(lambda line: None)
    jobs = find_jobs([source], output).jobs
    groups = plan_groups(jobs, settings, len(engine.devices), report)
    upscale_groups(engine, groups, settings, report, overwrite=True)
    return report


def results(engine: Engine, source: Path, output: Path, settings: Settings = SMALL) -> dict[str, np.ndarray]:
    """Upscales a folder without a failure, and reads what was written."""
    report = run(engine, source, output, settings)
    assert not report.failures
    files = sorted(output.rglob("*.png"))
    assert len(files) == report.written
    return {str(file.relative_to(output)): np.asarray(Image.open(file)) for file in files}


def greatest_difference(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> int:
    assert some.keys() == others.keys() and some
    return max(int(np.abs(some[name].astype(int) - others[name].astype(int)).max()) for name in some)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("photos"), SIZES)


@pytest.fixture(scope="module")
def reference(
    engine: Engine, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """The folder's results from one device, tile by tile."""
    return results(engine, folder, tmp_path_factory.mktemp("reference"))


# --- programs ---------------------------------------------------------------------------


# The larger tile (20 s) passed on 2026-11-26.
@pytest.mark.parametrize("tile", [16, pytest.param(24, marks=pytest.mark.slow)])
def test_thirty_sizes_need_few_programs(tmp_path, tile):
    # 30 photographs of 64 to 500 pixels a side at the defaults (and with a tile of 96), everything a quarter as large.
    generator = np.random.default_rng(0)
    sizes = {f"{i}.png": (int(h), int(w)) for i, (h, w) in enumerate(generator.integers(64, 501, (30, 2)))}
    assert len(set(sizes.values())) == 30
    folder = save_photos(tmp_path / "in", sizes)
    settings = Settings(1, 128, latent_tile=tile, latent_overlap=2, tile_batch=4)
    engine = make_engine(params=BARE_PARAMS, configs=BARE_NETWORKS)
    names = ("encode", "velocity", "decode", "gather", "blend")
    # The small functions are shared by all engines of this process, those of other tests included.
    before = {name: getattr(engine, name)._cache_size() for name in names}
    assert len(results(engine, folder, tmp_path / "out", settings)) == 30

    programs = {name: getattr(engine, name)._cache_size() - before[name] for name in names}
    assert programs["encode"] <= 6 and programs["decode"] <= 6 and programs["velocity"] <= 6, programs
    # Small ones: for each bucket (and number of tokens), a call of four tiles and one of a single tile.
    levels = 1 if tile == 16 else 2
    assert programs["gather"] <= 12 * levels and programs["blend"] <= 12 * levels, programs

    plans = [settings.plan(size) for size in sizes.values()]
    buckets = plan_buckets([plan.lying for plan in plans])
    ratios = [np.prod(bucket) / np.prod(plan.padded) for bucket, plan in zip(buckets, plans, strict=True)]
    assert np.mean(ratios) <= 1.6


def test_programs_do_not_multiply_where_one_photograph_fills_its_bucket(tmp_path):
    # Sizes and their transposes in one bucket, one of them the bucket itself.
    sizes = {"a.png": (36, 56), "b.png": (56, 36), "c.png": (36, 52), "d.png": (52, 36)}
    engine = make_engine()
    assert len(results(engine, save_photos(tmp_path / "in", sizes), tmp_path / "out")) == 4
    assert engine.encode._cache_size() == engine.decode._cache_size() == 1


# --- padding ----------------------------------------------------------------------------


def prepared(size: tuple[int, int], seed: int, settings: Settings = SMALL) -> Prepared:
    plan = settings.plan(size)
    noise = latent_noise(bytes([seed]), 1, (*plan.latent, NETWORKS[1].latent_channels))
    return Prepared(plan, synthetic_photo(*size, seed), noise)


def enlarged(photo: Prepared) -> np.ndarray:
    """What the network sees of a photograph: computed on the host, (H, W, 3) float32 in [-1, 1]."""
    image = bicubic(photo.image.astype(np.float32) / 255, *photo.plan.resized) * 2 - 1
    return reflect_pad(np.clip(image, -1, 1), *photo.plan.padded)


def corner(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """One array as a batch, in the corner of a larger one filled with what must not matter."""
    result = np.full((1, height, width, array.shape[2]), 0.7, np.float32)
    result[0, : array.shape[0], : array.shape[1]] = array
    return result


@pytest.mark.parametrize("size", [(33, 52), (32, 32)])
def test_padding_changes_nothing(engine: Engine, size):
    photo, params = prepared(size, 3), engine.networks.vae
    image = enlarged(photo)
    shape, latent_shape = photo.plan.padded, photo.plan.latent
    plain = np.asarray(engine.encode(params, image[None], photo.noise[None], None))
    wide = engine.encode(params, corner(image, *BUCKET), corner(photo.noise, 9, 14), np.asarray([shape]))
    wide = np.asarray(wide)[:, : latent_shape[0], : latent_shape[1]]
    assert np.abs(plain - wide).max() <= 1e-5 * np.abs(plain).max()

    decode = jax.jit(partial(engine._autoencoder.apply, method="decode"))
    decoded = decode({"params": params}, plain)
    padded = decode({"params": params}, corner(plain[0], 9, 14), np.asarray([latent_shape]))
    assert np.abs(decoded - padded[:, : shape[0], : shape[1]]).max() <= 1e-5 * np.abs(decoded).max()


@pytest.mark.parametrize("size", [(33, 52), (52, 33)])
def test_a_picture_is_what_the_plain_networks_give(engine: Engine, size):
    """Also a portrait, which is laid on its side on the way."""
    photo, scaling = prepared(size, 5), NETWORKS[1].scaling_factor
    (picture,) = engine.launch([photo], BUCKET, SMALL).results()
    encode, decode = (
        jax.jit(partial(engine._autoencoder.apply, method=name)) for name in ("encode", "decode")
    )
    latent = encode({"params": PARAMS[1]}, enlarged(photo)[None]).sample(photo.noise) * scaling
    velocity = tile_by_tile(np.asarray(latent[0]), photo.plan, SMALL)
    decoded = decode({"params": PARAMS[1]}, (latent - velocity).astype(jnp.float32) / scaling)
    levels = np.asarray((jnp.clip(decoded[0], -1, 1) * 0.5 + 0.5) * 255)
    # Truncated: the picture lies between levels - 1 and levels.
    assert np.abs(levels - 0.5 - picture).max() <= 0.51


# --- tiles ------------------------------------------------------------------------------


def tile_by_tile(latent: np.ndarray, plan: SizePlan, settings: Settings) -> np.ndarray:
    """The blended velocity of an (h, w, C) latent, one plain call of the transformer per tile."""
    sums, total = np.zeros(latent.shape), np.zeros((*plan.latent, 1))
    predict, prompt = jax.jit(MMDiT(NETWORKS[0]).apply), random_prompt(NETWORKS[0])
    text = jnp.asarray(prompt.prompt)[None], jnp.asarray(prompt.pooled)[None]
    for tile in tiling.cut(0, *plan.latent, settings.latent_tile, settings.latent_overlap):
        window = np.s_[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
        velocity = predict({"params": PARAMS[0]}, latent[window][None], jnp.full((1,), 1000.0), *text)
        weights = tiling.tile_weights(tile.height, tile.width)[..., None].astype(float)
        sums[window] += weights * np.asarray(velocity[0], float)
        total[window] += weights
    return sums / total


@pytest.mark.parametrize(
    ("tile", "sizes"),
    [
        (32, [(512, 520), (536, 264)]),  # all tiles alike
        (96, [(512, 520), (848, 560)]),  # as short as their photographs, in two token counts
    ],
)
def test_packed_tokens_are_exact(tile, sizes):
    settings = Settings(1, 256, latent_tile=tile, tile_batch=3)
    plans = [settings.plan(size) for size in sizes]
    assert any(plan.portrait for plan in plans)
    shape = tuple(max(plan.lying[axis] for plan in plans) // 8 for axis in range(2))
    generator = np.random.default_rng(6)
    upright = [generator.standard_normal((*plan.latent, 16), dtype=np.float32) for plan in plans]
    lying = [
        array.swapaxes(0, 1) if plan.portrait else array for array, plan in zip(upright, plans, strict=True)
    ]
    latents = jnp.concatenate([corner(array, *shape) for array in lying])
    sums = np.asarray(make_engine().denoise(latents, plans, settings))
    for array, plan, total in zip(upright, plans, sums, strict=True):
        total = total.swapaxes(0, 1) if plan.portrait else total
        total = total[: plan.latent[0], : plan.latent[1]]
        velocity, expected = total[..., :-1] / total[..., -1:], tile_by_tile(array, plan, settings)
        assert np.abs(velocity - expected).max() <= 1e-5 * np.abs(expected).max()


def test_tiles_in_larger_calls(folder, reference, tmp_path):
    settings = dataclasses.replace(SMALL, tile_batch=4)
    assert greatest_difference(results(make_engine(), folder, tmp_path, settings), reference) <= 1


def test_several_photographs_at_a_time(folder, reference, tmp_path):
    settings = dataclasses.replace(SMALL, photo_batch=3, tile_batch=2)
    engine = make_engine()
    assert greatest_difference(results(engine, folder, tmp_path, settings), reference) <= 1
    # Landscapes and portraits in threes, padded and not; what is left over does not compile a program of its own.
    groups = plan_groups(find_jobs([folder], tmp_path).jobs, settings, 1, Report(print))
    assert {len(group.jobs) for group in groups if group.several} >= {1, 3}
    with pytest.raises(ValueError, match="at most 3"):
        engine.launch([prepared((32, 32), 0)] * 4, BUCKET, settings, batch=3)


def test_fewer_large_photographs_at_a_time():
    settings = Settings(photo_batch=8)
    sides = {64: 8, 512: 8, 520: 7, 1024: 2, 1448: 1, 4096: 1}
    assert {side: settings.photos_at_a_time((side, side)) for side in sides} == sides


def test_no_more_at_a_time_than_are_computed_whole():
    """Bands are for photographs that do not fit alone, not for too many at a time."""
    settings, networks = dataclasses.replace(SMALL, photo_batch=8), make_engine().networks
    for whole, most in ((8 * 64**2, 8), (5 * 64**2 + 1, 5), (64**2 - 1, 1), (0, 1)):
        engine = Engine(networks, Bands(32, 4, whole_pixels=whole), jnp.float32)
        assert engine.largest_batch((64, 64), settings) == most
        assert (engine._band_pixels(32, most, 64**2) is None) == (whole >= 64**2)
    assert Engine(networks, Bands(), jnp.float32).largest_batch((64, 64), settings) == 8


# --- devices ----------------------------------------------------------------------------


def test_eight_devices_agree_with_one(folder, reference, tmp_path):
    assert greatest_difference(results(make_engine(devices=8), folder, tmp_path), reference) <= 1


def test_fewer_photographs_than_devices(folder, reference, tmp_path):
    # Two portraits of one size class among them.
    for name in ("g.png", "e.png", "b.png"):
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(folder / name, tmp_path / "in")
    pictures = results(make_engine(devices=8), tmp_path / "in", tmp_path / "out")
    assert greatest_difference(pictures, {name: reference[name] for name in pictures}) <= 1


# --- noise ------------------------------------------------------------------------------


def test_noise_depends_on_seed_and_content_only():
    shape = (12, 10, 16)
    noise = latent_noise(b"photo", 42, shape)
    assert noise.dtype == np.float32 and noise.shape == shape
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    np.testing.assert_array_equal(noise, latent_noise(b"photo", 42, shape))
    for content, seed in [(b"photo", 43), (b"photo", -42), (b"photo", 0), (b"other", 42)]:
        assert not np.array_equal(noise, latent_noise(content, seed, shape))


def test_names_order_and_subfolders_do_not_matter(engine: Engine, folder, reference, tmp_path):
    names = {"a.png": "z.png", "b.png": "0/deep/er.png", "e.png": "0/b.png"}
    for name in SIZES:
        target = tmp_path / "in" / names.get(name, f"x{name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, target)
    pictures = results(engine, tmp_path / "in", tmp_path / "out")
    for name in SIZES:
        np.testing.assert_array_equal(pictures[names.get(name, f"x{name}")], reference[name], name)


def test_a_photograph_alone_and_in_company(engine: Engine, folder, reference, tmp_path):
    """The same noise; only the padding differs, and with it the rounding."""
    for name in ("a.png", "b.png"):
        alone = results(engine, folder / name, tmp_path / name.removesuffix(".png"))
        assert greatest_difference(alone, {name: reference[name]}) <= 1


def test_the_seed_matters_only_when_sampling(engine: Engine, folder, reference, tmp_path):
    other = dataclasses.replace(SMALL, seed=43)
    other = results(engine, folder / "a.png", tmp_path / "sample", other)["a.png"]
    assert np.mean(other != reference["a.png"]) > 0.5

    modes = [dataclasses.replace(SMALL, sample=False, seed=seed) for seed in (1, 2)]
    one, two = (results(engine, folder / "a.png", tmp_path / str(mode.seed), mode)["a.png"] for mode in modes)
    np.testing.assert_array_equal(one, two)
    assert np.mean(one != reference["a.png"]) > 0.5


def test_the_same_bytes_every_time(engine: Engine, folder, reference, tmp_path):
    assert greatest_difference(results(engine, folder, tmp_path), reference) == 0


# --- bands ------------------------------------------------------------------------------


def test_bands_give_the_same_pictures(folder, reference, tmp_path, monkeypatch):
    banded, in_bands = [], layers.in_bands
    monkeypatch.setattr(layers, "in_bands", lambda *args: banded.append(1) or in_bands(*args))
    assert greatest_difference(results(make_engine(Bands(32, 4)), folder, tmp_path), reference) <= 1
    assert banded  # the pictures are large enough to be cut at all


@pytest.mark.parametrize(("memory", "banded"), [(2**40, False), (2**20, True)])
def test_bands_only_where_the_whole_does_not_fit(monkeypatch, memory, banded):
    monkeypatch.setattr(engine_module, "memory_of", lambda device: memory)
    engine = make_engine(Bands(32, 4, whole_pixels=None), params=BARE_PARAMS, configs=BARE_NETWORKS)
    calls, in_bands = [], layers.in_bands
    monkeypatch.setattr(layers, "in_bands", lambda *args: calls.append(1) or in_bands(*args))
    photo = prepared((33, 52), 3)
    for method, array in (
        ("encode", enlarged(photo)[None]),
        ("decode", np.zeros((1, 9, 14, 16), np.float32)),
    ):
        calls.clear()
        run = {"encode": engine._encode, "decode": engine._decode}[method]
        more = (
            (photo.noise[None], None) if method == "encode" else (np.zeros((1, 9, 14, 17), np.float32), None)
        )
        jax.eval_shape(run, engine.networks.vae, array, *more)
        assert bool(calls) == banded, method


# --- overflow ---------------------------------------------------------------------------


def with_scaled(name: str, factor: float) -> tuple:
    transformer, vae = jax.tree.map(lambda leaf: leaf, BARE_PARAMS)
    vae["decoder"]["conv_in"][name] = vae["decoder"]["conv_in"][name] * np.float32(factor)
    return transformer, vae


def test_overflow_in_half_precision_is_computed_again(folder, tmp_path):
    # Beyond float16 right after the first convolution; float32 normalizes it away.
    params = with_scaled("kernel", 2e5)
    half = make_engine(dtype=jnp.float16, params=params, configs=BARE_NETWORKS)
    notes: list[str] = []
    report = Report(notes.append)
    groups = plan_groups(find_jobs([folder / "a.png"], tmp_path).jobs, SMALL, 1, report)
    upscale_groups(half, groups, SMALL, report)
    assert report.written == 1 and not report.failures
    assert len(notes) == 1 and str(folder / "a.png") in notes[0] and "float32" in notes[0], notes

    assert half.in_float32.dtype == jnp.float32 and half.in_float32.networks is half.networks
    assert half.in_float32.velocity is half.in_float32.velocity  # compiled once
    full = results(half.in_float32, folder / "a.png", tmp_path / "full")
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    np.testing.assert_array_equal(picture, full["a.png"])
    assert picture.std() > 10


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_what_is_never_finite_fails(folder, tmp_path, dtype):
    broken = make_engine(dtype=dtype, params=with_scaled("bias", np.nan), configs=BARE_NETWORKS)
    report = run(broken, folder / "a.png", tmp_path)
    assert report.written == 0 and len(report.failures) == 1
    assert str(folder / "a.png") in report.failures[0] and "not finite" in report.failures[0]
    assert not list(tmp_path.iterdir())


# --- the loop around the device, with a stand-in for it -------------------------------------

GRAY, WHITE = 7, 255


@dataclasses.dataclass
class Answer:
    """What a stand-in launches: plain gray pictures, and what else was asked for photographs of certain sizes."""

    plans: list[SizePlan]
    faults: dict[tuple[int, int], object]
    level: int
    bucket: tuple[int, int] = (64, 64)
    masked: bool = False
    batch: int = 0

    def results(self) -> list[np.ndarray | None]:
        pictures = []
        for plan in self.plans:
            fault = self.faults.get(plan.source, np.full((*plan.padded, 3), self.level, np.uint8))
            if isinstance(fault, Exception):
                raise fault
            pictures.append(fault)
        return pictures


@dataclasses.dataclass
class StandIn:
    """An engine that computes nothing."""

    faults: dict[tuple[int, int], object]
    devices: tuple[str, ...] = ("one", "another")
    level: int = GRAY
    dtype: type = np.float16
    latent_channels: int = 16
    raises_at_launch: bool = False
    whole: int = 100
    """Photographs that a device is thought to compute whole."""
    in_bands: "StandIn | None" = None

    @property
    def in_float32(self) -> "StandIn":
        return dataclasses.replace(self, faults={}, level=WHITE, dtype=np.float32)

    def largest_batch(self, bucket: tuple[int, int], settings: Settings) -> int:
        return len(self.devices) * min(self.whole, settings.photos_at_a_time(bucket))

    def launch(
        self,
        photos: list[Prepared],
        bucket: tuple[int, int],
        settings: Settings,
        *,
        batch: int = 0,
        **more: object,
    ) -> Answer:
        if len(photos) > (batch or len(self.devices)):
            raise ValueError("more photographs than the batch")  # as the engine does
        answer = Answer([photo.plan for photo in photos], self.faults, self.level, batch=batch)
        if self.raises_at_launch:
            answer.results()
        return answer


def finished_before(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((64, 64, 3), 1, np.uint8)).save(target)
    return target


def go_on(device: "StandIn", source: Path, output: Path, photo_batch: int = 1) -> tuple[Report, list[str]]:
    """Upscales what is missing; also what was noted."""
    notes: list[str] = []
    report, settings = Report(notes.append), dataclasses.replace(SMALL, photo_batch=photo_batch)
    groups = plan_groups(find_jobs([source], output).jobs, settings, len(device.devices), report)
    upscale_groups(device, groups, settings, report)
    return report, notes


def level_of(file: Path) -> int:
    (level,) = set(np.asarray(Image.open(file)).ravel().tolist())
    return level


def test_only_what_overflowed_is_replaced(tmp_path):
    source = save_photos(tmp_path / "in", {"a.png": (32, 32), "b.png": (32, 34)})
    report = run(StandIn({(32, 34): None}), source, tmp_path / "out")
    assert report.written == 2 and not report.failures
    assert level_of(tmp_path / "out/a.png") == GRAY and level_of(tmp_path / "out/b.png") == WHITE


def test_what_is_finished_is_not_computed_in_float32_for_its_companions(tmp_path):
    source = save_photos(tmp_path / "in", {"a.png": (32, 32), "b.png": (32, 34)})
    before = finished_before(tmp_path / "out/a.png")
    report, notes = go_on(StandIn({(32, 32): None, (32, 34): None}), source, tmp_path / "out")
    assert report.written == 1 and not report.failures
    assert level_of(before) == 1 and level_of(tmp_path / "out/b.png") == WHITE
    (note,) = notes
    assert "b.png" in note


def test_what_is_finished_does_not_fail_any_more(tmp_path):
    """Its photograph is read only for the companions' sake."""
    source = save_photos(tmp_path / "in", {"a.png": (32, 32), "b.png": (32, 32)})
    finished_before(tmp_path / "out/a.png")
    whole = (source / "a.png").read_bytes()
    (source / "a.png").write_bytes(whole[: len(whole) // 2])  # the header is still there
    report, notes = go_on(StandIn({}), source, tmp_path / "out")
    assert report.written == 1 and not report.failures and not notes
    assert level_of(tmp_path / "out/b.png") == GRAY


@pytest.mark.parametrize("at_launch", [False, True])
def test_running_out_of_memory_costs_one_batch(tmp_path, at_launch):
    source = save_photos(tmp_path / "in", {f"{i}.png": (32, 32 + 20 * i) for i in range(5)})
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
    stand_in = StandIn({(32, 72): error}, devices=("one",), raises_at_launch=at_launch)
    report = run(stand_in, source, tmp_path / "out")
    assert report.written == 4 and not (tmp_path / "out/2.png").exists()
    (line,) = report.failures
    assert str(source / "2.png") in line and "--is_use_tile" in line and "\n" not in line


@pytest.mark.parametrize("at_launch", [False, True])
def test_what_does_not_fit_is_computed_in_bands(tmp_path, at_launch):
    source = save_photos(tmp_path / "in", {f"{i}.png": (32, 32 + 20 * i) for i in range(3)})
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
    in_bands = StandIn({}, devices=("one",), level=WHITE)
    stand_in = StandIn({(32, 72): error}, devices=("one",), raises_at_launch=at_launch, in_bands=in_bands)
    report, notes = go_on(stand_in, source, tmp_path / "out")
    assert report.written == 3 and not report.failures
    assert [level_of(tmp_path / f"out/{i}.png") for i in range(3)] == [GRAY, GRAY, WHITE]
    (note,) = notes
    assert "does not fit; computing it in bands" in note


@dataclasses.dataclass
class Crowded(StandIn):
    """Has memory for one photograph per device."""

    asked: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    words: str = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate"

    def launch(
        self,
        photos: list[Prepared],
        bucket: tuple[int, int],
        settings: Settings,
        *,
        batch: int = 0,
        **more: object,
    ) -> Answer:
        self.asked.append((len(photos), batch))
        answer = super().launch(photos, bucket, settings, batch=batch)
        if batch > len(self.devices):
            raise jax.errors.JaxRuntimeError(self.words)
        return answer


def test_a_batch_that_fails_while_its_group_is_cut(tmp_path):
    """Eight are planned together, three are tried, and what is left of the eight goes one by one like the three."""
    source = save_photos(tmp_path / "in", {f"{i}.png": (32, 32) for i in range(8)})
    device = Crowded({}, devices=("one",), whole=3)
    report, notes = go_on(device, source, tmp_path / "out", photo_batch=8)
    assert report.written == 8 and not report.failures and len(notes) == 1
    assert device.asked == [(3, 3)] + [(1, 1)] * 8


def test_what_is_finished_neither_fails_nor_is_computed_alone(tmp_path):
    source = save_photos(tmp_path / "in", {f"{i}.png": (32, 32) for i in range(4)})
    for name in ("0", "2", "3"):
        finished_before(tmp_path / f"out/{name}.png")
    error = jax.errors.JaxRuntimeError(Crowded.words)
    report, _ = go_on(StandIn({(32, 32): error}), source, tmp_path / "out")  # two devices, one each
    (line,) = report.failures
    assert "1.png" in line and report.written == 0
    device = Crowded({}, devices=("one",))
    report, _ = go_on(device, source, tmp_path / "out")
    assert report.written == 1 and device.asked == [(1, 1)]


def test_few_photographs_of_many_shapes_are_shared_out(tmp_path):
    sizes = {"a.png": (32, 48), "b.png": (48, 32), "c.png": (32, 100), "d.png": (100, 32)}
    jobs = find_jobs([save_photos(tmp_path / "in", sizes)], tmp_path / "out").jobs
    parts = [plan_groups(jobs, SMALL, 1, Report(print), Share(part, 4)) for part in range(4)]
    names = [[job.source.name for group in groups for job, _ in group.jobs] for groups in parts]
    assert sorted(names) == [["a.png"], ["b.png"], ["c.png"], ["d.png"]]


def test_portraits_share_the_batch_of_landscapes(tmp_path):
    sizes = {f"{i}.png": (32, 48) for i in range(8)} | {f"p{i}.png": (48, 32) for i in range(3)}
    jobs = find_jobs([save_photos(tmp_path / "in", sizes)], tmp_path / "out").jobs
    groups = plan_groups(jobs, dataclasses.replace(SMALL, photo_batch=8), 1, Report(print))
    assert sorted((len(group.jobs), group.several) for group in groups) == [(3, True), (8, True)]


@pytest.mark.parametrize("words", [Crowded.words, "INTERNAL: CUDNN_STATUS_ALLOC_FAILED"])
def test_what_does_not_fit_together_goes_one_by_one(tmp_path, words):
    source = save_photos(tmp_path / "in", {f"{i}.png": (32, 32) for i in range(9)})
    device = Crowded({}, devices=("one",), words=words)
    before = finished_before(tmp_path / "out/2.png")
    report, notes = go_on(device, source, tmp_path / "out", photo_batch=4)
    assert report.written == 8 and not report.failures and level_of(before) == 1
    # The first four, of which one is there; the others were not tried together again.
    assert device.asked == [(4, 4)] + [(1, 1)] * 8
    (note,) = notes
    assert "--batch_size 1" in note and "4 photographs" in note and words in note


def test_the_last_photograph_in_a_large_batch_is_tried_alone(tmp_path):
    """Of five, two at a time, the fifth is missing: what failed is a batch of two all the same."""
    source = save_photos(tmp_path / "in", {f"{i}.png": (32, 32) for i in range(5)})
    device, report = Crowded({}, devices=("one",)), Report(lambda line: None)
    settings = dataclasses.replace(SMALL, photo_batch=2)
    for index in range(4):
        finished_before(tmp_path / f"out/{index}.png")
    jobs = find_jobs([source], tmp_path / "out").jobs
    groups = unfinished(plan_groups(jobs, settings, 1, report), report)
    assert [(len(group.jobs), group.several) for group in groups] == [(1, True)]
    upscale_groups(device, groups, settings, report)
    assert report.written == 1 and not report.failures and device.asked == [(1, 2), (1, 1)]


@pytest.mark.parametrize("at_launch", [False, True])
def test_other_errors_of_the_device_are_not_hidden(tmp_path, at_launch):
    source = save_photos(tmp_path / "in", {"a.png": (32, 32)})
    stand_in = StandIn({(32, 32): jax.errors.JaxRuntimeError("INTERNAL: bug")}, raises_at_launch=at_launch)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        run(stand_in, source, tmp_path / "out")


def test_files_that_change_or_vanish_meanwhile(tmp_path):
    source = save_photos(tmp_path / "in", {"a.png": (32, 32), "b.png": (32, 32), "c.png": (32, 32)})
    stand_in, report = StandIn({}), Report(lambda line: None)
    groups = plan_groups(find_jobs([source], tmp_path / "out").jobs, SMALL, 2, report)
    save_photos(source, {"a.png": (40, 40)})
    (source / "c.png").unlink()
    upscale_groups(stand_in, groups, SMALL, report)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["b.png"] and report.written == 1
    changed, gone = sorted(report.failures)
    assert "a.png: changed while" in changed and "c.png: " in gone
