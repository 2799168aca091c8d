"""SD3's transformer (MMDiT) as Flax modules, including SD3.5's RMS-normalized queries and keys and its dual attention.

Axes: B batch, h w latent height and width, p patch size, C latent channels, T image tokens, S text tokens,
N heads, H head dim, D width (= N·H).

Parameters keep the checkpoint's names (`to_q`, `ff/net_2`, ...). Runs of identical blocks are stacked and scanned, unless
`scanned` is off: `blocks_0` holds SD3-medium's first 23 blocks on a leading axis, `blocks_1` the last block, where the text
stream ends.
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

from tsdsr_jax.models.attention import Implementation, attention, is_flash
from tsdsr_jax.models.conditioning import AdaLayerNorm, AdaLayerNormContinuous, TimeTextEmbedding
from tsdsr_jax.models.layers import KEPT, Dense, Placement, RMSNorm, gathered


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


class Streams(NamedTuple):
    """The two token streams: image (B, T, D), text (B, S, D)."""

    image: jax.Array
    text: jax.Array


class Valid(NamedTuple):
    """How many tokens at the start of each row count, (B,) int; None: all.

    At most one is given: the keys of that stream come last, so that the valid keys are a prefix.
    """

    image: jax.Array | None = None
    text: jax.Array | None = None


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
        self, image: jax.Array, text: jax.Array | None, valid: Valid
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the outputs of the image stream, (B, T, D), and of the text stream, (B, S, D) or None."""
        q = self._heads("to_q", image, "norm_q")
        k = self._heads("to_k", image, "norm_k")
        v = self._heads("to_v", image)
        q_text, lengths = None, valid.image
        if text is not None:
            # The last block does not use its text queries (XLA drops them), but the checkpoint has weights for them.
            q_text = self._heads("add_q_proj", text, "norm_added_q")
            k_text = self._heads("add_k_proj", text, "norm_added_k")
            v_text = self._heads("add_v_proj", text)
            k, lengths = joined_keys(k_text, k, valid)
            v, _ = joined_keys(v_text, v, valid)

        # Queries of image and text come in two calls, so that neither they nor their results are copied.
        def out(queries: jax.Array, name: str) -> jax.Array:
            tokens = attention(queries, k, v, lengths=lengths, implementation=self.implementation)
            tokens = tokens.reshape(*queries.shape[:2], self.config.width)
            return Dense(self.config.width, self.dtype, name=name)(tokens)

        image_out = out(q, "to_out_0")
        if q_text is None or self.context_pre_only:
            return image_out, None
        return image_out, out(q_text, "to_add_out")

    def _heads(self, name: str, x: jax.Array, norm: str | None = None) -> jax.Array:
        """Projects to (B, tokens, N, H) and normalizes queries and keys if the checkpoint does."""
        config = self.config
        y = Dense(config.width, self.dtype, name=name)(x)
        y = y.reshape(*x.shape[:2], config.num_attention_heads, config.attention_head_dim)
        return RMSNorm(name=norm)(y) if norm and config.qk_norm else y


def joined_keys(text: jax.Array, image: jax.Array, valid: Valid) -> tuple[jax.Array, jax.Array | None]:
    """Joins keys or values of both streams, (B, S, N, H) and (B, T, N, H); also returns how many count, if not all."""
    if valid.text is not None:
        return jnp.concatenate([image, text], axis=1), image.shape[1] + valid.text
    lengths = None if valid.image is None else text.shape[1] + valid.image
    return jnp.concatenate([text, image], axis=1), lengths


def padded_text(text: jax.Array) -> tuple[jax.Array, Valid]:
    """Pads text (B, S, ...) to a multiple of 16 tokens for a GPU, so SD3's 333 become 336; also returns which are valid.

    Otherwise every product and every attention would pad its own operands.
    """
    batch, tokens = text.shape[:2]
    if tokens % 16 == 0:
        return text, Valid()
    padded = jnp.pad(text, ((0, 0), (0, -tokens % 16), (0, 0)))
    return padded, Valid(text=jnp.full((batch,), tokens, jnp.int32))


class Block(nn.Module):
    """One MMDiT block: modulated joint attention, then an MLP on each stream."""

    config: MMDiTConfig
    kind: BlockKind
    dtype: DTypeLike
    implementation: Implementation
    placement: Placement | None = None

    @nn.compact
    def __call__(self, streams: Streams, conditioning: jax.Array, valid: Valid) -> tuple[Streams, None]:
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
        from_image, from_text = Attention(*settings, name="attn")(attend(image), text_in, valid)
        attended = image + attend.gate * from_image
        if second:
            attended += second[0].gate * Attention(*settings, name="attn2")(second[0](image), None, valid)[0]
        image = attended + mlp.gate * FeedForward(width, dtype, name="ff")(mlp(attended))
        if from_text is not None:
            text = text + attend_text.gate * from_text
            text = text + mlp_text.gate * FeedForward(width, dtype, name="ff_context")(mlp_text(text))
        return Streams(image, text), None


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


def _kept(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    """What the backward pass keeps unless it recomputes whole blocks: results of linear layers and of flash attention."""
    by_name = jax.checkpoint_policies.save_only_these_names(KEPT)
    return primitive.name.startswith("dot_product_attention_fwd") or by_name(
        primitive, *arguments, **parameters
    )


class MMDiT(nn.Module):
    """The velocity network v(z, t, text).

    Attributes:
      config: sizes, from the checkpoint.
      dtype: computation dtype; parameters are cast on use.
      remat: recompute whole blocks in the backward pass. Otherwise it keeps the results of linear layers and of
        flash attention, and recomputes the rest.
      implementation: see `attention`.
      placement: for sharded parameters; None: XLA decides.
      scanned: loop over runs of identical blocks, whose parameters are stacked. Otherwise every block has its own, see
        `stacks.by_layer`: slower to compile, but on a GPU a loop copies each block's parameters before it uses them.
    """

    config: MMDiTConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    implementation: Implementation = "auto"
    placement: Placement | None = None
    scanned: bool = True

    def setup(self) -> None:
        config = self.config
        whole = partial(gathered, placement=self.placement)
        self.pos_embed = whole(PatchEmbedding)(config, self.dtype)
        self.time_text_embed = whole(TimeTextEmbedding)(config.width, self.dtype)
        self.context_embedder = whole(Dense)(config.width, self.dtype)
        # In a loop, XLA cannot take the backward pass's copy of a block for the forward pass's.
        block = nn.remat(whole(Block), prevent_cse=not self.scanned, policy=None if self.remat else _kept)
        settings = (self.dtype, self.implementation, self.placement)
        if self.scanned:
            self.blocks = [
                nn.scan(
                    block,
                    variable_axes={"params": 0, "lora": 0, "intermediates": 0},
                    split_rngs={"params": True},
                    in_axes=(nn.broadcast, nn.broadcast),
                    length=length,
                )(config, kind, *settings)
                for _, length, kind in config.runs()
            ]
        else:
            self.layers = [block(config, kind, *settings) for kind in config.kinds()]
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
        valid = Valid(image=lengths)
        if lengths is None and is_flash(self.dtype, self.config.attention_head_dim, self.implementation):
            context, valid = padded_text(context)
        streams = Streams(self.pos_embed(patches, positions), self.context_embedder(context))
        for block in self.blocks if self.scanned else self.layers:
            streams, _ = block(streams, conditioning, valid)
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
