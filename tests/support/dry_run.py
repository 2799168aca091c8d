"""Runs a training script for a GPU that is only described: its programs are compiled, and none is executed.

    python tests/support/dry_run.py train/distill.py FLAGS...   # a line of JSON for each program
    STEP_ONLY=1 python tests/support/dry_run.py train/distill.py FLAGS...   # without validation's programs

XLA compiles for an NVIDIA GPU wherever JAX's CUDA plugin is installed, without CUDA's libraries and without a GPU. The
script is the real one, from its flags to its step, pictures and exported files. Three things are replaced: arrays on the
device are `Planned` ones, which have a shape and no values; weights are not read; and a jitted function that is called with
planned arrays is compiled and gives planned arrays. JAX and the project are told that they are on the described GPU.

Kernels are not tuned, because that needs a GPU to try them on.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import described_gpu  # before JAX
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

ATTENTION = "__cudnn$fmhaSoftmax"

real_jit = jax.jit


@dataclasses.dataclass(frozen=True)
class Planned:
    """An array on the described GPU: everything but its values, which read as zeros."""

    shape: tuple[int, ...]
    dtype: Any
    sharding: Any
    is_fully_addressable = True
    is_fully_replicated = True

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def astype(self, dtype: Any) -> Planned:
        return dataclasses.replace(self, dtype=np.dtype(dtype))

    def copy_to_host_async(self) -> None:
        pass

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.broadcast_to(np.zeros((), dtype or self.dtype), self.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self)[index]

    def abstract(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.sharding)


class DryJit:
    """What `jax.jit` gives here.

    Args:
      function, options: as `jax.jit` takes them.
      whole: the sharding of arrays that come from the host.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any], whole: NamedSharding):
        functools.update_wrapper(self, function)
        self.function, self.whole = function, whole
        self.jitted = real_jit(function, **options)
        self.placed = "out_shardings" in options
        self.planned: dict[Any, Any] = {}  # what comes out, by what went in

    def __getattr__(self, name: str) -> Any:
        return getattr(self.jitted, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        leaves = jax.tree.leaves((arguments, named))
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        if traced or not (self.placed or any(isinstance(leaf, Planned) for leaf in leaves)):
            return self.jitted(*arguments, **named)
        arguments, named = jax.tree.map(self._abstract, (arguments, named))
        key = str((arguments, named))
        if key not in self.planned:
            self.planned[key] = self._compile(arguments, named)
        return self.planned[key]

    def _compile(self, arguments: Any, named: Any) -> Any:
        began = time.perf_counter()
        lowered = self.jitted.lower(*arguments, **named)
        compiled = lowered.compile(compiler_options=described_gpu.OPTIONS)
        report(getattr(self.function, "__name__", "a function"), compiled, time.perf_counter() - began)
        shapes = jax.eval_shape(self.function, *arguments, **named)
        return jax.tree.map(lambda leaf: Planned(leaf.shape, leaf.dtype, self.whole), shapes)

    def _abstract(self, leaf: Any) -> Any:
        if isinstance(leaf, Planned):
            return leaf.abstract()
        if isinstance(leaf, jax.Array | np.ndarray):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.whole)
        return leaf


def report(name: str, compiled: Any, seconds: float) -> None:
    """Prints what is known of a compiled program."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    found = {
        "program": name,
        "seconds": round(seconds, 1),
        "attention": text.count(f'"{ATTENTION}"'),
        "attention backward": text.count(f'"{ATTENTION}Backward"'),
        "arguments GB": round(memory.argument_size_in_bytes / 1e9, 3),
        "temporary GB": round(memory.temp_size_in_bytes / 1e9, 3),
    }
    print(json.dumps(found), flush=True)


def plan_arrays(whole: NamedSharding) -> None:
    """Makes JAX plan arrays and programs instead of making and running them."""

    def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        return functools.partial(jit, **options) if function is None else DryJit(function, options, whole)

    jax.jit = jit
    jax.make_array_from_callback = lambda shape, sharding, callback: Planned(
        tuple(shape), np.asarray(callback((slice(0, 0),) * len(shape) or ...)).dtype, sharding
    )
    jax.make_array_from_process_local_data = lambda sharding, array: Planned(
        array.shape, array.dtype, sharding
    )


def replace_loading_and_running() -> None:
    """Weights become planned ones, and a run one step, the pictures and the files of a checkpoint."""
    from tsdsr_jax.models.params import abstract_params
    from tsdsr_jax.training import networks, session
    from tsdsr_jax.training.checkpoint import to_host
    from tsdsr_jax.training.resume import Start
    from tsdsr_jax.training.sharding import base_shardings

    def load(network: Any, mesh: Mesh, dtype: Any, progress: Any) -> tuple[Any, str]:
        shapes = abstract_params(network.config)
        planned = jax.tree.map(
            lambda leaf, where: Planned(leaf.shape, np.dtype(dtype), where),
            shapes,
            base_shardings(shapes, mesh),
        )
        return planned, "not read"

    def run(options: Any, task: Any, data: Any, mesh: Mesh, start: Any) -> None:
        state = task.step.new_state()
        of_run = session._Run(options, task, data, mesh)
        of_run.start, of_run.bad = Start(), session.BadSamples(len(data.source), 0)
        if not os.environ.get("STEP_ONLY"):
            task.validate(state)
        state, _ = task.step(state, next(of_run.batches()))
        print(json.dumps({"files": sorted(task.files(state)(to_host(state)))}), flush=True)

    networks._load, session.train = load, run


def main(script: str, flags: Sequence[str]) -> None:
    devices = described_gpu.describe()
    described_gpu.pretend(devices)
    plan_arrays(described_gpu.everywhere(devices))
    replace_loading_and_running()
    sys.argv = [script, *flags]
    importlib.import_module(f"tsdsr_jax.commands.{Path(script).stem}").main()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
