"""The networks against stored answers of diffusers and PEFT (support/golden_networks.py writes them); needs no torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_networks as golden
from parity import TOLERANCE, error, random_params, uniform
from tsdsr_jax.models import lora
from tsdsr_jax.models.mmdit import MMDiT
from tsdsr_jax.models.params import Tree
from tsdsr_jax.models.vae import AutoencoderKL


@pytest.fixture(scope="module")
def answers() -> dict[str, np.ndarray]:
    with np.load(golden.FILE) as file:
        return dict(file)


def test_file_is_small_and_complete(answers: dict[str, np.ndarray]) -> None:
    assert golden.FILE.stat().st_size < 60_000
    networks = {f"{style}/{name}" for style in golden.TRANSFORMERS for name in golden.ADAPTERS}
    assert answers.keys() == networks | {"vae/encoder", "vae/adapted encoder", "vae/decoder"}


def test_drawn_numbers_are_those_of_the_generator() -> None:
    """If this fails, so does all below, and it is the random numbers that changed."""
    expected = [-0.6548909544944763, 1.2239655256271362, 0.8773454427719116, -0.01723397709429264]
    np.testing.assert_array_equal(uniform("latents", (2, 2)).reshape(-1), np.array(expected, np.float32))


@pytest.mark.parametrize("style", golden.TRANSFORMERS)
def test_transformer(answers: dict[str, np.ndarray], style: str) -> None:
    """Plain, with the student's and with the auxiliary adapter, applied; the student's merged as well."""
    config = golden.TRANSFORMERS[style]
    params = random_params(config)
    text = golden.draw("context"), golden.draw("pooled")

    @jax.jit
    def run(variables: Tree) -> jax.Array:
        return MMDiT(config).apply(variables, golden.draw("latents"), golden.TIMESTEP, *text)[..., ::4]

    assert error(run({"params": params}), answers[f"{style}/plain"]) <= TOLERANCE
    for name in ("student", "auxiliary"):
        adapter = golden.transformer_adapter(style, name)
        assert error(run({"params": params, "lora": adapter}), answers[f"{style}/{name}"]) <= TOLERANCE
        assert error(answers[f"{style}/{name}"], answers[f"{style}/plain"]) > 0.03
    merged = lora.merge(params, golden.transformer_adapter(style, "student"))
    assert error(run({"params": merged}), answers[f"{style}/student"]) <= TOLERANCE


def test_autoencoder(answers: dict[str, np.ndarray]) -> None:
    params = random_params(golden.VAE)
    model = AutoencoderKL(golden.VAE)

    @jax.jit
    def encode(variables: Tree) -> jax.Array:
        return jnp.concatenate(model.apply(variables, golden.draw("image"), method="encode"), axis=-1)

    decoded = jax.jit(lambda p: model.apply({"params": p}, golden.draw("code"), method="decode"))(params)
    assert error(decoded, answers["vae/decoder"]) <= TOLERANCE
    assert error(encode({"params": params}), answers["vae/encoder"]) <= TOLERANCE
    adapted = encode({"params": params, "lora": golden.vae_adapter()})
    assert error(adapted, answers["vae/adapted encoder"]) <= TOLERANCE
    assert error(answers["vae/adapted encoder"], answers["vae/encoder"]) > 0.03
