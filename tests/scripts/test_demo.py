"""Runs the script of `make demo` into a temporary folder, and checks the bundled model that it shows."""

import shutil

import numpy as np
import pytest
from PIL import Image

from examples import demo
from tsdsr_jax.errors import UserError
from tsdsr_jax.images.files import IMAGE_SUFFIXES
from tsdsr_jax.weights import bundled

MEGABYTE = 1_000_000


def test_the_demo_restores_the_example_photographs(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    demo.main()
    said = capfd.readouterr().out
    assert said.startswith("Upscaling 4 small photographs by four") and "minutes" in said.splitlines()[0]
    assert "using the small model in" in said
    photos = {path.stem: path for path in demo.PHOTOS.iterdir() if path.suffix in IMAGE_SUFFIXES}
    assert {path.stem for path in (tmp_path / "results").iterdir()} == set(photos)
    for name, source in photos.items():
        with Image.open(tmp_path / "results" / f"{name}.png") as result, Image.open(source) as photo:
            assert result.size == (4 * photo.width, 4 * photo.height)
            back = np.asarray(result.convert("RGB").resize(photo.size, Image.Resampling.BOX), np.float64)
            photo = np.asarray(photo.convert("RGB"), np.float64)
            sharpness = np.abs(np.diff(np.asarray(result.convert("L"), np.float64))).mean()
        # The same picture, its colours included; and not one that a mere enlargement gives.
        assert np.abs(back - photo).mean() < 8 and np.abs((back - photo).mean((0, 1))).max() < 2
        bicubic = Image.open(source).convert("L").resize(result.size, Image.Resampling.BICUBIC)
        assert sharpness > np.abs(np.diff(np.asarray(bicubic, np.float64))).mean()
    assert (tmp_path / "report.html").stat().st_size > 100_000
    with Image.open(tmp_path / "comparison.png") as sheet:
        assert min(sheet.size) > 1000


def test_the_bundled_model_is_small_and_has_a_card():
    files = [path for path in bundled.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20 * MEGABYTE
    assert (bundled.FOLDER / "README.md").is_file()


def test_a_copy_of_the_bundled_model_is_known(tmp_path):
    """But no folder with other weights, nor half a copy."""
    copy = shutil.copytree(bundled.FOLDER, tmp_path / "copy")
    (copy / "README.md").write_text("another card")
    assert bundled.is_bundled(str(copy)) and bundled.is_bundled(str(bundled.FOLDER))
    half = shutil.copytree(copy, tmp_path / "half")
    (half / "lora" / "vae.safetensors").unlink()
    other = shutil.copytree(copy, tmp_path / "other")
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    for folder in (half, other, tmp_path, tmp_path / "nowhere"):
        assert not bundled.is_bundled(str(folder))
    assert (
        not bundled.is_bundled(None) and not bundled.is_bundled("") and not bundled.is_bundled("owner/model")
    )


def test_without_the_repository_a_model_has_to_be_named(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "FOLDER", tmp_path)
    with pytest.raises(UserError, match="--pretrained_model_name_or_path"):
        bundled.bundled_model()
