"""What to say about results that are too large: the scale that would do, and the memory that the larger one needs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import jax

from tsdsr_jax.devices import memory_of, select_dtype
from tsdsr_jax.errors import UserError
from tsdsr_jax.images.buckets import Size
from tsdsr_jax.models.vae import VAEConfig, banded_image_bytes, whole_image_bytes
from tsdsr_jax.upscaling.options import UpscaleOptions, filled_in
from tsdsr_jax.upscaling.planning import Settings, SizePlan
from tsdsr_jax.weights.sd3_folder import NetworkFiles


@dataclasses.dataclass(frozen=True)
class MemoryBudget:
    """The memory of a device, and what a picture takes of it beside the weights.

    Attributes:
      per_pixel: bytes per pixel of a result, in bands unless these are turned off.
      available: bytes.
    """

    per_pixel: float
    available: int

    @classmethod
    def of(cls, options: UpscaleOptions, devices: Sequence[jax.Device]) -> MemoryBudget:
        """The budget of a model that need not be loaded yet."""
        estimate = whole_image_bytes if options.is_use_tile is False else banded_image_bytes
        dtype = select_dtype(options.mixed_precision, list(devices))
        per_pixel = estimate(_autoencoder(options), dtype, devices[0].platform)
        return cls(per_pixel, memory_of(devices[0]))

    def needed(self, size: Size) -> float:
        """Bytes for a result of this size."""
        return self.per_pixel * size[0] * size[1]

    def holds(self, size: Size) -> bool:
        return self.needed(size) <= self.available


def _autoencoder(options: UpscaleOptions) -> VAEConfig:
    """The config of a local model; SD3's for a hub id, or where loading will report what is wrong."""
    model = Path(os.path.expanduser(filled_in(options.pretrained_model_name_or_path)))
    try:
        config = NetworkFiles(model / "vae", "vae").config
    except UserError:
        return VAEConfig.sd3()
    assert isinstance(config, VAEConfig)
    return config


def fitting_scale(source: Size, settings: Settings, budget: MemoryBudget | None = None) -> float | None:
    """The largest scale, in steps of 0.1, whose result is within the limit and the budget; None if there is none."""
    for tenths in range(int(settings.upscale * 10), 9, -1):
        plan = dataclasses.replace(settings, upscale=tenths / 10).plan(source)
        if not settings.refuses(plan) and (budget is None or budget.holds(plan.padded)):
            return tenths / 10
    return None


def too_large(name: str, plan: SizePlan, settings: Settings, budget: MemoryBudget | None = None) -> str:
    """Says why a result is refused, and which flags would do."""
    scale, pixels = fitting_scale(plan.source, settings, budget), plan.padded[0] * plan.padded[1]
    message = f"{_sizes(name, plan, settings)}, more than --max_pixels {settings.max_pixels}"
    if scale is not None:
        smaller = dataclasses.replace(settings, upscale=scale).plan(plan.source)
        message += f"; pass --upscale {scale:g} ({_in_words(smaller.output)}{_memory(smaller, budget, ', ')})"
    elif _is_thin(plan, settings):
        message += "; pass a smaller --process_size"
    else:
        message += "; make it smaller"
    return f"{message}, or --max_pixels {pixels}{_memory(plan, budget, ', which needs ')}"


def too_large_on_page(
    name: str, plan: SizePlan, settings: Settings, budget: MemoryBudget | None = None
) -> str:
    """The same for a visitor of the page, who can choose only the scale."""
    scale = fitting_scale(plan.source, settings, budget)
    what = "make it smaller" if scale is None else f"choose a scale of {scale:g} or less"
    return f"{_sizes(name, plan, settings)}, more than the {settings.max_pixels / 1e6:g} megapixels of this page; {what}"


def beyond_memory(plans: Sequence[tuple[str, SizePlan]], budget: MemoryBudget) -> str | None:
    """A remark about results that may not fit into memory although they are within the limit."""
    large = [(name, plan) for name, plan in plans if not budget.holds(plan.padded)]
    if not large:
        return None
    name, largest = max(large, key=lambda item: item[1].padded[0] * item[1].padded[1])
    return (
        f"{len(large)} of the results may not fit into memory, such as {name}: {_in_words(largest.output)} pixels"
        f"{_memory(largest, budget, ', ')}; {budget.available / 1e9:.1f} GB are available. A smaller --upscale needs less"
    )


def _sizes(name: str, plan: SizePlan, settings: Settings) -> str:
    megapixels = plan.padded[0] * plan.padded[1] / 1e6
    make = "make"
    if plan.resized != plan.output:
        make = f"make {_in_words(plan.output)}, computed with at least {settings.process_size} a side as"
    return (
        f"{name}: {_in_words(plan.source)} pixels enlarged {settings.upscale:g} times {make} {_in_words(plan.padded)}, "
        f"{megapixels:.3g} megapixels"
    )


def _is_thin(plan: SizePlan, settings: Settings) -> bool:
    """Whether a result has too many pixels only because its short side is enlarged to `process_size`."""
    return plan.resized != plan.output and plan.output[0] * plan.output[1] <= settings.max_pixels


def _memory(plan: SizePlan, budget: MemoryBudget | None, before: str) -> str:
    return (
        ""
        if budget is None
        else f"{before}about {budget.needed(plan.padded) / 1e9:.3g} GB beside the weights"
    )


def _in_words(size: Size) -> str:
    return f"{size[1]}×{size[0]}"
