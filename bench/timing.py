"""Shared by the benchmarks: timing several sides in turn, and describing the machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from tsdsr_jax.errors import UserError


def in_turn(
    functions: Mapping[str, Callable[[], Any]], seconds: float, least: int = 3
) -> dict[str, list[float]]:
    """Times functions that return when their work is done. Each is first called once without timing.

    They take turns, so that other load on the machine affects all of them, until each has run at least `least` times and for
    `seconds`.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    while any(len(found) < least or sum(found) < seconds for found in times.values()):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def check_device(name: str) -> None:
    """Refuses to measure on a CPU when a GPU was asked for."""
    if name == "cuda" and jax.default_backend() != "gpu":
        raise UserError("--device cuda: JAX sees no GPU; --device cpu runs the small sizes")


def median(times: list[float]) -> float:
    return statistics.median(times)


def versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
    for package in ("jax", "flax", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
