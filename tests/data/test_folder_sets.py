"""Training sets in the original's folder layout: what is read, what is refused, and with which message."""

import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny_training
from tsdsr_jax.data.folder_sets import PreparedFolder
from tsdsr_jax.data.sources import open_sets
from tsdsr_jax.errors import UserError
from tsdsr_jax.weights.prompt_files import PromptEmbeds, save_prompt_embeds
from tsdsr_jax.weights.torch_pickle import read_tensor, write_tensor

NAMES = ("0001", "a photo of gt", "ünïcode")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    _, vae = tiny_training.save_models(folder)
    # "gt" in the path breaks the original.
    return tiny_training.save_set(folder / "gt set", vae, 3, (32, 48), names=NAMES)


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "set")


def refusal(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        source = PreparedFolder(root)
        for index in range(len(source)):
            source.read(index)
    return str(caught.value)


def test_samples_are_read_whatever_their_names(root):
    source = PreparedFolder(root)
    assert [Path(source.name(index)).stem for index in range(len(source))] == list(NAMES)
    record = source.read(1)
    np.testing.assert_array_equal(record.hr, np.asarray(Image.open(root / "gt" / "a photo of gt.png")))
    assert record.lr.shape == record.hr.shape == (32, 48, 3) and record.lr.dtype == np.uint8
    stored = read_tensor(root / "latent_hr" / "a photo of gt.pt")
    assert stored.shape == (1, 16, 4, 6)
    np.testing.assert_array_equal(record.latent_hr, stored[0].transpose(1, 2, 0))
    assert record.prompt.dtype == record.pooled.dtype == np.float16
    np.testing.assert_array_equal(record.prompt, read_tensor(root / "prompt_embeds" / "a photo of gt.pt")[0])


def test_other_formats_and_forms_of_the_same(root):
    record = PreparedFolder(root).read(0)
    # A JPEG for a PNG, tensors without the leading 1, one safetensors file for both embeddings.
    (root / "lr_bicubic" / "0001.png").rename(root / "lr_bicubic" / "0001.tmp")
    Image.open(root / "lr_bicubic" / "0001.tmp").save(root / "lr_bicubic" / "0001.JPG", "jpeg", quality=98)
    write_tensor(root / "latent_hr" / "0001.pt", record.latent_hr.transpose(2, 0, 1))
    for folder in ("prompt_embeds", "pool_embeds"):
        (root / folder / "0001.pt").unlink()
    save_prompt_embeds(
        root / "prompt_embeds" / "0001.safetensors", PromptEmbeds(record.prompt, record.pooled)
    )
    again = PreparedFolder(root).read(0)
    assert np.abs(again.lr.astype(int) - record.lr).mean() < 4
    for ours, theirs in zip(again[1:], record[1:], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_names_may_differ_in_their_unicode_form(root):
    before = PreparedFolder(root)
    hr, fingerprint = before.read(2).hr, before.fingerprint()
    for folder, suffix in (("gt", ".png"), ("latent_hr", ".pt"), ("pool_embeds", ".pt")):
        composed = root / folder / f"ünïcode{suffix}"
        composed.rename(composed.with_name(unicodedata.normalize("NFD", composed.name)))
    after = PreparedFolder(root)
    assert len(after) == 3 and after.fingerprint() == fingerprint
    np.testing.assert_array_equal(after.read(2).hr, hr)


def test_pictures_that_are_not_read_are_no_silent_loss(root):
    (root / "lr_bicubic" / "0004.heic").touch()
    assert "lr_bicubic: 1 picture cannot be used (.heic is not read" in refusal(root)


def test_several_roots_are_one_set(root, tmp_path):
    second = shutil.copytree(root, tmp_path / "second")
    both = open_sets([root, second])
    assert len(both) == 6
    np.testing.assert_array_equal(both.read(0).lr, both.read(3).lr)


def test_the_fingerprint_follows_the_content_not_the_place(root, tmp_path):
    before = PreparedFolder(root).fingerprint()
    moved = PreparedFolder(Path(shutil.move(root, tmp_path / "elsewhere")))
    assert moved.fingerprint() == before
    # Swaps two files of the same size.
    first, second = (files.latent_hr for files in moved.files[:2])
    contents = first.read_bytes(), second.read_bytes()
    assert len(contents[0]) == len(contents[1])
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    assert PreparedFolder(tmp_path / "elsewhere").fingerprint() != before


def test_missing_folders_and_files_are_named_together(root, tmp_path):
    assert "no such folder" in refusal(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "has no lr_bicubic/" in refusal(tmp_path / "empty")
    (root / "latent_hr" / "0001.pt").unlink()
    (root / "pool_embeds" / "ünïcode.pt").unlink()
    shutil.rmtree(root / "prompt_embeds")
    said = refusal(root)
    assert "latent_hr/ lacks 0001\n" in said and "pool_embeds/ lacks ünïcode\n" in said
    assert "prompt_embeds/ lacks 0001, a photo of gt, ünïcode" in said
    assert "convert/prompts.py --prompt_file" in said


def test_an_image_that_is_there_twice_is_refused(root):
    shutil.copy(root / "lr_bicubic" / "0001.png", root / "lr_bicubic" / "0001.bmp")
    assert "0001: several images have this name" in refusal(root)


def damage_image(root: Path) -> str:
    path = root / "gt" / "0001.png"
    path.write_bytes(path.read_bytes()[:-200])
    return "0001.png"


def damage_tensor(root: Path) -> str:
    path = root / "latent_hr" / "0001.pt"
    path.write_bytes(path.read_bytes()[:100])
    return "0001.pt"


def another_size(root: Path) -> str:
    Image.open(root / "lr_bicubic" / "0001.png").resize((24, 16)).save(root / "lr_bicubic" / "0001.png")
    return "24×16 pixels, but"


def flat_latent(root: Path) -> str:
    write_tensor(root / "latent_hr" / "0001.pt", np.zeros((4, 6), np.float32))
    return "shape (4, 6); expected a latent (C, h, w)"


def infinite_latent(root: Path) -> str:
    write_tensor(root / "latent_hr" / "0001.pt", np.full((16, 4, 6), np.inf, np.float32))
    return "NaN or infinite"


def flat_prompt(root: Path) -> str:
    write_tensor(root / "prompt_embeds" / "0001.pt", np.zeros(12, np.float32))
    return "prompt embeddings (tokens, width)"


@pytest.mark.parametrize(
    "damage", [damage_image, damage_tensor, another_size, flat_latent, infinite_latent, flat_prompt]
)
def test_a_bad_sample_is_refused_by_name(root, damage):
    expected = damage(root)
    said = refusal(root)
    assert expected in said and "0001" in said
