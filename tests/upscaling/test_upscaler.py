"""The public face: three lines of Python, and the pixels that infer/upscale.py writes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny_checkpoint as tiny
import tsdsr_jax
from tsdsr_jax import Upscaler, cli
from tsdsr_jax.commands import upscale as command
from tsdsr_jax.errors import UserError
from tsdsr_jax.upscaling import upscaler as upscaler_module
from tsdsr_jax.upscaling.upscaler import Picture


@pytest.fixture(scope="module")
def upscale() -> Upscaler:
    """The bundled model."""
    return Upscaler.from_pretrained(device="cpu:0")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Color, a portrait in gray, and one with transparency."""
    folder = tmp_path_factory.mktemp("photographs")
    images = [
        Image.fromarray(tiny.synthetic_photo(*size, seed))
        for seed, size in enumerate([(20, 32), (34, 22), (24, 24)])
    ]
    images[1] = images[1].convert("L")
    images[2].putalpha(Image.fromarray(np.tile(np.arange(24, dtype=np.uint8) * 10, (24, 1))))
    for index, image in enumerate(images):
        image.save(folder / f"{index}.png")
    return folder


PICTURE = np.zeros((4, 4, 3), np.uint8)
# Small, so that the tests are quick: the command's flags, and the same in the loaded options.
FLAGS = ("--process_size", "64")


def written(
    folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch, *flags: str
) -> dict[str, np.ndarray]:
    """What the command line makes of the folder."""
    arguments = ["-i", str(folder), "-o", str(output), "--device", "cpu:0", *FLAGS, *flags]
    monkeypatch.setattr(sys, "argv", ["upscale.py", *arguments])
    cli.run(command.main)
    return {file.name: np.asarray(Image.open(file)) for file in sorted(output.iterdir())}


@pytest.fixture
def small(upscale: Upscaler, monkeypatch: pytest.MonkeyPatch) -> Upscaler:
    monkeypatch.setattr(upscale, "options", dataclasses.replace(upscale.options, process_size=64))
    return upscale


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({}, ()),
        (
            dict(scale=2, color="adain", seed=7, latent="mode"),
            ("--upscale", "2", "--align_method", "adain", "--seed", "7", "--latent", "mode"),
        ),
    ],
)
def test_pictures_are_the_command_lines(small, photos, tmp_path, monkeypatch, settings, flags):
    expected = written(photos, tmp_path / "out", monkeypatch, *flags)
    files = sorted(photos.iterdir())
    for given in (files, [Image.open(file) for file in files]):
        results = small(given, **settings)
        for file, result in zip(files, results, strict=True):
            assert isinstance(result, Image.Image)
            np.testing.assert_array_equal(np.asarray(result), expected[file.name], err_msg=file.name)


def test_one_picture_in_one_picture_out_of_the_same_kind(small, photos):
    array = tiny.synthetic_photo(18, 30, 5)
    result = small(array, color="nofix")
    assert isinstance(result, np.ndarray) and result.shape == (72, 120, 3) and result.dtype == np.uint8
    image = small(Image.fromarray(array), color="nofix")
    np.testing.assert_array_equal(np.asarray(image), result)
    assert small(photos / "2.png").mode == "RGBA" and small(str(photos / "1.png")).mode == "L"


def test_noise_follows_seed_and_picture_and_nothing_else(small):
    first, other = tiny.synthetic_photo(16, 16, 1), tiny.synthetic_photo(16, 16, 2)
    alone, together = small(first), small((first, other))
    assert np.abs(alone.astype(int) - together[0].astype(int)).max() <= 1
    assert (small(first, seed=1) != alone).any()
    assert (small(first, latent="mode", seed=1) == small(first, latent="mode", seed=2)).all()


