"""A transformer with an array per layer: equal to the one that scans stacks, with gradients for the stacks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity import TOLERANCE, error, leaves, random_lora, random_params, uniform
from tsdsr_jax.models import lora
from tsdsr_jax.models.mmdit import MMDiT, MMDiTConfig
from tsdsr_jax.models.params import Tree
from tsdsr_jax.models.stacks import by_layer, variables

# Three runs of blocks, one of them a single block.
CONFIG = MMDiTConfig.tiny(num_layers=5, qk_norm="rms_norm", dual_attention_layers=(0, 1))


def velocity(params: Tree, adapter: Tree, scanned: bool, **options: Any) -> jax.Array:
    inputs = (
        uniform("latents", (2, 8, 12, 16)),
        np.array([1000.0, 321.5], np.float32),
        uniform("context", (2, 21, 48)),
        uniform("pooled", (2, 40)),
    )
    model = MMDiT(CONFIG, scanned=scanned, **options)
    params = params if scanned else by_layer(CONFIG, params)
    made = model.apply(variables(model, params, adapter), *inputs)
    assert isinstance(made, jax.Array)
    return made


@pytest.mark.parametrize("targets", [lora.STUDENT_TARGETS, lora.AUXILIARY_TARGETS])
def test_layers_of_their_own_equal_scanned_ones(targets: tuple[str, ...]) -> None:
    params, adapter = random_params(CONFIG), random_lora(CONFIG, targets, rank=4)
    made, wanted = (
        jax.jit(velocity, static_argnums=2)(params, adapter, scanned) for scanned in (False, True)
    )
    assert error(made, wanted) <= TOLERANCE


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_come_back_in_stacks(remat: bool) -> None:
    params, adapter = random_params(CONFIG), random_lora(CONFIG, lora.STUDENT_TARGETS, rank=4)
    weight = uniform("cotangent", (2, 8, 12, 16))

    def gradient(scanned: bool) -> dict[str, np.ndarray]:
        def loss(adapter: Tree) -> jax.Array:
            return (velocity(params, adapter, scanned, remat=remat) * weight).sum()

        return leaves(jax.jit(jax.grad(loss))(adapter))

    made, wanted = gradient(False), gradient(True)
    assert made.keys() == wanted.keys()
    for path in wanted:
        if wanted[path].any():
            assert error(made[path], wanted[path]) <= TOLERANCE, path
        else:
            assert not made[path].any(), path


@pytest.mark.parametrize("scanned", [False, True])
def test_gradients_are_float32_in_16_bit_training(scanned: bool) -> None:
    """Whatever the layers' form. Values rounded to 16 bits would all be numbers of bfloat16; devices would add up those."""
    params, adapter = random_params(CONFIG), random_lora(CONFIG, lora.STUDENT_TARGETS, rank=4)

    def loss(adapter: Tree) -> jax.Array:
        return jnp.square(velocity(params, adapter, scanned, dtype=jnp.bfloat16).astype(jnp.float32)).mean()

    for path, gradient in leaves(jax.jit(jax.grad(loss))(adapter)).items():
        assert gradient.dtype == np.float32
        rounded = gradient == gradient.astype(jnp.bfloat16)
        # Convolutions' are rounded still.
        assert "pos_embed" in path or rounded.mean() < 0.5 or not gradient.any(), path
