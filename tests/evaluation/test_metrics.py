"""Compares PSNR, SSIM and NIQE with NumPy in float64, and with published figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import io

import oracle_metrics
from photos import data_folder, photos
from tsdsr_jax.errors import UserError
from tsdsr_jax.evaluation import niqe, psnr_ssim
from tsdsr_jax.evaluation.niqe_params import PristineModel, load_pristine
from tsdsr_jax.images.resize import bicubic, pillow_bicubic

# float32 against float64, over hundreds of thousands of pixels.
PSNR_DB, SSIM = 1e-4, 2e-5
# Shape parameters come from a table in steps of 0.001; a moment between two entries changes NIQE by this much.
NIQE_IMAGE, NIQE_MEAN = 3e-3, 1e-3


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng()


@pytest.fixture(scope="module")
def pristine() -> PristineModel:
    return load_pristine(data_folder() / "niqe_pris_params.npz")


def textured(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise at three scales, and a flat corner."""
    image = np.zeros((height, width, 3), np.float32)
    for scale in (1, 4, 16):
        coarse = generator.normal(127 / 3, 20, (-(-height // scale), -(-width // scale), 3))
        image += np.kron(coarse, np.ones((scale, scale, 1)))[:height, :width]
    image[: height // 3, : width // 3] = 255
    return np.clip(image, 0, 255).astype(np.uint8)


def disturbed(generator: np.random.Generator, image: np.ndarray) -> np.ndarray:
    noise = generator.normal(0, 12, image.shape)
    return np.clip(image.astype(float) + noise, 0, 255).astype(np.uint8)


def in_corners(images: list[np.ndarray], height: int, width: int, filling: int) -> np.ndarray:
    batch = np.full((len(images), height, width, 3), filling, np.uint8)
    for index, image in enumerate(images):
        batch[index, : image.shape[0], : image.shape[1]] = image
    return batch


@pytest.mark.parametrize("sizes", [[(64, 64)], [(33, 50), (48, 11), (11, 11)]])
def test_psnr_and_ssim(generator, sizes):
    references = [textured(generator, *size) for size in sizes]
    results = [disturbed(generator, image) for image in references]
    # In dark pictures the constants matter.
    references[0], results[0] = references[0] // 16, results[0] // 16
    height, width = np.max(sizes, axis=0)
    # The pixels around the pictures differ between the two, and must not count.
    batches = in_corners(results, height, width, 7), in_corners(references, height, width, 200)
    sizes = np.asarray(sizes, np.int32)
    pairs = list(zip(results, references, strict=True))
    np.testing.assert_allclose(
        psnr_ssim.psnr_y(*batches, sizes), [oracle_metrics.psnr(*pair) for pair in pairs], atol=PSNR_DB
    )
    np.testing.assert_allclose(
        psnr_ssim.ssim_y(*batches, sizes), [oracle_metrics.ssim(*pair) for pair in pairs], atol=SSIM
    )
    np.testing.assert_allclose(
        psnr_ssim.detail_correlation(*batches, sizes),
        [oracle_metrics.detail(*pair) for pair in pairs],
        atol=1e-5,
    )


def test_equal_and_opposite_pictures(generator):
    image = textured(generator, 40, 30)[None]
    sizes = np.array([[40, 30]], np.int32)
    assert psnr_ssim.psnr_y(image, image, sizes)[0] == pytest.approx(80, abs=1e-3)
    assert psnr_ssim.ssim_y(image, image, sizes)[0] == pytest.approx(1, abs=1e-6)
    # Negated, so that the contrast-structure term would be negative and is clipped.
    assert psnr_ssim.ssim_y(image, 255 - image, sizes)[0] == pytest.approx(
        oracle_metrics.ssim(image[0], 255 - image[0]), abs=SSIM
    )


def test_detail_is_not_won_by_noise():
    """Enlarging loses detail; added noise improves NIQE, but not the correlation."""
    image = np.asarray(photos(1)[0])[:320, :320]
    enlarged = pillow_bicubic(pillow_bicubic(image, 80, 80), 320, 320)
    noisy = disturbed(np.random.default_rng(0), enlarged)
    sizes = np.array([[320, 320]] * 3, np.int32)
    same, plain, noise = psnr_ssim.detail_correlation(
        np.stack([image, enlarged, noisy]), np.stack([image] * 3), sizes
    )
    assert same == pytest.approx(1, abs=1e-5) and 1 > plain > noise > 0


def test_published_figures_on_drealsr():
    """The means over the 93 pairs of StableSR's DrealSRVal_crop128."""
    names = sorted(path.name for path in data_folder("drealsr", "test_LR").glob("*.png"))
    assert len(names) == 93
    found: dict[str, list[tuple[float, float]]] = {"pillow": [], "torch": []}
    sizes = np.array([[512, 512]], np.int32)
    for name in names:
        lr, hr = (
            np.asarray(Image.open(data_folder("drealsr", folder) / name).convert("RGB"))
            for folder in ("test_LR", "test_HR")
        )
        enlarged = bicubic(lr.astype(np.float32) / 255, 512, 512)
        results = {
            "pillow": pillow_bicubic(lr, 512, 512),
            "torch": np.rint(np.clip(enlarged, 0, 1) * 255).astype(np.uint8),
        }
        for kind, result in results.items():
            pair = result[None], hr[None], sizes
            found[kind].append((float(psnr_ssim.psnr_y(*pair)[0]), float(psnr_ssim.ssim_y(*pair)[0])))
    np.testing.assert_allclose(np.mean(found["pillow"], axis=0), [30.5440, 0.8298], atol=1e-4)
    np.testing.assert_allclose(np.mean(found["torch"], axis=0), [30.5392, 0.8302], atol=1e-4)


def test_niqe(pristine):
    """Photographs of two shapes in one batch; some sharp, some enlarged, some with burnt-out areas."""
    images = [np.asarray(image) for image in photos(6)]
    images += [pillow_bicubic(image[::2, ::2], *image.shape[:2]) for image in images]
    images[1] = np.clip(images[1].astype(int) + 90, 0, 255).astype(np.uint8)
    expected = [oracle_metrics.niqe(image, pristine.mean, pristine.covariance) for image in images]
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    height, width = sizes.max(axis=0)
    found = niqe.niqe(in_corners(images, height, width, 99), sizes, pristine)
    np.testing.assert_allclose(found, expected, atol=NIQE_IMAGE)
    assert abs(np.mean(found) - np.mean(expected)) <= NIQE_MEAN


def test_niqe_on_drealsr(pristine):
    paths = sorted(data_folder("drealsr", "test_HR").glob("*.png"))[::12]
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    expected = [oracle_metrics.niqe(image, pristine.mean, pristine.covariance) for image in images]
    found = niqe.niqe(images, np.full((len(images), 2), 512, np.int32), pristine)
    np.testing.assert_allclose(found, expected, atol=NIQE_IMAGE)
    assert abs(np.mean(found) - np.mean(expected)) <= NIQE_MEAN


def random_model(generator: np.random.Generator) -> PristineModel:
    root = generator.normal(size=(36, 36)) / 6
    return PristineModel(generator.normal(size=36), root @ root.T + np.eye(36))


def test_niqe_of_synthetic_pictures(generator):
    model = random_model(generator)
    images = [textured(generator, *size) for size in ((96, 192), (300, 200))]
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    expected = [oracle_metrics.niqe(image, model.mean, model.covariance) for image in images]
    found = niqe.niqe(in_corners(images, 300, 230, 0), sizes, model)
    np.testing.assert_allclose(found, expected, atol=NIQE_IMAGE)


def test_niqe_of_pictures_with_flat_blocks(generator):
    """A block without texture has no shape: it is left out of the covariance, but its other features count for the mean."""
    model = random_model(generator)
    image = textured(generator, 192, 384)
    image[:96, 96:192] = 40
    image[96:, 200:] = 255
    expected = oracle_metrics.niqe(image, model.mean, model.covariance)
    found = niqe.niqe(image[None], np.array([[192, 384]], np.int32), model)
    assert found == pytest.approx([expected], abs=NIQE_IMAGE)
    # A single block with texture has no covariance.
    image[:, :288] = 7
    image[:96] = 7
    assert np.isnan(niqe.niqe(image[None], np.array([[192, 384]], np.int32), model))


def test_niqe_without_texture_is_undefined(generator):
    flat = np.full((1, 192, 192, 3), 255, np.uint8)
    assert np.isnan(niqe.niqe(flat, np.array([[192, 192]], np.int32), random_model(generator)))


def test_parameter_files(tmp_path: Path, generator):
    model = random_model(generator)
    io.savemat(tmp_path / "a.MAT", {"mu_prisparam": model.mean[None], "cov_prisparam": model.covariance})
    np.savez(tmp_path / "a.npz", mu_pris_param=model.mean[None], cov_pris_param=model.covariance)
    for name in ("a.MAT", "a.npz"):
        loaded = load_pristine(tmp_path / name)
        np.testing.assert_array_equal(loaded.mean, model.mean)
        np.testing.assert_array_equal(loaded.covariance, model.covariance)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.npz", None, "not found"),
        ("empty.npz", b"", "not a file of NIQE's parameters"),
        ("text.npz", b"something else", "not a file of NIQE's parameters"),
        ("text.mat", b"something else", "not a file of NIQE's parameters"),
    ],
)
def test_bad_parameter_files(tmp_path: Path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_pristine(tmp_path / name)
    assert name in str(error.value) and "--niqe_params" in str(error.value)


def test_parameters_of_other_shapes(tmp_path: Path):
    np.savez(tmp_path / "a.npz", mu_pris_param=np.zeros(18), cov_pris_param=np.eye(18))
    with pytest.raises(UserError, match="expected 36"):
        load_pristine(tmp_path / "a.npz")
    np.savez(tmp_path / "c.npz", mu_pris_param=np.full(36, np.nan), cov_pris_param=np.eye(36))
    with pytest.raises(UserError, match="not finite"):
        load_pristine(tmp_path / "c.npz")
    np.savez(tmp_path / "b.npz", something=np.zeros(18))
    with pytest.raises(UserError, match="no mu_pris_param or mu_prisparam"):
        load_pristine(tmp_path / "b.npz")
