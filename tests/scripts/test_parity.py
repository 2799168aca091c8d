"""The upscaling command against the PyTorch oracle: photographs in, files out, everything between as a user runs it."""

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from photos import centre_crop, data_folder, photos

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

import oracle_models as models  # noqa: E402
from oracle_pipeline import OraclePipeline, align_colour, to_image  # noqa: E402
from tiny_checkpoint import compiled_once  # noqa: E402
from tsdsr_jax.commands import convert_lora, convert_sd3, upscale  # noqa: E402
from tsdsr_jax.upscaling.engine import Engine  # noqa: E402

RANK = 4
METHODS = ("nofix", "wavelet", "adain")
# Two sets of size flags: the defaults, and smaller tiles, with which whole photographs take seconds.
DEFAULTS = dict(upscale=4, process_size=512, latent_tile=64, latent_overlap=8)
SMALLER = dict(upscale=2, process_size=256, latent_tile=32, latent_overlap=4)


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that differ in what happens on the host only share their networks."""
    monkeypatch.setattr(upscale, "load_engine", load_once)


load_engine = upscale.load_engine
_kept: dict[object, Engine] = {}


def load_once(options: upscale.Options, devices: list, **_: object) -> Engine:
    key = dataclasses.replace(options, input_dir=Path(), output_dir=Path(), align_method="nofix")
    if key not in _kept:
        _kept[key] = load_engine(options, devices)
    return _kept[key]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def networks(root: Path) -> tuple:
    """The oracle's networks, with their LoRAs, and all of it on disk in `root`."""
    transformer, vae = models.tiny_transformer(1), models.tiny_vae(2)
    models.save_diffusers_folder(root / "sd3", transformer, vae)
    prompt = models.random_prompt(root / "prompt", seed=3)
    models.add_student_lora(transformer, RANK, 4)
    models.add_vae_lora(vae, RANK, 5)
    models.save_lora(transformer, root / "lora" / "transformer.safetensors")
    models.save_lora(vae, root / "lora" / "vae.safetensors")
    return transformer, vae, *prompt


def default_photos() -> dict[str, Image.Image]:
    """Sides are even: where four times a side is no multiple of 8 the original squeezes the picture."""
    files = sorted(data_folder("drealsr", "test_LR").glob("*.png"))[:90:45]
    crops = {
        "below": (96, 64),
        "below_portrait": (80, 100),
        "above": (160, 130),
        "above_portrait": (128, 200),
    }
    images = photos(len(crops))
    return {file.stem: Image.open(file).convert("RGB") for file in files} | {
        name: centre_crop(image, size) for (name, size), image in zip(crops.items(), images, strict=True)
    }


def enlarged_photos() -> dict[str, Image.Image]:
    """Below 128 a side, at sizes whose enlargement the original truncates, to an even number of pixels."""
    sizes = [(128, 96), (70, 101), (109, 89), (105, 114), (144, 124)]
    return {
        f"{width}x{height}": centre_crop(image, (width, height))
        for (width, height), image in zip(sizes, photos(len(sizes)), strict=True)
    }


def smaller_photos() -> dict[str, Image.Image]:
    """Whole photographs, but for the odd row and column, and one that is enlarged first."""
    images = photos(12)
    landscape = next(image for image in images if image.width > image.height)
    portrait = next(image for image in images if image.width < image.height)
    return {
        "landscape": centre_crop(landscape, (480, 320)),
        "portrait": centre_crop(portrait, (320, 480)),
        "below": centre_crop(images[5], (96, 120)),
    }


def command(root: Path, source: Path, output: Path, flags: dict[str, int], *more: str) -> list[str]:
    names = {"latent_tile": "latent_tiled_size", "latent_overlap": "latent_tiled_overlap"}
    sizes = [word for name, value in flags.items() for word in (f"--{names.get(name, name)}", str(value))]
    return [
        "infer/upscale.py", "--pretrained_model_name_or_path", str(root / "sd3"), "--lora_dir", str(root / "lora"),
        "--embedding_dir", str(root / "prompt"), "--rank", str(RANK), "--rank_vae", str(RANK),
        "-i", str(source), "-o", str(output), "--latent", "mode", "--mixed_precision", "fp32", "--device", "cpu:0",
        *sizes, *more,
    ]  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, arguments: list[str], main: object = None) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    (main or upscale.main)()


