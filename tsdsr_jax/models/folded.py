"""SD3's transformer specialized to one timestep and one prompt.

Upscaling always runs at t = 1000 and with the same prompt. So every AdaLN modulation is a constant that the adjacent linear
layers can absorb:

    (LN(x)·(1 + s) + t) W + b = LN(x) W' + b'       W' = diag(1 + s) W      b' = b + t W
    g·(x W + b)               = x W″ + b″           W″ = W diag(g)          b″ = g·b

The text stream, too, begins as a constant, and so do the first block's queries, keys and values of the text. 1.33 of
SD3-medium's 2.03 billion parameters remain (without the position table). The only elementwise passes left are norms, GELU
and residuals, and a single product yields keys and values.

Axes as in `mmdit.py`: B batch, T image tokens, S text tokens, N heads, H head dim, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jax.typing import ArrayLike, DTypeLike

from tsdsr_jax.models.attention import Implementation, attention, is_flash
from tsdsr_jax.models.conditioning import TimeTextEmbedding
from tsdsr_jax.models.eight_bits import EightBits, StoredDense, largest_output, quantized
from tsdsr_jax.models.layers import Dense, RMSNorm, layer_norm
from tsdsr_jax.models.mmdit import (
    BlockKind,
    MMDiTConfig,
    PatchEmbedding,
    Streams,
    Valid,
    joined_keys,
    padded_text,
)

# Raise it when `fold` makes other parameters than before: files made by convert/sd3.py --fold must not be used then.
FOLD_LAYOUT = 1

ParamTree = Mapping[str, Any]


class FoldedAttention(nn.Module):
    """Attention over the image tokens, or over text and image tokens together.

    Attributes:
      text_queries: whether the text, if there is one, has queries beside its keys and values: in all blocks but the last.
      constant: the text's queries, keys and values are parameters, (S, N, H) each; `text` only tells how far to pad them.
    """

    config: MMDiTConfig
    text_queries: bool
    constant: bool
    dtype: DTypeLike
    implementation: Implementation

    @nn.compact
    def __call__(
        self, image: jax.Array, text: jax.Array | None, valid: Valid
    ) -> tuple[jax.Array, jax.Array | None]:
        """Normalized image (B, T, D) and text (B, S, D) -> what to add to each stream; None for the text if it has no
        queries."""
        batch = image.shape[0]
        (q,) = self._projected("q", image, ("norm_q",))
        k, v = self._projected("kv", image, ("norm_k", None))
        q_text, lengths = None, valid.image
        if text is not None:
            *queries, k_text, v_text = self._text(text, batch)
            q_text = queries[0] if queries else None
            k, lengths = joined_keys(k_text, k, valid)
            v, _ = joined_keys(v_text, v, valid)
        attend = partial(attention, key=k, value=v, lengths=lengths, implementation=self.implementation)

        # Queries of image and text come in two calls, so that neither they nor their results are copied.
        def out(queries: jax.Array, name: str) -> jax.Array:
            tokens = attend(queries).reshape(*queries.shape[:2], self.config.width)
            return StoredDense(self.dtype, name=name)(tokens)

        return out(q, "to_out"), None if q_text is None else out(q_text, "to_add_out")

    def _text(self, text: jax.Array, batch: int) -> list[jax.Array]:
        """The text's keys and values, (B, S, N, H) each; its queries before them, if it has any."""
        wanted = ("q", "k", "v") if self.text_queries else ("k", "v")
        if not self.constant:
            queries = self._projected("add_q", text, ("norm_added_q",)) if self.text_queries else []
            return queries + self._projected("add_kv", text, ("norm_added_k", None))
        shape = (self.config.num_attention_heads, self.config.attention_head_dim)
        # Not `self.param`: the parameters decide on the number of tokens, not the module.
        parts: list[jax.Array] = [
            self.get_variable("params", f"text_{part}").astype(self.dtype) for part in wanted
        ]
        padding = text.shape[1] - parts[0].shape[0]
        padded = (jnp.pad(part, ((0, padding), (0, 0), (0, 0))) for part in parts)
        return [jnp.broadcast_to(part, (batch, text.shape[1], *shape)) for part in padded]

    def _projected(self, name: str, x: jax.Array, norms: Sequence[str | None]) -> list[jax.Array]:
        """Several projections in one product; normalizes queries and keys if the checkpoint does."""
        config = self.config
        y = StoredDense(self.dtype, name=name)(x)
        y = y.reshape(*x.shape[:2], len(norms), config.num_attention_heads, config.attention_head_dim)
        parts = [y[:, :, index] for index in range(len(norms))]
        return [
            RMSNorm(name=norm)(part) if norm and config.qk_norm else part
            for part, norm in zip(parts, norms, strict=True)
        ]


