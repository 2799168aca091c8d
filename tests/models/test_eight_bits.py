"""Layers stored in eight bits: within the format's rounding errors, at the edges of its range, in every precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity import error, uniform
from tsdsr_jax.models.eight_bits import E4M3, E4M3_MAX, StoredDense, largest_output, quantized
from tsdsr_jax.models.layers import layer_norm

NORMALIZED: dict = {}


def stored(kernel, bias, kind, largest_inputs=NORMALIZED):
    layer = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
    return quantized({"layer": layer}, kind, jnp.float32, largest_inputs)["layer"]


def apply(layer, x, dtype=jnp.float32):
    return np.asarray(jax.jit(StoredDense(dtype).apply)({"params": layer}, x), np.float32)


@pytest.mark.parametrize(("kind", "relative"), [("int8", 0.5 / 127), ("fp8", 2.0**-4)])
def test_quantized_kernels(kind, relative):
    """Every weight within half a step: of int8, of the output's largest; of e4m3, of the weight itself."""
    kernel = uniform("kernel", (40, 5)) * np.linspace(0.01, 100, 5, dtype=np.float32)
    kernel[:, 2] = 0
    made = stored(kernel, np.zeros(5, np.float32), kind)
    assert (made["kernel"].dtype, made["kernel"].shape, made["scale"].shape) == (
        (jnp.int8, (40, 5), (5,)) if kind == "int8" else (E4M3, (5, 40), ())
    )
    back = np.asarray(made["kernel"].astype(jnp.float32))
    back = (back if kind == "int8" else back.T) * np.asarray(made["scale"])
    # Below e4m3's smallest normal number, 2⁻⁶, steps are absolute.
    allowed = np.abs(kernel).max(0) if kind == "int8" else np.maximum(np.abs(kernel), 2.0**-6 * made["scale"])
    assert (np.abs(back - kernel) <= relative * allowed * (1 + 1e-5)).all()
    assert not back[:, 2].any()

    x = layer_norm(jnp.asarray(uniform("x", (2, 40))))
    rounded = x if kind == "int8" else np.asarray((16 * x).astype(E4M3).astype(jnp.float32)) / 16
    assert error(apply(made, x), rounded @ back) <= 1e-6


def test_fp8_products_are_within_both_factors_rounding_errors():
    """3.7 % measured. Errors are spread over ±2⁻⁴ of a number at most, which is 2⁻⁴/√3 in root mean square, for two
    factors √2 as much."""
    kernel, x = uniform("kernel", (1536, 64)), layer_norm(jnp.asarray(uniform("x", (32, 1536))))
    wanted = np.asarray(x) @ kernel
    made = apply(stored(kernel, np.zeros(64, np.float32), "fp8"), x)
    apart = np.sqrt(np.square(made - wanted).mean() / np.square(wanted).mean())
    assert 0.02 < apart <= 2**-4 * np.sqrt(2 / 3)


@pytest.mark.parametrize("unit", [2.0**-10, 2.0**10])
def test_fp8_products_do_not_depend_on_the_unit_of_inputs(unit):
    kernel, bias, x = uniform("kernel", (96, 8)), np.zeros(8, np.float32), uniform("x", (4, 96))
    wanted = apply(stored(kernel, bias, "fp8", {("layer",): 3.0}), x)
    assert np.array_equal(apply(stored(kernel / unit, bias, "fp8", {("layer",): 3 * unit}), x * unit), wanted)


def test_inputs_beyond_the_range_become_its_ends():
    """e4m3 has no infinity. What is not a number stays so, for the engine to see."""
    layer = stored(np.eye(4, dtype=np.float32), np.zeros(4, np.float32), "fp8", {("layer",): E4M3_MAX - 1})
    x = np.float32([[448, 449, 1e30, np.inf], [-448, -449, -1e30, -np.inf]])
    assert np.array_equal(apply(layer, x), np.sign(x) * E4M3_MAX)
    assert np.isnan(apply(layer, np.float32([[1, np.nan, 2, 3]]))).all()


@pytest.mark.parametrize("width", [16, 64, 100, 1536])
def test_normalized_inputs_are_never_beyond_the_range(width):
    """The largest that a layer norm returns: one number among zeros."""
    x = layer_norm(100 * jnp.eye(width, dtype=jnp.float32)[:1])
    layer = stored(np.eye(width, dtype=np.float32), np.zeros(width, np.float32), "fp8")
    assert np.sqrt(width - 1) * (1 - 1e-3) <= x.max() <= np.sqrt(width)
    assert abs(apply(layer, x).max() / x.max() - 1) <= 2**-4


def test_bound_on_outputs():
    """Reached by the input that is parallel to a column of weights."""
    kernel, bias = uniform("kernel", (48, 6)), uniform("bias", (6,))
    outputs = np.sqrt(48) * np.linalg.norm(kernel, axis=0) + np.abs(bias)
    bound = largest_output({"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)})
    assert bound == pytest.approx(outputs.max(), rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_widens_the_same_numbers(dtype):
    """Scales are powers of two, so only the product's result is rounded."""
    layer = stored(uniform("kernel", (64, 8)), uniform("bias", (8,)), "fp8")
    x = layer_norm(jnp.asarray(uniform("x", (4, 64))).astype(dtype))
    assert error(apply(layer, x, dtype), apply(layer, x)) <= 2 * jnp.finfo(dtype).eps


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_small_kernels_keep_their_digits_in_half_precision(kind):
    """Behind a gate near zero an int8 scale is below float16's smallest normal number."""
    kernel = np.full((64, 2), 3e-6, np.float32)
    layer = stored(kernel, np.zeros(2, np.float32), kind, {("layer",): 1000.0})
    made = apply(layer, np.full((1, 64), 1000, np.float16), jnp.float16)
    assert error(made, np.full((1, 2), 64 * 1000 * 3e-6)) <= 0.07


def test_kernels_of_zeros_stay_finite():
    for kind in ("int8", "fp8"):
        layer = stored(np.zeros((8, 2)), np.ones(2, np.float32), kind, {("layer",): 0.0})
        assert np.array_equal(apply(layer, np.ones((1, 8), np.float32)), np.ones((1, 2)))
