"""The shapes of both networks' parameters, written down. Flax would find the same by tracing the networks, in seconds."""

from __future__ import annotations

from typing import Any

from tsdsr_jax.models.mmdit import BlockKind, MMDiTConfig
from tsdsr_jax.models.vae import VAEConfig

Shapes = dict[str, Any]
"""A parameter tree with a shape in place of each array."""

TIMESTEP_WIDTH = 256  # of `timestep_embedding`


def transformer_shapes(config: MMDiTConfig) -> Shapes:
    """Shapes of `MMDiT`'s parameters."""
    width, side, patch = config.width, config.pos_embed_max_size, config.patch_size**2
    blocks = {
        f"blocks_{run}": _stacked(_block(config, kind), length)
        for run, (_, length, kind) in enumerate(config.runs())
    }
    return blocks | {
        "pos_embed": {"table": (side, side, width), "proj": _dense(patch * config.in_channels, width)},
        "time_text_embed": {
            "timestep_embedder": _conditioning(TIMESTEP_WIDTH, width),
            "text_embedder": _conditioning(config.pooled_projection_dim, width),
        },
        "context_embedder": _dense(config.joint_attention_dim, width),
        "norm_out": {"linear": _dense(width, 2 * width)},
        "proj_out": _dense(width, patch * config.out_channels),
    }


def _conditioning(inputs: int, width: int) -> Shapes:
    return {"linear_1": _dense(inputs, width), "linear_2": _dense(width, width)}


def _block(config: MMDiTConfig, kind: BlockKind) -> Shapes:
    width, last = config.width, kind.context_pre_only
    block = {
        "norm1": {"linear": _dense(width, (9 if kind.dual_attention else 6) * width)},
        "norm1_context": {"linear": _dense(width, (2 if last else 6) * width)},
        "attn": _attention(config, text=True, text_output=not last),
        "ff": _feed_forward(width),
    }
    if kind.dual_attention:
        block["attn2"] = _attention(config, text=False, text_output=False)
    if not last:
        block["ff_context"] = _feed_forward(width)
    return block


def _attention(config: MMDiTConfig, text: bool, text_output: bool) -> Shapes:
    names, norms = ["to_q", "to_k", "to_v", "to_out_0"], ["norm_q", "norm_k"]
    if text:
        names += ["add_q_proj", "add_k_proj", "add_v_proj"]
        norms += ["norm_added_q", "norm_added_k"]
    if text_output:
        names.append("to_add_out")
    shapes: Shapes = {name: _dense(config.width, config.width) for name in names}
    if config.qk_norm:
        shapes |= {name: {"scale": (config.attention_head_dim,)} for name in norms}
    return shapes


def _feed_forward(width: int) -> Shapes:
    return {"net_0": {"proj": _dense(width, 4 * width)}, "net_2": _dense(4 * width, width)}


def autoencoder_shapes(config: VAEConfig) -> Shapes:
    """Shapes of `AutoencoderKL`'s parameters."""
    widths, latent, layers = config.block_out_channels, config.latent_channels, config.layers_per_block
    return {
        "encoder": {
            **_ends(config.in_channels, widths[0], widths[-1], 2 * latent),
            **_levels("down", "downsamplers_0", widths, layers),
            "mid_block": _mid_block(widths[-1], config.mid_block_add_attention),
        },
        "decoder": {
            **_ends(latent, widths[-1], widths[0], config.out_channels),
            **_levels("up", "upsamplers_0", widths[::-1], layers + 1),
            "mid_block": _mid_block(widths[-1], config.mid_block_add_attention),
        },
    }


def _ends(inputs: int, first: int, last: int, outputs: int) -> Shapes:
    return {"conv_in": _conv(inputs, first), "conv_norm_out": _norm(last), "conv_out": _conv(last, outputs)}


def _levels(direction: str, sampler: str, widths: tuple[int, ...], layers: int) -> Shapes:
    shapes: Shapes = {}
    before = widths[0]
    for index, width in enumerate(widths):
        level = {f"resnets_{layer}": _resnet(width if layer else before, width) for layer in range(layers)}
        if index < len(widths) - 1:
            level[sampler] = {"conv": _conv(width, width)}
        if level:  # Flax has no entry for a module without parameters
            shapes[f"{direction}_blocks_{index}"] = level
        before = width
    return shapes


def _mid_block(width: int, attention: bool) -> Shapes:
    shapes = {"resnets_0": _resnet(width, width), "resnets_1": _resnet(width, width)}
    if attention:
        dense = {name: _dense(width, width) for name in ("to_q", "to_k", "to_v", "to_out_0")}
        shapes["attentions_0"] = dense | {"group_norm": _norm(width)}
    return shapes


def _resnet(inputs: int, outputs: int) -> Shapes:
    shapes: Shapes = {
        "norm1": _norm(inputs),
        "conv1": _conv(inputs, outputs),
        "norm2": _norm(outputs),
        "conv2": _conv(outputs, outputs),
    }
    if inputs != outputs:
        shapes["conv_shortcut"] = _conv(inputs, outputs, side=1)
    return shapes


def _conv(inputs: int, outputs: int, side: int = 3) -> Shapes:
    return {"kernel": (side, side, inputs, outputs), "bias": (outputs,)}


def _dense(inputs: int, outputs: int) -> Shapes:
    return {"kernel": (inputs, outputs), "bias": (outputs,)}


def _norm(width: int) -> Shapes:
    return {"scale": (width,), "bias": (width,)}


def _stacked(shapes: Shapes, length: int) -> Shapes:
    """The same with a leading axis on every shape."""
    return {
        name: (length, *part) if isinstance(part, tuple) else _stacked(part, length)
        for name, part in shapes.items()
    }
