"""The single entry point for attention on every device.

Axes: B batch, Q query tokens, K key tokens, N heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tsdsr_jax.devices import cores

Implementation = Literal["auto", "cudnn", "cpu", "xla"]
_JaxImplementation = Literal["cudnn", "xla"]  # of `jax.nn.dot_product_attention`

_CUDNN_DTYPES = (jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16))
_CUDNN_MAX_HEAD_DIM = 128
# Above this many scores, a few heads at a time are faster: their scores fit in a core's cache.
_LOOP_SCORES = 2**22
# The same for one wide head: from this many keys on, CPUs take this many queries at a time.
_LOOP_QUERIES, _CPU_QUERIES = 2048, 512
# GPUs take at least this many, because each time all keys and values are read: for fewer that takes longer than to multiply.
_GPU_QUERIES = 1024
# Up to this many keys, XLA's softmax on GPUs is one kernel that reads each score once.
_SOFTMAX_KEYS = 2**14


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    lengths: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """softmax(q kᵀ / √H) v, without dropout or causality.

    Args:
      query: (B, Q, N, H).
      key, value: (B, K, N, H).
      lengths: (B,) int; only the first `lengths[b]` keys of row b count, because cuDNN can mask nothing but a prefix
        without materializing a bias. None: all keys count.
      implementation: "cudnn" (flash attention; fp16/bf16 on an NVIDIA GPU), "cpu", "xla", or "auto": the first of these
        that applies.

    Any number of queries and keys is differentiable, although cuDNN itself takes only even ones.

    Returns:
      (B, Q, N, H) in the query's dtype. The softmax runs in float32.
    """
    if implementation == "auto":
        implementation = _first_that_applies(query.dtype, query.shape[-1])
    if implementation == "cpu":
        return _on_cpus(query, key, value, lengths)
    if query.dtype == jnp.float16 and jax.default_backend() != "gpu":
        # JAX would ask for a float16 product summed in float32, which only GPUs have.
        in_float32 = (array.astype(jnp.float32) for array in (query, key, value))
        return attention(*in_float32, lengths=lengths, implementation=implementation).astype(query.dtype)
    if implementation == "cudnn" and (query.shape[1] % 2 or key.shape[1] % 2):
        return _padded_in_training(query, key, value, lengths, implementation)
    return _dot_product(query, key, value, lengths, implementation)


def is_flash(dtype: DTypeLike, head_dim: int, implementation: Implementation) -> bool:
    """Whether `attention` would take cuDNN's."""
    chosen = _first_that_applies(dtype, head_dim) if implementation == "auto" else implementation
    return chosen == "cudnn"


def _first_that_applies(dtype: DTypeLike, head_dim: int) -> Literal["cudnn", "cpu", "xla"]:
    if jnp.dtype(dtype) in _CUDNN_DTYPES and head_dim <= _CUDNN_MAX_HEAD_DIM and _has_flash_attention():
        return "cudnn"
    return "cpu" if jax.default_backend() == "cpu" else "xla"


def _dot_product(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array | None,
    implementation: _JaxImplementation,
) -> jax.Array:
    """JAX's own attention; arguments as in `attention`."""
    if lengths is None:
        return jax.nn.dot_product_attention(query, key, value, implementation=implementation)
    # cuDNN wants both lengths or none, so all queries count, padded or not. On a mesh each device may see this whole array
    # beside its part of the batch; that is harmless because all its values are equal.
    all_queries = jnp.full(lengths.shape, query.shape[1], jnp.int32)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        query_seq_lengths=all_queries,
        key_value_seq_lengths=lengths.astype(jnp.int32),
        implementation=implementation,
    )


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _padded_in_training(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array | None,
    implementation: _JaxImplementation,
) -> jax.Array:
    """Attention that pads odd numbers of queries or keys with a row of zeros, but only when it is differentiated.

    cuDNN evaluates any number of tokens and differentiates even ones only (JAX 0.10 to 0.12 refuse others); SD3 at 512² has
    1024 + 333. The lengths mask a padded key. A padded query's result is cut off, so no gradient enters there.
    """
    return _dot_product(query, key, value, lengths, implementation)


