"""Times upscaling, in parts and as a whole, against PyTorch (diffusers, PEFT) in the same run, with the same weights.

    python bench/inference.py --size tiny --device cpu                 # minutes on two cores
    python bench/inference.py --batch 1 --batch 8                      # SD3-medium on a GPU
    python bench/inference.py --side 2048 --parts decode

`encode`: images to latents; `transformer`: latents to velocities at t = 1000 (at most 128×128, in one tile); `decode`:
latents to bytes; `end`: images on the host to bytes on the host, ours in the batches that infer/upscale.py makes. PyTorch
runs `eager` and `compiled` with the LoRA merged, and `lora`, eager with it beside the weights, as TSD-SR's own script does.
A ratio above 1 means that ours is faster. Results must agree before anything is timed.

Memory is a part's peak beyond the weights and its input: for ours as XLA plans it, for PyTorch as a GPU's allocator counts
it. On CPUs the plan lacks the scores of attention, which XLA's library allocates itself.
"""

from __future__ import annotations

import os

# Two frameworks share one GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import copy
import dataclasses
import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import timing
import torch
from inference_parts import Part, Parts, relative_error
from torch_networks import TorchNetworks, configs
from torch_parts import as_array, synchronized, torch_part
from torch_pipeline import DTYPES

from tsdsr_jax import cli, devices
from tsdsr_jax.errors import UserError
from tsdsr_jax.models.params import LATENT_FACTOR
from tsdsr_jax.upscaling.engine import Bands

Other = Literal["eager", "compiled", "lora"]
Rows = list[dict[str, Any]]
# Root mean square of the difference, relative to PyTorch's result. Half precision rounds after every layer.
FARTHEST = {"fp32": 1e-3, "fp16": 0.03, "bf16": 0.15}
ORDER: tuple[Other, ...] = ("compiled", "eager", "lora")
GB = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    size: Literal["tiny", "half", "full"] = "full"
    """Size of both networks."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Device for both frameworks."""
    mixed_precision: Literal["fp16", "bf16", "fp32"] | None = None
    """Default: fp16 on a GPU, fp32 on a CPU."""
    side: int = 512
    """Side of the results, in pixels."""
    batch: tuple[int, ...] = (1,)
    """Batch size; repeat for several."""
    parts: tuple[Part, ...] = ("encode", "transformer", "decode", "end")
    """Parts to run; repeat for several."""
    against: tuple[Other, ...] = ORDER
    """PyTorch's ways to run; repeat for several."""
    weights: Literal["int8", "fp8"] | None = None
    """Run ours with the transformer's blocks in eight bits."""
    seconds: float = 2.0
    """Least number of seconds to time each for."""
    json: Path | None = None
    """JSON file for the results."""


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    check(options)
    if options.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
        torch.set_num_threads(devices.cores())
    timing.check_device(options.device)
    with tempfile.TemporaryDirectory() as programs:
        # Programs are compiled twice: to run them, and to ask how much memory they take.
        jax.config.update("jax_compilation_cache_dir", programs)
        run(options)


def check(options: Options) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU; --device cpu runs the small sizes")
    if options.side % 16 or options.side < 64:
        raise UserError(f"--side {options.side}: expected a multiple of 16 from 64")
    transformer, _ = configs(options.size)
    largest = min(128, transformer.pos_embed_max_size * transformer.patch_size) * LATENT_FACTOR
    if options.side > largest and {"transformer", "end"} & set(options.parts):
        raise UserError(
            f"--side {options.side}: the transformer takes at most {largest} in one tile; beyond that only "
            "--parts encode --parts decode"
        )
    if any(batch < 1 for batch in options.batch):
        raise UserError("--batch: expected at least 1")


def run(options: Options) -> None:
    precision = options.mixed_precision or ("fp32" if options.device == "cpu" else "fp16")
    bench = Bench(options, precision)
    peak = bench.peak()
    print(
        f"{jax.devices()[0].device_kind}, {precision}, {options.size}; matrix product {peak / 1e12:.3g} TFLOP/s; "
        f"weights {bench.weights['ours'] / GB:.2f} GB, PyTorch {bench.weights['torch'] / GB:.2f}"
    )
    rows: Rows = []

    def save(more: Rows) -> None:
        """Saves after every comparison, so that a machine that is taken away loses nothing."""
        if options.json:
            found = {"versions": timing.versions("torch", "diffusers", "peft"), "peak": peak}
            found |= {"precision": precision, "size": options.size, "apart": bench.apart}
            found |= {"weights": bench.weights, "rows": rows + more}
            options.json.write_text(json.dumps(found, indent=2) + "\n")

    for batch in options.batch:
        rows += bench.rows(batch, peak, save)
    print(f"at most {bench.apart:.1e} apart from PyTorch's results (root mean square)")
    save([])


