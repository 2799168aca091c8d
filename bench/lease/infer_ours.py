"""Measures our upscaling: encode, transformer, decode, and photographs end to end, host to host."""

import argparse
import gzip
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import timing
from inference_parts import Part, Parts
from worker import FULL, MODEL, PROMPT, SECONDS, SIDE, Worker

from tsdsr_jax import devices
from tsdsr_jax.upscaling.engine import Engine
from tsdsr_jax.upscaling.loading import load_engine
from tsdsr_jax.upscaling.options import UpscaleOptions, complete_options

PARTS: tuple[Part, ...] = ("encode", "transformer", "decode", "end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", choices=("full", "fp8", "int8"), default="full")
    parser.add_argument("--batches", default="8,1")
    options = parser.parse_args()
    batches = [int(batch) for batch in options.batches.split(",")]

    worker = Worker()
    on_gpu = jax.default_backend() == "gpu"
    worker.wait_for_model()
    start = time.perf_counter()
    engine = load(options.weights, "fp16" if on_gpu else "fp32")
    worker.report(load_seconds=time.perf_counter() - start, weights_gb=engine.networks.nbytes / 1e9)

    # Autoencoders do not depend on the transformer's weights.
    names = PARTS if options.weights == "full" else ("transformer", "end")
    parts = Parts(engine, SIDE, at_a_time=max(batches))
    # Alone, because XLA chooses kernels by timing them.
    with worker.turn("compile") if options.weights != "int8" else nullcontext():
        start = time.perf_counter()
        compile_all(parts, names, batches)
        worker.report(compile_seconds=time.perf_counter() - start)
    worker.report(tflop_per_image={part: parts.flop(part) / 1e12 for part in names})
    for batch in batches:
        for part in names:
            worker.keep(part, batch, parts.as_array(part, parts.ours(part, batch).run()))
        with worker.turn(f"batch {batch}"):
            for part in names:
                measure(worker, parts, part, batch)
            measure_stream(worker, parts, batch)
    if options.weights == "full":
        with worker.turn("peaks"):
            measure_peaks(worker, engine.dtype)
    worker.report(memory_gb=peak_memory())
    if os.environ.get("TRACE") and options.weights == "full":
        for part in PARTS[:3]:
            with worker.turn(f"trace {part}"):
                trace(parts.ours(part, batches[0]).run, part)


def load(weights: str, precision: str) -> Engine:
    options = UpscaleOptions(
        pretrained_model_name_or_path=str(MODEL),
        lora_dir="none",
        embedding_dir=PROMPT,
        mixed_precision=precision,
        weights=weights,
        is_use_tile=False,
    )
    engine = load_engine(complete_options(options), jax.local_devices()[:1])
    jax.block_until_ready((engine.networks.transformer, engine.networks.vae))
    return engine


def compile_all(parts: Parts, names: Sequence[Part], batches: Sequence[int]) -> None:
    """Compiles side by side; first the single programs, which the whole then finds."""
    single = [parts.ours(name, batch).run for batch in batches for name in names if name != "end"]
    whole = [parts.ours("end", batch).run for batch in batches]
    streams = [parts.stream(batch, count=1) for batch in batches]
    with ThreadPoolExecutor() as pool:
        for runs in (single, whole, streams):
            list(pool.map(lambda run: run(), runs))


def measure(worker: Worker, parts: Parts, part: Part, batch: int) -> None:
    found = timing.rate(parts.ours(part, batch).launch, jax.block_until_ready, SECONDS)
    worker.report(part=part, batch=batch, **timing.per_image(found, batch))


def measure_stream(worker: Worker, parts: Parts, batch: int) -> None:
    """Batches one after the other as infer/upscale.py computes them: the next is launched before one is fetched."""
    found = timing.rate(parts.stream(batch, count=4), lambda pictures: pictures, SECONDS)
    worker.report(part="stream", batch=batch, **timing.per_image(found, 4 * batch))


def measure_peaks(worker: Worker, dtype: jnp.dtype) -> None:
    """What this card reaches: a large matrix product in our precision, and a copy within its memory."""
    side = 8192 if FULL else 512
    square, multiply = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype), jax.jit(jnp.matmul)
    with devices.matmul_precision(dtype):
        product = timing.rate(lambda: multiply(square, square), jax.block_until_ready, SECONDS)
    large, increment = jnp.ones((2**29 if FULL else 2**20,), jnp.uint16), jax.jit(lambda x: x + 1)
    copy = timing.rate(lambda: increment(large), jax.block_until_ready, SECONDS)
    worker.report(
        matmul_tflops=2 * side**3 / product.seconds / 1e12, copy_gb_s=2 * large.nbytes / copy.seconds / 1e9
    )


def peak_memory() -> float | None:
    """GB; None where the device does not tell."""
    told = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return told / 1e9 if told else None


def trace(run: Callable[[], object], name: str) -> None:
    """Writes OUT/NAME.xplane.pb.gz, for XProf."""
    out = Path(os.environ["OUT"])
    folder = out / "trace"
    with jax.profiler.trace(str(folder)):
        for _ in range(3):
            run()
    for file in folder.rglob("*.xplane.pb"):
        with file.open("rb") as source, gzip.open(out / f"{name}.xplane.pb.gz", "wb") as target:
            shutil.copyfileobj(source, target)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