class FoldedFeedForward(nn.Module):
    """Linear, GELU (tanh), linear."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = StoredDense(self.dtype, name="net_0")(x)
        return StoredDense(self.dtype, name="net_2")(nn.gelu(x, approximate=True))


class FoldedBlock(nn.Module):
    """A block without modulations; the first block's text is a constant."""

    config: MMDiTConfig
    kind: BlockKind
    first: bool
    dtype: DTypeLike
    implementation: Implementation

    @nn.compact
    def __call__(self, streams: Streams, valid: Valid) -> Streams:
        config, dtype = self.config, self.dtype
        image, text = streams
        normed = layer_norm(image)
        attend = partial(FoldedAttention, config, dtype=dtype, implementation=self.implementation)
        from_image, from_text = attend(
            text_queries=not self.kind.context_pre_only, constant=self.first, name="attn"
        )(normed, text if self.first else layer_norm(text), valid)
        image = image + from_image
        if self.kind.dual_attention:
            image += attend(text_queries=False, constant=False, name="attn2")(normed, None, valid)[0]
        image += FoldedFeedForward(dtype, name="ff")(layer_norm(image))
        if from_text is not None:
            text = text + from_text
            text += FoldedFeedForward(dtype, name="ff_context")(layer_norm(text))
        return Streams(image, text)


class FoldedMMDiT(nn.Module):
    """v(z, t = 1000, prompt) for packed tokens; `fold` makes its parameters.

    Attributes:
      config: sizes, from the checkpoint.
      dtype: computation dtype.
      implementation: see `attention`.
    """

    config: MMDiTConfig
    dtype: DTypeLike = jnp.float32
    implementation: Implementation = "auto"

    def setup(self) -> None:
        config = self.config
        self.pos_embed = PatchEmbedding(config, self.dtype)
        self.layers = [
            FoldedBlock(config, kind, layer == 0, self.dtype, self.implementation)
            for layer, kind in enumerate(config.kinds())
        ]
        self.proj_out = Dense(config.patch_size**2 * config.out_channels, self.dtype)

    def __call__(
        self, patches: jax.Array, positions: jax.Array, lengths: jax.Array | None = None
    ) -> jax.Array:
        """(B, T, p·p·C) -> (B, T, p·p·out_channels) velocity patches; arguments as of `MMDiT.tokens`."""
        image = self.pos_embed(patches, positions)
        text: jax.Array = self.get_variable("params", "text").astype(self.dtype)
        text, valid = jnp.broadcast_to(text, (image.shape[0], *text.shape)), Valid(image=lengths)
        if lengths is None and is_flash(self.dtype, self.config.attention_head_dim, self.implementation):
            text, valid = padded_text(text)
        streams = Streams(image, text)
        for block in self.layers:
            streams = block(streams, valid)
        return self.proj_out(layer_norm(streams.image))


# --- folding --------------------------------------------------------------------------------------


def fold(
    config: MMDiTConfig,
    params: ParamTree,
    context: ArrayLike,
    pooled: ArrayLike,
    timestep: float,
    dtype: DTypeLike,
    eight_bits: EightBits | None = None,
    sharding: Sharding | None = None,
) -> ParamTree:
    """Computes the parameters of `FoldedMMDiT` from those of `MMDiT` with its LoRA merged; see `fold_parts`."""
    return dict(
        fold_parts(config, parts_of(config, params), context, pooled, timestep, dtype, eight_bits, sharding)
    )


def parts_of(config: MMDiTConfig, params: ParamTree) -> Iterator[ParamTree]:
    """`MMDiT`'s parameters outside of its blocks, and then those of each block."""
    yield {name: part for name, part in params.items() if not name.startswith("blocks_")}
    for run, (_, length, _) in enumerate(config.runs()):
        for index in range(length):
            yield jax.tree.map(lambda leaf, index=index: leaf[index], params[f"blocks_{run}"])