SETS = {
    "defaults": (DEFAULTS, default_photos),
    "enlarged": (DEFAULTS, enlarged_photos),
    "smaller": (SMALLER, smaller_photos),
}


@functools.cache
def expected(networks: tuple, name: str) -> dict[str, tuple[Image.Image, Image.Image, Image.Image]]:
    """By photograph: the photograph, the oracle's result without a colour fix, that result in 8 bits."""
    flags, images = SETS[name]
    pipeline = OraclePipeline(*networks, **flags)
    return {
        key: (image, *pipeline.upscale_image(image, "nofix", capture=True)) for key, image in images().items()
    }


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, method) for name in ("defaults", "smaller") for method in METHODS), ("enlarged", "nofix")],
)
def test_photographs_come_out_as_from_the_original(root, networks, monkeypatch, name, method):
    source, output = root / f"{name}_photos", root / f"{name}_{method}"
    source.mkdir(exist_ok=True)
    photographs = expected(networks, name)
    for key, (image, _, _) in photographs.items():
        image.save(source / f"{key}.png")
    flags, _ = SETS[name]
    run(monkeypatch, command(root, source, output, flags, "--align_method", method))

    assert {file.stem for file in output.iterdir()} == set(photographs)
    for key, (image, restored, stages) in photographs.items():
        result = Image.open(output / f"{key}.png")
        assert result.size == (image.width * flags["upscale"], image.height * flags["upscale"])
        before = stages["before_colour"]
        wanted = restored if method == "nofix" else to_image(align_colour(before, image, method))
        difference = np.abs(np.asarray(result, int) - np.asarray(wanted, int))
        bound = {"nofix": 1, "wavelet": 2, "adain": 1 + math.ceil(_stretch(image, restored))}[method]
        print(f"{name} {key} {method}: at most {difference.max()}, on {np.mean(difference > 0):.3%}")
        assert difference.max() <= bound, key
        if method == "nofix":
            assert np.mean(difference > 0) <= 0.01, key
        # The picture has contents to agree on.
        assert np.asarray(result).std() > 10, key


def _stretch(image: Image.Image, restored: Image.Image) -> float:
    """How much AdaIN stretches the channel that it stretches most."""
    return float(np.max(np.asarray(image).std((0, 1)) / np.asarray(restored).std((0, 1))))


def test_converted_files_give_the_same_pixels(root, networks, monkeypatch, tmp_path):
    (tmp_path / "photo").mkdir()
    photos(1, (128, 128))[0].save(tmp_path / "photo" / "one.png")
    base, ours = root / "sd3", tmp_path / "ours"
    run(
        monkeypatch, ["convert/sd3.py", "--input", str(base), "--output", str(ours / "sd3")], convert_sd3.main
    )
    lora = [
        "convert/lora.py",
        "--input",
        str(root / "lora"),
        "--output",
        str(ours / "lora"),
        "--base",
        str(base),
    ]
    run(monkeypatch, lora, convert_lora.main)
    assert not list(ours.rglob("diffusion_pytorch_model*"))

    outputs = []
    for folder, more in [
        (root, []),
        (ours, ["--embedding_dir", str(root / "prompt")]),
        (root, ["--lora_scale", "0"]),
    ]:
        output = tmp_path / f"out{len(outputs)}"
        run(monkeypatch, command(folder, tmp_path / "photo", output, DEFAULTS, *more))
        outputs.append(np.asarray(Image.open(output / "one.png")))
    direct, converted, without_lora = outputs
    assert np.array_equal(direct, converted)
    assert not np.array_equal(direct, without_lora)  # the adapters do something
