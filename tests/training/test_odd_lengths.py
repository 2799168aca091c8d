"""cuDNN's attention is differentiable only for even numbers of tokens; padding makes training work with any number.

No GPU is needed: a fake replaces JAX's cuDNN attention. It computes with XLA in float32 and refuses what JAX refuses.
Results and gradients with and without padding agree to 1e-6 (max|a − b| / max|b|); the padding adds zeros, so XLA sums in
another order.
"""

from __future__ import annotations

import dataclasses
import types
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_losses as golden
from parity import nhwc, random_lora, random_params, uniform
from tsdsr_jax.models import attention as models_attention
from tsdsr_jax.models import lora
from tsdsr_jax.models.attention import attention
from tsdsr_jax.models.guidance import Text
from tsdsr_jax.models.mmdit import MMDiT, MMDiTConfig, grid_positions
from tsdsr_jax.models.params import Tree
from tsdsr_jax.models.vae import AutoencoderKL
from tsdsr_jax.pretraining.teacher import FlowBase, FlowConfig, FlowDraws, FlowLoss, split_fixed
from tsdsr_jax.training.optimizer import accumulated

TOLERANCE = 1e-6
# Through the layers of a network, in float32.
TOLERANCE_OF_NETWORK, TOLERANCE_OF_LOSS = 3e-6, 1e-5


@dataclasses.dataclass
class Calls:
    """(queries, keys) of the fake's calls, without differentiation (inference) and with it (training)."""

    inference: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    training: list[tuple[int, int]] = dataclasses.field(default_factory=list)


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Replaces the implementation "cudnn" of JAX's attention by one that differentiates only even numbers of tokens."""
    calls, real = Calls(), jax.nn.dot_product_attention

    @jax.custom_vjp
    def stand_in(query, key, value, queries, keys):
        calls.inference.append((query.shape[1], key.shape[1]))
        return on_xla(query, key, value, queries, keys)

    def on_xla(query, key, value, queries, keys):
        lengths = {} if keys is None else dict(query_seq_lengths=queries, key_value_seq_lengths=keys)
        return real(query, key, value, **lengths, implementation="xla")

    def forward(query, key, value, queries, keys):
        if query.shape[1] % 2 or key.shape[1] % 2:
            raise NotImplementedError(f"Unsupported sequence length Q {query.shape[1]}, KV {key.shape[1]}.")
        calls.training.append((query.shape[1], key.shape[1]))
        return jax.vjp(lambda *parts: on_xla(*parts, queries, keys), query, key, value)

    stand_in.defvjp(forward, lambda pullback, cotangent: (*pullback(cotangent), None, None))

    def dispatch(query, key, value, *, implementation, query_seq_lengths=None, key_value_seq_lengths=None):
        if implementation == "cudnn":
            return stand_in(query, key, value, query_seq_lengths, key_value_seq_lengths)
        lengths = dict(query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths)
        return real(query, key, value, **lengths, implementation=implementation)

    nn = types.SimpleNamespace(**vars(jax.nn) | {"dot_product_attention": dispatch})
    monkeypatch.setattr(models_attention.jax, "nn", nn)
    return calls


