"""SD3's two networks in PyTorch (diffusers, PEFT) with random weights, for benchmarks; our networks with the same weights.

Importing this does not start jax, so that PyTorch can allocate its memory first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from inputs import TOKENS
from torch import Tensor
from torch_pipeline import Text, TorchPipeline

from tsdsr_jax import devices
from tsdsr_jax.models.eight_bits import EightBits
from tsdsr_jax.models.folded import fold
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import STUDENT_TIMESTEP, Config, Tree
from tsdsr_jax.models.vae import VAEConfig
from tsdsr_jax.upscaling.engine import Bands, Engine, LoadedNetworks
from tsdsr_jax.weights.prompt_files import PromptEmbeds
from tsdsr_jax.weights.sd3_folder import torch_config
from tsdsr_jax.weights.tensor_files import TensorSpec
from tsdsr_jax.weights.torch_names import read_base, to_tree

Size = Literal["tiny", "half", "full"]


def configs(size: Size) -> tuple[MMDiTConfig, VAEConfig]:
    """tiny: the bundled model's sizes, except the position table; half: half of SD3-medium's widths and depth."""
    if size == "full":
        return MMDiTConfig.sd3_medium(), VAEConfig.sd3()
    if size == "half":
        transformer = MMDiTConfig(
            num_layers=12, num_attention_heads=12, caption_projection_dim=768, joint_attention_dim=2048,
            pooled_projection_dim=1024,
        )  # fmt: skip
        return transformer, VAEConfig(block_out_channels=(64, 128, 256, 256))
    transformer = MMDiTConfig(
        sample_size=64, num_layers=6, attention_head_dim=32, num_attention_heads=4, joint_attention_dim=64,
        caption_projection_dim=128, pooled_projection_dim=64, pos_embed_max_size=32,
    )  # fmt: skip
    return transformer, VAEConfig(block_out_channels=(16, 48, 96, 128), layers_per_block=1, norm_num_groups=4)


class TorchNetworks(TorchPipeline):
    """PyTorch's networks with random weights, and conversions of them."""

    @classmethod
    def random(cls, size: Size, device: str, dtype: torch.dtype, seed: int = 0) -> TorchNetworks:
        torch.manual_seed(seed)
        # Like ours: choose convolutions by measurement, and compute float32 without TF32.
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False
        with _made_as(device, dtype):
            transformer, vae = (_model(config) for config in configs(size))
            wide = transformer.config
            text = Text(
                torch.randn(1, TOKENS, wide.joint_attention_dim), torch.randn(1, wide.pooled_projection_dim)
            )
        for model in (transformer, vae):
            model.eval().requires_grad_(False)
        # As PyTorch users do for fast convolutions on a GPU.
        return cls(transformer, vae.to(memory_format=torch.channels_last), text)

    def engine(self, size: Size, bands: Bands, precision: str, weights: EightBits | None = None) -> Engine:
        """Ours, with these weights, on the first device."""
        (transformer, vae), dtype = configs(size), devices.DTYPES[precision]
        prompt = PromptEmbeds(*(numpy_of(part[0]) for part in self.text))
        params = params_of(self.transformer, transformer)
        folded = fold(transformer, params, prompt.prompt, prompt.pooled, STUDENT_TIMESTEP, dtype, weights)
        networks = LoadedNetworks((transformer, folded), (vae, params_of(self.vae, vae)), jax.devices()[:1])
        return Engine(networks, bands, jnp.dtype(dtype))


def _model(config: Config) -> Any:
    described = {key: value for key, value in torch_config(config).items() if not key.startswith("_")}
    return (SD3Transformer2DModel if isinstance(config, MMDiTConfig) else AutoencoderKL)(**described)


@contextmanager
def _made_as(device: str, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


class _Reader(NamedTuple):
    tensors: Mapping[str, np.ndarray]
    source: str = "PyTorch"

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec(array.shape, array.dtype) for name, array in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name]


def params_of(model: Any, config: Config) -> Tree:
    """Converts a PyTorch network's parameters to ours, on the host, keeping the dtype."""
    return to_tree(
        read_base(_Reader({name: numpy_of(tensor) for name, tensor in model.state_dict().items()}), config)
    )


def numpy_of(tensor: Tensor) -> np.ndarray:
    """Converts a tensor to NumPy; bfloat16 becomes jax's, which has the same bits."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()
