"""Convolutions: up-sampling by phases, and the gradients that CPUs get."""

import jax
import jax.numpy as jnp
import pytest

from parity import error, uniform
from tsdsr_jax.models import convolution as module
from tsdsr_jax.models.convolution import convolution, upsampling_convolution


@pytest.mark.parametrize("size", [(1, 1, 2, 3), (5, 7, 6, 4), (8, 2, 3, 1)])
def test_phases_equal_the_convolution_of_the_enlarged_map(size):
    height, width, channels, features = size
    x, kernel = uniform("x", (2, height, width, channels)), uniform("kernel", (3, 3, channels, features))
    enlarged = convolution(jnp.asarray(x).repeat(2, 1).repeat(2, 2), kernel, 1, (1, 1))
    assert error(upsampling_convolution(x, jnp.asarray(kernel)), enlarged) <= 1e-6


@pytest.mark.parametrize(
    ("shape", "side", "stride", "padding"),
    [
        ((2, 8, 6, 3), 3, 1, (1, 1)),
        ((1, 64, 80, 5), 3, 1, (1, 1)),  # several parts, the last of them not full
        ((1, 50, 64, 2), 3, 2, (0, 1)),
        ((2, 64, 48, 5), 3, 2, (0, 1)),
        ((1, 7, 9, 3), 3, 2, (0, 1)),  # odd sides
        ((1, 6, 8, 2), 3, 2, (1, 1)),
        ((2, 40, 60, 3), 1, 1, (0, 0)),
    ],
)
def test_gradients_equal_xlas_own(shape, side, stride, padding):
    """Float32, another order of summation; 5e-7 measured."""
    x, kernel = jnp.asarray(uniform("x", shape)), jnp.asarray(uniform("kernel", (side, side, shape[3], 4)))
    slope = uniform("slope", jax.eval_shape(lambda: module._convolution(x, kernel, stride, padding)).shape)

    def gradients(function):
        def total(x, kernel):
            return (function(x, kernel, stride, padding) * slope).sum()

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(x, kernel)

    (ours, mine), (plain, theirs) = gradients(module._for_cpus), gradients(module._convolution)
    assert error(ours, plain) <= 1e-6
    assert all(error(*pair) <= 3e-6 for pair in zip(mine, theirs, strict=True))


def test_half_precision_gradients_keep_their_dtypes():
    x, kernel = (jnp.asarray(uniform(name, (3, 3, 3, 3)), jnp.bfloat16) for name in ("x", "kernel"))

    def total(x, kernel):
        return convolution(x, kernel, 1, (1, 1)).astype(jnp.float32).sum()

    slopes = jax.grad(total, argnums=(0, 1))(x, kernel)
    assert [slope.dtype for slope in slopes] == [jnp.bfloat16] * 2