class Bench:
    """Runs both sides' networks.

    Args:
      options: the flags.
      precision: of both networks.
    """

    def __init__(self, options: Options, precision: str):
        self.options, self.precision = options, precision
        self.torch = TorchNetworks.random(options.size, options.device, DTYPES[precision])
        self.engine = self.torch.engine(options.size, Bands(), precision, options.weights)
        self.parts = Parts(self.engine, options.side, at_a_time=1 if options.device == "cpu" else 8)
        self.weights = {
            "ours": self.engine.networks.nbytes,
            "torch": sum(
                tensor.nbytes
                for model in (self.torch.transformer, self.torch.vae)
                for tensor in model.state_dict().values()
            ),
        }
        self.apart = 0.0

    def peak(self) -> float:
        """FLOP/s of a large square matrix product in this precision."""
        side = 8192 if self.options.device == "cuda" else 2048
        a = jax.random.normal(jax.random.key(0), (side, side)).astype(self.engine.dtype)
        product = jax.jit(lambda a: a @ a)
        with devices.matmul_precision(self.engine.dtype):
            times = timing.in_turn({"": lambda: product(a).block_until_ready()}, 0.5, 10)[""]
        return 2 * side**3 / timing.median(times)

    def rows(self, batch: int, peak: float, save: Callable[[Rows], None]) -> Rows:
        """Measures all parts at one batch size. PyTorch's ways come one after another, because they change its networks."""
        found = {part: self.row(part, batch) for part in self.options.parts}
        with ThreadPoolExecutor() as pool:  # compiles side by side
            list(pool.map(lambda part: self.parts.ours(part, batch).run(), self.options.parts))
        for other in ORDER:
            if other not in self.options.against:
                continue
            networks = self.other(other)
            for part, row in found.items():
                self.compare(row, part, other, networks)
                row["of_peak"] = row["tflop"] * 1e12 / timing.median(row["ours"]) / peak
                save(list(found.values()))
        for row in found.values():
            print(told(row), flush=True)
        return list(found.values())

    def row(self, part: Part, batch: int) -> dict[str, Any]:
        """The part of a row that is known before anything runs."""
        flop = self.parts.flop(part) * batch
        return {
            "part": part, "batch": batch, "side": self.options.side, "tflop": flop / 1e12, "memory": {}, "ours": [],
        }  # fmt: skip

    def other(self, other: Other) -> TorchNetworks:
        networks = self.torch
        if other == "compiled":
            networks = dataclasses.replace(self.torch)
            networks.compile()
        if other == "lora":
            networks = copy.deepcopy(self.torch)  # PEFT's layers would stay in the others
            networks.add_lora()
        return networks

    def compare(self, row: dict[str, Any], part: Part, other: Other, networks: TorchNetworks) -> None:
        """Times ours and one of PyTorch's ways in turn; adds them to the part's row."""
        ours = self.parts.ours(part, row["batch"])
        options = self.options
        theirs = synchronized(options.device, torch_part(part, row["batch"], options.side, networks))
        self.agree(part, ours.run(), theirs())
        times = timing.in_turn({"ours": ours.run, other: theirs}, options.seconds)
        row["ours"] += times["ours"]
        row[other] = times[other]
        row[f"ratio_{other}"] = timing.median(times[other]) / timing.median(times["ours"])
        if "ours" not in row["memory"] and ours.planned:
            row["memory"]["ours"] = ours.planned()
        if options.device == "cuda":
            row["memory"][other] = allocated(theirs)
        each = (
            timing.median(times["ours"]) / row["batch"] * 1e3,
            timing.median(times[other]) / row["batch"] * 1e3,
        )
        print(
            f"  {part}: {each[0]:.2f} ms per image, {other} {each[1]:.2f}, ratio {each[1] / each[0]:.2f}",
            flush=True,
        )

    def agree(self, part: Part, ours: Any, theirs: torch.Tensor) -> None:
        """Refuses to compare results that differ."""
        apart = relative_error(self.parts.as_array(part, ours), as_array(theirs))
        self.apart = max(self.apart, apart)
        most = FARTHEST[self.precision] + (0.1 if self.options.weights else 0)
        if not apart <= most:
            raise UserError(f"{part}: {apart:.2g} from PyTorch's result; expected at most {most:g}")


def allocated(run: Callable[[], Any]) -> int:
    """Peak of the bytes that PyTorch allocates while it runs, beyond those allocated before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def told(row: dict[str, Any]) -> str:
    """A line to print: milliseconds per image, ratios, the fraction of the matrix product's rate, memory."""
    ours = timing.median(row["ours"]) / row["batch"]
    line = f"{row['part']:12} batch {row['batch']}: {ours * 1e3:9.2f} ms per image, {100 * row['of_peak']:3.0f} % of peak"
    for other in ORDER:
        if other in row:
            line += f"; {other} {timing.median(row[other]) / row['batch'] * 1e3:.2f} ({row[f'ratio_{other}']:.2f})"
    for side, taken in row["memory"].items():
        line += f"; {side} takes {taken / GB:.2f} GB"
    return line


if __name__ == "__main__":
    cli.run(main)
