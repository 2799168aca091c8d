"""Adapters: what they cover (PEFT decides), how they start, scale and merge."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from parity import config_of, leaves, random_lora, random_params, uniform
from tsdsr_jax.models import lora
from tsdsr_jax.models.layers import trained_product
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import Config, Tree, abstract_params
from tsdsr_jax.models.vae import VAEConfig
from tsdsr_jax.weights import torch_names

pytest_plugins = "parity"

SD35 = dict(qk_norm="rms_norm", dual_attention_layers=(0, 1))
OUR_TARGETS = {
    "student": lora.STUDENT_TARGETS,
    "aux": lora.AUXILIARY_TARGETS,
    "vae": lora.VAE_ENCODER_TARGETS,
}


# --- what is covered ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "overrides"), [("student", {}), ("student", SD35), ("aux", {}), ("aux", SD35), ("vae", {})]
)
def test_targets_cover_what_peft_adapts(oracle: Any, kind: str, overrides: dict[str, Any]) -> None:
    model = oracle.tiny_vae(1) if kind == "vae" else oracle.tiny_transformer(1, **overrides)
    config = config_of(model)
    getattr(oracle, f"add_{kind}_lora")(model, rank=3, seed=2)
    theirs = {name: tuple(tensor.shape) for name, tensor in oracle.lora_state(model).items()}
    adapter = jax.tree.map(lambda leaf: np.zeros(leaf.shape), adapter_shapes(kind, config, rank=3))
    ours = torch_names.write_lora(adapter, config)
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        oracle.LORA_PREFIX + name: shape for name, shape in theirs.items()
    }


def adapter_shapes(kind: str, config: Config, rank: int) -> Tree:
    """A new adapter's leaves as shapes."""
    abstract = abstract_params(config)
    return jax.eval_shape(lambda key: lora.init(key, abstract, OUR_TARGETS[kind], rank), jax.random.key(0))


def module_names(kind: str, config: Config) -> set[str]:
    return set(lora.modules(adapter_shapes(kind, config, rank=2)))


def test_targets_of_the_transformer() -> None:
    """SPEC §2, spelled out for SD3's three kinds of block; this needs no torch."""
    config = MMDiTConfig.tiny()
    attention = {
        f"attn/{name}"
        for name in ("to_q", "to_k", "to_v", "to_out_0", "add_q_proj", "add_k_proj", "add_v_proj")
    }
    rest = {"norm1/linear", "norm1_context/linear", "ff/net_0/proj"}
    blocks = {f"blocks_{run}/{name}" for run in (0, 1) for name in attention | rest}
    ends = {"pos_embed/proj", "norm_out/linear", "proj_out"}
    assert module_names("student", config) == blocks | ends | {"blocks_0/ff_context/net_0/proj"}
    assert module_names("aux", config) == {f"blocks_{run}/{name}" for run in (0, 1) for name in attention}


def test_targets_of_the_autoencoder_are_its_encoder() -> None:
    names = module_names("vae", VAEConfig.tiny())
    assert {name.split("/")[0] for name in names} == {"encoder"}
    # 8 resnets below and 2 in the middle of two convolutions each, 3 down-samplings, 4 projections, first and last;
    # the tiny network changes width once.
    assert len(names) == 2 * 10 + 3 + 4 + 2 + 1


@pytest.mark.parametrize(
    ("targets", "module", "covered"),
    [
        (("linear",), "norm_out/linear", True),
        (("linear",), "linear", True),
        (("linear",), "time_text_embed/timestep_embedder/linear_1", False),
        (("proj",), "blocks_0/ff/net_0/proj", True),
        (("proj",), "blocks_0/attn/add_q_proj", False),
        (("proj",), "pos_embed/proj/kernel", False),
        (("attn/to_q",), "blocks_0/attn/to_q", True),
        (("attn/to_q",), "blocks_0/attn2/to_q", False),
        (("to_q|to_k",), "blocks_0/attn/to_k", True),
        (("to_q|to_k",), "blocks_0/attn/not_to_k", False),
        ((), "blocks_0/attn/to_k", False),
    ],
)
def test_covers(targets: tuple[str, ...], module: str, covered: bool) -> None:
    assert lora.covers(targets, module) == covered


