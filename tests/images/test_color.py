import numpy as np
import pytest

from tsdsr_jax.images.color import BLUR_DILATIONS, METHODS, adain, align, wavelet


def _noise(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((*size, 3), np.float32)


def _bytes(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def _torch_blur(image: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    row = torch.tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(row, row).expand(3, 1, 3, 3)
    batch = torch.from_numpy(image.transpose(2, 0, 1)[None].copy())
    for dilation in (1, 2, 4, 8, 16):
        padded = functional.pad(batch, (dilation,) * 4, mode="replicate")
        batch = functional.conv2d(padded, kernel, groups=3, dilation=dilation)
    return batch[0].numpy().transpose(1, 2, 0)


@pytest.mark.parametrize("size", [(70, 90), (33, 31), (16, 17), (5, 200), (2, 3), (1, 7), (1, 1)])
def test_wavelet_equals_two_separate_blurs_in_torch(size: tuple[int, int]) -> None:
    result, upscaled = _noise(*size), _noise(*size, seed=1)
    expected = result - _torch_blur(result) + _torch_blur(upscaled)
    np.testing.assert_allclose(wavelet(result, upscaled), expected, rtol=0, atol=1e-6)


def test_wavelet_of_a_step_is_as_wide_as_the_cascade() -> None:
    """Far from a bright stripe the source is untouched; within reach it is not."""
    result, upscaled = np.zeros((1, 200, 3), np.float32), np.zeros((1, 200, 3), np.float32)
    upscaled[:, :100] = 1
    fixed = wavelet(result, upscaled)[0, :, 0]
    reach = sum(BLUR_DILATIONS)
    assert fixed[99 + reach] > 0 == fixed[100 + reach]
    np.testing.assert_allclose(fixed[:68], 1, atol=1e-6)


def test_wavelet_of_a_constant_shift_is_the_shift_undone() -> None:
    upscaled = _noise(20, 30)
    np.testing.assert_allclose(wavelet(upscaled * 0.5 + 0.2, upscaled * 0.5), upscaled * 0.5, atol=1e-6)


def test_wavelet_refuses_two_sizes() -> None:
    with pytest.raises(ValueError, match="one size"):
        wavelet(_noise(8, 8), _noise(8, 4))


def _torch_adain(result: np.ndarray, reference: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch")

    def statistics(image: np.ndarray) -> tuple:
        channels = torch.from_numpy(image).reshape(-1, 3)
        return channels.mean(0), (channels.var(0) + 1e-5).sqrt()

    mean, deviation = statistics(result)
    wanted_mean, wanted_deviation = statistics(reference)
    return ((torch.from_numpy(result) - mean) / deviation * wanted_deviation + wanted_mean).numpy()


@pytest.mark.parametrize("size", [(64, 48), (3, 2), (1, 2)])
def test_adain_equals_torch(size: tuple[int, int]) -> None:
    result = _noise(*size) * np.float32([1, 0.5, 0.1])
    reference = _noise(16, 12, seed=1) * np.float32(0.5) + np.float32([0.1, 0.2, 0.3])
    expected = _torch_adain(result, reference)
    np.testing.assert_allclose(adain(result, reference), expected, rtol=0, atol=1e-5)


def test_adain_on_flat_images_and_single_pixels_is_finite() -> None:
    flat = np.full((4, 4, 3), 0.25, np.float32)
    np.testing.assert_allclose(adain(flat, flat * 2), 0.5, atol=1e-6)
    single = np.full((1, 1, 3), 0.25, np.float32)
    np.testing.assert_allclose(adain(single, single * 3), 0.75, atol=1e-6)


def test_nofix_hands_the_result_back() -> None:
    result = _bytes(8, 8)
    np.testing.assert_array_equal(align("nofix", result, _bytes(2, 2), _bytes(8, 8, seed=1)), result)


def test_each_method_reads_its_own_source() -> None:
    result, lr, upscaled = _bytes(32, 32), _bytes(8, 8, seed=1), _bytes(32, 32, seed=2)
    other = np.zeros_like
    fixed = align("wavelet", result, lr, upscaled)
    np.testing.assert_array_equal(fixed, align("wavelet", result, other(lr), upscaled))
    assert (fixed != align("wavelet", result, lr, other(upscaled))).any()
    fixed = align("adain", result, lr, upscaled)
    np.testing.assert_array_equal(fixed, align("adain", result, lr, other(upscaled)))
    assert (fixed != align("adain", result, other(lr), upscaled)).any()


@pytest.mark.parametrize("method", ["wavelet", "adain"])
def test_align_clamps_and_truncates_as_torch_does(method: str) -> None:
    torch = pytest.importorskip("torch")
    result, lr, upscaled = _bytes(40, 40), _bytes(10, 10, seed=1), _bytes(40, 40, seed=2)
    # Black and white halves push the wavelet correction out of range on both sides.
    upscaled[:, :20], upscaled[:, 20:] = 0, 255
    unit = [image.astype(np.float32) / np.float32(255) for image in (result, lr, upscaled)]
    fixed = torch.from_numpy(wavelet(unit[0], unit[2]) if method == "wavelet" else adain(unit[0], unit[1]))
    expected = fixed.clamp(0, 1).mul(255).byte().numpy()
    assert method == "adain" or (fixed.min() < 0 and fixed.max() > 1)
    np.testing.assert_array_equal(align(method, result, lr, upscaled), expected)


def test_align_truncates_and_does_not_round() -> None:
    """Gray 0 corrected towards a mean of 2/3 of a level stays 0."""
    result, upscaled = np.zeros((1, 3, 3), np.uint8), np.ones((1, 3, 3), np.uint8)
    lr = np.uint8([[[1] * 3, [1] * 3, [0] * 3]])
    assert align("adain", result, lr, upscaled).max() == 0
    assert align("wavelet", result, lr, upscaled).min() == 1


def test_an_image_that_is_its_own_source_survives_the_wavelet_fix() -> None:
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, -1)
    np.testing.assert_array_equal(align("wavelet", image, image[::4, ::4], image), image)


def test_unknown_methods_are_refused() -> None:
    assert METHODS == ("wavelet", "adain", "nofix")
    with pytest.raises(ValueError, match="histogram"):
        align("histogram", _bytes(4, 4), _bytes(1, 1), _bytes(4, 4))
