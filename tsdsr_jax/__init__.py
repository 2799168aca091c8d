"""TSD-SR in JAX: one-step super-resolution of photographs on Stable Diffusion 3.

    from tsdsr_jax import Upscaler

    upscale = Upscaler.from_pretrained()
    large = upscale(photograph)

The names in `__all__` are imported when first used, so `import tsdsr_jax` is fast and does not import jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tsdsr_jax.models.lora import merge
    from tsdsr_jax.models.mmdit import MMDiT
    from tsdsr_jax.models.vae import AutoencoderKL
    from tsdsr_jax.upscaling.upscaler import Upscaler
    from tsdsr_jax.weights.lora_files import load_lora
    from tsdsr_jax.weights.sd3_folder import open_checkpoint

__version__ = "0.1.0"
__all__ = ["AutoencoderKL", "MMDiT", "Upscaler", "load_lora", "merge", "open_checkpoint"]

_MODULES = {
    "AutoencoderKL": "models.vae",
    "MMDiT": "models.mmdit",
    "Upscaler": "upscaling.upscaler",
    "load_lora": "weights.lora_files",
    "merge": "models.lora",
    "open_checkpoint": "weights.sd3_folder",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'tsdsr_jax' has no attribute {name!r}")
    value = getattr(import_module(f"tsdsr_jax.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
