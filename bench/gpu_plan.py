"""Prints what SD3-medium's programs do on a GPU, and how long that takes at least, without a GPU.

python bench/gpu_plan.py                                  # upscaling: encoder, transformer, decoder for eight images
python bench/gpu_plan.py --batch 1 --weights fp8 --card A100
python bench/gpu_plan.py --programs step --batch 2        # a training step; some minutes
python bench/gpu_plan.py --programs step --fsdp 8         # on eight GPUs that share one base
python bench/gpu_plan.py --programs step --devices 8      # on eight that have one each, what they send, and on up to 64
python bench/gpu_plan.py --programs student_gradient --layers 3   # the transformer's part of it alone
python bench/gpu_plan.py --programs transformer --by kind # where the time goes

XLA compiles for the description of an H200 (`make cuda-compiler` installs what it needs). Each kernel then takes the longer
of its arithmetic and its memory traffic at what the card reaches: see kernels.py. Times are modelled, not measured.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import described_gpu  # before JAX
import inference_programs
import jax
import kernels
import training_program
from hlo import Program
from inference_programs import InferenceOptions
from kernels import Card, Collective, Kernel
from training_program import StepOptions

from tsdsr_jax import cli

Name = Literal["encode", "transformer", "decode", "step", "student_gradient", "auxiliary_gradient"]
INFERENCE: tuple[Name, ...] = ("encode", "transformer", "decode")
COUNTS = (1, 8, 16, 32, 64)
HEAD = f"{'':12} {'kernels':>8} {'TFLOP/im':>9} {'GB/im':>8} {'ms/im':>8} {'at peak':>8} {'arguments':>10} {'temporary':>10}"


@dataclasses.dataclass(frozen=True)
class Options:
    programs: tuple[Name, ...] = INFERENCE
    """Programs to compile."""
    card: Literal["H200", "H100", "A100", "L40S", "RTX4090"] = "H200"
    """The card whose arithmetic and bandwidth count; programs are compiled for an H200 in any case."""
    batch: int | None = None
    """Images per device (default: 8; of a training step 2)."""
    size: int = 512
    """Side of the results, or of the training images."""
    precision: Literal["fp16", "bf16", "fp32"] | None = None
    """Precision of computation (default: fp16; of a training step bf16)."""
    weights: Literal["full", "int8", "fp8"] = "full"
    """The transformer's weights when upscaling."""
    bands: bool = False
    """Let the autoencoder compute in bands."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass."""
    use_dasm: bool = True
    """Use four points of a trajectory in a training step instead of one."""
    lambda_lpips: float = 1.0
    """Weight of LPIPS; 0 omits LPIPS and the decoder."""
    split_guidance: bool = False
    """Evaluate the empty and the real prompt one after the other."""
    merge_teacher_lora: bool = False
    """Merge the teacher's LoRA into a second copy of the transformer."""
    rank: int = 64
    """Rank of all LoRAs."""
    layers: int = 24
    """Layers of the transformer in a training step."""
    scan_layers: bool | None = None
    """Run the transformer's layers as a loop in a training step. Default: as training does, only with --fsdp."""
    devices: int | None = None
    """Described GPUs that train together, each with `batch` images. Default: as many as share one base."""
    fsdp: int = 1
    """Described GPUs that share one base in a training step."""
    by: Literal["kind", "source", "kernel"] | None = None
    """Also print where the time goes: by kind of kernel, by layer of the network, or kernel by kernel."""
    top: int = 30
    """Rows of that."""
    hlo: Path | None = None
    """Folder for the programs' texts."""
    json: Path | None = None
    """JSON file for the results."""


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    devices = described_gpu.describe(options.devices or options.fsdp)
    described_gpu.pretend(devices)
    card = kernels.CARDS[options.card]
    print(f"modelled for one {card.name}, jax {jax.__version__}\n{HEAD}   memory in GB", flush=True)
    rows = []
    for name in options.programs:
        began = time.perf_counter()
        compiled = lowered(name, options, devices).compile(compiler_options=described_gpu.OPTIONS)
        text = compiled.as_text()
        if options.hlo:
            options.hlo.mkdir(parents=True, exist_ok=True)
            (options.hlo / f"{name}.hlo").write_text(text)
        found = kernels.kernels(Program(text))
        images = options.batch or (8 if name in INFERENCE else 2)
        row: dict[str, Any] = {"program": name} | facts(found, card, images) | memory(compiled)
        rows.append(row | {"compile_s": round(time.perf_counter() - began, 1)})
        print(line(name, row), flush=True)
        if len(devices) > 1:
            sending = kernels.collectives(Program(text))
            row["sent"] = sent(sending, len(devices))
            if options.fsdp == 1:
                row["scaling"] = scaling(sending, row["ms"] * images)
        if options.by:
            print_shares(found, card, images, options)
    if len(rows) > 1:
        print(f"{'together':12} {'':8} {'':9} {'':8} {sum(row['ms'] for row in rows):8.2f}")
    if options.json:
        options.json.write_text(
            json.dumps({"card": card.name, "jax": jax.__version__, "rows": rows}, indent=2)
        )


