"""SD3's transformer (MMDiT) as Flax modules, including SD3.5's RMS-normalized queries and keys and its dual attention.

Axes: B batch, h w latent height and width, p patch size, C latent channels, T image tokens, S text tokens,
N heads, H head dim, D width (= N·H).

Parameters keep the checkpoint's names (`to_q`, `ff/net_2`, ...). Runs of identical blocks are stacked and scanned:
`blocks_0` holds SD3-medium's first 23 blocks on a leading axis, `blocks_1` the last block, where the text stream ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tsdsr_jax.models.attention import Implementation, attention
from tsdsr_jax.models.layers import Dense, Placement, RMSNorm, gathered, layer_norm


class BlockKind(NamedTuple):
    """What distinguishes blocks; neighbors of the same kind are scanned together."""

    dual_attention: bool
    context_pre_only: bool


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """The checkpoint's `transformer/config.json`; defaults are SD3-medium's."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 24
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1536
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 192
    qk_norm: str | None = None
    dual_attention_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f'qk_norm is {self.qk_norm!r}; this transformer supports null and "rms_norm"')
        if self.caption_projection_dim != self.width:
            raise ValueError(
                f"caption_projection_dim is {self.caption_projection_dim}, but joint attention needs the width of the "
                f"image stream: {self.num_attention_heads} heads × {self.attention_head_dim} = {self.width}"
            )
        if not all(0 <= layer < self.num_layers for layer in self.dual_attention_layers):
            raise ValueError(
                f"dual_attention_layers {self.dual_attention_layers} exceed {self.num_layers} layers"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MMDiTConfig:
        """Reads a diffusers config; keys that this model does not have (`_class_name`, ...) are ignored."""
        known = {field.name for field in dataclasses.fields(cls)}
        chosen = {key: value for key, value in values.items() if key in known}
        chosen["dual_attention_layers"] = tuple(chosen.get("dual_attention_layers") or ())
        return cls(**chosen)

    @classmethod
    def sd3_medium(cls) -> MMDiTConfig:
        return cls()

    @classmethod
    def tiny(cls, **overrides: Any) -> MMDiTConfig:
        """A few thousand parameters, for tests and rehearsals."""
        small: dict[str, Any] = dict(
            sample_size=32, num_layers=3, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=48,
            caption_projection_dim=64, pooled_projection_dim=40, pos_embed_max_size=48,
        )  # fmt: skip
        return cls(**(small | overrides))

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def kinds(self) -> list[BlockKind]:
        """The kind of each block, in order."""
        return [
            BlockKind(layer in self.dual_attention_layers, layer == self.num_layers - 1)
            for layer in range(self.num_layers)
        ]

    def runs(self) -> list[tuple[int, int, BlockKind]]:
        """(first layer, number of layers, kind) of each run of identical blocks, in order."""
        runs, first = list[tuple[int, int, BlockKind]](), 0
        for kind, members in groupby(self.kinds()):
            length = len(list(members))
            runs.append((first, length, kind))
            first += length
        return runs


class Modulation(NamedTuple):
    """An AdaLN-Zero modulation, each (B, 1, D); `gate` multiplies what is added to the stream."""

    shift: jax.Array
    scale: jax.Array
    gate: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x) * (1 + self.scale) + self.shift


class Streams(NamedTuple):
    """The two token streams: image (B, T, D), text (B, S, D)."""

    image: jax.Array
    text: jax.Array


class AdaLayerNorm(nn.Module):
    """AdaLN-Zero: `count` modulations of width D from the conditioning vector."""

    count: int
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, conditioning: jax.Array) -> list[Modulation]:
        """(B, D), after SiLU, -> modulations of (B, 1, D)."""
        vectors = Dense(3 * self.count * self.width, self.dtype, name="linear")(conditioning)[:, None]
        parts = jnp.split(vectors, 3 * self.count, axis=-1)
        return [Modulation(*parts[3 * i : 3 * i + 3]) for i in range(self.count)]


