"""What is said about results that are too large for the limit or for the memory."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tsdsr_jax.models.vae import VAEConfig, banded_image_bytes
from tsdsr_jax.upscaling.limits import (
    MemoryBudget,
    beyond_memory,
    fitting_scale,
    too_large,
    too_large_on_page,
)
from tsdsr_jax.upscaling.options import UpscaleOptions, complete_options
from tsdsr_jax.upscaling.planning import Settings

SETTINGS = Settings()
TWELVE_MEGAPIXELS = 3000, 4000
GPU = banded_image_bytes(VAEConfig.sd3(), jnp.float16, "gpu")


@pytest.mark.parametrize(
    ("side", "gigabytes"),
    [(2048, 2.97), (4096, 11.03)],  # docs/performance.md, fp16 in bands
)
def test_the_estimate_is_the_plan_and_a_little_more(side, gigabytes):
    assert gigabytes <= GPU * side**2 / 1e9 <= 1.1 * gigabytes


def test_twelve_megapixels():
    """A usual camera's: fourfold it is 16000×12000."""
    plan = SETTINGS.plan(TWELVE_MEGAPIXELS)
    said = too_large("a.jpg", plan, SETTINGS, MemoryBudget(GPU, 80 * 10**9))
    assert said.startswith(
        "a.jpg: 4000×3000 pixels enlarged 4 times make 16000×12000, 192 megapixels, more than --max"
    )
    assert "pass --upscale 2.8 (11200×8400, about 67.4 GB beside the weights)" in said
    assert said.endswith("or --max_pixels 192000000, which needs about 138 GB beside the weights")
    # On a smaller GPU memory is what counts.
    assert "pass --upscale 1.5 (6000×4500" in too_large(
        "a.jpg", plan, SETTINGS, MemoryBudget(GPU, 22 * 10**9)
    )
    page = too_large_on_page("a.jpg", plan, SETTINGS)
    assert page.endswith("more than the 100 megapixels of this page; choose a scale of 2.8 or less")
    assert "--" not in page


@pytest.mark.parametrize("source", [(3000, 4000), (9000, 11000), (6001, 4003), (700, 90_000)])
def test_the_scale_fits_and_the_next_does_not(source):
    scale = fitting_scale(source, SETTINGS)
    at = [dataclasses.replace(SETTINGS, upscale=value) for value in (scale, round(scale + 0.1, 1))]
    assert not at[0].refuses(at[0].plan(source)) and at[1].refuses(at[1].plan(source))


def test_where_no_scale_fits():
    settings = dataclasses.replace(SETTINGS, max_pixels=1000)
    plan = settings.plan((100, 100))
    assert fitting_scale((100, 100), settings) is None
    assert "; make it smaller, or --max_pixels 262144" in too_large("a.jpg", plan, settings)
    assert too_large_on_page("a.jpg", plan, settings).endswith("of this page; make it smaller")


def test_a_thin_strip_is_not_told_to_become_smaller():
    """A line or a banner: making it smaller would only make it thinner."""
    plan = SETTINGS.plan((4, 3000))
    said = too_large("a.png", plan, SETTINGS)
    assert said.startswith(
        "a.png: 3000×4 pixels enlarged 4 times make 12000×16, computed with at least 512 a side as 384000×512"
    )
    assert "; pass a smaller --process_size, or --max_pixels 196608000" in said
    smaller = dataclasses.replace(SETTINGS, process_size=128)
    assert not smaller.refuses(smaller.plan((4, 3000)))


def test_results_within_the_limit_may_be_beyond_the_memory():
    plans = [(f"{side}.jpg", SETTINGS.plan((side, side))) for side in (500, 1500, 2000)]
    budget = MemoryBudget(1000, 20 * 10**9)
    said = beyond_memory(plans, budget)
    assert said.startswith(
        "2 of the results may not fit into memory, such as 2000.jpg: 8000×8000 pixels, about 64 GB"
    )
    assert "20.0 GB are available" in said
    assert beyond_memory(plans[:1], budget) is None and beyond_memory([], budget) is None


def test_the_budget_is_the_models():
    devices = jax.local_devices()
    bundled = MemoryBudget.of(complete_options(UpscaleOptions(), say=lambda line: None), devices)
    sd3 = complete_options(UpscaleOptions(pretrained_model_name_or_path="some/hub-id"), say=lambda line: None)
    assert 4 * bundled.per_pixel < MemoryBudget.of(sd3, devices).per_pixel
    whole = dataclasses.replace(sd3, is_use_tile=False)
    assert MemoryBudget.of(whole, devices).per_pixel > 1.5 * MemoryBudget.of(sd3, devices).per_pixel
    assert bundled.available > 10**8
