"""Linear layers whose kernels may be stored in eight bits.

int8 saves memory: each output has a scale, and kernels are widened before the product.

fp8 saves time, too. Kernels and inputs are rounded to e4m3 (four exponent and three mantissa bits, at most 448), with one
scale each, in the form that XLA compiles to an fp8 product for GPUs that have them (compute capability 8.9 and above). Other
devices widen the rounded numbers. As e4m3 is a floating-point format, a scale only has to keep values in its range: scales
per output or from measured inputs are no more accurate. So they follow from the weights alone, by a bound that no input
exceeds, and they are powers of two, which round nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike, DTypeLike

EightBits = Literal["int8", "fp8"]
E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0
SMALLEST_EXPONENT = -24  # of float16


class StoredDense(nn.Module):
    """y = x W + b with a kernel as it was given to `quantized` or as that returned it.

    The inputs of an fp8 product are normalized, or `input_scale` is among the parameters.
    """

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., in) -> (..., out)."""
        kernel: jax.Array = self.get_variable("params", "kernel")
        bias: jax.Array = self.get_variable("params", "bias").astype(self.dtype)
        scale: jax.Array | None = self.get_variable("params", "scale")
        x = x.astype(self.dtype)
        if scale is not None and kernel.dtype == E4M3:
            input_scale = self.get_variable("params", "input_scale", normalized_scale(x.shape[-1]))
            x = _widened(_rounded(x, input_scale), input_scale, self.dtype)
            kernel = _widened(kernel, scale, self.dtype)
            return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (1,)), ((), ()))) + bias
        if scale is not None:
            kernel = kernel.astype(jnp.float32) * scale
        return x @ kernel.astype(self.dtype) + bias


def quantized(
    params: Mapping[str, Any],
    kind: EightBits,
    dtype: DTypeLike,
    largest_inputs: Mapping[tuple[str, ...], ArrayLike],
) -> dict[str, Any]:
    """Stores the kernels of `StoredDense` layers in eight bits, with float32 scales.

    Args:
      params: a tree of layers in float32, kernels (in, out).
      kind: "int8" gives kernels (in, out) and scales (out,), "fp8" kernels (out, in) and scales ().
      dtype: of all other leaves.
      largest_inputs: for fp8, a bound on the absolute inputs of the layers, by path, that do not follow `layer_norm`.
    """
    leaves = {}
    for path, leaf in flatten_dict(params).items():
        *layer, name = path
        if name != "kernel":
            leaves[path] = leaf.astype(dtype)
            continue
        leaves[path], leaves[(*layer, "scale")] = _int8(leaf) if kind == "int8" else _fp8(leaf)
        if kind == "fp8" and tuple(layer) in largest_inputs:
            leaves[(*layer, "input_scale")] = _fitting_scale(largest_inputs[tuple(layer)])
    return unflatten_dict(leaves)


def largest_output(dense: Mapping[str, jax.Array]) -> jax.Array:
    """A bound on a layer's absolute outputs if its inputs are normalized: |x·w + b| ≤ √in ‖w‖ + |b|."""
    kernel = dense["kernel"]
    norms = jnp.linalg.norm(kernel, axis=0)
    return (math.sqrt(kernel.shape[0]) * norms + jnp.abs(dense["bias"])).max()


def normalized_scale(width: int) -> jax.Array:
    """The scale for results of `layer_norm`, which are at most √width. As a constant, all layers can share the numbers."""
    return _fitting_scale(math.sqrt(width))


def _int8(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    scale = jnp.maximum(jnp.abs(kernel).max(0), 1e-30) / 127
    return jnp.round(kernel / scale).astype(jnp.int8), scale


def _fp8(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    scale = _fitting_scale(jnp.abs(kernel).max())
    return _rounded(kernel.T, scale), scale


def _rounded(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / scale in e4m3. Larger values become the largest one: e4m3 has no infinity, and XLA would make them NaN."""
    return jnp.clip(x.astype(jnp.float32) / scale, -E4M3_MAX, E4M3_MAX).astype(E4M3)


def _widened(x: jax.Array, scale: jax.Array, dtype: DTypeLike) -> jax.Array:
    return x.astype(dtype) * scale.astype(dtype)


def _fitting_scale(largest: ArrayLike) -> jax.Array:
    """A power of two that brings values up to `largest` into e4m3's range; at least float16's smallest number."""
    exponent = jnp.frexp(jnp.asarray(largest, jnp.float32) / E4M3_MAX)[1]
    return jnp.ldexp(jnp.float32(1), jnp.maximum(exponent, SMALLEST_EXPONENT))
