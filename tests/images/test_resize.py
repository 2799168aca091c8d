import numpy as np
import pytest

from tsdsr_jax.images.resize import bicubic, reflect_pad


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, np.float32)


def _torch_bicubic(image: np.ndarray, height: int, width: int, type_: type = np.float32) -> np.ndarray:
    torch = pytest.importorskip("torch")
    batch = torch.from_numpy(image.transpose(2, 0, 1)[None].astype(type_))
    resized = torch.nn.functional.interpolate(batch, (height, width), mode="bicubic", align_corners=False)
    return resized[0].numpy().transpose(1, 2, 0)


@pytest.mark.parametrize(
    ("shape", "height", "width"),
    [
        ((128, 128, 3), 512, 512),
        ((128, 130, 3), 512, 520),
        ((100, 77, 3), 512, 395),
        ((49, 301, 3), 511, 123),
        ((60, 50, 3), 17, 31),
        ((40, 60, 1), 160, 240),
        ((7, 9, 4), 30, 20),
        ((1, 1, 3), 8, 8),
        ((1, 5, 3), 4, 20),
        ((1, 6, 1), 3, 1),
        ((2, 2, 3), 1, 1),
        ((2, 3, 3), 9, 12),
        ((3, 2, 1), 13, 7),
        ((3, 1, 3), 512, 170),
        ((5, 6, 3), 5, 6),
        ((2, 3000, 3), 8, 12000),
        ((3000, 1, 1), 12000, 4),
    ],
)
def test_bicubic_equals_torch(shape: tuple[int, ...], height: int, width: int) -> None:
    image = _noise(*shape)
    resized = bicubic(image, height, width)
    assert resized.shape == (height, width, shape[2])
    assert resized.dtype == np.float32
    exact = _torch_bicubic(image, height, width, np.float64)
    np.testing.assert_allclose(resized, exact, rtol=0, atol=1e-6)
    # In float32 torch rounds its source coordinates, up to 2.5e-5 of noise at these sizes.
    np.testing.assert_allclose(resized, _torch_bicubic(image, height, width), rtol=0, atol=3e-5)


@pytest.mark.parametrize(("shape", "width"), [((3, 3000, 3), 7013), ((1, 4001, 1), 3007)])
def test_bicubic_on_long_fractional_sides_is_within_float32_coordinates(
    shape: tuple[int, ...], width: int
) -> None:
    """A source coordinate of 4000 is known to 2.4e-4 in float32, on both sides of the comparison."""
    image = _noise(*shape)
    height = 2 * shape[0]
    np.testing.assert_allclose(
        bicubic(image, height, width), _torch_bicubic(image, height, width), rtol=0, atol=1e-3
    )


def test_bicubic_has_the_sharp_cubic() -> None:
    """The weights of an impulse half a pixel away tell a = -0.75 from Pillow's and JAX's a = -0.5."""
    impulse = np.zeros((1, 8, 1), np.float32)
    impulse[0, 4] = 1
    np.testing.assert_allclose(bicubic(impulse, 1, 4)[0, :, 0], [0, -0.09375, 0.59375, 0], atol=1e-7)


def _mirrored(length: int, size: int) -> list[int]:
    """Indices met when walking to and fro between the ends."""
    walk, position, step = [], 0, 1
    for _ in range(length):
        walk.append(position)
        if size > 1:
            if not 0 <= position + step < size:
                step = -step
            position += step
    return walk


@pytest.mark.parametrize(
    ("size", "padded"),
    [
        ((5, 4), (5, 4)),
        ((5, 4), (8, 7)),
        ((5, 4), (9, 4)),
        ((2, 3), (11, 64)),
        ((1, 4), (6, 5)),
        ((1, 1), (8, 8)),
        ((3, 1), (3, 9)),
    ],
)
def test_reflect_pad_walks_to_and_fro(size: tuple[int, int], padded: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    extended = reflect_pad(image, *padded)
    assert extended.dtype == np.uint8
    expected = image[_mirrored(padded[0], size[0])][:, _mirrored(padded[1], size[1])]
    np.testing.assert_array_equal(extended, expected)


def test_reflect_pad_refuses_to_shrink() -> None:
    with pytest.raises(ValueError, match="fewer"):
        reflect_pad(_noise(4, 4, 3), 8, 3)
