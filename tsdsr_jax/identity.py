"""Compares the settings of two runs, and lists the versions that results depend on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# Counts the ways in which steps of training were rounded. Raise it with every change after which a resumed run no longer
# continues bit for bit. 2: queries of image and text come in two calls of attention. 3: gradients of the transformer's
# adapters are float32 in 16-bit training, too. 4: also where each layer has arrays of its own, as on GPUs.
TRAINING_ARITHMETIC = 4


def mismatches(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describes each difference between the two mappings in words."""
    return [
        f"{name}: {in_short(saved.get(name))} before, {in_short(now.get(name))} now"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]


def in_short(value: Any) -> str:
    """A setting's value in a message; hashes and long texts are shortened."""
    text = str(value)
    if len(text) == 64:  # a hash
        return f"{text[:12]}…"
    return text if len(text) < 100 else f"{text[:40]}…{text[-40:]}"


def versions() -> dict[str, str]:
    """Versions of Python, of training's arithmetic, of this library and its dependencies.

    This library has no version unless it is installed.
    """
    found = {"python": platform.python_version(), "training arithmetic": str(TRAINING_ARITHMETIC)}
    for package in ("tsdsr_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