@pytest.mark.parametrize("color", ["wavelet", "adain"])
def test_a_disc_over_hidden_black_has_no_ring(small, color):
    y, x = np.mgrid[:24, :24]
    alpha = np.clip((8 - np.hypot(y - 11.5, x - 11.5)) * 255 + 128, 0, 255).astype(np.uint8)
    discs = [
        Image.fromarray(
            np.dstack([np.where(alpha[..., None] > 0, np.uint8(shade), 0), alpha]).astype(np.uint8)
        )
        for shade in ((255, 255, 255), (230, 40, 40), (20, 60, 200))
    ]
    *results, nothing = small([*discs, Image.new("RGBA", (24, 24))], color=color)
    assert nothing.size == (96, 96) and nothing.getextrema()[3] == (0, 0), (
        "a fully transparent picture is one, too"
    )
    for disc, result in zip(discs, results, strict=True):
        *shade, _ = disc.getpixel((12, 12))
        rgb, shown = np.asarray(result)[..., :3].astype(int), np.asarray(result)[..., 3] > 7
        assert np.abs(rgb - shade)[shown].max() <= 15
        assert shown.sum() > 16 * shown.size // 40


def test_notes_about_files_are_told(small, photos, tmp_path):
    path, notes = tmp_path / "a.jpg", []
    Image.open(photos / "2.png").convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-2])
    small(path, on_note=notes.append)
    assert notes == [f"{path}: its end marker is missing; its pixels are all there"]


def test_progress_is_told(small):
    told = []
    small([tiny.synthetic_photo(16, 16, seed) for seed in range(3)], progress=lambda *step: told.append(step))
    assert sorted(told) == [(1, 3), (2, 3), (3, 3)]


def test_an_exception_of_progress_ends_the_call(small):
    def cancel(done: int, total: int) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        small([tiny.synthetic_photo(16, 16, 0)], progress=cancel)


def test_a_tile_has_the_command_lines_overlap(upscale):
    """As the command's default: half of a small tile, at most 8. An overlap that was asked for stays."""
    assert [upscale.settings(tile=tile).latent_overlap for tile in (8, 12, 16)] == [4, 6, 8]
    asked = Upscaler(upscale.engine, dataclasses.replace(upscale.options, latent_tiled_overlap=2))
    assert asked.settings(tile=12).latent_overlap == 2


def test_stages_are_told_and_may_end_the_call(small):
    told = []
    small(tiny.synthetic_photo(16, 16, 0), on_stage=lambda *stage: told.append(stage))
    assert told == [("encode", 0, 1), ("tiles", 0, 1), ("tiles", 1, 1), ("decode", 0, 1), ("decode", 1, 1)]

    def cancel(stage: str, done: int, total: int) -> None:
        if stage == "decode":
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        small(tiny.synthetic_photo(16, 16, 0), on_stage=cancel)


