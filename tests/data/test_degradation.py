"""Compares each stage of the degradation with another implementation, or with statistics that its definition implies."""

import dataclasses
import io

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import tiny_checkpoint as tiny
from tsdsr_jax.data import degradation
from tsdsr_jax.data.blur_kernels import blur_kernel, pulse, sinc_kernel
from tsdsr_jax.data.degradation import DegradationConfig, Order, camera, degrade, light
from tsdsr_jax.data.jpeg_model import CHROMA, LUMA, jpeg, jpeg_codec

CONFIG = DegradationConfig()


def noise_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width, 3), np.float32)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return tiny.synthetic_photo(height, width, seed).astype(np.float32) / 255


# --- kernels --------------------------------------------------------------------------------------


def by_definition(shape: str, size: int, sx: float, sy: float, angle: float, beta: float) -> np.ndarray:
    """Pixel by pixel, with the covariance matrix written out."""
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inverse = np.linalg.inv(turn @ np.diag([sx**2, sy**2]) @ turn.T)
    kernel = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            v = np.array([column - size // 2, row - size // 2], float)
            m = v @ inverse @ v
            kernel[row, column] = {
                "gaussian": np.exp(-0.5 * m), "generalized": np.exp(-0.5 * m**beta), "plateau": 1 / (m**beta + 1)
            }[shape]  # fmt: skip
    return kernel / kernel.sum()


@pytest.mark.parametrize("shape", ["gaussian", "generalized", "plateau"])
def test_kernels_are_their_formulae(shape):
    found = blur_kernel(shape, 11, 2.0, 0.7, 0.6, 1.7)
    np.testing.assert_allclose(found, by_definition(shape, 11, 2.0, 0.7, 0.6, 1.7), rtol=1e-10)
    assert found.sum() == pytest.approx(1)
    round_ = blur_kernel(shape, 7, 1.3, beta=0.8)
    np.testing.assert_allclose(round_, by_definition(shape, 7, 1.3, 1.3, 0.0, 0.8), rtol=1e-10)


def test_a_gaussian_is_scipys():
    image = np.zeros((31, 31))
    image[15, 15] = 1
    expected = ndimage.gaussian_filter(image, 1.1, truncate=10 / 1.1)[5:26, 5:26]
    np.testing.assert_allclose(blur_kernel("gaussian", 21, 1.1), expected / expected.sum(), atol=1e-9)


def test_the_sinc_kernel_passes_low_frequencies_only():
    kernel = sinc_kernel(21, np.pi / 3)
    assert kernel.sum() == pytest.approx(1) and kernel.min() < -1e-3
    response = np.abs(np.fft.fft2(np.fft.ifftshift(np.pad(kernel, 22))))
    frequency = np.hypot(*np.meshgrid(*[2 * np.pi * np.fft.fftfreq(65)] * 2))
    # Truncated to 21 pixels, it ripples by a tenth.
    assert response[frequency < 0.5 * np.pi / 3].min() > 0.85
    assert response[frequency > 1.8 * np.pi / 3].max() < 0.1


def test_drawn_kernels_have_the_sizes_and_sums_they_should():
    generator = np.random.default_rng(0)
    sinc_like, sides = 0, set()
    for _ in range(2000):
        kernel = degradation.draw_kernel(generator, (0.2, 3.0), CONFIG)
        assert kernel.shape == (21, 21) and kernel.sum() == pytest.approx(1, abs=1e-5)
        sinc_like += kernel.min() < -1e-6
        sides.add(21 - 2 * int(np.flatnonzero(np.abs(kernel).sum(1))[0]))
    assert abs(sinc_like / 2000 - 0.1) < 0.03
    assert sides <= set(range(1, 22, 2)) and {7, 21} <= sides
    final = [degradation.draw_final_kernel(generator, CONFIG) for _ in range(1000)]
    unchanged = np.mean([kernel[10, 10] == 1 for kernel in final])
    assert abs(unchanged - 0.2) < 0.05


def test_filtering_is_a_correlation_with_mirrored_borders():
    image, kernel = noise_image(30, 40), np.random.default_rng(1).random((21, 21)).astype(np.float32) / 200
    expected = np.stack(
        [ndimage.correlate(image[..., c].astype(float), kernel, mode="mirror") for c in range(3)], -1
    )
    np.testing.assert_allclose(degradation.convolve(image, kernel), expected, atol=1e-5)
    np.testing.assert_allclose(
        degradation.convolve(image, degradation.padded(pulse(1), 21)), image, atol=1e-7
    )


def test_sharpening_is_an_unsharp_mask_where_there_is_detail():
    image = photo(64, 80)
    axis = np.arange(-25, 26)
    window = np.exp(-(axis**2) / (2 * 8.0**2))
    window /= window.sum()

    def blur(x):
        for side in (0, 1):
            x = ndimage.correlate1d(x, window, side, mode="mirror")
        return x

    wide = image.astype(float)
    detail = wide - blur(wide)
    mask = blur((255 * np.abs(detail) > 10).astype(float))
    expected = mask * np.clip(wide + 0.5 * detail, 0, 1) + (1 - mask) * wide
    found = degradation.sharpen(image)
    # A pixel at the threshold may fall on either side of it.
    assert np.abs(found - expected).mean() < 1e-5 and np.abs(found - image).max() > 0.02


# --- resize ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", degradation.MODES)
@pytest.mark.parametrize("factor", [0.15, 0.377, 1.0, 1.31])
def test_resizing_is_torchs(mode, factor):
    torch = pytest.importorskip("torch")
    image = noise_image(96, 128)
    tensor = torch.from_numpy(image.transpose(2, 0, 1)[None].copy())
    align = {} if mode == "area" else {"align_corners": False}

    def theirs(**how):
        return (
            torch.nn.functional.interpolate(tensor, mode=mode, **align, **how)[0].numpy().transpose(1, 2, 0)
        )

    by_factor = degradation.resize_by(image, factor, mode)
    assert by_factor.dtype == np.float32 and by_factor.shape == (int(96 * factor), int(128 * factor), 3)
    # torch rounds its coordinates to float32.
    np.testing.assert_allclose(by_factor, theirs(scale_factor=factor), atol=2e-5)
    np.testing.assert_allclose(degradation.resize_to(image, 41, 77, mode), theirs(size=(41, 77)), atol=2e-5)


def test_the_two_kinds_of_resizing_differ():
    """They sample at different steps; a naive port would use the step of the size for both."""
    image = noise_image(96, 96)
    difference = degradation.resize_by(image, 0.377, "bicubic") - degradation.resize_to(
        image, 36, 36, "bicubic"
    )
    assert np.abs(difference).max() > 0.1


# --- noise ----------------------------------------------------------------------------------------

FLAT = Order(1, (1, 1), (0, 0, 1), (1, 1), (1, 1), 1.0, (20, 20), (1, 1), 0.0, (90, 90))


def test_gaussian_noise_has_its_deviation_in_colour_and_grey():
    image = np.full((200, 200, 3), 0.5, np.float32)
    generator = np.random.default_rng(0)
    color = degradation.add_random_noise(image, generator, FLAT) - image
    gray = degradation.add_random_noise(image, generator, dataclasses.replace(FLAT, grey=1.0)) - image
    for noise in (color, gray):
        assert noise.std() == pytest.approx(20 / 255, rel=0.02) and abs(noise.mean()) < 1e-3
    assert abs(np.corrcoef(color[..., 0].ravel(), color[..., 1].ravel())[0, 1]) < 0.02
    np.testing.assert_allclose(gray[..., 0], gray[..., 1], atol=1e-6)


def test_poisson_noise_counts_as_many_photons_as_there_are_values():
    """Variance u / V at value u, where V is the number of distinct values rounded up to a power of two."""
    image = (
        np.repeat(np.float32([0.2, 0.5, 0.8]), 40_000).reshape(-1, 200, 1).repeat(3, 2)
    )  # three values: V = 4
    noise = degradation.poisson_noise(image, np.random.default_rng(0), gray=False)
    assert noise.shape == image.shape
    for value in (0.2, 0.5, 0.8):
        u = round(255 * value) / 255
        assert noise[image == np.float32(value)].var() == pytest.approx(u / 4, rel=0.03)
    assert abs(noise.mean()) < 2e-3
    gray = degradation.poisson_noise(image, np.random.default_rng(0), gray=True)
    assert gray.shape == (*image.shape[:2], 1)
    many = photo(64, 64)
    assert len(np.unique(np.round(255 * many))) > 128  # V = 256
    variance = degradation.poisson_noise(many.repeat(20, 0), np.random.default_rng(0), gray=False).var()
    assert variance == pytest.approx(many.mean() / 256, rel=0.05)


# --- JPEG -----------------------------------------------------------------------------------------


def jpeg_by_definition(image: np.ndarray, quality: float) -> np.ndarray:
    """Block by block with cosines written out; float64."""
    height, width = image.shape[:2]
    padded = np.zeros((-(-height // 16) * 16, -(-width // 16) * 16, 3))
    padded[:height, :width] = 255 * image.astype(float)
    r, g, b = np.moveaxis(padded, -1, 0)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    cb, cr = -0.168736 * r - 0.331264 * g + 0.5 * b + 128, 0.5 * r - 0.418688 * g - 0.081312 * b + 128
    k = np.arange(8)
    basis = (
        np.cos((2 * k[None] + 1) * k[:, None] * np.pi / 16) * np.where(k == 0, np.sqrt(1 / 8), 0.5)[:, None]
    )
    factor = (5000 / quality if quality < 50 else 200 - 2 * quality) / 100

    def through(plane, table):
        out = np.zeros_like(plane)
        for i in range(0, plane.shape[0], 8):
            for j in range(0, plane.shape[1], 8):
                block = basis @ (plane[i : i + 8, j : j + 8] - 128) @ basis.T
                block = np.round(block / (table * factor)) * table * factor
                out[i : i + 8, j : j + 8] = basis.T @ block @ basis + 128
        return out

    def chroma(plane):
        small = (plane[::2, ::2] + plane[1::2, ::2] + plane[::2, 1::2] + plane[1::2, 1::2]) / 4
        return np.kron(through(small, CHROMA), np.ones((2, 2)))

    y, cb, cr = through(y, LUMA), chroma(cb) - 128, chroma(cr) - 128
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1)
    return np.clip(rgb[:height, :width], 0, 255) / 255


@pytest.mark.parametrize("quality", [30, 47.3, 50, 81.9, 95])
def test_jpeg_is_its_definition(quality):
    image = photo(41, 70)
    difference = np.abs(jpeg(image, quality) - jpeg_by_definition(image, quality))
    # A coefficient half way between two levels may be rounded to either.
    assert np.quantile(difference, 0.99) < 1e-5 and difference.mean() < 1e-4


def test_the_luma_table_is_the_transposed_one():
    assert LUMA[0].tolist() == [16, 12, 14, 14, 18, 24, 49, 72] and LUMA[:, 0].tolist()[:3] == [16, 11, 10]
    np.testing.assert_array_equal(CHROMA, CHROMA.T)


@pytest.mark.parametrize(("quality", "at_most"), [(30, 4.0), (50, 3.0), (75, 2.0), (95, 1.0)])
def test_jpeg_is_close_to_a_real_codec(quality, at_most):
    # Smooth like photographs: a real codec also smooths chroma when it enlarges it, and ours does not.
    image = ndimage.gaussian_filter(photo(64, 96), (1.5, 1.5, 0))
    file = io.BytesIO()
    Image.fromarray(np.round(255 * image).astype(np.uint8)).save(
        file, "jpeg", quality=quality, subsampling="4:2:0"
    )
    real = np.asarray(Image.open(file)).astype(float)
    mine = 255 * jpeg(image, quality)
    assert np.abs(mine - real).mean() < at_most
    assert np.abs(mine - 255 * image).mean() > 0.3 * np.abs(real - 255 * image).mean()


def test_the_codec_is_a_real_one():
    """Compares libjpeg in OpenCV with libjpeg in Pillow, both 4:2:0; a pair made with it differs."""
    image = photo(41, 70)
    file = io.BytesIO()
    Image.fromarray(np.round(255 * image).astype(np.uint8)).save(
        file, "jpeg", quality=47, subsampling="4:2:0"
    )
    real = np.asarray(Image.open(file)).astype(float)
    mine = 255 * jpeg_codec(image, 47.3)
    assert np.abs(mine - real).mean() < 0.5 and np.abs(mine - real).max() <= 8
    pairs = [
        degrade(photo(64, 64), np.random.default_rng(1), dataclasses.replace(CONFIG, codec=codec))
        for codec in (False, True)
    ]
    assert 0.1 < np.abs(pairs[0].lr.astype(int) - pairs[1].lr).mean() < 20


# --- all together ---------------------------------------------------------------------------------


def test_a_pair_depends_on_the_generator_only():
    image = photo(128, 192)
    first, again, other = (degrade(image, np.random.default_rng(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.lr, again.lr)
    np.testing.assert_array_equal(first.hr, again.hr)
    assert first.lr.dtype == first.hr.dtype == np.uint8 and first.lr.shape == first.hr.shape == image.shape
    assert np.abs(first.lr.astype(int) - other.lr).mean() > 1


def test_what_comes_out_is_a_degraded_version_of_what_went_in():
    image = photo(128, 128)
    errors, likeness = [], []
    for seed in range(30):
        pair = degrade(image, np.random.default_rng(seed), dataclasses.replace(CONFIG, sharpen=False))
        np.testing.assert_array_equal(pair.hr, degradation.to_bytes(image))
        small = cv2.resize(pair.lr, (16, 16), interpolation=cv2.INTER_AREA).astype(float)
        truth = cv2.resize(pair.hr, (16, 16), interpolation=cv2.INTER_AREA).astype(float)
        likeness.append(np.corrcoef(small.ravel(), truth.ravel())[0, 1])
        errors.append(np.abs(pair.lr.astype(int) - pair.hr).mean())
    # The strongest noise leaves little of a picture of 32 pixels.
    assert np.median(likeness) > 0.9 and min(likeness) > 0.4
    assert min(errors) > 1 and max(errors) > 2 * min(errors)


def test_sides_must_fit_the_scale():
    with pytest.raises(ValueError, match="multiples of 4, not 30×32"):
        degrade(photo(30, 32), np.random.default_rng(0))


def test_the_published_values_are_the_defaults():
    assert sum(chance for _, _, chance in CONFIG.mixture) == pytest.approx(1)
    assert CONFIG.first.shrink == (0.15, 1.0) and CONFIG.second.shrink == (0.3, 1.0)
    assert CONFIG.first.quality == CONFIG.second.quality == (30, 95) and CONFIG.second.blur == 0.8


def test_light_degradation_leaves_more_of_the_photograph():
    config = DegradationConfig(sharpen=False)

    def error(config: DegradationConfig) -> float:
        pairs = [degrade(photo(96, 128), np.random.default_rng(seed), config) for seed in range(12)]
        return np.mean([np.square(pair.lr.astype(float) - pair.hr).mean() for pair in pairs])

    assert error(light(config)) < 0.6 * error(config)


def test_a_cameras_degradation_has_more_blur_and_less_noise_than_the_light_one():
    def blur(config: DegradationConfig) -> float:
        """How much of the finest detail is left, of noise as a photograph."""
        noise = np.random.default_rng(0).random((64, 64, 3)).astype(np.float32)
        pairs = [degrade(noise, np.random.default_rng(seed), config) for seed in range(40)]
        return np.mean([pair.lr.astype(float).std() for pair in pairs])

    plain = DegradationConfig(sharpen=False)
    assert blur(camera(plain)) < 0.9 * blur(light(plain))

    def noise(config: DegradationConfig) -> float:
        flat = np.full((64, 64, 3), 0.5, np.float32)
        return np.mean(
            [degrade(flat, np.random.default_rng(seed), config).lr.astype(float).std() for seed in range(40)]
        )

    assert noise(camera(plain)) < 0.5 * noise(light(plain))
