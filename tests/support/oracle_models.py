"""Tiny random SD3-style networks in PyTorch, and the files a user would have of them.

The JAX port is compared with these: diffusers gives the reference transformer and VAE, PEFT the reference
LoRA. Every parameter is random and no group of them near zero, so that a wrong gate, bias, norm or position
table changes the result.
"""

import copy
import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# Name suffixes of the adapted transformer modules, as PEFT matches them.
AUX_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
STUDENT_TARGETS = (*AUX_TARGETS, "proj", "linear", "proj_out")
# One pattern for the whole module name: the encoder only, never the decoder.
VAE_TARGETS = (
    r"quant_conv|encoder\.(conv_in|conv_out|.+\.(conv1|conv2|conv_shortcut|downsamplers\.\d+\.conv"
    r"|to_q|to_k|to_v|to_out\.0))"
)
LORA_PREFIX = "transformer."  # in front of every key of every released file, the VAE's too

PIPELINE_COMPONENTS = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": [None, None],
    "text_encoder_2": [None, None],
    "text_encoder_3": [None, None],
    "tokenizer": [None, None],
    "tokenizer_2": [None, None],
    "tokenizer_3": [None, None],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


# --- networks ---------------------------------------------------------------------------


def tiny_transformer(seed: int, **overrides: object) -> SD3Transformer2DModel:
    """An MMDiT of width 64, float32, in eval mode; `overrides` replace fields of its diffusers config.

    `qk_norm="rms_norm"` and `dual_attention_layers=(0, 1)` give the SD3.5 variants. Inputs: latent (B, 16,
    h, w) with even h, w ≤ 96, timestep (B,), text (B, S, 48), pooled text (B, 40).
    """
    config = {
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 3,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "caption_projection_dim": 64,
        "joint_attention_dim": 48,
        "pooled_projection_dim": 40,
        "pos_embed_max_size": 48,
    }
    model = SD3Transformer2DModel(**(config | overrides))
    randomize(model, seed)
    return model.eval()