def fold_parts(
    config: MMDiTConfig,
    parts: Iterable[ParamTree],
    context: ArrayLike,
    pooled: ArrayLike,
    timestep: float,
    dtype: DTypeLike,
    eight_bits: EightBits | None = None,
    sharding: Sharding | None = None,
) -> Iterator[tuple[str, Any]]:
    """Yields the entries of `FoldedMMDiT`'s parameter tree, computed in float32, each when the part that it needs arrives.

    Args:
      config: sizes.
      parts: as `parts_of` yields them, on the host or on the devices, in any dtype.
      context, pooled: the prompt, (S, joint_attention_dim) and (pooled_projection_dim,).
      timestep: in 0...1000.
      dtype: of the result.
      eight_bits: store the blocks' kernels in eight bits instead, see `models.eight_bits`. The first and the last layer,
        which are small and see the latents themselves, stay in `dtype`.
      sharding: of every leaf of the result; None: JAX's default device, or where the parts are.
    """
    put = partial(jax.device_put, device=sharding)
    remaining = iter(parts)
    made, conditioning, text = _fold_ends(
        put(next(remaining)), put(context), put(pooled), timestep, dtype=dtype
    )
    yield from made.items()
    for layer, (kind, block) in enumerate(zip(config.kinds(), remaining, strict=True)):
        stored = _stored_block(
            *(put(block), conditioning, text if layer == 0 else None),
            config=config,
            kind=kind,
            dtype=dtype,
            eight_bits=eight_bits,
        )
        # Without waiting, the next parts would be copied to the device while this one still takes memory there.
        yield f"layers_{layer}", jax.block_until_ready(stored)


@partial(jax.jit, static_argnames="dtype")
@jax.default_matmul_precision("highest")
def _fold_ends(
    params: ParamTree, context: jax.Array, pooled: jax.Array, timestep: float, dtype: DTypeLike
) -> tuple[dict[str, Any], jax.Array, jax.Array]:
    """The parameters before and after the blocks, and the conditioning (D,) and text (S, D) to fold the blocks with."""
    context, pooled = context.astype(jnp.float32), pooled.astype(jnp.float32)
    text = _linear(_float32(params["context_embedder"]), context)
    conditioning_params = _float32(params["time_text_embed"])
    embed = TimeTextEmbedding(text.shape[-1], jnp.float32)
    vector: Any = embed.apply({"params": conditioning_params}, jnp.full((1,), timestep), pooled[None])
    conditioning = nn.silu(vector)[0]
    scale, shift = jnp.split(_linear(_float32(params["norm_out"]["linear"]), conditioning), 2)
    made = {
        "pos_embed": params["pos_embed"],
        "text": text,
        "proj_out": _before(_float32(params["proj_out"]), shift, scale),
    }
    return jax.tree.map(lambda leaf: leaf.astype(dtype), made), conditioning, text


@partial(jax.jit, static_argnames=("config", "kind", "dtype", "eight_bits"))
@jax.default_matmul_precision("highest")
def _stored_block(
    block: ParamTree,
    conditioning: jax.Array,
    text: jax.Array | None = None,
    *,
    config: MMDiTConfig,
    kind: BlockKind,
    dtype: DTypeLike,
    eight_bits: EightBits | None,
) -> ParamTree:
    """Folds a block and casts or quantizes it for storage."""
    folded = _fold_block(config, kind, conditioning, block, text)
    if eight_bits is None:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), folded)
    return quantized(folded, eight_bits, dtype, _largest_inputs(folded))


def _largest_inputs(folded: ParamTree) -> dict[tuple[str, ...], jax.Array]:
    """Bounds on the absolute inputs of a folded block's layers that do not follow `layer_norm`, by path."""
    bounds = dict[tuple[str, ...], jax.Array]()
    for name, part in folded.items():
        if name in ("ff", "ff_context"):
            bounds[name, "net_2"] = largest_output(part["net_0"])  # GELU makes no number larger
        else:
            bounds[name, "to_out"] = bounds[name, "to_add_out"] = _largest_value(part)
    return bounds


