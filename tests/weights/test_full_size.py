"""SD3-medium at its real size (2.03 B parameters, random): conversion in bounded memory, and one 512×512 pass of each
network against diffusers.

Each framework runs alone in a process of its own, this file as a script, and leaves its result as `.npy`. Needs about
16 GB of memory and 9 GB of disk, and takes some ten minutes: `pytest -m slow tests/weights/test_full_size.py -s`.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from parity import error, random_tensor, torch_shapes, uniform
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.vae import VAEConfig
from tsdsr_jax.weights.sd3_folder import TORCH_STEM, torch_config
from tsdsr_jax.weights.tensor_files import TensorSpec, write_tensors

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HALF = np.dtype(np.float16)
CONFIGS = {"transformer": MMDiTConfig.sd3_medium(), "vae": VAEConfig.sd3()}
INPUTS = {
    "latents": (1, 64, 64, 16),
    "context": (1, 333, 4096),
    "pooled": (1, 2048),
    "image": (1, 512, 512, 3),
}
PASSES = ("transformer", "encoder", "decoder")

# 24 random layers on sums of up to 6144 products: ten times the tiny networks' tolerance.
TOLERANCE = 1e-4
CONVERSION_LIMIT = 2e9
GIGABYTES_NEEDED = 14


# --- as a test --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("full_size")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def checkpoint(work: Path) -> Path:
    """A random fp16 diffusers folder; the transformer in two shards with an index."""
    folder = work / "sd3"
    for part, shards in {"transformer": 2, "vae": 1}.items():
        shapes = torch_shapes(CONFIGS[part])
        specs = {name: TensorSpec(shape, HALF) for name, shape in shapes.items()}
        names = list(specs)
        weight_map = {}
        for index in range(shards):
            members = names[index * len(names) // shards : (index + 1) * len(names) // shards]
            infix = f"-{index + 1:05}-of-{shards:05}" if shards > 1 else ""
            file = f"{TORCH_STEM}{infix}.safetensors"
            tensors = ((name, random_tensor(name, shapes[name]).astype(HALF)) for name in members)
            write_tensors(folder / part / file, {name: specs[name] for name in members}, tensors)
            weight_map |= dict.fromkeys(members, file)
        (folder / part / "config.json").write_text(json.dumps(torch_config(CONFIGS[part])))
        if shards > 1:
            index_file = folder / part / f"{TORCH_STEM}.safetensors.index.json"
            index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def conversion(checkpoint: Path, work: Path) -> tuple[Path, int]:
    """The converted folder, and the most anonymous memory that the conversion held."""
    command = [sys.executable, ROOT / "convert" / "sd3.py", "--input", checkpoint, "--output", work / "ours"]
    start = time.perf_counter()
    output, peak = run_watched([str(part) for part in command])
    print(f"\nconversion: {time.perf_counter() - start:.1f} s, peak {peak / 1e9:.2f} GB anonymous; {output}")
    return work / "ours", peak


def test_conversion_holds_little_memory(conversion: tuple[Path, int]) -> None:
    assert 5e7 < conversion[1] < CONVERSION_LIMIT  # below the first, the sampling missed the process


@pytest.mark.parametrize("network", PASSES)
def test_pass_equals_diffusers(
    network: str, checkpoint: Path, conversion: tuple[Path, int], work: Path
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    folders = {"torch": checkpoint, "jax": conversion[0]}
    results = {}
    for framework, folder in folders.items():
        wait_for_memory()
        target = work / f"{network}-{framework}.npy"
        command = [sys.executable, __file__, framework, network, str(folder), str(target)]
        output, peak = run_watched(command)
        print(f"\n{network} {framework}: {output.strip()}, peak {peak / 1e9:.2f} GB anonymous")
        results[framework] = np.load(target)
    measured = error(results["jax"], results["torch"])
    print(
        f"\n{network}: {results['torch'].shape}, |max| {np.abs(results['torch']).max():.2f}, error {measured:.2e}"
    )
    assert measured <= TOLERANCE


def run_watched(command: list[str]) -> tuple[str, int]:
    """Runs a command, looking at its memory every 20 ms: (standard output, highest anonymous resident bytes)."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
        ),
    }
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        found = re.search(r"RssAnon:\s+(\d+) kB", status)
        peak = max(peak, 1024 * int(found[1])) if found else peak
        time.sleep(0.02)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output, peak


def wait_for_memory() -> None:
    """Waits, ten minutes at most, until the machine has room for a network in float32."""
    for _ in range(60):
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if int(available[1]) * 1024 > GIGABYTES_NEEDED * 1e9:
            return
        time.sleep(10)
    raise AssertionError(f"less than {GIGABYTES_NEEDED} GB of memory are free")


# --- as a script: FRAMEWORK NETWORK CHECKPOINT RESULT -------------------------------------------


def draw(name: str) -> np.ndarray:
    return uniform(name, INPUTS[name])


def run_torch(network: str, folder: Path) -> np.ndarray:
    """One pass of a diffusers network in float32, result with channels last."""
    import torch
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    def first(name: str) -> torch.Tensor:
        return torch.from_numpy(draw(name)).permute(0, 3, 1, 2)

    with torch.no_grad():
        if network == "transformer":
            model = SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
            start = time.perf_counter()
            result = model(
                hidden_states=first("latents"),
                timestep=torch.tensor([1000.0]),
                encoder_hidden_states=torch.from_numpy(draw("context")),
                pooled_projections=torch.from_numpy(draw("pooled")),
            ).sample
        else:
            model = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
            start = time.perf_counter()
            if network == "encoder":
                result = model.encode(first("image")).latent_dist.parameters
            else:
                result = model.decode(first("latents")).sample
    print(f"{time.perf_counter() - start:.1f} s", end="")
    return result.permute(0, 2, 3, 1).numpy()


def run_jax(network: str, folder: Path) -> np.ndarray:
    """The same pass of ours."""
    import jax
    import jax.numpy as jnp

    from tsdsr_jax.models.params import network as network_of
    from tsdsr_jax.weights.sd3_folder import open_checkpoint

    part = "transformer" if network == "transformer" else "vae"
    files = open_checkpoint(folder).network(part)
    params = files.load(jnp.float32)
    model = network_of(files.config)
    names = {"transformer": ("latents", "context", "pooled"), "encoder": ("image",), "decoder": ("latents",)}
    first, *text = (jnp.asarray(draw(name)) for name in names[network])

    @jax.jit
    def run(params, first, *text):
        if network == "transformer":
            return model.apply({"params": params}, first, jnp.array([1000.0]), *text)
        if network == "decoder":
            return model.apply({"params": params}, first, method="decode")
        return jnp.concatenate(model.apply({"params": params}, first, method="encode"), axis=-1)

    start = time.perf_counter()
    compiled = run.lower(params, first, *text).compile()
    compilation = time.perf_counter() - start
    start = time.perf_counter()
    result = np.asarray(compiled(params, first, *text))
    print(f"{time.perf_counter() - start:.1f} s (compiled in {compilation:.1f} s)", end="")
    return result


if __name__ == "__main__":
    runner, which, source, destination = sys.argv[1:]
    np.save(destination, {"torch": run_torch, "jax": run_jax}[runner](which, Path(source)))
    print(f", peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB with mapped files")