def lowered(name: Name, options: Options, devices: list[jax.Device]) -> jax.stages.Lowered:
    """Traces a program for described devices."""
    whole = described_gpu.everywhere(devices, options.fsdp)
    if name == "step":
        return training_program.lower(step_options(options), whole.mesh)
    if name == "student_gradient" or name == "auxiliary_gradient":
        adapter = "student" if name == "student_gradient" else "auxiliary"
        return training_program.lower_gradient(step_options(options), adapter, whole.mesh)
    inference = InferenceOptions(
        batch=options.batch or 8,
        size=options.size,
        precision=options.precision or "fp16",
        weights=None if options.weights == "full" else options.weights,
        bands=options.bands,
    )
    engine = inference_programs.planned_engine(inference, devices[0], whole)
    return inference_programs.lower(name, inference, engine)


def step_options(options: Options) -> StepOptions:
    precision = options.precision or "bf16"
    return StepOptions(
        batch=options.batch or 2,
        size=options.size,
        rank=options.rank,
        precision="no" if precision == "fp32" else precision,
        checkpointing=options.gradient_checkpointing,
        points=4 if options.use_dasm else 1,
        split_guidance=options.split_guidance,
        lpips=options.lambda_lpips > 0,
        teacher="merged" if options.merge_teacher_lora else "beside",
        layers=options.layers,
        scanned=options.fsdp > 1 if options.scan_layers is None else options.scan_layers,
    )


def facts(found: list[Kernel], card: Card, images: int) -> dict[str, Any]:
    """What a program does, by image where that makes sense."""

    def total(of: Any, chosen: Any = lambda kernel: True) -> float:
        return sum(kernel.times * of(kernel) for kernel in found if chosen(kernel))

    return {
        "kernels": int(total(lambda kernel: 1)),
        "tflop": total(lambda kernel: kernel.flop) / images / 1e12,
        "gb": total(lambda kernel: kernel.nbytes) / images / 1e9,
        "ms": total(card.seconds) / images * 1e3,
        "ms_at_peak": total(card.arithmetic_seconds) / images * 1e3,
        "attention": int(total(lambda kernel: kernel.kind == kernels.ATTENTION)),
        "attention_backward": int(total(lambda kernel: kernel.kind == kernels.ATTENTION_BACKWARD)),
        "float32_tflop": total(lambda kernel: kernel.flop, lambda kernel: kernel.dtype.startswith("f32"))
        / 1e12,
        "eight_bit_tflop": total(
            lambda kernel: kernel.flop, lambda kernel: kernel.dtype.startswith(("f8", "s8"))
        )
        / 1e12,
        "weight_copies_gb": total(lambda kernel: kernel.nbytes, kernels.copies_weights) / 1e9,
    }


def memory(compiled: jax.stages.Compiled) -> dict[str, float]:
    """XLA's plan in gigabytes."""
    plan = compiled.memory_analysis()
    return {"arguments_gb": plan.argument_size_in_bytes / 1e9, "temporary_gb": plan.temp_size_in_bytes / 1e9}


def line(name: str, row: dict[str, Any]) -> str:
    return (
        f"{name:12} {row['kernels']:8} {row['tflop']:9.3f} {row['gb']:8.2f} {row['ms']:8.2f} {row['ms_at_peak']:8.2f}"
        f" {row['arguments_gb']:10.2f} {row['temporary_gb']:10.2f}"
    )


def sent(found: Sequence[Collective], devices: int) -> dict[str, float]:
    """Prints and returns what each device sends: kind and dtype -> bytes of a step."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0])
    for each in found:
        total = totals[f"{each.code} {each.dtype}"]
        totals[f"{each.code} {each.dtype}"] = [total[0] + each.times, total[1] + each.sent(devices)]
    for name, (count, nbytes) in totals.items():
        print(f"{'':12} each device sends {nbytes / 1e9:.3f} GB in {int(count)} × {name}")
    return {name: nbytes for name, (_, nbytes) in totals.items()}


def scaling(found: Sequence[Collective], step_ms: float) -> dict[str, list[float]]:
    """Prints and returns the modelled efficiency of 1 to 64 GPUs: the time of a step on one, over the time on all.

    Nothing is computed while gradients are added up.
    """
    nbytes = sum(each.times * each.nbytes for each in found if each.code == "all-reduce")
    efficiency = {
        name: [step_ms / (step_ms + 1e3 * links.all_reduce_seconds(nbytes, count)) for count in COUNTS]
        for name, links in kernels.LINKS.items()
    }
    print(f"{'':12} {'GPUs':20} " + " ".join(f"{count:6}" for count in COUNTS))
    for name, values in efficiency.items():
        print(f"{'':12} {name:20} " + " ".join(f"{value:6.1%}" for value in values))
    return efficiency


def print_shares(found: list[Kernel], card: Card, images: int, options: Options) -> None:
    """Prints kernels, arithmetic, traffic and time of each group of kernels."""
    key = {
        "kind": lambda kernel: f"{kernel.kind} {kernel.dtype}",
        "source": lambda kernel: kernels.place(kernel),
        "kernel": lambda kernel: f"{kernel.kind}: {kernel.name} ({kernels.place(kernel)})",
    }[options.by or "kind"]
    rows: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0, 0])
    for kernel in found:
        work = (
            1,
            kernel.flop / images / 1e12,
            kernel.nbytes / images / 1e9,
            card.seconds(kernel) / images * 1e3,
        )
        rows[key(kernel)] = [
            sum_ + kernel.times * one for sum_, one in zip(rows[key(kernel)], work, strict=True)
        ]
    for name, (count, tflop, gb, ms) in sorted(rows.items(), key=lambda row: -row[1][3])[: options.top]:
        print(f"{'':12} {int(count):8} {tflop:9.3f} {gb:8.2f} {ms:8.2f}   {name}")


if __name__ == "__main__":
    cli.run(main)
