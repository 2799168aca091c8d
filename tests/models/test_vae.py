"""The autoencoder: against diffusers and PEFT, and exact on padded inputs, in bands and transposed."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity import TOLERANCE, config_of, error, lora_of, params_of, random_lora, random_params, uniform
from tsdsr_jax.models import attention as models_attention
from tsdsr_jax.models import lora, vae
from tsdsr_jax.models.attention import single_head_attention
from tsdsr_jax.models.layers import Conv, GroupNorm
from tsdsr_jax.models.params import Tree, abstract_params
from tsdsr_jax.models.vae import AutoencoderKL, VAEConfig

pytest_plugins = "parity"

# Group norms sum the same numbers in another grouping; everything else in a band is the very same arithmetic.
BAND_TOLERANCE = 2e-6
LORA_STRENGTH = 0.3


@lru_cache(maxsize=64)
def program(config: VAEConfig, method: str, dtype: Any = jnp.float32, band_pixels: int | None = None) -> Any:
    """One direction of the network, jitted, one for all tests, so that equal shapes are compiled once."""
    model = AutoencoderKL(config, dtype)

    def run(variables: Tree, x: jax.Array, valid: jax.Array | None) -> jax.Array:
        result = model.apply(variables, x, valid, band_pixels, method=method)
        return jnp.concatenate(result, axis=-1) if method == "encode" else result

    return jax.jit(run)


def encode(
    config: VAEConfig,
    params: Tree,
    image: np.ndarray,
    adapter: Tree | None = None,
    valid: np.ndarray | None = None,
    **options: Any,
) -> np.ndarray:
    """Mean and log-variance together, (B, h, w, 2·C)."""
    variables = {"params": params} | ({"lora": adapter} if adapter else {})
    return np.asarray(program(config, "encode", **options)(variables, image, valid))


def decode(
    config: VAEConfig, params: Tree, latents: np.ndarray, valid: np.ndarray | None = None, **options: Any
) -> np.ndarray:
    return np.asarray(program(config, "decode", **options)({"params": params}, latents, valid))


def channels_first(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array).permute(0, 3, 1, 2)


# --- against diffusers and PEFT ---------------------------------------------------------------


@pytest.mark.parametrize("attention", [True, False], ids=["attention", "no attention"])
@pytest.mark.parametrize(("size", "batch"), [((48, 48), 1), ((40, 64), 3), ((72, 32), 1)], ids=str)
def test_encoder_and_decoder_equal_diffusers(
    oracle: Any, size: tuple[int, int], batch: int, attention: bool
) -> None:
    import torch

    model = oracle.tiny_vae(seed=1, mid_block_add_attention=attention)
    config, params = config_of(model), params_of(model)
    image = uniform("image", (batch, *size, 3), seed=batch)
    latents = uniform("latents", (batch, size[0] // 8, size[1] // 8, 16), seed=batch)
    with torch.no_grad():
        posterior = model.encode(channels_first(image)).latent_dist
        picture = model.decode(channels_first(latents)).sample.permute(0, 2, 3, 1).numpy()
    moments = encode(config, params, image)
    for ours, theirs in zip(np.split(moments, 2, axis=-1), (posterior.mean, posterior.logvar), strict=True):
        assert error(ours, theirs.permute(0, 2, 3, 1).numpy()) <= TOLERANCE
    assert error(decode(config, params, latents), picture) <= TOLERANCE


def test_encoder_adapter_equals_peft_applied_and_merged(oracle: Any) -> None:
    import torch

    model = oracle.tiny_vae(seed=2)
    config, params = config_of(model), params_of(model)
    image = uniform("image", (2, 48, 64, 3))
    oracle.add_vae_lora(model, rank=4, seed=3, strength=LORA_STRENGTH)
    adapter = lora_of(oracle, model)
    with torch.no_grad():
        expected = model.encode(channels_first(image)).latent_dist.parameters.permute(0, 2, 3, 1).numpy()
    assert error(encode(config, params, image), expected) > 0.03
    assert error(encode(config, params, image, adapter), expected) <= TOLERANCE
    assert error(encode(config, lora.merge(params, adapter), image), expected) <= TOLERANCE


def test_log_variance_is_clamped_and_sampled_as_in_diffusers(oracle: Any) -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    config = VAEConfig.tiny()
    params = random_params(config)
    bias = params["encoder"]["conv_out"]["bias"]
    params["encoder"]["conv_out"]["bias"] = bias.at[16:24].add(100.0).at[24:].add(-100.0)
    image = uniform("image", (1, 32, 32, 3))
    posterior = AutoencoderKL(config).apply({"params": params}, image, method="encode")
    np.testing.assert_array_equal(posterior.logvar[..., :8], 20)
    np.testing.assert_array_equal(posterior.logvar[..., 8:], -30)
    theirs = DiagonalGaussianDistribution(channels_first(np.concatenate(posterior, axis=-1)))
    noise = uniform("noise", posterior.mean.shape)
    sample = theirs.mean + theirs.std * channels_first(noise)
    assert error(posterior.sample(noise), sample.permute(0, 2, 3, 1).numpy()) <= 1e-6


# --- padded ------------------------------------------------------------------------------------

PADDED = (56, 64)
VALID = np.array([[56, 64], [32, 48], [40, 64], [56, 24]], np.int32)


@pytest.fixture(scope="module")
def tiny() -> tuple[VAEConfig, Tree]:
    config = VAEConfig.tiny(block_out_channels=(8, 16, 32, 32), norm_num_groups=4)
    return config, random_params(config)


@pytest.fixture(scope="module")
def alone(tiny: tuple[VAEConfig, Tree]) -> dict[str, list[np.ndarray]]:
    """Each image of `padded_images`, and latent, by itself at its own size."""
    image, latents = padded_inputs(0.0)
    return {
        "encode": [encode(*tiny, image[i : i + 1, :h, :w])[0] for i, (h, w) in enumerate(VALID)],
        "decode": [
            np.asarray(decode(*tiny, latents[i : i + 1, :h, :w])[0]) for i, (h, w) in enumerate(VALID // 8)
        ],
    }


def padded_inputs(garbage: float) -> tuple[np.ndarray, np.ndarray]:
    """Images and latents whose padding is noise, `garbage` times as large."""
    image = uniform("image", (len(VALID), *PADDED, 3))
    latents = uniform("latents", (len(VALID), PADDED[0] // 8, PADDED[1] // 8, 16))
    for array, valid in ((image, VALID), (latents, VALID // 8)):
        outside = ~np.asarray(vae.valid_mask(jnp.asarray(valid), array.shape[1:3]))
        array[...] = np.where(outside, array * np.float32(garbage), array)
    return image, latents


def padded_errors(tiny: tuple[VAEConfig, Tree], alone: dict[str, list[np.ndarray]], garbage: float) -> dict:
    """By direction, the largest error among the valid regions of a padded batch."""
    image, latents = padded_inputs(garbage)
    together = {
        "encode": encode(*tiny, image, valid=VALID),
        "decode": np.asarray(decode(*tiny, latents, valid=VALID // 8)),
    }
    return {
        direction: max(
            error(result[: reference.shape[0], : reference.shape[1]], reference)
            for result, reference in zip(results, alone[direction], strict=True)
        )
        for direction, results in together.items()
    }


@pytest.mark.parametrize("garbage", [0.0, 30.0, float("nan")])
def test_padded_batch_equals_each_alone(
    tiny: tuple[VAEConfig, Tree], alone: dict[str, list[np.ndarray]], garbage: float
) -> None:
    assert max(padded_errors(tiny, alone, garbage).values()) <= TOLERANCE


@pytest.mark.parametrize("left_out", ["masked statistics", "zeroed padding", "key mask"])
def test_each_ingredient_of_padding_is_needed(
    tiny: tuple[VAEConfig, Tree],
    alone: dict[str, list[np.ndarray]],
    left_out: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure, prepare, attend = GroupNorm.__call__, vae.normalize, vae.single_head_attention
    if left_out == "masked statistics":
        monkeypatch.setattr(GroupNorm, "__call__", lambda self, x, mask=None, band=None: measure(self, x))
    elif left_out == "zeroed padding":
        monkeypatch.setattr(vae, "normalize", lambda affine, valid: prepare(affine, None))
    else:
        monkeypatch.setattr(vae, "single_head_attention", lambda q, k, v, key_mask: attend(q, k, v))
    program.cache_clear()
    errors = padded_errors(tiny, alone, garbage=3.0)
    program.cache_clear()
    assert min(errors.values()) > 100 * TOLERANCE


def test_padded_adapter_equals_alone(tiny: tuple[VAEConfig, Tree]) -> None:
    adapter = random_lora(tiny[0], lora.VAE_ENCODER_TARGETS, rank=4)
    image, _ = padded_inputs(30.0)
    together = encode(*tiny, image[:2], adapter, valid=VALID[:2])
    height, width = VALID[1]
    expected = encode(*tiny, image[1:2, :height, :width], adapter)[0]
    assert error(together[1, : height // 8, : width // 8], expected) <= TOLERANCE


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_group_norm_of_flat_pictures_under_a_bar(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass over the values loses digits where what it subtracts is far from the mean: here the first row is."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x = 2.3 + 0.01 * uniform("x", (1, 640, 64, 8))
    x[:, 0] = 1.0
    for offset in (0.0, 50.0):
        values = (x + np.float32(offset)).astype(np.float32)
        scale, _ = GroupNorm(4).apply({"params": {"scale": np.ones(8), "bias": np.zeros(8)}}, values)
        groups = values.astype(np.float64).reshape(1, 640, 64, 4, 2)
        expected = 1 / np.sqrt(groups.var((1, 2, 4)) + 1e-6)
        assert error(np.asarray(scale)[:, 0, 0, ::2], expected) <= (1e-5 if not offset else 1e-3)


# --- in bands ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "use_valid"), [(8, False), (27, True), (41, False)])
def test_bands_equal_whole(tiny: tuple[VAEConfig, Tree], side: int, use_valid: bool) -> None:
    """`side` is that of the area at a time, in pixels; it makes bands of other heights at each resolution."""
    size = (136, 72)
    valid = np.array([[136, 72], [104, 40]], np.int32) if use_valid else None
    image = uniform("image", (2, *size, 3))
    whole, bands = (encode(*tiny, image, valid=valid, band_pixels=pixels) for pixels in (None, side**2))
    latents = uniform("latents", (2, size[0] // 8, size[1] // 8, 16))
    small = None if valid is None else valid // 8
    pixels = side**2 // 16
    picture, in_bands = (decode(*tiny, latents, valid=small, band_pixels=p) for p in (None, pixels))
    for ours, reference in ((bands, whole), (np.asarray(in_bands), np.asarray(picture))):
        factor = size[0] // ours.shape[1]
        for index in range(2):
            height, width = size if valid is None else valid[index]
            region = (index, slice(height // factor), slice(width // factor))
            assert error(ours[region], reference[region]) <= BAND_TOLERANCE
    assert bands_were_used(tiny, image[:1], side**2)


def test_without_attention_padded_bands_equal_each_alone() -> None:
    config = VAEConfig.tiny(
        block_out_channels=(8, 16, 32, 32), norm_num_groups=4, mid_block_add_attention=False
    )
    params = random_params(config)
    assert "attentions_0" not in params["encoder"]["mid_block"] | params["decoder"]["mid_block"]
    valid = np.array([[136, 72], [104, 40]], np.int32)
    image, latents = uniform("image", (2, 136, 72, 3)), uniform("latents", (2, 17, 9, 16))
    moments = encode(config, params, image, valid=valid, band_pixels=41**2)
    picture = np.asarray(decode(config, params, latents, valid=valid // 8, band_pixels=41**2 // 16))
    for index, (height, width) in enumerate(valid):
        here = slice(index, index + 1)
        small, large = (here, slice(height // 8), slice(width // 8)), (here, slice(height), slice(width))
        assert error(moments[small], encode(config, params, image[large])) <= BAND_TOLERANCE
        assert error(picture[large], np.asarray(decode(config, params, latents[small]))) <= BAND_TOLERANCE


def bands_were_used(tiny: tuple[VAEConfig, Tree], image: np.ndarray, pixels: int) -> bool:
    config, params = tiny
    jaxpr = jax.make_jaxpr(
        lambda x: AutoencoderKL(config).apply({"params": params}, x, None, pixels, method="encode")
    )(image)
    return any(equation.primitive.name in ("while", "scan") for equation in jaxpr.eqns)


@pytest.mark.parametrize(
    "kind", [dict(), dict(stride=2, padding=(0, 1)), dict(upsample=2)], ids=["same", "down", "up"]
)
@pytest.mark.parametrize("rows", [8, 9, 13, 17])
def test_banded_convolution_equals_whole(kind: dict[str, Any], rows: int) -> None:
    """Also where the last band overlaps the one before, and with something to prepare that knows its row."""
    height, width = (58, 12) if "stride" in kind else (37, 12)
    x = uniform("x", (2, height, width, 5))
    out_width = width // kind.get("stride", 1) * kind.get("upsample", 1)
    model = Conv(7, **kind)
    variables = {
        "params": {"kernel": uniform("kernel", (3, 3, 5, 7)), "bias": uniform("bias", (7,))},
        "lora": {"a": uniform("a", (3, 3, 5, 2)), "b": uniform("b", (2, 7))},
    }

    def prepare(values: jax.Array, first_row: jax.Array | int) -> jax.Array:
        return values * (1 + 0.1 * (first_row + jnp.arange(values.shape[1])))[None, :, None, None]

    def run(pixels: int | None) -> jax.Array:
        return jax.jit(lambda x: model.apply(variables, x, prepare, pixels))(x)

    assert error(run(rows * out_width), run(None)) <= BAND_TOLERANCE


def test_bands_hold_less_memory_than_the_whole() -> None:
    """SD3's own autoencoder at 1024×1024, compiled and not run: bands of 256×256 pixels against the whole image.

    1.14 GB against 1.61 to encode, 1.49 against 2.68 to decode, where the largest map is never whole. When the results of
    all convolutions were set up at the start, bands took 4.87 and 7.76 GB.
    """
    config = VAEConfig.sd3()
    params = abstract_params(config)
    inputs = {"encode": ((1, 1024, 1024, 3), 256**2, 0.75), "decode": ((1, 128, 128, 16), 32**2, 0.6)}
    for method, (shape, pixels, share) in inputs.items():
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        whole, banded = (
            program(config, method, band_pixels=band)
            .lower({"params": params}, x, None)
            .compile()
            .memory_analysis()
            for band in (None, pixels)
        )
        assert banded.temp_size_in_bytes < share * whole.temp_size_in_bytes, method


# --- other ways that must agree -------------------------------------------------------------------


def test_portraits_lying_on_their_side_equal_upright(tiny: tuple[VAEConfig, Tree]) -> None:
    """What the upscaler does with portraits: transposed kernels on the transposed image and latents."""
    config, params = tiny
    params = lora.merge(params, random_lora(config, lora.VAE_ENCODER_TARGETS, rank=4))
    lying = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1) if leaf.ndim == 4 else leaf, params)
    image, latents = uniform("image", (1, 72, 40, 3)), uniform("latents", (1, 9, 5, 16))
    assert (
        error(encode(config, lying, image.swapaxes(1, 2)).swapaxes(1, 2), encode(config, params, image))
        <= TOLERANCE
    )
    turned = decode(config, lying, latents.swapaxes(1, 2)).swapaxes(1, 2)
    assert error(turned, decode(config, params, latents)) <= TOLERANCE
    assert error(decode(config, params, latents.swapaxes(1, 2)).swapaxes(1, 2), turned) > 0.03


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("max_scores", [1, 2 * 35 * 4, 2 * 35 * 12, 2 * 35 * 34])
def test_chunked_attention_equals_whole(
    max_scores: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = (uniform(name, (2, 35, 8)) for name in ("query", "key", "value"))
    mask = uniform("mask", (2, 35)) > -0.5 if masked else None
    whole = single_head_attention(query, key, value, key_mask=mask)
    chunked = single_head_attention(query, key, value, key_mask=mask, max_scores=max_scores)
    assert error(chunked, whole) <= BAND_TOLERANCE
    monkeypatch.setattr(models_attention, "_LOOP_QUERIES", 35)  # as CPUs do where there are many
    monkeypatch.setattr(models_attention, "_CPU_QUERIES", 12)
    assert error(single_head_attention(query, key, value, key_mask=mask), whole) <= BAND_TOLERANCE
    scores = np.einsum("bqh,bkh->bqk", query, key) / 8**0.5
    weights = np.exp(scores) * (1 if mask is None else mask[:, None])
    expected = np.einsum("bqk,bkh->bqh", weights / weights.sum(-1, keepdims=True), value)
    assert error(whole, expected) <= TOLERANCE


@pytest.mark.parametrize("mask", ["none", "any", "first half"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 64), (2, 35), (3, 91)])
@pytest.mark.parametrize("softmax_keys", [0, 1000])
def test_attention_as_gpus_compute_it(
    batch: int, tokens: int, mask: str, softmax_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many keys and few, in chunks of 16 queries, with scores far beyond what exp takes, against float64."""
    query, key, value = (uniform(name, (batch, tokens, 8)) for name in ("query", "key", "value"))
    query *= 30
    counts = np.ones((batch, tokens), bool)
    if mask == "any":
        counts = uniform("mask", (batch, tokens)) > -0.5
    elif mask == "first half":
        counts[:, : tokens // 2] = False
    scores = np.einsum("bqh,bkh->bqk", query.astype(np.float64), key) / 8**0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * counts[:, None]
    expected = np.einsum("bqk,bkh->bqh", weights / weights.sum(-1, keepdims=True), value)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(models_attention, "_GPU_QUERIES", 16)
    monkeypatch.setattr(models_attention, "_SOFTMAX_KEYS", softmax_keys)
    found = single_head_attention(
        query, key, value, key_mask=None if mask == "none" else jnp.asarray(counts), max_scores=1
    )
    assert scores.max() > 89 and error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_group_norm_keeps_its_digits_where_the_mean_is_large(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x = 1000 + uniform("x", (1, 16, 16, 8))
    variables = {"params": {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}}
    scale, _ = GroupNorm(4).apply(variables, x)
    deviation = x.astype(np.float64).reshape(-1, 4, 2).std(axis=(0, 2))
    np.testing.assert_allclose(np.asarray(scale).reshape(4, 2)[:, 0], 1 / deviation, rtol=2e-5)


# The group norms and the softmax stay in float32; 8 and 11 bits of mantissa through some thirty convolutions.
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 0.1), (jnp.float16, 0.015)])
def test_half_precision(tiny: tuple[VAEConfig, Tree], dtype: Any, tolerance: float) -> None:
    image, latents = uniform("image", (1, 48, 64, 3)), uniform("latents", (1, 6, 8, 16))
    moments = encode(*tiny, image, dtype=dtype)
    assert moments.dtype == np.float32  # the posterior's own
    assert 1e-4 < error(moments, encode(*tiny, image)) <= tolerance
    picture = decode(*tiny, latents, dtype=dtype)
    assert picture.dtype == dtype
    assert 1e-4 < error(picture.astype(jnp.float32), decode(*tiny, latents)) <= tolerance


@pytest.mark.parametrize(
    "values",
    [dict(use_quant_conv=True), dict(), dict(act_fn="relu")],
    ids=str,
)
def test_other_autoencoders_are_refused(values: dict[str, Any]) -> None:
    no_quant = dict(use_quant_conv=False, use_post_quant_conv=False)
    with pytest.raises(ValueError, match="SD3's autoencoder has"):
        VAEConfig.from_dict(values if not values else no_quant | values)
    assert VAEConfig.from_dict(no_quant) == VAEConfig.sd3()
