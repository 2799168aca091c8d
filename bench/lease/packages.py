"""The packages that the kit needs, and which of them are missing."""

from __future__ import annotations

from importlib.util import find_spec

# Import name -> the package's name for pip.
PACKAGES = {
    name: name
    for name in (
        *(
            "jax",
            "flax",
            "optax",
            "grain",
            "array_record",
            "portpicker",
            "numpy",
            "scipy",
            "safetensors",
            "tqdm",
        ),
        *(
            "tyro",
            "docstring_parser",
            "typeguard",
            "torch",
            "diffusers",
            "importlib_metadata",
            "peft",
            "accelerate",
        ),
    )
} | {"orbax": "orbax-checkpoint", "cv2": "opencv-python-headless", "PIL": "pillow"}


def complaint() -> str:
    """One line that names what is missing; "" if nothing is."""
    missing = [package for name, package in PACKAGES.items() if find_spec(name) is None]
    return (
        f"missing packages: {' '.join(missing)}; bench/lease/README.md says how to bring them"
        if missing
        else ""
    )
