"""What the parity tests share: random weights under torch's names (made without torch), the ways from a torch model into
our trees, and the measure of error. `pytest_plugins = "parity"` in a test file gives it the `oracle` fixture.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from numpy.typing import ArrayLike

from tsdsr_jax.distillation.losses import Batch, Draws
from tsdsr_jax.models import lora
from tsdsr_jax.models.guidance import Text
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import Config, Tree, abstract_params
from tsdsr_jax.models.vae import VAEConfig
from tsdsr_jax.weights import lora_files, torch_names
from tsdsr_jax.weights.sd3_folder import TORCH_STEM, Part, torch_config
from tsdsr_jax.weights.tensor_files import TensorSpec, save_tensors

# Float32 against float32, another order of summation: single layers agree to 1e-6, whole networks to this.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def oracle() -> Iterator[Any]:
    """The module `oracle_models`; torch on one thread meanwhile, its second one mostly spins on a busy machine."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    import oracle_models

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield oracle_models
    torch.set_num_threads(threads)


def error(ours: ArrayLike, reference: ArrayLike) -> float:
    """max|a − b| / max|b|; NaN where either has one, which no tolerance admits."""
    a, b = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert a.shape == b.shape, f"{a.shape} is not {b.shape}"
    return float(np.abs(a - b).max() / np.abs(b).max())


def leaves(tree: Tree) -> dict[str, np.ndarray]:
    """The leaves of a nested tree by path."""
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}


# --- random weights without torch -----------------------------------------------------------