# --- initialisation -----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 16])
def test_new_adapters_are_gaussian(rank: int) -> None:
    config = MMDiTConfig.tiny()
    abstract = abstract_params(config)
    adapter = leaves(lora.init(jax.random.key(3), abstract, lora.STUDENT_TARGETS, rank))
    firsts = np.concatenate([leaf.reshape(-1) for path, leaf in adapter.items() if path.endswith("/a")])
    assert all(not leaf.any() for path, leaf in adapter.items() if path.endswith("/b"))
    assert all(leaf.dtype == np.float32 for leaf in adapter.values())
    # About 6000 values per unit of rank: six standard errors either way.
    assert abs(firsts.std() * rank - 1) < 6 / (2 * firsts.size) ** 0.5
    assert abs(firsts.mean() * rank) < 6 / firsts.size**0.5
    assert 3.2 < np.abs(firsts).max() * rank < 6.5  # normal, not uniform
    layers = adapter["blocks_0/attn/to_q/a"]
    assert not np.array_equal(layers[0], layers[1])
    assert not np.array_equal(adapter["blocks_0/attn/to_k/a"], layers)
    again = leaves(lora.init(jax.random.key(3), abstract, lora.STUDENT_TARGETS, rank))
    other = leaves(lora.init(jax.random.key(4), abstract, lora.STUDENT_TARGETS, rank))
    np.testing.assert_array_equal(again["proj_out/a"], adapter["proj_out/a"])
    assert not np.array_equal(other["proj_out/a"], adapter["proj_out/a"])


def test_shapes_of_pairs() -> None:
    student = adapter_shapes("student", MMDiTConfig.tiny(), rank=5)
    encoder = adapter_shapes("vae", VAEConfig.tiny(), rank=5)
    shapes = {path: leaf.shape for path, leaf in flatten_dict(student | encoder, sep="/").items()}
    assert shapes["proj_out/a"] == (64, 5) and shapes["proj_out/b"] == (5, 64)
    assert shapes["blocks_0/ff/net_0/proj/a"] == (2, 64, 5) and shapes["blocks_0/ff/net_0/proj/b"] == (
        2,
        5,
        256,
    )
    assert shapes["encoder/conv_in/a"] == (3, 3, 3, 5) and shapes["encoder/conv_in/b"] == (5, 16)
    assert shapes["encoder/down_blocks_2/resnets_0/conv_shortcut/a"] == (1, 1, 16, 5)


def test_ranks_are_listed() -> None:
    adapter = random_lora(MMDiTConfig.tiny(), lora.AUXILIARY_TARGETS, 6)
    assert set(lora.modules(adapter).values()) == {6} and len(lora.modules(adapter)) == 14


# --- scale and merge ------------------------------------------------------------------------------


def test_scale_multiplies_the_product() -> None:
    adapter = random_lora(MMDiTConfig.tiny(), lora.STUDENT_TARGETS, 3)
    scaled = leaves(lora.scale(adapter, 0.25))
    for path, leaf in leaves(adapter).items():
        np.testing.assert_array_equal(scaled[path], leaf * 0.25 if path.endswith("/b") else leaf)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize(
    ("config", "targets"),
    [(MMDiTConfig.tiny(), lora.STUDENT_TARGETS), (VAEConfig.tiny(), lora.VAE_ENCODER_TARGETS)],
    ids=["transformer", "vae"],
)
def test_merging_computes_in_float32(config: Config, targets: tuple[str, ...], dtype: Any) -> None:
    """Each kernel is W + factor·A B of float64, rounded once: but for ties that float32 breaks otherwise."""
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(config))
    adapter = random_lora(config, targets, rank=8)
    merged, plain, pairs = leaves(lora.merge(params, adapter, 0.7)), leaves(params), leaves(adapter)
    eps = float(ml_dtypes.finfo(dtype).eps)
    equal = total = 0
    for path, leaf in plain.items():
        module, name = path.rpartition("/")[::2]
        assert merged[path].dtype == dtype and merged[path].shape == leaf.shape
        if name != "kernel" or f"{module}/a" not in pairs:
            np.testing.assert_array_equal(merged[path], leaf)
            continue
        delta = 0.7 * (pairs[f"{module}/a"].astype(np.float64) @ pairs[f"{module}/b"].astype(np.float64))
        exact = leaf.astype(np.float64) + delta
        rounded = exact.astype(np.float32).astype(dtype)
        equal, total = equal + (merged[path] == rounded).sum(), total + leaf.size
        # Half a unit in the last place, and float32's own error of the sum; subnormals of float16 end at 6e-8.
        allowed = 0.51 * eps * np.abs(exact) + 4e-7 * np.abs(exact).max() + 3.1e-8
        assert (np.abs(merged[path].astype(np.float64) - exact) <= allowed).all(), path
    assert equal / total > (0.999 if eps > 1e-5 else 0.5)