def _largest_value(attn: ParamTree) -> jax.Array:
    """A bound on attention's absolute values, which its results, being means of them, do not exceed."""
    bounds = [
        largest_output({part: jnp.split(leaf, 2, axis=-1)[1] for part, leaf in attn[name].items()})
        for name in ("kv", "add_kv")
        if name in attn
    ]
    if "text_v" in attn:
        bounds.append(jnp.abs(attn["text_v"]).max())
    return jnp.stack(bounds).max()


def _fold_block(
    config: MMDiTConfig,
    kind: BlockKind,
    conditioning: jax.Array,
    block: ParamTree,
    text: jax.Array | None = None,
) -> dict[str, Any]:
    """Folds one block, in float32. If a text (S, D) is given, it is the first block, whose projections of the text are
    constants."""
    block = _float32(block)

    def vectors(name: str) -> list[jax.Array]:
        vector = _linear(block[name]["linear"], conditioning)
        return jnp.split(vector, vector.size // config.width)

    # The checkpoint stores modulations as (shift, scale, gate), and those without a gate as (scale, shift).
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *second = vectors("norm1")
    if kind.context_pre_only:
        text_scale, text_shift = vectors("norm1_context")
    else:
        text_shift, text_scale, text_gate, *text_mlp = vectors("norm1_context")
    attn = block["attn"]
    parts = ("k", "v") if kind.context_pre_only else ("q", "k", "v")
    added = {part: _before(attn[f"add_{part}_proj"], text_shift, text_scale) for part in parts}
    folded_attn = _image_attention(attn, shift, scale, gate)
    if text is None:
        folded_attn["add_kv"] = _joined(added["k"], added["v"])
        if "q" in added:
            folded_attn["add_q"] = added["q"]
        folded_attn |= {name: attn[name] for name in ("norm_added_q", "norm_added_k") if name in attn}
        if kind.context_pre_only:
            folded_attn.pop("norm_added_q", None)
    else:
        normed = layer_norm(text)
        for part, dense in added.items():
            heads = _linear(dense, normed).reshape(-1, config.num_attention_heads, config.attention_head_dim)
            norm = attn.get(f"norm_added_{part}")
            folded_attn[f"text_{part}"] = heads if norm is None else RMSNorm().apply({"params": norm}, heads)
    folded = {"attn": folded_attn, "ff": _feed_forward(block["ff"], mlp_shift, mlp_scale, mlp_gate)}
    if not kind.context_pre_only:
        folded_attn["to_add_out"] = _after(attn["to_add_out"], text_gate)
        folded["ff_context"] = _feed_forward(block["ff_context"], *text_mlp)
    if second:
        folded["attn2"] = _image_attention(block["attn2"], *second)
    return folded


def _image_attention(attn: ParamTree, shift: jax.Array, scale: jax.Array, gate: jax.Array) -> dict[str, Any]:
    q, k, v = (_before(attn[name], shift, scale) for name in ("to_q", "to_k", "to_v"))
    norms = {name: attn[name] for name in ("norm_q", "norm_k") if name in attn}
    return {"q": q, "kv": _joined(k, v), "to_out": _after(attn["to_out_0"], gate)} | norms


def _feed_forward(ff: ParamTree, shift: jax.Array, scale: jax.Array, gate: jax.Array) -> ParamTree:
    return {"net_0": _before(ff["net_0"]["proj"], shift, scale), "net_2": _after(ff["net_2"], gate)}


def _linear(dense: ParamTree, x: jax.Array) -> jax.Array:
    return x @ dense["kernel"] + dense["bias"]


def _before(dense: ParamTree, shift: jax.Array, scale: jax.Array) -> ParamTree:
    """The layer whose output for LN(x) is this layer's output for LN(x)·(1 + scale) + shift."""
    kernel = dense["kernel"]
    return {"kernel": (1 + scale)[:, None] * kernel, "bias": dense["bias"] + shift @ kernel}


def _after(dense: ParamTree, gate: jax.Array) -> ParamTree:
    """The layer whose output is `gate` times this layer's."""
    return {"kernel": dense["kernel"] * gate, "bias": dense["bias"] * gate}


def _joined(*parts: ParamTree) -> ParamTree:
    return {name: jnp.concatenate([part[name] for part in parts], axis=-1) for name in ("kernel", "bias")}


def _float32(tree: ParamTree) -> ParamTree:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