def _padded_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array | None,
    implementation: _JaxImplementation,
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, ...]]]:
    if lengths is None:
        lengths = jnp.full(key.shape[:1], key.shape[1], jnp.int32)

    def padded(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = _dot_product(_to_even(q), _to_even(k), _to_even(v), lengths, implementation)
        return out[:, : query.shape[1]]

    return jax.vjp(padded, query, key, value)


def _padded_backward(
    implementation: _JaxImplementation,
    pullback: Callable[[jax.Array], tuple[jax.Array, ...]],
    cotangent: jax.Array,
) -> tuple[jax.Array | None, ...]:
    return *pullback(cotangent), None  # none for the lengths


_padded_in_training.defvjp(_padded_forward, _padded_backward)


def _to_even(tokens: jax.Array) -> jax.Array:
    """(B, T, N, H) with a row of zeros at the end if T is odd."""
    return jnp.pad(tokens, ((0, 0), (0, tokens.shape[1] % 2), (0, 0), (0, 0)))


def _on_cpus(query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """Attention in float32, a few heads at a time: for 1357 tokens on two cores 3 to 5 times as fast as XLA's own."""
    width = query.shape[-1]
    # Heads come first and the batch second, because on a mesh the batch may be split over devices.
    parts = [
        array.astype(jnp.float32).transpose(2, 0, 1, 3)
        for array in (query.astype(jnp.float32) * width**-0.5, key, value)
    ]
    if lengths is not None:
        # Finite, so that a row without any valid key gives no NaN.
        valid = jnp.arange(key.shape[1]) < lengths[:, None]
        bias = jnp.where(valid, 0.0, jnp.finfo(jnp.float32).min)[:, None]

    def attend(parts: Sequence[jax.Array]) -> jax.Array:
        q, k, v = parts
        scores = q @ k.swapaxes(-1, -2)
        scores = scores if lengths is None else scores + bias
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        return (weights @ v) / weights.sum(-1)[..., None]

    batch, queries, heads, _ = query.shape
    scores = batch * queries * key.shape[1]
    if heads * scores < _LOOP_SCORES:
        out = attend(parts)
    else:
        together = _heads_together(heads, batch, scores)
        groups = [part.reshape(-1, together, *part.shape[1:]) for part in parts]
        out = jax.lax.map(attend, groups).reshape(parts[0].shape)
    return out.transpose(1, 2, 0, 3).astype(query.dtype)


def _heads_together(heads: int, batch: int, scores: int) -> int:
    """How many heads to compute at a time: a divisor of `heads` that gives each core a matrix of scores that fits its cache.

    Args:
      heads, batch: the numbers of both.
      scores: the number of scores per head.
    """
    wanted = max(1, min(heads, -(-cores() // batch), _LOOP_SCORES // scores))
    return next(count for count in range(wanted, 0, -1) if heads % count == 0)


def _has_flash_attention() -> bool:
    """Whether the default devices are NVIDIA GPUs of the Ampere generation or later; JAX itself does not check."""
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.local_devices()[0], "compute_capability", "0")
    try:
        return float(capability) >= 8.0
    except ValueError:  # AMD names its architectures
        return False


def single_head_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    max_scores: int = 2**27,
) -> jax.Array:
    """Attention with one wide head, as in the autoencoder's mid block, in bounded memory.

    The head is 512 wide. cuDNN takes 128, on some GPUs 256, and the head cannot be split, because the softmax needs the
    whole sum over its width. So this runs on XLA, a chunk of queries at a time. Each query's result is independent of the
    others, so chunking is exact.

    Args:
      query, key, value: (B, K, H).
      key_mask: (B, K) bool in any pattern, False for keys that do not count.
      max_scores: the most float32 scores to hold at once, unless a GPU has so many keys that its least chunk needs more.

    Returns:
      (B, K, H) in the query's dtype.
    """
    batch, tokens, width = query.shape
    bias = None if key_mask is None else jnp.where(key_mask, 0.0, -jnp.inf)[:, None, :]
    on_cpu = jax.default_backend() == "cpu"

    def attend(rows: jax.Array) -> jax.Array:
        scores = jnp.einsum("bqh,bkh->bqk", rows, key, preferred_element_type=jnp.float32) / width**0.5
        scores = scores if bias is None else scores + bias
        if not on_cpu and tokens <= _SOFTMAX_KEYS:
            weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
            return jnp.einsum("bqk,bkh->bqh", weights, value)
        # Dividing after the product saves a pass over the scores. It also keeps weights among many keys from becoming so
        # small that float16 loses their digits.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        weights = weights if on_cpu else weights.astype(value.dtype)
        out = jnp.einsum("bqk,bkh->bqh", weights, value, preferred_element_type=jnp.float32)
        return (out / total).astype(value.dtype)

    chunk = _queries_together(batch, tokens, max_scores)
    if chunk >= tokens:
        return attend(query)
    chunks = -(-tokens // chunk)
    chunk = -(-tokens // chunks)
    padded = jnp.pad(query, ((0, 0), (0, chunks * chunk - tokens), (0, 0)))
    stacked = padded.reshape(batch, chunks, chunk, width).swapaxes(0, 1)
    result = jax.lax.map(attend, stacked).swapaxes(0, 1)
    return result.reshape(batch, chunks * chunk, width)[:, :tokens]


def _queries_together(batch: int, tokens: int, max_scores: int) -> int:
    """How many queries of each image to take at a time."""
    chunk = max(1, max_scores // (batch * tokens))
    if jax.default_backend() != "cpu":
        return max(chunk, _GPU_QUERIES)
    return min(chunk, _CPU_QUERIES) if tokens >= _LOOP_QUERIES else chunk