def uniform(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Float32 noise of mean 0 and variance 1 that depends on the name and the seed only.

    Made from a bit generator's raw output, which NumPy promises never to change, unlike its normal distribution.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    bits = np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(math.prod(shape))
    units = (bits >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)
    return (units * np.float32(3**0.5)).reshape(shape)


def random_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A torch tensor's random value; no group of parameters is near zero, so that each matters.

    Weights have variance 1 / fan-in, biases deviation 0.1, norm weights 1 ± 0.2, the position table 0.7.
    """
    noise = uniform(name, shape, seed)
    if name.endswith("bias"):
        return np.float32(0.1) * noise
    if name.endswith("pos_embed.pos_embed"):
        return np.float32(0.7) * noise
    if len(shape) == 1:
        return 1 + np.float32(0.2) * noise
    return noise / np.float32(math.sqrt(math.prod(shape[1:])))


def torch_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the torch network that a config describes."""
    entries = torch_names.base_entries(config)
    return {name: entry.torch_shape for entry in entries for name in entry.names}


def random_tensors(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """A random torch state dict, as arrays."""
    return {name: random_tensor(name, shape, seed) for name, shape in torch_shapes(config).items()}


def random_params(config: Config, seed: int = 0) -> Tree:
    """Random parameters, brought into our layout by the production table."""
    return params_from(random_tensors(config, seed), config)


def random_lora(
    config: Config, targets: tuple[str, ...], rank: int, seed: int = 0, strength: float = 0.3
) -> Tree:
    """A random adapter whose A B is about `strength` times as large as the kernel."""
    abstract = abstract_params(config)
    tree = jax.eval_shape(lambda key: lora.init(key, abstract, targets, rank), jax.random.key(0))
    pairs = {}
    for path, leaf in flatten_dict(tree, sep="/").items():
        shape = leaf.shape
        stacked = path.startswith("blocks_")
        factor = (
            strength / math.sqrt(rank) if path.endswith("/b") else 1 / math.sqrt(math.prod(shape[stacked:-1]))
        )
        pairs[path] = jnp.asarray(uniform(path, shape, seed) * np.float32(factor))
    return torch_names.to_tree(pairs.items())


# --- between torch's tensors and our trees ----------------------------------------------------


class MemoryReader(NamedTuple):
    """A TensorReader of arrays in memory."""

    tensors: Mapping[str, np.ndarray]
    source: str = "memory"
    metadata: Mapping[str, str] = MappingProxyType({})

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec(array.shape, array.dtype) for name, array in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name]


def params_from(tensors: Mapping[str, np.ndarray], config: Config) -> Tree:
    """Our parameters, on the device."""
    read = torch_names.read_base(MemoryReader(tensors), config)
    return torch_names.to_tree((path, jnp.asarray(array)) for path, array in read)


def arrays(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A torch state dict as arrays of their own, which later changes to the model do not reach."""
    return {name: tensor.detach().numpy().copy() for name, tensor in state.items()}


def config_of(model: Any) -> Config:
    """Our config of a diffusers model."""
    kind = MMDiTConfig if type(model).__name__ == "SD3Transformer2DModel" else VAEConfig
    return kind.from_dict(dict(model.config))


def params_of(model: Any) -> Tree:
    """Our parameters of a diffusers model that carries no LoRA."""
    return params_from(arrays(model.state_dict()), config_of(model))


def lora_of(oracle: Any, model: Any, adapter: str = "default") -> Tree:
    """Our tree of a model's PEFT adapter, read as a released file is."""
    state = arrays(oracle.lora_state(model, adapter))
    reader = MemoryReader({oracle.LORA_PREFIX + name: array for name, array in state.items()})
    return lora_files.read_lora(reader, config_of(model)).tree


# --- a training step's losses ---------------------------------------------------------------


def nhwc(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def losses_and_gradients(
    losses: Any, base: Any, student: Any, auxiliary: Tree, data: Mapping[str, np.ndarray]
) -> Any:
    """ẑ, the losses, and every adapter's gradients under torch's names.

    Args:
      losses, base, student, auxiliary: as the training step has them.
      data: the batch and the draws by name, images and latents NCHW.

    Returns:
      (ẑ (B, h, w, C), {loss: value}, {"student", "vae", "auxiliary": {name: gradient}}).
    """
    batch = Batch(
        nhwc(data["lr"]), nhwc(data["hr"]), nhwc(data["latent_hr"]),
        Text(data["states"], data["pooled"]), Text(data["student_states"], data["student_pooled"]),
    )  # fmt: skip
    draws = Draws(**{
        name: nhwc(data[name]) if data[name].ndim == 4 else jnp.asarray(data[name]) for name in Draws._fields
    })  # fmt: skip

    @jax.jit
    def step(student, auxiliary):
        (_, (made, metrics)), gradients = jax.value_and_grad(losses.student, has_aux=True)(
            student, base, auxiliary, batch, draws
        )
        value, slope = jax.value_and_grad(losses.auxiliary)(auxiliary, base, made.latent, batch, draws)
        return made.latent, metrics | {"auxiliary": value}, gradients, slope

    fake, metrics, gradients, slope = step(student, auxiliary)
    transformer, vae = losses.mmdit.config, losses.vae.config
    torch_gradients = {
        "student": torch_names.write_lora(gradients.transformer, transformer, prefix=""),
        "vae": torch_names.write_lora(gradients.vae, vae, prefix=""),
        "auxiliary": torch_names.write_lora(slope, transformer, prefix=""),
    }
    return np.asarray(fake), {name: float(value) for name, value in metrics.items()}, torch_gradients


# --- checkpoint folders without torch ---------------------------------------------------------


def write_folder(
    folder: Path, configs: Mapping[Part, Config], dtype: Any = np.float32, variant: str | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """Writes a random diffusers SD3 folder, one safetensors file per network; returns its tensors by part."""
    infix = f".{variant}" if variant else ""
    written = {}
    for part, config in configs.items():
        tensors = {name: array.astype(dtype) for name, array in random_tensors(config).items()}
        save_tensors(folder / part / f"{TORCH_STEM}{infix}.safetensors", tensors, {"format": "pt"})
        (folder / part / "config.json").write_text(json.dumps(torch_config(config)))
        written[part] = tensors
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"num_train_timesteps": 1000, "shift": 3.0}')
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    return written