def test_large_pictures_are_refused_before_they_are_decoded(small, tmp_path, monkeypatch):
    monkeypatch.setattr(small, "options", dataclasses.replace(small.options, max_pixels=80))
    array = tiny.synthetic_photo(9, 9, 0)
    Image.fromarray(array).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:50])
    for picture, words in (
        (array, "^pictures: has 9×9 pixels, more than max_pixels 80"),
        (Image.fromarray(array), "^pictures: has 9 x 9 = 81 pixels, more than the limit of 80"),
        (tmp_path / "cut.png", "cut.png: has 9 x 9 = 81 pixels, more than the limit of 80"),
        (
            array[:3, :3],
            "^pictures: 3×3 pixels enlarged 4 times make 12×12, .* as 64×64, .*80; make it smaller, or max_pixels",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            small(picture)


def test_a_command_in_a_message_keeps_its_flags(monkeypatch):
    def refuse(*arguments: object, **more: object) -> None:
        raise UserError("--embedding_dir x: is missing. Make it with: python convert/prompts.py --device cpu")

    monkeypatch.setattr(upscaler_module, "load_engine", refuse)
    expected = "^prompt x: is missing. Make it with: python convert/prompts.py --device cpu$"
    with pytest.raises(ValueError, match=expected):
        Upscaler.from_pretrained()


def test_an_empty_list_is_refused(small):
    with pytest.raises(ValueError, match="pictures: is empty; expected at least one"):
        small([])


@pytest.mark.parametrize(
    ("picture", "settings", "words"),
    [
        (np.zeros((4, 4, 3), np.float32), {}, r"^pictures: is float32 \(4, 4, 3\); expected uint8"),
        (np.zeros((4, 4), np.uint8), {}, r"^pictures: is uint8 \(4, 4\); expected uint8 \(H, W, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), {}, r"^pictures: is uint8 \(0, 4, 3\); expected uint8 \(H, W, 3\)"),
        (b"photo", {}, r"^pictures: is a bytes; expected a PIL image"),
        ([PICTURE, None], {}, r"^pictures\[1\]: is a NoneType; expected a PIL image"),
        ([[PICTURE]], {}, r"^pictures\[0\]: is a list; expected a PIL image"),
        ("nowhere.png", {}, "^nowhere.png: does not exist"),
        ("~no such user.png", {}, "^~no such user.png: does not exist"),
        ("a\0.png", {}, r"^pictures 'a\\x00.png': holds a null character"),
        (PICTURE, dict(scale="4"), "^scale '4': expected a number"),
        (PICTURE, dict(scale=True), "^scale True: expected a number"),
        (PICTURE, dict(scale=float("nan")), "^scale nan: expected 1 to 64"),
        (PICTURE, dict(seed=1.5), "^seed 1.5: expected a whole number"),
        (PICTURE, dict(color=None), "^color None: expected one of wavelet"),
        (PICTURE, dict(color=["adain"]), r"^color \['adain'\]: expected one of wavelet"),
        (PICTURE, dict(tile=9), r"^tile 9: expected an even number"),
        (PICTURE, dict(tile=0), "^tile 0: expected more than 0, the overlap of tiles"),
        (PICTURE, dict(tile=10**6), "^tile 1000000: this transformer's position table ends at"),
        (PICTURE, dict(scale=0.5), "^scale 0.5: expected 1 to 64"),
        (PICTURE, dict(scale=10**400), "^scale 10+: expected 1 to 64"),
        (PICTURE, dict(color="wavelets"), "^color 'wavelets': expected one of wavelet"),
        (PICTURE, dict(latent="mean"), "^latent 'mean': expected one of sample, mode"),
        (PICTURE, dict(seed=2**200), "^seed .*: expected at most 127 bits"),
    ],
)
def test_mistakes_are_value_errors_that_name_the_argument(small, picture: Picture, settings, words):
    with pytest.raises(ValueError, match=words):
        small(picture, **settings)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(model="nowhere"), "nowhere: no such folder"),
        (dict(lora="here"), "lora here: give the model it belongs to with model"),
        (dict(device="cuda:x"), "device cuda:x: expected cuda"),
        (dict(lora_scale=float("inf")), "lora_scale inf: expected a finite number"),
        (dict(lora_scale="half"), "lora_scale 'half': expected a number"),
        (dict(dtype="float16"), "dtype 'float16': expected one of None, fp16, bf16, fp32"),
        (dict(weights="int4"), "weights 'int4': expected one of full, int8, fp8"),
        (dict(max_pixels=0), "max_pixels 0: expected at least 1"),
        (dict(max_pixels=1e8), "max_pixels 100000000.0: expected a whole number"),
        (dict(model=3), "model: is a int; expected a path or a name"),
        (dict(model="~no such user/sd3"), "~no such user/sd3: no such folder"),
        (dict(device=0), "device: is a int; expected a path or a name"),
        (dict(revision=3), "revision: is a int; expected a path or a name"),
    ],
)
def test_mistakes_while_loading_name_the_argument(arguments, words):
    with pytest.raises(ValueError, match=words):
        Upscaler.from_pretrained(**arguments)


def test_the_root_imports_nothing_heavy_and_quickly():
    code = (
        "import sys, time; start = time.perf_counter(); import tsdsr_jax; took = time.perf_counter() - start\n"
        "heavy = {'jax', 'flax', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\nassert took < 0.2, took\nprint(sorted(set(tsdsr_jax.__all__) - set(dir(tsdsr_jax))))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def test_every_public_name_can_be_imported():
    for name in tsdsr_jax.__all__:
        assert getattr(tsdsr_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Upscalers'"):
        tsdsr_jax.Upscalers  # noqa: B018