def test_merging_nothing_copies_nothing() -> None:
    params = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"bias": jnp.ones(3)}}
    merged = lora.merge(params, {})
    assert merged["a"]["kernel"] is params["a"]["kernel"] and merged["b"]["bias"] is params["b"]["bias"]


def test_merging_leaves_its_arguments_alone() -> None:
    params = {"a": {"kernel": jnp.ones((2, 3))}}
    lora.merge(params, {"a": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 3))}})
    np.testing.assert_array_equal(params["a"]["kernel"], 1)


# --- errors ---------------------------------------------------------------------------------------


def test_errors_of_init() -> None:
    abstract = abstract_params(MMDiTConfig.tiny())
    for rank in (0, -3):
        with pytest.raises(ValueError, match=f"rank of at least 1, not {rank}"):
            lora.init(jax.random.key(0), abstract, lora.STUDENT_TARGETS, rank)
    with pytest.raises(ValueError, match=r"no module matches .*encoder"):
        lora.init(jax.random.key(0), abstract, lora.VAE_ENCODER_TARGETS, 4)


@pytest.mark.parametrize(
    ("module", "a", "b", "message"),
    [
        ("c/d", (4, 2), (2, 3), "adapts c/d .* no such module"),
        ("c/e", (5, 2), (2, 3), r"adapts c/e with a \(5, 2\) and b \(2, 3\), but its kernel is \(4, 3\)"),
        ("c/e", (4, 2), (2, 4), r"but its kernel is \(4, 3\)"),
        ("c/f", (2, 4, 2), (3, 2, 4), r"but its kernel is \(2, 3, 4\)"),
        ("c/g", (4, 2), (2, 3), "adapts c/g .* no such module"),
    ],
)
def test_errors_of_merge(module: str, a: tuple[int, ...], b: tuple[int, ...], message: str) -> None:
    params = {
        "c": {
            "e": {"kernel": np.ones((4, 3))},
            "f": {"kernel": np.ones((2, 3, 4))},
            "g": {"bias": np.ones(3)},
        }
    }
    outer, inner = module.split("/")
    with pytest.raises(ValueError, match=message):
        lora.merge(params, {outer: {inner: {"a": uniform("a", a), "b": uniform("b", b)}}})


# --- gradients in 16 bits -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_an_adapters_gradient_is_float32s(dtype: Any) -> None:
    """Only the factors are rounded to 16 bits, not their product; sums beyond float16's range do not overflow."""
    generator = np.random.default_rng(0)
    x, slope = (jnp.asarray(generator.standard_normal((2, 64, 8)) * 40, dtype) for _ in range(2))
    weight = jnp.asarray(generator.standard_normal((8, 8)), jnp.float32)
    _, backward = jax.vjp(trained_product, x, weight)
    of_x, of_weight = backward(slope)
    wide = [np.asarray(array, np.float64).reshape(-1, 8) for array in (x, slope)]
    expected = wide[0].T @ wide[1]
    assert of_weight.dtype == jnp.float32 and of_x.dtype == dtype
    np.testing.assert_allclose(of_weight, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected).max() > 65504 / 2
    plain = jax.grad(lambda x: (x @ weight.astype(dtype) * slope).sum())(x)
    np.testing.assert_array_equal(of_x, plain)