def tiny_vae(seed: int, **overrides: object) -> AutoencoderKL:
    """An SD3-like autoencoder, float32, in eval mode; `overrides` replace fields of its diffusers config.

    Pictures (B, 3, 8h, 8w), latents (B, 16, h, w). The widths double where SD3's do, so the same two down
    blocks have a shortcut convolution. The last convolutions are scaled: posterior deviations are around
    0.4, and decoded pictures fill [-1, 1] with little beyond it.
    """
    config = {
        "block_out_channels": (8, 16, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "latent_channels": 16,
        "sample_size": 128,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    model = AutoencoderKL(**(config | overrides))
    randomize(model, seed)
    channels = model.config.latent_channels
    with torch.no_grad():
        model.encoder.conv_out.weight[channels:] *= 0.3
        model.encoder.conv_out.bias[channels:] -= 2.0
        model.decoder.conv_out.weight *= 0.35
    return model.eval()


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Draws every parameter and the stored position table anew from one generator.

    Weights ~ N(0, 1 / fan-in), biases ~ N(0, 0.1²), norm weights ~ N(1, 0.2²), the position table ~ N(0,
    0.7²), which is about as large as the sines and cosines it replaces.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            parameter.copy_(0.1 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
    for buffer in model.buffers():
        buffer.copy_(0.7 * torch.randn(buffer.shape, generator=generator))


# --- checkpoint folders -----------------------------------------------------------------


def save_diffusers_folder(
    folder: str | Path,
    transformer: SD3Transformer2DModel,
    vae: AutoencoderKL,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int | None = None,
    variant: str | None = None,
) -> None:
    """Writes copies of both networks, cast to `dtype`, as a diffusers SD3 folder of safetensors.

    `max_shard_size` such as "500KB" splits the files and adds an index; `variant` such as "fp16" goes into
    the names, and has no effect on `dtype`.
    """
    folder = Path(folder)
    options = {"variant": variant} | ({"max_shard_size": max_shard_size} if max_shard_size else {})
    for name, model in {"transformer": transformer, "vae": vae}.items():
        if getattr(model, "peft_config", None):
            raise ValueError(f"the {name} carries a LoRA: save the plain network")
        copy.deepcopy(model).to(dtype).save_pretrained(folder / name, safe_serialization=True, **options)
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0).save_pretrained(folder / "scheduler")
    header = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": diffusers.__version__}
    (folder / "model_index.json").write_text(json.dumps(header | PIPELINE_COMPONENTS, indent=2) + "\n")


def random_prompt(
    folder: str | Path, tokens: int = 21, joint: int = 48, pooled: int = 40, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Writes and returns random prompt embeddings (1, tokens, joint) and pooled embeddings (1, pooled)."""
    generator = torch.Generator().manual_seed(seed)
    prompt_embeds = torch.randn(1, tokens, joint, generator=generator)
    pooled_embeds = torch.randn(1, pooled, generator=generator)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(prompt_embeds, folder / "prompt_embeds.pt")
    torch.save(pooled_embeds, folder / "pool_embeds.pt")
    return prompt_embeds, pooled_embeds


# --- LoRA -------------------------------------------------------------------------------


def add_student_lora(
    transformer: SD3Transformer2DModel, rank: int, seed: int, strength: float = 0.1, adapter: str = "default"
) -> None:
    """Adds and activates the student's (and teacher's) adapter, random and non-zero."""
    add_random_lora(transformer, STUDENT_TARGETS, rank, seed, strength, adapter)


def add_aux_lora(
    transformer: SD3Transformer2DModel, rank: int, seed: int, strength: float = 0.1, adapter: str = "default"
) -> None:
    """Adds and activates the auxiliary ("reg") adapter, random and non-zero: attention projections only."""
    add_random_lora(transformer, AUX_TARGETS, rank, seed, strength, adapter)


def add_vae_lora(
    vae: AutoencoderKL, rank: int, seed: int, strength: float = 0.1, adapter: str = "default"
) -> None:
    """Adds and activates the adapter on the VAE's encoder, random and non-zero."""
    add_random_lora(vae, VAE_TARGETS, rank, seed, strength, adapter)


@torch.no_grad()
def add_random_lora(
    model: nn.Module, targets: tuple[str, ...] | str, rank: int, seed: int, strength: float, adapter: str
) -> None:
    """PEFT's LoRA with alpha = rank on `targets`; B·A is about `strength` times as large as the weight.

    A ~ N(0, 1 / fan-in) and B ~ N(0, strength² / rank), beside base weights ~ N(0, 1 / fan-in).
    """
    inject_lora(model, targets, rank, adapter)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        half = re.search(rf"\.lora_([AB])\.{re.escape(adapter)}\.weight$", name)
        if half:
            scale = {"A": 1 / math.sqrt(parameter[0].numel()), "B": strength / math.sqrt(rank)}[half[1]]
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def inject_lora(model: nn.Module, targets: tuple[str, ...] | str, rank: int, adapter: str) -> None:
    """Adds PEFT's own initial LoRA (no effect on the output yet) as the one active adapter.

    A tuple of `targets` holds name suffixes, a string is a pattern for the whole module name.
    """
    if adapter in getattr(model, "peft_config", {}):
        raise ValueError(f"the model already has an adapter {adapter!r}")
    targets = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Already found a `peft_config`"
        )  # several adapters are meant
        model.add_adapter(config, adapter_name=adapter)


def lora_state(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names, `<module path>.lora_A.weight` and `.lora_B.weight`."""
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def save_lora(model: nn.Module, path: str | Path, adapter: str = "default") -> None:
    """Writes the adapter as TSD-SR's files hold it: `transformer.<module path>.lora_A.weight` and so on."""
    tensors = {LORA_PREFIX + name: tensor.contiguous() for name, tensor in lora_state(model, adapter).items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def load_lora_into(
    model: nn.Module, path: str | Path, targets: tuple[str, ...] | str, adapter: str = "default"
) -> None:
    """Adds the LoRA in `path` to `model` through PEFT and activates it; its rank is read off the file.

    Raises ValueError naming every key that lacks the prefix, has no module in PEFT, is missing or misshapen.
    """
    tensors = load_file(path)
    bare = {name.removeprefix(LORA_PREFIX): tensor for name, tensor in tensors.items()}
    ranks = {tensor.shape[0] for name, tensor in bare.items() if name.endswith(".lora_A.weight")}
    if len(ranks) != 1:
        raise ValueError(f"{path}: one rank expected in lora_A, found {sorted(ranks)}")
    inject_lora(model, targets, ranks.pop(), adapter)
    unprefixed = [name for name in tensors if not name.startswith(LORA_PREFIX)]
    offenders = {"without prefix": unprefixed} | key_differences(bare, lora_state(model, adapter))
    if any(offenders.values()):
        raise ValueError(f"{path} does not fit the model: {offenders}")
    outcome = set_peft_model_state_dict(model, bare, adapter_name=adapter)
    absent = [name for name in outcome.missing_keys if f".{adapter}." in name and "lora_" in name]
    if outcome.unexpected_keys or absent:
        raise ValueError(f"{path}: PEFT left out {outcome.unexpected_keys}, did not find {absent}")


def key_differences(given: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, list[str]]:
    """The names by which two sets of tensors differ, and those whose shapes do."""
    common = sorted(given.keys() & expected.keys())
    return {
        "unexpected": sorted(given.keys() - expected.keys()),
        "missing": sorted(expected.keys() - given.keys()),
        "misshapen": [name for name in common if given[name].shape != expected[name].shape],
    }


def adapted_modules(model: nn.Module, adapter: str = "default") -> set[str]:
    """The paths of the modules that the adapter changes."""
    return {name.split(".lora_")[0] for name in lora_state(model, adapter)}


def without_lora(model: nn.Module, function: Callable[[], Tensor]) -> Tensor:
    """The value of `function()` with every adapter of `model` switched off meanwhile."""
    model.disable_adapters()
    try:
        return function()
    finally:
        model.enable_adapters()