class AdaLayerNormContinuous(nn.Module):
    """AdaLN without a gate; the checkpoint stores scale before shift."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, conditioning: jax.Array) -> jax.Array:
        """Modulates (B, T, D) by (B, D), after SiLU."""
        vectors = Dense(2 * self.width, self.dtype, name="linear")(conditioning)[:, None]
        scale, shift = jnp.split(vectors, 2, axis=-1)
        return layer_norm(x) * (1 + scale) + shift


class FeedForward(nn.Module):
    """Linear, GELU (tanh), linear; four times wider inside."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = FeedForwardIn(4 * self.width, self.dtype, name="net_0")(x)
        return Dense(self.width, self.dtype, name="net_2")(x)


class FeedForwardIn(nn.Module):
    """The first half of the feed-forward: a module of its own because the checkpoint names it `net.0.proj`."""

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.gelu(Dense(self.features, self.dtype, name="proj")(x), approximate=True)


class Attention(nn.Module):
    """Attention over the image tokens, or over text and image tokens if a text stream is given."""

    config: MMDiTConfig
    context_pre_only: bool
    dtype: DTypeLike
    implementation: Implementation

    @nn.compact
    def __call__(
        self, image: jax.Array, text: jax.Array | None, lengths: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the outputs of the image stream, (B, T, D), and of the text stream, (B, S, D) or None.

        Keys are ordered [text, image]. Attention does not depend on the order; this one makes the valid keys of a packed
        batch a prefix, because its padding follows the image tokens. `lengths` (B,) counts valid image tokens.
        """
        q = self._heads("to_q", image, "norm_q")
        k = self._heads("to_k", image, "norm_k")
        v = self._heads("to_v", image)
        text_tokens = 0
        if text is not None:
            text_tokens = text.shape[1]
            # The last block does not use its text queries (XLA drops them), but the checkpoint has weights for them.
            q_text = self._heads("add_q_proj", text, "norm_added_q")
            if not self.context_pre_only:
                q = jnp.concatenate([q_text, q], axis=1)
            k = jnp.concatenate([self._heads("add_k_proj", text, "norm_added_k"), k], axis=1)
            v = jnp.concatenate([self._heads("add_v_proj", text), v], axis=1)
        lengths = None if lengths is None else lengths + text_tokens
        out = attention(q, k, v, lengths=lengths, implementation=self.implementation)
        out = out.reshape(*out.shape[:2], self.config.width)
        text_queries = out.shape[1] - image.shape[1]
        image_out = Dense(self.config.width, self.dtype, name="to_out_0")(out[:, text_queries:])
        if not text_queries:
            return image_out, None
        return image_out, Dense(self.config.width, self.dtype, name="to_add_out")(out[:, :text_queries])

    def _heads(self, name: str, x: jax.Array, norm: str | None = None) -> jax.Array:
        """Projects to (B, tokens, N, H) and normalizes queries and keys if the checkpoint does."""
        config = self.config
        y = Dense(config.width, self.dtype, name=name)(x)
        y = y.reshape(*x.shape[:2], config.num_attention_heads, config.attention_head_dim)
        return RMSNorm(name=norm)(y) if norm and config.qk_norm else y


class Block(nn.Module):
    """One MMDiT block: modulated joint attention, then an MLP on each stream."""

    config: MMDiTConfig
    kind: BlockKind
    dtype: DTypeLike
    implementation: Implementation
    placement: Placement | None = None

    @nn.compact
    def __call__(
        self, streams: Streams, conditioning: jax.Array, lengths: jax.Array | None
    ) -> tuple[Streams, None]:
        width, dtype = self.config.width, self.dtype
        if self.placement is not None:
            streams = jax.lax.with_sharding_constraint(streams, self.placement.activations)
        image, text = streams
        # A dual-attention block's image modulations are (attention, MLP, second attention).
        attend, mlp, *second = AdaLayerNorm(3 if self.kind.dual_attention else 2, width, dtype, name="norm1")(
            conditioning
        )
        if self.kind.context_pre_only:
            text_in = AdaLayerNormContinuous(width, dtype, name="norm1_context")(text, conditioning)
        else:
            attend_text, mlp_text = AdaLayerNorm(2, width, dtype, name="norm1_context")(conditioning)
            text_in = attend_text(text)

        settings = (self.config, self.kind.context_pre_only, dtype, self.implementation)
        from_image, from_text = Attention(*settings, name="attn")(attend(image), text_in, lengths)
        attended = image + attend.gate * from_image
        if second:
            attended += (
                second[0].gate * Attention(*settings, name="attn2")(second[0](image), None, lengths)[0]
            )
        image = attended + mlp.gate * FeedForward(width, dtype, name="ff")(mlp(attended))
        if from_text is not None:
            text = text + attend_text.gate * from_text
            text = text + mlp_text.gate * FeedForward(width, dtype, name="ff_context")(mlp_text(text))
        return Streams(image, text), None


class ConditioningMLP(nn.Module):
    """Linear, SiLU, linear."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.silu(Dense(self.width, self.dtype, name="linear_1")(x))
        return Dense(self.width, self.dtype, name="linear_2")(x)


class TimeTextEmbedding(nn.Module):
    """The conditioning vector (B, D): timestep (B,) in 0...1000 plus pooled text (B, pooled)."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, timestep: jax.Array, pooled: jax.Array) -> jax.Array:
        time = ConditioningMLP(self.width, self.dtype, name="timestep_embedder")(timestep_embedding(timestep))
        return time + ConditioningMLP(self.width, self.dtype, name="text_embedder")(pooled)


class PatchEmbedding(nn.Module):
    """Patches to tokens, plus positions from the stored table.

    The checkpoint's 2×2 convolution with stride 2 is a linear map of flattened patches here, so packed tokens can use it.
    """

    config: MMDiTConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, patches: jax.Array, positions: jax.Array) -> jax.Array:
        """(B, T, p·p·C), and (B, T) or (T,) int rows of the flattened table -> (B, T, D)."""
        side, width = self.config.pos_embed_max_size, self.config.width
        table = self.param("table", lambda _: jnp.asarray(sincos_table(self.config)))
        tokens = Dense(width, self.dtype, name="proj")(patches)
        # jnp.take, because parameters may be NumPy arrays, which cannot be indexed by a traced array.
        return tokens + jnp.take(table.reshape(side * side, width), positions, axis=0).astype(self.dtype)


class MMDiT(nn.Module):
    """The velocity network v(z, t, text).

    Attributes:
      config: sizes, from the checkpoint.
      dtype: computation dtype; parameters are cast on use.
      remat: recompute whole blocks in the backward pass. Otherwise it keeps the results of linear layers and recomputes
        the rest, including attention.
      implementation: see `attention`.
      placement: for sharded parameters; None: XLA decides.
    """

    config: MMDiTConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    implementation: Implementation = "auto"
    placement: Placement | None = None

    def setup(self) -> None:
        config = self.config
        whole = partial(gathered, placement=self.placement)
        self.pos_embed = whole(PatchEmbedding)(config, self.dtype)
        self.time_text_embed = whole(TimeTextEmbedding)(config.width, self.dtype)
        self.context_embedder = whole(Dense)(config.width, self.dtype)
        kept = None if self.remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        block = nn.remat(whole(Block), prevent_cse=False, policy=kept)
        self.blocks = [
            nn.scan(
                block,
                variable_axes={"params": 0, "lora": 0, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast),
                length=length,
            )(config, kind, self.dtype, self.implementation, self.placement)
            for _, length, kind in config.runs()
        ]
        self.norm_out = whole(AdaLayerNormContinuous)(config.width, self.dtype)
        self.proj_out = whole(Dense)(config.patch_size**2 * config.out_channels, self.dtype)

    def __call__(
        self, latents: jax.Array, timestep: jax.Array, context: jax.Array, pooled: jax.Array
    ) -> jax.Array:
        """Predicts the velocity.

        Args:
          latents: (B, h, w, C), h and w multiples of the patch size, at most patch size × pos_embed_max_size.
          timestep: (B,) in 0...1000.
          context: (B, S, joint_attention_dim) text states.
          pooled: (B, pooled_projection_dim).

        Returns:
          (B, h, w, out_channels) in the computation dtype.
        """
        height, width = latents.shape[1:3]
        positions = grid_positions(self.config, height, width)
        velocity = self.tokens(
            patchify(latents, self.config.patch_size), jnp.asarray(positions), timestep, context, pooled
        )
        return unpatchify(velocity, height, width, self.config.patch_size)

    def tokens(
        self,
        patches: jax.Array,
        positions: jax.Array,
        timestep: jax.Array,
        context: jax.Array,
        pooled: jax.Array,
        lengths: jax.Array | None = None,
    ) -> jax.Array:
        """The same network on packed tokens, for tiles of several sizes in one batch.

        Args:
          patches: (B, T, p·p·C), each patch flattened in the order (row, column, channel).
          positions: (B, T) or (T,) int, each token's row of the flattened position table (`grid_positions`).
          timestep, context, pooled: as in `__call__`.
          lengths: (B,) int, how many tokens at the start of each row are valid; None: all. Outputs of the others are
            meaningless.

        Returns:
          (B, T, p·p·out_channels) velocity patches.
        """
        conditioning = nn.silu(self.time_text_embed(timestep, pooled))
        streams = Streams(self.pos_embed(patches, positions), self.context_embedder(context))
        for run in self.blocks:
            streams, _ = run(streams, conditioning, lengths)
        return self.proj_out(self.norm_out(streams.image, conditioning))


def patchify(latents: jax.Array, patch: int) -> jax.Array:
    """(B, h, w, C) -> (B, (h/p)·(w/p), p·p·C)."""
    batch, height, width, channels = latents.shape
    grid = latents.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def unpatchify(patches: jax.Array, height: int, width: int, patch: int) -> jax.Array:
    """(B, (h/p)·(w/p), p·p·C) -> (B, h, w, C)."""
    grid = patches.reshape(patches.shape[0], height // patch, width // patch, patch, patch, -1)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(patches.shape[0], height, width, -1)


def grid_positions(config: MMDiTConfig, height: int, width: int) -> np.ndarray:
    """Rows of the flattened position table for an (h, w) latent: the table's center crop, (h/p · w/p,) int32.

    Raises:
      ValueError: a side is not a multiple of the patch size, or is larger than the table.
    """
    side, patch = config.pos_embed_max_size, config.patch_size
    if height % patch or width % patch:
        raise ValueError(f"latent sides must be multiples of {patch}, not {height}×{width}")
    rows, columns = height // patch, width // patch
    if max(rows, columns) > side:
        raise ValueError(
            f"a {height}×{width} latent exceeds the position table, which ends at {side * patch} a side"
        )
    top, left = (side - rows) // 2, (side - columns) // 2
    grid = (top + np.arange(rows))[:, None] * side + left + np.arange(columns)[None]
    return grid.reshape(-1).astype(np.int32)


def timestep_embedding(timestep: jax.Array, dim: int = 256, max_period: float = 10000.0) -> jax.Array:
    """(B,) -> (B, dim) float32: cosines, then sines, of the timestep at geometric frequencies."""
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timestep.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def sincos_table(config: MMDiTConfig) -> np.ndarray:
    """The position table that SD3 starts from, (P, P, D) float32; checkpoints store their own.

    The first half of the channels encodes the column, the second the row, each as sines then cosines. Positions are
    scaled so that an image of `sample_size` spans as many units as it has patches.
    """
    side, quarter = config.pos_embed_max_size, config.width // 4
    units = np.arange(side, dtype=np.float64) * (config.sample_size // config.patch_size) / side
    angles = units[:, None] / 10000.0 ** (np.arange(quarter) / quarter)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns = np.broadcast_to(axis[None], (side, side, 2 * quarter))
    rows = np.broadcast_to(axis[:, None], (side, side, 2 * quarter))
    return np.concatenate([columns, rows], axis=-1).astype(np.float32)
