"""Upscaling, part by part and as a whole: ours against PyTorch (diffusers, PEFT) in the same run, with the same weights.

    python bench/inference.py --size tiny --device cpu                 # minutes on two cores
    python bench/inference.py --size half --device cpu --photos PHOTOS # and whole folders, files to files
    python bench/inference.py --batch 1 --batch 8                      # SD3-medium on a GPU

`encode` takes images to latents, `transformer` latents to velocities at t = 1000, `decode` latents to bytes, `end` images on
the host to bytes on the host, ours in the batches that infer/upscale.py makes. PyTorch runs `eager` and `compiled` with the
LoRA merged, and `lora` eager with it beside the weights, as TSD-SR's own script does. A ratio above 1 means that ours is
faster. Nothing is compared before the results agree.
"""

from __future__ import annotations

import os

# Two frameworks share one GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import copy
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]
import timing
from torch_networks import DTYPES, TOKENS, TorchNetworks, configs, numpy_of, params_of, synchronized

from tsdsr_jax import cli, devices, folder
from tsdsr_jax.errors import UserError
from tsdsr_jax.models.mmdit import MMDiTConfig, grid_positions, patchify
from tsdsr_jax.models.vae import AutoencoderKL
from tsdsr_jax.prompts import PromptEmbeds
from tsdsr_jax.sizes import LATENT_FACTOR, batch_size, slices
from tsdsr_jax.upscaler import Prepared, Settings, Upscaler

Part = Literal["encode", "transformer", "decode", "end"]
Other = Literal["eager", "compiled", "lora"]
# Root mean square of the difference over that of PyTorch's result. Half precision rounds after every layer.
FARTHEST = {"fp32": 1e-3, "fp16": 0.03, "bf16": 0.15}
ORDER: tuple[Other, ...] = ("compiled", "eager", "lora")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    size: Literal["tiny", "half", "full"] = "full"
    """Of both networks."""
    device: Literal["cuda", "cpu"] = "cuda"
    """For both frameworks."""
    mixed_precision: Literal["fp16", "bf16", "fp32"] | None = None
    """Default: fp16 on a GPU, fp32 on a CPU."""
    side: int = 512
    """Of the results, in pixels."""
    batch: tuple[int, ...] = (1,)
    """Images at a time; repeat for several."""
    parts: tuple[Part, ...] = ("encode", "transformer", "decode", "end")
    """What to run; repeat for several."""
    against: tuple[Other, ...] = ORDER
    """PyTorch's sides; repeat for several."""
    weights: Literal["int8", "fp8"] | None = None
    """Ours with the transformer's blocks in eight bits."""
    photos: Path | None = None
    """Also upscale this folder four times, from files to files; on a CPU in float32."""
    seconds: float = 2.0
    """To time each for, at least."""
    json: Path | None = None
    """File for the figures."""


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    check(options)
    if options.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    precision = options.mixed_precision or ("fp32" if options.device == "cpu" else "fp16")
    bench = Bench(options, precision)
    peak = bench.peak()
    print(
        f"{jax.devices()[0].device_kind}, {precision}, {options.size}; matrix product {peak / 1e12:.3g} TFLOP/s"
    )
    rows: list[dict[str, Any]] = []

    def save(more: list[dict[str, Any]]) -> None:
        """After every comparison: a machine that is taken away keeps what was measured."""
        if options.json:
            found = {"versions": timing.versions("torch", "diffusers", "peft"), "peak": peak}
            found |= {"precision": precision, "size": options.size, "apart": bench.apart}
            options.json.write_text(json.dumps(found | {"rows": rows + more}, indent=2) + "\n")

    for batch in options.batch:
        rows += bench.rows(batch, peak, save)
    print(f"at most {bench.apart:.1e} apart from PyTorch's results (root mean square)")
    if options.photos:
        rows.append(bench.folder_row(options.photos))
    save([])


