"""Compiles the programs of the first batch while the parameters are being loaded.

`Engine.launch` runs as it will for the batch, but each program that it calls is only compiled, in a thread, and answers with
the shapes of its results. JAX finds the compiled program when it is called in earnest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from threading import Event
from typing import Any

import jax
import numpy as np

from tsdsr_jax.upscaling.engine import Engine, Prepared
from tsdsr_jax.upscaling.jobs import Job
from tsdsr_jax.upscaling.planning import Group, Settings

THREADS = 4


@dataclasses.dataclass(frozen=True)
class _Planned:
    """Stands for an array that a program will compute."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Any

    def copy_to_host_async(self) -> None:
        pass


def compile_ahead(engine: Engine, stop: Event, groups: Sequence[Group[Job]], settings: Settings) -> None:
    """Compiles the programs of the first group's first batch; `engine.networks` need have only shapes.

    The batch must be the one that `batch_run.upscale_groups` will launch. For another, programs would be compiled again.
    Once `stop` is set, no further program is compiled.
    """
    group = groups[0]
    batch = engine.largest_batch(group.bucket, settings) if group.several else len(engine.devices)
    photos = [
        Prepared(
            plan,
            np.zeros((*plan.source, 3), np.uint8),
            np.zeros((*plan.latent, engine.latent_channels), np.float32),
        )
        for _, plan in group.jobs[:batch]
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        rehearsal = _rehearsal(engine, stop, pool)
        rehearsal.launch(photos, group.bucket, settings, masked=group.masked, batch=batch)


def _rehearsal(engine: Engine, stop: Event, pool: ThreadPoolExecutor) -> Engine:
    """An engine whose programs are only compiled, as `engine`'s."""
    rehearsal = dataclasses.replace(engine)
    for name, attribute in vars(Engine).items():
        if isinstance(attribute, cached_property):
            program = getattr(engine, name)
            if hasattr(program, "lower"):
                rehearsal.__dict__[name] = _only_compiled(program, stop, pool)
    return rehearsal


def _only_compiled(program: Any, stop: Event, pool: ThreadPoolExecutor) -> Callable[..., Any]:
    answers: dict[Any, Any] = {}

    def call(*arguments: Any) -> Any:
        shapes = jax.tree.map(_shape, arguments)
        key = tuple(jax.tree.leaves(shapes)), jax.tree.structure(shapes)
        if key not in answers:
            lowered = program.lower(*shapes)
            pool.submit(lambda: None if stop.is_set() else lowered.compile())
            answers[key] = jax.tree.map(
                lambda leaf: _Planned(leaf.shape, leaf.dtype, leaf.sharding), lowered.out_info
            )
        return answers[key]

    return call


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape of an argument, and where it is if it has a place."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
