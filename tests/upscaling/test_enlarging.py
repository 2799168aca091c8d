"""Enlarging on the device against the host's bicubic interpolation and padding."""

from functools import partial

import jax
import numpy as np
import pytest

from tsdsr_jax.images.resize import bicubic, reflect_pad
from tsdsr_jax.upscaling.enlarging import enlarge, plan_enlargement, source_shape
from tsdsr_jax.upscaling.planning import Settings, SizePlan


def noise_photo(size: tuple[int, int]) -> np.ndarray:
    """The hardest photograph: differences that are as large as they can be, and overshooting everywhere."""
    return np.random.default_rng(0).integers(0, 2, (*size, 3)).astype(np.uint8) * 255


def on_the_host(photo: np.ndarray, plan: SizePlan) -> np.ndarray:
    image = bicubic(photo.astype(np.float32) / 255, *plan.resized) * 2 - 1
    return reflect_pad(np.clip(image, -1, 1), *plan.padded)


@pytest.fixture(scope="module")
def program():
    return jax.jit(enlarge)


@pytest.mark.parametrize(
    ("upscale", "sizes"),
    [
        (4, [(128, 128), (121, 100), (3, 120)]),
        (1.7, [(301, 411), (300, 410), (41, 60)]),  # fractional, and below the smallest size
        (1, [(500, 512), (64, 509)]),
        (4, [(160, 128), (131, 97)]),  # portraits
        (2, [(1, 9), (1, 1)]),
        (3.7, [(12, 2500)]),
    ],
)
def test_the_device_enlarges_as_the_host_does(program, upscale, sizes):
    plans = [Settings(upscale, process_size=64, latent_tile=16).plan(size) for size in sizes]
    # Some rows and columns are beyond every photograph.
    bucket = tuple(max(plan.lying[axis] for plan in plans) + 8 for axis in range(2))
    photos = np.full((len(plans), *source_shape(bucket, upscale), 3), 99, np.uint8)
    expected = np.zeros((len(plans), *bucket, 3), np.float32)
    for photo, image, plan in zip(photos, expected, plans, strict=True):
        drawn = noise_photo(plan.source)
        lay = partial(np.swapaxes, axis1=0, axis2=1) if plan.portrait else np.asarray
        laid = lay(drawn)
        photo[: laid.shape[0], : laid.shape[1]] = laid
        image[: plan.lying[0], : plan.lying[1]] = lay(on_the_host(drawn, plan))
    images = program(photos, plan_enlargement(plans, bucket))
    assert images.dtype == np.float32 and images.shape == expected.shape
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-5)


def test_a_shape_for_all_photographs_of_a_bucket():
    for upscale in (1, 1.1, 1.5, 1.7, 2, 3.3, 4):
        settings = Settings(upscale, process_size=64, latent_tile=16)
        for side in range(1, 400):
            plan = settings.plan((side, side))
            shape = source_shape(plan.lying, upscale)
            assert side <= shape[0] <= plan.padded[0]


def test_sizes_are_no_programs(program):
    settings = Settings(2, process_size=64, latent_tile=8)
    before = program._cache_size()
    for size in ((32, 32), (30, 50), (50, 30), (7, 9)):
        plans = [settings.plan(size)]
        program(np.zeros((1, 40, 60, 3), np.uint8), plan_enlargement(plans, (80, 120)))
    assert program._cache_size() == before + 1