def assert_equal(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """Compares each tensor relative to its largest value, or to a thousandth of the largest of all tensors.

    The latter is for tensors that nearly cancel, such as the gradient of a key's bias.
    """
    found, expected = (list(map(np.asarray, jax.tree.leaves(tree))) for tree in (found, expected))
    largest = [np.abs(leaf).max() for leaf in expected]
    assert len(found) == len(expected)
    for one, other, own in zip(found, expected, largest, strict=True):
        assert np.abs(one - other).max() <= tolerance * max(own, max(largest) / 1000)


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "remat"),
    [((13, 13), False), ((6, 13), False), ((7, 8), False), ((8, 8), False), ((1, 3), False), ((6, 13), True)],
)
@pytest.mark.parametrize("lengths", [None, (1.0, 0.4, 0.8)])
def test_any_number_of_tokens_is_differentiable(cudnn: Calls, counts, lengths, remat) -> None:
    queries, keys = counts
    q, k, v = (
        uniform(name, (3, count, 2, 16)) for name, count in zip("qkv", (queries, keys, keys), strict=True)
    )
    counted = None if lengths is None else jnp.ceil(jnp.asarray(lengths) * keys).astype(jnp.int32)

    def run(implementation: str) -> Any:
        def total(*parts: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = attention(*parts, lengths=counted, implementation=implementation)
            return (out * uniform("slope", out.shape)).sum(), out

        wrapped = jax.checkpoint(total) if remat else total
        return jax.jit(jax.value_and_grad(wrapped, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    assert_equal(run("cudnn"), run("xla"))
    assert set(cudnn.training) == {(queries + queries % 2, keys + keys % 2)}


def test_the_fake_refuses_odd_numbers(cudnn: Calls) -> None:
    """The premise of this file: without padding, cuDNN's attention cannot be differentiated here."""
    q = uniform("q", (1, 5, 2, 16))
    unpadded = partial(models_attention.jax.nn.dot_product_attention, implementation="cudnn")
    with pytest.raises(NotImplementedError, match="Q 5, KV 5"):
        jax.grad(lambda q: unpadded(q, q, q).sum())(q)


def test_without_gradients_nothing_is_padded(cudnn: Calls) -> None:
    q, k = uniform("q", (2, 6, 2, 16)), uniform("k", (2, 13, 2, 16))
    attention(q, k, k, implementation="cudnn")
    attention(q, k, k, lengths=jnp.array([13, 2]), implementation="cudnn")
    assert cudnn.inference == [(6, 13)] * 2
    assert not cudnn.training


# --- the transformer ------------------------------------------------------------------------------


SD3 = MMDiTConfig.tiny(num_layers=2)
SD3_5 = MMDiTConfig.tiny(num_layers=3, qk_norm="rms_norm", dual_attention_layers=(0,))


# The slow ones passed on 2026-11-28.
@pytest.mark.parametrize(
    ("config", "size", "packed", "remat"),
    [
        pytest.param(SD3, (4, 6), False, True, id="whole-sd3"),
        pytest.param(SD3_5, (6, 6), True, False, id="packed-sd3.5"),
        pytest.param(SD3_5, (4, 6), False, True, id="whole-sd3.5", marks=pytest.mark.slow),
        pytest.param(SD3, (6, 6), True, False, id="packed-sd3", marks=pytest.mark.slow),
    ],
)
def test_the_transformers_gradients_are_unchanged(
    cudnn: Calls, config, size, packed: bool, remat: bool
) -> None:
    params, adapter = random_params(config), random_lora(config, lora.STUDENT_TARGETS, 2, 1)
    tokens = size[0] * size[1] // 4
    patches, context = uniform("patches", (2, tokens, 64)), uniform("text", (2, 7, 48))
    pooled, positions = uniform("pooled", (2, 40)), grid_positions(config, *size)
    lengths = jnp.array([tokens, tokens - 2]) if packed else None

    def run(implementation: str) -> Any:
        network = MMDiT(config, remat=remat, implementation=implementation)

        def total(adapter: Tree) -> tuple[jax.Array, jax.Array]:
            variables = {"params": params, "lora": adapter}
            out = network.apply(
                variables,
                patches,
                positions,
                jnp.array([500.0, 20.0]),
                context,
                pooled,
                lengths,
                method="tokens",
            )
            valid = out if lengths is None else out * (jnp.arange(tokens) < lengths[:, None])[..., None]
            return jnp.square(valid).mean(), valid

        return jax.jit(jax.value_and_grad(total, has_aux=True))(adapter)

    assert_equal(run("cudnn"), run("xla"), TOLERANCE_OF_NETWORK)
    odd = {count for count in (tokens, tokens + 7) if count % 2}
    assert cudnn.training and not odd & {count for call in cudnn.training for count in call}


# --- losses ---------------------------------------------------------------------------------------


def test_distillation_losses_and_gradients_are_unchanged(cudnn: Calls) -> None:
    golden.check("cudnn")
    # Seven tokens of text become 16 before the blocks; queries of image and text come in two calls.
    assert set(cudnn.inference) == set(cudnn.training) == {(6, 22), (16, 22)}


def test_accumulated_gradients_are_unchanged(cudnn: Calls) -> None:
    parts = uniform("parts", (3, 2, 5, 2, 16))

    def run(implementation: str) -> Any:
        def of_part(part: jax.Array) -> jax.Array:
            return jax.grad(lambda q: jnp.square(attention(q, q, q, implementation=implementation)).sum())(
                jnp.take(parts, part, axis=0)
            )

        return jax.jit(lambda: accumulated(of_part, len(parts)))()

    assert_equal(run("cudnn"), run("xla"))


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "base"])
def test_the_teachers_gradients_are_unchanged(cudnn: Calls, adapter: bool) -> None:
    config, data = golden.TRANSFORMER, golden.problem()
    params = random_params(config)
    trained, frozen = (golden.adapter("teacher"), params) if adapter else split_fixed(params)
    text, null = (Text(data[f"{kind}states"], data[f"{kind}pooled"]) for kind in ("", "null_"))
    draws = FlowDraws(nhwc(data["noise"]), jnp.array([10, 900]), jnp.array([True, False]))

    def run(implementation: str) -> Any:
        network = MMDiT(config, implementation=implementation)
        loss = FlowLoss(network, AutoencoderKL(golden.VAE), FlowConfig(), adapter)
        base = FlowBase(frozen, {}, null)
        latents = nhwc(data["latent_hr"])
        return jax.jit(jax.value_and_grad(lambda trained: loss(trained, base, latents, text, draws)))(trained)

    assert_equal(run("cudnn"), run("xla"), TOLERANCE_OF_LOSS)
    assert cudnn.training
