"""Shared by the benchmarks: timing several sides in turn, and describing the machine. Does not start jax by itself."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

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


class Rate(NamedTuple):
    """Seconds per call: the median of three loops, the fastest and the slowest of them; and calls per loop."""

    seconds: float
    fastest: float
    slowest: float
    calls: int


def rate(launch: Callable[[], Any], wait: Callable[[Any], Any], seconds: float) -> Rate:
    """Times calls whose results are awaited only at the end of a loop, as a device's queue works.

    Args:
      launch: starts the work; first called twice without timing.
      wait: waits for a result of `launch` and all earlier ones.
      seconds: about how long the three loops take together; each has at least three calls.
    """
    wait(launch())
    calls = max(3, int(seconds / 3 / _seconds_of(launch, wait, 1)))
    found = sorted(_seconds_of(launch, wait, calls) for _ in range(3))
    return Rate(found[1], found[0], found[2], calls)


def per_image(found: Rate, images: int) -> dict[str, float]:
    """Milliseconds per image, for a call that computes this many."""
    ms = 1e3 / images
    return {
        "ms": found.seconds * ms,
        "fastest": found.fastest * ms,
        "slowest": found.slowest * ms,
        "calls": found.calls,
    }


def summary(times: list[float], images: int) -> dict[str, float]:
    """The same from the times of single calls."""
    return per_image(Rate(statistics.median(times), min(times), max(times), len(times)), images)


def _seconds_of(launch: Callable[[], Any], wait: Callable[[Any], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = launch()
    wait(result)
    return (time.perf_counter() - start) / calls


def check_device(name: str) -> None:
    """Refuses to measure on a CPU when a GPU was asked for."""
    import jax

    if name == "cuda" and jax.default_backend() != "gpu":
        raise UserError("--device cuda: JAX sees no GPU; --device cpu runs the small sizes")


def median(times: list[float]) -> float:
    return statistics.median(times)


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, jax, flax and these packages, and the kind of device that JAX uses."""
    import jax

    return {"device": jax.devices()[0].device_kind} | installed("jax", "flax", *packages)


def installed(*packages: str) -> dict[str, str]:
    """Versions of Python and of packages, which need not be importable."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