def check(options: Options) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU; --device cpu runs the small sizes")
    transformer, _ = configs(options.size)
    largest = min(128, transformer.pos_embed_max_size * transformer.patch_size) * LATENT_FACTOR
    if options.side % 16 or not 64 <= options.side <= largest:
        raise UserError(f"--side {options.side}: expected a multiple of 16 from 64 to {largest}")
    if options.photos and (options.device != "cpu" or options.mixed_precision not in (None, "fp32")):
        raise UserError("--photos: runs with --device cpu and in fp32 only")
    if any(batch < 1 for batch in options.batch):
        raise UserError("--batch: expected at least 1")


class Bench:
    """Both sides' networks.

    Args:
      options: see there.
      precision: of both.
    """

    def __init__(self, options: Options, precision: str):
        self.options, self.precision = options, precision
        dtype = devices.DTYPES[precision]
        self.torch = TorchNetworks.random(options.size, options.device, DTYPES[precision])
        self.configs = configs(options.size)
        params = [
            params_of(model, config)
            for model, config in zip((self.torch.transformer, self.torch.vae), self.configs, strict=True)
        ]
        self.prompt = PromptEmbeds(*(numpy_of(part[0]) for part in self.torch.text))
        tile = options.side // LATENT_FACTOR
        networks = list(zip(self.configs, params, strict=True))
        at_a_time = 1 if options.device == "cpu" else 8
        settings = Settings(
            latent_tile=tile, process_size=64, sample=False, tile_batch=at_a_time, photo_batch=at_a_time
        )
        self.upscaler = Upscaler(
            networks[0], networks[1], self.prompt, settings, dtype, jax.devices()[:1], options.weights
        )
        self.vae_params = self.upscaler._vae_params
        self.apart = 0.0
        del params, networks

    def peak(self) -> float:
        """FLOP/s of a large square matrix product in this precision."""
        side = 8192 if self.options.device == "cuda" else 2048
        a = jax.random.normal(jax.random.key(0), (side, side)).astype(self.upscaler.dtype)
        product = jax.jit(lambda a: a @ a)
        with devices.matmul_precision(self.upscaler.dtype):
            times = timing.in_turn({"": lambda: product(a).block_until_ready()}, 0.5, 10)[""]
        return 2 * side**3 / timing.median(times)

    def rows(
        self, batch: int, peak: float, save: Callable[[list[dict[str, Any]]], None]
    ) -> list[dict[str, Any]]:
        """Measures all parts at one batch size. The sides of PyTorch come one after the other: they change its networks."""
        found = {}
        with ThreadPoolExecutor() as pool:  # compiles side by side
            list(pool.map(lambda part: self.sides(part, batch, self.torch)[0](), self.options.parts))
        for other in ORDER:
            if other not in self.options.against:
                continue
            networks = self.torch
            if other == "compiled":
                networks = dataclasses.replace(self.torch)
                networks.compile()
            if other == "lora":
                networks = copy.deepcopy(self.torch)  # PEFT's layers would stay in the others
                networks.add_lora()
            for part in self.options.parts:
                ours, theirs = self.sides(part, batch, networks)
                theirs = synchronized(self.options.device, theirs)
                self.agree(part, ours(), theirs())
                with_other = timing.in_turn({"ours": ours, "theirs": theirs}, self.options.seconds)
                row = found.setdefault(part, {"part": part, "batch": batch, "side": self.options.side})
                for side, times in with_other.items():
                    name = side if side == "ours" else other
                    row.setdefault(name, []).extend(times)
                    if name != "ours":
                        row[f"ratio_{name}"] = timing.median(times) / timing.median(with_other["ours"])
                flop = self.flop(part) * batch
                row |= {"tflop": flop / 1e12, "of_peak": flop / timing.median(row["ours"]) / peak}
                print(f"  {part}: {compared(with_other, other, batch)}", flush=True)
                save(list(found.values()))
        for row in found.values():
            print(told(row), flush=True)
        return list(found.values())

    def sides(
        self, part: Part, batch: int, networks: TorchNetworks
    ) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Ours and PyTorch's work on the same random inputs, each giving (B, H, W, C)."""
        up, side, latent = self.upscaler, self.options.side, self.options.side // LATENT_FACTOR
        channels = self.configs[1].latent_channels
        random = np.random.default_rng(batch)
        images = random.uniform(-1, 1, (batch, side, side, 3)).astype(np.float32)
        latents = random.standard_normal((batch, latent, latent, channels)).astype(np.float32)
        noise = random.standard_normal(latents.shape).astype(np.float32)

        def theirs(array: np.ndarray) -> torch.Tensor:
            tensor = torch.from_numpy(array).to(self.options.device, networks.text.pooled.dtype)
            return tensor.permute(0, 3, 1, 2)

        def in_precision(run: Callable[[], jax.Array]) -> Callable[[], jax.Array]:
            def ready() -> jax.Array:
                with devices.matmul_precision(up.dtype):
                    return jax.block_until_ready(run())

            return ready

        ours = [jnp.asarray(array) for array in (images, latents, noise)]
        inputs = [theirs(array) for array in (images, latents, noise)]
        if part == "encode":
            return (
                in_precision(lambda: up.encode(self.vae_params, ours[0], ours[2], None)),
                lambda: networks.encode(inputs[0], inputs[2]),
            )
        if part == "transformer":
            positions = jnp.tile(jnp.asarray(grid_positions(self.configs[0], latent, latent)), (batch, 1))
            patches = patchify(ours[1], self.configs[0].patch_size)
            return (
                in_precision(lambda: up.velocity(up._transformer_params, patches, positions, None)),
                lambda: networks.velocity(inputs[1]),
            )
        if part == "decode":
            nothing = jnp.zeros((*latents.shape[:3], channels + 1))
            return (
                in_precision(lambda: up.decode(self.vae_params, ours[1], nothing, None)[0]),
                lambda: networks.decode(inputs[1]),
            )
        plan = up.settings.plan((side // 4, side // 4))
        photos = [Prepared(plan, image, np.zeros_like(noise[0])) for image in images]

        def end() -> list[np.ndarray]:
            size = batch_size(len(photos), 1, up.largest_batch((side, side)))
            launched = [up.launch(few, (side, side), batch=size) for few in slices(photos, size)]
            return [picture for item in launched for picture in item.results()]

        def torch_end() -> torch.Tensor:
            latents = networks.encode(theirs(images), torch.zeros_like(inputs[2]))
            return networks.decode(latents - networks.velocity(latents)).cpu()

        return end, torch_end

    def agree(self, part: Part, ours: Any, theirs: torch.Tensor) -> None:
        """Refuses to compare what differs."""
        theirs = theirs.float().cpu().numpy().transpose(0, 2, 3, 1)
        if part == "transformer":
            theirs = np.asarray(patchify(jnp.asarray(theirs), self.configs[0].patch_size))
        ours = np.stack(ours) if isinstance(ours, list) else np.asarray(ours)
        apart = np.sqrt(np.square(ours.astype(np.float32) - theirs).mean() / np.square(theirs).mean())
        self.apart = max(self.apart, float(apart))
        most = FARTHEST[self.precision] + (0.1 if self.options.weights else 0)
        if not apart <= most:
            raise UserError(f"{part}: {apart:.2g} from PyTorch's result; expected at most {most:g}")

    def flop(self, part: Part) -> float:
        """Of one image, a multiplication and an addition being two; of our autoencoder, whose up-sampling is cut."""
        if part == "end":
            return sum(self.flop(part) for part in ("encode", "transformer", "decode"))
        side, latent = self.options.side, self.options.side // LATENT_FACTOR
        if part == "transformer":
            return transformer_flop(self.configs[0], (latent // self.configs[0].patch_size) ** 2)
        shape = (
            (1, side, side, 3) if part == "encode" else (1, latent, latent, self.configs[1].latent_channels)
        )
        network = AutoencoderKL(self.configs[1])

        def run(params: Any, x: jax.Array) -> Any:
            return network.apply({"params": params}, x, method=part)

        counted = (
            jax.jit(run).lower(self.vae_params, jax.ShapeDtypeStruct(shape, jnp.float32)).cost_analysis()
        )
        return counted["flops"]

    def folder_row(self, photos: Path) -> dict[str, Any]:
        """Files to files, as the two command lines do it; everything but loading."""
        from PIL import Image

        from oracle_pipeline import OraclePipeline

        tile = min(64, self.upscaler.largest_tile)
        settings = dataclasses.replace(self.upscaler.settings, latent_tile=tile)
        upscaler = self.upscaler.with_settings(settings)
        pipeline = OraclePipeline(
            self.torch.transformer, self.torch.vae, *self.torch.text, process_size=64, latent_tile=tile
        )
        notes: list[str] = []
        files = folder.FileOptions("wavelet", "png", 0, 10**8)
        with tempfile.TemporaryDirectory() as made:
            out = Path(made)
            jobs = folder.find_jobs(photos, out / "ours", ".png")

            def ours(name: str) -> float:
                report = folder.Report(notes.append)
                again = [dataclasses.replace(job, target=out / name / job.target.name) for job in jobs]
                start = time.perf_counter()
                groups = folder.plan_groups(again, settings, 1, files, report)
                folder.upscale(upscaler, groups, files, report)
                return time.perf_counter() - start

            def in_torch() -> float:
                start = time.perf_counter()
                for job in jobs:
                    pipeline.upscale_image(Image.open(job.source)).save(out / "torch" / job.target.name)
                return time.perf_counter() - start

            (out / "torch").mkdir()
            first, again = ours("first"), ours("again")
            try:
                in_torch()
                theirs = in_torch()
            except AssertionError as error:
                raise UserError(
                    f"--photos: a size that PyTorch's side does not take, as the original: {error}"
                ) from None
            if notes:
                raise UserError(notes[0])
            apart = max(
                np.abs(
                    pixels(out / "again" / job.target.name) - pixels(out / "torch" / job.target.name)
                ).mean()
                for job in jobs
            )
        if not apart <= 1:
            raise UserError(
                f"--photos: results are {apart:.2f} grey levels apart on average, expected at most 1"
            )
        row = {"part": "folder", "photos": len(jobs), "ours": [again], "first": [first], "eager": [theirs]}
        row |= {"ratio_eager": theirs / again, "ratio_eager_first": theirs / first}
        print(
            f"{len(jobs)} files to files: {again:.1f} s, with compilation {first:.1f} s; PyTorch {theirs:.1f} s "
            f"(ratio {theirs / again:.2f}, {theirs / first:.2f}); at most {apart:.2f} grey levels apart"
        )
        return row


def pixels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"), np.float32)


def transformer_flop(config: MMDiTConfig, tokens: int) -> float:
    """Of the joint blocks; of the last block's text, queries count, which PyTorch computes."""
    square = config.width**2
    image = 12 * config.num_layers * square * 2 * tokens
    text = (12 * (config.num_layers - 1) + 3) * square * 2 * TOKENS
    attention = config.num_layers * 4 * (tokens + TOKENS) ** 2 * config.width
    return image + text + attention


def compared(times: dict[str, list[float]], other: str, batch: int) -> str:
    ours, theirs = (timing.median(times[side]) / batch for side in ("ours", "theirs"))
    return f"{ours * 1e3:.2f} ms an image, {other} {theirs * 1e3:.2f}, ratio {theirs / ours:.2f}"


def told(row: dict[str, Any]) -> str:
    """A line for people: milliseconds per image, ratios, the fraction of the matrix product's rate."""
    ours = timing.median(row["ours"]) / row["batch"]
    line = f"{row['part']:12} batch {row['batch']}: {ours * 1e3:9.2f} ms an image, {100 * row['of_peak']:3.0f} % of peak"
    for other in ORDER:
        if other in row:
            line += f"; {other} {timing.median(row[other]) / row['batch'] * 1e3:.2f} ({row[f'ratio_{other}']:.2f})"
    return line


if __name__ == "__main__":
    cli.run(main)
